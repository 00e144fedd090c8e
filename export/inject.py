"""Puts steering into a finished ONNX graph, whoever exported, fused or quantised it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import TensorProto, helper

from grains_ext.export.functions import DOMAIN, add_functions
from grains_ext.export.locate import (
    SKIP_NORMS,
    GraphError,
    GraphIndex,
    Site,
    blocks_in_config,
    load_graph,
    locate,
)
from grains_ext.export.norms import SINGLE_NODE_NORMS, NormMatcher, attributes_of
from grains_ext.export.saving import save_graph

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors

STRENGTH_NAME = "grains.strength"

_TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
# The fused operators' own bound on |h + a v| / |h|; vectors made with another one stay unfused.
_FUSED_EPS = 1e-6


def direction_name(block: int) -> str:
    """Name of the initializer, and overridable input, that holds a block's direction."""
    return f"grains.layers.{block}.direction"


@dataclass(frozen=True)
class Injected:
    """One steered block: its number, the operator that steers it, the tensor it writes."""

    block: int
    op_type: str
    tensor: str


def inject(
    model_path: str | Path,
    vectors: SteeringVectors,
    output_path: str | Path,
    *,
    blocks: Sequence[int] | None = None,
    strength: float | None = None,
    fuse: bool = True,
    baked: bool = False,
) -> list[Injected]:
    """Writes a copy of an ONNX decoder whose blocks' outputs are steered.

    model_path: a decoder with logits and key/value cache outputs, float32, float16 or bfloat16
        activations. Weights may be quantised or in external files: those are not rewritten; they
        are copied where the output lies in another folder. A config.json or genai_config.json
        beside the graph is checked for the number of blocks.
    vectors: the directions, each [hidden size].
    output_path: may be model_path itself. The file appears complete or not at all.
    blocks: which of the vectors' blocks to steer; all of them if None.
    strength: `vectors.strength` if None.
    fuse: replaces residual addition, steering and the norm after it by one operator where the
        graph has exactly that; else the addition is kept and followed by a `grains.Steer`.
    baked: keeps directions and strength as constants. Otherwise they are graph inputs with a
        default too, `grains.layers.{i}.direction` and `grains.strength`: feed them to override.

    The operators' bodies travel with the file: it runs on an onnxruntime without the op library.

    Returns what was injected, by block. Raises GraphError where the graph is not a decoder that
    can be steered or is steered already, ValueError where vectors and graph do not fit.
    """
    model_path, output_path = Path(model_path), Path(output_path)
    model = load_graph(model_path)
    if any(node.domain == DOMAIN for node in model.graph.node):
        raise GraphError(
            f"'{model_path}' is steered already; inject into the unsteered graph. To change only "
            f"strength or directions, feed '{STRENGTH_NAME}' and '{direction_name(0)}', ..."
        )
    sites = locate(model, n_blocks=blocks_in_config(model_path.parent))
    chosen = _chosen_blocks(vectors, blocks, len(sites))
    surgery = _Surgery(model, vectors, fuse)
    injected = [surgery.steer(sites[block]) for block in chosen]
    surgery.apply()
    strength = vectors.strength if strength is None else strength
    constants = [*surgery.directions, helper.make_tensor(STRENGTH_NAME, 1, [], [strength])]
    model.graph.initializer.extend(constants)
    if not baked:
        model.graph.input.extend(
            helper.make_tensor_value_info(c.name, c.data_type, list(c.dims)) for c in constants
        )
    add_functions(model)
    save_graph(model, model_path, output_path)
    return injected


def _chosen_blocks(
    vectors: SteeringVectors, blocks: Sequence[int] | None, n_blocks: int
) -> list[int]:
    chosen = sorted(vectors.directions) if blocks is None else sorted(set(blocks))
    if not chosen:
        raise ValueError("no block to steer: the vectors, or `blocks`, are empty")
    lacking = [block for block in chosen if block not in vectors.directions]
    if lacking:
        raise ValueError(
            f"`blocks` names {lacking}, for which there is no direction; the vectors hold "
            f"blocks {sorted(vectors.directions)}"
        )
    outside = [block for block in chosen if not 0 <= block < n_blocks]
    if outside:
        raise ValueError(
            f"the vectors steer blocks {outside}, but the graph has blocks 0 to {n_blocks - 1}: "
            "they belong to another model, or pass `blocks`"
        )
    return chosen


