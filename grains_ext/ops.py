"""The compiled ops, ``torch.ops.grains.*``: typed wrappers, fake kernels and gradients.

One section per op, in the order of the C++ registration (csrc/torch/ops.cpp). Tensors are float32,
float16 or bfloat16 on CPU or CUDA; all arithmetic is float32. The kernels check their arguments and
raise ``RuntimeError`` naming the argument, what was given and what was expected; the fake kernels
(torch.compile, torch.export) check the shapes while tracing. :mod:`grains_ext.reference` defines
what each op computes.

Only :func:`steer_add_normalize` has a gradient. The others raise where a gradient would be needed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

__all__ = [
    "ig_accumulate",
    "ig_interpolate",
    "skip_steer_layer_norm",
    "skip_steer_rms_norm",
    "steer_add_normalize",
    "steer_add_normalize_",
]


def _load_library(path: Path) -> None:
    rebuild = "build it with `make setup`, or `pip install --no-build-isolation -e .`"
    if not path.exists():
        raise ImportError(f"grains_ext: the op library {path} is not built; {rebuild}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"grains_ext: {path} does not load with torch {torch.__version__} (2.11 or newer is "
            f"needed); {rebuild}"
        ) from error


_load_library(Path(__file__).with_name("libgrains_torch.so"))


_EPS = 1e-6  # of steer_add_normalize, here and in its schema


class _Op:
    """An op, and how to call it where a Python frame and a conversion cost as much as its kernel.

    Outside of a compiler, which only meets `default`, `direct` is what calling the overload comes
    to. It is of the overload `no_grad` where there is one: the autograd kernel of `default` is in
    Python too, and would be called where nothing needs a gradient.
    """

    def __init__(self, op: OpOverloadPacket) -> None:
        self.default: OpOverload = op.default
        overload = op.no_grad if "no_grad" in op.overloads() else op.default
        self.direct: Callable[..., Any] = overload._op

    def of(self, *tensors: Tensor | None) -> Callable[..., Any]:
        """What to call with these tensors. Raises for one with a tangent, which would be lost."""
        if torch.compiler.is_compiling():
            return self.default
        if forward_ad._current_level >= 0 and _any_tangent(*tensors):
            raise NotImplementedError(
                f"{self.default.name()} has no forward-mode derivative (torch.func.jvp, jacfwd); "
                "take the function of this name in grains_ext.reference, or a backward pass"
            )
        if torch.is_grad_enabled() and _any_requires_grad(*tensors):
            return self.default
        return self.direct


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for given in tensors:  # noqa: SIM110 (a generator costs more than the question)
        if given is not None and given.requires_grad:
            return True
    return False


def _any_tangent(*tensors: Tensor | None) -> bool:
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _as_strength(strength: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(strength, Tensor):
        return strength
    return torch.full((), strength, dtype=torch.float32, device=like.device)


def _no_gradient(op: str, instead: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"grains::{op} has no gradient; {instead}")

    return backward


def check_shape(fits: bool, op: str, name: str, given: Tensor, expected: str) -> None:
    torch._check(
        fits, lambda: f"grains::{op}: `{name}` has shape {list(given.shape)}, expected {expected}"
    )


# --- ig_interpolate -------------------------------------------------------------------------------


_IG_INTERPOLATE = _Op(torch.ops.grains.ig_interpolate)


def ig_interpolate(input: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """Points on the straight path from `baseline` to `input`, for Integrated Gradients.

    Args:
        input: [B, T, D] embeddings.
        baseline: any shape that broadcasts to `input` and ends in D; dtype of `input`.
        alphas: float32 [S], or [S, B] where each batch row has its own; 0 gives the baseline and 1
            the input, bit for bit.

    Returns:
        [S, B, T, D] of `input`'s dtype: baseline + alpha (input - baseline). No gradient: the
        points are leaves of the model's graph.
    """
    op = _IG_INTERPOLATE.of(input, baseline, alphas)
    points: Tensor = op(input, baseline, alphas)
    return points


def _check_path(op: str, input: Tensor, baseline: Tensor, name: str, per_step: Tensor) -> None:
    check_shape(input.ndim == 3, op, "input", input, "[batch, tokens, hidden size]")
    fits = 1 <= baseline.ndim <= 3 and baseline.shape[-1] == input.shape[-1]
    leading = input.shape[3 - baseline.ndim : 2] if fits else ()
    for size, wanted in zip(baseline.shape[:-1], leading, strict=False):
        fits = fits and (size == 1 or size == wanted)
    check_shape(fits, op, "baseline", baseline, f"a shape that broadcasts to {list(input.shape)}")
    fits = per_step.ndim == 1 or (per_step.ndim == 2 and per_step.shape[1] == input.shape[0])
    check_shape(fits, op, name, per_step, "[steps] or [steps, batch]")


@torch.library.register_fake("grains::ig_interpolate")
@torch.library.register_fake("grains::ig_interpolate.no_grad")
def _(input: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    _check_path("ig_interpolate", input, baseline, "alphas", alphas)
    return input.new_empty((alphas.shape[0], *input.shape))


torch.library.register_autograd(
    "grains::ig_interpolate",
    _no_gradient("ig_interpolate", "detach its inputs, or use grains_ext.reference"),
)

# --- ig_accumulate --------------------------------------------------------------------------------


_IG_ACCUMULATE = _Op(torch.ops.grains.ig_accumulate)


def ig_accumulate(grads: Tensor, input: Tensor, baseline: Tensor, weights: Tensor) -> Tensor:
    """The attribution of each token: sum_s w_s sum_d grads[s] (input - baseline).

    Args:
        grads: [S, B, T, D] gradients at the points of :func:`ig_interpolate`.
        input: [B, T, D], dtype of `grads`.
        baseline: as in :func:`ig_interpolate`.
        weights: float32 [S] or [S, B], the quadrature weights.

    Returns:
        float32 [B, T]. The [S, B, T, D] product is never stored. No gradient.
    """
    op = _IG_ACCUMULATE.of(grads, input, baseline, weights)
    scores: Tensor = op(grads, input, baseline, weights)
    return scores


@torch.library.register_fake("grains::ig_accumulate")
@torch.library.register_fake("grains::ig_accumulate.no_grad")
def _(grads: Tensor, input: Tensor, baseline: Tensor, weights: Tensor) -> Tensor:
    _check_path("ig_accumulate", input, baseline, "weights", weights)
    expected = (weights.shape[0], *input.shape)
    check_shape(grads.shape == expected, "ig_accumulate", "grads", grads, f"{list(expected)}")
    return input.new_empty(input.shape[:2], dtype=torch.float32)


torch.library.register_autograd(
    "grains::ig_accumulate",
    _no_gradient("ig_accumulate", "detach its inputs, or use grains_ext.reference"),
)

# --- steer_add_normalize --------------------------------------------------------------------------


_STEER_ADD_NORMALIZE = _Op(torch.ops.grains.steer_add_normalize)


def steer_add_normalize(
    hidden: Tensor,
    vectors: Tensor,
    strength: Tensor | float,
    index: Tensor | None = None,
    eps: float = _EPS,
) -> Tensor:
    """Steer each row of `hidden`: h' = (h + a v) |h| / |h + a v| (arXiv 2507.18043, section 3.3).

    Args:
        hidden: [..., D]; the norm is over the last dimension, in float32, whatever the scale.
        vectors: one direction [D] or a bank [N, D], dtype of `hidden`.
        strength: a; a float, or float32 [] or [N] (one per direction). As a tensor it may change
            under torch.compile and CUDA graphs without a recompile. 0 returns `hidden` bit for bit.
        index: int32 of shape hidden.shape[:-1] or hidden.shape[:1]: which direction steers the row;
            -1 leaves it alone. Required with a bank of more than one direction. An index outside
            the bank raises on the CPU; on CUDA it makes the row NaN.
        eps: rows with |h + a v| <= eps |h| are returned unchanged: they have no direction left.

    Returns:
        A new contiguous tensor like `hidden`. Differentiable in hidden, vectors and strength.
    """
    strength = _as_strength(strength, hidden)
    op = _STEER_ADD_NORMALIZE.of(hidden, vectors, strength)
    steered: Tensor
    if index is None and eps == _EPS:  # what is left to its default is not converted
        steered = op(hidden, vectors, strength)
    else:
        steered = op(hidden, vectors, strength, index, eps)
    return steered


def _check_steering(
    op: str, hidden: Tensor, vectors: Tensor, strength: Tensor, index: Tensor | None
) -> None:
    rows, dim = hidden.shape[:-1], hidden.shape[-1]
    fits = 1 <= vectors.ndim <= 2 and vectors.shape[-1] == dim
    check_shape(fits, op, "vectors", vectors, f"[{dim}] or [N, {dim}]")
    bank = vectors.shape[0] if vectors.ndim == 2 else 1
    fits = strength.ndim == 0 or (strength.ndim == 1 and strength.shape[0] == bank)
    check_shape(fits, op, "strength", strength, f"[] or [{bank}]")
    if index is not None:
        fits = index.shape == rows or (index.ndim == 1 and index.shape == rows[:1])
        check_shape(fits, op, "index", index, f"{list(rows)} or {list(rows[:1])}")


@torch.library.register_fake("grains::steer_add_normalize")
@torch.library.register_fake("grains::steer_add_normalize.no_grad")
def _(
    hidden: Tensor,
    vectors: Tensor,
    strength: Tensor,
    index: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    _check_steering("steer_add_normalize", hidden, vectors, strength, index)
    return hidden.new_empty(hidden.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, vectors, strength, index, ctx.eps = inputs
    ctx.save_for_backward(hidden, vectors, strength, index)


def _norm(rows: Tensor) -> Tensor:
    """Summed in float64, so that rows of any finite scale have a norm."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.to(torch.float32)


