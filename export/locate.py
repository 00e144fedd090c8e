"""Where each decoder block ends in an ONNX graph, found by structure alone.

No tensor, node or weight name is trusted: exporters rename them, merge equal weights and fuse
nodes. What every decoder graph keeps is its shape: a residual stream runs from the embeddings to
the logits, each step adds to it a function of itself, and each block reads its keys and values off
it. So the stream is followed from the logits down, and block i ends at the last step that block
i + 1's key/value outputs depend on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

SKIP_NORMS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 3}
"""Fused skip + norm operators of onnxruntime -> the position of their residual output."""

_PASS_THROUGH = {"Cast", "Identity", "Reshape"}
_CONTROL_FLOW = {"If", "Loop", "Scan"}
_BLOCK_NUMBER = re.compile(r"[._](\d+)[._](?:\w+[._])?(?:key|value)s?$")


class GraphError(ValueError):
    """The graph is not one that can be steered; the message says what was found and what helps."""


@dataclass(frozen=True)
class Site:
    """The end of one decoder block.

    block: 0-based number of the decoder block.
    node: position, in `model.graph.node`, of the node that makes the block's output.
    tensor: the block's output [batch, tokens, hidden]; "" where a fused node does not emit it.
    kind: "add" for a plain Add, "skip_norm" for a fused Skip*LayerNormalization.
    """

    block: int
    node: int
    tensor: str
    kind: Literal["add", "skip_norm"]


class GraphIndex:
    """Who makes and who reads each tensor of a graph whose nodes are in topological order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        for position, node in enumerate(self.nodes):
            if node.op_type == "Constant":
                self.constants.update(node.output)
            for name in node.input:
                if name:
                    self.consumers.setdefault(name, []).append(position)
            for name in node.output:
                if name:
                    self.producer[name] = position

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

    def residual_input(self, position: int) -> str | None:
        """The input of an Add or Skip*LayerNormalization that carries the residual stream on.

        That is the input which the other one is computed from. In blocks with parallel branches,
        (x + attention(x)) + mlp(x), the partial sum stands in for x. None where neither input is.
        """
        node = self.nodes[position]
        if node.op_type != "Add" and node.op_type not in SKIP_NORMS:
            return None
        left, right = node.input[0], node.input[1]
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


def locate(model: onnx.ModelProto, *, n_blocks: int | None = None) -> list[Site]:
    """Finds every decoder block's output on the residual stream.

    model: a decoder with logits and key/value cache outputs, of any exporter, fused or quantised
        or not; weights need not be loaded.
    n_blocks: the number of blocks if known from elsewhere (a config); checked against the graph.

    Returns one Site per block, in order. Raises GraphError where the graph has no such structure
    or where two ways to count its blocks disagree.
    """
    graph = model.graph
    index = GraphIndex(graph)
    logits = _logits_output(graph)
    caches = [o.name for o in graph.output if o.name != logits and _rank(o) in (None, 4, 5)]
    if not caches:
        raise GraphError(
            f"the graph has no key/value cache outputs (outputs: {_names(graph.output)}), so its "
            "decoder blocks cannot be told apart: it is an encoder, or was exported without a "
            "cache. Export the decoder with use_cache=True (present.0.key, ...)"
        )
    chain = _residual_chain(index, logits)
    starts = _block_starts(index, chain, caches)
    return _sites(index, chain, starts, n_blocks)


def _residual_chain(index: GraphIndex, logits: str) -> list[int]:
    """Positions of the nodes that add to the residual stream, from the embeddings up."""
    control_flow = False
    for position in sorted(index.ancestors([logits], set()), reverse=True):
        stream = index.residual_input(position)
        if stream is not None:
            break
        control_flow |= index.nodes[position].op_type in _CONTROL_FLOW
    else:
        found = (
            "it lies inside an If or Loop node: export the decoder without merging it with its "
            "cached form"
            if control_flow
            else "no Add or Skip*LayerNormalization adds to the stream it reads"
        )
        raise GraphError(f"no residual stream leads to '{logits}': {found}")
    chain = [position]
    while stream is not None:
        below = index.producer.get(index.origin(stream))
        stream = None if below is None else index.residual_input(below)
        if below is not None and stream is not None:
            chain.append(below)
    return chain[::-1]


