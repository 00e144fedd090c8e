"""How sure a difference of two methods is, over the pairs of a seed and over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000

Outcomes = npt.NDArray[np.float64]
"""By pair of one seed: 1 right, 0 wrong; the mean over draws of a random method."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def above_zero(self) -> bool:
        return self.low > 0


def bits_of(right: Iterable[bool]) -> str:
    """How outcomes stand in JSON: a string of 0 and 1, in the order of the pairs."""
    return "".join("01"[each] for each in right)


def outcomes(bits: str) -> Outcomes:
    return np.array([float(bit) for bit in bits])


def over_pairs(values: Outcomes, *, seed: int = 0) -> Estimate:
    """Of one seed: pairs are drawn anew."""
    return _estimate(values.mean(), _resampled(values, np.random.default_rng(seed)))


def over_seeds_fixed(values: Sequence[Outcomes], *, seed: int = 0) -> Estimate:
    """The mean over these very seeds: pairs are drawn anew within each."""
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled(own, rng) for own in values], axis=0)
    return _estimate(float(np.mean([own.mean() for own in values])), means)


def over_seeds(values: Sequence[Outcomes], *, seed: int = 0) -> Estimate:
    """The mean over seeds like these: seeds are drawn anew, and pairs within each drawn one.

    A hierarchical bootstrap (Davison and Hinkley, 1997, section 3.8). Of five seeds it cannot know
    more than five seeds tell: its intervals are rather too narrow than too wide.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    # Enough sets of resampled means for each seed, from which the drawn seeds take theirs.
    tables = np.stack([_resampled(own, rng) for own in values])
    drawn = rng.integers(n, size=(RESAMPLES, n))
    columns = rng.integers(RESAMPLES, size=(RESAMPLES, n))
    means = tables[drawn, columns].mean(1)
    return _estimate(float(np.mean([own.mean() for own in values])), means)


def _resampled(values: Outcomes, rng: np.random.Generator) -> Outcomes:
    """RESAMPLES means of values that are drawn with replacement."""
    levels, counts = np.unique(values, return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
    return drawn @ levels / len(values)


def _estimate(mean: float, resampled: Outcomes) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(mean), float(low), float(high))
