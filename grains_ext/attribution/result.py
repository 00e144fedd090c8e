"""What attribution returns for one pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each prompt token moved f = log p(chosen | prompt) - log p(rejected | prompt).

    A positive score pushes the model toward the chosen answer, a negative one toward the rejected
    answer, in nats. Scores sum to f_input - f_baseline, up to ``residual``.
    """

    tokens: tuple[str, ...]
    """T display strings, the decoded prompt tokens."""
    token_ids: tuple[int, ...]
    """T token ids."""
    modality: tuple[str, ...]
    """T times "text"."""
    scores: npt.NDArray[np.float32]
    """float32 [T], signed, summed over the embedding dimension."""
    f_input: float
    """f at the prompt itself."""
    f_baseline: float
    """f with the prompt's embeddings at the baseline; the continuations keep their own."""
    residual: float
    """sum(scores) - (f_input - f_baseline): the completeness error."""
    evaluations: int
    """Points of the path at which f was computed, both ends and abandoned step counts included."""
    n_steps: int
    """Points that made these scores."""
    converged: bool
    """Whether \\|residual\\| <= tolerance * max(1, \\|f_input - f_baseline\\|)."""
    method: str
    """The quadrature rule."""
    baseline: str
    """The baseline's name: "bos", "mean", ..., or "tensor"."""
    prompt: str
    """The prompt's text as the model saw it, special tokens included."""
    chosen: str
    rejected: str
    pair_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers: ``json.dumps`` takes it."""
        plain = dict(vars(self))
        plain["scores"] = [float(score) for score in self.scores]
        for name in ("tokens", "token_ids", "modality"):
            plain[name] = list(plain[name])
        return plain
