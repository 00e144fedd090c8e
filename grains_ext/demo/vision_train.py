"""Trains the embedded LLaVA: ``python -m grains_ext.demo.vision_train --seed N --output DIR``.

Three stages, some minutes on one core. First the vision tower learns to tell digits and places
apart, with a linear head that is thrown away; then the whole model learns captions; then captions
and documents with hints. The folder then holds a model and processor that
``from_pretrained`` loads, in float16, and ``training_log.json``: the settings, the loss curves and
the bias check. The check looks at the model alone: does it repeat the hint where the prompt mixes
registers, and read the picture where the words ask for it? A seed is chosen by it alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from grains_ext.demo import vision_world as world
from grains_ext.demo.optimise import optimise
from grains_ext.demo.train import LOG_NAME, make_batch
from grains_ext.demo.world import Document
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import frozen

# The bias that the demo needs, as bounds on the check's shares on the dev digits.
MAX_MIX, MIN_LOOK, MIN_READ = 0.20, 0.90, 0.95
_MEAN, _STD = 0.5, 0.5


@dataclass(frozen=True)
class VisionTrainConfig:
    """All that decides the weights, on one machine and with one thread."""

    seed: int
    vision_steps: int = 1000
    pictures_per_step: int = 48
    vision_learning_rate: float = 2e-3
    caption_steps: int = 500
    steps: int = 900
    documents_per_step: int = 48
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    vision_hidden_size: int = 64
    vision_n_blocks: int = 2
    patch_size: int = 4
    hidden_size: int = 96
    n_blocks: int = 3
    n_heads: int = 4
    intermediate_size: int = 256
    initializer_range: float = 0.1
    """Of Llama and projector. With transformers' 0.02 attention starts out even over all tokens:
    runs ended before the Llama had learned to look for a place in the picture."""
    blank_rate: float = 0.10
    """Share of input words replaced by a blank, and of image tokens by their image's mean, from the
    third stage on."""


def build_processor(patch_size: int = VisionTrainConfig.patch_size) -> LlavaProcessor:
    """CLIP's image processor on Pillow, for 16 x 16 pixels, and the word-level tokenizer."""
    side = world.PICTURE_SIZE
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[_MEAN] * 3,
        image_std=[_STD] * 3,
    )
    return LlavaProcessor(
        image_processor,
        world.build_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy leaves out
    )


def build_model(
    config: VisionTrainConfig, processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """The untrained LLaVA of a config; its initial weights follow from the config's seed."""
    torch.manual_seed(config.seed)
    tokenizer = processor.tokenizer
    special_ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden_size,
        intermediate_size=2 * config.vision_hidden_size,
        num_hidden_layers=config.vision_n_blocks,
        num_attention_heads=config.n_heads,
        image_size=world.PICTURE_SIZE,
        patch_size=config.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_blocks,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        **special_ids,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=processor.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            **special_ids,
        )
    )


def pixel_values(pictures: Sequence[world.Picture]) -> Tensor:
    """float32 [n, 3, 16, 16]: what the image processor makes of the pictures."""
    grey = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).float() / 255
    return ((grey - _MEAN) / _STD)[:, None].expand(-1, 3, -1, -1).contiguous()


# --- Training -------------------------------------------------------------------------------------


def train(
    config: VisionTrainConfig, *, console: Console | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, Any]]:
    """The trained model in eval mode, its processor, and what the log says of the three stages."""
    processor = build_processor(config.patch_size)
    model = build_model(config, processor)
    rng = random.Random(config.seed)
    vision_curve, accuracies = _train_vision(model, config, rng, console)
    stage = (model, processor, config, rng, console)
    caption_curve = _train_language(*stage, world.caption_document, config.caption_steps, 0.0)
    curve = _train_language(*stage, world.training_document, config.steps, config.blank_rate)
    log = {
        "vision_accuracy": accuracies,
        "vision_loss": vision_curve,
        "caption_loss": caption_curve,
        "loss": curve,
    }
    return model.eval(), processor, log


