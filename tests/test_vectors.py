import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from grains_ext.steering.gate import Gate
from grains_ext.steering.saving import model_card
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


def test_saved_vectors_can_be_read_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    make(0, 1).save_pretrained(tmp_path / "saved")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


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


def test_directions_are_copies(tmp_path: Path) -> None:
    direction = torch.ones(3)
    vectors = SteeringVectors({0: direction, 1: direction}, gate=Gate(0, direction, 0.0))
    direction.zero_()
    assert vectors.directions[1].tolist() == [1.0, 1.0, 1.0]
    vectors.save_pretrained(tmp_path)  # safetensors refuses tensors that share memory
    assert SteeringVectors.from_pretrained(tmp_path).blocks == [0, 1]


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
        ({0: torch.ones(2)}, {"normalize": None}, "normalize must be True or False"),
        ({0: torch.ones(2)}, {"block_strengths": {1: 1.0}}, r"names \[1\]"),
        ({0: torch.ones(2)}, {"block_strengths": {0: torch.inf}}, "must be finite"),
        ({0: torch.ones(2)}, {"gate": Gate(1, torch.ones(2), 0.0)}, "reads block 1, after block 0"),
        ({0: torch.ones(2)}, {"gate": Gate(0, torch.ones(3), 0.0)}, "different models"),
    ],
)
def test_wrong_vectors(directions: dict, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SteeringVectors(directions, **options)


def gated() -> SteeringVectors:
    gate = Gate(1, torch.randn(4), 0.25, "probe", torch.randn(4), "token", {"rate": 0.05})
    return make(1, 3, 4, block_strengths={4: -2, 1: 0.5}, normalize=False, gate=gate)


def test_every_field_is_saved(tmp_path: Path) -> None:
    vectors = gated()
    vectors.save_pretrained(tmp_path)
    loaded = SteeringVectors.from_pretrained(tmp_path)
    assert loaded.block_strengths == {1: 0.5, 4: -2.0}
    assert loaded.normalize is False
    before, after = vectors.gate, loaded.gate
    assert before is not None
    assert after is not None
    for name in ("block", "threshold", "kind", "when", "metadata"):
        assert getattr(after, name) == getattr(before, name)
    assert torch.equal(after.direction, before.direction)
    assert torch.equal(after.center, before.center)


def test_files_of_the_first_version_load(tmp_path: Path) -> None:
    tensors = {f"layers.{block}.direction": torch.randn(4) for block in (0, 2)}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    config = {"format_version": 1, "blocks": [0, 2], "hidden_size": 4, "strength": 0.5}
    config |= {"eps": 1e-6, "metadata": {}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    loaded = SteeringVectors.from_pretrained(tmp_path)
    assert (loaded.blocks, loaded.strength, loaded.normalize) == ([0, 2], 0.5, True)
    assert (loaded.block_strengths, loaded.gate) == (None, None)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "normalize": False}))
    with pytest.raises(ValueError, match=r"unknown entries \['normalize'\]"):
        SteeringVectors.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "has no gate, .*gate.direction"),
        ({"kind": "magic"}, "`kind` must be one of"),
        ({"when": 3}, "`when` is missing or wrong, got 3"),
        ({"threshold": float("inf")}, "threshold must be finite"),
        ({"block": 2}, "reads block 2, after block 1"),
        ({"block": True}, "`block` is missing or wrong"),
        ({"code": "print()"}, r"unknown entries \['code'\]"),
    ],
)
def test_wrong_gate(tmp_path: Path, change: dict | None, reason: str) -> None:
    gated().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["gate"] = config["gate"] | change if change else None
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        SteeringVectors.from_pretrained(tmp_path)


def test_block_strengths() -> None:
    vectors = make(0, 2, block_strengths={2: 0.25})
    assert [vectors.factor(block) for block in (0, 2)] == [1.0, 0.25]
    effective = vectors.effective()
    assert effective.block_strengths is None
    assert torch.equal(effective.directions[2], 0.25 * vectors.directions[2])
    assert torch.equal(effective.directions[0], vectors.directions[0])
    assert effective.effective() is effective
    assert vectors.subset([2]).block_strengths == {2: 0.25}
    assert vectors.subset([0]).block_strengths == {0: 1.0}


@pytest.mark.parametrize(
    "text", ["{", "[]", '"x"', "null", "[" * 100_000, '{"format_version": 1e400}', "\ud800"]
)
def test_hostile_config(tmp_path: Path, text: str) -> None:
    make(0).save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=CONFIG_NAME):
        SteeringVectors.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 3}, "format_version is 3"),
        ({"format_version": True}, "format_version is True"),
        ({"blocks": [0, 1]}, r"lists blocks \[0, 1\].*holds \[0\]"),
        ({"blocks": ["0"]}, "whole numbers"),
        ({"hidden_size": 5}, "says hidden_size 5"),
        ({"strength": "strong"}, "`strength`"),
        ({"strength": True}, "`strength`"),
        ({"strength": float("inf")}, "strength must be finite"),
        ({"strength": 10**400}, "too large"),
        ({"block_strengths": {"0": 10**400}}, "too large"),
        ({"metadata": None}, "`metadata`"),
        ({"normalize": 1}, "`normalize`"),
        ({"block_strengths": [1.0]}, "`block_strengths`"),
        ({"block_strengths": {"one": 1.0}}, r"no block: \['one'\]"),
        ({"block_strengths": {"0": "1"}}, "strength of block 0 must be finite, got '1'"),
        ({"block_strengths": {"0": float("nan")}}, "strength of block 0 must be finite"),
        ({"block_strengths": {"7": 1.0}}, r"names \[7\], for which there is no direction"),
        ({"gate": {"block": 0}}, "has a gate.*no tensor of one"),
        ({"positions": "all"}, r"unknown entries \['positions'\]"),
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


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Any, dict[str, Any]]] = []

    class HfApi:
        def __init__(self, token: str | None) -> None:
            calls.append(("login", token, {}))

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
            shutil.copytree(folder_path, tmp_path / "hub")
            calls.append(("upload", repo_id, options))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    note = "```\n---\nlicense: x\n{braces}"
    vectors = make(0, 2, metadata={"base_model": "owner/model", "method": "caa", "note": note})
    assert vectors.push_to_hub("me/truthful", private=True, token="t") == "https://hub/commit/1"
    assert [call[:2] for call in calls] == [
        ("login", "t"),
        ("create", "me/truthful"),
        ("upload", "me/truthful"),
    ]
    assert calls[1][2] == {"private": True, "exist_ok": True}
    assert calls[2][2]["commit_message"] == "Upload steering vectors"
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == [
        "README.md",
        WEIGHTS_NAME,
        CONFIG_NAME,
    ]
    assert SteeringVectors.from_pretrained(tmp_path / "hub").blocks == [0, 2]
    card = (tmp_path / "hub" / "README.md").read_text()
    header, body = card.split("\n---\n", 1)
    assert header == (
        "---\nlibrary_name: grains_ext\ntags:\n- steering-vectors\n- activation-steering\n"
        "base_model: owner/model"
    )
    assert 'from_pretrained("me/truthful")' in body
    assert body.count("```") == 4  # two blocks of code: the note opened and closed none
    assert '"method": "caa"' in body


def test_card_links_only_models_of_the_hub() -> None:
    card = model_card(make(0, metadata={"base_model": "/home/me/secret-model"}), "me/x")
    assert "base_model:" not in card
    assert "a language model" in card
