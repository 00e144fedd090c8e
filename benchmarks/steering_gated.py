"""With a gate: the same vectors, steering only where a condition on an early block's output holds.

    python -m benchmarks.steering_quality --worlds DIR --gated

The rows are rows of `steering_methods` behind a gate of `fit_gate`: the vectors of the ungated row,
as many trials, the same limit and test pairs. Beside the accuracy they hold what steering does to
prompts that it is not meant for, with the gate and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.steering_elsewhere import (
    Answers,
    changed_answers,
    changed_summary,
    staying,
)
from benchmarks.steering_methods import FEW_STEPS, REFINE, SIGNS, TOGETHER, Run
from benchmarks.steering_replay import Replay
from benchmarks.steering_search import Bench, Choice, Directions, Result, ScoredPairs
from benchmarks.steering_statistics import bits_of, outcomes, over_pairs, over_seeds
from grains_ext.steering import Gate, SteeringVectors, fit_gate
from grains_ext.steering.held_gate import HeldGate
from grains_ext.steering.positions import Forward

FALSE_POSITIVE_RATE = 0.05
KIND, WHEN = "probe", "any"
"""Chosen on dev, in one model of each world. A text is a prompt as a whole: no beginning of it
opens a gate that the whole does not."""
WEAKEST_SHARE, STRONGEST_SHARE = 0.5, 6.0
"""Of the largest strength within the limit without a gate; stronger never won on dev."""

Outside = Literal["texts", "prompts"]
"""What a gate is to stay shut for: neutral texts, or these and prompts of the pairs' own form."""


# --- A bench behind gates -----------------------------------------------------------------------


def outside_prompts(bench: Bench, outside: Outside) -> list[Any]:
    prompts = list(bench.data.neutral_fit)
    if outside == "prompts":
        prompts += staying(bench.trained.world, len(bench.data.fit))
    return prompts


@dataclass(frozen=True, eq=False)
class GatedReplay(Replay):
    """A replay of steering behind a gate: the gate of the first steered block."""

    gates: Mapping[int, Gate]

    def logits(
        self,
        directions: Directions | None = None,
        strength: float = 0.0,
        index: Tensor | None = None,
    ) -> Tensor:
        if directions:
            index = torch.where(self.opened(min(directions)), 0, -1).int()
        return super().logits(directions, strength, index)

    def opened(self, block: int) -> Tensor:
        """bool [N, T]: the tokens that are steered, as a handle's gate decides."""
        gate = self.gates[block]
        hidden = self.outputs[gate.block]
        rows, length = hidden.shape[:2]
        forward = Forward(
            rows=rows,
            length=length,
            device=hidden.device,
            past=0,
            input_ids=None,
            attention_mask=self.inputs["attention_mask"],
            logits_to_keep=None,
            prompt_length=None,
        )
        return HeldGate(gate, None).opened(hidden, forward).expand(rows, length)

    def share_open(self, block: int) -> float:
        """Of rows."""
        return float(self.opened(block).any(1).double().mean())


class GatedBench(Bench):
    """A bench whose steering is behind a gate that reads the first steered block's output."""

    def __init__(self, bench: Bench, outside: Outside, largest: Mapping[int, float | None]) -> None:
        """largest: strength within the limit without a gate, by the first block it steers."""
        vars(self).update(vars(bench))
        self.plain, self.largest = bench, largest
        prompts = outside_prompts(bench, outside)
        self.gates = {
            block: fit_gate(
                bench.trained.model,
                bench.trained.processor,
                bench.data.fit,
                prompts,
                block=block,
                kind=KIND,
                when=WHEN,
                false_positive_rate=FALSE_POSITIVE_RATE,
            )
            for block in range(bench.view.n_blocks)
        }
        self.dev, self.test = self.behind(bench.dev), self.behind(bench.test)
        self.neutral_dev = self.behind(bench.neutral_dev)
        self.neutral_test = self.behind(bench.neutral_test)

    def behind(self, items: Any) -> Any:
        """ScoredPairs or ScoredTexts."""
        return replace(items, replay=GatedReplay(**vars(items.replay), gates=self.gates))

    def strengths(self, directions: Directions, n: int) -> list[float]:
        """Around the largest without a gate, in equal ratios, up to the largest with it."""
        largest = self.largest_strength(directions)
        if largest is None:
            return []
        usual = self.largest[min(directions)] or largest
        high = min(largest, STRONGEST_SHARE * usual)
        low = min(high, WEAKEST_SHARE * usual)
        return [float(value) for value in np.geomspace(high, low, n)]


# --- Rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Usual:
    """Vectors, and how they are tuned without a gate."""

    vectors: SteeringVectors
    choice: Choice | None
    largest: Mapping[int, float | None]
    """By the first block that is steered, within the limit."""
    together: bool
    """All blocks at once, in place of the best one."""

    @classmethod
    def of(cls, bench: Bench, vectors: SteeringVectors, *, together: bool = False) -> Usual:
        every = vectors.directions
        sets = [every] if together else [{block: every[block]} for block in every]
        largest = {min(steered): bench.largest_strength(steered) for steered in sets}
        choice = bench.tuned({"": vectors}, together=together).choice
        return cls(vectors, choice, largest, together)


