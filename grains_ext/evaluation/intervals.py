"""How sure a measured share, or a change of it, is: intervals and a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
class PairedChange:
    """How a share changed on the same items.

    ``difference`` = after - before with the 95 % percentile bootstrap interval [low, high] over
    items; ``gained`` and ``lost`` count the items that became right and wrong; ``p_value`` is
    McNemar's exact two-sided test, a binomial test of ``gained`` among gained + lost at one half
    (McNemar 1947); it is 1 where no item changed.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float

    @classmethod
    def of(
        cls,
        before: Sequence[bool],
        after: Sequence[bool],
        *,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> PairedChange:
        """Raises ValueError where the two differ in length or are empty."""
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

    def __str__(self) -> str:
        return f"{self.difference:+.1%} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
