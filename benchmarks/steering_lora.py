"""The rival that changes weights: LoRA (Hu et al., 2021) through peft, on the loss of `refine`."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.steering_elsewhere import changed_answers
from benchmarks.steering_search import (
    TRIALS_PER_BLOCK,
    Bench,
    Choice,
    Result,
    ScoredPairs,
    largest_within,
    scored,
    shares_of_limit,
)
from grains_ext.steering import RefineSettings

RANK = 4
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


def available() -> bool:
    return importlib.util.find_spec("peft") is not None


def lora_result(bench: Bench, settings: RefineSettings) -> Result:
    """Trained on the fit pairs for as many steps as `refine`; rate and scale chosen on dev pairs.

    Adapters of rank 4 on the queries and values of every block. The scale of what they add is the
    strength here: the largest within the perplexity limit, and shares of it.
    """
    pairs = ScoredPairs.of(bench.trained, bench.view, bench.data.fit)
    n_trials = TRIALS_PER_BLOCK * bench.view.n_blocks
    shares = shares_of_limit(n_trials // len(LEARNING_RATES))
    best: tuple[Choice, Any] | None = None
    trials = 0
    for rate in LEARNING_RATES:
        model = _adapted(bench.trained.model)
        _train(model, bench, pairs, settings, rate)

        def rise(scale: float, model: Any = model) -> float:
            with _scaled(model, scale):
                logits = bench.neutral_dev.replay.logits_of(model)
            return bench.rise(bench.neutral_dev.nlls_in(logits))

        largest = largest_within(rise, bench.limit.log_ratio)
        for share in shares if largest is not None else ():
            assert largest is not None
            with _scaled(model, largest * share):
                margins = bench.dev.margins_in(bench.dev.replay.logits_of(model))
            trials += 1
            choice = Choice.of(f"learning rate {rate:g}", [], largest * share, margins)
            if best is None or choice.rank > best[0].rank:
                best = choice, model
    if best is None:
        return bench.unsteered()
    choice, model = best
    with _scaled(model, choice.strength):
        right = (bench.test.margins_in(bench.test.replay.logits_of(model)) > 0).tolist()
        nlls = bench.neutral_test.nlls_in(bench.neutral_test.replay.logits_of(model))
        ways = {"without": lambda items: items.replay.logits_of(model).argmax(-1)}
        changed = changed_answers(bench.elsewhere, ways)
    return Result(right, bench.ratio(nlls), choice, trials, {"elsewhere": changed})


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    # A vision tower stays as it is: its projections are named alike.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"(?!.*vision).*\.(q_proj|v_proj)")
    return get_peft_model(copy.deepcopy(model), config).eval()


def _train(
    model: Any, bench: Bench, pairs: ScoredPairs, settings: RefineSettings, rate: float
) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.98))
    kinds: dict[type, list[Any]] = {}  # texts and pairs are scored apart
    for item in bench.data.neutral_fit:
        kinds.setdefault(type(item), []).append(item)
    neutral = [scored(bench.trained, bench.view, items) for items in kinds.values()]
    unharmed = [items.replay.logits().log_softmax(-1) for items in neutral]
    n_tokens = sum(map(len, unharmed))
    for _ in range(settings.steps):
        margins = pairs.margins_in(_logits(model, pairs))
        loss = -logsigmoid(settings.beta * margins).mean() / settings.beta
        optimizer.zero_grad()
        loss.backward()
        for items, before in zip(neutral, unharmed, strict=True):
            now = _logits(model, items).log_softmax(-1)
            drift = (before.exp() * (before - now)).sum() / n_tokens
            (settings.drift_weight * drift).backward()
        optimizer.step()


def _logits(model: Any, items: Any) -> Tensor:
    replay = items.replay
    return model(**replay.inputs, use_cache=False).logits[replay.rows, replay.columns]


@contextmanager
def _scaled(model: Any, scale: float) -> Iterator[None]:
    """The adapters' share in the weights times a factor."""
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    for layer in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer(scale)
