"""What steering costs on neutral texts: perplexity, and how far it moves every next-token guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grains_ext.batching import pad_id_of
from grains_ext.encoding import encode_prompt
from grains_ext.evaluation.intervals import Statistic, columns
from grains_ext.scoring import text_divergences, text_logprobs
from grains_ext.steering.positions import reads_as_generated


@dataclass(frozen=True)
class TextOutcome:
    """One neutral text: log p of its tokens but the first, in nats, and their number.

    divergence: KL(unsteered || steered) of the next token, summed over those tokens; None where
        nothing is steered.
    """

    logprob: float
    n_tokens: int
    divergence: float | None = None


def read(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    steered: Callable[[], AbstractContextManager[Any]] | None = None,
    max_batch_tokens: int = 4096,
) -> list[TextOutcome]:
    """The texts of at least two tokens, in order.

    steered: makes the context in which the model is steered; None measures it as it stands. Where
        it gives a SteeringHandle that steers generated tokens, texts count as generated.

    Raises ValueError where no text has two tokens.
    """
    encoded = (encode_prompt(tokenizer, text) for text in texts if text.strip())
    sequences = [ids for ids in encoded if len(ids) > 1]
    if not sequences:
        raise ValueError("neutral texts need at least one of two tokens or more")
    budget: dict[str, Any] = {
        "max_batch_tokens": max_batch_tokens,
        "pad_id": pad_id_of(tokenizer),
    }
    if steered is None:
        scores = text_logprobs(model, sequences, **budget)
        return [TextOutcome(score.total, score.n_tokens) for score in scores]
    with steered() as handle:
        as_generated = reads_as_generated(getattr(handle, "positions", "all"))
        scores = text_logprobs(model, sequences, as_generated=as_generated, **budget)
    divergences = text_divergences(model, sequences, steered, as_generated=as_generated, **budget)
    return [
        TextOutcome(score.total, score.n_tokens, divergence)
        for score, divergence in zip(scores, divergences, strict=True)
    ]


def fluency_statistics(outcomes: Sequence[TextOutcome]) -> dict[str, Statistic]:
    """Perplexity and, where texts have a divergence, its mean per token; none of no texts."""
    if not outcomes:
        return {}
    n_tokens = [outcome.n_tokens for outcome in outcomes]
    logprobs = [outcome.logprob for outcome in outcomes]
    figures = {"perplexity": Statistic(columns(logprobs, n_tokens), _perplexity)}
    divergences = [each.divergence for each in outcomes if each.divergence is not None]
    if len(divergences) == len(outcomes):
        figures["kl_per_token"] = Statistic.ratio(divergences, n_tokens)
    return figures


def _perplexity(sums: np.ndarray) -> np.ndarray:
    perplexity: np.ndarray = np.exp(-sums[..., 0] / sums[..., 1])
    return perplexity
