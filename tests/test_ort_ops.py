"""The compiled onnxruntime op library against the float64 reference."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from grains_ext.export import runtime
from grains_ext.export.functions import add_functions
from tests.onnx_models import (
    DTYPES,
    ELEMENT_TYPES,
    OPS,
    assert_close,
    cpu_session,
    expected,
    make_model,
    node_model,
    optimized_ops,
    random_feeds,
    run,
    session_options,
)

STEERING_OPS = ("Steer", "SkipSteerRmsNorm", "SkipSteerLayerNorm")
DIMS = (1, 3, 7, 64, 127, 896, 4096)


def kernel_session(op_type: str, inputs: Any, **model: Any) -> Any:
    """A session that has the kernels only: without them, it could not be made."""
    proto = node_model(op_type, list(inputs), functions=False, **model)
    return cpu_session(proto)


@functools.cache
def steer_session() -> Any:
    return kernel_session("Steer", ("hidden", "vectors", "strength"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_type", OPS)
def test_kernel_matches_reference(op_type: str, dtype: torch.dtype) -> None:
    session = kernel_session(op_type, random_feeds(op_type, 1), dtype=dtype)
    for dim in DIMS:
        feeds = random_feeds(op_type, dim, dtype=dtype, seed=dim)
        assert_close(run(session, feeds), expected(op_type, feeds), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_type", STEERING_OPS)
def test_bank_with_index(op_type: str, dtype: torch.dtype) -> None:
    feeds = random_feeds(op_type, 64, batch=3, tokens=5, bank=4, dtype=dtype)
    session = kernel_session(op_type, feeds, dtype=dtype)
    variants: list[dict[str, torch.Tensor]] = [
        {},
        {"index": torch.tensor([3, -1, 0], dtype=torch.int32)},  # one for each batch row
        {"strength": torch.tensor(1.5)},
        {"strength": torch.tensor([2.0])},
        {
            "vectors": feeds["vectors"][0],
            "strength": torch.tensor(2.0),
            "index": feeds["index"] & 0,
        },
    ]
    for variant in variants:
        given_feeds = {**feeds, **variant}
        assert_close(run(session, given_feeds), expected(op_type, given_feeds), dtype)


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
    # Nearly opposite to the rows, so that the epsilon of Steer decides.
    rows = feeds["hidden" if op_type == "Steer" else "x"]
    feeds["vectors"], feeds["strength"] = -0.8 * rows[0, 0], torch.tensor(1.0)
    session = kernel_session(op_type, feeds, attributes=attributes)
    actual = run(session, feeds)
    assert_close(actual, expected(op_type, feeds, attributes), torch.float32)
    assert not torch.equal(actual[0], run(kernel_session(op_type, feeds), feeds)[0])


def test_layer_norm_without_bias() -> None:
    feeds = random_feeds("SkipSteerLayerNorm", 33)
    del feeds["bias"]
    session = kernel_session("SkipSteerLayerNorm", feeds)
    assert_close(run(session, feeds), expected("SkipSteerLayerNorm", feeds), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsteered_rows_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    feeds = random_feeds("Steer", 65, bank=2, dtype=dtype)
    feeds["hidden"][0, 0, 3] = float("nan")
    feeds["hidden"][0, 1, 3] = -0.0
    session = kernel_session("Steer", feeds, dtype=dtype)
    for variant in ({"strength": torch.zeros(2)}, {"index": feeds["index"] * 0 - 1}):
        (steered,) = run(session, {**feeds, **variant})
        wanted = feeds["hidden"].float().numpy()
        assert steered.numpy().tobytes() == wanted.tobytes()


@given(
    rows=st.integers(1, 5),
    dim=st.integers(1, 40),
    scale=st.floats(-30, 30).map(lambda exponent: 10.0**exponent),
    strength=st.floats(-8, 8),
    seed=st.integers(0, 999),
)
def test_steering_keeps_the_norm_at_any_scale(
    rows: int, dim: int, scale: float, strength: float, seed: int
) -> None:
    feeds = random_feeds("Steer", dim, batch=1, tokens=rows, seed=seed)
    feeds["hidden"] *= scale
    feeds["vectors"] *= scale
    feeds["strength"] = torch.tensor(strength)
    (steered,) = run(steer_session(), feeds)
    before, after = (t.double().norm(dim=-1) for t in (feeds["hidden"], steered))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0.0)


def test_bad_rows_stay_in_their_row() -> None:
    feeds = random_feeds("Steer", 64, tokens=6)
    session = steer_session()
    clean = run(session, feeds)[0]
    feeds["hidden"][0, 1, 5], feeds["hidden"][1, 2, 0] = float("nan"), float("inf")
    feeds["hidden"][1, 4] = 0.0
    (steered,) = run(session, feeds)
    assert steered[0, 1].isnan().all()
    assert steered[1, 2].isnan().all()
    assert torch.equal(steered[1, 4], torch.zeros(64))
    untouched = torch.ones(2, 6, dtype=torch.bool)
    untouched[0, 1] = untouched[1, 2] = untouched[1, 4] = False
    assert torch.equal(steered[untouched], clean[untouched])


@pytest.mark.parametrize("op_type", OPS)
@pytest.mark.parametrize("size", [{"batch": 0}, {"tokens": 0}], ids=str)
def test_no_rows(op_type: str, size: dict[str, int]) -> None:
    feeds = random_feeds(op_type, 16, **size)
    for got, want in zip(
        run(kernel_session(op_type, feeds), feeds), expected(op_type, feeds), strict=True
    ):
        assert got.shape == want.shape


@pytest.mark.parametrize("op_type", STEERING_OPS)
def test_a_row_without_a_batch(op_type: str) -> None:
    feeds = {
        name: value[0, 0] if value.dim() == 3 else value
        for name, value in random_feeds(op_type, 16, bank=3).items()
    }
    for member in (-1, 0, 2):
        feeds["index"] = torch.tensor(member, dtype=torch.int32)
        assert_close(
            run(kernel_session(op_type, feeds), feeds), expected(op_type, feeds), torch.float32
        )


@pytest.mark.parametrize("shape", [(2, 3, 0), (2**40, 0, 8), (2**40, 2**20, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...]) -> None:
    """Of a size that could not be had in memory, were one of its dimensions not 0."""
    for op_type in STEERING_OPS:
        feeds = random_feeds(op_type, shape[-1])
        feeds |= {name: torch.empty(shape) for name in ("hidden", "x", "skip") if name in feeds}
        for output in run(kernel_session(op_type, feeds), feeds):
            assert output.shape == shape


def test_no_steps() -> None:
    feeds = random_feeds("IgInterpolate", 8) | {"alphas": torch.empty(0)}
    assert run(kernel_session("IgInterpolate", feeds), feeds)[0].shape == (0, 2, 3, 8)
    feeds = random_feeds("IgAccumulate", 8)
    feeds |= {"grads": torch.empty(0, 2, 3, 8), "weights": torch.empty(0)}
    assert torch.equal(run(kernel_session("IgAccumulate", feeds), feeds)[0], torch.zeros(2, 3))
    feeds = random_feeds("IgAccumulate", 0)
    assert torch.equal(run(kernel_session("IgAccumulate", feeds), feeds)[0], torch.zeros(2, 3))


def test_an_index_after_a_bias_that_is_not_there() -> None:
    feeds = random_feeds("SkipSteerLayerNorm", 16, bank=2)
    del feeds["bias"]
    names = ["x", "skip", "vectors", "strength", "weight", "", "index"]
    assert_close(
        run(kernel_session("SkipSteerLayerNorm", names), feeds),
        expected("SkipSteerLayerNorm", feeds),
        torch.float32,
    )


@pytest.mark.parametrize("op_type", STEERING_OPS)
def test_constant_inputs(op_type: str) -> None:
    """They are read when the session is made, and checked when the rows are known."""
    feeds = random_feeds(op_type, 16, bank=2)
    model = node_model(op_type, list(feeds), functions=False)
    constant = [name for name in feeds if name not in ("hidden", "x")]
    for name in constant:
        model.graph.initializer.append(numpy_helper.from_array(feeds[name].numpy(), name))
    free = [value for value in model.graph.input if value.name not in constant]
    del model.graph.input[:]
    model.graph.input.extend(free)
    session = cpu_session(model)
    [rows] = [value.name for value in free]
    for given_rows in (feeds[rows], feeds[rows] * 2):
        given_feeds = {**feeds, rows: given_rows}
        assert_close(
            run(session, {rows: given_rows}), expected(op_type, given_feeds), torch.float32
        )
    with pytest.raises(Exception, match=rf"grains\.{op_type}: input `\w+` has shape"):
        run(session, {rows: torch.ones(2, 3, 17)})


def test_interpolation_ends_are_exact() -> None:
    feeds = random_feeds("IgInterpolate", 33)
    feeds["alphas"] = torch.tensor([0.0, 1.0])
    (points,) = run(kernel_session("IgInterpolate", feeds), feeds)
    assert torch.equal(points[0], feeds["baseline"].expand_as(points[0]))
    assert torch.equal(points[1], feeds["input"])


@pytest.mark.parametrize("shape", [(16,), (3, 16), (1, 16), (2, 1, 16), (1, 3, 16), (2, 3, 16)])
@pytest.mark.parametrize("per_row", [False, True])
def test_baselines_broadcast(shape: tuple[int, ...], per_row: bool) -> None:
    for op_type, steps in (("IgInterpolate", "alphas"), ("IgAccumulate", "weights")):
        feeds = random_feeds(op_type, 16)
        feeds["baseline"] = torch.randn(shape)
        feeds[steps] = torch.rand(4, 2) if per_row else torch.rand(4)
        session = kernel_session(op_type, feeds)
        assert_close(run(session, feeds), expected(op_type, feeds), torch.float32)


def _of_shape(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def _index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op_type", "bank", "change", "message"),
    [
        ("Steer", None, {"hidden": _of_shape()}, r"`hidden` has shape \[\]; expected at least one"),
        (
            "Steer",
            None,
            {"vectors": _of_shape(7)},
            r"`vectors` .*\[7\]; expected \[8\] or \[N, 8\]",
        ),
        ("Steer", None, {"vectors": _of_shape(1, 1, 8)}, r"`vectors` has shape \[1, 1, 8\]"),
        ("Steer", None, {"vectors": _of_shape(0, 8)}, r"`vectors` has shape \[0, 8\]"),
        ("Steer", None, {"vectors": _of_shape(2, 8)}, r"`index` is missing; with the bank"),
        (
            "Steer",
            None,
            {"strength": _of_shape(2)},
            r"`strength` has shape \[2\]; expected \[\] or",
        ),
        ("Steer", 3, {"strength": _of_shape(2)}, r"`strength` .* one for each row of `vectors`"),
        ("Steer", 3, {"index": _index(0, 3)}, r"`index` has 3 at position 1; .* 0 to 2, or -1"),
        ("Steer", 3, {"index": _index(-2, 0)}, r"`index` has -2 at position 0"),
        ("Steer", 3, {"index": _index(0, 1, 2)}, r"`index` .*\[3\]; expected \[2, 3\] or \[2\]"),
        ("SkipSteerRmsNorm", None, {"skip": _of_shape(1, 3, 8)}, r"`skip` .* the shape of `x`"),
        ("SkipSteerRmsNorm", None, {"weight": _of_shape(1, 8)}, r"`weight` .* expected \[8\]"),
        ("SkipSteerLayerNorm", None, {"bias": _of_shape(9)}, r"`bias` .* expected \[8\]"),
        ("IgInterpolate", None, {"input": _of_shape(3, 8)}, r"`input` .* expected \[batch, tokens"),
        ("IgInterpolate", None, {"baseline": _of_shape(2, 8)}, r"`baseline` .* broadcasts to"),
        ("IgInterpolate", None, {"baseline": _of_shape(3, 1)}, r"`baseline` .* last dimension"),
        ("IgInterpolate", None, {"alphas": _of_shape(4, 3)}, r"`alphas` .* \[steps, 2\]"),
        ("IgAccumulate", None, {"grads": _of_shape(4, 2, 3, 9)}, r"`grads` .* over `input`"),
        ("IgAccumulate", None, {"weights": _of_shape(5)}, r"`weights` .* each of the 4 steps"),
    ],
)
def test_wrong_inputs_are_named(
    op_type: str, bank: int | None, change: dict[str, torch.Tensor], message: str
) -> None:
    feeds = {**random_feeds(op_type, 8, bank=bank), **change}
    with pytest.raises(Exception, match=rf"grains\.{op_type}: input {message}"):
        run(kernel_session(op_type, feeds), feeds)


@pytest.mark.parametrize(
    ("epsilon", "message"),
    [(-1.0, "expected 0 or more"), (3, "is an integer"), (float("nan"), "not a finite number")],
)
def test_wrong_attributes_are_named(epsilon: float, message: str) -> None:
    with pytest.raises(Exception, match=f"grains.Steer: attribute `epsilon`.*{message}"):
        kernel_session("Steer", ("hidden", "vectors", "strength"), attributes={"epsilon": epsilon})


# --- instruction sets -----------------------------------------------------------------------------


def _session_of_a_copy(model: Any, folder: Path, isa: str | None) -> Any:
    """Of a library that nobody asked for an instruction set yet, and then for ``isa``."""
    path = folder / f"{isa}.so"
    shutil.copy(runtime.ort_library_path(), path)
    if isa and not ctypes.CDLL(str(path)).grains_set_cpu_isa(isa.encode()):
        pytest.skip(f"this processor has no {isa}")
    options = session_options()
    options.register_custom_ops_library(str(path))
    return cpu_session(model, library=False, options=options)


@pytest.mark.parametrize("op_type", STEERING_OPS)
def test_one_row_does_not_slow_its_neighbours_down(
    op_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest registers lower the clock of what runs next: a row by itself takes narrower."""
    monkeypatch.delenv("GRAINS_CPU_ISA", raising=False)
    os.unsetenv("GRAINS_CPU_ISA")  # set_cpu_isa, of other tests, sets it behind os.environ
    model = node_model(op_type, list(random_feeds(op_type, 8)), functions=False)
    wide, narrow, own = (
        _session_of_a_copy(model, tmp_path, isa) for isa in ("avx512", "avx2", None)
    )
    differ = False
    for seed in range(8):
        one = random_feeds(op_type, 640, batch=1, tokens=1, seed=seed)
        assert _bits(own, one) == _bits(narrow, one)
        differ |= _bits(narrow, one) != _bits(wide, one)
        many = random_feeds(op_type, 640, seed=seed)
        assert _bits(own, many) == _bits(wide, many)
    assert differ


