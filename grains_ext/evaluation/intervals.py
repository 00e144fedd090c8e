"""How sure a measured figure, or a change of it, is: intervals and a paired test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy import stats

Values: TypeAlias = "Sequence[float] | np.ndarray"

RESAMPLES = 10_000
# Draws of items that are held at a time (a draw is one item of one resample).
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Proportion:
    """``successes`` out of ``n``, with the Wilson interval [low, high] at 95 %; n = 0 is NaN."""

    successes: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Proportion:
        successes, n = sum(map(bool, outcomes)), len(outcomes)
        if n == 0:
            return cls(0, 0, float("nan"), float("nan"))
        interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        return cls(successes, n, float(interval.low), float(interval.high))

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Estimate:
    """A figure over ``n`` items with its 95 % percentile bootstrap interval [low, high].

    The items are resampled (Efron 1979). NaN where the figure has no value, as a precision with
    nothing called positive.
    """

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Statistic:
    """A figure over items: a formula of the sums of what each item adds.

    Every figure of an evaluation is one: a mean is sum / n, a perplexity exp(sum of -log p / sum of
    tokens), an F1 2 TP / (2 TP + FP + FN). So one bootstrap over items serves all of them.

    items: float64 [n, m]. formula: sums [..., m] -> [...]. binary: each item is right or wrong, so
        that the figure is a share of them.
    """

    items: np.ndarray
    formula: Callable[[np.ndarray], np.ndarray]
    binary: bool = False

    @classmethod
    def share(cls, outcomes: Values) -> Statistic:
        """The share of items that are right."""
        return cls(columns(outcomes, np.ones(len(outcomes))), _ratio, binary=True)

    @classmethod
    def mean(cls, values: Values) -> Statistic:
        return cls(columns(values, np.ones(len(values))), _ratio)

    @classmethod
    def ratio(cls, numerators: Values, denominators: Values) -> Statistic:
        """sum of numerators / sum of denominators."""
        return cls(columns(numerators, denominators), _ratio)

    @property
    def value(self) -> float:
        return float(self.formula(self.items.sum(axis=0)))

    def estimate(self, *, resamples: int = RESAMPLES, seed: int = 0) -> Proportion | Estimate:
        """The figure with its interval: Wilson's for a share, else the bootstrap's."""
        if self.binary:
            return Proportion.of(list(self.items[:, 0] > 0))
        (draws,) = _resampled([self], resamples, seed)
        return Estimate(self.value, len(self.items), *_interval(draws))


@dataclass(frozen=True)
class PairedChange:
    """How a figure changed on the same items.

    ``difference`` = after - before with the 95 % percentile bootstrap interval [low, high] over
    items, the same items drawn on both sides. Of a share also: ``gained`` and ``lost`` count the
    items that became right and wrong; ``p_value`` is McNemar's exact two-sided test, a binomial
    test of ``gained`` among gained + lost at one half (McNemar 1947); it is 1 where no item
    changed. None of any other figure.
    """

    difference: float
    low: float
    high: float
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None

    @classmethod
    def of(
        cls,
        before: Sequence[bool],
        after: Sequence[bool],
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> PairedChange:
        """Of a share. Raises ValueError where the two differ in length or are empty."""
        if len(before) != len(after) or not before:
            raise ValueError(
                "before and after must be outcomes of the same items, at least one: got "
                f"{len(before)} and {len(after)}"
            )
        change = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)
        gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
        # An item's change is -1, 0 or 1, so a resample is one multinomial draw of those counts.
        draws = np.random.default_rng(seed).multinomial(
            n, [lost / n, 1 - (gained + lost) / n, gained / n], size=resamples
        )
        low, high = np.quantile((draws[:, 2] - draws[:, 0]) / n, [0.025, 0.975])
        changed = gained + lost
        return cls(
            difference=(gained - lost) / n,
            low=float(low),
            high=float(high),
            gained=gained,
            lost=lost,
            p_value=float(stats.binomtest(gained, changed).pvalue) if changed else 1.0,
        )

    @classmethod
    def between(
        cls, before: Statistic, after: Statistic, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> PairedChange:
        """Of any figure. Raises ValueError where the two are not of the same, some, items."""
        if before.binary and after.binary:
            outcomes = [list(side.items[:, 0] > 0) for side in (before, after)]
            return cls.of(*outcomes, resamples=resamples, seed=seed)
        if len(before.items) != len(after.items) or not len(before.items):
            raise ValueError(
                "before and after must be figures of the same items, at least one: got "
                f"{len(before.items)} and {len(after.items)}"
            )
        first, second = _resampled([before, after], resamples, seed)
        return cls(after.value - before.value, *_interval(second - first))

    def __str__(self) -> str:
        if self.p_value is None:
            return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.difference:+.1%} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def columns(*values: Values) -> np.ndarray:
    """What each item adds, float64 [n, m], from the m columns."""
    return np.stack([np.asarray(column, dtype=np.float64) for column in values], axis=-1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = np.divide(sums[..., 0], sums[..., 1])
        return ratio


def _resampled(statistics: Sequence[Statistic], resamples: int, seed: int) -> list[np.ndarray]:
    """Each statistic's value on ``resamples`` draws of n of the n items, the same for all."""
    n = len(statistics[0].items)
    if n == 0:
        return [np.full(resamples, np.nan) for _ in statistics]
    rng = np.random.default_rng(seed)
    values: list[list[np.ndarray]] = [[] for _ in statistics]
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        for statistic, parts in zip(statistics, values, strict=True):
            parts.append(statistic.formula(times @ statistic.items))
    return [np.concatenate(parts) for parts in values]


def _interval(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[~np.isnan(draws)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
