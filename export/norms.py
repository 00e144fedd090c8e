"""Recognises the norm that reads a residual stream, in each form that exporters write it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx
from onnx import numpy_helper

from grains_ext.export.index import GraphIndex

SINGLE_NODE_NORMS = {
    "RMSNormalization": "rms",
    "SimplifiedLayerNormalization": "rms",
    "LayerNormalization": "layer",
}


@dataclass(frozen=True)
class Norm:
    """output = RMSNorm(x) * weight, or LayerNorm(x) * weight + bias, over the last dimension.

    bias: "" where there is none. nodes: the positions of the nodes that serve nothing else.
    """

    kind: Literal["rms", "layer"]
    output: str
    weight: str
    bias: str
    epsilon: float
    nodes: frozenset[int]


class NormMatcher:
    """Finds norms in one graph. Only exact matches count: a near miss stays as it is."""

    def __init__(self, index: GraphIndex) -> None:
        self.index = index
        self.outputs = {output.name for output in index.graph.output}
        self.weights = {tensor.name: tensor for tensor in index.graph.initializer}
        self.constants = dict(self.weights)
        for node in index.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def find(self, tensor: str, size: int, elem_type: int) -> Norm | None:
        """The norm of `tensor` [..., size] with weights of that size and element type, or None."""
        for norm in (*self._single_nodes(tensor), *self._decomposed(tensor)):
            weights = [self.weights.get(name) for name in (norm.weight, norm.bias) if name]
            if all(
                weight is not None and list(weight.dims) == [size] and weight.data_type == elem_type
                for weight in weights
            ):
                return norm
        return None

    def _single_nodes(self, tensor: str) -> Iterator[Norm]:
        for position in self.index.consumers.get(tensor, []):
            node = self.index.nodes[position]
            kind: Any = SINGLE_NODE_NORMS.get(node.op_type)
            if kind is None or node.input[0] != tensor or any(node.output[1:]):
                continue
            attributes = attributes_of(node)
            if attributes.get("axis", -1) == -1 and attributes.get("stash_type", 1) == 1:
                bias = node.input[2] if len(node.input) > 2 else ""
                epsilon = attributes.get("epsilon", 1e-5)
                nodes = frozenset({position})
                yield Norm(kind, node.output[0], node.input[1], bias, epsilon, nodes)

    def _decomposed(self, tensor: str) -> Iterator[Norm]:
        """x / sqrt(mean(x^2) + eps) * weight in plain operators.

        Half-precision models compute all but the last product in float32: x is cast before, and
        the quotient after.
        """
        for cast in (None, *self._readers(tensor, "Cast")):
            source = tensor if cast is None else self._output(cast)
            for square in (*self._readers(source, "Pow"), *self._readers(source, "Mul")):
                match = self._from_square(source, square)
                if match is None:
                    continue
                output, weight, epsilon, nodes = match
                if cast is not None and set(self.index.consumers[source]) <= set(nodes):
                    nodes.append(cast)
                yield Norm("rms", output, weight, "", epsilon, frozenset(nodes))

    def _from_square(self, source: str, square: int) -> tuple[str, str, float, list[int]] | None:
        base, factor = self.index.nodes[square].input
        power = self.index.nodes[square].op_type == "Pow"
        if base != source or (self._scalar(factor) != 2 if power else factor != source):
            return None
        nodes = [square]
        for op_type in ("ReduceMean", "Add", "Sqrt"):
            following = self._only_reader(nodes[-1], op_type)
            if following is None:
                return None
            nodes.append(following)
        _, mean, add, root = nodes
        epsilon = self._scalar(self._other_input(add, self._output(mean)))
        if epsilon is None or not self._over_last_dimension(mean):
            return None
        quotient = self._only_reader(root, "Div")
        if quotient is None or self.index.nodes[quotient].input[0] != source:
            reciprocal = self._only_reader(root, "Reciprocal")
            if quotient is not None and self._scalar(self.index.nodes[quotient].input[0]) == 1:
                reciprocal = quotient
            product = None if reciprocal is None else self._only_reader(reciprocal, "Mul")
            if reciprocal is None or product is None:
                return None
            if self._other_input(product, self._output(reciprocal)) != source:
                return None
            nodes.append(reciprocal)
            quotient = product
        nodes.append(quotient)
        if (cast := self._only_reader(quotient, "Cast")) is not None:
            nodes.append(cast)
        weighted = self._only_reader(nodes[-1], "Mul")
        if weighted is None:
            return None
        weight = self._other_input(weighted, self._output(nodes[-1]))
        nodes.append(weighted)
        return self._output(weighted), weight, epsilon, nodes

    def _readers(self, tensor: str, op_type: str) -> list[int]:
        positions = dict.fromkeys(self.index.consumers.get(tensor, []))
        return [p for p in positions if self.index.nodes[p].op_type == op_type]

    def _only_reader(self, position: int, op_type: str) -> int | None:
        name = self._output(position)
        readers = self.index.consumers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return None
        return readers[0] if self.index.nodes[readers[0]].op_type == op_type else None

    def _output(self, position: int) -> str:
        return str(self.index.nodes[position].output[0])

    def _other_input(self, position: int, name: str) -> str:
        first, second = self.index.nodes[position].input
        return str(second if first == name else first)

    def _scalar(self, name: str) -> float | None:
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        if math.prod(tensor.dims) != 1:
            return None
        try:
            return float(numpy_helper.to_array(tensor).reshape(-1)[0])
        except (ValueError, TypeError):  # no number, or fewer bytes than its type takes
            return None

    def _over_last_dimension(self, mean: int) -> bool:
        node = self.index.nodes[mean]
        attributes = attributes_of(node)
        if attributes.get("keepdims", 1) != 1:
            return False
        if len(node.input) > 1:
            return self._scalar(node.input[1]) == -1
        return list(attributes.get("axes", [])) == [-1]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
