"""The first block's products at all points of a path, made from those at its two ends.

Along a straight path the hidden state of a token is h(a) = (1 - a) h(0) + a h(1) until the first
block works on it, and its norm scales it by one number: with s(a) = 1 / sqrt(mean h(a)^2 + eps),

    W norm(h(a)) = s(a) (1 - a) W gain h(0) + s(a) a W gain h(1) + W bias.

So each matrix that reads that norm is multiplied with the two ends, once for a path, not with every
point; and the gradient with respect to a is made of row-wise dot products with what is there
already, where the gradient with respect to h(a) would be one more product for each. The same
formula with h centred serves LayerNorm, with s = 1 blocks whose matrices read h itself.

Which modules these are is seen in a run of the block, not known by name. What reads a norm in any
other way gets NaN in its place, so that f tells (`grains_ext.attribution.evaluator` compares it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grains_ext.attribution.shortcuts import is_plain
from grains_ext.decoder import DecoderView

_EPS_NAMES = ("variance_epsilon", "eps")
# Of layer norms that do not say theirs.
_USUAL_EPS = 1e-5
# Where the hidden state is compared with the straight line between its ends.
BETWEEN = 0.375


@dataclass(frozen=True)
class Norm:
    """(h - mean h, or h) * rstd * gain + bias."""

    gain: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool

    def numerator(self, hidden: Tensor) -> Tensor:
        """What is scaled: linear in ``hidden``."""
        return hidden - hidden.mean(-1, keepdim=True) if self.centred else hidden

    def __call__(self, hidden: Tensor) -> Tensor:
        numerator = self.numerator(hidden)
        scaled = numerator * (numerator.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        scaled = scaled if self.gain is None else scaled * self.gain
        return scaled if self.bias is None else scaled + self.bias


@dataclass(frozen=True)
class Reader:
    """A norm of the block's input, or the input itself, and the matrices that read it."""

    module: nn.Module | None
    norm: Norm | None
    matrices: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Ends:
    """What one row's products at any point of its path are made of, by reader."""

    moving: Tensor
    """bool [W], the columns at which the ends differ."""
    moments: tuple[Tensor, ...]
    """float64 [3, W]: means of h(0)^2, h(0) h(1), h(1)^2 of what the norm scales."""
    products: tuple[tuple[Tensor, ...], ...]
    """[2, W, outputs] of every matrix, without biases."""


class _Seen(Exception):
    """Ends a run of the model once the first block has been looked at."""


# --- which modules --------------------------------------------------------------------------------


