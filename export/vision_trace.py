"""What stands before the decoder of a vision-language model, as two ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from grains_ext.export.errors import ExportError
from grains_ext.export.generate import DEEPSTACK_EMBEDS, DEEPSTACK_FEATURES
from grains_ext.export.trace import evaluating, export_module
from grains_ext.export.vision_families import VisionFamily, deepstack_levels
from grains_ext.vision.encoding import encode_image_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_N_FEATURES, _BATCH, _TOKENS = "num_image_tokens", "batch_size", "sequence_length"


def export_vision(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    family: VisionFamily,
    path: Path,
    *,
    opset: int,
    external_data: bool,
) -> None:
    """Writes the graph from pixels to image features, the projector included.

    Its inputs are the processor's outputs, by their names; pixels are float32. Its output
    image_features, [image tokens, hidden], holds them in the order of the prompt's image tokens;
    with deepstack, another one, deepstack_features, those of each level, [levels, image tokens,
    hidden].

    Raises ExportError where torch.onnx.export refuses the tower.
    """
    pixels = _example_pixels(processor, family, model.device)
    with evaluating(model):
        export_module(
            _Vision(model, family, list(pixels)),
            {"pixels": pixels},
            path,
            what=f"the vision tower of this model of type '{model.config.model_type}'",
            dynamic_shapes={"pixels": {name: family.pixels[name] for name in pixels}},
            input_names=list(pixels),
            output_names=_features_of(model),
            opset=opset,
            external_data=external_data,
        )


def export_embedding(
    model: PreTrainedModel, path: Path, *, opset: int, external_data: bool
) -> None:
    """Writes the graph from input_ids and image_features to inputs_embeds [batch, tokens, hidden].

    The i-th image token of the batch, row by row, becomes the i-th feature. With deepstack, it also
    makes deepstack_embeds [levels, batch, tokens, hidden] of deepstack_features: zeros but there.
    """
    ids = torch.arange(6, device=model.device).reshape(2, 3)
    embedding = model.get_input_embeddings()
    with evaluating(model), torch.no_grad():
        features = embedding(ids[0])
        arguments = {"input_ids": ids, "image_features": features}
        axes = {"input_ids": {0: _BATCH, 1: _TOKENS}, "image_features": {0: _N_FEATURES}}
        outputs = ["inputs_embeds"]
        if (levels := deepstack_levels(model)) > 0:
            arguments[DEEPSTACK_FEATURES] = features.repeat(levels, 1, 1)
            axes[DEEPSTACK_FEATURES] = {1: _N_FEATURES}
            outputs.append(DEEPSTACK_EMBEDS)
        export_module(
            _Merging(embedding, model.config.image_token_id),
            arguments,
            path,
            what="the model's input embedding",
            dynamic_shapes=axes,
            input_names=list(arguments),
            output_names=outputs,
            opset=opset,
            external_data=external_data,
        )


class _Vision(nn.Module):
    def __init__(self, model: PreTrainedModel, family: VisionFamily, names: list[str]) -> None:
        super().__init__()
        self.model, self.training = model, False
        self._family, self._names = family, names

    def forward(self, pixels: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        values = (pixels[name] for name in self._names)
        dtype = self.model.dtype
        given = [value.to(dtype) if value.is_floating_point() else value for value in values]
        return self._family.features(self.model, *given)


class _Merging(nn.Module):
    """Embeds tokens; those of images get their features."""

    def __init__(self, embedding: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.embedding, self.training = embedding, False
        self._image_token_id = image_token_id

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        deepstack_features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        number = (input_ids == self._image_token_id).flatten().long().cumsum(0)
        number = number.reshape(input_ids.shape)
        # A model may write an image token itself: no feature is meant for that one.
        filled = (input_ids == self._image_token_id) & (number <= image_features.shape[0])
        number = torch.where(filled, number, 0)
        # In some families the image token's id lies outside the vocabulary.
        embeddings = self.embedding(torch.where(filled, 0, input_ids))
        merged = torch.where(filled[..., None], _behind_zeros(image_features)[number], embeddings)
        if deepstack_features is None:
            return merged
        return merged, _behind_zeros(deepstack_features)[:, number]


def _behind_zeros(features: Tensor) -> Tensor:
    """With a row of zeros in front, for the other tokens: there may be no feature at all."""
    return nn.functional.pad(features, (0, 0, 1, 0))


def _features_of(model: PreTrainedModel) -> list[str]:
    return ["image_features"] + [DEEPSTACK_FEATURES] * (deepstack_levels(model) > 0)


def _example_pixels(
    processor: Any, family: VisionFamily, device: torch.device
) -> dict[str, Tensor]:
    """What the processor makes of two pictures of unlike shape: no size that varies is 0 or 1."""
    pictures = [np.zeros((*sides, 3), np.uint8) for sides in ((160, 240), (240, 160))]
    _, inputs = encode_image_prompt(processor, 2 * processor.image_token, pictures)
    lacking = [name for name in family.pixels if name not in inputs]
    if lacking:
        raise ExportError(
            f"{type(processor).__name__} gives no {', '.join(lacking)}, which this family's vision "
            f"tower takes; it gives {', '.join(inputs)}"
        )
    return {name: inputs[name].to(device) for name in family.pixels}