def _steer_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """With u = s / |s|, c = |h| / |s|: ds = c (g - u (u.g)); dh = ds + (u.g) h / |h|; dv = a ds;
    da = v.ds. Rows that were left alone pass their gradient on."""
    hidden, vectors, strength, index = ctx.saved_tensors
    rows = hidden.shape[:-1]
    h, g = hidden.to(torch.float32), grad.to(torch.float32)
    bank = vectors.to(torch.float32).reshape(-1, hidden.shape[-1])
    if index is None:
        index = torch.zeros((1,) * len(rows), dtype=torch.int32, device=hidden.device)
    index = index.reshape(index.shape + (1,) * (len(rows) - index.ndim)).expand(rows)
    chosen = index.clamp(min=0).long()
    a, v = strength.expand(bank.shape[0])[chosen].unsqueeze(-1), bank[chosen]

    s = h + a * v
    norm_h, norm_s = _norm(h), _norm(s)
    unchanged = (index < 0).unsqueeze(-1) | (norm_s <= ctx.eps * norm_h)
    unit_s = s / torch.where(norm_s == 0, 1.0, norm_s)
    unit_h = h / torch.where(norm_h == 0, 1.0, norm_h)
    ratio = norm_h / torch.where(norm_s == 0, 1.0, norm_s)
    along = (unit_s * g).sum(-1, keepdim=True)
    ds = torch.where(unchanged, 0.0, ratio * (g - unit_s * along))

    d_hidden = d_vectors = d_strength = None
    if ctx.needs_input_grad[0]:
        steered = ds + along * unit_h
        d_hidden = torch.where(unchanged | (a == 0), g, steered).to(hidden.dtype)
    if ctx.needs_input_grad[1]:
        per_row = (a * ds).reshape(-1, bank.shape[1])
        d_bank = torch.zeros_like(bank).index_add(0, chosen.reshape(-1), per_row)
        d_vectors = d_bank.reshape(vectors.shape).to(vectors.dtype)
    if ctx.needs_input_grad[2]:
        each = strength.new_zeros(bank.shape[0])
        each = each.index_add(0, chosen.reshape(-1), (v * ds).sum(-1).reshape(-1))
        d_strength = each.sum() if strength.ndim == 0 else each
    return d_hidden, d_vectors, d_strength, None, None


