"""Which prompt tokens to mask: the k that push hardest toward each answer (GrAInS, section 3.2)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Token positions in one prompt, strongest first. Either may be empty."""

    positive: tuple[int, ...]
    """They push toward the chosen answer."""
    negative: tuple[int, ...]
    """They push toward the rejected answer."""


def top_tokens(
    token_ids: Sequence[int], scores: Any, k: int, *, exclude_ids: Collection[int] = ()
) -> Selection:
    """The up to k positions with the largest scores > 0, and the up to k with the smallest < 0.

    token_ids, scores: T ids and T finite numbers, as in an Attribution. exclude_ids: tokens never
    chosen (special ones: masking BOS breaks the model's attention, not the evidence). Equal scores
    keep the prompt's order.

    Raises ValueError where k < 1, the lengths differ or a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if values.shape != (len(token_ids),):
        raise ValueError(f"{len(token_ids)} token ids but scores of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("attribution scores must be finite")
    allowed = [i for i, token in enumerate(token_ids) if token not in exclude_ids]
    rising = sorted(allowed, key=lambda i: values[i])
    falling = sorted(allowed, key=lambda i: -values[i])
    return Selection(
        positive=tuple(i for i in falling[:k] if values[i] > 0),
        negative=tuple(i for i in rising[:k] if values[i] < 0),
    )
