"""A graph's tensors, who makes and who reads each, and how values flow between them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from grains_ext.export.errors import GraphError

SKIP_NORMS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 3}
"""Fused skip + norm operators of onnxruntime -> the position of their residual output."""

_PASS_THROUGH = {"Cast", "Identity", "Reshape"}


class GraphIndex:
    """Who makes and who reads each tensor of a graph.

    Raises GraphError where the nodes are not in topological order, or two make one tensor.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        self._residual_inputs: dict[int, str | None] = {}
        for position, node in enumerate(self.nodes):
            if node.op_type == "Constant":
                self.constants.update(node.output)
            for name in node.input:
                if name:
                    self.consumers.setdefault(name, []).append(position)
            for name in node.output:
                if name and self.producer.setdefault(name, position) != position:
                    raise GraphError(f"two nodes make the tensor '{name}': the file is damaged")
        for name, readers in self.consumers.items():
            if self.producer.get(name, -1) >= readers[0]:
                raise GraphError(
                    f"node {readers[0]} reads '{name}', which a later one makes. An ONNX graph "
                    "lists its nodes in topological order: the file is damaged"
                )

    def origin(self, tensor: str) -> str:
        """`tensor`, seen through the nodes that do not change its values."""
        while (position := self.producer.get(tensor)) is not None:
            node = self.nodes[position]
            if node.op_type not in _PASS_THROUGH:
                break
            tensor = node.input[0]
        return tensor

    def ancestors(self, tensors: list[str], stop: set[int], first: int = 0) -> Iterator[int]:
        """Positions of the nodes that `tensors` depend on through values, each once.

        Nodes in `stop` are yielded but not looked behind; nodes before `first` are left out. What
        a Shape node reads is not a dependency: only its size reaches the result.
        """
        seen: set[int] = set()
        open_tensors = list(tensors)
        while open_tensors:
            position = self.producer.get(open_tensors.pop())
            if position is None or position in seen or position < first:
                continue
            seen.add(position)
            yield position
            if position not in stop and self.nodes[position].op_type != "Shape":
                open_tensors.extend(name for name in self.nodes[position].input if name)

    def is_sum(self, position: int) -> bool:
        """Whether the node adds two tensors: an Add or a fused Skip*LayerNormalization."""
        op_type = self.nodes[position].op_type
        return op_type == "Add" or op_type in SKIP_NORMS

    def residual_input(self, position: int) -> str | None:
        """The input of an Add or Skip*LayerNormalization that carries the residual stream on.

        That is the input which the other one is computed from. In blocks with parallel branches,
        (x + attention(x)) + mlp(x), the partial sum stands in for x. None where neither input is.
        """
        if position not in self._residual_inputs:
            self._residual_inputs[position] = self._find_residual_input(position)
        return self._residual_inputs[position]

    def _find_residual_input(self, position: int) -> str | None:
        node = self.nodes[position]
        if not self.is_sum(position):
            return None
        left, right = str(node.input[0]), str(node.input[1])
        if left in self.constants or right in self.constants:
            return None
        for stream, branch in ((left, right), (right, left)):
            if self._feeds(stream, branch):
                return stream
        return None

    def _feeds(self, stream: str, branch: str) -> bool:
        source: str | None = self.origin(stream)
        while source is not None:
            position = self.producer.get(source)
            if position is None:
                return self._reads_input(source, branch)
            # A fused node's other outputs are computed from the same sum: match the node.
            if position in self.ancestors([branch], {position}, position):
                return True
            partial = (
                self.residual_input(position) if self.nodes[position].op_type == "Add" else None
            )
            source = self.origin(partial) if partial is not None else None
        return False

    def _reads_input(self, name: str, branch: str) -> bool:
        if name not in {value.name for value in self.graph.input}:
            return False
        return any(
            name in self.nodes[position].input for position in self.ancestors([branch], set())
        )