torch.library.register_autograd(
    "grains::steer_add_normalize", _steer_backward, setup_context=_save_for_backward
)


_STEER_ADD_NORMALIZE_ = _Op(torch.ops.grains.steer_add_normalize_)


def steer_add_normalize_(
    hidden: Tensor,
    vectors: Tensor,
    strength: Tensor | float,
    index: Tensor | None = None,
    eps: float = _EPS,
) -> Tensor:
    """:func:`steer_add_normalize` written into `hidden`, which is returned.

    `hidden` may have any strides; where its rows do not lie at one distance from each other it is
    steered in a copy and copied back. No gradient: raises where one would be needed.
    """
    strength = _as_strength(strength, hidden)
    op = _STEER_ADD_NORMALIZE_.of(hidden, vectors, strength)
    is_direct = op is _STEER_ADD_NORMALIZE_.direct
    if not is_direct and torch.is_grad_enabled() and _any_requires_grad(hidden, vectors, strength):
        raise RuntimeError(
            "grains::steer_add_normalize_ has no gradient; use steer_add_normalize, or call it "
            "under torch.no_grad()"
        )
    if index is None and eps == _EPS:
        op(hidden, vectors, strength)
    else:
        op(hidden, vectors, strength, index, eps)
    # Autograd must see that a tensor it may have saved has changed; a compiler sees it anyway.
    if is_direct:
        increment_version(hidden)
    return hidden


