"""The structure's word against that of the names, and a user's own word over both."""

import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from grains_ext.export.errors import GraphError
from grains_ext.export.inject import inject
from grains_ext.export.locate import locate
from grains_ext.export.surgery import Injected
from grains_ext.steering.vectors import SteeringVectors
from tests.graphs import ADD_FORMS, HIDDEN, IDS, SKIP_FORMS, ToyDecoder, run_toy

VECTORS = SteeringVectors({1: torch.linspace(-1, 1, HIDDEN)}, strength=1.5)


def named(model: onnx.ModelProto, shift: int = 0) -> onnx.ModelProto:
    """The toy with node names as exporters write them, and no names that number its caches."""
    ends = [site.node for site in locate(model)]
    for position, node in enumerate(model.graph.node):
        block = sum(end < position for end in ends)
        node.name = f"/model/layers.{block + shift}/{node.op_type}_{position}"
    caches = {o.name: o.name.replace(".", "_of_") for o in model.graph.output if "." in o.name}
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = caches.get(name, name)
        for i, name in enumerate(node.input):
            node.input[i] = caches.get(name, name)
    for output in model.graph.output:
        output.name = caches.get(output.name, output.name)
    return model


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "toy.onnx"
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("form", ADD_FORMS + SKIP_FORMS)
def test_names_that_agree_change_nothing(form: str) -> None:
    plain = ToyDecoder(form).graph()
    assert locate(named(ToyDecoder(form).graph())) == locate(plain)


@pytest.mark.parametrize("where", ["name", "metadata", "weights", "outputs"])
def test_names_that_disagree_are_refused_wherever_they_stand(where: str) -> None:
    model = named(ToyDecoder("div").graph(), shift=8)
    for node in model.graph.node:
        block = re.search(r"layers\.(\d+)", node.name)[1]  # type: ignore[index]
        if where == "name":
            continue
        node.name = f"n_{node.output[0]}"
        if where == "metadata":
            value = f"['', 'model', 'model.layers.{block}', 'model.layers.{block}.mlp']"
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=value)
    if where in {"weights", "outputs"}:
        kinds = re.compile(r"(query|key|value|out|up|down)(\d)")
        weights = [tensor.name for tensor in model.graph.initializer]
        renamed = {name: kinds.sub(r"transformer.h.1\2.\1", name) for name in weights}
        if where == "outputs":
            inner = {name for node in model.graph.node for name in node.output}
            inner -= {output.name for output in model.graph.output}
            renamed = {name: f"/transformer/h.11/{name}" for name in inner}
        for node in model.graph.node:
            for field in (node.input, node.output):
                for i, name in enumerate(field):
                    field[i] = renamed.get(name, name)
        for tensor in model.graph.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
    with pytest.raises(GraphError, match=r"names in it disagree: block 0 by its place.*--map"):
        locate(model)


def test_names_of_a_few_nodes_are_outvoted() -> None:
    model = named(ToyDecoder("div").graph())
    model.graph.node[10].name = "/model/layers.2/moved_here_by_an_optimiser"
    assert len(locate(model)) == 3


def test_blocks_of_an_image_encoder_before_the_decoder_have_no_vote() -> None:
    model = named(ToyDecoder("div").graph())
    nodes = list(model.graph.node)
    tensor = nodes[0].output[0]
    nodes[0].output[0] = "patches"
    names = ["patches", *(f"vision{i}" for i in range(100)), tensor]
    encoder = [
        helper.make_node("Tanh", [below], [above], name=f"/vision/layers.7/Tanh_{above}")
        for below, above in itertools.pairwise(names)
    ]
    del model.graph.node[:]
    model.graph.node.extend([nodes[0], *encoder, *nodes[1:]])
    assert len(locate(model)) == 3


def test_a_users_own_tensors_overrule_names_and_structure(tmp_path: Path) -> None:
    decoder = ToyDecoder("div")
    path = save(named(decoder.graph(), shift=8), tmp_path)
    steered = tmp_path / "steered.onnx"
    with pytest.raises(GraphError, match="disagree"):
        inject(path, VECTORS, steered)
    injected = inject(path, VECTORS, steered, tensors={1: "sum4"})
    assert injected == [Injected(1, "SkipSteerRmsNorm", "sum4", "add")]
    expected = decoder.run(IDS, {1: VECTORS.directions[1].double().numpy()}, 1.5)
    # This toy's caches have names of their own: `run_toy` asks for the logits alone.
    np.testing.assert_allclose(run_toy(steered, library=True), expected, atol=5e-6)


