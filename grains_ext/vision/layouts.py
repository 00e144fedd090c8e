"""How each family lays an image out as tokens: one rule per family, from its own processor's facts.

A rule gives the boxes of one image's tokens in their order, float32 [n, 4] (x0 y0 x1 y1 as shares
of the image); all zeros where a token stands for no pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grains_ext.vision.encoding import EncodedImagePair
from grains_ext.vision.grid import ImageGrid

Boxes = npt.NDArray[np.float32]
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class _Image:
    """One image, as the rules read it."""

    config: Any
    processor: Any
    encoded: EncodedImagePair
    index: int
    n_tokens: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.encoded.images[self.index].size


def image_grids(
    config: Any, processor: Any, encoded: EncodedImagePair, positions: Sequence[int]
) -> tuple[ImageGrid, ...]:
    """The grid of each image of a prompt.

    config: the model's; positions: places of all image tokens among the prompt's, rising.

    Raises ValueError for a family that has no rule, or whose tokens the rule does not account for.
    """
    rule = _RULES.get(config.model_type)
    if rule is None:
        raise ValueError(
            f"image tokens of model type {config.model_type!r} cannot be placed on their image; "
            f"supported: {', '.join(_RULES)}"
        )
    image_token = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
    counts = [expansion.count(image_token) for expansion in encoded.expansions]
    if sum(counts) != len(positions):
        raise ValueError(
            f"the processor wrote {sum(counts)} image tokens ({image_token}), the prompt has "
            f"{len(positions)} of id {config.image_token_id}: processor and model do not belong "
            "together"
        )
    grids, start = [], 0
    for index, count in enumerate(counts):
        image = _Image(config, processor, encoded, index, count)
        boxes = rule(image)
        if len(boxes) != count:
            raise ValueError(
                f"image {index} has {count} tokens, and {len(boxes)} by the layout of "
                f"{config.model_type}: processor and model do not belong together, or the model "
                "has a vision tower that this family does not usually have"
            )
        places = tuple(positions[start : start + count])
        grids.append(ImageGrid(places, boxes, image.size))
        start += count
    return tuple(grids)


# --- boxes ----------------------------------------------------------------------------------------


def _cells(columns: int, rows: int, view: tuple[float, float, float, float] = WHOLE) -> Boxes:
    """Equal cells of a view, row by row, cut off at the image's edges."""
    x0, y0, x1, y1 = view
    x = x0 + (x1 - x0) * np.arange(columns + 1) / columns
    y = y0 + (y1 - y0) * np.arange(rows + 1) / rows
    boxes = np.stack(
        [
            np.tile(x[:-1], rows),
            np.repeat(y[:-1], columns),
            np.tile(x[1:], rows),
            np.repeat(y[1:], columns),
        ],
        axis=1,
    )
    return _cut(boxes)


def _cut(boxes: np.ndarray) -> Boxes:
    cut: Boxes = np.clip(boxes, 0.0, 1.0).astype(np.float32)
    cut[(cut[:, 2] <= cut[:, 0]) | (cut[:, 3] <= cut[:, 1])] = 0.0
    return cut


def _tiles(columns: int, rows: int, side: int) -> list[Boxes]:
    """Tiles row by row, each of side x side cells."""
    return [_cells(side, side, tuple(tile)) for tile in _cells(columns, rows).tolist()]


def _side(n_cells: int) -> int:
    side = math.isqrt(n_cells)
    if side * side != n_cells:
        raise ValueError(f"{n_cells} image tokens are no square")
    return side


_NO_BOX: Boxes = np.zeros((1, 4), dtype=np.float32)


# --- rules ----------------------------------------------------------------------------------------


def _llava(image: _Image) -> Boxes:
    """Patches of the square that resizing and centre crop leave."""
    height, width = image.encoded.inputs["pixel_values"].shape[-2:]
    patch = image.config.vision_config.patch_size
    columns, rows = width // patch, height // patch
    x0, y0, x1, y1 = _crop_view(image)
    # A tower reads whole patches only, from the left and the top.
    x1 = x0 + (x1 - x0) * columns * patch / width
    y1 = y0 + (y1 - y0) * rows * patch / height
    patches = _cells(columns, rows, (x0, y0, x1, y1))
    keeps_class_token = image.config.vision_feature_select_strategy == "full" and (
        image.n_tokens == len(patches) + 1
    )
    return np.concatenate([_NO_BOX, patches]) if keeps_class_token else patches


