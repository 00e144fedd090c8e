"""Where the path of Integrated Gradients starts: the baseline.

Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", 2017, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grains_ext.attribution.rules import BASELINES, special_token, warn_of_zero
from grains_ext.decoder import DecoderView
from grains_ext.decoder import max_positions as positions_of
from grains_ext.encoding import TokenIds


class Baseline:
    """Where every path starts: one embedding for all tokens of a prompt, or one per token.

    A BOS token at the start of a prompt keeps its real embedding, except under a [T, D] tensor,
    which is used as it stands. It takes no part in the path then, and its score is 0.

    ``baseline`` is one of

    - "bos", "pad", "unk", "mask": the embedding of that special token. Where a tokenizer has no
      BOS, EOS stands in for it, then PAD, and a warning says so;
    - "mean": the mean embedding of the vocabulary;
    - "zero": zeros. On models that add no position embeddings this starts the path at a
      discontinuity (RMSNorm scales an infinitesimal input up to unit size), so that no number of
      steps converges: a warning says so;
    - a tensor of shape [D] (every token) or [T, D] (row t for token t; all prompts have T tokens),
      in the scale in which the model takes ``inputs_embeds``.

    Raises ValueError for an unknown name, a special token that the tokenizer lacks, or a tensor of
    another shape.
    """

    def __init__(self, decoder: DecoderView, tokenizer: Any, baseline: str | Tensor) -> None:
        self._decoder = decoder
        self._bos_token_id: int | None = tokenizer.bos_token_id
        if isinstance(baseline, Tensor):
            self.name = "tensor"
            self._embedding = _checked_tensor(decoder, baseline)
        elif baseline == "mean":
            self.name = baseline
            self._embedding = _mean_embedding(decoder, len(tokenizer))
        elif baseline == "zero":
            if not adds_position_embeddings(decoder):
                warn_of_zero()
            self.name = baseline
            self._embedding = torch.zeros_like(_embed(decoder, [0])[0])
        elif baseline in BASELINES:
            token, token_id = special_token(tokenizer, baseline)
            self.name = token
            self._embedding = _embed(decoder, [token_id])[0]
        else:
            raise ValueError(
                f"baseline must be one of {', '.join(BASELINES)} or a tensor, got {baseline!r}"
            )

    @property
    def per_token(self) -> bool:
        """Whether it is a tensor [T, D], which says for every token where it starts."""
        return self._embedding.ndim == 2

    def check_length(self, n_tokens: int) -> None:
        """Raises ValueError where a [T, D] baseline meets a prompt of ``n_tokens`` other than T."""
        if self.per_token and self._embedding.shape[0] != n_tokens:
            raise ValueError(
                f"the baseline tensor has {self._embedding.shape[0]} rows, the prompt {n_tokens} "
                "tokens; give [D], or prompts of that length"
            )

    def embeddings(self, prompt_ids: TokenIds, inputs_embeds: Tensor) -> Tensor:
        """The start of the path for one prompt.

        ``inputs_embeds`` [T, D] are the prompt's real embeddings; the result has the same shape,
        dtype and device.
        """
        if self.per_token:
            self.check_length(len(prompt_ids))
            return self._embedding.clone()
        start = self._embedding.expand_as(inputs_embeds).clone()
        if prompt_ids[0] == self._bos_token_id:
            start[0] = inputs_embeds[0]
        return start


def _embed(decoder: DecoderView, token_ids: list[int]) -> Tensor:
    """[len(token_ids), D], as the model takes its ``inputs_embeds``."""
    with torch.no_grad():
        return decoder.embed(torch.tensor([token_ids], device=decoder.device))[0]


def _checked_tensor(decoder: DecoderView, baseline: Tensor) -> Tensor:
    example = _embed(decoder, [0])[0]
    if baseline.ndim not in (1, 2) or baseline.shape[-1] != example.shape[-1]:
        raise ValueError(
            f"baseline tensor must be [D] or [T, D] with D = {example.shape[-1]}, the width of the "
            f"model's input embeddings, got shape {list(baseline.shape)}"
        )
    return baseline.detach().to(example)


def _mean_embedding(decoder: DecoderView, vocabulary: int, chunk: int = 8192) -> Tensor:
    """The mean over the tokenizer's tokens: rows that only pad the matrix were never trained."""
    vocabulary = min(vocabulary, next(decoder.embedding.parameters()).shape[0])
    example = _embed(decoder, [0])[0]
    total = torch.zeros_like(example, dtype=torch.float64)
    for start in range(0, vocabulary, chunk):
        ids = list(range(start, min(start + chunk, vocabulary)))
        total += _embed(decoder, ids).sum(0, dtype=torch.float64)
    return (total / vocabulary).to(example)


def max_positions(decoder: DecoderView) -> int | None:
    """The longest sequence the model was made for, where its configuration says so."""
    return positions_of(decoder.model)


def adds_position_embeddings(decoder: DecoderView) -> bool:
    """Whether a second embedding table, as long as the context, stands beside the token table."""
    positions = max_positions(decoder)
    return positions is not None and any(
        isinstance(module, nn.Embedding)
        and module is not decoder.embedding
        and module.num_embeddings >= positions
        for module in decoder.model.modules()
    )
