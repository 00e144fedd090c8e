"""The way back from a steered graph: what was replaced is kept in the model's metadata.

The record holds the replaced nodes themselves and their places. They are put back by the tensors
that they make, not by the names of the nodes that took their place, so that a graph can be restored
too after its functions were inlined.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from grains_ext.export.errors import GraphError
from grains_ext.export.functions import DOMAIN

RECORD_KEY = "grains.original"
_FORMAT = 1
# A record is a few kB per block; a hostile file must not unpack to more than memory holds.
_LARGEST_RECORD = 2**28


@dataclass(frozen=True)
class Original:
    """What a graph was before it was steered.

    nodes: the replaced nodes by their positions. n_nodes: of the whole graph. ir_version: of the
    file. made: names of the tensors that the nodes in their place make. added: names of the
    initializers, inputs and value infos that steering brought.
    """

    nodes: Mapping[int, onnx.NodeProto]
    n_nodes: int
    ir_version: int
    made: frozenset[str]
    added: frozenset[str]


def write_record(model: onnx.ModelProto, original: Original) -> None:
    """Adds the record to the metadata of the steered `model`."""
    graph = onnx.GraphProto(node=original.nodes.values())
    packed = base64.b64encode(zlib.compress(graph.SerializeToString(), 9)).decode()
    record = {
        "format": _FORMAT,
        "ir_version": original.ir_version,
        "n_nodes": original.n_nodes,
        "positions": list(original.nodes),
        "made": sorted(original.made),
        "added": sorted(original.added),
        "nodes": packed,
    }
    model.metadata_props.add(key=RECORD_KEY, value=json.dumps(record))


def is_steered(model: onnx.ModelProto) -> bool:
    """Whether the graph holds steering of this package."""
    return any(entry.key == RECORD_KEY for entry in model.metadata_props) or any(
        node.domain == DOMAIN for node in model.graph.node
    )


def restore(model: onnx.ModelProto) -> None:
    """Takes the steering out of `model`, in place: the graph is what it was before `inject`.

    Where nothing but the steering changed since, every field of the model is. Raises GraphError
    where the graph is not steered, has lost its record, or no longer fits it.
    """
    original = _read_record(model)
    graph = model.graph
    kept = _without_steering(graph, original)
    if len(kept) + len(original.nodes) == original.n_nodes:
        nodes = _in_place(kept, original.nodes)
    else:
        nodes = _sorted([*original.nodes.values(), *kept], graph)
    del graph.node[:]
    graph.node.extend(nodes)
    for field in (graph.initializer, graph.input, graph.value_info):
        _remove(field, lambda entry: entry.name in original.added)
    _remove(model.functions, lambda function: function.domain == DOMAIN)
    _remove(model.opset_import, lambda opset: opset.domain == DOMAIN)
    _remove(model.metadata_props, lambda entry: entry.key == RECORD_KEY)
    model.ir_version = original.ir_version


def _read_record(model: onnx.ModelProto) -> Original:
    text = next((e.value for e in model.metadata_props if e.key == RECORD_KEY), None)
    if text is None:
        raise GraphError(
            f"the graph is steered, but the record of what it was ('{RECORD_KEY}' in the model's "
            "metadata) is gone: a tool that rewrote the file dropped it. Start from the unsteered "
            "graph"
            if is_steered(model)
            else "the graph is not steered: there is nothing to remove"
        )
    try:
        record = json.loads(text)
        if record["format"] != _FORMAT:
            raise GraphError(
                f"the graph was steered by another version of grains_ext (record format "
                f"{record['format']}, this one reads {_FORMAT}): update grains_ext"
            )
        unpacker = zlib.decompressobj()
        packed = base64.b64decode(record["nodes"], validate=True)
        raw = unpacker.decompress(packed, _LARGEST_RECORD)
        if not unpacker.eof:
            raise ValueError("it does not end where it should")
        nodes = onnx.GraphProto.FromString(raw).node
        positions = [int(position) for position in record["positions"]]
        # A position at or after the end, or twice, would leave no place for another node.
        if len(set(positions)) != len(nodes) or not all(
            0 <= position < record["n_nodes"] for position in positions
        ):
            raise ValueError("its positions do not fit its nodes")
        return Original(
            nodes=dict(sorted(zip(positions, nodes, strict=True), key=lambda item: item[0])),
            n_nodes=int(record["n_nodes"]),
            ir_version=int(record["ir_version"]),
            made=frozenset(map(str, record["made"])),
            added=frozenset(map(str, record["added"])),
        )
    except GraphError:
        raise
    except Exception as error:  # what is wrong with a file we did not write can be anything
        raise GraphError(f"the record of the unsteered graph is damaged: {error!r}") from error


def _without_steering(graph: onnx.GraphProto, original: Original) -> list[onnx.NodeProto]:
    """The nodes but for those of the steering, and what served only them."""
    made = {name for node in original.nodes.values() for name in node.output if name}
    made |= original.made
    needed = {name for node in original.nodes.values() for name in node.input if name}
    needed.update(output.name for output in graph.output)
    kept: list[onnx.NodeProto] = []
    served: set[str] = set()  # tensors that nodes left out read
    for node in reversed(graph.node):
        outputs = {name for name in node.output if name}
        wanted = outputs & needed
        replaced = outputs & made
        if replaced and wanted - made:
            raise GraphError(
                f"'{min(replaced)}' is made together with '{min(wanted - made)}', which it was not "
                "before: the graph was changed after it was steered. Start from the unsteered graph"
            )
        if replaced or (outputs & served and not wanted):
            served.update(_reads(node))
        else:
            kept.append(node)
            needed.update(_reads(node))
    return kept[::-1]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, in its subgraphs too."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            for inner in subgraph.node:
                names |= _reads(inner)
            names.update(output.name for output in subgraph.output)
    return names


def _in_place(
    kept: list[onnx.NodeProto], originals: Mapping[int, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    rest = iter(kept)
    total = len(kept) + len(originals)
    return [originals[p] if p in originals else next(rest) for p in range(total)]


def _sorted(nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in topological order."""
    waiting = list(nodes)
    makers = {name: node for node in waiting for name in node.output if name}
    known = {value.name for value in (*graph.input, *graph.initializer)}
    done: list[onnx.NodeProto] = []
    made = set(known)
    while waiting:
        ready: list[onnx.NodeProto] = []
        later: list[onnx.NodeProto] = []
        for node in waiting:
            missing = [name for name in _reads(node) if name in makers and name not in made]
            (later if missing else ready).append(node)
            if not missing:
                made.update(node.output)
        if not ready:
            raise GraphError(
                "the original nodes do not fit the graph any more: it was changed after it was "
                "steered. Start from the unsteered graph"
            )
        done += ready
        waiting = later
    return done


def _remove(field: Any, unwanted: Callable[[Any], bool]) -> None:
    for position in reversed(range(len(field))):
        if unwanted(field[position]):
            del field[position]