def _block_starts(index: GraphIndex, chain: list[int], caches: list[str]) -> list[int]:
    """How much of the chain each block reads, in block order: 0 for the embeddings alone."""
    height = {position: step for step, position in enumerate(chain, start=1)}
    stop = set(chain)
    starts: dict[int, list[str]] = {}
    for name in caches:
        hits = [height.get(position, 0) for position in index.ancestors([name], stop)]
        starts.setdefault(max(hits, default=0), []).append(name)
    ordered = sorted(starts)
    for block, start in enumerate(ordered):
        for name in starts[start]:
            number = _BLOCK_NUMBER.search(name)
            if number is not None and int(number[1]) != block:
                raise GraphError(
                    f"the cache output '{name}' is named for block {number[1]}, but by its place "
                    f" on the residual stream it belongs to block {block}. Graphs whose "
                    "blocks share a cache, or are not a single stack, cannot be steered"
                )
    return ordered


def _sites(
    index: GraphIndex, chain: list[int], starts: list[int], n_blocks: int | None
) -> list[Site]:
    ends = [*starts[1:], len(chain)]
    sizes = {end - start for start, end in zip(starts, ends, strict=True)}
    if starts[0] != 0 or len(sizes) != 1 or 0 in sizes:
        raise GraphError(
            f"the residual stream has {len(chain)} additions, and its {len(starts)} blocks with "
            f"a cache start after {starts} of them: not the same number in every block. Models "
            "whose residual stream passes through a norm (post-norm), or with blocks that have "
            "no cache, cannot be steered"
        )
    if n_blocks is not None and n_blocks != len(starts):
        raise GraphError(
            f"the graph has {len(starts)} decoder blocks by its cache outputs, but {n_blocks} "
            "were expected: it was exported from another model"
        )
    sites = []
    for block, end in enumerate(ends):
        position = chain[end - 1]
        node = index.nodes[position]
        if node.op_type == "Add":
            sites.append(Site(block, position, node.output[0], "add"))
        else:
            output = SKIP_NORMS[node.op_type]
            tensor = node.output[output] if len(node.output) > output else ""
            sites.append(Site(block, position, tensor, "skip_norm"))
    return sites


def blocks_in_config(folder: Path) -> int | None:
    """The number of decoder blocks by genai_config.json or config.json in `folder`, if told."""
    for name, path in (
        ("genai_config.json", ("model", "decoder", "num_hidden_layers")),
        ("config.json", ("num_hidden_layers",)),
    ):
        file = folder / name
        if not file.is_file():
            continue
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int):
            return value
    return None


def load_graph(path: str | Path) -> onnx.ModelProto:
    """Reads an ONNX file, leaving external weights where they are.

    Raises FileNotFoundError, or GraphError where the file is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at '{path}'")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, or others on garbage
        raise GraphError(f"'{path}' is not an ONNX file: {error}") from error
    if not model.graph.node:
        raise GraphError(f"'{path}' is not an ONNX model: it holds no graph")
    return model


def _logits_output(graph: onnx.GraphProto) -> str:
    names = [output.name for output in graph.output]
    if "logits" in names:
        return "logits"
    flat = [output.name for output in graph.output if _rank(output) == 3]
    if len(flat) == 1:
        return flat[0]
    raise GraphError(
        f"the graph has no 'logits' output, nor a single output of rank 3 (outputs: "
        f"{_names(graph.output)}): it is not a decoder with a language-model head"
    )


def _rank(value: onnx.ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) if tensor.HasField("shape") else None


def _names(values: object, limit: int = 6) -> str:
    names = [value.name for value in values]  # type: ignore[attr-defined]
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
