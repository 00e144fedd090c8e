"""What the names in a graph say of its blocks: a second opinion on what the structure says.

Exporters leave a module's path somewhere: in a node's metadata, in its name, in the names of the
weights it reads or of the tensors it makes. None of these is sure, so all nodes of a block vote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from grains_ext.export.index import GraphIndex

_BLOCK = re.compile(r"(?:layers?|blocks?)[._/](\d+)(?!\d)|(?:^|[./])h[./](\d+)(?!\d)")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class NamedOtherwise:
    """A block whose nodes are, by most of their names, of the block `named`.

    votes: how many nodes say so, of how many that name any block. example: one such name.
    """

    block: int
    named: int
    votes: int
    of: int
    example: str


def named_otherwise(index: GraphIndex, ends: list[int], start: int | None) -> list[NamedOtherwise]:
    """The blocks that most names in them give another number.

    ends: position of the node that ends each block, in order. What lies between two ends is a
        block; blocks without telling names are not judged.
    start: position of the node whose output the first block reads, None where it is an input. What
        lies before, such as an image encoder with blocks of its own, has no vote.
    """
    stop = {*ends, *([] if start is None else [start])}
    disagreements = []
    for block, end in enumerate(ends):
        examples: dict[int, str] = {}
        votes: Counter[int] = Counter()
        inputs = [name for name in index.nodes[end].input if name]
        for position in index.ancestors(inputs, stop):
            if position in stop:
                continue
            for text in _names(index, index.nodes[position]):
                if (match := _BLOCK.search(text)) is not None:
                    number = int(match[1] or match[2])
                    votes[number] += 1
                    examples.setdefault(number, text)
                    break
        if not votes:
            continue
        named, most = votes.most_common(1)[0]
        if named != block and 2 * most > votes.total():
            disagreements.append(NamedOtherwise(block, named, most, votes.total(), examples[named]))
    return disagreements


def _names(index: GraphIndex, node: onnx.NodeProto) -> Iterator[str]:
    """Where a node's block may be told, the most reliable first."""
    yield from (entry.value for entry in node.metadata_props if entry.key == _SCOPES)
    yield node.name
    yield from (name for name in node.input if name in index.constants)
    yield from node.output
