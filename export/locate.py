"""Where each decoder block ends in an ONNX graph, found by structure alone.

No tensor, node or weight name is trusted: exporters rename them, merge equal weights and fuse
nodes. What every decoder graph keeps is its shape: a residual stream runs from the embeddings to
the logits, each step adds to it a function of itself, and each block reads its keys and values off
it. So the stream is followed from the logits down, and block i ends at the last step that block
i + 1's key/value outputs depend on.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

import onnx

from grains_ext.export.errors import GraphError
from grains_ext.export.index import SKIP_NORMS, GraphIndex
from grains_ext.export.names import NamedOtherwise, named_otherwise

_CONTROL_FLOW = {"If", "Loop", "Scan"}
_BLOCK_NUMBER = re.compile(r"[._](\d+)[._](?:\w+[._])?(?:key|value)s?$")

_CACHE = re.compile(r"present|past|cache|key|value", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """The end of one decoder block.

    block: 0-based number of the decoder block.
    node: position, in `model.graph.node`, of the node that makes the block's output.
    tensor: the block's output [batch, tokens, hidden]; "" where a fused node does not emit it.
    kind: "add" for a plain Add, "skip_norm" for a fused Skip*LayerNormalization, "tensor" for any
        other node, which only `site_of` gives.
    """

    block: int
    node: int
    tensor: str
    kind: Literal["add", "skip_norm", "tensor"]


def locate(model: onnx.ModelProto, *, n_blocks: int | None = None) -> list[Site]:
    """Finds every decoder block's output on the residual stream.

    model: a decoder with logits and key/value cache outputs, of any exporter, fused or quantised
        or not; weights need not be loaded.
    n_blocks: the number of blocks if known from elsewhere (a config); checked against the graph.

    Returns one Site per block, in order. Raises GraphError where the graph has no such structure,
    where two ways to count its blocks disagree, or where the names in the graph do.
    """
    index = GraphIndex(model.graph)
    try:
        sites = _by_structure(index, n_blocks)
    except RecursionError:
        raise GraphError("the graph nests its additions deeper than any decoder does") from None
    ends = [site.node for site in sites]
    if disagreements := named_otherwise(index, ends, _start(index, ends[0])):
        raise GraphError(_explained(index, sites, disagreements))
    return sites


def has_cache(model: onnx.ModelProto) -> bool:
    """Whether the graph gives keys and values out: it holds decoder blocks, and is no encoder."""
    return any(_rank(o) in (4, 5) and _CACHE.search(o.name) for o in model.graph.output)


def site_of(index: GraphIndex, block: int, name: str) -> Site:
    """The site that a user names as the output of `block`: a tensor, or the node that makes it.

    A fused node that does not emit its sum can be named only as a node. Raises GraphError where
    the graph has neither.
    """
    position = index.producer.get(name)
    if position is not None:
        return _site(index, block, position, name)
    by_name = [p for p, node in enumerate(index.nodes) if node.name == name]
    if len(by_name) != 1:
        close = difflib.get_close_matches(name, index.producer, n=3)
        raise GraphError(
            f"no node of the graph makes a tensor '{name}', or is called so (given for block "
            f"{block})" + (f"; close to it: {close}" if close else "")
        )
    node = index.nodes[by_name[0]]
    outputs = [*node.output, "", "", ""]
    return _site(index, block, by_name[0], outputs[SKIP_NORMS.get(node.op_type, 0)])


def _site(index: GraphIndex, block: int, position: int, tensor: str) -> Site:
    node = index.nodes[position]
    if node.op_type == "Add" and index.residual_input(position) is not None:
        return Site(block, position, tensor, "add")
    residual = SKIP_NORMS.get(node.op_type)
    is_sum = residual is not None and [*node.output, "", "", ""][residual] == tensor
    return Site(block, position, tensor, "skip_norm" if is_sum else "tensor")


def _start(index: GraphIndex, position: int | None) -> int | None:
    """The node that makes what the residual stream begins with, below the addition `position`."""
    while position is not None and (stream := index.residual_input(position)) is not None:
        position = index.producer.get(index.origin(stream))
    return position


def _explained(index: GraphIndex, sites: list[Site], disagreements: list[NamedOtherwise]) -> str:
    def end(block: int) -> str:
        return sites[block].tensor or index.nodes[sites[block].node].name

    lines = [
        f"block {d.block} by its place (it ends at '{end(d.block)}'), but "
        f"{d.votes} of the {d.of} named nodes in it belong to block {d.named} by name, such as "
        f"'{d.example}'"
        for d in disagreements[:4]
    ]
    more = f"; and {len(disagreements) - 4} more" if len(disagreements) > 4 else ""
    return (
        "the graph's structure and the names in it disagree: "
        + "; ".join(lines)
        + more
        + ". Where the graph holds a part of a model's blocks, or its names mislead, say which "
        "tensor, or node, ends which block: inject(..., tensors={block: name}), or --map BLOCK=NAME"
    )


def _by_structure(index: GraphIndex, n_blocks: int | None) -> list[Site]:
    graph = index.graph
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
        below = _below_foreign(index, index.producer.get(index.origin(stream)))
        stream = None if below is None else index.residual_input(below)
        if below is not None and stream is not None:
            chain.append(below)
    return chain[::-1]


def _below_foreign(index: GraphIndex, position: int | None) -> int | None:
    """The node that the stream comes from, below additions of what does not come from the stream.

    Some models add features of images to the outputs of their first blocks (DeepStack). That is no
    part of a block. `position` itself where it is no such addition.
    """
    while (
        position is not None and index.is_sum(position) and index.residual_input(position) is None
    ):
        made = [index.producer.get(index.origin(name)) for name in index.nodes[position].input[:2]]
        steps = [p for p in made if p is not None and index.residual_input(p) is not None]
        if len(steps) != 1:
            break
        position = steps[0]
    return position


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
                    f"on the residual stream it belongs to block {block}. Graphs whose "
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
        outputs = [*index.nodes[position].output, "", "", ""]
        tensor = outputs[SKIP_NORMS.get(index.nodes[position].op_type, 0)]
        sites.append(_site(index, block, position, tensor))
    return sites


def _logits_output(graph: onnx.GraphProto) -> str:
    names = [output.name for output in graph.output]
    if "logits" in names:
        return "logits"
    flat = [output.name for output in graph.output if _rank(output) == 3]
    if len(flat) == 1:
        return str(flat[0])
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
