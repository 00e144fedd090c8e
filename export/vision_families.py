"""What the exported graphs of vision-language models differ in, from one family to another.

A family's rule makes image features of what its processor gives, with the model's own modules and
in operations that a graph can hold: no Python loop over images, no length read as a number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grains_ext.export.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Axes = dict[int, str]
_IMAGES: Axes = {0: "num_images"}


@dataclass(frozen=True)
class VisionFamily:
    """One family.

    features: (model, *pixels) -> image features [image tokens, hidden], in the order of the image
        tokens of one prompt; with deepstack, also what decoder blocks get of them, [levels, image
        tokens, hidden].
    pixels: the processor's outputs that it takes, each with its dynamic axes.
    position_axes: how many position ids a token has, where it is more than one.
    bidirectional: image tokens attend to later ones of their image, so that the decoder must be
        told which tokens are an image's (token_type_ids).
    genai_type: the model type under which onnxruntime-genai runs the three graphs as they are: one
        that feeds a vision graph what it names, and counts positions as this family does.
    not_in_genai: why there is no such type, to be read after "models of type ...".
    """

    features: Callable[..., Tensor | tuple[Tensor, Tensor]]
    pixels: Mapping[str, Axes] = field(default_factory=lambda: {"pixel_values": _IMAGES})
    position_axes: int | None = None
    bidirectional: bool = False
    genai_type: str = "phi3v"
    not_in_genai: str | None = None


def deepstack_levels(model: PreTrainedModel) -> int:
    """How many of the first decoder blocks have image features added to their outputs.

    DeepStack (arXiv:2406.04334): features of the tower's earlier blocks, one level for each decoder
    block, at image tokens. What steers a block's output acts before they are added.
    """
    vision = model.config.vision_config
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def family_of(model: PreTrainedModel) -> VisionFamily | None:
    """The family of a model that reads images; None for a model of text.

    Raises ExportError for a family that is not known here.
    """
    if getattr(model.config, "vision_config", None) is None:
        return None
    name, tower = model.config.model_type, model.config.vision_config.model_type
    # A LLaVA with Pixtral's tower reads pictures in their own sizes.
    family = FAMILIES.get("pixtral" if (name, tower) == ("llava", "pixtral") else name)
    if family is None:
        raise ExportError(
            f"models of type '{name}' with a vision tower of type '{tower}' read images in a way "
            f"that is not known here; known are {', '.join(FAMILIES)}. Export its parts with "
            "transformers.exporters.OnnxExporter().export_for_generation and steer them with "
            "inject()"
        )
    return family


# --- features -------------------------------------------------------------------------------------


def _as_the_model_does(model: Any, *pixels: Tensor, names: tuple[str, ...]) -> Tensor:
    features = model.model.get_image_features(**dict(zip(names, pixels, strict=True)))
    return _joined(features.pooler_output)


def _joined(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    if not isinstance(features, Tensor):
        features = torch.cat(list(features))
    return features.reshape(-1, features.shape[-1])


def _projected(model: Any, pixel_values: Tensor) -> Tensor:
    """LLaVA's features of each view, [views, patches, hidden]; the model goes on with a loop."""
    base = model.model
    states = base.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    # "default" leaves out the class token.
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    features: Tensor = base.multi_modal_projector(_chosen(model, states)[:, first:])
    return features


def _chosen(model: Any, states: Sequence[Tensor]) -> Tensor:
    """What LLaVA's projector reads of the tower's hidden states: those of some layers, joined."""
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    return torch.cat([states[n] for n in layers], dim=-1)


def _llava(model: Any, pixel_values: Tensor) -> Tensor:
    return _joined(_projected(model, pixel_values))