@torch.no_grad()
def readers_of(decoder: DecoderView, run: Callable[[], object]) -> tuple[Reader, ...]:
    """What reads the first block's input through plain matrices; ``run`` calls the model."""
    block = decoder.blocks[0]
    untouched = {module for module in block.modules() if _is_untouched(module)}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # holds all: no memory is used twice

    def saw(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None and isinstance(output, Tensor):
            calls.append((module, given, output))

    def end(*_: Any) -> None:
        raise _Seen

    hooks = []
    try:
        for module in block.modules():
            if module is not block:
                hooks.append(module.register_forward_hook(saw, with_kwargs=True))
        hooks.append(block.register_forward_hook(end))
        with _first_input(block) as inputs:
            run()
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs or inputs[0].dtype != torch.float32:
        return ()
    hidden = inputs[0]

    def reading(tensor: Tensor) -> tuple[nn.Module, ...]:
        alike = [module for module, x, _ in calls if _is(x, tensor) and module in untouched]
        return tuple(module for module in dict.fromkeys(alike) if _is_matrix(module))

    found = [Reader(None, None, reading(hidden))]
    for module, x, output in calls:
        if module in untouched and _is(x, hidden) and (norm := _norm_of(module, hidden)):
            found.append(Reader(module, norm, reading(output)))
    return tuple(reader for reader in found if reader.matrices)


def _is(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _is_untouched(module: nn.Module) -> bool:
    """Whether it does what its class does: a hook might change what is given or answered."""
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    return "forward" not in vars(module) and not any(hooks)


def _is_matrix(module: nn.Module) -> bool:
    return is_plain(module, nn.Linear, Conv1D)


def _matrix(module: Any) -> Tensor:
    """[inputs, outputs]."""
    weight: Tensor = module.weight
    return weight if isinstance(module, Conv1D) else weight.t()


def _norm_of(module: Any, hidden: Tensor) -> Norm | None:
    """Found by trying: on rows as large as numbers are in norms, and as small as in embeddings."""
    if _is_matrix(module) or next(module.children(), None) is not None:
        return None
    gain, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    eps = next((e for n in _EPS_NAMES if isinstance(e := getattr(module, n, None), float)), None)
    random = torch.randn(4, hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    rows = torch.cat([random, 0.01 * random, 0.5 + random])
    try:
        expected = module(rows[None])[0]
    except Exception:  # whatever a module makes of arguments unknown to it
        return None
    for centred in (False, True):
        for offset in (0.0, 1.0):  # Gemma's weights are stored less one
            scale = None if gain is None else gain + offset
            norm = Norm(scale, bias, _USUAL_EPS if eps is None else eps, centred)
            if expected.shape == rows.shape and torch.allclose(
                norm(rows), expected, rtol=1e-5, atol=1e-5
            ):
                return norm
    return None


# --- one path -------------------------------------------------------------------------------------


@torch.no_grad()
def ends_of(
    decoder: DecoderView, readers: Sequence[Reader], run: Callable[[], object]
) -> Ends | None:
    """Of one row; ``run`` calls the model on both ends of its path and the point `BETWEEN` them.

    None where the first block's input does not lie on the line between those at the ends.
    """
    try:
        with _first_input(decoder.blocks[0], end=True) as inputs:
            run()
    except _Seen:
        pass
    start, end, between = inputs[0]
    line = torch.lerp(start, end, BETWEEN)
    if not (between - line).abs().max() <= 1e-5 * torch.maximum(start.abs(), end.abs()).max():
        return None
    moving = (start != end).any(-1)
    moments, products = [], []
    for reader in readers:
        scaled = [h if reader.norm is None else reader.norm.numerator(h) for h in (start, end)]
        a, b = (h.double() for h in scaled)
        moments.append(torch.stack([(x * y).mean(-1) for x, y in ((a, a), (a, b), (b, b))]))
        first, last = scaled[0][moving], scaled[1]
        if len(first) > 1 and (first == first[0]).all():  # all of them at one token's embedding
            first = first[:1]
        rows = torch.cat([last, first])
        if reader.norm is not None and reader.norm.gain is not None:
            rows = rows * reader.norm.gain
        of_reader = []
        for module in reader.matrices:
            product = rows @ _matrix(module)
            both = product[: len(last)].repeat(2, 1, 1)
            both[0, moving] = product[len(last) :]
            of_reader.append(both)
        products.append(tuple(of_reader))
    return Ends(moving, tuple(moments), tuple(products))


@contextmanager
def _first_input(block: nn.Module, *, end: bool = False) -> Iterator[list[Tensor]]:
    """The hidden states that a block is called with."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        if end:
            raise _Seen

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


# --- a batch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Some points of one path in a batch: a row for each, at the right of W columns."""

    ends: Ends
    rows: slice
    alphas: Tensor
    """float32 [n, columns of the row], the graph's leaves or made of them."""


@contextmanager
def products_from_ends(
    readers: Sequence[Reader], stretches: Sequence[Stretch], shape: tuple[int, int]
) -> Iterator[None]:
    """The readers' matrices answer what the ends say, for a batch [N, W] of these stretches."""
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for number, reader in enumerate(readers):
        coefficients = [_coefficients(reader.norm, s.ends.moments[number], s) for s in stretches]
        for place, module in enumerate(reader.matrices):
            constant = getattr(module, "bias", None)
            if reader.norm is not None and reader.norm.bias is not None:
                constant = module(reader.norm.bias)
            products = [s.ends.products[number][place] for s in stretches]
            forwards[module] = _answering(
                coefficients, products, [s.rows for s in stretches], constant, shape
            )
        if reader.module is not None:
            forwards[reader.module] = _unread
    before = [(module, vars(module).get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _coefficients(norm: Norm | None, moments: Tensor, stretch: Stretch) -> Tensor:
    """float32 [n, columns, 2]: of the products at both ends."""
    b = stretch.alphas.double()
    a = 1 - b
    if norm is not None:
        square = a * a * moments[0] + 2 * a * b * moments[1] + b * b * moments[2]
        rstd = (square + norm.eps).rsqrt()
        a, b = a * rstd, b * rstd
    return torch.stack([a, b], dim=-1).float()


def _unread(hidden: Tensor) -> Tensor:
    return hidden.new_full((1,) * hidden.ndim, torch.nan).expand_as(hidden)


def _answering(
    coefficients: list[Tensor],
    products: list[Tensor],
    rows: list[slice],
    constant: Tensor | None,
    shape: tuple[int, int],
) -> Callable[[Tensor], Tensor]:
    def forward(given: Tensor) -> Tensor:
        out: Tensor = _Combined.apply(products, rows, constant, shape, *coefficients)  # type: ignore[no-untyped-call]
        return out.view(*given.shape[:-1], out.shape[-1])

    return forward


class _Combined(torch.autograd.Function):
    """out[rows of a stretch, its last columns] = c[..., 0] products[0] + c[..., 1] products[1]."""

    @staticmethod
    def forward(
        ctx: Any,
        products: list[Tensor],
        rows: list[slice],
        constant: Tensor | None,
        shape: tuple[int, int],
        *coefficients: Tensor,
    ) -> Tensor:
        ctx.products, ctx.rows = products, rows
        out = products[0].new_empty(*shape, products[0].shape[-1])
        for (first, last), part, c in zip(products, rows, coefficients, strict=True):
            columns = shape[1] - len(first)
            out[part, :columns] = 0
            to = out[part, columns:]
            torch.mul(first, c[..., :1], out=to)
            to.addcmul_(last, c[..., 1:])
        if constant is not None:
            out += constant
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        to_coefficients = []
        for both, part in zip(ctx.products, ctx.rows, strict=True):
            rows = grad[part, grad.shape[1] - both.shape[1] :]
            # For each column: its n rows with the two products there.
            dots = torch.bmm(rows.transpose(0, 1), both.permute(1, 2, 0))
            to_coefficients.append(dots.transpose(0, 1))
        return None, None, None, None, *to_coefficients
