"""Steering taken out of a graph again, and replaced by other steering."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, inliner

from grains_ext import export
from grains_ext.export.errors import GraphError
from grains_ext.export.inject import inject, remove_steering
from grains_ext.export.undo import RECORD_KEY
from grains_ext.steering.vectors import SteeringVectors
from tests.graphs import ADD_FORMS, HIDDEN, IDS, SKIP_FORMS, ToyDecoder, run_toy


def random_vectors(seed: int, blocks: tuple[int, ...] = (0, 2)) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    directions = {block: torch.randn(HIDDEN, generator=generator) for block in blocks}
    return SteeringVectors(directions, strength=1.5)


def content(path: Path) -> bytes:
    return onnx.load(str(path), load_external_data=False).SerializeToString(deterministic=True)


def save(model: onnx.ModelProto, path: Path, **options: object) -> Path:
    onnx.save(model, str(path), **options)
    return path


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", ADD_FORMS + SKIP_FORMS)
def test_what_is_removed_leaves_the_file_as_it_was(form: str, fuse: bool, tmp_path: Path) -> None:
    path = save(ToyDecoder(form).graph(), tmp_path / "toy.onnx")
    before = content(path)
    steered = tmp_path / "steered.onnx"
    inject(path, random_vectors(1), steered, fuse=fuse)
    assert content(steered) != before
    remove_steering(steered, tmp_path / "restored.onnx")
    assert content(tmp_path / "restored.onnx") == before
    remove_steering(steered, steered)
    assert content(steered) == before


@pytest.mark.parametrize(
    "options", [{"baked": True}, {"bank": True}, {"default_index": None}], ids=str
)
def test_every_way_to_steer_can_be_removed(options: dict, tmp_path: Path) -> None:
    path = save(ToyDecoder("skip_layer_bias").graph(), tmp_path / "toy.onnx")
    vectors = [random_vectors(1), random_vectors(2, (1,))]
    bank = "baked" not in options
    options = {name: value for name, value in options.items() if name != "bank"}
    inject(path, vectors if bank else vectors[0], tmp_path / "steered.onnx", **options)
    remove_steering(tmp_path / "steered.onnx", tmp_path / "restored.onnx")
    assert content(tmp_path / "restored.onnx") == content(path)


def test_inputs_with_defaults_functions_and_old_versions_survive(tmp_path: Path) -> None:
    """Nothing that the file had before is taken for steering."""
    model = ToyDecoder("div").graph()
    model.ir_version = 8
    for tensor in list(model.graph.initializer)[:3]:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(value)
    node = helper.make_node("Identity", ["x"], ["y"])
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("other", "Same", ["x"], ["y"], [node], opsets))
    model.opset_import.append(helper.make_opsetid("other", 1))
    model.metadata_props.add(key="made by", value="a test")
    path = save(model, tmp_path / "toy.onnx")
    inject(path, random_vectors(1), tmp_path / "steered.onnx")
    assert onnx.load(str(tmp_path / "steered.onnx")).ir_version == 9
    remove_steering(tmp_path / "steered.onnx", tmp_path / "restored.onnx")
    assert content(tmp_path / "restored.onnx") == content(path)


def test_external_weights_stay_where_they_are(tmp_path: Path) -> None:
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 200}
    path = save(ToyDecoder("div").graph(), tmp_path / "toy.onnx", **options)
    weights = tmp_path / "w.bin"
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    inject(path, random_vectors(1), tmp_path / "steered.onnx")
    remove_steering(tmp_path / "steered.onnx", tmp_path / "restored.onnx")
    assert content(tmp_path / "restored.onnx") == content(path)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before


@pytest.mark.parametrize("form", ["div", "skip_rms_bias", "layer_norm"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_graph_with_its_functions_inlined_is_restored(
    form: str, fuse: bool, tmp_path: Path
) -> None:
    path = save(ToyDecoder(form).graph(), tmp_path / "toy.onnx")
    steered, inlined = tmp_path / "steered.onnx", tmp_path / "inlined.onnx"
    inject(path, [random_vectors(1), random_vectors(2)], steered, fuse=fuse)
    flat = inliner.inline_local_functions(onnx.load(str(steered)))
    assert not [node for node in flat.graph.node if node.domain == "grains"]
    save(flat, inlined)
    remove_steering(inlined, tmp_path / "restored.onnx")
    restored, before = onnx.load(str(tmp_path / "restored.onnx")), onnx.load(str(path))
    assert list(restored.graph.node) == list(before.graph.node)
    assert list(restored.graph.initializer) == list(before.graph.initializer)
    assert list(restored.graph.input) == list(before.graph.input)


def test_what_others_added_since_is_kept(tmp_path: Path) -> None:
    path = save(ToyDecoder("div").graph(), tmp_path / "toy.onnx")
    steered = tmp_path / "steered.onnx"
    inject(path, random_vectors(1), steered)
    model = onnx.load(str(steered))
    model.graph.node.append(helper.make_node("Identity", ["sum2"], ["hidden_states"]))
    kind = onnx.TensorProto.FLOAT
    shape = ["batch", "tokens", HIDDEN]
    model.graph.output.append(helper.make_tensor_value_info("hidden_states", kind, shape))
    save(model, steered)
    remove_steering(steered, tmp_path / "restored.onnx")
    onnx.checker.check_model(str(tmp_path / "restored.onnx"))
    session = export.session(tmp_path / "restored.onnx", library=False)
    assert "hidden_states" in [output.name for output in session.get_outputs()]
    logits = run_toy(tmp_path / "restored.onnx", library=False)
    np.testing.assert_array_equal(logits, run_toy(path, library=False))


@pytest.mark.parametrize("first", [{"fuse": True}, {"fuse": False}, {"baked": True}], ids=str)
def test_steering_a_steered_graph_replaces_its_steering(first: dict, tmp_path: Path) -> None:
    decoder = ToyDecoder("skip_rms")
    path = save(decoder.graph(), tmp_path / "toy.onnx")
    twice, once = tmp_path / "twice.onnx", tmp_path / "once.onnx"
    inject(path, [random_vectors(1)], twice, **first)
    other = random_vectors(2, (1,))
    inject(twice, other, twice)
    inject(path, other, once)
    assert content(twice) == content(once)
    expected = decoder.run(IDS, {1: other.directions[1].double().numpy()}, 1.5)
    np.testing.assert_allclose(run_toy(twice, library=False), expected, atol=5e-6)


def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    path = save(ToyDecoder("div").graph(), tmp_path / "toy.onnx")
    steered, output = tmp_path / "steered.onnx", tmp_path / "restored.onnx"
    with pytest.raises(GraphError, match="is not steered: there is nothing to remove"):
        remove_steering(path, output)
    inject(path, random_vectors(1), steered)
    model = onnx.load(str(steered))

    def with_record(change: dict) -> Path:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        record = json.loads(copy.metadata_props[0].value)
        copy.metadata_props[0].value = json.dumps(record | change)
        return save(copy, tmp_path / "changed.onnx")

    with pytest.raises(GraphError, match="another version of grains_ext"):
        remove_steering(with_record({"format": 2}), output)
    for damage in (
        {"nodes": "no base64!"},
        {"nodes": "AAAA"},
        {"positions": [0] * 12},
        {"n_nodes": 1},
        {"added": None},
    ):
        with pytest.raises(GraphError, match="record of the unsteered graph is damaged"):
            remove_steering(with_record(damage), output)
    del model.metadata_props[:]
    save(model, steered)
    for call in (remove_steering, lambda *a: inject(a[0], random_vectors(2), a[1])):
        with pytest.raises(GraphError, match=f"'{RECORD_KEY}'.* is gone"):
            call(steered, output)
    assert not output.exists()


def test_a_graph_that_no_longer_fits_its_record_is_refused(tmp_path: Path) -> None:
    path = save(ToyDecoder("skip_rms").graph(), tmp_path / "toy.onnx")
    steered = tmp_path / "steered.onnx"
    inject(path, random_vectors(1), steered)
    model = onnx.load(str(steered))
    fused = next(node for node in model.graph.node if node.domain == "grains")
    fused.op_type, fused.domain = "Split", ""
    del fused.input[1:], fused.attribute[:]
    fused.output.append("third")
    model.graph.node.append(helper.make_node("Identity", ["third"], ["extra"]))
    save(model, steered)
    with pytest.raises(GraphError, match="was changed after it was steered"):
        remove_steering(steered, tmp_path / "restored.onnx")