def _llava_next(model: Any, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
    """The whole image, then its tiles as one picture less its padding, each line with its end.

    LlavaNextModel.pack_image_features, for all images at once.
    """
    config = model.config
    tower = config.vision_config
    n_images, n_tiles = pixel_values.shape[:2]
    tiles = _projected(model, pixel_values.flatten(0, 1))
    side = tower.image_size // tower.patch_size
    n_patches, hidden = tiles.shape[1:]
    if n_patches != side**2 or getattr(model.model, "image_newline", None) is None:
        raise ExportError(
            f"this model makes {n_patches} features of a tile of {side} x {side} patches, or has "
            "no feature for line ends: such a variant of llava_next is not known here"
        )
    newline = model.model.image_newline.to(tiles)[None]
    source = torch.cat([tiles.reshape(-1, hidden), newline])

    resolutions = torch.tensor(config.image_grid_pinpoints, device=tiles.device)
    chosen = resolutions[_best_resolution(image_sizes, resolutions)]
    tile_rows, tile_columns = (chosen // tower.image_size).unbind(1)
    rows, columns = tile_rows * side, tile_columns * side
    top, left = _margins(image_sizes, rows, columns)

    most_rows, most_columns = (
        max(sides) // tower.image_size * side
        for sides in zip(*config.image_grid_pinpoints, strict=True)
    )
    row = torch.arange(most_rows, device=tiles.device)[None, :, None]
    column = torch.arange(most_columns + 1, device=tiles.device)[None, None, :]
    ends_line = column == most_columns
    first = torch.arange(n_images, device=tiles.device)[:, None, None] * (n_tiles * n_patches)
    tile = 1 + row // side * _spread(tile_columns) + column // side
    patch = first + tile * n_patches + row % side * side + column % side
    patch = torch.where(ends_line, source.shape[0] - 1, patch)
    in_rows = (row >= _spread(top)) & (row < _spread(rows - top))
    in_columns = (column >= _spread(left)) & (column < _spread(columns - left))
    kept = in_rows & (in_columns | ends_line)

    whole = first[:, :, 0] + torch.arange(n_patches, device=tiles.device)
    places = torch.cat([whole, patch.flatten(1)], dim=1)
    kept = torch.cat([torch.ones_like(whole, dtype=torch.bool), kept.flatten(1)], dim=1)
    return source[places[kept]]


def _spread(per_image: Tensor) -> Tensor:
    return per_image[:, None, None]


def _best_resolution(image_sizes: Tensor, resolutions: Tensor) -> Tensor:
    """transformers' select_best_resolution: most of the image kept, then least of it wasted."""
    height, width = (size.double()[:, None] for size in image_sizes.unbind(1))
    in_height, in_width = (size.double()[None] for size in resolutions.unbind(1))
    scale = torch.minimum(in_width / width, in_height / height)
    scaled = (width * scale).long() * (height * scale).long()
    kept = torch.minimum(scaled, (height * width).long())
    wasted = resolutions.prod(1)[None] - kept
    return (kept * 2**30 - wasted).argmax(1)


def _margins(image_sizes: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns at either edge that hold padding: transformers' unpad_image."""
    height, width = (size.double() for size in image_sizes.unbind(1))
    is_wide = width / height > columns.double() / rows.double()
    scaled_height = _whole(height * (columns.double() / width))
    scaled_width = _whole(width * (rows.double() / height))
    zero = torch.zeros_like(rows)
    top = torch.where(is_wide, (rows - scaled_height) // 2, zero)
    left = torch.where(is_wide, zero, (columns - scaled_width) // 2)
    return top, left


def _whole(number: Tensor) -> Tensor:
    """int(round(number, 7))"""
    return (torch.round(number * 1e7) / 1e7).long()


# --- Qwen -----------------------------------------------------------------------------------------


def _qwen(
    model: Any, pixel_values: Tensor, image_grid_thw: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Patches of all images in one sequence, each attending to those of its image."""
    visual = model.model.visual
    merge = visual.spatial_merge_size
    place = _patch_places(image_grid_thw, pixel_values.shape[0], merge)
    arguments: dict[str, Any] = {
        "position_ids": torch.stack([place.row, place.column], dim=-1),
        "cu_seqlens": place.frame,
    }
    if hasattr(visual, "window_size"):
        side = visual.window_size // merge // visual.patch_size
        arguments |= _windows(place, merge, side)
    if hasattr(visual, "num_grid_per_side"):
        arguments |= _interpolation(place, visual.num_grid_per_side)
    with _attention_by_segment(visual):
        output = visual(pixel_values, grid_thw=image_grid_thw, **arguments)
    features: Tensor = output.pooler_output
    if deepstack_levels(model) == 0:
        return features
    return features, torch.stack(output.deepstack_features)


@dataclass(frozen=True)
class _PatchPlaces:
    """Where each patch stands, int64 [patches].

    image: the number of its image, which has n_rows and n_columns of patches. frame: the number of
    its frame's first patch.
    """

    image: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    n_rows: Tensor
    n_columns: Tensor


def _patch_places(grid: Tensor, n_patches: int, merge: int) -> _PatchPlaces:
    """Patches come image by image, in squares of merge x merge that the merger joins.

    grid: frames, rows and columns of each image, [images, 3].
    """
    sizes = grid.prod(1)
    ends = sizes.cumsum(0)
    number = torch.arange(n_patches, device=grid.device)
    image = (number[:, None] >= ends[None]).sum(1)
    start = (ends - sizes)[image]
    n_rows, n_columns = grid[image, 1], grid[image, 2]
    per_frame = n_rows * n_columns
    within = (number - start) % per_frame
    square, inner = within // merge**2, within % merge**2
    squares_in_row = n_columns // merge
    return _PatchPlaces(
        image=image,
        frame=number - within,
        row=square // squares_in_row * merge + inner // merge,
        column=square % squares_in_row * merge + inner % merge,
        n_rows=n_rows,
        n_columns=n_columns,
    )


_WINDOWS_IN_ROW = 2**10
"""More than an image has windows, or squares, in a row: numbers of two axes become one number."""


def _windows(place: _PatchPlaces, merge: int, side: int) -> dict[str, Tensor]:
    """The order of squares that makes windows contiguous, and each patch's window.

    transformers' get_vision_window_index. side: squares on a window's side.
    """
    frame, row, column = (
        axis[:: merge**2] // unit
        for axis, unit in ((place.frame, 1), (place.row, merge), (place.column, merge))
    )
    window = (frame * _WINDOWS_IN_ROW + row // side) * _WINDOWS_IN_ROW + column // side
    order = ((window * _WINDOWS_IN_ROW + row) * _WINDOWS_IN_ROW + column).argsort()
    of_patch = window[order][:, None].expand(-1, merge**2).reshape(-1)
    return {"window_index": order, "cu_window_seqlens": of_patch}


def _interpolation(place: _PatchPlaces, side: int) -> dict[str, Tensor]:
    """The learned positions around each patch, and their weights, [patches, 4] both.

    transformers' get_vision_interpolation_indices_and_weights, bilinear, corners aligned. side: of
    the square of learned positions.
    """
    rows, row_weights = _neighbours(place.row, place.n_rows, side)
    columns, column_weights = _neighbours(place.column, place.n_columns, side)
    return {
        "interp_indices": (rows[:, :, None] * side + columns[:, None]).flatten(1),
        "interp_weights": (row_weights[:, :, None] * column_weights[:, None]).flatten(1),
    }


def _neighbours(place: Tensor, n_places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two learned positions next to each place on an axis, and their weights, [patches, 2]."""
    exact = place.float() * (side - 1) / (n_places - 1).clamp(min=1)
    low = exact.floor()
    offsets = torch.arange(2, device=place.device)
    weights = (1 - (exact[:, None] - low[:, None] - offsets).abs()).clamp(min=0)
    return (low.long()[:, None] + offsets).clamp(max=side - 1), weights


@contextmanager
def _attention_by_segment(visual: nn.Module) -> Iterator[None]:
    """Inside, the tower's attentions take a segment for each patch for `cu_seqlens`.

    The model splits the sequence at cumulative lengths, as many times as there are segments; a
    graph holds a mask.
    """
    attentions = [block.attn for block in visual.blocks]  # type: ignore[union-attr]
    # Hooks that others put in the place of a forward, as accelerate does, come back afterwards.
    replaced = [vars(attention).get("forward") for attention in attentions]
    for attention in attentions:
        attention.forward = partial(_segment_attention, attention)
    try:
        yield
    finally:
        for attention, before in zip(attentions, replaced, strict=True):
            del attention.forward
            if before is not None:
                attention.forward = before


def _segment_attention(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    n_patches = hidden_states.shape[0]
    rotated = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    query, key, value = (
        attention.qkv(hidden_states).reshape(n_patches, 3, attention.num_heads, -1).unbind(1)
    )
    query, key = rotated(query, key, *position_embeddings)
    attended = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=(cu_seqlens[:, None] == cu_seqlens[None])[None, None],
        scale=attention.scaling,
    )
    output: Tensor = attention.proj(attended[0].transpose(0, 1).reshape(n_patches, -1))
    return output


# --- Pixtral --------------------------------------------------------------------------------------


def _pixtral(model: Any, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
    """LLaVA's projector on Pixtral's tower."""
    if model.config.vision_feature_select_strategy != "full":
        raise ExportError(
            "Pixtral's tower has no class token: vision_feature_select_strategy is "
            f"'{model.config.vision_feature_select_strategy}', expected 'full'"
        )
    states = _pixtral_states(model.model.vision_tower, pixel_values, image_sizes, merge=1)
    features: Tensor = model.model.multi_modal_projector(_chosen(model, states))
    return features[0]


def _mistral3(model: Any, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
    """Squares of merge x merge patches become one feature: Mistral3PatchMerger without its loop."""
    projector, merge = model.model.multi_modal_projector, model.config.spatial_merge_size
    states = _pixtral_states(model.model.vision_tower, pixel_values, image_sizes, merge)
    normed = projector.norm(_chosen(model, states)[0])
    # Its rows hold all patches' values of one channel, then those of the next.
    squares = normed.reshape(-1, merge**2, normed.shape[-1]).transpose(1, 2).flatten(1)
    merged = projector.patch_merger.merging_layer(squares)
    features: Tensor = projector.linear_2(projector.act(projector.linear_1(merged)))
    return features


def _pixtral_states(
    tower: Any, pixel_values: Tensor, image_sizes: Tensor, merge: int
) -> list[Tensor]:
    """The hidden states [1, patches, hidden] before and after each layer of Pixtral's tower.

    PixtralVisionModel.forward, in which the patches of all images are one sequence and attend to
    those of their own image. They come here in squares of merge x merge.

    pixel_values: padded at the right and below to the largest image. image_sizes: [images, 2].
    """
    sizes = image_sizes // tower.patch_size
    # While tracing this is a symbol, which int() refuses; transformers asks whether it is above 1.
    n_patches: Any = sizes.prod(1).sum().item()
    torch._check(n_patches > 1)
    place = _patch_places(nn.functional.pad(sizes, (1, 0), value=1), n_patches, merge)
    embeds = tower.patch_conv(pixel_values).permute(0, 2, 3, 1)
    hidden = tower.ln_pre(embeds[place.image, place.row, place.column])[None]
    positions = torch.stack([place.row, place.column], dim=-1)
    rotations = tower.patch_positional_embedding(hidden, positions)
    apart = (place.image[:, None] != place.image[None])[None, None]
    mask = hidden.new_zeros(1).masked_fill(apart, torch.finfo(hidden.dtype).min)
    states = [hidden]
    for layer in tower.transformer.layers:
        states.append(layer(states[-1], mask, position_embeddings=rotations))
    return states


# --- the families ---------------------------------------------------------------------------------


def _own(*names: str) -> Callable[..., Tensor]:
    return partial(_as_the_model_does, names=names)


_QWEN = VisionFamily(
    _qwen,
    {"pixel_values": {0: "num_patches"}, "image_grid_thw": _IMAGES},
    position_axes=3,
    genai_type="qwen2_5_vl",
)
_VIEWS: Axes = {1: "num_views"}
_IDEFICS = VisionFamily(
    _own("pixel_values", "pixel_attention_mask"),
    {"pixel_values": _VIEWS, "pixel_attention_mask": _VIEWS},
)
_PADDED: dict[str, Axes] = {
    "pixel_values": {0: "num_images", 2: "height", 3: "width"},
    "image_sizes": _IMAGES,
}
FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(_llava),
    "llava_next": VisionFamily(
        _llava_next,
        {"pixel_values": {0: "num_images", 1: "num_views"}, "image_sizes": _IMAGES},
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(
        _QWEN,
        not_in_genai="add features of images to the outputs of decoder blocks, and "
        "onnxruntime-genai does not pass them on",
    ),
    "gemma3": VisionFamily(
        _own("pixel_values"),
        bidirectional=True,
        not_in_genai="have image tokens that attend to later ones, and onnxruntime-genai does not "
        "tell the decoder which those are",
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": VisionFamily(_own("pixel_values")),
    "pixtral": VisionFamily(_pixtral, _PADDED),
    "mistral3": VisionFamily(_mistral3, _PADDED),
}
