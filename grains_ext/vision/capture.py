"""What the decoder stack reads for a prompt with images, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grains_ext.decoder import DecoderView, unwrap
from grains_ext.encoding import EncodedPair
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import frozen
from grains_ext.vision.encoding import EncodedImagePair, encode_image_pair
from grains_ext.vision.grid import ImageGrid
from grains_ext.vision.images import blurred
from grains_ext.vision.layouts import image_grids

Mask = None | Tensor | dict[str, Tensor]

# Arguments of the stack that are fields of their own, or that any model makes anew.
_NOT_KEPT = ("inputs_embeds", "position_ids", "attention_mask", "cache_position")


@dataclass(frozen=True)
class CapturedPrompt:
    """What the decoder stack reads for one prompt with images and a continuation.

    T prompt tokens, then C tokens of the longer continuation; L = T + C. There is no batch
    dimension but in ``stack_kwargs``.

    pair: token ids, image placeholders expanded to one id per image token.
    embeddings: [L, D], the merged embeddings of text and images.
    position_ids: int64 [L] or [axes, L]; None where the model passes none (0, 1, ...).
    mask: bool [L, L], True where a token (row) may attend to another (column), or one for each
        layer type; None where the stack is left to make its own causal mask.
    stack_kwargs: every other tensor that the stack gets, for a batch of one row (features for later
        blocks, masks of image tokens); `repeat_rows` makes more rows of it.
    modality: "text" or "image" for each of the T prompt tokens.
    images: which pixels each image token covers, one ImageGrid per image of the pair.
    separator: as given to capture_prompt.
    expansions: what the processor wrote for each image's placeholder.
    """

    pair: EncodedPair
    embeddings: Tensor
    position_ids: Tensor | None
    mask: Mask
    stack_kwargs: dict[str, Any]
    modality: tuple[str, ...]
    images: tuple[ImageGrid, ...]
    separator: str | None = None
    expansions: tuple[str, ...] = ()

    def stack_arguments(self, rows: int = 1) -> dict[str, Any]:
        """All that `replaying` needs for a batch of ``rows`` times this sequence.

        With these, the model called on inputs_embeds [rows, L, D] alone computes what it computes
        on the images: no family needs any argument beside them.
        """
        arguments = repeat_rows(self.stack_kwargs, rows)
        if self.position_ids is not None:
            shape = (*self.position_ids.shape[:-1], rows, self.position_ids.shape[-1])
            arguments["position_ids"] = self.position_ids.unsqueeze(-2).expand(shape)
        if self.mask is not None:
            one_row = {"attention_mask": additive_mask(self.mask, self.embeddings)}
            arguments |= repeat_rows(one_row, rows)
        return arguments


@torch.no_grad()
def capture_prompt(
    decoder: DecoderView,
    processor: Any,
    pair: PreferencePair,
    *,
    separator: str | None = None,
    blur: bool = False,
) -> CapturedPrompt:
    """Runs the model on prompt, images and the longer continuation up to its decoder stack.

    The vision tower runs; no decoder block does. The model itself merges text and images and makes
    positions, masks and features for later blocks, so they are right for every family.

    blur: with the images blurred past recognition, for a baseline.

    Raises ValueError as encode_image_pair does, and where the attention backend shows no mask.
    """
    config = unwrap(decoder.model).config
    if not hasattr(config, "image_token_id"):
        raise ValueError(f"the prompt has images, and {type(decoder.model).__name__} takes none")
    encoded = encode_image_pair(processor, pair, separator=separator)
    if blur:
        images = [blurred(image) for image in encoded.images]
        encoded = encode_image_pair(processor, pair, separator=separator, images=images)
    is_image = [token == config.image_token_id for token in encoded.pair.prompt_ids]
    places = [place for place, image in enumerate(is_image) if image]
    grids = image_grids(config, processor, encoded, places)
    arguments = _run_to_stack(decoder, _model_inputs(decoder, encoded))
    embeddings = arguments["inputs_embeds"][0]
    position_ids = arguments.get("position_ids")
    return CapturedPrompt(
        pair=encoded.pair,
        embeddings=embeddings,
        position_ids=None if position_ids is None else position_ids[..., 0, :],
        mask=_readable(arguments.get("attention_mask"), embeddings),
        stack_kwargs={
            name: value
            for name, value in arguments.items()
            if name not in _NOT_KEPT and _has_tensors(value)
        },
        modality=tuple("image" if image else "text" for image in is_image),
        images=grids,
        separator=separator,
        expansions=encoded.expansions,
    )


@contextmanager
def replaying(decoder: DecoderView, overrides: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the decoder stack gets these keyword arguments in place of what the model passes."""

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **overrides}

    hook = decoder.stack.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with _own_positions(decoder.model):
            yield
    finally:
        hook.remove()