def _bits(session: Any, feeds: dict[str, torch.Tensor]) -> list[bytes]:
    return [output.numpy().tobytes() for output in run(session, feeds)]


# --- shape inference, in-place memory -------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "shapes", "wanted"),
    [
        ("Steer", {"hidden": ["b", "t", 8]}, [["b", "t", 8]]),
        ("SkipSteerRmsNorm", {"x": ["b", "t", 8]}, [["b", "t", 8]] * 2),
        ("SkipSteerLayerNorm", {"x": [2, "t", 8]}, [[2, "t", 8]] * 2),
        ("IgInterpolate", {"input": ["b", "t", 8], "alphas": ["s"]}, [["s", "b", "t", 8]]),
        ("IgInterpolate", {"input": ["b", "t", 8], "alphas": [5, "b"]}, [[5, "b", "t", 8]]),
        ("IgAccumulate", {"grads": ["s", "b", "t", 8]}, [["b", "t"]]),
    ],
)
def test_shapes_are_inferred(
    op_type: str, shapes: dict[str, list[int | str]], wanted: list[list[int | str]]
) -> None:
    session = kernel_session(op_type, random_feeds(op_type, 8), shapes=shapes)
    assert [output.shape for output in session.get_outputs()] == wanted


@pytest.mark.parametrize("op_type", OPS)
@pytest.mark.parametrize("shape", [None, [None, None, None], ["b", None, 8]], ids=str)
def test_unknown_shapes_promise_nothing(op_type: str, shape: list[int | str | None] | None) -> None:
    feeds = random_feeds(op_type, 8)
    rows = ("hidden", "x", "skip", "input")
    session = kernel_session(op_type, feeds, shapes=dict.fromkeys(rows, shape))
    assert_close(run(session, feeds), expected(op_type, feeds), torch.float32)


