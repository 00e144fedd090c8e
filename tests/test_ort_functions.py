"""Function bodies of the ops: one file for an onnxruntime with and without the op library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from grains_ext.export import functions, runtime
from tests.onnx_models import (
    DTYPES,
    OPS,
    assert_close,
    cpu_session,
    expected,
    make_model,
    node_model,
    optimized_ops,
    random_feeds,
    run,
)

STEERING_OPS = ("Steer", "SkipSteerRmsNorm", "SkipSteerLayerNorm")
OPSETS = (17, 18, 21)


def both_sessions(model: onnx.ModelProto) -> tuple[Any, Any]:
    """The same model on an onnxruntime without and with the op library."""
    return cpu_session(model, library=False), cpu_session(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op_type", OPS)
def test_function_matches_reference_and_kernel(
    op_type: str, opset: int, dtype: torch.dtype
) -> None:
    model = node_model(op_type, list(random_feeds(op_type, 1)), dtype=dtype, opset=opset)
    function, kernel = both_sessions(model)
    for dim in (1, 7, 127, 896):
        feeds = random_feeds(op_type, dim, dtype=dtype, seed=dim)
        result = run(function, feeds)
        assert_close(result, expected(op_type, feeds), dtype)
        assert_close(result, run(kernel, feeds), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_type", STEERING_OPS)
def test_bank_with_index(op_type: str, dtype: torch.dtype) -> None:
    feeds = random_feeds(op_type, 64, batch=3, tokens=5, bank=4, dtype=dtype)
    function, kernel = both_sessions(node_model(op_type, list(feeds), dtype=dtype, opset=17))
    variants: list[dict[str, torch.Tensor]] = [
        {},
        {"index": torch.tensor([3, -1, 0], dtype=torch.int32)},  # one for each batch row
        {"strength": torch.tensor(1.5)},
        {
            "vectors": feeds["vectors"][0],
            "strength": torch.tensor([2.0]),
            "index": 0 * feeds["index"],
        },
    ]
    for variant in variants:
        given = {**feeds, **variant}
        result = run(function, given)
        assert_close(result, expected(op_type, given), dtype)
        assert_close(result, run(kernel, given), dtype)


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Steer", {"epsilon": 0.5}),
        ("SkipSteerRmsNorm", {"epsilon": 0.25, "weight_offset": 1.0}),
        ("SkipSteerLayerNorm", {"epsilon": 0.25}),
    ],
)
def test_attributes(op_type: str, attributes: dict[str, float]) -> None:
    feeds = random_feeds(op_type, 31)
    rows = feeds["hidden" if op_type == "Steer" else "x"]
    feeds["vectors"], feeds["strength"] = -0.8 * rows[0, 0], torch.tensor(1.0)
    function, kernel = both_sessions(node_model(op_type, list(feeds), attributes=attributes))
    result = run(function, feeds)
    assert_close(result, expected(op_type, feeds, attributes), torch.float32)
    assert_close(result, run(kernel, feeds), torch.float32)


def test_layer_norm_without_bias() -> None:
    feeds = random_feeds("SkipSteerLayerNorm", 33)
    del feeds["bias"]
    function, _ = both_sessions(node_model("SkipSteerLayerNorm", list(feeds)))
    assert_close(run(function, feeds), expected("SkipSteerLayerNorm", feeds), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsteered_rows_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    feeds = random_feeds("Steer", 65, bank=2, dtype=dtype)
    feeds["hidden"][0, 0, 3] = float("nan")
    function, _ = both_sessions(node_model("Steer", list(feeds), dtype=dtype))
    for variant in ({"strength": torch.zeros(2)}, {"index": feeds["index"] * 0 - 1}):
        (steered,) = run(function, {**feeds, **variant})
        assert steered.numpy().tobytes() == feeds["hidden"].float().numpy().tobytes()


def test_rows_that_cannot_be_steered() -> None:
    feeds = random_feeds("Steer", 16, tokens=4)
    feeds["strength"] = torch.tensor(1.0)
    feeds["hidden"][0, 0] = -feeds["vectors"]  # the sum is nothing: the row comes back
    feeds["hidden"][0, 1] = 0.0
    feeds["hidden"][0, 2, 3] = float("nan")
    function, kernel = both_sessions(node_model("Steer", list(feeds)))
    (steered,) = result = run(function, feeds)
    assert torch.equal(steered[0, 0], feeds["hidden"][0, 0])
    assert torch.equal(steered[0, 1], torch.zeros(16))
    assert steered[0, 2].isnan().all()
    assert_close(result, run(kernel, feeds), torch.float32)


def test_interpolation_ends_are_exact() -> None:
    feeds = random_feeds("IgInterpolate", 33)
    feeds["alphas"] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    function, _ = both_sessions(node_model("IgInterpolate", list(feeds)))
    (points,) = run(function, feeds)
    baseline = feeds["baseline"].expand_as(feeds["input"])
    assert torch.equal(points[0, 0], baseline[0])
    assert torch.equal(points[0, 1], feeds["input"][1])
    assert torch.equal(points[1, 0], feeds["input"][0])
    assert torch.equal(points[1, 1], baseline[1])


@pytest.mark.parametrize("op_type", [op for op in OPS if op != "IgAccumulate"])
@pytest.mark.parametrize("size", [{"batch": 0}, {"tokens": 0}], ids=str)
@pytest.mark.parametrize("bank", [None, 2])
def test_no_rows(op_type: str, size: dict[str, int], bank: int | None) -> None:
    feeds = random_feeds(op_type, 16, bank=bank, **size)
    function, _ = both_sessions(node_model(op_type, list(feeds)))
    for got, want in zip(run(function, feeds), expected(op_type, feeds), strict=True):
        assert got.shape == want.shape


@pytest.mark.parametrize("entry", [3, -2])
def test_index_out_of_range_is_refused(entry: int) -> None:
    feeds = random_feeds("Steer", 8, bank=3)
    feeds["index"][0, 1] = entry
    for session in both_sessions(node_model("Steer", list(feeds))):
        with pytest.raises(Exception, match=r"indices element out of|`index` has"):
            run(session, feeds)


def test_bank_without_index_is_refused() -> None:
    feeds = random_feeds("Steer", 8)
    feeds["vectors"] = torch.zeros(3, 8)
    for session in both_sessions(node_model("Steer", list(feeds))):
        with pytest.raises(Exception, match=r"broadcast|`index` is missing"):
            run(session, feeds)


# --- one file, two runtimes -----------------------------------------------------------------------


@pytest.mark.parametrize("op_type", OPS)
def test_stock_runtime_inlines_and_the_library_fuses(op_type: str, tmp_path: Path) -> None:
    bank = 3 if op_type in STEERING_OPS else None
    model = node_model(op_type, list(random_feeds(op_type, 8, bank=bank)))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(_with_ranks(model)))
    stock = optimized_ops(model, tmp_path, library=False)
    assert op_type not in stock
    assert stock.total() > 1
    assert optimized_ops(model, tmp_path, library=True) == {op_type: 1}


def _with_ranks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker wants a shape on every graph input and output, if only with unknown sizes."""
    ranks = {"strength": 1, "index": 2, "vectors": 2, "weight": 1, "bias": 1, "baseline": 2}
    ranks.update(alphas=2, weights=1, grads=4, interpolated=4, attributions=2)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        for _ in range(ranks.get(value.name, 3)):
            value.type.tensor_type.shape.dim.add()
    return copy


