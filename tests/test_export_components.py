"""Folders of several graphs, as of vision-language models: all decoders steered, or none."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from grains_ext.export import surgery
from grains_ext.export.errors import GraphError
from grains_ext.export.inject import inject, remove_steering
from grains_ext.export.surgery import Injected
from grains_ext.steering.vectors import SteeringVectors
from tests.graphs import HIDDEN, IDS, ToyDecoder, run_toy

VECTORS = SteeringVectors({1: torch.linspace(-1, 1, HIDDEN)}, strength=1.5)
DECODERS = ("decode.onnx", "language_model.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prefill and decode share nothing; the encoder and the head hold no decoder blocks."""
    folder = tmp_path / "vlm"
    (folder / "processor").mkdir(parents=True)
    external = {"save_as_external_data": True, "size_threshold": 100}
    for name, form in zip(DECODERS, ("skip_rms", "div"), strict=True):
        graph = ToyDecoder(form).graph()
        onnx.save(graph, str(folder / name), location=f"{name}.data", **external)
    for name in ("vision_encoder.onnx", "lm_head.onnx"):
        values = [
            helper.make_tensor_value_info(v, TensorProto.FLOAT, ["n", "t", HIDDEN]) for v in "xy"
        ]
        node = helper.make_node("Tanh", ["x"], ["y"])
        graph = helper.make_graph([node], "part", values[:1], values[1:])
        opsets = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=opsets), str(folder / name))
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 3}}))
    (folder / "processor" / "tokens.txt").write_text("a b c")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def assert_steered(folder: Path) -> None:
    directions = {1: VECTORS.directions[1].double().numpy()}
    for name, form in zip(DECODERS, ("skip_rms", "div"), strict=True):
        expected = ToyDecoder(form).run(IDS, directions, VECTORS.strength)
        np.testing.assert_allclose(run_toy(folder / name, library=True), expected, atol=5e-6)


def test_every_decoder_of_a_folder_is_steered(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    output = tmp_path / "new" / "steered"
    injected = inject(folder, VECTORS, output)
    assert injected == [
        Injected(1, "SkipSteerRmsNorm", "sum4", "skip_norm", "decode.onnx"),
        Injected(1, "SkipSteerRmsNorm", "sum4", "add", "language_model.onnx"),
    ]
    assert inject(folder, VECTORS, dry_run=True) == injected
    assert_steered(output)
    assert files(folder) == before
    after = files(output)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == set(DECODERS)
    remove_steering(output, tmp_path / "back")
    for name in DECODERS:
        again, original = (onnx.load(str(f / name)) for f in (tmp_path / "back", folder))
        assert again == original


def test_a_folder_is_steered_in_place(folder: Path) -> None:
    before = files(folder)
    inject(folder, VECTORS, folder)
    assert_steered(folder)
    inject(folder, VECTORS, folder)
    remove_steering(folder, folder)
    assert files(folder).keys() == before.keys()
    for name in DECODERS:
        graph = onnx.load(str(folder / name), load_external_data=False)
        assert not [node for node in graph.graph.node if node.domain == "grains"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_failure_leaves_every_graph_as_it_was(
    in_place: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two graphs cannot be written."""
    written = []
    apply = surgery.Surgery.apply

    def failing(self: surgery.Surgery, **options: object) -> None:
        written.append(self)
        if len(written) == 2:
            raise OSError("No space left on device")
        apply(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(surgery.Surgery, "apply", failing)
    before = files(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        inject(folder, VECTORS, folder if in_place else tmp_path / "out")
    assert files(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["vlm"]


def test_folders_that_cannot_be_steered_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`tensors` are of one graph"):
        inject(folder, VECTORS, tmp_path / "out", tensors={1: "sum4"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="give a new folder"):
        inject(folder, VECTORS, tmp_path / "full")
    with pytest.raises(GraphError, match=r"no graph in .* is steered"):
        remove_steering(folder, tmp_path / "out")
    for name in DECODERS:
        (folder / name).unlink()
    with pytest.raises(GraphError, match=r"no graph in .* holds decoder blocks.*lm_head\.onnx"):
        inject(folder, VECTORS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_graphs_is_told_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"holds no ONNX graph: give a graph, or the folder"):
        inject(tmp_path, VECTORS, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GraphError, match="it is a PyTorch model, which `grains export`"):
        inject(tmp_path, VECTORS, tmp_path / "out")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"")
    with pytest.raises(GraphError, match=r"there are some in '.*/onnx': give that folder"):
        remove_steering(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