def _crop_view(image: _Image) -> tuple[float, float, float, float]:
    """What the tower sees: shares of the image, beyond [0, 1] where it is padded."""
    options = image.processor.image_processor
    width, height = image.size
    # Of the padded picture; then of the resized one.
    canvas = [width, height]
    if getattr(options, "do_pad", False):
        canvas = [max(canvas)] * 2
    resized = list(canvas)
    if options.do_resize:
        if options.size.shortest_edge:
            shortest = options.size.shortest_edge
            resized = [int(shortest * side / min(canvas)) for side in canvas]
        else:
            resized = [options.size.width, options.size.height]
    seen = resized
    if getattr(options, "do_center_crop", False):
        seen = [options.crop_size.width, options.crop_size.height]
    view = []
    for original, side, scaled, crop in zip((width, height), canvas, resized, seen, strict=True):
        margin = (side - original) // 2
        start = (scaled - crop) // 2
        ends = (start / scaled, (start + crop) / scaled)
        view.append([(end * side - margin) / original for end in ends])
    (x0, x1), (y0, y1) = view
    return x0, y0, x1, y1


def _llava_next(image: _Image) -> Boxes:
    """The whole image in patches, then the tiles' patches as one grid with a token at line ends."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    width, height = image.size
    tower = image.config.vision_config
    side = tower.image_size // tower.patch_size
    best_height, best_width = select_best_resolution(
        (height, width), image.config.image_grid_pinpoints
    )
    # The picture keeps its shape on the tiles' canvas, between margins.
    scale = min(best_width / width, best_height / height)
    scaled_width = min(math.ceil(width * scale), best_width)
    scaled_height = min(math.ceil(height * scale), best_height)
    left, top = (best_width - scaled_width) // 2, (best_height - scaled_height) // 2
    view = (
        -left / scaled_width,
        -top / scaled_height,
        (best_width - left) / scaled_width,
        (best_height - top) / scaled_height,
    )
    columns = side * (best_width // tower.image_size)
    rows = side * (best_height // tower.image_size)
    patches = _cells(columns, rows, view)
    # The model itself says which lines of patches it leaves out.
    numbers = torch.arange(rows * columns).view(1, rows, columns)
    kept = unpad_image(numbers, (height, width))[0].tolist()
    lines = [boxes for line in kept for boxes in (patches[line], _NO_BOX)]
    return np.concatenate([_cells(side, side), *lines])


def _qwen(image: _Image) -> Boxes:
    """Merged patches of the image, stretched to a multiple of their size."""
    _, rows, columns = image.encoded.inputs["image_grid_thw"][image.index].tolist()
    merge = image.config.vision_config.spatial_merge_size
    return _cells(columns // merge, rows // merge)


def _gemma3(image: _Image) -> Boxes:
    """Pooled patches of the whole image, then of the crops along its longer side, if any."""
    per_view = image.config.mm_tokens_per_image
    side = _side(per_view)
    n_crops = image.n_tokens // per_view - 1
    width, height = image.size
    longer = max(width, height)
    length = math.ceil(longer / n_crops) / longer if n_crops > 0 else 0.0
    views = [WHOLE]
    for crop in range(n_crops):
        start, end = crop * length, min(1.0, (crop + 1) * length)
        views.append((start, 0.0, end, 1.0) if width >= height else (0.0, start, 1.0, end))
    return np.concatenate([_cells(side, side, view) for view in views])


def _idefics(image: _Image) -> Boxes:
    """Tiles, named by row and column in the text, then the whole image; each pixel-shuffled."""
    names = re.findall(r"<row_(\d+)_col_(\d+)>", image.encoded.expansions[image.index])
    rows = max((int(row) for row, _ in names), default=0)
    columns = max((int(column) for _, column in names), default=0)
    side = _side(image.n_tokens // (rows * columns + 1))
    tiles = _tiles(columns, rows, side) if names else []
    return np.concatenate([*tiles, _cells(side, side)])


def _internvl(image: _Image) -> Boxes:
    """Tiles, then the whole image where there is more than one tile; each pixel-shuffled."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    side = _side(image.processor.image_seq_length)
    n_views = image.n_tokens // side**2
    whole = _cells(side, side)
    if n_views == 1:
        return whole
    options = image.processor.image_processor
    width, height = image.size
    columns, rows = get_optimal_tiled_canvas(
        (height, width),
        (options.size.height, options.size.width),
        options.min_patches,
        options.max_patches,
    )
    return np.concatenate([*_tiles(columns, rows, side), whole])


_RULES: dict[str, Callable[[_Image], Boxes]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "gemma3": _gemma3,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "internvl": _internvl,
}
