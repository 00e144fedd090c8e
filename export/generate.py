"""Decoding of an exported decoder through onnxruntime, its cache kept on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grains_ext.export.runtime import require_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

PREFILL_TOKENS = 512
"""Prompt tokens in one pass: each has a row of logits as long as the vocabulary."""

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Sampler:
    """Chooses tokens from logits.

    temperature: 0 takes the likeliest. top_p: the smallest set of likeliest tokens whose
        probability reaches it is drawn from; 1 draws from all. seed: of the draws.
    """

    def __init__(self, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not (temperature >= 0 and np.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a number from 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected a number above 0, up to 1")
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """logits [batch, vocabulary] -> tokens [batch]."""
        if self._temperature == 0:
            likeliest: NDArray[np.int64] = logits.argmax(axis=-1).astype(np.int64)
            return likeliest
        scaled = logits.astype(np.float64) / self._temperature
        probabilities = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        ordered = np.take_along_axis(probabilities, order, axis=-1)
        # A token is drawn from while those before it do not reach top_p: at least one is.
        ordered[ordered.cumsum(axis=-1) - ordered >= self._top_p] = 0
        reached = ordered.cumsum(axis=-1)
        draws = self._random.random((len(logits), 1)) * reached[:, -1:]
        places = (reached <= draws).sum(axis=-1, keepdims=True)
        return np.take_along_axis(order, places, axis=-1)[:, 0].astype(np.int64)


class OnnxDecoder:
    """Runs a session with input_ids, attention_mask, position_ids and a key/value cache.

    session: as from `grains_ext.export.session`, of a graph with the input and output names that
        `export_model` documents; graphs without position_ids are served as well.
    overrides: values fed at every step in the place of defaults in the graph, such as
        {"grains.strength": np.zeros(1, np.float32)}.

    The cache passes from step to step as OrtValues, never through numpy.
    """

    def __init__(
        self, session: InferenceSession, *, overrides: Mapping[str, NDArray[Any]] | None = None
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
    ) -> tuple[NDArray[Any], list[OrtValue]]:
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
        eos_token_id: int | Collection[int] | None = None,
        sampler: Sampler | None = None,
    ) -> NDArray[np.int64]:
        """The continuation, [batch, at most max_new_tokens]; see `stream`."""
        new = list(
            self.stream(
                input_ids,
                attention_mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                sampler=sampler,
            )
        )
        return np.stack(new, axis=1) if new else input_ids[:, :0]

    def stream(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """The tokens that follow, one per row at a time: [batch].

        input_ids [batch, tokens], padded on the left where attention_mask [batch, tokens] is 0.
        Rows go on after an eos_token_id, with the same one, until all rows have met one.
        sampler: how a token is chosen; greedily if None.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        choose = sampler or Sampler()
        if eos_token_id is None:
            eos_token_id = ()
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        cache: list[OrtValue] | None = None
        done = np.zeros(len(input_ids), dtype=bool)
        tokens = np.zeros(len(input_ids), dtype=np.int64)
        for _ in range(max_new_tokens):
            start = mask.shape[1] - input_ids.shape[1]
            for begin in range(0, input_ids.shape[1], PREFILL_TOKENS):
                part = input_ids[:, begin : begin + PREFILL_TOKENS]
                end = start + begin + part.shape[1]
                logits, cache = self.step(part, mask[:, :end], cache)
            tokens = np.where(done, tokens, choose(logits[:, -1]))
            yield tokens
            done |= np.isin(tokens, ends)
            if done.all():
                break
            input_ids = tokens[:, None]
            mask = np.concatenate([mask, np.ones_like(input_ids)], axis=1)

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
