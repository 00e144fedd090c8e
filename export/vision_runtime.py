"""Images as an exported decoder takes them: pixels through vision.onnx, and positions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grains_ext.export.folder import CONFIG_NAME, VISION_NAME
from grains_ext.export.generate import DEEPSTACK_FEATURES, Feeds, PromptImages
from grains_ext.export.runtime import Provider, session

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

GRID = "image_grid_thw"
"""The processor's output that Qwen's positions are counted from."""

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Prompt:
    """Token ids, image tokens expanded, and what the processor made of the images, by name."""

    ids: Sequence[int]
    pixels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, int64 [rows, tokens], 0 in the mask for padding."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    images: PromptImages | None


class ImageReader:
    """Makes of prompts with images what `OnnxDecoder` takes.

        prompt = Prompt(*grains_ext.vision.encode_image_prompt(processor, text, images))
        batch = ImageReader("steered/").batch([prompt])
        decoder.generate(batch.input_ids, batch.attention_mask, images=batch.images, ...)

    folder: of `export_model`, of a vision-language model. session_options, providers: as for
    `grains_ext.export.session`; no graph here is steered, so that no op library is needed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        session_options: SessionOptions | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        folder = Path(folder)
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        token = image_token_id(config)
        if token is None:
            raise ValueError(
                f"'{folder / CONFIG_NAME}' names no image token: expected a folder that "
                "export_model wrote of a vision-language model"
            )
        self.image_token_id = token
        self._merge_size = config.get("vision_config", {}).get("spatial_merge_size", 1)
        self._vision = session(
            folder / VISION_NAME,
            library=False,
            session_options=session_options,
            providers=providers,
        )

    def batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """The prompts as one batch. Raises ValueError where a prompt's image tokens are another
        number than its images have features, none where it has no images, and for no prompts."""
        if not prompts:
            raise ValueError("a batch of 0 prompts; expected at least one")
        for prompt in prompts:
            # The next prompt's features would fill its places.
            if not prompt.pixels and self.image_token_id in prompt.ids:
                raise ValueError("a prompt has a place for an image, and no image is given with it")
        width = max(len(prompt.ids) for prompt in prompts)
        ids = np.zeros((len(prompts), width), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt.ids)
            ids[row, start:], mask[row, start:] = prompt.ids, 1
        features = [self._features(prompt) for prompt in prompts if prompt.pixels]
        if not features:
            return PromptBatch(ids, mask, None)
        is_image = (ids == self.image_token_id) & (mask == 1)
        # Image tokens are on the last axis but one, of whatever rank.
        joined = {
            name: np.concatenate([found[name] for found in features], axis=-2)
            for name in features[0]
        }
        images = PromptImages(
            joined["image_features"], is_image, deepstack=joined.get(DEEPSTACK_FEATURES)
        )
        if any(GRID in prompt.pixels for prompt in prompts):
            positions = np.zeros((3, *ids.shape), np.int64)
            for row, prompt in enumerate(prompts):
                positions[:, row, width - len(prompt.ids) :] = grid_positions(
                    prompt.ids, self.image_token_id, prompt.pixels.get(GRID, ()), self._merge_size
                )
            images = replace(images, position_ids=positions)
        return PromptBatch(ids, mask, images)

    def _features(self, prompt: Prompt) -> Feeds:
        features = self.features(prompt.pixels)
        n_tokens = sum(token == self.image_token_id for token in prompt.ids)
        n_features = len(features["image_features"])
        if n_tokens != n_features:
            raise ValueError(
                f"a prompt has {n_tokens} image tokens, and its images have {n_features} "
                "features: it was not made for these images"
            )
        return features

    def features(self, pixels: Mapping[str, Any]) -> Feeds:
        """vision.onnx's outputs by name, from what the processor made of a prompt's images.

        image_features [image tokens, hidden]; with deepstack, deepstack_features [levels, image
        tokens, hidden] too.
        """
        feeds: Feeds = {
            value.name: np.asarray(pixels[value.name]).astype(_NUMPY_TYPES[value.type], copy=False)
            for value in self._vision.get_inputs()
        }
        names = [value.name for value in self._vision.get_outputs()]
        return dict(zip(names, self._vision.run(names, feeds), strict=True))


def image_token_id(config: Mapping[str, Any]) -> int | None:
    """Of a model's config.json; None for a model of text. Some families call it an index."""
    token: int | None = config.get("image_token_id", config.get("image_token_index"))
    return token


def grid_positions(
    ids: Sequence[int], image_token_id: int, grid: Any, merge_size: int
) -> NDArray[np.int64]:
    """Positions in time, height and width, int64 [3, tokens], as Qwen's models count them.

    Text counts on all three; an image's tokens share their time, and what follows goes on from the
    image's longer side.

    grid: frames, rows and columns of each image's patches; merge_size: patches on a token's side.
    """
    images = iter(np.asarray(grid).tolist())
    parts, start = [], 0
    for is_image, run in groupby(token == image_token_id for token in ids):
        length = len(list(run))
        while is_image and length > 0:
            frames, rows, columns = next(images)
            size = (frames, rows // merge_size, columns // merge_size)
            parts.append(start + np.indices(size).reshape(3, -1))
            start += max(size[1:])
            length -= int(np.prod(size))
        if length > 0:
            parts.append(start + np.broadcast_to(np.arange(length), (3, length)))
            start += length
    return np.concatenate(parts, axis=1)