class _Surgery:
    """Collects the changes to a graph, then makes them at once: positions stay valid meanwhile."""

    def __init__(self, model: onnx.ModelProto, vectors: SteeringVectors, fuse: bool) -> None:
        self.model = model
        self.vectors = vectors
        self.fuse = fuse and vectors.eps == _FUSED_EPS
        self.index = GraphIndex(model.graph)
        self.norms = NormMatcher(self.index)
        self.types = _ActivationTypes(model, self.index)
        self.directions: list[TensorProto] = []
        self.replaced: dict[int, list[onnx.NodeProto]] = {}
        self.removed: set[int] = set()

    def steer(self, site: Site) -> Injected:
        elem_type, size = self.types.of(site)
        direction = self._direction(site.block, elem_type, size)
        if site.kind == "skip_norm":
            nodes, tensor = self._at_skip_norm(site, direction)
        else:
            nodes, tensor = self._at_add(site, direction, elem_type, size)
        self.replaced[site.node] = nodes
        op_type = next(node.op_type for node in nodes if node.domain == DOMAIN)
        return Injected(site.block, op_type, tensor)

    def apply(self) -> None:
        nodes: list[onnx.NodeProto] = []
        for position, node in enumerate(self.index.nodes):
            if position not in self.removed:
                nodes.extend(self.replaced.get(position, [node]))
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def _direction(self, block: int, elem_type: int, size: int) -> str:
        direction = self.vectors.directions[block]
        if tuple(direction.shape) != (size,):
            raise ValueError(
                f"the direction of block {block} has shape {list(direction.shape)}, but the "
                f"graph's hidden size is {size}: the vectors belong to another model"
            )
        values = direction.detach().to("cpu", _TORCH_DTYPES[elem_type]).contiguous()
        raw = values.view(torch.uint8).numpy().tobytes()
        name = direction_name(block)
        self.directions.append(helper.make_tensor(name, elem_type, [size], raw, raw=True))
        return name

    def _at_add(
        self, site: Site, direction: str, elem_type: int, size: int
    ) -> tuple[list[onnx.NodeProto], str]:
        add = self.index.nodes[site.node]
        norm = self.norms.find(site.tensor, size, elem_type) if self.fuse else None
        # One model holds one body per operator: LayerNorms with a bias are the ones to fuse.
        if norm is not None and (norm.kind == "rms" or norm.bias):
            self.removed |= norm.nodes
            fused = self._fused(
                site.block, list(add.input), direction,
                kind=norm.kind, weight=norm.weight, bias=norm.bias, epsilon=norm.epsilon,
                outputs=[norm.output, site.tensor],
            )  # fmt: skip
            return [fused], site.tensor
        # The steered tensor takes the old name: readers and graph outputs need no change.
        unsteered = _name(site.block, "unsteered")
        plain = onnx.NodeProto()
        plain.CopyFrom(add)
        plain.output[0] = unsteered
        return [plain, self._steer(site.block, unsteered, direction, site.tensor)], site.tensor

    def _at_skip_norm(self, site: Site, direction: str) -> tuple[list[onnx.NodeProto], str]:
        node = self.index.nodes[site.node]
        kind = "rms" if node.op_type == "SkipSimplifiedLayerNormalization" else "layer"
        inputs = [*node.input, "", "", ""]
        stream, branch, weight = inputs[:3]
        norm_bias, skip_bias = ("", inputs[3]) if kind == "rms" else (inputs[3], inputs[4])
        # Its outputs: normed, mean, inverse standard deviation, residual.
        outputs = [*node.output, "", "", ""][: SKIP_NORMS[node.op_type] + 1]
        normed = outputs[0] or _name(site.block, "normed")
        residual = outputs[3] or _name(site.block, "residual")
        epsilon = attributes_of(node).get("epsilon", 1e-12 if kind == "layer" else 1e-5)
        nodes = []
        if skip_bias:
            biased = _name(site.block, "biased")
            nodes.append(helper.make_node("Add", [branch, skip_bias], [biased], name=biased))
            branch = biased
        if self.fuse and not any(outputs[1:3]) and (kind == "rms" or norm_bias):
            fused = self._fused(
                site.block, [stream, branch], direction,
                kind=kind, weight=weight, bias=norm_bias, epsilon=epsilon,
                outputs=[normed, residual],
            )  # fmt: skip
            return [*nodes, fused], residual
        unsteered = _name(site.block, "unsteered")
        op_type = "SimplifiedLayerNormalization" if kind == "rms" else "LayerNormalization"
        parameters = [weight, norm_bias] if norm_bias else [weight]
        # Without a mean, the inverse deviation is the second output.
        statistics = outputs[2:3] if kind == "rms" else outputs[1:3]
        nodes += [
            self._node(site.block, "Add", [stream, branch], [unsteered]),
            self._steer(site.block, unsteered, direction, residual),
            self._node(
                site.block, op_type, [residual, *parameters],
                [normed, *statistics] if any(statistics) else [normed],
                axis=-1, epsilon=epsilon,
            ),
        ]  # fmt: skip
        return nodes, residual

    def _steer(self, block: int, hidden: str, direction: str, output: str) -> onnx.NodeProto:
        return self._node(
            block, "Steer", [hidden, direction, STRENGTH_NAME], [output],
            domain=DOMAIN, epsilon=self.vectors.eps,
        )  # fmt: skip

    def _fused(
        self, block: int, summands: list[str], direction: str,
        *, kind: str, weight: str, bias: str, epsilon: float, outputs: list[str],
    ) -> onnx.NodeProto:  # fmt: skip
        op_type = "SkipSteerRmsNorm" if kind == "rms" else "SkipSteerLayerNorm"
        inputs = [*summands, direction, STRENGTH_NAME, weight, *([bias] if bias else [])]
        return self._node(block, op_type, inputs, outputs, domain=DOMAIN, epsilon=epsilon)

    @staticmethod
    def _node(
        block: int, op_type: str, inputs: list[str], outputs: list[str],
        *, domain: str = "", **attributes: Any,
    ) -> onnx.NodeProto:  # fmt: skip
        name = _name(block, op_type)
        return helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes)