@torch.library.register_fake("grains::steer_add_normalize_")
def _(
    hidden: Tensor,
    vectors: Tensor,
    strength: Tensor,
    index: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    _check_steering("steer_add_normalize_", hidden, vectors, strength, index)


# --- skip_steer_rms_norm --------------------------------------------------------------------------


_SKIP_STEER_RMS_NORM = _Op(torch.ops.grains.skip_steer_rms_norm)


def skip_steer_rms_norm(
    x: Tensor,
    skip: Tensor,
    vectors: Tensor,
    strength: Tensor | float,
    weight: Tensor,
    index: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Residual addition, steering and the next RMSNorm in one pass.

    Args:
        x, skip: [..., D] of one dtype.
        vectors, strength, index: as in :func:`steer_add_normalize`; its eps is 1e-6 here.
        weight: [D], dtype of `x`.
        eps: the norm's epsilon.
        weight_offset: added to `weight`; 1 for Gemma.

    Returns:
        (normed, residual) like `x`: residual = steered(x + skip), normed = residual / sqrt(mean
        residual^2 + eps) * (weight + weight_offset), from the residual before it is rounded. No
        gradient.
    """
    strength = _as_strength(strength, x)
    op = _SKIP_STEER_RMS_NORM.of(x, skip, vectors, strength, weight)
    normed: tuple[Tensor, Tensor] = op(
        x, skip, vectors, strength, weight, index, eps, weight_offset
    )
    return normed


def _check_skip(op: str, x: Tensor, skip: Tensor, **parameters: Tensor | None) -> None:
    check_shape(x.shape == skip.shape, op, "skip", skip, f"{list(x.shape)}, the shape of `x`")
    for name, given in parameters.items():
        if given is not None:
            check_shape(given.shape == x.shape[-1:], op, name, given, f"[{x.shape[-1]}]")


@torch.library.register_fake("grains::skip_steer_rms_norm")
@torch.library.register_fake("grains::skip_steer_rms_norm.no_grad")
def _(
    x: Tensor,
    skip: Tensor,
    vectors: Tensor,
    strength: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_skip("skip_steer_rms_norm", x, skip, weight=weight)
    _check_steering("skip_steer_rms_norm", x, vectors, strength, index)
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.register_autograd(
    "grains::skip_steer_rms_norm",
    _no_gradient("skip_steer_rms_norm", "use steer_add_normalize(x + skip, ...) and a norm"),
)

# --- skip_steer_layer_norm ------------------------------------------------------------------------


_SKIP_STEER_LAYER_NORM = _Op(torch.ops.grains.skip_steer_layer_norm)


def skip_steer_layer_norm(
    x: Tensor,
    skip: Tensor,
    vectors: Tensor,
    strength: Tensor | float,
    weight: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Residual addition, steering and the next LayerNorm in one pass.

    As :func:`skip_steer_rms_norm`, with normed = (residual - mean) / sqrt(variance + eps) * weight
    + bias; `bias` is [D] or None. No gradient.
    """
    strength = _as_strength(strength, x)
    op = _SKIP_STEER_LAYER_NORM.of(x, skip, vectors, strength, weight, bias)
    normed: tuple[Tensor, Tensor] = op(x, skip, vectors, strength, weight, bias, index, eps)
    return normed


@torch.library.register_fake("grains::skip_steer_layer_norm")
@torch.library.register_fake("grains::skip_steer_layer_norm.no_grad")
def _(
    x: Tensor,
    skip: Tensor,
    vectors: Tensor,
    strength: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    _check_skip("skip_steer_layer_norm", x, skip, weight=weight, bias=bias)
    _check_steering("skip_steer_layer_norm", x, vectors, strength, index)
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.register_autograd(
    "grains::skip_steer_layer_norm",
    _no_gradient("skip_steer_layer_norm", "use steer_add_normalize(x + skip, ...) and a norm"),
)
