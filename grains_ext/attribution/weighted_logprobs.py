"""Weighted log-probabilities of many rows of logits, with their gradient written at once.

Autograd would keep a copy of the logits for each step and fill a gradient of their size three
times; for a small model with a large vocabulary that is a tenth of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Positions at a time: copies of so many rows of logits stay in the cache.
_CHUNK = 16


class WeightedSum(torch.autograd.Function):
    """f = sum_t w_t logit_t - sum_p v_p logsumexp_p, per row; see `objective.WeightedLogprobs`.

    Arguments of apply: logits [rows, R, V]; tokens int64 [targets, 3] (row, column, token) and
    their weights; positions int64 [positions, 2], each once, and the weights of their normalisers.
    Returns float32 [rows], differentiable in the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        weights: Tensor,
        positions: Tensor,
        normalisers: Tensor,
    ) -> Tensor:
        rows, columns, ids = tokens.unbind(-1)
        f = torch.zeros(len(logits), device=logits.device)
        f.index_add_(0, rows, weights * logits[rows, columns, ids].float())
        lse = torch.zeros_like(normalisers)
        for part in _chunks(len(positions)):
            rows, columns = positions[part].unbind(-1)
            lse[part] = logits[rows, columns].float().logsumexp(-1)
        f.index_add_(0, positions[:, 0], -normalisers * lse)
        ctx.save_for_backward(logits, tokens, weights, positions, normalisers, lse)
        return f

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, weights, positions, normalisers, lse = ctx.saved_tensors
        (grad,) = grads
        to_logits = torch.zeros_like(logits)
        for part in _chunks(len(positions)):
            rows, columns = positions[part].unbind(-1)
            softmax = logits[rows, columns].float().sub_(lse[part, None]).exp_()
            softmax *= (-normalisers[part] * grad[rows])[:, None]
            to_logits[rows, columns] = softmax.to(logits.dtype)
        rows, columns, ids = tokens.unbind(-1)
        to_logits.index_put_(
            (rows, columns, ids), (weights * grad[rows]).to(logits.dtype), accumulate=True
        )
        return to_logits, None, None, None, None


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, start + _CHUNK)
