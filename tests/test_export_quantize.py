"""Exports with quantised weights: the steering is injected after it, and stays float."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from grains_ext import export
from grains_ext.export.quantize import in_float_arithmetic, quantize_graph
from tests.exports import random_vectors
from tests.models import tiny_model, tiny_tokenizer

IDS = np.random.default_rng(0).integers(4, 128, (2, 12))


def logits(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = export.session(path, session_options=options)
    return export.OnnxDecoder(session).step(IDS, np.ones_like(IDS))[0]


@functools.cache
def float_graph(folder: Path, family: str) -> Path:
    path = folder / f"{family}.onnx"
    model = tiny_model(family, hidden_size=64, num_hidden_layers=1, tie_word_embeddings=True)
    export.export_graph(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "largest"), [("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("external_data", [False, True])
def test_every_weight_matrix_is_quantised(
    folder: Path, scheme: str, largest: float, external_data: bool
) -> None:
    # GPT-2: its matrices are multiplied in Gemm nodes, its head is the embedding transposed.
    source, target = float_graph(folder, "gpt2"), folder / f"{scheme}{external_data}.onnx"
    quantize_graph(source, target, scheme, external_data=external_data)
    graph = onnx.load(str(target)).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    # Attention in and out, two of the MLP, the head.
    assert len(nodes) == 5
    assert not [
        n for n in graph.node if n.op_type in ("Gemm", "Transpose") and n.input[0] in weights
    ]
    assert all(weights[node.input[1]].dtype == np.uint8 for node in nodes)
    assert target.with_name(f"{target.name}.data").is_file() == external_data
    assert target.stat().st_size < source.stat().st_size
    expected = logits(source)
    error = np.abs(logits(target) - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < largest


@pytest.mark.slow
def test_float_arithmetic_has_the_same_weights(folder: Path) -> None:
    source, fast, exact = float_graph(folder, "gpt2"), folder / "fast.onnx", folder / "exact.onnx"
    quantize_graph(source, fast, "int4", external_data=True)
    in_float_arithmetic(fast, exact)
    expected = logits(fast)
    difference = np.abs(logits(exact) - expected).max() / np.abs(expected).max()
    assert 1e-6 < difference < 0.03


@pytest.mark.slow
def test_the_root_logger_is_left_alone(folder: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    quantize_graph(float_graph(folder, "gpt2"), folder / "x.onnx", "int4", external_data=False)
    assert (root.level, list(root.handlers)) == before


def test_a_graph_without_weights_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [output])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "model.onnx"))
    with pytest.raises(RuntimeError, match="no matrix multiplication"):
        quantize_graph(tmp_path / "model.onnx", tmp_path / "q.onnx", "int4", external_data=False)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "dtype", "baked"), [("int4", "float32", False), ("int8", "float16", True)]
)
def test_a_quantised_export_measures_itself(
    tmp_path: Path, scheme: str, dtype: str, baked: bool
) -> None:
    model = tiny_model("llama", hidden_size=64, num_hidden_layers=1)
    vectors = random_vectors([0], size=64, strength=0.8)
    parity = export.export_model(
        model, tiny_tokenizer(), vectors, tmp_path / "out",
        dtype=dtype, quantize=scheme, baked=baked, keep_unsteered=True,
    )  # fmt: skip
    assert parity is not None
    rounding = 1e-5 if dtype == "float32" else 5e-3
    assert parity.max_relative_error < rounding
    quantized = parity.quantization
    assert quantized is not None
    assert quantized.strength_zero.relative < rounding
    assert quantized.runtimes.relative < rounding
    assert 1e-3 < quantized.weights.relative < 0.5
    assert 1e-3 < quantized.steered.relative < 0.5
    assert parity.fused_nodes == {"SkipSteerRmsNorm": 1}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model_unsteered.onnx", "model.onnx.data"} <= names
    assert not {name for name in names if "exact" in name or "float" in name}
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    steering = {t.name: t.data_type for t in graph.initializer if t.name.startswith("grains.")}
    kind = onnx.TensorProto.FLOAT if dtype == "float32" else onnx.TensorProto.FLOAT16
    assert steering["grains.layers.0.direction"] == kind
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"weights {scheme}" in readme
    assert f"onnxruntime 1.2{2 if scheme == 'int8' else 0} and newer" in readme
