"""How good scores are against a reference of many steps, and how many steps a rule needs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import numpy.typing as npt

from grains_ext.attribution import Attribution, attribute
from grains_ext.pairs import PreferencePair

STEPS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
LEAST_OVERLAP = 0.95


@dataclass(frozen=True)
class Accuracy:
    """Of one way to attribute some pairs."""

    residual_p50: float
    """Completeness error: |sum of scores - change of f| / max(1, |change of f|)."""
    residual_p90: float
    top_5: float
    """Mean share of the reference's five tokens of largest |score| that are found."""
    top_10: float
    l1_p90: float
    """|scores - reference| summed over tokens, relative to |reference| summed."""
    gradients: float
    """Mean number of gradients of f per pair."""

    def at_least(self, other: "Accuracy") -> bool:
        """As good as the other in completeness, and finding enough of the top tokens."""
        return self.residual_p90 <= other.residual_p90 and self.top_10 >= LEAST_OVERLAP


def results_of(
    model: Any, tokenizer: Any, pairs: Sequence[PreferencePair], **options: Any
) -> list[Attribution]:
    """`attribute`, quiet about what did not converge."""
    with catch_warnings():
        simplefilter("ignore", UserWarning)
        return attribute(model, tokenizer, pairs, progress=False, **options)


def accuracy_of(results: Iterable[Attribution], reference: Iterable[Attribution]) -> Accuracy:
    """Compares pair by pair."""
    rows = []
    n_gradients = []
    for result, exact in zip(results, reference, strict=True):
        found, truth = (r.scores.astype(np.float64) for r in (result, exact))
        change = exact.f_input - exact.f_baseline
        rows.append(
            (
                abs(found.sum() - change) / max(1.0, abs(change)),
                _overlap(found, truth, 5),
                _overlap(found, truth, 10),
                np.abs(found - truth).sum() / np.abs(truth).sum(),
            )
        )
        n_gradients.append(result.n_steps)
    residual, top_5, top_10, l1 = np.array(rows).T
    return Accuracy(
        residual_p50=float(np.median(residual)),
        residual_p90=float(np.quantile(residual, 0.9)),
        top_5=float(top_5.mean()),
        top_10=float(top_10.mean()),
        l1_p90=float(np.quantile(l1, 0.9)),
        gradients=float(np.mean(n_gradients)),
    )


def sweep(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    reference: Sequence[Attribution],
    method: str,
    goal: Accuracy,
) -> Iterator[tuple[int, Accuracy]]:
    """(n_steps, accuracy) of a fixed rule, with more and more steps until the goal is reached.

    In float32 by grains_ext: captum's scores at the same nodes are the same.
    """
    for n_steps in STEPS:
        results = results_of(model, tokenizer, pairs, method=method, n_steps=n_steps)
        accuracy = accuracy_of(results, reference)
        yield n_steps, accuracy
        if accuracy.at_least(goal):
            return


def _overlap(found: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], k: int) -> float:
    top = [set(np.argsort(-np.abs(scores), kind="stable")[:k]) for scores in (found, truth)]
    return len(top[0] & top[1]) / len(top[1])