def test_a_graph_that_is_no_decoder_is_steered_where_the_user_says(tmp_path: Path) -> None:
    """An encoder: no cache to tell its blocks apart."""
    model = ToyDecoder("div").graph()
    del model.graph.output[1:]
    path, steered = save(model, tmp_path), tmp_path / "steered.onnx"
    with pytest.raises(GraphError, match="it is an encoder"):
        inject(path, VECTORS, steered)
    inject(path, VECTORS, steered, tensors={1: "sum4"})
    expected = ToyDecoder("div").run(IDS, {1: VECTORS.directions[1].double().numpy()}, 1.5)
    np.testing.assert_allclose(run_toy(steered, library=True), expected, atol=5e-6)


@pytest.mark.parametrize("library", [True, False])
def test_any_nodes_output_can_be_steered(library: bool, tmp_path: Path) -> None:
    """The branch of a block, which is no sum: steered as what it is."""
    model = ToyDecoder("skip_rms").graph()
    branch = next(node for node in model.graph.node if "down1" in node.input).output[0]
    path, steered = save(model, tmp_path), tmp_path / "steered.onnx"
    (entry,) = inject(path, VECTORS, steered, tensors={1: branch})
    assert entry == Injected(1, "Steer", branch, "tensor")
    unsteered = run_toy(path, library=False)
    off = {"grains.strength": np.zeros(1, np.float32)}
    np.testing.assert_array_equal(run_toy(steered, library=library, feeds=off), unsteered)
    assert np.abs(run_toy(steered, library=library) - unsteered).max() > 0.1


@pytest.mark.parametrize("fuse", [True, False])
def test_a_sum_that_is_not_emitted_is_named_by_its_node(fuse: bool, tmp_path: Path) -> None:
    """The last fused norm of most graphs: nobody reads its sum."""
    decoder = ToyDecoder("skip_rms")
    model = decoder.graph()
    last = model.graph.node[locate(model)[2].node]
    last.name = "/model/norm"
    path, steered = save(model, tmp_path), tmp_path / "steered.onnx"
    vectors = SteeringVectors({2: VECTORS.directions[1]}, strength=1.5)
    (entry,) = inject(path, vectors, steered, tensors={2: "/model/norm"}, fuse=fuse)
    assert entry.site == "skip_norm"
    expected = decoder.run(IDS, {2: vectors.directions[2].double().numpy()}, 1.5)
    np.testing.assert_allclose(run_toy(steered, library=True), expected, atol=5e-6)


def test_tensors_that_are_not_there_are_named(tmp_path: Path) -> None:
    path, steered = save(ToyDecoder("div").graph(), tmp_path), tmp_path / "steered.onnx"
    with pytest.raises(GraphError, match=r"makes a tensor 'sum44', or is called so.*'sum4'"):
        inject(path, VECTORS, steered, tensors={1: "sum44"})
    with pytest.raises(ValueError, match=r"`tensors` names blocks \[2\]"):
        inject(path, VECTORS, steered, tensors={2: "sum6"})
    both = SteeringVectors({0: torch.ones(HIDDEN), 1: torch.ones(HIDDEN)})
    with pytest.raises(GraphError, match=r"blocks \[0, 1\] would be steered at one node"):
        inject(path, both, steered, tensors={0: "sum4"})
    with pytest.raises(ValueError, match=r"hidden size is 16"):
        inject(path, VECTORS, steered, tensors={1: "logits"})
    assert not steered.exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    path = save(ToyDecoder("skip_layer").graph(), tmp_path)
    vectors = SteeringVectors({0: torch.ones(HIDDEN), 2: torch.ones(HIDDEN)})
    planned = inject(path, vectors, dry_run=True)
    assert planned == inject(path, vectors, tmp_path / "steered.onnx")
    assert planned == [
        Injected(0, "SkipSteerLayerNorm", "sum2", "skip_norm"),
        Injected(2, "SkipSteerLayerNorm", "grains.layers.2.residual", "skip_norm"),
    ]
    (tmp_path / "steered.onnx").unlink()
    inject(path, vectors, tmp_path / "steered.onnx", dry_run=True)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.onnx"]
    with pytest.raises(ValueError, match="`output_path` is missing"):
        inject(path, vectors)


def test_statistics_that_nobody_reads_do_not_hinder_fusing(tmp_path: Path) -> None:
    model = ToyDecoder("skip_rms").graph()
    for i, node in enumerate(model.graph.node):
        if node.op_type.startswith("Skip") and len(node.output) > 3:
            node.output[1], node.output[2] = f"mean{i}", f"deviation{i}"
    path = save(model, tmp_path)
    (entry,) = inject(path, VECTORS, tmp_path / "steered.onnx")
    assert entry.op_type == "SkipSteerRmsNorm"
    model.graph.node.append(helper.make_node("Identity", [node_output(model, 1, 2)], ["read"]))
    (entry,) = inject(save(model, tmp_path), VECTORS, tmp_path / "steered.onnx")
    assert entry.op_type == "Steer"


def node_output(model: onnx.ModelProto, block: int, output: int) -> str:
    return model.graph.node[locate(model)[block].node].output[output]
