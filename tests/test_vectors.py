import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from grains_ext.steering.vectors import CONFIG_NAME, WEIGHTS_NAME, SteeringVectors

VALUE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def make(*blocks: int, size: int = 4, **kwargs: Any) -> SteeringVectors:
    return SteeringVectors({block: torch.randn(size) for block in blocks}, **kwargs)


@given(
    directions=st.integers(1, 6).flatmap(
        lambda size: st.dictionaries(
            st.integers(0, 200), st.lists(VALUE, min_size=size, max_size=size), min_size=1
        )
    ),
    strength=st.floats(-1e6, 1e6),
    note=st.text(),
)
def test_saved_vectors_load_back(
    tmp_path_factory: pytest.TempPathFactory, directions: dict, strength: float, note: str
) -> None:
    folder = tmp_path_factory.mktemp("vectors")
    tensors = {block: torch.tensor(values) for block, values in directions.items()}
    vectors = SteeringVectors(tensors, strength, 1e-5, {"note": note, "k": 3})
    vectors.save_pretrained(folder)
    loaded = SteeringVectors.from_pretrained(folder)
    assert loaded.blocks == sorted(directions)
    for block in loaded.blocks:
        assert torch.equal(loaded.directions[block], vectors.directions[block])
    assert (loaded.strength, loaded.eps, loaded.metadata) == (strength, 1e-5, vectors.metadata)
    assert sorted(p.name for p in folder.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]


def test_save_replaces_older_vectors(tmp_path: Path) -> None:
    make(0, 1).save_pretrained(tmp_path)
    make(3).save_pretrained(str(tmp_path))
    assert SteeringVectors.from_pretrained(str(tmp_path)).blocks == [3]


def test_failed_save_keeps_older_vectors(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    for unjson in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            make(1, metadata={"x": unjson}).save_pretrained(tmp_path)
    assert SteeringVectors.from_pretrained(tmp_path).blocks == [0]


def test_subset_and_strength() -> None:
    vectors = make(0, 2, 5, metadata={"k": 1})
    part = vectors.subset([5, 0]).with_strength(2)
    assert (part.blocks, part.strength, part.metadata) == ([0, 5], 2.0, {"k": 1})
    assert torch.equal(part.directions[5], vectors.directions[5])
    assert (vectors.strength, vectors.hidden_size) == (1.0, 4)
    with pytest.raises(ValueError, match=r"no direction for blocks \[1\]; there are \[0, 2, 5\]"):
        vectors.subset([0, 1])


def test_directions_become_float32() -> None:
    vectors = SteeringVectors({0: torch.ones(3, dtype=torch.float64, requires_grad=True)})
    assert vectors.directions[0].dtype == torch.float32
    assert not vectors.directions[0].requires_grad


@pytest.mark.parametrize(
    ("directions", "options", "reason"),
    [
        ({}, {}, "at least one block"),
        ({-1: torch.ones(2)}, {}, "whole numbers from 0, got -1"),
        ({True: torch.ones(2)}, {}, "whole numbers"),
        ({0: torch.ones(2, 2)}, {}, r"tensor \[D\], got \[2, 2\]"),
        ({0: [1.0]}, {}, "got list"),
        ({0: torch.ones(2, dtype=torch.int64)}, {}, "must be float32"),
        ({0: torch.tensor([1.0, torch.inf])}, {}, "not finite"),
        ({0: torch.ones(2), 1: torch.ones(3)}, {}, r"one length, got \[2, 3\]"),
        ({0: torch.ones(2)}, {"strength": float("nan")}, "strength must be finite"),
        ({0: torch.ones(2)}, {"eps": -1.0}, "eps"),
    ],
)
def test_wrong_vectors(directions: dict, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SteeringVectors(directions, **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"blocks": [0, 1]}, r"lists blocks \[0, 1\].*holds \[0\]"),
        ({"blocks": ["0"]}, "whole numbers"),
        ({"hidden_size": 5}, "says hidden_size 5"),
        ({"strength": "strong"}, "`strength`"),
        ({"strength": True}, "`strength`"),
        ({"strength": float("inf")}, "strength must be finite"),
        ({"metadata": None}, "`metadata`"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict, reason: str) -> None:
    make(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=reason):
        SteeringVectors.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layers.0.bias": torch.ones(4)},
        {"layers.00.direction": torch.ones(4)},
        {"layers.0.direction": torch.ones(4, dtype=torch.float16)},
        {"layers.0.direction": torch.ones(4), "extra": torch.ones(4)},
    ],
)
def test_wrong_weights(tmp_path: Path, tensors: dict) -> None:
    make(0).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"expected float32 tensors named layers\.<block>"):
        SteeringVectors.from_pretrained(tmp_path)


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    torch.save({"layers.0.direction": torch.ones(4)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        SteeringVectors.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        SteeringVectors.from_pretrained(tmp_path)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG_NAME}"):
        SteeringVectors.from_pretrained(tmp_path)
    make(0).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS_NAME}"):
        SteeringVectors.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no hub id"):
        SteeringVectors.from_pretrained(tmp_path / "nowhere")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        asked.append((repo_id, kwargs["revision"], sorted(kwargs["allow_patterns"])))
        if repo_id == "someone/else":
            raise OSError("offline")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    make(2).save_pretrained(tmp_path)
    assert SteeringVectors.from_pretrained("someone/truthful", revision="v1").blocks == [2]
    assert asked == [("someone/truthful", "v1", [WEIGHTS_NAME, CONFIG_NAME])]
    with pytest.raises(FileNotFoundError, match=r"someone/else .*offline"):
        SteeringVectors.from_pretrained("someone/else")