def test_nodes_in_subgraphs(tmp_path: Path) -> None:
    """A node in a branch of an If gets its function, and its kernel, as one outside does."""

    def branch(name: str, op_type: str, inputs: list[str], domain: str) -> onnx.GraphProto:
        node = helper.make_node(op_type, inputs, [name], domain=domain)
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output])

    node = helper.make_node(
        "If",
        ["steered"],
        ["out"],
        then_branch=branch("yes", "Steer", ["hidden", "vectors", "strength"], "grains"),
        else_branch=branch("no", "Identity", ["hidden"], ""),
    )
    feeds = random_feeds("Steer", 8)
    values = [helper.make_tensor_value_info("steered", TensorProto.BOOL, [])]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feeds]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    model = make_model(helper.make_graph([node], "test", values, [output]))
    assert [function.name for function in model.functions] == ["Steer"]
    for session in both_sessions(model):
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        for steered in (torch.tensor(True), torch.tensor(False)):
            result = torch.from_numpy(session.run(None, {**arrays, "steered": steered.numpy()})[0])
            wanted = expected("Steer", feeds) if steered else [feeds["hidden"]]
            assert_close([result], wanted, torch.float32)


# --- add_functions --------------------------------------------------------------------------------


def test_add_functions_is_idempotent_and_sets_what_the_file_needs() -> None:
    model = node_model("Steer", ["hidden", "vectors", "strength"])
    functions.add_functions(model)
    assert [(f.domain, f.name) for f in model.functions] == [("grains", "Steer")]
    del model.opset_import[1]
    model.ir_version = 8
    functions.add_functions(model)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "grains": 1}
    assert model.ir_version == 9


