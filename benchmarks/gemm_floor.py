"""The matrix products that an attribution cannot do without, timed alone: its floor.

Counted is what gradients of f with respect to the prompt's embeddings need, once the exact savings
are made (docs/benchmarks.md): per point of the path one sequence of the prompt and both answers, of
which the tokens in common stand once and each answer's last token is not read, N tokens; R of them
predict a token that counts, all but the first of these with a normaliser.

- every linear layer of every block: N rows forward and, for the input's gradient, N rows back; in
  the last block N rows for keys and values only, R rows for all else;
- attention in every block: its two products forward and four back, as N x N squares (R x N in the
  last block); a kernel that leaves out the masked half may do with less;
- the head: R - 1 rows forward and back. Where both answers part, two columns of it are enough.

f at the two ends of a path, which tell its error, needs the forward products only. Weights have no
gradients. Interpolation, norms, activations, softmax and masks are not counted.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grains_ext.decoder import DecoderView
from grains_ext.encoding import EncodedPair

# Linear layers of a block whose output every token must have, for others to attend to it.
_KEYS_AND_VALUES = ("k_proj", "v_proj")
# All of them in one: a third each for queries, keys and values.
_FUSED = "c_attn"


@dataclass(frozen=True)
class Evaluation:
    """One gradient of f: N tokens, R of them scored."""

    n_tokens: int
    n_scored: int

    @classmethod
    def of(cls, pair: EncodedPair) -> "Evaluation":
        answers = pair.chosen_ids, pair.rejected_ids
        common = len(list(takewhile(lambda two: two[0] == two[1], zip(*answers, strict=False))))
        # What is read of each answer beyond the common beginning.
        tails = [len(answer[:-1][common:]) for answer in answers]
        shared = min(common, *(len(answer) - 1 for answer in answers))
        return cls(len(pair.prompt_ids) + shared + sum(tails), 1 + sum(tails))


class GemmFloor:
    """Runs the products of some evaluations on a model's own weights, a call's worth at a time.

    Args:
        model: a Llama or GPT-2 of transformers.
        evaluations: one per pair and step: gradients of f.
        values: one per value of f without a gradient, such as the two ends of each path.
        max_batch_tokens: evaluations of equal length share a call up to this many tokens.
    """

    def __init__(
        self,
        model: Any,
        evaluations: Sequence[Evaluation],
        *,
        values: Sequence[Evaluation] = (),
        max_batch_tokens: int = 2048,
    ) -> None:
        decoder = DecoderView.of(model)
        self._head = _matrix(decoder.head)
        self._blocks = [_matrices(block) for block in decoder.blocks]
        self._heads = model.config.num_attention_heads
        self._width = getattr(model.config, "head_dim", None) or (
            decoder.hidden_size // self._heads
        )
        self._calls = [
            (evaluation, count, backward)
            for group, backward in ((evaluations, True), (values, False))
            for evaluation, count in _calls(group, max_batch_tokens)
        ]
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        for evaluation, count, backward in self._calls:
            n_all, n_scored = count * evaluation.n_tokens, count * evaluation.n_scored
            for number, (everywhere, elsewhere) in enumerate(self._blocks):
                last = number == len(self._blocks) - 1
                for weight in everywhere:
                    self._linear(weight, n_all, backward)
                for weight in elsewhere:
                    self._linear(weight, n_scored if last else n_all, backward)
                self._attention(evaluation, count, last, backward)
            self._linear(self._head, n_scored - count, backward)

    @cached_property
    def flops(self) -> float:
        """Of one call of this object: two for each multiplication and addition."""
        total = 0.0
        for evaluation, count, backward in self._calls:
            n, r = evaluation.n_tokens, evaluation.n_scored
            # Linear layers: forward and back; attention: two products forward, four back.
            linear, attention = (4.0, 12.0) if backward else (2.0, 4.0)
            for number, (everywhere, elsewhere) in enumerate(self._blocks):
                rows = r if number == len(self._blocks) - 1 else n
                per_point = sum(linear * n * weight.numel() for weight in everywhere)
                per_point += sum(linear * rows * weight.numel() for weight in elsewhere)
                total += count * (per_point + attention * rows * n * self._heads * self._width)
            total += count * linear * (r - 1) * self._head.numel()
        return total

    def _linear(self, weight: Tensor, rows: int, backward: bool) -> None:
        """Forward, and the gradient of the input; weight [in, out]."""
        if rows == 0:
            return
        n_in, n_out = weight.shape
        result = torch.mm(
            self._filled("in", rows, n_in), weight, out=self._empty("out", rows, n_out)
        )
        if backward:
            torch.mm(result, weight.t(), out=self._empty("gradient", rows, n_in))

    def _attention(self, evaluation: Evaluation, count: int, last: bool, backward: bool) -> None:
        batch, n = count * self._heads, evaluation.n_tokens
        rows = evaluation.n_scored if last else n
        queries = self._filled("queries", batch, rows, self._width)
        keys = self._filled("keys", batch, n, self._width)
        weights, other = (self._empty(k, batch, rows, n) for k in ("weights", "other"))
        by_query = self._empty("by query", batch, rows, self._width)
        by_key = self._empty("by key", batch, n, self._width)
        torch.bmm(queries, keys.mT, out=weights)
        torch.bmm(weights, keys, out=by_query)
        if not backward:
            return
        torch.bmm(weights.mT, queries, out=by_key)  # values
        torch.bmm(queries, keys.mT, out=other)  # weights
        torch.bmm(other, keys, out=by_query)  # queries
        torch.bmm(other.mT, queries, out=by_key)  # keys

    def _empty(self, name: str, *shape: int) -> Tensor:
        buffer = self._buffers.get((name, *shape))
        if buffer is None:
            buffer = self._buffers[name, *shape] = self._head.new_empty(shape)
        return buffer

    def _filled(self, name: str, *shape: int) -> Tensor:
        known = (name, *shape) in self._buffers
        buffer = self._empty(name, *shape)
        # Small, so that products stay finite; drawn once.
        return buffer if known else buffer.normal_(std=0.02)


class GemmPeak:
    """One large square product: the rate that all others are shares of."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        size = 8192 if device == "cuda" else 2048
        self._factors = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        self._product = torch.empty_like(self._factors[0])
        self.flops = 2.0 * size**3

    @torch.no_grad()
    def __call__(self) -> None:
        torch.mm(*self._factors, out=self._product)


def _calls(
    evaluations: Sequence[Evaluation], max_batch_tokens: int
) -> Iterator[tuple[Evaluation, int]]:
    """(evaluation, how many of it) of each model call."""
    for evaluation, count in Counter(evaluations).items():
        fitting = max(1, max_batch_tokens // evaluation.n_tokens)
        for start in range(0, count, fitting):
            yield evaluation, min(fitting, count - start)


def _matrix(module: nn.Module) -> Tensor:
    """The weight as [in, out]."""
    weight = module.weight.detach()
    return weight if isinstance(module, Conv1D) else weight.t()


def _matrices(block: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """A block's weights: of the layers that the last block needs everywhere, and of the others."""
    everywhere, elsewhere = [], []
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight, kind = _matrix(module), name.rpartition(".")[-1]
        if kind == _FUSED:
            third = weight.shape[1] // 3
            elsewhere.append(weight[:, :third])
            everywhere.append(weight[:, third:])
        else:
            (everywhere if kind in _KEYS_AND_VALUES else elsewhere).append(weight)
    return everywhere, elsewhere
