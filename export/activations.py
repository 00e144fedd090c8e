"""Element type, size and shape of the residual stream, from whatever a graph tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx
import torch
from onnx import TensorProto, TypeProto

from grains_ext.export.errors import GraphError
from grains_ext.export.index import SKIP_NORMS, GraphIndex
from grains_ext.export.locate import Site
from grains_ext.export.norms import SINGLE_NODE_NORMS

TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
"""The element types that can be steered."""


@dataclass(frozen=True)
class Activation:
    """elem_type: a key of TORCH_DTYPES. size: the hidden size. type: with the shape, if known."""

    elem_type: int
    size: int
    type: TypeProto | None


class Activations:
    """Looks up the residual stream's type at the sites of one graph."""

    def __init__(self, model: onnx.ModelProto, index: GraphIndex) -> None:
        self.model = model
        self.index = index
        self.declared = _declared(model.graph)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def at(self, site: Site) -> Activation:
        """Raises GraphError where the graph does not tell, or where the type cannot be steered."""
        node = self.index.nodes[site.node]
        inputs = () if site.kind == "tensor" else node.input[:2]
        names = [name for name in (site.tensor, *inputs) if name]
        known = _first(self.declared, names)
        found = self._of_norm(node) if site.kind == "skip_norm" else None
        if found is None and known is None:
            known = _first(self._inferred, names)
        if found is None and known is not None:
            found = _type_and_size(known)
        if found is None:  # shape inference ends at operators that only onnxruntime knows
            readers = (self.index.nodes[p] for p in self.index.consumers.get(site.tensor, []))
            norms = [n for n in readers if n.op_type in {*SINGLE_NODE_NORMS, *SKIP_NORMS}]
            found = next(filter(None, map(self._of_norm, norms)), None)
        if found is None:
            raise GraphError(
                f"cannot tell the hidden size of block {site.block}'s output '{site.tensor}': the "
                "graph carries no shapes. Run onnxruntime's symbolic shape inference on it first"
            )
        if found[0] not in TORCH_DTYPES:
            raise GraphError(
                f"block {site.block}'s output is {TensorProto.DataType.Name(found[0])}; only "
                "float32, float16 and bfloat16 activations can be steered"
            )
        return Activation(*found, known)

    @cached_property
    def _inferred(self) -> dict[str, TypeProto]:
        return _declared(onnx.shape_inference.infer_shapes(self.model).graph)

    def _of_norm(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """From a norm's weight, which is [hidden size] and of the activations' type."""
        weight = self.weights.get(node.input[1 if node.op_type in SINGLE_NODE_NORMS else 2])
        return None if weight is None else (weight.data_type, weight.dims[0])


def _first(types: dict[str, TypeProto], names: list[str]) -> TypeProto | None:
    return next((types[name] for name in names if name in types), None)


def _type_and_size(value: TypeProto) -> tuple[int, int]:
    tensor = value.tensor_type
    return tensor.elem_type, tensor.shape.dim[-1].dim_value


def _declared(graph: onnx.GraphProto) -> dict[str, TypeProto]:
    """The type of every tensor whose last dimension is known."""
    known = {}
    for value in (*graph.value_info, *graph.output, *graph.input):
        tensor = value.type.tensor_type
        if tensor.elem_type and tensor.shape.dim and tensor.shape.dim[-1].dim_value > 0:
            known[value.name] = value.type
    return known
