"""The model's own modules, run by ops that keep less for the backward and touch memory less often.

What they do is recognised by structure and tried on random numbers, once for each class of a model:
RMSNorms, gated MLPs, the rotary embedding, attention under a mask. Weights get no gradients; what
is not recognised runs as it is, as all does on a GPU.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.activations import NewGELUActivation

from grains_ext import decoder_ops as ops
from grains_ext.decoder import DecoderView

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EPS_NAMES = ("variance_epsilon", "eps")
_ROTARY = "apply_rotary_pos_emb"
_BACKENDS = "ALL_ATTENTION_FUNCTIONS"
# What a block passes to an attention backend and ours need not know: the mask says it.
_IN_THE_MASK = ("sliding_window", "position_ids", "is_causal", "cache_position", "use_cache")

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Fused:
    """Which modules run what in place of their forward."""

    forwards: dict[nn.Module, Forward]

    def __bool__(self) -> bool:
        return bool(self.forwards)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Instance attributes shadow the modules' methods inside the context."""
        try:
            for module, forward in self.forwards.items():
                vars(module)["forward"] = forward
            yield
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)


NOTHING_FUSED = Fused({})


@torch.no_grad()
def fused_modules(decoder: DecoderView) -> Fused:
    """What can be fused of a decoder's stack on a CPU."""
    weight = next(decoder.embedding.parameters())
    forwards: dict[nn.Module, Forward] = {}
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return Fused(forwards)
    makers: dict[tuple[object, ...], Callable[[nn.Module], Forward] | None] = {}
    for module in decoder.stack.modules():
        if "forward" in vars(module) or next(module.parameters(), weight).dtype != weight.dtype:
            continue
        kind = (type(module), tuple(name for name, _ in module.named_children()))
        if kind not in makers:
            makers[kind] = _maker(module, weight.dtype)
        if (make := makers[kind]) is not None:
            forwards[module] = make(module)
    return Fused(forwards)


def _maker(module: nn.Module, dtype: torch.dtype) -> Callable[[nn.Module], Forward] | None:
    """What makes the forward of modules of this class, from each; None for one not recognised."""
    parts = {name for name, _ in module.named_children()}
    if isinstance(module, NewGELUActivation):
        return lambda _: partial(gelu, approximate="tanh")
    if parts >= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _gated_mlp(module, "act_fn", _apart, module.gate_proj, dtype)  # type: ignore[arg-type]
    if parts >= {"gate_up_proj", "down_proj", "activation_fn"}:
        return _gated_mlp(module, "activation_fn", _chunked, module.gate_up_proj, dtype)  # type: ignore[arg-type]
    if not parts and [name for name, _ in module.named_parameters()] == ["weight"]:
        return _rms_norm(module, dtype)
    return _attention(module)


# --- norms ----------------------------------------------------------------------------------------


def _rms_norm(module: Any, dtype: torch.dtype) -> Callable[[nn.Module], Forward] | None:
    name = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), "")
    if not name or module.weight.ndim != 1:
        return None

    def make(module: Any, offset: float) -> Forward:
        return lambda x: ops.rms_norm(x, module.weight, getattr(module, name), offset)

    x = _random(3, len(module.weight), dtype=dtype)
    for offset in (0.0, 1.0):  # Gemma's weights are stored less one
        if _agree(module, make(module, offset), x):
            return partial(make, offset=offset)
    return None


# --- MLPs -----------------------------------------------------------------------------------------


def _apart(module: Any, activation: ops.Activation, x: Tensor) -> Tensor:
    gated = ops.gated_activation(module.gate_proj(x), module.up_proj(x), activation)
    out: Tensor = module.down_proj(gated)
    return out


def _chunked(module: Any, activation: ops.Activation, x: Tensor) -> Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    out: Tensor = module.down_proj(ops.gated_activation(gate, up, activation))
    return out


def _gated_mlp(
    module: nn.Module,
    activation_name: str,
    forward: Callable[[Any, ops.Activation, Tensor], Tensor],
    first: nn.Module,
    dtype: torch.dtype,
) -> Callable[[nn.Module], Forward] | None:
    activation = _activation(getattr(module, activation_name))
    width = getattr(first, "in_features", None)
    if activation is None or width is None:
        return None

    def make(module: nn.Module) -> Forward:
        return partial(forward, module, activation)

    return make if _agree(module, make(module), _random(2, width, dtype=dtype)) else None


def _activation(module: nn.Module) -> ops.Activation | None:
    x = torch.linspace(-8, 8, 65)
    known: dict[ops.Activation, Tensor] = {
        "silu": silu(x),
        "gelu_tanh": gelu(x, approximate="tanh"),
    }
    try:
        found = module(x)
    except Exception:  # an activation with a shape or dtype of its own
        return None
    return next((name for name, y in known.items() if torch.allclose(found, y, atol=1e-6)), None)


# --- attention ------------------------------------------------------------------------------------


def _attention(module: nn.Module) -> Callable[[nn.Module], Forward] | None:
    """The module's own forward, reading other functions under the names of two globals."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, types.FunctionType):
        return None
    used = {name for name in (_ROTARY, _BACKENDS) if name in forward.__code__.co_names}
    names = {**forward.__globals__}
    if _ROTARY in used and (rotary := _rotary(names[_ROTARY])):
        names[_ROTARY] = rotary
    if _BACKENDS in used:
        names[_BACKENDS] = _Backends(names[_BACKENDS])
    if not used:
        return None
    copy = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return lambda module: types.MethodType(copy, module)


def _rotary(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """In place of a model's ``apply_rotary_pos_emb``, where that turns by halves."""
    q, k = _random(2, 4, 3, 8), _random(2, 2, 3, 8)

    def alike(width: int) -> bool:
        angles = _random(2, 3, width // 2).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        try:
            expected = original(q, k, cos, sin)
        except Exception:  # whatever a function makes of arguments unknown to it
            return False
        found = ops.rotary(q, k, cos, sin)
        return all(
            a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
            for a, b in zip(expected, found, strict=True)
        )

    if not alike(8):
        return None
    partly = alike(4)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if args or kwargs or cos.ndim != 3 or cos.dtype != q.dtype or not (whole or partly):
            return original(q, k, cos, sin, *args, **kwargs)
        return ops.rotary(q, k, cos, sin)

    return rotary


class _Backends:
    """In place of transformers' table of attention backends."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_attend, self._table.get_interface(name, default))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return partial(_attend, self._table[name])


def _attend(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Any:
    """([batch, queries, heads, width], None), as a backend returns it."""
    plain = dropout == 0.0 and all(
        value is None or name in _IN_THE_MASK for name, value in kwargs.items()
    )
    masked = (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 4
        and attention_mask.shape[1] == 1
        and attention_mask.shape[2:] == (query.shape[2], key.shape[2])
        and attention_mask.dtype == query.dtype
    )
    if not plain or not masked:
        return original(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.attention(query, key, value, attention_mask, scale).transpose(1, 2), None


# --- trying ---------------------------------------------------------------------------------------


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers every time, the global generator left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _agree(module: nn.Module, forward: Forward, x: Tensor) -> bool:
    try:
        expected, found = module(x), forward(x)
    except Exception:  # whatever a module makes of arguments unknown to it
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    tolerance = 1e-5 if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max())