def test_chain_in_reused_memory() -> None:
    """Each tensor in between has one reader, so onnxruntime gives its memory to an output."""
    blocks = 4
    feeds = random_feeds("SkipSteerRmsNorm", 48, tokens=7)
    nodes = [
        node
        for i in range(blocks)
        for node in (
            helper.make_node(
                "SkipSteerRmsNorm",
                [f"r{i}", f"n{i}", "vectors", "strength", "weight"],
                [f"m{i}", f"r{i + 1}"],
                domain="grains",
            ),
            helper.make_node(
                "Steer", [f"m{i}", "vectors", "strength"], [f"n{i + 1}"], domain="grains"
            ),
        )
    ]
    inputs = {"r0": ["b", "t", 48], "n0": ["b", "t", 48], "vectors": [48], "weight": [48]}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {**inputs, "strength": []}.items()
    ]
    outputs = [
        helper.make_tensor_value_info(f"{name}{blocks}", TensorProto.FLOAT, None) for name in "nr"
    ]
    model = make_model(helper.make_graph(nodes, "chain", values, outputs), functions=False)
    session = cpu_session(model)
    given_feeds = {name: feeds[name] for name in ("vectors", "weight", "strength")}
    actual = run(session, {"r0": feeds["x"], "n0": feeds["skip"], **given_feeds})

    residual, normed = feeds["x"], feeds["skip"]
    for _ in range(blocks):
        normed, residual = expected(
            "SkipSteerRmsNorm", {"x": residual, "skip": normed, **given_feeds}
        )
        steering = {name: given_feeds[name] for name in ("vectors", "strength")}
        (normed,) = expected("Steer", {"hidden": normed, **steering})
    assert_close(actual, [normed, residual], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_type", OPS)
def test_declared_output_types_are_no_broken_promise(op_type: str, dtype: torch.dtype) -> None:
    """Tools write the types of all tensors into a graph; ours must agree with every one."""
    feeds = random_feeds(op_type, 8, dtype=dtype)
    wanted = expected(op_type, feeds)
    shapes: dict[str, Any] = {
        "no rank": dict.fromkeys(feeds),
        "unknown": {name: [None] * tensor.dim() for name, tensor in feeds.items()},
        "named": {
            name: [f"{name}_{i}" for i in range(tensor.dim())] for name, tensor in feeds.items()
        },
        "known": {name: list(tensor.shape) for name, tensor in feeds.items()},
    }
    is_row = op_type != "IgAccumulate"
    elem_type = ELEMENT_TYPES[dtype if is_row else torch.float32]
    for given_shapes, has_rank in itertools.product(shapes.values(), (True, False)):
        proto = node_model(op_type, list(feeds), dtype=dtype, shapes=given_shapes, functions=False)
        node = next(node for node in proto.graph.node if node.op_type == op_type)
        made = set(node.output) - {output.name for output in proto.graph.output}
        for name, result in zip(node.output, wanted, strict=True):
            if name in made:
                shape = [None] * result.dim() if has_rank else None
                info = helper.make_tensor_value_info(name, elem_type, shape)
                proto.graph.value_info.append(info)
        assert_close(run(cpu_session(proto), feeds), wanted, dtype)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("dim", [1, 7, 512, 3000])
def test_rows_that_stay_get_the_bits_of_onnxruntimes_own_norm(dim: int, library: bool) -> None:
    """Off is off: a graph at strength 0 gives what it gave before it was steered."""
    feeds = random_feeds("SkipSteerRmsNorm", dim, tokens=6, bank=2)
    own = node_model("SkipSteerRmsNorm", ["x", "skip", "weight"], functions=False)
    own.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    own.graph.node[0].CopyFrom(
        helper.make_node(
            "SkipSimplifiedLayerNormalization",
            ["x", "skip", "weight"],
            ["normed", "", "", "residual"],
            domain="com.microsoft",
            epsilon=1e-6,
        )
    )
    plain = run(
        cpu_session(own, library=False), {name: feeds[name] for name in ("x", "skip", "weight")}
    )
    proto = node_model("SkipSteerRmsNorm", list(feeds), functions=False)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    add_functions(proto, by_onnxruntime=True)
    session = cpu_session(proto, library=library)
    steered = run(session, feeds)
    assert_close(steered, expected("SkipSteerRmsNorm", feeds), torch.float32)
    stays = feeds["index"] == -1
    assert 0 < stays.sum() < stays.numel()
    off = run(session, {**feeds, "strength": torch.zeros(2)})
    one_off = run(session, {**feeds, "index": torch.tensor([-1, 1], dtype=torch.int32)})
    for row, wanted in enumerate(plain):
        assert torch.equal(steered[row][stays], wanted[stays])
        assert torch.equal(off[row], wanted)
        assert torch.equal(one_off[row][0], wanted[0])
        assert not torch.equal(one_off[row][1], wanted[1]) or dim == 1


# --- registration, threads ------------------------------------------------------------------------


def test_node_is_kept_for_the_kernel(tmp_path: Any) -> None:
    for op_type in OPS:
        model = node_model(op_type, list(random_feeds(op_type, 8)))
        assert optimized_ops(model, tmp_path, library=True) == {op_type: 1}


def test_registering_twice_changes_nothing() -> None:
    options = session_options()
    options.register_custom_ops_library(runtime.ort_library_path())
    feeds = random_feeds("Steer", 8)
    model = node_model("Steer", list(feeds), functions=False)
    for _ in range(2):
        session = cpu_session(model, options=options)
        assert_close(run(session, feeds), expected("Steer", feeds), torch.float32)


def test_sessions_and_runs_in_many_threads() -> None:
    feeds = {op_type: random_feeds(op_type, 64) for op_type in OPS}
    models = {
        op_type: node_model(op_type, list(feeds[op_type]), functions=False) for op_type in OPS
    }
    shared = steer_session()
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for op_type in OPS[worker % 2 :] + OPS[: worker % 2]:
            session = cpu_session(models[op_type])
            assert_close(
                run(session, feeds[op_type]), expected(op_type, feeds[op_type]), torch.float32
            )
            assert_close(
                run(shared, feeds["Steer"]), expected("Steer", feeds["Steer"]), torch.float32
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("op_type", OPS)
def test_thread_count_does_not_change_results(op_type: str) -> None:
    feeds = random_feeds(op_type, 896, tokens=128)
    model = node_model(op_type, list(feeds), functions=False)
    results = [
        run(
            cpu_session(model, intra_op_num_threads=threads),
            feeds,
        )
        for threads in (1, 2)
    ]
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one.numpy(), two.numpy())
    assert_close(results[0], expected(op_type, feeds), torch.float32)


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_type", OPS)
def test_cuda_kernel_matches_reference(op_type: str, dtype: torch.dtype) -> None:
    if "CUDAExecutionProvider" not in runtime.require_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA: install onnxruntime-gpu")
    bank = 4 if op_type in STEERING_OPS else None
    options = session_options()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    proto = node_model(
        op_type, list(random_feeds(op_type, 1, bank=bank)), dtype=dtype, functions=False
    )
    session = runtime.session(proto.SerializeToString(), session_options=options)
    for dim in DIMS:
        feeds = random_feeds(op_type, dim, bank=bank, dtype=dtype, seed=dim)
        assert_close(run(session, feeds), expected(op_type, feeds), dtype)
