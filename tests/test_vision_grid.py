import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from grains_ext.vision import ImageGrid, capture_prompt
from tests.vision_models import VISION_FAMILIES, tiny_vlm

# Width and height at which a family's processor resamples nothing but whole-image views, and how
# often it reads the whole picture.
SIZES = {
    "llava": ((16, 16), 1),
    "llava_next": ((32, 24), 2),
    "qwen2_vl": ((40, 24), 1),
    "qwen2_5_vl": ((40, 24), 1),
    "qwen3_vl": ((40, 24), 1),
    "gemma3": ((16, 16), 1),
    "idefics3": ((32, 32), 2),
    "smolvlm": ((32, 32), 2),
    "internvl": ((48, 32), 2),
}


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pair_of(processor, *images: object) -> PreferencePair:
    places = f" and {processor.image_token}" * len(images)
    return PreferencePair(f"the{places} sky is", "blue", "red rose", images=images)


def areas(grid: ImageGrid) -> np.ndarray:
    x0, y0, x1, y1 = grid.boxes.T
    return (x1 - x0) * (y1 - y0)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_boxes_tile_the_image(family: str) -> None:
    (width, height), n_views = SIZES[family]
    model, processor = tiny_vlm(family)
    captured = capture_prompt(
        DecoderView.of(model),
        processor,
        pair_of(processor, noise(width, height), noise(height, width)),
    )
    places = [place for grid in captured.images for place in grid.token_positions]
    assert places == [i for i, kind in enumerate(captured.modality) if kind == "image"]
    first, turned = captured.images
    assert (first.size, turned.size) == ((width, height), (height, width))
    assert areas(first).sum() == pytest.approx(n_views)
    # Every pixel is covered once in each view: equal scores per area give an even map.
    for grid in captured.images:
        covered = grid.heatmap(areas(grid))
        np.testing.assert_allclose(covered, n_views / covered.size, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "width", "height"),
    [
        *((family, *size) for family, (size, _) in SIZES.items()),
        ("llava", 24, 16),  # cropped at the sides
        ("llava_next", 12, 48),  # with margins that are no multiple of a patch
        ("idefics3", 32, 16),
    ],
)
def test_tokens_see_their_boxes(family: str, width: int, height: int) -> None:
    """With the tower's attention cut off, a token changes exactly where its own pixels do."""
    model, processor = tiny_vlm(family)
    for name, module in model.named_modules():
        is_text = "language_model" in name or "text_model" in name
        if name.endswith(("out_proj", "attn.proj", "projection_layer")) and not is_text:
            torch.nn.init.zeros_(module.weight)
    view = DecoderView.of(model)
    pixels = noise(width, height)
    before = capture_prompt(view, processor, pair_of(processor, pixels))
    [grid] = before.images
    with_pixels = np.flatnonzero(areas(grid))
    for token in (*with_pixels[:3], *with_pixels[len(with_pixels) // 2 :: 5]):
        x0, y0, x1, y1 = np.round(grid.boxes[token] * [width, height, width, height]).astype(int)
        painted = pixels.copy()
        painted[y0:y1, x0:x1] = 255 - painted[y0:y1, x0:x1]
        after = capture_prompt(view, processor, pair_of(processor, painted))
        moved = (
            (after.embeddings - before.embeddings).norm(dim=-1)[list(grid.token_positions)].numpy()
        )
        overlap = overlaps(grid, x0 / width, y0 / height, x1 / width, y1 / height)
        assert moved[token] > 0.1
        assert moved[overlap > 0.5].min() > 0.01
        # Resampling a view spreads a change a little beyond the painted pixels.
        margin = 0.15 if overlap.sum() > 1.5 else 0.0
        near = overlaps(
            grid,
            x0 / width - margin,
            y0 / height - margin,
            x1 / width + margin,
            y1 / height + margin,
        )
        assert moved[near == 0].max(initial=0) < 1e-5


def overlaps(grid: ImageGrid, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Which share of the area, or of the token's box where that is smaller, the two share."""
    left, top, right, bottom = grid.boxes.T
    across = np.clip(np.minimum(right, x1) - np.maximum(left, x0), 0, None)
    down = np.clip(np.minimum(bottom, y1) - np.maximum(top, y0), 0, None)
    smaller = np.minimum(areas(grid), (x1 - x0) * (y1 - y0))
    return np.divide(across * down, smaller, out=np.zeros_like(smaller), where=smaller > 0)


def test_centre_crop_leaves_the_sides_without_tokens() -> None:
    model, processor = tiny_vlm("llava")
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(32, 16)))
    [grid] = captured.images
    shown = grid.heatmap(areas(grid))
    np.testing.assert_allclose(shown[:, :8], 0)
    np.testing.assert_allclose(shown[:, 24:], 0)
    np.testing.assert_allclose(shown[:, 8:24], 1 / shown.size, rtol=1e-5)


def test_padding_has_no_box() -> None:
    model, processor = tiny_vlm("llava")
    processor.image_processor = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(16, 8)))
    [grid] = captured.images
    assert np.flatnonzero(areas(grid)).tolist() == list(range(4, 12))
    np.testing.assert_allclose(grid.boxes[4:6], [[0, 0, 0.25, 0.5], [0.25, 0, 0.5, 0.5]])


