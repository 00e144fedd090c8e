"""Weight-only quantisation of an exported graph with onnxruntime's quantiser.

int8 as well as int4 are blockwise and of weights alone (`MatMulNBits`): a row's result does not
depend on padding or on the other rows of a batch, as it does where activations share one scale, and
steering, which is injected afterwards, stays float.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import numpy_helper

from grains_ext.export.runtime import require_onnxruntime

BITS = {"int8": 8, "int4": 4}

BLOCK_SIZE = 32
"""Weights that share a scale: what onnxruntime-genai's model builder takes by default."""

_INT8_ARITHMETIC = 4
"""onnxruntime's accuracy level at which its fast CPU kernels run, on int8 activations."""


def quantize_graph(source: Path, target: Path, scheme: str, *, external_data: bool) -> None:
    """Writes a copy of a float graph whose matrix multiplications have quantised weights.

    Embeddings, norms and biases stay float. Where the language-model head shares its weights with
    the embedding, it gets quantised ones of its own.

    scheme: a key of BITS. int8 runs on onnxruntime 1.22 and newer, int4 on 1.20.

    Raises ImportError without onnxruntime, RuntimeError where there is nothing to quantise.
    """
    require_onnxruntime()
    with _root_logger_untouched():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
        model = onnx.load(str(source))
        _fold_transposed_weights(model.graph)
        ONNXModel(model).replace_gemm_with_matmul()
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=BITS[scheme],
            block_size=BLOCK_SIZE,
            is_symmetric=True,
            accuracy_level=_INT8_ARITHMETIC,
        )
        quantizer.process()
        quantized = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in quantized.graph.node):
        raise RuntimeError(f"'{source}' has no matrix multiplication that can be quantised")
    onnx.save(
        quantized,
        str(target),
        save_as_external_data=external_data,
        location=f"{target.name}.data",
        size_threshold=1024,
    )


def in_float_arithmetic(source: Path, target: Path) -> None:
    """Writes a copy of a quantised graph that computes with the same weights in float.

    The fast kernels round activations to int8: the last bit of an input then decides on a whole
    step of the output, and two graphs that compute the same differ by more than rounding. For
    comparisons. External weights are shared: `target` must lie beside `source`.
    """
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, str(target))


def _fold_transposed_weights(graph: onnx.GraphProto) -> None:
    """A weight that a Transpose turns becomes a turned weight: the quantiser looks no further."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in weights:
            continue
        permutation = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = numpy_helper.to_array(weights[node.input[0]]).transpose(permutation)
        graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        graph.node.remove(node)


@contextmanager
def _root_logger_untouched() -> Iterator[None]:
    """The quantiser's module configures the root logger when it is imported."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