def repeat_rows(stack_kwargs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Arguments of the stack for ``rows`` equal rows, from those for one.

    Tensors [1, ...] become [rows, ...]; those that list the tokens of all rows one after the other
    ([n image tokens, D]) become [rows * n, D].
    """
    return {name: _repeated(value, rows) for name, value in stack_kwargs.items()}


def _repeated(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(rows, *(1,) * (value.ndim - 1))
    if isinstance(value, list | tuple):
        return type(value)(_repeated(item, rows) for item in value)
    if isinstance(value, dict):
        return {name: _repeated(item, rows) for name, item in value.items()}
    return value


def _has_tensors(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) for item in items)


def _model_inputs(decoder: DecoderView, encoded: EncodedImagePair) -> dict[str, Tensor]:
    """The forward's arguments for the prompt and the longer continuation."""
    weight = next(decoder.embedding.parameters())
    ids = encoded.pair
    n_prompt = len(ids.prompt_ids)
    continuation = max(ids.chosen_ids, ids.rejected_ids, key=len)
    inputs = {"input_ids": torch.tensor([[*ids.prompt_ids, *continuation]])}
    for name, value in encoded.inputs.items():
        if name in ("mm_token_type_ids", "token_type_ids"):
            # The processor saw the prompt alone; a continuation is text, type 0.
            value = nn.functional.pad(value[:, :n_prompt], (0, len(continuation)))
        inputs[name] = value.to(weight.dtype) if value.is_floating_point() else value
    return {name: value.to(weight.device) for name, value in inputs.items()}


class _StackReached(Exception):
    """Ends the forward where the decoder stack begins."""


def _run_to_stack(decoder: DecoderView, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments that the model calls its stack with."""
    captured: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)
        raise _StackReached

    hook = decoder.stack.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with frozen(decoder.model), _own_positions(decoder.model):
            unwrap(decoder.model)(**inputs, use_cache=False)
    except _StackReached:
        pass
    finally:
        hook.remove()
    if captured.get("inputs_embeds") is None:
        raise ValueError(
            f"{type(decoder.stack).__name__}, which holds the decoder blocks, gets no "
            "inputs_embeds: this model's images cannot be attributed"
        )
    return captured


@contextmanager
def _own_positions(model: nn.Module) -> Iterator[None]:
    """Qwen's models keep the last prompts' shifts of positions: not to be seen here, nor changed.

    With embeddings for input they would add them to other rows, of which there may be fewer.
    """
    keepers: list[Any] = [m for m in model.modules() if hasattr(m, "rope_deltas")]
    before = [module.rope_deltas for module in keepers]
    for module in keepers:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, deltas in zip(keepers, before, strict=True):
            module.rope_deltas = deltas


def _readable(mask: Any, embeddings: Tensor) -> Mask:
    """The model's mask as bool [L, L]: it passes [1, 1, L, L], bool or to be added to scores."""
    if mask is None:
        return None
    length = embeddings.shape[0]
    if isinstance(mask, Mapping):
        if all(part is None for part in mask.values()):
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=embeddings.device).tril()
        parts = {name: _readable(part, embeddings) for name, part in mask.items()}
        return {name: causal if part is None else part for name, part in parts.items()}  # type: ignore[misc]
    if not isinstance(mask, Tensor) or mask.shape != (1, 1, length, length):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"this attention backend shows no mask [1, 1, {length}, {length}] (got {got}): load "
            'the model with attn_implementation="sdpa" or "eager"'
        )
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


def additive_mask(allowed: Tensor | dict[str, Tensor], like: Tensor) -> Any:
    """0 where attention is allowed, elsewhere the least value of ``like``'s dtype.

    allowed: bool [L, L] or [rows, L, L], or one for each layer type. Returns [1 or rows, 1, L, L],
    to be added to attention scores: what eager and SDPA attention both take.
    """
    if isinstance(allowed, dict):
        return {name: additive_mask(part, like) for name, part in allowed.items()}
    allowed = allowed.to(like.device)
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    mask.masked_fill_(~allowed, torch.finfo(like.dtype).min)
    return mask[:, None] if mask.ndim == 3 else mask[None, None]
