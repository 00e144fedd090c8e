import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grains_ext.pairs import PreferencePair, load_pairs, pair_from_row, save_pairs
from grains_ext.vision import blurred, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "sky.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.mark.parametrize("kind", ["path", "string", "pil", "array", "bytes", "record"])
def test_sources(kind: str, png: Path) -> None:
    source: Any = {
        "path": png,
        "string": str(png),
        "pil": Image.fromarray(PIXELS),
        "array": PIXELS,
        "bytes": {"bytes": png.read_bytes(), "path": None},
        "record": {"path": str(png), "bytes": None},
    }[kind]
    image = open_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_floating_grey_and_transparent_arrays() -> None:
    np.testing.assert_array_equal(np.asarray(open_image(PIXELS / 255)), PIXELS)
    for grey in (PIXELS[..., 0], PIXELS[..., :1]):
        np.testing.assert_array_equal(np.asarray(open_image(grey))[..., 2], PIXELS[..., 0])
    opaque = np.concatenate([PIXELS, np.full((6, 9, 1), 255, dtype=np.uint8)], axis=2)
    np.testing.assert_array_equal(np.asarray(open_image(opaque)), PIXELS)


def test_turned_as_exif_says(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (6, 9)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.png", "'/nowhere/a.png' does not open: no such file"),
        ({"bytes": b"no picture"}, "the image's bytes does not open"),
        (PIXELS.astype(np.int64), r"must be uint8, or floating in \[0, 1\]; got int64"),
        (PIXELS * 1.0, r"floating in \[0, 1\]; got float64 in \[0.0, 249.0\]"),
        (PIXELS.transpose(2, 0, 1), r"must be \[height, width\].* got \[3, 6, 9\]"),
        (PIXELS[:0], r"got \[0, 9, 3\]"),
        (7, "a path, a PIL image, an array .*; got int"),
    ],
)
def test_what_does_not_open(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"cut\.png' does not open: cannot identify"):
        open_image(path)


def test_a_picture_that_its_decoder_cannot_take() -> None:
    dds = io.BytesIO()
    Image.fromarray(PIXELS).save(dds, "dds")
    unknown = bytearray(dds.getvalue())
    unknown[80:84] = bytes(4)  # the flags that say how pixels are stored
    with pytest.raises(ValueError, match=r"the image's bytes does not open: .*pixel format"):
        open_image({"bytes": bytes(unknown)})


def test_blur_leaves_the_mean_and_no_shapes() -> None:
    checks = np.kron([[0, 255] * 4, [255, 0] * 4] * 4, np.ones((8, 8))).astype(np.uint8)
    image = np.asarray(blurred(open_image(checks))).astype(float)
    assert image.shape == (64, 64, 3)
    assert image.std() < 10
    assert abs(image.mean() - 127.5) < 2


@pytest.mark.parametrize("url", ["https://example.org/sky.png", "http://example.org/a.jpg"])
def test_urls_are_refused(url: str) -> None:
    row = {"prompt": "what is it", "chosen": "a", "rejected": "b", "image": url}
    with pytest.raises(ValueError, match=r"is a URL: download it and give its path"):
        pair_from_row(row)


def test_paths_in_a_file_are_beside_it(tmp_path: Path) -> None:
    row = {
        "prompt": "what is it",
        "chosen": "a",
        "rejected": "b",
        "images": ["x/sky.png", "/b.png"],
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    [pair] = load_pairs(path)
    assert pair.images == (str(tmp_path / "x" / "sky.png"), "/b.png")
    # Saved elsewhere they still name the same files.
    (tmp_path / "other").mkdir()
    save_pairs([pair], tmp_path / "other" / "pairs.jsonl")
    assert load_pairs(tmp_path / "other" / "pairs.jsonl") == [pair]
    # Given by a program they stay as they are, below the working directory.
    assert pair_from_row(row).images == ("x/sky.png", "/b.png")


def test_answers_beside_images_may_be_lists_of_text_parts() -> None:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": t}]}] for t in "ab"]
    row = {"prompt": [question], "chosen": answers[0], "rejected": answers[1], "images": [PIXELS]}
    pair = pair_from_row(row)
    assert (pair.chosen, pair.rejected) == ("a", "b")
    assert pair.prompt == [question]
    conversations = {"chosen": [question, *answers[0]], "rejected": [question, *answers[1]]}
    assert pair_from_row(conversations).chosen == "a"


def test_pair_keeps_images_of_any_kind() -> None:
    pair = PreferencePair("what", "a", "b", images=(PIXELS, "sky.png"))
    assert pair.images is not None
    assert pair.images[0] is PIXELS
