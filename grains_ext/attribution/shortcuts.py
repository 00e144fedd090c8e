"""Work a decoder does that a scored position does not need, left out without changing its result.

Each works on transformers' own modules, through hooks and the cache interface that every decoder
block speaks. Not every family lets itself be cut short: a caller compares the result with that of
the whole model once (`grains_ext.attribution.forward`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from grains_ext.decoder import DecoderView, hidden_states_of, unwrap
from grains_ext.scoring import frozen

# Under which of its arguments a block takes the cache.
_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
# Arguments with one entry per column, and the dimension that counts them.
_COLUMN_DIMENSIONS = {
    "attention_mask": -2,
    "position_embeddings": -2,
    "position_ids": -1,
    "cache_position": -1,
}


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Frozen, uncompiled, and no other attribution of this model at the same time.

    What this module changes of a model is changed for every thread, and would stay in the graphs of
    ``torch.compile``, which do not notice that hooks come and go.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(unwrap(model), RLock())
    with lock, frozen(model):
        compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
        try:
            for module in compiled:
                module._compiled_call_impl = None
            yield
        finally:
            for module, call in compiled.items():
                module._compiled_call_impl = call


class CannotTrim(Exception):
    """The last block takes an argument whose columns are not known."""


class _KeysAreIn(Exception):
    """Ends a block's run once its keys and values are known."""


class _LastBlockCache:
    """Stands in for the cache in the last block: keeps the keys of the columns left out."""

    def __init__(self, prefix: Any, layer: int) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.complete = False
        if prefix is not None:
            self.keys.append(prefix.layers[layer].keys)
            self.values.append(prefix.layers[layer].values)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        if not self.complete:
            raise _KeysAreIn
        return torch.cat(self.keys, dim=-2), torch.cat(self.values, dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        return sum(keys.shape[-2] for keys in self.keys)


@contextmanager
def last_block_at(decoder: DecoderView, n_columns: int) -> Iterator[None]:
    """The last block computes its output for the last ``n_columns`` columns only.

    Its keys and values are computed for all of them; the other columns of its output are zeros. The
    model must be called with a 4-D attention mask. Raises CannotTrim, from the model's call, where
    the block takes an argument of unknown layout.
    """
    block = decoder.blocks[-1]
    layer = decoder.n_blocks - 1
    parameters = list(inspect.signature(block.forward).parameters)
    inside = False
    cut = 0

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal inside, cut
        if inside:
            return None
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        hidden = kwargs["hidden_states"]
        cut = hidden.shape[1] - n_columns
        if cut <= 0:
            return None
        name = next((name for name in _CACHE_ARGUMENTS if name in kwargs), None)
        if name is None or kwargs.get("attention_mask") is None:
            raise CannotTrim(f"{type(module).__name__} is not called in a known way")
        cache = _LastBlockCache(kwargs[name], layer)
        inside = True
        try:
            module(**_columns(kwargs, hidden, slice(None, cut)) | {name: cache})
        except _KeysAreIn:
            pass
        finally:
            inside = False
        cache.complete = True
        return (), _columns(kwargs, hidden, slice(cut, None)) | {name: cache}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states_of(output)
        # Some models reshape to the input's size.
        whole = nn.functional.pad(hidden, (0, 0, cut, 0)) if cut > 0 else hidden
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _columns(kwargs: dict[str, Any], hidden: Tensor, columns: slice) -> dict[str, Any]:
    """The block's arguments for some of the T columns."""
    n_columns = hidden.shape[1]

    def cut(value: Any, dimension: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part, dimension) for part in value)
        if value.shape[dimension] != n_columns:  # broadcast over columns
            return value
        return value[(..., columns, *[slice(None)] * (-dimension - 1))]

    parts: dict[str, Any] = {"hidden_states": hidden[:, columns]}
    for name, value in kwargs.items():
        if name == "hidden_states" or name in _CACHE_ARGUMENTS:
            continue
        if name in _COLUMN_DIMENSIONS and value is not None:
            parts[name] = cut(value, _COLUMN_DIMENSIONS[name])
        elif isinstance(value, Tensor) and value.ndim > 0:
            raise CannotTrim(f"the last block takes a tensor {name!r}")
        else:
            parts[name] = value
    return parts


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Of one of these classes, none below it, with a weight of numbers: torchao puts tensors of a
    class of its own in their place."""
    return type(module) in classes and type(module.weight) is nn.Parameter


@contextmanager
def head_over(decoder: DecoderView, vocabulary: Tensor | None) -> Iterator[bool]:
    """The head computes the logits of these tokens only, int64 [K]; yields whether it does.

    None: of all tokens. Heads other than a plain ``nn.Linear`` (adapters, quantised ones) are left
    alone.
    """
    head: Any = decoder.head
    if not is_plain(head, nn.Linear) or "forward" in vars(head):
        yield False
        return
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if vocabulary is not None:
        rows = vocabulary.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]

    def forward(hidden: Tensor) -> Tensor:
        # The last columns of a batch are a view, for which linear would multiply row by row.
        return nn.functional.linear(hidden.contiguous(), weight, bias)

    # An instance attribute shadows the method for the time of the call.
    vars(head)["forward"] = forward
    try:
        yield vocabulary is not None
    finally:
        del vars(head)["forward"]


def prefix_cache(prefixes: list[list[tuple[Tensor, Tensor]]], counts: list[int]) -> DynamicCache:
    """A cache holding each prefix for as many rows, padded on the left to the longest.

    prefixes: for each, every layer's keys and values, [1, heads, P, width].
    """
    longest = max(layers[0][0].shape[-2] for layers in prefixes)

    def rows(layer: int, which: int) -> Tensor:
        parts = []
        for layers, count in zip(prefixes, counts, strict=True):
            state = layers[layer][which]
            padded = nn.functional.pad(state, (0, 0, longest - state.shape[-2], 0))
            parts.append(padded.expand(count, -1, -1, -1))
        return torch.cat(parts)

    return DynamicCache([(rows(layer, 0), rows(layer, 1)) for layer in range(len(prefixes[0]))])
