"""Steering put into a 7B-sized ONNX graph: seconds and peak memory.

    python -m benchmarks.inject [--output benchmarks/results/inject.json]

The graphs are made here, of 32 blocks of hidden size 4096 with their weights in an external file
of the true size that holds nothing (a sparse file: injection reads no weight). `fused` is what
onnxruntime-genai's builder writes for int4; `plain` is what torch.onnx.export writes for float16,
with its long metadata on every node. Each action runs in a process of its own: seconds are of the
call, peak is the most memory that the process held, of which its imports took that much.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from grains_ext.timing import Spread, header, write_json

BLOCKS, HIDDEN, INNER, VOCABULARY, HEADS = 32, 4096, 11008, 32000, 32
HEAD = HIDDEN // HEADS
INT4_GROUP = 32

_ACTION = """
import json, resource, sys, time
import torch
from grains_ext.export import inject, remove_steering
from grains_ext.steering.vectors import SteeringVectors
action, source, target, blocks, hidden = sys.argv[1:]
vectors = SteeringVectors({i: torch.ones(int(hidden)) for i in range(int(blocks))})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if action == "remove":
    remove_steering(source, target)
else:
    found = inject(source, vectors, target, dry_run=action == "dry_run")
    assert len(found) == int(blocks)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "imports_mb": before / 1024, "peak_mb": peak / 1024}))
