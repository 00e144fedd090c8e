"""The rival that changes weights: LoRA (Hu et al. 2021) through peft, on the same pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

from grains_ext.evaluation import measure
from grains_ext.files import write_text
from grains_ext.pair_batches import encode_batches
from grains_ext.steering.calibrate import NothingWithinLimit

if TYPE_CHECKING:
    from recipes.methods import Workshop
    from recipes.recipe import Options

_CHOICE = "choice.json"
# A vision tower stays as it is: its projections are named alike.
_TARGETS = r"^(?!.*vision).*\.(q_proj|v_proj)$"


def tuned_lora(
    shop: Workshop, settings: Options, folder: Path
) -> Callable[[Any], AbstractContextManager[Any]]:
    """An adapter on the queries and values, as a condition.

    Trained on the fit pairs with `refine`'s loss of pairs, without its drift term, for as many
    steps; the learning rate, and the scale of what the adapter adds, are what does best on dev
    within the limit on perplexity. Raises NothingWithinLimit where none is.
    """
    if not (folder / _CHOICE).is_file():
        trials = [
            {**trial, "adapter": str(rate)}
            for rate in settings["learning_rates"]
            for trial in _trials(shop, settings, rate, folder / str(rate))
        ]
        limit = shop.recipe.settings["tune"]["max_perplexity_ratio"]
        within = [trial for trial in trials if trial["perplexity_ratio"] <= limit]
        best = max(within, key=lambda t: (t["accuracy"], t["mean_margin"]), default=None)
        write_text(folder / _CHOICE, json.dumps({"chosen": best, "trials": trials}) + "\n")
    chosen = json.loads((folder / _CHOICE).read_text())["chosen"]
    if chosen is None:
        raise NothingWithinLimit("no learning rate and scale keep the limit on perplexity")
    return partial(adapted, folder=folder / chosen["adapter"], scale=chosen["scale"])


@contextmanager
def adapted(model: Any, folder: Path, scale: float) -> Iterator[None]:
    """The model with an adapter that was saved, its share in the weights times ``scale``."""
    from peft import PeftModel

    with _taken_off(PeftModel.from_pretrained(model, folder)) as wrapped:
        for module in wrapped.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(scale)
        yield


def _trials(shop: Workshop, settings: Options, rate: float, folder: Path) -> Iterator[Options]:
    """Trains at one learning rate, saves the adapter, and measures it on dev at each scale."""
    recipe = shop.recipe.settings
    if not (folder / "adapter_config.json").is_file():
        _train(shop, settings["rank"], rate, folder)
    look = partial(
        measure,
        shop.model,
        shop.processor,
        shop.data.dev,
        neutral_texts=shop.data.neutral_dev,
        generate=False,
        max_batch_tokens=recipe["max_batch_tokens"],
    )
    unsteered = look().perplexity
    assert unsteered is not None
    for scale in settings["scales"]:
        with adapted(shop.model, folder, scale):
            found = look()
        assert found.perplexity is not None
        yield {
            "scale": scale,
            "accuracy": found.accuracy.value,
            "mean_margin": found.mean_margin,
            "perplexity_ratio": found.perplexity / unsteered,
        }


def _train(shop: Workshop, rank: int, rate: float, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    recipe = shop.recipe.settings
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS)
        wrapped = get_peft_model(shop.model, config)
    batches = encode_batches(
        shop.processor, shop.data.fit, max_batch_tokens=recipe["max_batch_tokens"]
    )
    with _taken_off(wrapped):
        weights = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.98))
        for _ in range(recipe["refine"]["steps"]):
            optimizer.zero_grad()
            for batch in batches:
                chosen, rejected = batch.logprobs(wrapped(**batch.arguments(shop.model)).logits)
                loss = -logsigmoid(chosen - rejected).sum() / len(shop.data.fit)
                loss.backward()
            optimizer.step()
        wrapped.save_pretrained(folder)


@contextmanager
def _taken_off(wrapped: Any) -> Iterator[Any]:
    """Leaves the model under the adapter as it was."""
    try:
        yield wrapped
    finally:
        wrapped.unload()
        base = wrapped.get_base_model()
        base.requires_grad_(False)
        if hasattr(base, "peft_config"):
            del base.peft_config
