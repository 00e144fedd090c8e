"""What every way to compute attributions shares, in numbers alone: no torch is needed here."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from grains_ext.encoding import EncodedPair

RULES = ("gausslegendre", "riemann_middle")
BASELINES = ("bos", "mean", "pad", "unk", "mask", "zero")
DEFAULT_STEPS = 50
"""Points of a rule where none are asked for: captum's default."""


def quadrature(
    method: str, n_steps: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Nodes and weights of an ``n_steps``-point rule on [0, 1]; the weights sum to 1.

    ``method`` is "gausslegendre" (exact for polynomials up to degree 2 n - 1) or "riemann_middle"
    (the midpoints of ``n_steps`` equal parts), captum's names. Neither touches 0 or 1. Returns two
    float64 arrays of shape [n_steps], nodes rising. Raises ValueError for another method or
    ``n_steps`` < 1.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    if method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        return (nodes + 1) / 2, weights / 2
    if method == "riemann_middle":
        return (np.arange(n_steps) + 0.5) / n_steps, np.full(n_steps, 1 / n_steps)
    raise ValueError(f"method must be one of {', '.join(RULES)}, got {method!r}")


def within(residual: float, change: float, tolerance: float) -> bool:
    """Whether an error of completeness is small: as a share of the change of f, or in nats."""
    return bool(abs(residual) <= tolerance * max(1.0, abs(change)))


def special_token(tokenizer: Any, name: str) -> tuple[str, int]:
    """The special token that a baseline is named after: the name of the one found, and its id.

    Where a tokenizer has no BOS, EOS stands in for it, then PAD, and a warning says so. Raises
    ValueError where there is none.
    """
    for candidate in ("bos", "eos", "pad") if name == "bos" else (name,):
        token_id = getattr(tokenizer, f"{candidate}_token_id", None)
        if token_id is not None:
            if candidate != name:
                warnings.warn(
                    f"the tokenizer has no BOS token: the baseline uses {candidate.upper()} "
                    f"(id {token_id})",
                    stacklevel=4,
                )
            return candidate, token_id
    raise ValueError(
        f"baseline {name!r}: the tokenizer has no such token. Use 'mean', another special token "
        "or a tensor"
    )


def check_length(ids: EncodedPair, limit: int | None) -> None:
    """Raises ValueError where a pair has more tokens than the model has positions."""
    n_tokens = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
    # The last token of a continuation is predicted, never read.
    if limit is not None and n_tokens - 1 > limit:
        raise ValueError(
            f"prompt and continuation have {n_tokens} tokens, the model has {limit} positions; "
            "shorten the prompt"
        )


def warn_of_zero() -> None:
    """For a zero baseline on a model that adds no position embeddings."""
    warnings.warn(
        "the zero baseline does not converge on a model without position embeddings: its first "
        "norm scales an infinitesimal input up to unit size. Use 'bos' or 'mean'",
        stacklevel=4,
    )