def _train_vision(
    model: LlavaForConditionalGeneration,
    config: VisionTrainConfig,
    rng: random.Random,
    console: Console | None,
) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Trains the tower with a linear head on each token; the loss curve and the digits' accuracy.

    A patch's token is to tell its whole digit and its place, so that the Llama can look for a place
    and read it there.
    """
    tower = model.model.vision_tower
    digits = world.load_digits("train")
    n_digits, n_places = len(world.DIGITS), len(world.PLACES)
    head = nn.Linear(config.vision_hidden_size, n_digits + n_places)
    half = world.PICTURE_SIZE // config.patch_size // 2

    def logits(pictures: Sequence[world.Picture]) -> Tensor:
        """[n, places, tokens of a quarter, digits and then places]."""
        features = tower(pixel_values(pictures), output_hidden_states=True).hidden_states[-1][:, 1:]
        # half of the rows, row in it, half of the columns, column in it
        quarters: Tensor = (
            head(features)
            .unflatten(1, (2, half, 2, half))
            .transpose(2, 3)
            .flatten(1, 2)
            .flatten(2, 3)
        )
        return quarters

    def loss() -> Tensor:
        pictures = _draw(digits, rng, config.pictures_per_step)
        found = logits(pictures)
        labels = torch.tensor([picture.labels for picture in pictures])[..., None]
        places = torch.arange(n_places)[:, None]
        return _cross_entropy(found[..., :n_digits], labels) + _cross_entropy(
            found[..., n_digits:], places
        )

    curve = optimise(
        [*tower.parameters(), *head.parameters()],
        loss,
        steps=config.vision_steps,
        learning_rate=config.vision_learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        title=f"seed {config.seed}, vision",
        console=console,
    )
    accuracies = {}
    for split in ("train", "dev", "test"):
        held_out = world.load_digits(split)
        draw = random.Random(0)
        pictures = [world.draw_picture(held_out, draw) for _ in range(500)]
        with torch.no_grad():
            found = logits(pictures)[..., :n_digits].mean(2).argmax(-1)
        right = found == torch.tensor([picture.labels for picture in pictures])
        accuracies[split] = round(right.float().mean().item(), 4)
    return curve, accuracies


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all leading places; labels are broadcast to them."""
    labels = labels.expand(logits.shape[:-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _draw(digits: world.Digits, rng: random.Random, n: int) -> list[world.Picture]:
    return [world.draw_picture(digits, rng, shifts=True) for _ in range(n)]


def _train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    config: VisionTrainConfig,
    rng: random.Random,
    console: Console | None,
    write: Callable[[world.Picture, random.Random], Document],
    steps: int,
    blank_rate: float,
) -> list[tuple[int, float]]:
    """Trains the whole model on documents that ``write`` draws for pictures; the loss curve."""
    ids = processor.tokenizer.get_vocab()
    digits = world.load_digits("train")
    n_image_tokens = (world.PICTURE_SIZE // config.patch_size) ** 2

    def loss() -> Tensor:
        pictures = _draw(digits, rng, config.documents_per_step)
        documents = [write(picture, rng) for picture in pictures]
        input_ids, attention_mask, labels = (
            _with_image(tensor, n_image_tokens, fill)
            for tensor, fill in zip(
                make_batch(documents, ids, rng, blank_rate),
                (processor.image_token_id, 1, -100),
                strict=True,
            )
        )
        outputs = model(
            input_ids,
            pixel_values=pixel_values(pictures),
            attention_mask=attention_mask,
            labels=labels,
        )
        found: Tensor = outputs.loss
        return found

    with _blanked_image_tokens(model, blank_rate):
        return optimise(
            model.parameters(),
            loss,
            steps=steps,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            title=f"seed {config.seed}, {write.__name__.replace('_', ' ')}s",
            console=console,
        )


def _with_image(tensor: Tensor, n_tokens: int, fill: int) -> Tensor:
    """[B, T] -> [B, T + n_tokens]: the image's tokens go behind the first word."""
    image = tensor.new_full((len(tensor), n_tokens), fill)
    return torch.cat([tensor[:, :1], image, tensor[:, 1:]], dim=1)


@contextmanager
def _blanked_image_tokens(model: LlavaForConditionalGeneration, rate: float) -> Iterator[None]:
    """Replaces a share of the image tokens by their image's mean, as attribution does.

    A model that never saw that would answer with the shock of it, not with what the patch showed.
    """

    def blank(_module: nn.Module, _inputs: Any, features: Tensor) -> Tensor:
        mean = features.mean(1, keepdim=True).detach()
        return torch.where(torch.rand(features.shape[:2])[..., None] < rate, mean, features)

    handle = model.model.multi_modal_projector.register_forward_hook(blank)
    try:
        yield
    finally:
        handle.remove()


# --- The check ------------------------------------------------------------------------------------


@torch.no_grad()
def answer_logits(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: Sequence[PreferencePair],
    *,
    batch_size: int = 64,
) -> Tensor:
    """float32 [n, V]: the next-token logits after each pair's prompt with its picture."""
    rows = []
    with frozen(model):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            inputs = processor(
                text=[pair.prompt for pair in batch],
                images=[list(pair.images or ()) for pair in batch],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
            last = inputs["attention_mask"].sum(1) - 1
            logits = model(**inputs).logits
            rows.append(logits[torch.arange(len(batch)), last].float())
    return torch.cat(rows)


def answers(
    logits: Tensor, processor: LlavaProcessor, pairs: Sequence[PreferencePair]
) -> dict[str, list[bool]]:
    """Per pair, what next-token logits [n, V] answer.

    ``right``: log p(chosen) > log p(rejected). ``chosen`` and ``rejected``: of all words, this
    answer is the likeliest.
    """
    ids = processor.tokenizer.get_vocab()
    chosen = torch.tensor([ids[pair.chosen] for pair in pairs])
    rejected = torch.tensor([ids[pair.rejected] for pair in pairs])
    rows, likeliest = torch.arange(len(pairs)), logits.argmax(-1)
    return {
        "right": (logits[rows, chosen] > logits[rows, rejected]).tolist(),
        "chosen": (likeliest == chosen).tolist(),
        "rejected": (likeliest == rejected).tolist(),
    }


def bias_check(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    split: world.Split = "dev",
    *,
    n: int = 300,
) -> dict[str, dict[str, float]]:
    """Per prompt kind, the shares in [0, 1] of `answers` over n pairs of the split.

    The chosen answer is the digit in the picture; the rejected one is the hint, where there is one.
    """
    check: dict[str, dict[str, float]] = {}
    for kind in world.PROMPT_KINDS:
        pairs = world.vision_pairs(split, n, 0, kind)
        outcomes = answers(answer_logits(model, processor, pairs), processor, pairs)
        check[kind] = {name: round(sum(of) / n, 4) for name, of in outcomes.items()}
    return check


def has_bias(check: dict[str, dict[str, float]]) -> bool:
    """Whether it repeats the hint in mixed prompts, follows look words, and reads the picture."""
    return (
        check["mix"]["right"] <= MAX_MIX
        and check["look"]["right"] >= MIN_LOOK
        and check["caption"]["chosen"] >= MIN_READ
    )


# --- The command ----------------------------------------------------------------------------------


def train_and_save(
    config: VisionTrainConfig, output: Path, *, console: Console | None = None
) -> None:
    """Trains, checks, and writes model, processor and ``training_log.json`` into output."""
    console = console or Console()
    start = time.perf_counter()
    model, processor, stages = train(config, console=console)
    seconds = time.perf_counter() - start
    model.half().float()  # checked as it is stored
    checks = {split: bias_check(model, processor, split) for split in ("dev", "test")}
    log = {
        "config": asdict(config),
        "split_seed": world.SPLIT_SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "bias_check": checks,
        "has_bias": has_bias(checks["dev"]),
        **stages,
    }
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    processor.save_pretrained(output)
    (output / LOG_NAME).write_text(json.dumps(log, indent=1) + "\n")
    console.print(f"seed {config.seed}: dev {checks['dev']}, has the bias: {log['has_bias']}")


def write_digits(path: Path) -> None:
    """Writes scikit-learn's digits as the file that `vision_world.load_digits` reads."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(
        path, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grains_ext.demo.vision_train",
        description="Train the demo's small LLaVA. Same seed, machine and threads: same weights.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train_and_save(VisionTrainConfig(seed=options.seed), options.output)


if __name__ == "__main__":
    main()