def test_model_without_our_nodes_is_left_alone() -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([node], "test", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    before = model.SerializeToString()
    functions.add_functions(model)
    assert model.SerializeToString() == before


LAYER_NORM_INPUTS = ["x", "skip", "vectors", "strength", "weight", "", "index"]


@pytest.mark.parametrize(
    ("nodes", "opset", "message"),
    [
        (
            [("Steer", ["h", "v", "s"]), ("Steer", ["h", "v", "s", "i"])],
            21,
            "other optional inputs",
        ),
        ([("Steer", ["h", "v", "s"])], 16, "imports opset 16; the function bodies need 17"),
        ([("Stear", ["h", "v", "s"])], 21, "unknown op 'Stear'"),
        ([("Steer", ["h", "v"])], 21, "expected .*'strength'.* may be left out"),
        ([("Steer", ["h", "", "s"])], 21, "expected .*'vectors'"),
        ([("Steer", ["h", "v", "s", "i", "j"])], 21, "expected .*'hidden'"),
        ([("SkipSteerLayerNorm", LAYER_NORM_INPUTS)], 21, "give a `bias` of zeros"),
    ],
)
def test_wrong_nodes_are_named(
    nodes: list[tuple[str, list[str]]], opset: int, message: str
) -> None:
    graph = helper.make_graph(
        [
            helper.make_node(op_type, inputs, [f"out{i}"], name=f"node{i}", domain="grains")
            for i, (op_type, inputs) in enumerate(nodes)
        ],
        "test",
        [],
        [],
    )
    with pytest.raises(ValueError, match=message):
        make_model(graph, opset)


def test_function_proto_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="unknown op 'Tilt'"):
        functions.function_proto("Tilt", 21)
    with pytest.raises(ValueError, match="takes no input `index`"):
        functions.function_proto("IgAccumulate", 21, with_index=True)
    with pytest.raises(ValueError, match="give a `bias` of zeros"):
        functions.function_proto("SkipSteerLayerNorm", 21, with_index=True, with_bias=False)


# --- runtime --------------------------------------------------------------------------------------


def test_session_takes_a_path_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = random_feeds("Steer", 8)
    path = tmp_path / "steer.onnx"
    onnx.save(node_model("Steer", list(feeds)), path)
    assert_close(run(runtime.session(path), feeds), expected("Steer", feeds), torch.float32)
    with pytest.raises(FileNotFoundError, match="no model file"):
        runtime.session(tmp_path / "other.onnx")
    monkeypatch.setattr(runtime, "_LIBRARY_NAME", "libgrains_nothing.so")
    with pytest.raises(FileNotFoundError, match="have not been built"):
        runtime.session(path)


def test_missing_onnxruntime_is_said() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from grains_ext.export import runtime\n"
        "try:\n    runtime.require_onnxruntime()\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'grains_ext[cpu]'" in result.stdout, result.stderr
