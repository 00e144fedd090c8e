"""Decoding of an exported decoder through onnxruntime, its cache kept on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grains_ext.export.folder import EMBEDDING_NAME
from grains_ext.export.runtime import Provider, require_onnxruntime, session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

PREFILL_TOKENS = 512
"""Prompt tokens in one pass: each has a row of logits as long as the vocabulary."""

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Feeds = dict[str, NDArray[Any]]

DEEPSTACK_FEATURES, DEEPSTACK_EMBEDS = "deepstack_features", "deepstack_embeds"
"""Image features that are added to the outputs of the decoder's first blocks: as vision.onnx gives
them, [levels, image tokens, hidden], and as the decoder takes them, [levels, batch, tokens,
hidden], zeros but at image tokens."""

# These run over all positions up to a pass's last one; what else is fed, over the pass's own.
_OVER_PAST = ("attention_mask", "token_type_ids")


def embedding_beside(
    graph: Path,
    *,
    session_options: SessionOptions | None = None,
    providers: Sequence[Provider] | None = None,
) -> InferenceSession | None:
    """The session of the embedding graph that a decoder over embeddings has in its folder."""
    path = graph.with_name(EMBEDDING_NAME)
    if not path.is_file():
        return None
    return session(path, library=False, session_options=session_options, providers=providers)


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


@dataclass(frozen=True)
class PromptImages:
    """The images of a batch of prompts, as the decoder takes them in.

    features: [image tokens, hidden], in the order of the image tokens, row by row.
    is_image: bool [batch, tokens], which tokens those are.
    position_ids: int64 [axes, batch, tokens], where a token of the model has several; else None.
    deepstack: [levels, image tokens, hidden], where decoder blocks get features too; else None.
    """

    features: NDArray[Any]
    is_image: NDArray[np.bool_]
    position_ids: NDArray[np.int64] | None = None
    deepstack: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.is_image.sum() != len(self.features):
            raise ValueError(
                f"the prompts have {self.is_image.sum()} image tokens, and the images "
                f"{len(self.features)} features: these prompts were not made for these images"
            )

    def between(self, start: int, end: int) -> Feeds:
        """What the embedding is fed for the image tokens in a range of columns."""
        numbers = self.is_image.cumsum().reshape(self.is_image.shape) - 1
        there = numbers[:, start:end][self.is_image[:, start:end]]
        feeds: Feeds = {"image_features": self.features[there]}
        if self.deepstack is not None:
            feeds[DEEPSTACK_FEATURES] = self.deepstack[:, there]
        return feeds


class OnnxDecoder:
    """Runs a session with input_ids, attention_mask, position_ids and a key/value cache.

    session: as from `grains_ext.export.session`, of a graph with the input and output names that
        `export_model` documents; graphs without position_ids are served as well.
    embedding: the session of the graph from input_ids and image_features to inputs_embeds, for a
        decoder over embeddings. What else it makes goes to the decoder by its name.
    overrides: values fed at every step in the place of defaults in the graph, such as
        {"grains.strength": np.zeros(1, np.float32)}.

    The cache passes from step to step as OrtValues, never through numpy.
    """

    def __init__(
        self,
        session: InferenceSession,
        *,
        embedding: InferenceSession | None = None,
        overrides: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.session, self.embedding = session, embedding
        self._ort = require_onnxruntime()
        self._overrides = {
            name: self._ort.OrtValue.ortvalue_from_numpy(np.asarray(value))
            for name, value in (overrides or {}).items()
        }
        inputs = {value.name: value for value in session.get_inputs()}
        self._past = {n: v for n, v in inputs.items() if n.startswith("past_key_values.")}
        plain = set(inputs) - set(self._past)
        tokens = "input_ids" if embedding is None else "inputs_embeds"
        if not self._past or not {tokens, "attention_mask"} <= plain:
            over_embeddings = embedding is None and "inputs_embeds" in plain
            raise ValueError(
                f"the graph's inputs are {sorted(inputs)}; expected {tokens}, attention_mask "
                "and past_key_values.{i}.key/value"
                + ("; pass the session of its embedding.onnx" if over_embeddings else "")
            )
        embedded = [] if embedding is None else [value.name for value in embedding.get_outputs()]
        if unknown := plain - {tokens, "position_ids", *_OVER_PAST, *embedded}:
            raise ValueError(f"the graph has inputs that this decoder cannot feed: {unknown}")
        self._takes = plain
        # [batch, tokens], or [axes, batch, tokens].
        positions = inputs["position_ids"].shape if "position_ids" in plain else []
        self._position_axes = positions[0] if len(positions) == 3 else 0
        on_cuda = session.get_providers()[0] == "CUDAExecutionProvider"
        self._device = "cuda" if on_cuda else "cpu"
        self._presents = [name.replace("past_key_values", "present") for name in self._past]

    def step(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: list[OrtValue] | None = None,
        images: PromptImages | None = None,
    ) -> tuple[NDArray[Any], list[OrtValue]]:
        """One forward pass.

        input_ids [batch, tokens]; attention_mask [batch, past + tokens], 0 for padding; cache as
        returned by the step before, None at the first. Positions count from each row's first
        token that is not padding. images: of the prompts that the text began with, in every step.

        Returns logits [batch, tokens, vocabulary] and the cache of past + tokens.
        """
        return self._run(self._feeds(input_ids, attention_mask, images), cache)

    def _feeds(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        images: PromptImages | None,
    ) -> Feeds:
        n_tokens, n_seen = input_ids.shape[1], attention_mask.shape[1]
        feeds: Feeds = {"attention_mask": attention_mask}
        if self.embedding is None:
            if images is not None:
                raise ValueError("the prompts have images, and this decoder takes text alone")
            feeds["input_ids"] = input_ids
        else:
            features = {} if images is None else images.between(n_seen - n_tokens, n_seen)
            feeds |= self._embedded(input_ids, features)
        if "position_ids" in self._takes:
            positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
            if self._position_axes:
                positions = _on_axes(positions, self._position_axes, images)
            feeds["position_ids"] = positions[..., n_seen - n_tokens :]
        if "token_type_ids" in self._takes:
            types = np.zeros_like(attention_mask)
            if images is not None:
                n_prompt = images.is_image.shape[1]
                types[:, :n_prompt] = images.is_image[:, :n_seen]
            feeds["token_type_ids"] = types
        return feeds

    def _embedded(self, input_ids: NDArray[np.int64], features: Feeds) -> Feeds:
        assert self.embedding is not None
        feeds: Feeds = {}
        for value in self.embedding.get_inputs():
            if value.name == "input_ids":
                feeds[value.name] = input_ids
                continue
            none = np.zeros([0 if isinstance(size, str) else size for size in value.shape])
            given = features.get(value.name, none)
            feeds[value.name] = given.astype(_NUMPY_TYPES[value.type], copy=False)
        names = [value.name for value in self.embedding.get_outputs()]
        return dict(zip(names, self.embedding.run(names, feeds), strict=True))

    def _run(
        self, feeds: Feeds, cache: list[OrtValue] | None
    ) -> tuple[NDArray[Any], list[OrtValue]]:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, default in self._overrides.items():
            binding.bind_ortvalue_input(name, default)
        cache = self._empty_cache(len(feeds["attention_mask"])) if cache is None else cache
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
        images: PromptImages | None = None,
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        sampler: Sampler | None = None,
    ) -> NDArray[np.int64]:
        """The continuation, [batch, at most max_new_tokens]; see `stream`."""
        new = list(
            self.stream(
                input_ids,
                attention_mask,
                images=images,
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
        images: PromptImages | None = None,
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """The tokens that follow, one per row at a time: [batch].

        input_ids [batch, tokens], padded on the left where attention_mask [batch, tokens] is 0.
        Rows go on after an eos_token_id, with the same one, until all rows have met one.
        images: of the prompts. sampler: how a token is chosen; greedily if None.
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
            feeds = self._feeds(input_ids, mask, images)
            start = mask.shape[1] - input_ids.shape[1]
            for begin, end in self._passes(input_ids.shape[1], images):
                logits, cache = self._run(_part(feeds, begin, end, start), cache)
            tokens = np.where(done, tokens, choose(logits[:, -1]))
            yield tokens
            done |= np.isin(tokens, ends)
            if done.all():
                break
            input_ids = tokens[:, None]
            mask = np.concatenate([mask, np.ones_like(input_ids)], axis=1)

    def _passes(self, n_tokens: int, images: PromptImages | None) -> Iterator[tuple[int, int]]:
        """Where the passes over so many tokens begin and end.

        A model whose image tokens attend to later ones reads an image in one pass.
        """
        is_image = np.zeros(n_tokens + 1, dtype=bool)
        if images is not None and "token_type_ids" in self._takes and n_tokens > 1:
            is_image[:n_tokens] = images.is_image.any(axis=0)
        begin = 0
        while begin < n_tokens:
            end = min(begin + PREFILL_TOKENS, n_tokens)
            while is_image[end - 1] and is_image[end]:
                end += 1
            yield begin, end
            begin = end

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


def _on_axes(
    positions: NDArray[np.int64], axes: int, images: PromptImages | None
) -> NDArray[np.int64]:
    """[axes, batch, tokens]: the prompts' own, and after them each row's last one counted on."""
    everywhere = np.broadcast_to(positions, (axes, *positions.shape))
    if images is None or images.position_ids is None:
        return everywhere
    n_prompt, n_seen = images.position_ids.shape[2], positions.shape[1]
    if n_seen <= n_prompt:
        return images.position_ids[..., :n_seen]
    lead = images.position_ids.max(axis=(0, 2)) - positions[:, n_prompt - 1]
    return np.concatenate([images.position_ids, everywhere[..., n_prompt:] + lead[:, None]], axis=2)


def _part(feeds: Feeds, begin: int, end: int, past: int) -> Feeds:
    """What a pass over some of the tokens is fed."""
    cuts = {
        name: np.s_[:, : past + end] if name in _OVER_PAST else np.s_[:, begin:end]
        for name in feeds
    } | {"position_ids": np.s_[..., begin:end], DEEPSTACK_EMBEDS: np.s_[:, :, begin:end]}
    return {name: value[cuts[name]] for name, value in feeds.items()}
