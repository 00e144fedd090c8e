"""Models and pairs made on the spot: known shapes, random weights, a word-level tokenizer.

Attribution costs what the shape costs, whatever the weights are; how many steps it needs depends on
the weights, so the smallest Llama is also trained for a moment (`trained_model`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar

SPECIAL_TOKENS = ("<unk>", "<bos>", "<eos>", "<pad>")
BOS_ID, EOS_ID, PAD_ID = 1, 2, 3


@dataclass(frozen=True)
class Shape:
    """The sizes that decide what a causal LM costs."""

    family: str
    hidden_size: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    intermediate_size: int
    vocab_size: int = 32_000
    tied: bool = True
    max_positions: int = 1024


SHAPES = {
    "llama-15m": Shape("llama", 288, 6, 6, 6, 768),
    "llama-110m": Shape("llama", 768, 12, 12, 12, 2048),
    "gpt2-30m": Shape("gpt2", 384, 10, 6, 6, 1536),
    "gpt2-110m": Shape("gpt2", 768, 12, 12, 12, 3072),
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 8192, vocab_size=128_256),
    "llama-8b": Shape("llama", 4096, 32, 32, 8, 14_336, vocab_size=128_256, tied=False),
}
"""The Llamas of 15M and 110M are llama2.c's, those of 1B and 8B Llama 3's, gpt2-110m is GPT-2's."""

TINY = {
    "llama": Shape("llama", 32, 3, 4, 2, 64, vocab_size=128, max_positions=128),
    "gpt2": Shape("gpt2", 32, 3, 4, 4, 64, vocab_size=128, max_positions=128),
}
"""For tests."""


def random_model(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A model of the shape in eval mode, its weights drawn so that tokens clearly matter.

    The libraries' own initial values of 0.02 make all outputs nearly the same. Here every matrix
    keeps its input's size, and what a block adds to the residual stream is scaled by the depth.
    """
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.n_blocks,
        "num_attention_heads": shape.n_heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if shape.family == "gpt2":
        sizes["n_inner"] = shape.intermediate_size
    else:
        sizes["num_key_value_heads"] = shape.n_kv_heads
        sizes["intermediate_size"] = shape.intermediate_size
    config = CONFIG_MAPPING[shape.family](**sizes)
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        _draw_weights(model, shape)
    return model.eval()


def _draw_weights(model: nn.Module, shape: Shape) -> None:
    residual_scale = (2 * shape.n_blocks) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # norms and biases stay at 1 and 0
        adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
        std = shape.hidden_size**-0.5
        if "down_proj" in name or "mlp.c_proj" in name:
            std = shape.intermediate_size**-0.5
        nn.init.normal_(parameter, std=std * (residual_scale if adds_to_residual else 1.0))


def word_tokenizer(vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """`<unk> <bos> <eos> <pad> w4 w5 ...`: one token per word, BOS in front."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=max_length,
    )