def gated(usual_of: Callable[[Run], Usual], outside: Outside) -> Callable[[Run], list[Result]]:
    """A row: these vectors behind a gate."""

    def row(run: Run) -> list[Result]:
        usual = usual_of(run)
        bench = GatedBench(run.bench, outside, usual.largest)
        result = bench.tuned({"": usual.vectors}, together=usual.together)
        if result.choice is None:
            return [result]
        details = _details(bench, usual.vectors, result.choice, usual.choice)
        return [replace(result, details=details)]

    return row


def _details(
    bench: GatedBench, vectors: SteeringVectors, choice: Choice, without: Choice | None
) -> dict[str, Any]:
    """The gate, how often it opens, which pairs' answers the model gives, and what is changed
    elsewhere, with the gate and ``without``."""
    block = min(choice.blocks)
    gate = bench.gates[block]
    open_for = {"test": bench.test, "neutral": bench.neutral_test}
    open_for |= {kind: bench.behind(items) for kind, items in bench.plain.elsewhere.items()}

    def steered_as(choice: Choice) -> dict[str, Any]:
        directions = {block: vectors.directions[block] for block in choice.blocks}
        return {"directions": directions, "strength": choice.strength}

    ways: dict[str, Answers] = {
        "with": lambda items: bench.behind(items).answers(**steered_as(choice))
    }
    if without is not None:
        ways["without"] = partial(ScoredPairs.answers, **steered_as(without))
    test = bench.plain.test
    answered = {name: answers(test) == test.chosen for name, answers in ways.items()}
    return {
        "gate": {"block": gate.block, "kind": gate.kind, "when": gate.when, **gate.metadata},
        "open": {name: items.replay.share_open(block) for name, items in open_for.items()},
        "answered": {name: bits_of(right.tolist()) for name, right in answered.items()},
        "elsewhere": changed_answers(bench.plain.elsewhere, ways),
        "choice_without": None if without is None else asdict(without),
    }


def _closed(run: Run) -> SteeringVectors:
    """With the signs that tuning chose without a gate."""
    signs = run.signs or (run.tuned_fit.choice.variant if run.tuned_fit.choice else SIGNS[0])
    return run.fitted(signs=signs)


_VECTORS: dict[str, Callable[[Run], SteeringVectors]] = {
    "GrAInS": _closed,
    "CAA": lambda run: run.caa,
    "GrAInS, 10 steps": lambda run: run.refined_vectors(run.starts["GrAInS"](), FEW_STEPS),
    "zero, 10 steps": lambda run: run.refined_vectors(run.starts["zero"](), FEW_STEPS),
    "GrAInS, refined": lambda run: run.refined_vectors(run.starts["GrAInS"](), REFINE),
    "CAA, refined": lambda run: run.refined_vectors(run.starts["CAA"](), REFINE),
    "zero, refined": lambda run: run.refined_vectors(run.starts["zero"](), REFINE),
}
_TOGETHER: dict[str, Callable[[Run], SteeringVectors]] = {
    "GrAInS, refined, all blocks": lambda run: run.refiner(run.starts["GrAInS"](), TOGETHER),
}


@lru_cache(maxsize=1)  # rows that differ in the gate alone come one after the other
def _usual(run: Run, base: str) -> Usual:
    together = base in _TOGETHER
    made = (_TOGETHER if together else _VECTORS)[base](run)
    return Usual.of(run.bench, made, together=together)


_NAMES: dict[Outside, str] = {"texts": "{}, gated", "prompts": "{}, gated by prompts"}
GATED: dict[str, Callable[[Run], list[Result]]] = {
    name.format(base): gated(partial(_usual, base=base), outside)
    for base in (*_VECTORS, *_TOGETHER)
    for outside, name in _NAMES.items()
}


# --- Reading ------------------------------------------------------------------------------------


def base_of(name: str) -> str:
    """The row without a gate."""
    return name.partition(", gated")[0]


def gated_summary(results: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By row: accuracy with and without the gate, how often it opens, what changes elsewhere."""
    rows = []
    for name in GATED:
        base = base_of(name)
        if not results or not all(name in kept and base in kept for kept in results.values()):
            continue
        draws = [kept[name]["draws"][0] for kept in results.values()]
        own = [outcomes(draw["right"]) for draw in draws]
        usual = [outcomes(kept[base]["draws"][0]["right"]) for kept in results.values()]
        details = [draw["details"] for draw in draws if "details" in draw]
        rows.append(
            {
                "method": name,
                "without": asdict(over_seeds(usual)),
                "accuracy": asdict(over_seeds(own)),
                "by_seed": {
                    str(seed): asdict(over_pairs(values))
                    for seed, values in zip(results, own, strict=True)
                },
                "gain": asdict(over_seeds([a - b for a, b in zip(own, usual, strict=True)])),
                "perplexity_ratio": float(np.mean([d["perplexity_ratio"] for d in draws])),
                "largest_perplexity_ratio": max(d["perplexity_ratio"] for d in draws),
                "answered": {
                    column: asdict(over_seeds([outcomes(d["answered"][column]) for d in details]))
                    for column in ("without", "with")
                    if details and all(column in d.get("answered", {}) for d in details)
                },
                "open": _mean([each["open"] for each in details]),
                "elsewhere": changed_summary([each["elsewhere"] for each in details]),
            }
        )
    return rows


def _mean(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = shares[0] if shares else ()
    return {name: float(np.mean([each[name] for each in shares])) for name in names}