"""


class Graph:
    """A decoder's graph in the making; its weights take places in a file and no bytes."""

    def __init__(self, half: bool, metadata: bool) -> None:
        self.elem_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.metadata = metadata
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.caches: list[str] = []
        self.size = 0
        self.scope = "model"

    def weight(self, name: str, *dims: int, elem_type: int | None = None) -> str:
        kind = self.elem_type if elem_type is None else elem_type
        length = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.UINT8: 1}[kind]
        for dim in dims:
            length *= dim
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", self.size), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.size += length
        self.weights.append(tensor)
        return name

    def constant(self, name: str, values: list[Any], elem_type: int) -> str:
        if name not in {tensor.name for tensor in self.weights}:
            dims = [] if len(values) == 1 and elem_type != TensorProto.INT64 else [len(values)]
            self.weights.append(helper.make_tensor(name, elem_type, dims, values))
        return name

    def op(
        self,
        op_type: str,
        *inputs: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        name = f"{self.scope}/{op_type}_{len(self.nodes)}"
        made = outputs or [f"{name}_out"]
        node = helper.make_node(op_type, inputs, made, name=name, domain=domain, **attributes)
        if self.metadata:
            scopes = f"['', 'model', '{self.scope}']"
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
            trace = f"{name} " + "File modeling.py, line 1, in forward\n" * 40
            node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
        self.nodes.append(node)
        return made[0]

    def info(self, name: str) -> None:
        shape = ["batch", "tokens", HIDDEN]
        self.infos.append(helper.make_tensor_value_info(name, self.elem_type, shape))

    def model(self) -> onnx.ModelProto:
        def values(name: str, dims: list[Any], elem_type: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, elem_type, dims)

        ids = values("input_ids", ["batch", "tokens"], TensorProto.INT64)
        inputs, outputs = [ids], [values("logits", ["batch", "tokens", VOCABULARY], self.elem_type)]
        for name in self.caches:
            shape = ["batch", HEADS, "past", HEAD]
            past = name.replace("present", "past_key_values")
            inputs.append(values(past, shape, self.elem_type))
            outputs.append(values(name, ["batch", HEADS, "total", HEAD], self.elem_type))
        graph = helper.make_graph(
            self.nodes, "decoder", inputs, outputs, self.weights, value_info=self.infos
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fused() -> Graph:
    """int4 weights, grouped attention and skip norms, as onnxruntime-genai's builder writes."""
    graph = Graph(half=False, metadata=False)
    microsoft = {"domain": "com.microsoft"}

    def matmul(x: str, name: str, rows: int, columns: int) -> str:
        groups = rows // INT4_GROUP
        packed = (columns, groups, INT4_GROUP // 2)
        quantised = graph.weight(f"{name}.quant", *packed, elem_type=TensorProto.UINT8)
        scales = graph.weight(f"{name}.scales", columns * groups)
        sizes = {"K": rows, "N": columns, "bits": 4, "block_size": INT4_GROUP}
        return graph.op("MatMulNBits", x, quantised, scales, **sizes, **microsoft)

    stream = graph.op("Gather", graph.weight("embed", VOCABULARY, HIDDEN), "input_ids")
    lengths = graph.constant("lengths", [0], TensorProto.INT32)
    scale = graph.weight("layers.0.input_layernorm", HIDDEN)
    normed = graph.op("SimplifiedLayerNormalization", stream, scale, axis=-1, epsilon=1e-5)
    for block in range(BLOCKS):
        graph.scope = f"model/layers.{block}"
        name = f"layers.{block}"
        qkv = matmul(normed, f"{name}.qkv", HIDDEN, 3 * HIDDEN)
        present = [f"present.{block}.{kind}" for kind in ("key", "value")]
        past = [cache.replace("present", "past_key_values") for cache in present]
        graph.caches += present
        mixed = graph.op(
            "GroupQueryAttention", qkv, "", "", *past, lengths, lengths,
            outputs=[f"{name}.mixed", *present], num_heads=HEADS, kv_num_heads=HEADS, **microsoft,
        )  # fmt: skip
        branch = matmul(mixed, f"{name}.o", HIDDEN, HIDDEN)
        for half in ("attention", "mlp"):
            scale = graph.weight(f"{name}.{half}_norm", HIDDEN)
            last = block == BLOCKS - 1 and half == "mlp"
            outputs = [f"{name}.{half}_normed", *([] if last else ["", "", f"{name}.{half}_sum"])]
            normed = graph.op(
                "SkipSimplifiedLayerNormalization", stream, branch, scale,
                outputs=outputs, epsilon=1e-5, **microsoft,
            )  # fmt: skip
            stream = outputs[-1]
            graph.info(normed)
            if half == "attention":
                gate = matmul(normed, f"{name}.gate", HIDDEN, INNER)
                gated = graph.op("Mul", gate, graph.op("Sigmoid", gate))
                inner = graph.op("Mul", gated, matmul(normed, f"{name}.up", HIDDEN, INNER))
                branch = matmul(inner, f"{name}.down", INNER, HIDDEN)
    graph.scope = "lm_head"
    graph.op("MatMul", normed, graph.weight("lm_head", HIDDEN, VOCABULARY), outputs=["logits"])
    return graph


def plain() -> Graph:
    """float16 weights and everything in standard operators, as torch.onnx.export writes."""
    graph = Graph(half=True, metadata=True)

    def ints(*numbers: int) -> str:
        return graph.constant(f"ints{numbers}", list(numbers), TensorProto.INT64)

    def number(value: float, elem_type: int) -> str:
        return graph.constant(f"number{value}_{elem_type}", [value], elem_type)

    def norm(x: str, name: str) -> str:
        wide = graph.op("Cast", x, to=TensorProto.FLOAT)
        square = graph.op("Pow", wide, number(2.0, TensorProto.FLOAT))
        mean = graph.op("ReduceMean", square, ints(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, number(1e-5, TensorProto.FLOAT)))
        quotient = graph.op("Cast", graph.op("Div", wide, root), to=graph.elem_type)
        return graph.op("Mul", graph.weight(name, HIDDEN), quotient)

    def heads(x: str) -> str:
        split = graph.op("Reshape", x, ints(0, 0, HEADS, HEAD))
        return graph.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotated(x: str) -> str:
        first = graph.op("Slice", x, ints(0), ints(HEAD // 2), ints(3))
        second = graph.op("Slice", x, ints(HEAD // 2), ints(HEAD), ints(3))
        turned = graph.op("Concat", graph.op("Neg", second), first, axis=-1)
        sine, cosine = (number(value, graph.elem_type) for value in (0.6, 0.8))
        return graph.op("Add", graph.op("Mul", x, cosine), graph.op("Mul", turned, sine))

    stream = graph.op("Gather", graph.weight("embed", VOCABULARY, HIDDEN), "input_ids")
    for block in range(BLOCKS):
        graph.scope = name = f"model.layers.{block}"
        normed = norm(stream, f"{name}.input_layernorm.weight")
        projected = [
            heads(graph.op("MatMul", normed, graph.weight(f"{name}.{kind}", HIDDEN, HIDDEN)))
            for kind in "qkv"
        ]
        cached = []
        for kind, new in (("key", rotated(projected[1])), ("value", projected[2])):
            present = f"present.{block}.{kind}"
            past = present.replace("present", "past_key_values")
            cached.append(graph.op("Concat", past, new, outputs=[present], axis=2))
            graph.caches.append(present)
        turned = graph.op("Transpose", cached[0], perm=[0, 1, 3, 2])
        scores = graph.op("Softmax", graph.op("MatMul", rotated(projected[0]), turned), axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", scores, cached[1]), perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", mixed, ints(0, 0, HIDDEN))
        branch = graph.op("MatMul", mixed, graph.weight(f"{name}.o", HIDDEN, HIDDEN))
        stream = graph.op("Add", stream, branch)
        normed = norm(stream, f"{name}.post_attention_layernorm.weight")
        gate = graph.op("MatMul", normed, graph.weight(f"{name}.gate", HIDDEN, INNER))
        up = graph.op("MatMul", normed, graph.weight(f"{name}.up", HIDDEN, INNER))
        inner = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
        branch = graph.op("MatMul", inner, graph.weight(f"{name}.down", INNER, HIDDEN))
        stream = graph.op("Add", stream, branch)
        graph.info(stream)
    graph.scope = "lm_head"
    normed = norm(stream, "model.norm.weight")
    head = graph.weight("lm_head", HIDDEN, VOCABULARY)
    graph.op("MatMul", normed, head, outputs=["logits"])
    return graph


def measured(action: str, source: Path, target: Path) -> dict[str, float]:
    arguments = [action, str(source), str(target), str(BLOCKS), str(HIDDEN)]
    command = [sys.executable, "-c", _ACTION, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    console = Console(width=150)
    console.print(f"{header()}; {BLOCKS} blocks, hidden size {HIDDEN}")
    table = Table(
        "graph", "nodes", "file MB", "weights GB", "action", "seconds", "peak MB", "imports MB"
    )
    results: list[dict[str, Any]] = []
    for form, make in (("fused int4", fused), ("plain float16", plain)):
        with tempfile.TemporaryDirectory() as folder:
            source, steered = Path(folder, "model.onnx"), Path(folder, "steered.onnx")
            graph = make()
            model = graph.model()
            with Path(folder, "weights").open("wb") as weights:
                weights.truncate(graph.size)
            onnx.save(model, str(source))
            facts = {
                "graph": form,
                "nodes": len(graph.nodes),
                "file_mb": source.stat().st_size / 1e6,
                "weights_gb": graph.size / 1e9,
            }
            for action, start in (
                ("dry_run", source),
                ("inject", source),
                ("replace", steered),
                ("remove", steered),
            ):
                target = Path(folder, "restored.onnx") if action == "remove" else steered
                runs = [measured(action, start, target) for _ in range(options.rounds)]
                row: dict[str, Any] = {
                    name: max(run[name] for run in runs) for name in ("peak_mb", "imports_mb")
                }
                seconds = Spread.of([run["seconds"] for run in runs])
                results.append(facts | {"action": action, "seconds": vars(seconds)} | row)
                table.add_row(
                    form,
                    str(facts["nodes"]),
                    f"{facts['file_mb']:.1f}",
                    f"{facts['weights_gb']:.1f}",
                    action,
                    str(seconds),
                    f"{row['peak_mb']:.0f}",
                    f"{row['imports_mb']:.0f}",
                )
    console.print(table)
    if options.output:
        write_json(options.output, "inject", results)


if __name__ == "__main__":
    main()
