"""The objective f that is attributed: a weighted sum of the answers' token log-probabilities.

By default f = log p(chosen | prompt) - log p(rejected | prompt), each summed over the tokens of its
continuation (GrAInS, arXiv 2507.18043, section 3.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from grains_ext.attribution.sequences import Answer, Packed, common_prefix
from grains_ext.encoding import EncodedPair

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OBJECTIVES = ("sum", "mean", "first", "chosen", "rejected")


@dataclass(frozen=True)
class ScoredLogits:
    """What a callable objective sees of n points on the path of one pair.

    Row i of an answer's logits predicts token i of that answer.
    """

    chosen_logits: Tensor
    """float32 [n, C, V]."""
    chosen_ids: Tensor
    """int64 [C]."""
    rejected_logits: Tensor
    """float32 [n, R, V]."""
    rejected_ids: Tensor
    """int64 [R]."""


Objective: TypeAlias = "str | Callable[[ScoredLogits], Tensor]"


def answers_of(pair: EncodedPair, objective: Objective) -> list[Answer]:
    """The chosen and the rejected answer with the weights of their tokens under the objective.

    "sum": all tokens; "mean": all tokens over their number, so that a longer answer weighs no more;
    "first": the first token in which the answers differ; "chosen", "rejected": log p of that answer
    alone, summed. For a callable every weight is 1: they only say what must be scored.

    Raises ValueError where the answers are equal, or "first" finds no such token because one answer
    begins with the whole other one.
    """
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    if chosen == rejected:
        raise ValueError("chosen and rejected have the same tokens, their difference is always 0")
    ones, others = (1.0,) * len(chosen), (1.0,) * len(rejected)
    if callable(objective):
        return [Answer(chosen, ones), Answer(rejected, others)]
    if objective == "chosen":
        return [Answer(chosen, ones)]
    if objective == "rejected":
        return [Answer(rejected, others)]
    if objective == "first":
        parting = common_prefix(chosen, rejected)
        if parting == min(len(chosen), len(rejected)):
            raise ValueError(
                "one answer begins with the whole other one, so there is no first token in which "
                'they differ: use objective="sum"'
            )
        ones, others = (
            tuple(float(place == parting) for place in range(len(ids)))
            for ids in (chosen, rejected)
        )
    elif objective == "mean":
        ones, others = (tuple(1 / len(ids) for _ in ids) for ids in (chosen, rejected))
    elif objective != "sum":
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} or a callable, got {objective!r}"
        )
    return [Answer(chosen, ones), Answer(rejected, tuple(-weight for weight in others))]


@dataclass(frozen=True)
class WeightedLogprobs:
    """f of many rows of logits at once.

    f = sum_t w_t logit_t - sum_p (sum of w at p) logsumexp_p: where the weights of a position add
    up to 0, as at one that both answers share, the normaliser cancels and is not computed.
    """

    tokens: Tensor
    """int64 [targets, 3]: row, column counted from the end (negative), token."""
    weights: Tensor
    """float32 [targets]."""
    positions: Tensor
    """int64 [positions, 2]: row, column of each normaliser that does not cancel."""
    normalisers: Tensor
    """float32 [positions]: its weight."""
    vocabulary: Tensor | None
    """int64 [K], the only tokens whose logits are needed, rising; None: all of them."""

    @classmethod
    def of(cls, rows: Sequence[Packed], device: torch.device) -> WeightedLogprobs:
        import torch  # not above: the answers' weights need none

        targets: list[tuple[int, int, int]] = []
        weights: list[float] = []
        net: defaultdict[tuple[int, int], float] = defaultdict(float)
        for number, row in enumerate(rows):
            for target in row.targets:
                column = target.column - len(row)
                targets.append((number, column, target.token))
                weights.append(target.weight)
                net[number, column] += target.weight
        # Sums such as 1/3 + 1/3 + 1/3 - 1 leave rounding behind.
        kept = {position: weight for position, weight in net.items() if abs(weight) > 1e-9}
        tokens = torch.tensor(targets)
        vocabulary = None
        if not kept:
            vocabulary, places = tokens[:, 2].unique(return_inverse=True)
            tokens[:, 2] = places
        return cls(
            tokens=tokens.to(device),
            weights=torch.tensor(weights, device=device),
            positions=torch.tensor(list(kept), dtype=torch.int64).reshape(-1, 2).to(device),
            normalisers=torch.tensor(list(kept.values()), device=device),
            vocabulary=None if vocabulary is None else vocabulary.to(device),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """f of each row, float32 [rows]; logits [rows, R, V], or [rows, R, K] of ``vocabulary``."""
        from grains_ext.attribution.weighted_logprobs import WeightedSum  # needs torch

        f: Tensor = WeightedSum.apply(  # type: ignore[no-untyped-call]
            logits, self.tokens, self.weights, self.positions, self.normalisers
        )
        return f
