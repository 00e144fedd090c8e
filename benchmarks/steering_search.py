"""One way to tune and to judge every method: the same search block by block, the same budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.steering_elsewhere import N_ELSEWHERE, changed_answers, elsewhere
from benchmarks.steering_replay import Replay
from benchmarks.steering_worlds import Data, Trained
from grains_ext.batching import pad_batch, position_ids_of
from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_prompt
from grains_ext.pair_batches import encode_batches
from grains_ext.pairs import PreferencePair
from grains_ext.steering import SteeringVectors

TRIALS_PER_BLOCK = 12
"""Settings that each method may score on the dev pairs for each block, over all its variants."""
WEAKEST, STRONGEST = 0.02, 4.0
GUESSES = 8
"""At the largest strength within the limit, at most."""
ONE_SIDED_95 = 1.645
LEAST_SHARE = 0.3
"""Strengths that are tried go from this share of the largest within the limit up to all of it."""

Directions = Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Pairs with one-token answers, ready to be scored again and again."""

    replay: Replay
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(
        cls, trained: Trained, view: DecoderView, pairs: Sequence[PreferencePair]
    ) -> ScoredPairs:
        """Raises ValueError where an answer has more than one token."""
        [batch] = encode_batches(trained.processor, pairs, max_batch_tokens=10**9)
        if any(len(ids) != 1 for ids in batch.chosen_ids + batch.rejected_ids):
            raise ValueError("this benchmark scores answers of one token")
        n, width = len(pairs), batch.inputs["input_ids"].shape[1]
        inputs = {
            # The rows of the chosen answers without these: the prompts.
            name: value[:n, : width - 1] if value.shape[:2] == (2 * n, width) else value[:n]
            for name, value in batch.inputs.items()
        }
        order = torch.tensor(batch.indices).argsort()
        last = torch.full((n,), width - 2)
        replay = Replay.of(view, inputs, order, last)
        chosen = torch.tensor([ids[0] for ids in batch.chosen_ids])[order]
        rejected = torch.tensor([ids[0] for ids in batch.rejected_ids])[order]
        return cls(replay, chosen, rejected)

    def margins(self, directions: Directions | None = None, strength: float = 0.0) -> Tensor:
        """log p(chosen) - log p(rejected), float32 [n] in the order of the pairs."""
        return self.margins_in(self.replay.logits(directions, strength))

    def margins_in(self, logits: Tensor) -> Tensor:
        return _at(logits, self.chosen) - _at(logits, self.rejected)

    def answers(self, directions: Directions | None = None, strength: float = 0.0) -> Tensor:
        """int64 [n]: the likeliest next token after each prompt."""
        return self.replay.logits(directions, strength).argmax(-1)

    def nlls(self, directions: Directions | None = None, strength: float = 0.0) -> Tensor:
        """-log p(chosen), float32 [n]."""
        return self.nlls_in(self.replay.logits(directions, strength))

    def nlls_in(self, logits: Tensor) -> Tensor:
        return -_at(logits.log_softmax(-1), self.chosen)


@dataclass(frozen=True, eq=False)
class ScoredTexts:
    """Texts whose every token but the first is scored."""

    replay: Replay
    targets: Tensor

    @classmethod
    def of(cls, trained: Trained, view: DecoderView, texts: Sequence[str]) -> ScoredTexts:
        ids, mask = pad_batch([encode_prompt(trained.processor, text) for text in texts])
        rows, columns = (mask[:, 1:] * mask[:, :-1]).nonzero(as_tuple=True)
        inputs = {
            "input_ids": ids[:, :-1],
            "attention_mask": mask[:, :-1],
            "position_ids": position_ids_of(mask[:, :-1]),
        }
        return cls(Replay.of(view, inputs, rows, columns), ids[:, 1:][rows, columns])

    def nlls(self, directions: Directions | None = None, strength: float = 0.0) -> Tensor:
        """-log p by token, float32 [S]."""
        return self.nlls_in(self.replay.logits(directions, strength))

    def nlls_in(self, logits: Tensor) -> Tensor:
        return -_at(logits.log_softmax(-1), self.targets)


