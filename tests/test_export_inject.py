"""Steering put into graphs of every form, against a numpy decoder steered in float64."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from grains_ext import export
from grains_ext.export.bank import direction_name
from grains_ext.export.errors import GraphError
from grains_ext.export.inject import inject
from grains_ext.export.surgery import Injected
from grains_ext.steering.vectors import SteeringVectors
from tests.graphs import ADD_FORMS, HIDDEN, IDS, SKIP_FORMS, ToyDecoder, run_toy

LAYER_NORM_FORMS = {"layer_norm", "skip_layer", "skip_layer_bias"}


@pytest.fixture
def vectors() -> SteeringVectors:
    generator = torch.Generator().manual_seed(3)
    directions = {block: torch.randn(HIDDEN, generator=generator) for block in (0, 2)}
    return SteeringVectors(directions, strength=1.5)


def as_numpy(vectors: SteeringVectors) -> dict[int, NDArray]:
    return {block: v.numpy().astype(np.float64) for block, v in vectors.directions.items()}


def save(decoder: ToyDecoder, folder: Path) -> Path:
    path = folder / "toy.onnx"
    onnx.save(decoder.graph(), str(path))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", ADD_FORMS + SKIP_FORMS)
def test_every_form_is_steered(
    form: str, fuse: bool, dtype: type, vectors: SteeringVectors, tmp_path: Path
) -> None:
    decoder = ToyDecoder(form, dtype=dtype)
    path = save(decoder, tmp_path)
    injected = inject(path, vectors, tmp_path / "steered.onnx", fuse=fuse)

    fused = "SkipSteerLayerNorm" if form in LAYER_NORM_FORMS else "SkipSteerRmsNorm"
    assert [(entry.block, entry.op_type) for entry in injected] == [
        (0, fused if fuse else "Steer"),
        (2, fused if fuse else "Steer"),
    ]
    expected = decoder.run(IDS, as_numpy(vectors), vectors.strength)
    tolerance = 5e-6 if dtype is np.float32 else 2e-2
    for library in (False, True):
        logits = run_toy(tmp_path / "steered.onnx", library=library)
        np.testing.assert_allclose(logits, expected, atol=tolerance)
    assert np.abs(expected - decoder.run(IDS)).max() > 0.1


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", ["div", "layer_norm"])
def test_parallel_blocks_are_steered(
    form: str, fuse: bool, vectors: SteeringVectors, tmp_path: Path
) -> None:
    decoder = ToyDecoder(form, parallel=True)
    inject(save(decoder, tmp_path), vectors, tmp_path / "steered.onnx", fuse=fuse)
    expected = decoder.run(IDS, as_numpy(vectors), vectors.strength)
    for library in (False, True):
        np.testing.assert_allclose(
            run_toy(tmp_path / "steered.onnx", library=library), expected, atol=5e-6
        )


@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", ["layer_norm", "skip_layer", "skip_layer_bias"])
def test_layer_norms_without_a_bias_are_fused_too(
    form: str, fuse: bool, bank: bool, vectors: SteeringVectors, tmp_path: Path
) -> None:
    decoder = ToyDecoder(form, shift=False)
    given = [vectors, vectors] if bank else vectors
    injected = inject(save(decoder, tmp_path), given, tmp_path / "steered.onnx", fuse=fuse)
    assert {entry.op_type for entry in injected} == {"SkipSteerLayerNorm" if fuse else "Steer"}
    expected = decoder.run(IDS, as_numpy(vectors), vectors.strength)
    for library in (False, True):
        logits = run_toy(tmp_path / "steered.onnx", library=library)
        np.testing.assert_allclose(logits, expected, atol=5e-6)


def test_the_library_keeps_the_injected_nodes(vectors: SteeringVectors, tmp_path: Path) -> None:
    path = save(ToyDecoder("div"), tmp_path)
    for fuse, op_type in ((True, "SkipSteerRmsNorm"), (False, "Steer")):
        inject(path, vectors, tmp_path / "steered.onnx", fuse=fuse)
        assert export.count_nodes(tmp_path / "steered.onnx")[f"grains.{op_type}"] == 2
        stock = export.count_nodes(tmp_path / "steered.onnx", library=False)
        assert not [name for name in stock if name.startswith("grains.")]


def test_defaults_can_be_overridden(vectors: SteeringVectors, tmp_path: Path) -> None:
    decoder = ToyDecoder("div")
    steered = tmp_path / "steered.onnx"
    inject(save(decoder, tmp_path), vectors, steered)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = export.session(steered, session_options=options)
    # Runtimes that know nothing of steering see the inputs that they knew before.
    assert not [i.name for i in session.get_inputs() if i.name.startswith("grains")]
    names = [i.name for i in session.get_overridable_initializers()]
    assert sorted(names) == [direction_name(0), direction_name(2), "grains.strength"]

    off = {"grains.strength": np.zeros(1, np.float32)}
    other = np.linspace(-1, 1, HIDDEN, dtype=np.float32)
    directions = as_numpy(vectors) | {2: other.astype(np.float64)}
    for library in (False, True):
        unsteered = run_toy(steered, library=library, feeds=off)
        np.testing.assert_allclose(unsteered, decoder.run(IDS), atol=5e-6)
        swapped = run_toy(steered, library=library, feeds={direction_name(2): other})
        np.testing.assert_allclose(swapped, decoder.run(IDS, directions, 1.5), atol=5e-6)


def test_baked_steering_is_constant(vectors: SteeringVectors, tmp_path: Path) -> None:
    decoder = ToyDecoder("skip_rms")
    steered = tmp_path / "steered.onnx"
    inject(save(decoder, tmp_path), vectors, steered, baked=True, strength=0.5, blocks=[2])
    graph = onnx.load(str(steered)).graph
    assert not [i.name for i in graph.input if i.name.startswith("grains")]
    expected = decoder.run(IDS, {2: as_numpy(vectors)[2]}, 0.5)
    np.testing.assert_allclose(run_toy(steered, library=True), expected, atol=5e-6)


def test_another_eps_is_kept_by_not_fusing(vectors: SteeringVectors, tmp_path: Path) -> None:
    path = save(ToyDecoder("div"), tmp_path)
    other = SteeringVectors(vectors.directions, strength=1.0, eps=1e-3)
    injected = inject(path, other, tmp_path / "steered.onnx")
    assert injected[0] == Injected(0, "Steer", "sum2", "add")
    graph = onnx.load(str(tmp_path / "steered.onnx")).graph
    steer = next(node for node in graph.node if node.op_type == "Steer")
    assert onnx.helper.get_node_attr_value(steer, "epsilon") == pytest.approx(1e-3)


def _cube(graph: onnx.GraphProto) -> None:
    power = _constant_of(graph, "Pow")
    power.CopyFrom(numpy_helper.from_array(np.array(3, np.float32), power.name))


def _mean_over_tokens(graph: onnx.GraphProto) -> None:
    for position, node in enumerate(graph.node):
        if node.op_type == "ReduceMean" and graph.node[position - 1].op_type == "Pow":
            _initializer(graph, node.input[1]).CopyFrom(
                numpy_helper.from_array(np.array([1]), node.input[1])
            )


def _second_reader(graph: onnx.GraphProto) -> None:
    for position, node in enumerate(graph.node):
        if node.op_type == "Sqrt":
            extra = onnx.helper.make_node("Neg", [node.output[0]], [f"extra{position}"])
            graph.node.append(extra)


def _half_weight(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.name.startswith("scale"):
            values = numpy_helper.to_array(tensor)[:1]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _constant_of(graph: onnx.GraphProto, op_type: str) -> TensorProto:
    """One constant for all nodes of the type, so that all of them change."""
    nodes = [node for node in graph.node if node.op_type == op_type]
    for node in nodes:
        node.input[1] = nodes[0].input[1]
    return _initializer(graph, nodes[0].input[1])


def _initializer(graph: onnx.GraphProto, name: str) -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


@pytest.mark.parametrize("change", [_cube, _mean_over_tokens, _second_reader, _half_weight])
def test_what_only_resembles_a_norm_is_not_fused(
    change: object, vectors: SteeringVectors, tmp_path: Path
) -> None:
    model = ToyDecoder("div").graph()
    change(model.graph)  # type: ignore[operator]
    path = tmp_path / "odd.onnx"
    onnx.save(model, str(path))
    plain = inject(path, vectors, tmp_path / "plain.onnx", fuse=False)
    assert inject(path, vectors, tmp_path / "fused.onnx") == plain
    assert {entry.op_type for entry in plain} == {"Steer"}


@pytest.mark.filterwarnings("error")
def test_external_weights_go_with_the_graph(vectors: SteeringVectors, tmp_path: Path) -> None:
    decoder = ToyDecoder("div")
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "toy.onnx"
    onnx.save(
        decoder.graph(), str(path), save_as_external_data=True, location="w.bin", size_threshold=200
    )
    inject(path, vectors, tmp_path / "a" / "steered.onnx")
    inject(path, vectors, tmp_path / "b" / "steered.onnx")
    assert (tmp_path / "b" / "w.bin").read_bytes() == (tmp_path / "a" / "w.bin").read_bytes()
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["steered.onnx", "w.bin"]
    inject(path, vectors, tmp_path / "b" / "steered.onnx")  # once more: the weights are there
    expected = decoder.run(IDS, as_numpy(vectors), vectors.strength)
    for folder in "ab":
        logits = run_toy(tmp_path / folder / "steered.onnx", library=True)
        np.testing.assert_allclose(logits, expected, atol=5e-6)

    # The hub's cache is made of links; the output must not be: onnx refuses linked weights.
    (tmp_path / "linked").mkdir()
    for name in ("toy.onnx", "w.bin"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "a" / name)
    inject(tmp_path / "linked" / "toy.onnx", vectors, tmp_path / "e" / "steered.onnx")
    assert not (tmp_path / "e" / "w.bin").is_symlink()

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "w.bin").write_bytes(b"another model's weights")
    with pytest.raises(FileExistsError, match="holds other weights"):
        inject(path, vectors, tmp_path / "c" / "steered.onnx")
    assert not (tmp_path / "c" / "steered.onnx").exists()

    (tmp_path / "a" / "w.bin").unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        inject(path, vectors, tmp_path / "d" / "steered.onnx")


def test_weights_outside_the_folder_are_refused(vectors: SteeringVectors, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "toy.onnx"
    onnx.save(
        ToyDecoder("div").graph(),
        str(path),
        save_as_external_data=True,
        location="w.bin",
        size_threshold=200,
    )
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    onnx.save(model, str(path))
    with pytest.raises(GraphError, match="outside its folder"):
        inject(path, vectors, tmp_path / "out" / "steered.onnx")


def test_a_file_can_be_steered_in_place(vectors: SteeringVectors, tmp_path: Path) -> None:
    decoder = ToyDecoder("div")
    path = save(decoder, tmp_path)
    inject(path, vectors, path)
    expected = decoder.run(IDS, as_numpy(vectors), vectors.strength)
    np.testing.assert_allclose(run_toy(path, library=False), expected, atol=5e-6)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_vectors_that_do_not_fit_are_refused(vectors: SteeringVectors, tmp_path: Path) -> None:
    path = save(ToyDecoder("div"), tmp_path)
    output = tmp_path / "steered.onnx"
    with pytest.raises(ValueError, match=r"blocks \[3\], but the graph has blocks 0 to 2"):
        inject(path, SteeringVectors({3: torch.ones(HIDDEN)}), output)
    with pytest.raises(ValueError, match=r"shape \[5\].*hidden size is 8"):
        inject(path, SteeringVectors({0: torch.ones(5)}), output)
    with pytest.raises(ValueError, match=r"`blocks` names \[1\]"):
        inject(path, vectors, output, blocks=[1])
    with pytest.raises(ValueError, match="no block to steer"):
        inject(path, vectors, output, blocks=[])
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 7}')
    with pytest.raises(GraphError, match="7 were expected"):
        inject(path, vectors, output)
    assert not output.exists()