def test_line_ends_have_no_box() -> None:
    model, processor = tiny_vlm("llava_next")
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(32, 24)))
    [grid] = captured.images
    empty = np.flatnonzero(areas(grid) == 0)
    # 4 x 4 patches of the whole; 6 lines of 8 patches, the picture's height without its margins.
    assert empty.tolist() == [16 + 9 * line + 8 for line in range(6)]
    newline = model.model.image_newline
    for token in empty:
        place = grid.token_positions[token]
        torch.testing.assert_close(captured.embeddings[place], newline.detach())


def test_pan_and_scan_crops() -> None:
    model, processor = tiny_vlm("gemma3")
    processor.image_processor.do_pan_and_scan = True
    processor.images_kwargs = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    view = DecoderView.of(model)
    for width, height in ((48, 16), (16, 48)):
        captured = capture_prompt(view, processor, pair_of(processor, noise(width, height)))
        [grid] = captured.images
        assert len(grid.boxes) == 4 * 4
        assert areas(grid).sum() == pytest.approx(2)
        sides = grid.boxes[:, 2:] - grid.boxes[:, :2]
        expected = (1 / 6, 1 / 2) if width > height else (1 / 2, 1 / 6)
        np.testing.assert_allclose(sides[4:], np.tile(expected, (12, 1)), rtol=1e-5)


def test_one_tile_has_no_thumbnail() -> None:
    model, processor = tiny_vlm("internvl")
    processor.image_processor.max_patches = 1
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(48, 32)))
    assert areas(captured.images[0]).tolist() == [0.25] * 4


BOXES = np.array(
    [[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0, 0, 0, 0]], dtype=np.float32
)


@pytest.mark.parametrize("size", [(None, None), (5, 3), (64, 64)])
def test_heatmap_sums_to_the_scores(size: tuple) -> None:
    grid = ImageGrid((2, 3, 4, 5), BOXES, (8, 4))
    heatmap = grid.heatmap([1.0, -2.0, 3.0, 100.0], *size)
    assert heatmap.dtype == np.float32
    assert heatmap.shape == ((4, 8) if size[0] is None else size[::-1])
    assert heatmap.sum() == pytest.approx(2.0, abs=1e-5)
    assert heatmap[0, 0] > 0 > heatmap[0, -1]


def test_heatmap_of_a_prompts_scores() -> None:
    grid = ImageGrid((2, 3, 4, 5), BOXES, (8, 4))
    prompt = np.array([9.0, 9.0, 1.0, -2.0, 3.0, 0.0, 9.0])
    np.testing.assert_array_equal(grid.heatmap(prompt), grid.heatmap(prompt[2:6]))
    with pytest.raises(ValueError, match=r"must be \[4\].*shape \[5\]"):
        grid.heatmap(prompt[:5])
    with pytest.raises(ValueError, match=r"4 tokens need boxes \[4, 4\], got \[3, 4\]"):
        ImageGrid((2, 3, 4, 5), BOXES[:3], (8, 4))


def test_processor_of_another_model() -> None:
    model, processor = tiny_vlm("llava")
    processor.vision_feature_select_strategy = "full"  # writes one token more than the model makes
    with pytest.raises(ValueError, match="image 0 has 17 tokens, and 16 by the layout of llava"):
        capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(16, 16)))


def test_class_token_has_no_box() -> None:
    model, processor = tiny_vlm("llava")
    processor.vision_feature_select_strategy = "full"
    model.config.vision_feature_select_strategy = "full"
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor, noise(16, 16)))
    [grid] = captured.images
    assert len(grid.boxes) == 17
    assert np.flatnonzero(areas(grid) == 0).tolist() == [0]


def test_images_as_arrays_and_pil() -> None:
    model, processor = tiny_vlm("llava")
    pixels = noise(16, 16)
    view = DecoderView.of(model)
    one = capture_prompt(view, processor, pair_of(processor, pixels))
    other = capture_prompt(view, processor, pair_of(processor, Image.fromarray(pixels)))
    assert torch.equal(one.embeddings, other.embeddings)
