"""An attribution checks itself, names its strongest tokens, and survives a file bit for bit."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from grains_ext.attribution import Attribution, load_attributions
from grains_ext.vision.grid import ImageGrid
from tests.attributions import attribution, bits


def image_grid(positions: tuple[int, ...] = (1, 2)) -> ImageGrid:
    """A 40x20 picture, cut from left to right into equal parts."""
    edges = np.linspace(0, 1, len(positions) + 1, dtype=np.float32)
    boxes = np.stack([edges[:-1], 0 * edges[:-1], edges[1:], 0 * edges[1:] + 1], axis=1)
    return ImageGrid(positions, boxes, (40, 20))


@st.composite
def attributions(draw: st.DrawFn) -> Attribution:
    n = draw(st.integers(0, 12))
    per_token = {"min_size": n, "max_size": n}
    positions = st.lists(st.integers(0, n - 1), max_size=4).map(tuple) if n else st.just(())
    images = []
    for covered in draw(st.lists(positions, max_size=3)):
        corners = draw(
            hnp.arrays(np.float32, (len(covered), 2, 2), elements=st.floats(0, 1, width=32))
        )
        boxes = np.sort(corners, axis=1).reshape(len(covered), 4)
        images.append(ImageGrid(covered, boxes, draw(st.tuples(*2 * [st.integers(1, 5000)]))))
    floats = st.floats(allow_nan=True)
    return Attribution(
        tokens=tuple(draw(st.lists(st.text(max_size=5), **per_token))),
        token_ids=tuple(draw(st.lists(st.integers(0, 2**31), **per_token))),
        modality=tuple(draw(st.lists(st.sampled_from(["text", "image"]), **per_token))),
        scores=draw(hnp.arrays(np.float32, n)),
        f_input=draw(floats),
        f_baseline=draw(floats),
        residual=draw(floats),
        evaluations=draw(st.integers(0, 2**40)),
        n_steps=draw(st.integers(0, 10_000)),
        converged=draw(st.booleans()),
        method=draw(st.sampled_from(["adaptive", "occlusion"])),
        baseline=draw(st.text(max_size=5)),
        prompt=draw(st.text()),
        chosen=draw(st.text()),
        rejected=draw(st.text()),
        pair_id=draw(st.none() | st.text()),
        objective=draw(st.text(max_size=5)),
        images=tuple(images),
    )


@given(attributions())
def test_a_saved_attribution_is_read_back_bit_for_bit(original: Attribution) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "new", "one.safetensors")
        original.save(path)
        assert bits(Attribution.load(path)) == bits(original)
        [through_list] = load_attributions(path)
        assert bits(through_list) == bits(original)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@given(attributions())
def test_to_dict_is_plain_and_its_scores_are_the_same_float32(original: Attribution) -> None:
    plain = json.loads(json.dumps(original.to_dict()))
    scores = np.array(plain["scores"], dtype=np.float32)
    np.testing.assert_array_equal(scores, original.scores)
    assert plain["tokens"] == list(original.tokens)
    for image, expected in zip(plain["images"], original.images, strict=True):
        boxes = np.array(image["boxes"], dtype=np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(boxes, expected.boxes)


def test_scores_are_written_with_the_digits_of_float32() -> None:
    assert attribution(("a", "b"), [0.1, -1e-8]).to_dict()["scores"] == [0.1, -1e-8]


def test_top_gives_the_strongest_tokens_of_either_sign() -> None:
    it = attribution(("a", "b", "c", "d"), [0.5, -2.0, 0.5, 0.25])
    assert [tuple(token) for token in it.top(3)] == [
        (1, "b", -2.0, "text"),
        (0, "a", 0.5, "text"),
        (2, "c", 0.5, "text"),
    ]
    assert len(it.top(10)) == 4
    with pytest.raises(ValueError, match="at least 1"):
        it.top(0)


def test_modality_sums_add_up_to_the_scores() -> None:
    it = attribution(
        ("a", "<image>", "<image>"), [0.5, -2.0, 0.25], modality=("text", "image", "image")
    )
    assert it.modality_sums() == {"text": 0.5, "image": -1.75}
    assert attribution(("a",), [0.5]).modality_sums() == {"text": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(2, np.float64)}, "float32"),
        ({"scores": np.zeros(3, np.float32)}, r"\[2\]"),
        ({"token_ids": (1,)}, "`token_ids`"),
        ({"modality": ("text", "sound")}, "sound"),
        ({"images": (image_grid((1, 2)),)}, r"image 0 has tokens at \[2\]"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribution(("a", "b"), [0.0, 0.0], **changes)


# --- files that are not right ---------------------------------------------------------------------


def damaged(change: str, **arrays: Any) -> bytes:
    """A saved file's bytes with other arrays (None removes one), or with text in its line replaced.

    ``change`` is "old=>new", or nothing.
    """
    it = attribution(
        ("a", "<image>", "<image>"),
        [0.5, 1.0, -1.0],
        modality=("text", "image", "image"),
        images=(image_grid(),),
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "it.safetensors")
        it.save(path)
        content = path.read_bytes()
    stored = {**load(content), **arrays}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header["__metadata__"]
    if change:
        old, new = change.split("=>")
        assert old in metadata["line"]
        metadata["line"] = metadata["line"].replace(old, new)
    return save({name: array for name, array in stored.items() if array is not None}, metadata)


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ("", {"scores": None}, "lacks the array `scores`"),
        ("", {"boxes": None}, "lacks the array `boxes`"),
        ("", {"scores": np.zeros(3, np.float64)}, "must be float32"),
        ("", {"scores": np.zeros((3, 1), np.float32)}, "one dimension"),
        ("", {"scores": np.zeros(4, np.float32)}, "4 entries for 3 tokens"),
        ("", {"n_tokens": np.array([-1])}, "negative length"),
        ("", {"n_tokens": np.array([2**62])}, "entries for 4611686018427387904 tokens"),
        ("", {"converged": np.array([True, False])}, "2 entries for 1 lines"),
        ("", {"boxes": np.full((2, 4), np.nan, np.float32)}, r"\[0, 1\]"),
        ("", {"boxes": np.full((2, 4), 7, np.float32)}, r"\[0, 1\]"),
        ("", {"boxes": np.zeros((1, 4), np.float32)}, "fewer than there are patches"),
        ("", {"boxes": np.zeros((3, 4), np.float32)}, "3 rows for 2 patches"),
        ("", {"boxes": np.zeros((2, 3), np.float32)}, r"\[patches, 4\]"),
        ('"index": 0=>"index": 1', {}, "its index is 1, the arrays say 0"),
        ('"size": [40, 20]=>"size": [40, NaN]', {}, "NaN is no JSON number"),
        ('"size": [40, 20]=>"size": [40, 1e400]', {}, "size"),
        ('"size": [40, 20]=>"size": [40, 0]', {}, "no pixels"),
        ('"token_positions": [1, 2]=>"token_positions": [1, 9]', {}, "tokens at"),
        ('"token_positions": [1, 2]=>"token_positions": [1, true]', {}, "whole numbers"),
        ('"images": [=>"images": [3, ', {}, "token_positions"),
        ('"chosen": "red"=>"chosen": 7', {}, "`chosen` must be text"),
        ('"pair_id": "p-0"=>"pair_id": []', {}, "`pair_id`"),
        ('"tokens": ["a"=>"tokens": [1', {}, "`tokens` must be a list of texts"),
        ('"tokens": ["a", =>"tokens": [', {}, "one per token"),
        ('{"index"=>["index"', {}, "not valid JSON"),
        ('"images": [=>"images": [' + 100_000 * "[", {}, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, change: str, arrays: dict[str, Any], message: str
) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(damaged(change, **arrays))
    with pytest.raises(ValueError, match=message) as error:
        Attribution.load(path)
    assert "hostile.safetensors" in str(error.value)


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for content in (b"", b"PK\x03\x04 not safetensors", save({"a": np.zeros(1)})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.safetensors"):
            Attribution.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Attribution.load(tmp_path / "nowhere")


def test_an_element_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "grains.attribution", "version": "1", "line": "{}"},
            "scores": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        }
    ).encode()
    path = tmp_path / "bf16.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match=r"bf16\.safetensors"):
        Attribution.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.safetensors"
    attribution(("old",), [1.0]).save(path)
    monkeypatch.setattr(Path, "write_bytes", _fail)
    with pytest.raises(OSError, match="disk full"):
        attribution(("new",), [1.0]).save(path)
    assert Attribution.load(path).tokens == ("old",)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def _fail(*_: object) -> None:
    raise OSError("disk full")
