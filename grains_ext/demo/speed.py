"""Tokens per second of several exported decoders, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

from grains_ext.export import OnnxDecoder


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        tenths = quantiles(values, n=10, method="inclusive")
        return cls(median(values), tenths[0], tenths[-1])


def interleaved_rates(
    decoders: Mapping[str, OnnxDecoder],
    prompt_ids: Sequence[int],
    *,
    tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Tokens per second of each decoder in each round, one sequence, greedy, prefill included.

    The decoders take turns, and the order of the turns is reversed from round to round: where the
    machine slows down meanwhile, it does so for all of them. One more round, the first, warms up.
    """
    input_ids = np.array([prompt_ids], dtype=np.int64)
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(rounds + 1):
        for name in list(decoders)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            decoders[name].generate(input_ids, max_new_tokens=tokens)
            if turn > 0:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates
