"""Finding each decoder block's output in a graph by structure alone."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from grains_ext import export
from grains_ext.decoder import DecoderView
from grains_ext.export.errors import GraphError
from grains_ext.export.locate import locate
from grains_ext.export.reading import blocks_in_config, load_graph
from tests.exports import exported_llama
from tests.graphs import ADD_FORMS, SKIP_FORMS, ToyDecoder


def test_sites_of_an_exported_model_hold_its_block_outputs(tmp_path: Path) -> None:
    exported = exported_llama()
    graph = load_graph(exported.folder / "model_unsteered.onnx")
    sites = locate(graph, n_blocks=4)
    for site in sites:
        graph.graph.output.append(
            helper.make_tensor_value_info(site.tensor, TensorProto.FLOAT, None)
        )
    path = exported.folder / "with_sites.onnx"  # beside its external weights
    onnx.save(graph, str(path))
    session = export.session(path)
    path.unlink()

    ids = torch.tensor([[1, 9, 30, 77, 5]])
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.arange(5)[None],
    }
    for value in session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = session.run([site.tensor for site in sites], feeds)
    with torch.no_grad(), DecoderView.of(exported.model).capture() as expected:
        exported.model(ids)
    for site, output in zip(sites, found, strict=True):
        np.testing.assert_allclose(output, expected[site.block].numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ADD_FORMS + SKIP_FORMS)
def test_every_form_has_one_site_per_block(form: str) -> None:
    graph = ToyDecoder(form).graph()
    sites = locate(graph)
    assert [site.block for site in sites] == [0, 1, 2]
    assert {site.kind for site in sites} == {"skip_norm" if form in SKIP_FORMS else "add"}
    last = "" if form in SKIP_FORMS else "sum6"
    assert [site.tensor for site in sites] == ["sum2", "sum4", last]
    nodes = graph.graph.node
    assert all(site.tensor in nodes[site.node].output for site in sites[:-1])


def test_parallel_blocks_end_at_their_last_partial_sum() -> None:
    sites = locate(ToyDecoder(parallel=True).graph())
    assert [site.tensor for site in sites] == ["sum2", "sum4", "sum6"]


@settings(max_examples=10)
@given(st.permutations(range(400)), st.booleans())
def test_names_play_no_part(order: list[int], swap: bool) -> None:
    graph = ToyDecoder("div", n_blocks=2).graph()
    before = [site.node for site in locate(graph)]
    keep = {value.name for value in (*graph.graph.input, *graph.graph.output)}
    fresh: dict[str, str] = {}
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name not in keep:
                    names[i] = fresh.setdefault(name, f"x{order[len(fresh)]}")
        if swap and node.op_type in {"Add", "Mul"}:
            node.input[0], node.input[1] = node.input[1], node.input[0]
    for tensor in graph.graph.initializer:
        tensor.name = fresh[tensor.name]
    assert [site.node for site in locate(graph)] == before


def test_cache_outputs_need_no_known_names() -> None:
    graph = ToyDecoder("div").graph()
    names = {
        f"present.{i}.{kind}": f"cache_{kind}_of_{i}" for i in range(3) for kind in ("key", "value")
    }
    for node in graph.graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = names.get(name, name)
    for value in graph.graph.output:
        value.name = names.get(value.name, value.name)
    assert [site.block for site in locate(graph)] == [0, 1, 2]


@pytest.mark.parametrize("op_type", ["Cast", "Identity", "Reshape"])
def test_the_stream_is_followed_through_nodes_that_keep_values(op_type: str) -> None:
    decoder = ToyDecoder("div")
    graph = decoder.graph()
    expected = len(locate(graph))
    nodes = list(graph.graph.node)
    site = locate(graph)[0]
    moved = "moved"
    if op_type == "Cast":
        extra = helper.make_node("Cast", [site.tensor], [moved], to=TensorProto.FLOAT)
    elif op_type == "Reshape":
        graph.graph.initializer.append(
            helper.make_tensor("keep", TensorProto.INT64, [3], [0, 0, -1])
        )
        extra = helper.make_node("Reshape", [site.tensor, "keep"], [moved])
    else:
        extra = helper.make_node("Identity", [site.tensor], [moved])
    for node in nodes[site.node + 1 :]:
        if node.op_type == "Add":  # the next residual addition alone reads the moved tensor
            for i, name in enumerate(node.input):
                if name == site.tensor:
                    node.input[i] = moved
    nodes.insert(site.node + 1, extra)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    assert len(locate(graph)) == expected


@pytest.mark.parametrize("fused", [False, True])
def test_features_added_between_blocks_are_no_part_of_one(fused: bool) -> None:
    """As by models that add image features to the outputs of their first blocks."""
    graph = ToyDecoder("simplified").graph()
    expected = [site.tensor for site in locate(graph)]
    for tensor in expected[:2]:
        nodes, moved, features = list(graph.graph.node), f"{tensor}_moved", f"{tensor}_features"
        given = helper.make_tensor_value_info(features, TensorProto.FLOAT, ["batch", "tokens", 8])
        graph.graph.input.append(given)
        readers = [node for node in nodes if tensor in node.input]
        for node in readers:
            node.input[list(node.input).index(tensor)] = moved
        norm = next(node for node in readers if node.op_type == "SimplifiedLayerNormalization")
        if fused:
            norm.op_type, norm.domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
            norm.input[:] = [tensor, features, norm.input[1]]
            norm.output.extend(["", "", moved])
            del norm.attribute[:]
        else:
            addition = helper.make_node("Add", [features, tensor], [moved])
            nodes.insert(nodes.index(norm), addition)
        del graph.graph.node[:]
        graph.graph.node.extend(nodes)
    assert [site.tensor for site in locate(graph)] == expected


def test_a_wrong_block_count_is_refused() -> None:
    with pytest.raises(GraphError, match=r"3 decoder blocks.*but 12 were expected"):
        locate(ToyDecoder("div").graph(), n_blocks=12)


def test_names_that_disagree_with_the_structure_are_refused() -> None:
    graph = ToyDecoder("div").graph()
    swap = {"present.1.key": "present.2.key", "present.2.key": "present.1.key"}
    for node in graph.graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = swap.get(name, name)
    with pytest.raises(GraphError, match="belongs to block"):
        locate(graph)


def test_a_graph_without_a_cache_is_refused() -> None:
    graph = ToyDecoder("div").graph()
    del graph.graph.output[1:]
    with pytest.raises(GraphError, match=r"no key/value cache outputs.*use_cache=True"):
        locate(graph)


def test_a_graph_without_logits_is_refused() -> None:
    graph = ToyDecoder("div").graph()
    del graph.graph.output[0]
    with pytest.raises(GraphError, match="no 'logits' output"):
        locate(graph)


def test_blocks_without_a_cache_of_their_own_are_refused() -> None:
    graph = ToyDecoder("div").graph()
    kept = [o for o in graph.graph.output if not o.name.startswith("present.1.")]
    for value in kept:
        value.name = value.name.replace("present.2.", "cache_")
    for node in graph.graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = name.replace("present.2.", "cache_")
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
    with pytest.raises(GraphError, match="not the same number in every block"):
        locate(graph)


def test_a_decoder_inside_a_control_flow_node_is_refused() -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "branch", [], [])
    graph = helper.make_model(
        helper.make_graph(
            [helper.make_node("If", ["flag"], ["logits", "present.0.key"], then_branch=inner)],
            "merged",
            [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 8]),
                helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["b", 1, "p", 8]),
            ],
        )
    )
    with pytest.raises(GraphError, match="inside an If or Loop"):
        locate(graph)


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        load_graph(tmp_path / "absent.onnx")
    path = tmp_path / "model.onnx"
    for content in (b"", b"PK\x03\x04 not a model", b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(GraphError, match="not an ONNX"):
            load_graph(path)


def test_the_block_count_is_read_from_configurations(tmp_path: Path) -> None:
    assert blocks_in_config(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    assert blocks_in_config(tmp_path) == 3
    genai = {"model": {"decoder": {"num_hidden_layers": 5}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(genai))
    assert blocks_in_config(tmp_path) == 5