def scored(trained: Trained, view: DecoderView, items: Sequence[Any]) -> ScoredPairs | ScoredTexts:
    """Stories or pairs, by what they are."""
    kind = ScoredTexts if isinstance(items[0], str) else ScoredPairs
    return kind.of(trained, view, items)


@dataclass(frozen=True)
class Limit:
    """How much worse neutral dev texts may become.

    max_ratio: of steered and unsteered perplexity.
    sure: that ratio is to be kept by the one-sided 95 % upper bound of the mean rise, and not by
        the mean alone. Observations are groups of so many tokens; None asks the mean alone.
    """

    max_ratio: float
    sure: int | None = None

    @property
    def log_ratio(self) -> float:
        return math.log(self.max_ratio)

    def rise(self, nlls: Tensor, unsteered: Tensor) -> float:
        """What is held against log_ratio; both are -log p of every scored token."""
        if self.sure is None:
            return float(nlls.mean() - unsteered.mean())
        groups = (nlls - unsteered).view(-1, self.sure).mean(1)
        return float(groups.mean() + ONE_SIDED_95 * groups.std() / math.sqrt(len(groups)))


@dataclass(frozen=True)
class Choice:
    """The setting of a method that did best on the dev pairs within the limit."""

    variant: str
    blocks: list[int]
    strength: float
    dev_accuracy: float
    dev_margin: float

    @classmethod
    def of(cls, variant: str, blocks: Iterable[int], strength: float, margins: Tensor) -> Choice:
        """margins: of the dev pairs."""
        accuracy = round(float((margins > 0).double().mean()), 4)
        return cls(variant, sorted(blocks), strength, accuracy, float(margins.mean()))

    @property
    def rank(self) -> tuple[float, float]:
        return self.dev_accuracy, self.dev_margin


