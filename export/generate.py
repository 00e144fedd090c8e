"""Greedy decoding of an exported decoder through onnxruntime, its cache kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from grains_ext.export.runtime import require_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder:
    """Runs a session with input_ids, attention_mask, position_ids and a key/value cache.

    session: as from `grains_ext.export.session`, of a graph with the input and output names that
        `export_model` documents; graphs without position_ids are served as well.
    overrides: values fed at every step in the place of defaults in the graph, such as
        {"grains.strength": np.array(0, np.float32)}.

    The cache passes from step to step as OrtValues, never through numpy.
    """

    def __init__(
        self, session: InferenceSession, *, overrides: Mapping[str, NDArray] | None = None
    ) -> None:
        self.session = session
        self._ort = require_onnxruntime()
        self._overrides = {
            name: self._ort.OrtValue.ortvalue_from_numpy(np.asarray(value))
            for name, value in (overrides or {}).items()
        }
        inputs = {value.name: value for value in session.get_inputs()}
        self._past = {n: v for n, v in inputs.items() if n.startswith("past_key_values.")}
        plain = set(inputs) - set(self._past)
        if not self._past or not {"input_ids", "attention_mask"} <= plain:
            raise ValueError(
                f"the graph's inputs are {sorted(inputs)}; expected input_ids, attention_mask "
                "and past_key_values.{i}.key/value"
            )
        if unknown := plain - {"input_ids", "attention_mask", "position_ids"}:
            raise ValueError(f"the graph has inputs that this decoder cannot feed: {unknown}")
        self._takes_positions = "position_ids" in plain
        on_cuda = session.get_providers()[0] == "CUDAExecutionProvider"
        self._device = "cuda" if on_cuda else "cpu"
        self._presents = [name.replace("past_key_values", "present") for name in self._past]

    def step(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: list[OrtValue] | None = None,
    ) -> tuple[NDArray, list[OrtValue]]:
        """One forward pass.

        input_ids [batch, tokens]; attention_mask [batch, past + tokens], 0 for padding; cache as
        returned by the step before, None at the first. Positions count from each row's first
        token that is not padding.

        Returns logits [batch, tokens, vocabulary] and the cache of past + tokens.
        """
        binding = self.session.io_binding()
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_positions:
            positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -input_ids.shape[1] :]
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, default in self._overrides.items():
            binding.bind_ortvalue_input(name, default)
        cache = self._empty_cache(len(input_ids)) if cache is None else cache
        for name, past in zip(self._past, cache, strict=True):
            binding.bind_ortvalue_input(name, past)
        binding.bind_output("logits", "cpu")
        for name in self._presents:
            binding.bind_output(name, self._device)
        self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), present

    def generate(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | None = None,
    ) -> NDArray[np.int64]:
        """Greedy continuation.

        input_ids [batch, tokens], padded on the left where attention_mask [batch, tokens] is 0.
        Rows go on after eos_token_id, with eos_token_id, until all rows have met it.

        Returns the new tokens, [batch, at most max_new_tokens].
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        cache: list[OrtValue] | None = None
        done = np.zeros(len(input_ids), dtype=bool)
        new: list[NDArray[np.int64]] = []
        for _ in range(max_new_tokens):
            logits, cache = self.step(input_ids, mask, cache)
            tokens = logits[:, -1].argmax(axis=-1)
            if eos_token_id is not None:
                tokens = np.where(done, eos_token_id, tokens)
                done |= tokens == eos_token_id
            input_ids = tokens[:, None].astype(np.int64)
            new.append(input_ids)
            if done.all():
                break
            mask = np.concatenate([mask, np.ones_like(input_ids)], axis=1)
        return np.concatenate(new, axis=1) if new else input_ids[:, :0]

    def _empty_cache(self, batch: int) -> list[OrtValue]:
        empty = []
        for name, value in self._past.items():
            _, heads, _, size = value.shape
            if value.type not in _NUMPY_TYPES or isinstance(heads, str) or isinstance(size, str):
                raise ValueError(
                    f"the cache input {name} is {value.type} {value.shape}; expected float or "
                    "float16 [batch, heads, past, size] with a number for heads and size"
                )
            array = np.zeros((batch, heads, 0, size), _NUMPY_TYPES[value.type])
            empty.append(self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        return empty