def text_of(token_ids: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """What `word_tokenizer` reads as these ids."""
    return " ".join(f"w{i}" for i in token_ids)


def random_pairs(
    n: int, prompt_tokens: int, continuation_tokens: int, *, vocab_size: int, seed: int = 0
) -> list[PreferencePair]:
    """Pairs of random words; a prompt's BOS is one of its tokens."""
    rng = np.random.default_rng((seed, prompt_tokens, continuation_tokens))

    def words(count: int) -> str:
        return text_of(rng.integers(len(SPECIAL_TOKENS), vocab_size, count))

    pairs = []
    while len(pairs) < n:
        prompt, chosen, rejected = (
            words(count) for count in (prompt_tokens - 1, continuation_tokens, continuation_tokens)
        )
        if chosen.split()[0] != rejected.split()[0]:
            pairs.append(PreferencePair(prompt, chosen, rejected))
    return pairs


class TopicLanguage:
    """Texts that a model learns something of in minutes: topics with words and turns of their own.

    A document follows one topic: half of its words are drawn from the topic's own, half are the
    fixed successors that this topic gives to the word before. A prompt mixes two topics, so that
    which one goes on is decided by many words, each a little.
    """

    def __init__(self, *, n_words: int = 1024, n_topics: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        first = len(SPECIAL_TOKENS)
        self.vocabulary_end = first + n_words
        ranks = 1 / np.arange(1, n_words // 4 + 1)
        self._shares = ranks / ranks.sum()
        self._words = np.stack(
            [rng.permutation(n_words)[: n_words // 4] + first for _ in range(n_topics)]
        )
        self._successors = np.zeros((n_topics, self.vocabulary_end), dtype=np.int64)
        for topic, words in enumerate(self._words):
            self._successors[topic] = rng.choice(words, self.vocabulary_end, p=self._shares)

    def text(
        self, rng: np.random.Generator, topics: Sequence[int], length: int, previous: int = BOS_ID
    ) -> list[int]:
        """``length`` word ids; each is of a topic drawn from ``topics``, turns last five words."""
        ids: list[int] = []
        topic = topics[0]
        for i in range(length):
            if i % 5 == 0:
                topic = topics[rng.integers(len(topics))]
            if rng.random() < 0.5:
                previous = int(self._successors[topic, previous])
            else:
                previous = int(rng.choice(self._words[topic], p=self._shares))
            ids.append(previous)
        return ids

    def document(self, rng: np.random.Generator, length: int) -> list[int]:
        return [BOS_ID, *self.text(rng, [int(rng.integers(len(self._words)))], length - 1)]

    def pairs(
        self, n: int, prompt_tokens: int, continuation_tokens: int, *, seed: int = 0
    ) -> list[PreferencePair]:
        """Prompts of three fifths one topic, two fifths another; answers of the one and other."""
        rng = np.random.default_rng((seed, prompt_tokens, continuation_tokens))
        pairs = []
        while len(pairs) < n:
            a, b = (int(t) for t in rng.choice(len(self._words), 2, replace=False))
            prompt = self.text(rng, [a, a, a, b, b], prompt_tokens - 1)
            chosen, rejected = (
                self.text(rng, [topic], continuation_tokens, prompt[-1]) for topic in (a, b)
            )
            if chosen[0] != rejected[0]:
                pairs.append(PreferencePair(text_of(prompt), text_of(chosen), text_of(rejected)))
        return pairs


def trained_model(
    shape: Shape, cache: Path, *, steps: int = 300, seed: int = 0
) -> tuple[PreTrainedModel, TopicLanguage, float]:
    """A model of the shape trained on a `TopicLanguage`, the language, and the last loss.

    A minute or two on one core; kept in ``cache`` (one safetensors file per setting).
    """
    language = TopicLanguage(seed=seed)
    model = random_model(shape, seed=seed)
    file = cache / f"topics-{shape.family}-{shape.hidden_size}-{steps}-{seed}.safetensors"
    if file.exists():
        weights = load_file(file)
        loss = float(weights.pop("last_loss"))
        model.load_state_dict(weights, strict=False)  # a tied head is stored once
        return model.eval(), language, loss
    loss = _train(model, language, steps=steps, seed=seed)
    cache.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file({**weights, "last_loss": torch.tensor(loss)}, file)
    return model.eval(), language, loss


def _train(
    model: PreTrainedModel, language: TopicLanguage, *, steps: int, seed: int, n_sampled: int = 256
) -> float:
    """Cross-entropy over the words in use and a sample of the others (scaled up to all of them)."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    used, n_others = language.vocabulary_end, model.config.vocab_size - language.vocabulary_end
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    head = model.get_output_embeddings().weight
    recent: list[float] = []
    with progress_bar(True) as bar:
        task = bar.add_task("brief training", total=steps)
        for _ in range(steps):
            length = int(rng.choice([32, 64, 128]))
            ids = torch.tensor([language.document(rng, length) for _ in range(1024 // length)])
            hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            others = used + torch.randint(n_others, (n_sampled,), generator=generator)
            logits = torch.cat(
                [
                    hidden @ head[:used].T,
                    hidden @ head[others].T + math.log(n_others / n_sampled),
                ],
                dim=-1,
            )
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            bar.advance(task)
    return float(np.mean(recent[-20:]))