@dataclass(frozen=True)
class Result:
    """A method on one model: every test pair's outcome."""

    right: list[bool]
    perplexity_ratio: float
    choice: Choice | None
    """None where nothing was within the limit: then it is the unsteered model."""
    trials: int
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured, as JSON."""


class Bench:
    """One trained model with its pairs, encoded once."""

    def __init__(self, trained: Trained, data: Data, limit: Limit) -> None:
        self.trained, self.data, self.limit = trained, data, limit
        self.view = DecoderView.of(trained.model)
        self.dev = ScoredPairs.of(trained, self.view, data.dev)
        self.test = ScoredPairs.of(trained, self.view, data.test)
        self.neutral_dev = scored(trained, self.view, data.neutral_dev)
        self.neutral_test = scored(trained, self.view, data.neutral_test)
        self.dev_nlls = self.neutral_dev.nlls()
        self.test_nlls = self.neutral_test.nlls()

    @cached_property
    def elsewhere(self) -> dict[str, ScoredPairs]:
        """Prompts that nothing is meant to change, by kind."""
        kinds = elsewhere(self.trained.world, "test", N_ELSEWHERE)
        return {kind: ScoredPairs.of(self.trained, self.view, own) for kind, own in kinds.items()}

    def unsteered(self) -> Result:
        return Result((self.test.margins() > 0).tolist(), 1.0, None, 0)

    def tuned(self, variants: Mapping[str, SteeringVectors], *, together: bool = False) -> Result:
        """The best variant, block and strength on dev, measured on test.

        Every block of every variant alone, or all blocks ``together`` with as many trials;
        strengths are shares of the largest within the limit.
        """
        n_sets = 1 if together else self.view.n_blocks
        n_trials = TRIALS_PER_BLOCK * self.view.n_blocks // n_sets
        best: tuple[Choice, Directions] | None = None
        trials = 0
        for variant, vectors in variants.items():
            every = vectors.directions
            for steered in [every] if together else [{block: every[block]} for block in every]:
                for strength in self.strengths(steered, n_trials // len(variants)):
                    choice = self._choice(variant, steered, strength)
                    trials += 1
                    if best is None or choice.rank > best[0].rank:
                        best = choice, steered
        if best is None:
            return self.unsteered()
        choice, directions = best
        return self._result(choice, directions, trials)

    def strengths(self, directions: Directions, n: int) -> list[float]:
        """Those to try: n shares of the largest within the limit, or none."""
        largest = self.largest_strength(directions)
        return [] if largest is None else [largest * share for share in shares_of_limit(n)]

    def largest_strength(self, directions: Directions) -> float | None:
        """Within the perplexity limit; None where even a weak push is beyond it."""
        return largest_within(
            lambda strength: self.rise(self.neutral_dev.nlls(directions, strength)),
            self.limit.log_ratio,
        )

    def rise(self, nlls: Tensor) -> float:
        """Of the neutral dev texts' loss over the unsteered one, as the limit counts it."""
        return self.limit.rise(nlls, self.dev_nlls)

    def ratio(self, nlls: Tensor) -> float:
        """Of perplexities, of the neutral test texts."""
        return math.exp(float(nlls.mean() - self.test_nlls.mean()))

    def changed_elsewhere(self, directions: Directions, strength: float) -> dict[str, Any]:
        """As a result's details."""
        steered = partial(ScoredPairs.answers, directions=directions, strength=strength)
        return {"elsewhere": changed_answers(self.elsewhere, {"without": steered})}

    def _choice(self, variant: str, directions: Directions, strength: float) -> Choice:
        return Choice.of(variant, directions, strength, self.dev.margins(directions, strength))

    def _result(self, choice: Choice, directions: Directions, trials: int) -> Result:
        right = (self.test.margins(directions, choice.strength) > 0).tolist()
        nlls = self.neutral_test.nlls(directions, choice.strength)
        return Result(right, self.ratio(nlls), choice, trials)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(-1, columns[:, None])[:, 0]


def shares_of_limit(n: int) -> list[float]:
    """n strengths to try, as shares of the largest within the limit, which is the first."""
    step = (1 - LEAST_SHARE) / max(1, n - 1)
    return [1 - step * i for i in range(n)]


def largest_within(rise: Callable[[float], float], limit: float) -> float | None:
    """The largest strength at which the loss has risen by no more than the limit, or a bit less.

    The rise is about a power of the strength: each guess is where the power through the points on
    both sides meets the limit, or the square through one point while there is no other.
    """
    inside, outside = (WEAKEST, 0.0), (STRONGEST, math.inf)
    best = None
    guess = 0.4
    for _ in range(GUESSES):
        risen = rise(guess)
        if risen <= limit:
            best, inside = guess, (guess, risen)
        else:
            outside = guess, risen
        close = 0.9 * limit <= risen <= limit
        if close or best == STRONGEST or outside[0] / inside[0] < 1.03:
            break
        aim = _crossing(inside, outside, 0.97 * limit)
        if aim >= outside[0] and outside[1] == math.inf:
            guess = STRONGEST
        elif inside[0] * 1.01 < aim < outside[0] * 0.99:
            guess = aim
        else:
            guess = math.sqrt(inside[0] * outside[0])
    return best


def _crossing(inside: tuple[float, float], outside: tuple[float, float], limit: float) -> float:
    """Where a power of the strength meets the limit; points are (strength, rise)."""
    (low, low_rise), (high, high_rise) = inside, outside
    if limit <= 0:
        return 0.0
    if low_rise <= 0:
        return math.inf if high_rise == math.inf else high * math.sqrt(limit / high_rise)
    power = 2.0
    if high_rise != math.inf:
        power = math.log(high_rise / low_rise) / math.log(high / low)
    return low * (limit / low_rise) ** (1 / power)