def _name(block: int, part: str) -> str:
    return f"grains.layers.{block}.{part}"


class _ActivationTypes:
    """Element type and hidden size of the residual stream at a site."""

    def __init__(self, model: onnx.ModelProto, index: GraphIndex) -> None:
        self.model = model
        self.index = index
        self.declared = _declared(model.graph)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def of(self, site: Site) -> tuple[int, int]:
        node = self.index.nodes[site.node]
        names = [name for name in (site.tensor, *node.input[:2]) if name]
        found = self._of_norm(node) if site.kind == "skip_norm" else None
        found = found or _first(self.declared, names) or _first(self._inferred, names)
        if found is None:  # shape inference ends at operators that only onnxruntime knows
            readers = (self.index.nodes[p] for p in self.index.consumers.get(site.tensor, []))
            norms = [n for n in readers if n.op_type in SINGLE_NODE_NORMS]
            found = next(filter(None, map(self._of_norm, norms)), None)
        if found is None:
            raise GraphError(
                f"cannot tell the hidden size of block {site.block}'s output '{site.tensor}': the "
                "graph carries no shapes. Run onnxruntime's symbolic shape inference on it first"
            )
        if found[0] not in _TORCH_DTYPES:
            raise GraphError(
                f"block {site.block}'s output is {TensorProto.DataType.Name(found[0])}; only "
                "float32, float16 and bfloat16 activations can be steered"
            )
        return found

    @cached_property
    def _inferred(self) -> dict[str, tuple[int, int]]:
        return _declared(onnx.shape_inference.infer_shapes(self.model).graph)

    def _of_norm(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """From a norm's weight, which is [hidden size] and of the activations' type."""
        weight = self.weights.get(node.input[1 if node.op_type in SINGLE_NODE_NORMS else 2])
        return None if weight is None else (weight.data_type, weight.dims[0])


def _first(types: dict[str, tuple[int, int]], names: list[str]) -> tuple[int, int] | None:
    return next((types[name] for name in names if name in types), None)


def _declared(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """Element type and last dimension of every tensor whose last dimension is known."""
    known = {}
    for value in (*graph.value_info, *graph.output, *graph.input):
        tensor = value.type.tensor_type
        if tensor.elem_type and tensor.shape.dim and tensor.shape.dim[-1].dim_value > 0:
            known[value.name] = (tensor.elem_type, tensor.shape.dim[-1].dim_value)
    return known
