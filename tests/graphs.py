"""Small hand-made ONNX decoders in the forms that exporters write, and the same in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from grains_ext import export

HIDDEN, VOCAB = 8, 16
EPSILON = 1e-5
IDS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
"""Two prompts for `run_toy` and `ToyDecoder.run`."""

ADD_FORMS = (
    "div", "one_over", "reciprocal", "square", "cast", "rms_op", "simplified", "layer_norm",
)  # fmt: skip
"""The ways to write the norm after a plain Add."""
SKIP_FORMS = ("skip_rms", "skip_rms_bias", "skip_layer", "skip_layer_bias")
"""The fused skip + norm operators, without and with a bias on the sum."""


@dataclass
class ToyDecoder:
    """Two additions per block to a residual stream, keys and values cached, a norm at each end.

    Its "attention" is a product of each token with the mean of all cached values.
    """

    form: str = "div"
    n_blocks: int = 3
    parallel: bool = False
    shift: bool = True  # False: LayerNorms without a bias
    dtype: type = np.float32
    weights: dict[str, NDArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)

        def normal(*shape: int, scale: float = HIDDEN**-0.5) -> NDArray:
            return (rng.standard_normal(shape) * scale).astype(self.dtype)

        self.weights["embed"] = normal(VOCAB, HIDDEN, scale=1.0)
        self.weights["head"] = normal(HIDDEN, VOCAB)
        for block in range(self.n_blocks):
            for name in ("query", "key", "value", "out", "up", "down"):
                self.weights[f"{name}{block}"] = normal(HIDDEN, HIDDEN)
        for norm in range(2 * self.n_blocks + 1):
            self.weights[f"scale{norm}"] = 1 + normal(HIDDEN, scale=0.1)
            self.weights[f"shift{norm}"] = normal(HIDDEN, scale=0.1)
            self.weights[f"bias{norm}"] = normal(HIDDEN, scale=0.1)

    @property
    def is_layer_norm(self) -> bool:
        return self.form in {"layer_norm", "skip_layer", "skip_layer_bias"}

    def run(
        self, ids: NDArray, directions: dict[int, NDArray] | None = None, strength: float = 0.0
    ) -> NDArray:
        """Logits [batch, tokens, vocabulary] in float64, with an empty cache."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}

        def norm(x: NDArray, number: int) -> NDArray:
            if self.is_layer_norm:
                x = x - x.mean(-1, keepdims=True)
            scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
            scaled = scaled * weights[f"scale{number}"]
            shifted = self.is_layer_norm and self.shift
            return scaled + weights[f"shift{number}"] if shifted else scaled

        def skip_bias(number: int) -> NDArray:
            return weights[f"bias{number}"] if self.form.endswith("_bias") else np.zeros(HIDDEN)

        x = weights["embed"][ids]
        for block in range(self.n_blocks):
            normed = norm(x, 2 * block)
            context = (normed @ weights[f"value{block}"]).mean(1, keepdims=True)
            keys = (normed @ weights[f"key{block}"]).mean(1, keepdims=True)
            mixed = (normed @ weights[f"query{block}"]) * (context + keys)
            attention = mixed @ weights[f"out{block}"]
            if self.parallel:
                x = (
                    x
                    + attention
                    + np.tanh(normed @ weights[f"up{block}"]) @ weights[f"down{block}"]
                )
            else:
                x = x + attention + skip_bias(2 * block + 1)
                normed = norm(x, 2 * block + 1)
                x = x + np.tanh(normed @ weights[f"up{block}"]) @ weights[f"down{block}"]
                x = x + skip_bias(2 * block + 2)
            if directions and block in directions:
                moved = x + strength * directions[block]
                ratio = np.linalg.norm(x, axis=-1) / np.linalg.norm(moved, axis=-1)
                x = moved * ratio[..., None]
        return norm(x, 2 * self.n_blocks) @ weights["head"]

    def graph(self) -> onnx.ModelProto:
        """The decoder in ONNX: input_ids and past_key_values.* in, logits and present.* out.

        Block i's output is called sum{2i + 2}, but for the last one of the fused forms, which is
        not emitted.
        """
        return _Builder(self).build()


