"""Multiple choice: which of a pair's two answers does the model find more likely?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grains_ext.encoding import EncodedPair
from grains_ext.scoring import continuation_logprobs


@dataclass(frozen=True)
class Margins:
    """Of one pair, in nats: positive where the model prefers the chosen answer."""

    total: float
    """log p(chosen | prompt) - log p(rejected | prompt), each summed over its tokens."""
    per_token: float
    """The same with each log-probability divided by its number of tokens, so that a short answer
    has no head start."""


def margins(
    model: Any, encoded: Sequence[EncodedPair], *, pad_id: int, max_batch_tokens: int = 4096
) -> list[Margins]:
    """Each pair's margins, in order. A model right on a pair has a margin > 0; a tie is wrong."""
    scores = continuation_logprobs(
        model,
        [
            (pair.prompt_ids, continuation)
            for pair in encoded
            for continuation in (pair.chosen_ids, pair.rejected_ids)
        ],
        max_batch_tokens=max_batch_tokens,
        pad_id=pad_id,
    )
    return [
        Margins(chosen.total - rejected.total, chosen.mean - rejected.mean)
        for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
    ]
