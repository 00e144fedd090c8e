"""What the model reads for a pair: the prompt and both answers in one sequence, a tree.

The answers share a trunk (the prompt, and the tokens with which both begin) and then part. Packed
behind each other under a mask that hides each branch from the other, they cost one pass over the
prompt where two sequences cost two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from grains_ext.encoding import TokenIds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """A continuation, and the weight of each token's log-probability in the objective."""

    token_ids: TokenIds
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """One term of the objective: weight * log p(token | what stands up to ``column``)."""

    column: int
    token: int
    weight: float


@dataclass(frozen=True)
class Packed:
    """One row of the model's input: L tokens, trunk first, then the branches."""

    token_ids: TokenIds
    depths: tuple[int, ...]
    """Each token's place along its own branch, as if the other branch were not there."""
    branches: tuple[int, ...]
    """0 in the trunk, else the number of the branch."""
    targets: tuple[Target, ...]
    answers: tuple[TokenIds, ...]
    """The answers that the row holds, up to the last token that is scored."""
    columns: tuple[tuple[int, ...], ...]
    """The column before each token of each answer."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def n_scored(self) -> int:
        """How many of the last columns hold every scored one."""
        return len(self) - min(target.column for target in self.targets)

    @property
    def n_normalised(self) -> int:
        """How many columns need the logits of the whole vocabulary: the weights there remain."""
        net: defaultdict[int, float] = defaultdict(float)
        for target in self.targets:
            net[target.column] += target.weight
        return sum(abs(weight) > 1e-9 for weight in net.values())

    @property
    def is_tree(self) -> bool:
        """Whether some tokens must not see others before them."""
        return len({*self.branches} - {0}) > 1

    def allowed(self, linear: Tensor | None = None) -> Tensor:
        """Which columns each column may attend, bool [L, L].

        linear: the same over depths, bool [N, N], for a model with a mask of its own; causal
            without it.
        """
        import torch  # not above: packing needs none

        depths = torch.tensor(self.depths)
        branches = torch.tensor(self.branches)
        if linear is None:
            order = torch.arange(len(self))
            seen = order[:, None] >= order
        else:
            seen = linear.cpu()[depths[:, None], depths]
        return seen & ((branches == 0) | (branches[:, None] == branches))


def pack(prompt_ids: TokenIds, answers: Sequence[Answer], *, tree: bool) -> tuple[Packed, ...]:
    """The rows for one pair: one tree, or without ``tree`` a row for every answer.

    Answers whose tokens all have weight 0 are left out. A row reads no further than the token
    before its last scored one. Terms that cancel are left out of a tree; there may be none left
    where the answers are equal.
    """
    scored = [answer for answer in answers if any(answer.weights)]
    if tree or len(scored) == 1:
        return (_pack(prompt_ids, scored),)
    return tuple(_pack(prompt_ids, [answer]) for answer in scored)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return len(list(takewhile(lambda two: two[0] == two[1], zip(first, second, strict=False))))


def _pack(prompt_ids: TokenIds, answers: Sequence[Answer]) -> Packed:
    read = [answer.token_ids[: _last_scored(answer)] for answer in answers]
    shared = len(read[0])
    for other in read[1:]:
        shared = min(shared, common_prefix(read[0], other))
    token_ids = [*prompt_ids, *read[0][:shared]]
    trunk = len(token_ids)
    depths = list(range(trunk))
    branches = [0] * trunk
    columns: list[tuple[int, ...]] = []
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    for number, (answer, tokens) in enumerate(zip(answers, read, strict=True), start=1):
        # The token before it: in the trunk up to the parting, then along the branch.
        start = len(token_ids)
        places = range(-shared, _last_scored(answer) + 1 - shared)
        columns.append(tuple((start if place > 0 else trunk) + place - 1 for place in places))
        for column, token, weight in zip(
            columns[-1], answer.token_ids, answer.weights, strict=False
        ):
            weights[column, token] += weight
        token_ids += tokens[shared:]
        depths += range(trunk, trunk + len(tokens) - shared)
        # A single branch needs no mask: it is more trunk.
        branches += [number if len(answers) > 1 else 0] * (len(tokens) - shared)
    targets = [
        Target(column, token, weight)
        for (column, token), weight in sorted(weights.items())
        if weight != 0.0
    ]
    return Packed(
        token_ids=tuple(token_ids),
        depths=tuple(depths),
        branches=tuple(branches),
        targets=tuple(targets),
        answers=tuple(answer.token_ids[: _last_scored(answer) + 1] for answer in answers),
        columns=tuple(columns),
    )


def _last_scored(answer: Answer) -> int:
    return max(place for place, weight in enumerate(answer.weights) if weight != 0.0)