def run_toy(
    path: Path,
    *,
    library: bool,
    feeds: dict[str, NDArray] | None = None,
    run_options: onnxruntime.RunOptions | None = None,
) -> NDArray:
    """A ToyDecoder graph's logits for IDS, or what `feeds` gives, with an empty cache."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = export.session(path, library=library, session_options=options)
    values: dict[str, NDArray] = {"input_ids": IDS, **(feeds or {})}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            dtype = np.float16 if "16" in value.type else np.float32
            values[value.name] = np.zeros((len(values["input_ids"]), 1, 0, HIDDEN), dtype)
    return session.run(["logits"], values, run_options)[0]


class _Builder:
    def __init__(self, decoder: ToyDecoder) -> None:
        self.decoder = decoder
        self.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(decoder.dtype))
        self.nodes: list[onnx.NodeProto] = []
        self.constants = dict(decoder.weights)
        self.caches: list[str] = []

    def op(self, op_type: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def build(self) -> onnx.ModelProto:
        decoder = self.decoder
        x = self.op("Gather", "embed", "input_ids")
        normed = self.norm(x, 0)
        for block in range(decoder.n_blocks):
            attention = self.attention(normed, block)
            if decoder.parallel:
                partial = self.op("Add", x, attention)
                x, normed = self.add_norm(partial, self.mlp(normed, block), 2 * block + 2)
            else:
                x, normed = self.add_norm(x, attention, 2 * block + 1)
                x, normed = self.add_norm(x, self.mlp(normed, block), 2 * block + 2)
        self.op("MatMul", normed, "head", output="logits")
        if decoder.form.startswith("skip"):  # nobody reads the last sum: exporters leave it out
            del self.nodes[-2].output[1:]
        return self.model()

    def attention(self, normed: str, block: int) -> str:
        sums = []
        for kind in ("key", "value"):
            new = self.op(
                "Unsqueeze", self.op("MatMul", normed, f"{kind}{block}"), self.constant([1])
            )
            present = f"present.{block}.{kind}"
            self.op("Concat", f"past_key_values.{block}.{kind}", new, output=present, axis=2)
            self.caches.append(present)
            mean = self.op("ReduceMean", present, self.constant([2]), keepdims=1)
            sums.append(self.op("Squeeze", mean, self.constant([1])))
        query = self.op("MatMul", normed, f"query{block}")
        mixed = self.op("Mul", query, self.op("Add", sums[1], sums[0]))
        return self.op("MatMul", mixed, f"out{block}")

    def mlp(self, normed: str, block: int) -> str:
        hidden = self.op("Tanh", self.op("MatMul", normed, f"up{block}"))
        return self.op("MatMul", hidden, f"down{block}")

    def add_norm(self, x: str, branch: str, number: int) -> tuple[str, str]:
        form = self.decoder.form
        if not form.startswith("skip"):
            inputs = (branch, x) if number % 4 else (x, branch)  # exporters write either order
            total = self.op("Add", *inputs, output=f"sum{number}")
            return total, self.norm(total, number)
        rms = form.startswith("skip_rms")
        shift = f"shift{number}" if self.decoder.shift else ""
        inputs = [x, branch, f"scale{number}", *([] if rms else [shift])]
        inputs += [f"bias{number}"] if form.endswith("_bias") else []
        outputs = [f"normed{number}", "", "", f"sum{number}"]
        op_type = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        node = helper.make_node(op_type, inputs, outputs, domain="com.microsoft", epsilon=EPSILON)
        self.nodes.append(node)
        return outputs[3], outputs[0]

    def norm(self, x: str, number: int) -> str:
        form, scale = self.decoder.form, f"scale{number}"
        if self.decoder.is_layer_norm:
            shift = [f"shift{number}"] if self.decoder.shift else []
            return self.op("LayerNormalization", x, scale, *shift, axis=-1, epsilon=EPSILON)
        if form == "rms_op":
            return self.op("RMSNormalization", x, scale, axis=-1, epsilon=EPSILON)
        if form == "simplified" or form.startswith("skip"):
            return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=EPSILON)
        wide = self.op("Cast", x, to=TensorProto.FLOAT) if form == "cast" else x
        dtype = np.float32 if form == "cast" else self.decoder.dtype
        if form == "square":
            square = self.op("Mul", wide, wide)
        else:
            square = self.op("Pow", wide, self.constant(2, dtype))
        mean = self.op("ReduceMean", square, self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(EPSILON, dtype)))
        if form == "reciprocal":
            quotient = self.op("Mul", wide, self.op("Reciprocal", root))
        elif form == "one_over":
            quotient = self.op("Mul", wide, self.op("Div", self.constant(1, dtype), root))
        else:
            quotient = self.op("Div", wide, root)
        if form == "cast":
            quotient = self.op("Cast", quotient, to=self.elem_type)
        return self.op("Mul", scale, quotient)

    def model(self) -> onnx.ModelProto:
        cache = ["batch", 1, None, HIDDEN]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
        ]
        outputs = [
            helper.make_tensor_value_info("logits", self.elem_type, ["batch", "tokens", VOCAB])
        ]
        for name in self.caches:
            past = name.replace("present", "past_key_values")
            shape = [*cache[:2], "past", HIDDEN]
            inputs.append(helper.make_tensor_value_info(past, self.elem_type, shape))
            shape = [*cache[:2], "total", HIDDEN]
            outputs.append(helper.make_tensor_value_info(name, self.elem_type, shape))
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "toy",
            inputs,
            outputs,
            [numpy_helper.from_array(v, n) for n, v in self.constants.items() if n in used],
        )
        opsets = [helper.make_opsetid("", 23 if self.decoder.form == "rms_op" else 18)]
        opsets.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)
