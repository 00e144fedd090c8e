"""`refine` on replays: the product's optimisation, a third of its time, the same up to rounding.

No step changes what a model computes before the first steered block, nor its pictures, and answers
of one token share a prompt: all of that is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.steering_replay import Replay
from benchmarks.steering_search import Bench, Directions, ScoredPairs
from grains_ext.pair_batches import PairBatch, encode_batches
from grains_ext.pairs import PreferencePair
from grains_ext.steering import RefineSettings, SteeringVectors
from grains_ext.steering.neutral import NeutralTexts
from grains_ext.steering.refine import _NEUTRAL_TOKENS, _Run


@dataclass
class _Steered:
    """How the model is steered just now."""

    directions: Directions | None = None
    strength: float = 0.0

    def logits(self, replay: Replay) -> Tensor:
        return replay.logits(self.directions, self.strength)


class _ReplayedTexts(NeutralTexts):
    def __init__(self, bench: Bench, steered: _Steered) -> None:
        super().__init__(
            bench.view,
            bench.trained.processor,
            bench.data.neutral_fit,
            [],
            separator=None,
            max_batch_tokens=_NEUTRAL_TOKENS,
        )
        self._steered = steered
        self._replays = [
            Replay.of(bench.view, held.batch.inputs, *held.scored.nonzero(as_tuple=True))
            for held in self._batches
        ]
        self.prepare()

    def _logits(self, number: int) -> Tensor:
        return self._steered.logits(self._replays[number])


@dataclass(frozen=True, eq=False)
class Refiner:
    """A bench's pairs and neutral texts in the batches that `refine` makes of them."""

    bench: Bench
    fit: list[PairBatch]
    dev: list[PairBatch]
    texts: _ReplayedTexts
    steered: _Steered
    scored: dict[int, ScoredPairs] = field(default_factory=dict)
    """By the id of their batch."""

    @classmethod
    @torch.no_grad()
    def of(cls, bench: Bench) -> Refiner:
        steered = _Steered()
        data = bench.data
        fit, dev = (
            list(
                encode_batches(
                    bench.trained.processor, pairs, max_batch_tokens=RefineSettings.max_batch_tokens
                )
            )
            for pairs in (data.fit, data.dev)
        )
        made = cls(bench, fit, dev, _ReplayedTexts(bench, steered), steered)
        made._score(fit, data.fit)
        made._score(dev, data.dev)
        return made

    @torch.no_grad()
    def __call__(self, vectors: SteeringVectors, settings: RefineSettings) -> SteeringVectors:
        """As `refine` with the bench's fit pairs, dev pairs and neutral texts."""
        run = _ReplayedRun(self, vectors, settings)
        for _ in run.steps():
            pass
        return run.result(len(self.bench.data.fit), len(self.bench.data.dev))

    def _score(self, batches: Sequence[PairBatch], pairs: Sequence[PreferencePair]) -> None:
        for batch in batches:
            own = [pairs[i] for i in batch.indices]
            self.scored[id(batch)] = ScoredPairs.of(self.bench.trained, self.bench.view, own)


class _ReplayedRun(_Run):
    def __init__(
        self, refiner: Refiner, vectors: SteeringVectors, settings: RefineSettings
    ) -> None:
        self.refiner = refiner
        parts = refiner.fit, refiner.texts, refiner.dev
        super().__init__(refiner.bench.view, vectors, settings, *parts)

    def _margins(self, batch: PairBatch) -> Tensor:
        scored = self.refiner.scored[id(batch)]
        return scored.margins_in(self.refiner.steered.logits(scored.replay))

    @contextmanager
    def _steering(self) -> Iterator[None]:
        steered = self.refiner.steered
        steered.directions = {b: self.lengths[b] * unit for b, unit in self.units.items()}
        steered.strength = self.vectors.strength
        try:
            yield
        finally:
            steered.directions = None
