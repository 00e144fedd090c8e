"""Model-local function bodies of the `grains` ops in standard ONNX operators.

A steered graph carries these bodies along. An onnxruntime without the op library inlines them, so
the file runs everywhere; once the library is registered, onnxruntime keeps the nodes and runs the
fused kernels. The bodies compute in float32, as the kernels do, and cast back at the end.

A body is made for the inputs that a model's nodes name: a FunctionProto cannot ask whether an
optional input is there, and overloads need an IR version that older runtimes refuse. So within one
model, all nodes of one op name the same optional inputs.

Against the kernels, the bodies give up three things: their float32 sums of squares overflow above
row norms of about 1e19 and vanish below about 1e-22, where the kernels go on in float64; the sign
of a zero, which onnxruntime's Where drops, in rows that come back unchanged; and IgAccumulate over
no tokens, which onnxruntime's reductions refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

DOMAIN = "grains"
OPSET_VERSION = 1
# LayerNormalization and CastLike are there from 17 on.
MINIMUM_OPSET = 17
# The first with default values for attributes of functions.
_MINIMUM_IR_VERSION = 9
_MINIMUM_RELATIVE_NORM = 1e-6
_ONNXRUNTIME_DOMAIN = "com.microsoft"
_NO_GAP = (
    "an optional input is left out before one that is given, which crashes older releases of "
    "onnxruntime (1.20) while they load the model; give a `bias` of zeros"
)


@dataclass(frozen=True)
class OpSignature:
    """Inputs, outputs and attribute defaults of one op, in the order of its schema."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, float], ...] = ()
    optional: tuple[str, ...] = ()


SIGNATURES: dict[str, OpSignature] = {
    "Steer": OpSignature(
        inputs=("hidden", "vectors", "strength", "index"),
        outputs=("steered",),
        attributes=(("epsilon", 1e-6),),
        optional=("index",),
    ),
    "SkipSteerRmsNorm": OpSignature(
        inputs=("x", "skip", "vectors", "strength", "weight", "index"),
        outputs=("normed", "residual"),
        attributes=(("epsilon", 1e-6), ("weight_offset", 0.0)),
        optional=("index",),
    ),
    "SkipSteerLayerNorm": OpSignature(
        inputs=("x", "skip", "vectors", "strength", "weight", "bias", "index"),
        outputs=("normed", "residual"),
        attributes=(("epsilon", 1e-5),),
        optional=("bias", "index"),
    ),
    "IgInterpolate": OpSignature(inputs=("input", "baseline", "alphas"), outputs=("interpolated",)),
    "IgAccumulate": OpSignature(
        inputs=("grads", "input", "baseline", "weights"), outputs=("attributions",)
    ),
}


class _Body:
    """Collects the nodes of one function body and names the values between them."""

    def __init__(self, opset_version: int) -> None:
        self.opset_version = opset_version
        self.nodes: list[NodeProto] = []

    def op(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, value: float | int | Sequence[int], dtype: type[np.generic]) -> str:
        name = f"v{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value, dtype), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def attribute(self, attribute: str) -> str:
        """The float attribute of the function, as a scalar."""
        name = f"v{len(self.nodes)}"
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(_reference("value_float", attribute))
        self.nodes.append(node)
        return name

    def reduce(self, op_type: str, data: str, axis: int) -> str:
        """A reduction over one axis, which is kept; the axes were an attribute before opset 18."""
        if self.opset_version < 18:
            return self.op(op_type, data, axes=[axis])
        return self.op(op_type, data, self.ints(axis))

    def to_float(self, value: str) -> str:
        return self.op("Cast", value, to=TensorProto.FLOAT)


def _reference(name: str, attribute: str) -> AttributeProto:
    return AttributeProto(name=name, type=AttributeProto.FLOAT, ref_attr_name=attribute)


@dataclass(frozen=True)
class _Steering:
    """What steering does to rows: those of `keep` stay, the others become `scaled` [..., D].

    grouped: shape under which both stand for the rows, and `shape` the rows' own; "" for the same.
    """

    keep: str
    scaled: str
    grouped: str = ""
    shape: str = ""

    def choose(self, body: _Body, kept: str, steered: str) -> str:
        if self.grouped:
            kept = body.op("Reshape", kept, self.grouped, allowzero=1)
        result = body.op("Where", self.keep, kept, steered)
        return body.op("Reshape", result, self.shape, allowzero=1) if self.shape else result


def _steering(
    body: _Body, hidden: str, vectors: str, strength: str, index: str, min_relative_norm: str
) -> _Steering:
    """(h + a v) |h| / |h + a v| of the rows `hidden` [..., D] float32, and which rows stay."""
    bank = body.to_float(vectors)
    shape = grouped = not_steered = ""
    if index:
        shape = body.op("Shape", hidden)
        # Group the rows by index entry, [entries, rows per entry, D]: one form for an index per
        # row and per batch row. Divided by at least 1, so that no rows at all pass too.
        dim = body.op("Shape", hidden, start=-1)
        leading = body.op("Shape", hidden, end=-1)
        entries = body.op("Reshape", body.op("Size", index), body.ints(1))
        rows = body.reduce("ReduceProd", leading, 0)
        per_entry = body.op("Div", rows, body.op("Max", entries, body.ints(1)))
        grouped = body.op("Concat", entries, per_entry, dim, axis=0)
        hidden = body.op("Reshape", hidden, grouped, allowzero=1)

        flat = body.op("Reshape", index, body.ints(-1))
        not_steered = body.op("Equal", flat, body.constant(-1, np.int32))
        # Gather counts entries below 0 from the end; send those under -1 where it refuses them.
        row = body.op("Max", flat, body.constant(0, np.int32))
        below = body.op("Less", flat, body.constant(-1, np.int32))
        row = body.op("Where", below, body.constant(2**31 - 1, np.int32), row)
        bank = body.op("Reshape", bank, body.op("Concat", body.ints(-1), dim, axis=0))
        vector = body.op("Unsqueeze", body.op("Gather", bank, row), body.ints(1))
        bank_rows = body.op("Shape", bank, end=1)
        strengths = body.op("Expand", strength, bank_rows)
        column = body.ints(1, 2)
        amount = body.op("Unsqueeze", body.op("Gather", strengths, row), column)
        not_steered = body.op("Unsqueeze", not_steered, column)
    else:
        vector = body.op("Reshape", bank, body.ints(-1))
        amount = body.op("Reshape", strength, body.ints(1))

    moved = body.op("Add", hidden, body.op("Mul", amount, vector))
    # Squares, and ReduceSum: onnxruntime's ReduceL2 takes twice the time of Mul and ReduceSum.
    square = body.op("ReduceSum", body.op("Mul", hidden, hidden), body.ints(-1))
    moved_square = body.op("ReduceSum", body.op("Mul", moved, moved), body.ints(-1))
    least = body.op("Mul", square, body.op("Mul", min_relative_norm, min_relative_norm))
    keep = body.op("LessOrEqual", moved_square, least)
    keep = body.op("Or", keep, body.op("Equal", amount, body.constant(0.0, np.float32)))
    if not_steered:
        keep = body.op("Or", keep, not_steered)
    ratio = body.op("Sqrt", body.op("Div", square, moved_square))
    return _Steering(keep, body.op("Mul", moved, ratio), grouped, shape)


def _steer(body: _Body, given: frozenset[str]) -> None:
    hidden = body.to_float("hidden")
    index = "index" if "index" in given else ""
    least = body.attribute("epsilon")
    steering = _steering(body, hidden, "vectors", "strength", index, least)
    result = steering.choose(body, hidden, steering.scaled)
    body.op("CastLike", result, "hidden", output="steered")


def _skip_steering(body: _Body, x: str, skip: str, given: frozenset[str]) -> tuple[str, _Steering]:
    """x + skip, and what steering does to it."""
    total = body.op("Add", x, skip)
    index = "index" if "index" in given else ""
    least = body.constant(_MINIMUM_RELATIVE_NORM, np.float32)
    return total, _steering(body, total, "vectors", "strength", index, least)


def _skip_steered(body: _Body, given: frozenset[str]) -> str:
    total, steering = _skip_steering(body, body.to_float("x"), body.to_float("skip"), given)
    residual = steering.choose(body, total, steering.scaled)
    body.op("CastLike", residual, "x", output="residual")
    return residual


def _offset_weight(body: _Body) -> str:
    return body.op("Add", body.to_float("weight"), body.attribute("weight_offset"))


def _skip_steer_rms_norm(body: _Body, given: frozenset[str]) -> None:
    residual = _skip_steered(body, given)
    square = body.reduce("ReduceMean", body.op("Mul", residual, residual), -1)
    root = body.op("Sqrt", body.op("Add", square, body.attribute("epsilon")))
    normed = body.op("Mul", body.op("Div", residual, root), _offset_weight(body))
    body.op("CastLike", normed, "x", output="normed")


def _skip_steer_rms_norm_by_onnxruntime(body: _Body, given: frozenset[str]) -> None:
    """Rows that stay go into onnxruntime's operator as they came: they leave it as they would have.

    The others go in as scaled + 0.
    """
    x, skip = body.to_float("x"), body.to_float("skip")
    _, steering = _skip_steering(body, x, skip, given)
    summands = [
        steering.choose(body, x, steering.scaled),
        steering.choose(body, skip, body.constant(0.0, np.float32)),
    ]
    weight = _offset_weight(body)
    normed, residual = f"v{len(body.nodes)}", f"v{len(body.nodes)}_residual"
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization",
        [*summands, weight],
        [normed, "", "", residual],
        domain=_ONNXRUNTIME_DOMAIN,
    )
    node.attribute.append(_reference("epsilon", "epsilon"))
    body.nodes.append(node)
    body.op("CastLike", normed, "x", output="normed")
    body.op("CastLike", residual, "x", output="residual")


def _skip_steer_layer_norm(body: _Body, given: frozenset[str]) -> None:
    inputs = [_skip_steered(body, given), body.to_float("weight")]
    if "bias" in given:
        inputs.append(body.to_float("bias"))
    name = f"v{len(body.nodes)}"
    node = helper.make_node("LayerNormalization", inputs, [name], axis=-1)
    node.attribute.append(_reference("epsilon", "epsilon"))
    body.nodes.append(node)
    body.op("CastLike", name, "x", output="normed")


def _ig_interpolate(body: _Body, given: frozenset[str]) -> None:
    # alphas [S] or [S, B] to [S, 1 or B, 1, 1]
    shape = body.op("Concat", body.op("Shape", "alphas"), body.ints(1, 1, 1), axis=0)
    shape = body.op("Slice", shape, body.ints(0), body.ints(4))
    alphas = body.op("Reshape", "alphas", shape, allowzero=1)
    inputs, baseline = body.to_float("input"), body.to_float("baseline")
    difference = body.op("Sub", inputs, baseline)
    # From the nearer end, so that both ends are exact: x + (alpha - 1)(x - b) from one half on.
    near = body.op("Less", alphas, body.constant(0.5, np.float32))
    start = body.op("Where", near, baseline, inputs)
    from_end = body.op("Sub", alphas, body.constant(1.0, np.float32))
    way = body.op("Where", near, alphas, from_end)
    point = body.op("Add", start, body.op("Mul", way, difference))
    at_end = body.op("Equal", way, body.constant(0.0, np.float32))  # also where the way is Inf
    result = body.op("Where", at_end, start, point)
    body.op("CastLike", result, "input", output="interpolated")


def _ig_accumulate(body: _Body, given: frozenset[str]) -> None:
    # weights [S] or [S, B] to [S, 1 or B, 1]
    shape = body.op("Concat", body.op("Shape", "weights"), body.ints(1, 1), axis=0)
    shape = body.op("Slice", shape, body.ints(0), body.ints(3))
    weights = body.op("Reshape", "weights", shape, allowzero=1)
    difference = body.op("Sub", body.to_float("input"), body.to_float("baseline"))
    product = body.op("Mul", body.to_float("grads"), difference)
    per_step = body.op("ReduceSum", product, body.ints(-1), keepdims=0)
    weighted = body.op("Mul", weights, per_step)
    body.op("ReduceSum", weighted, body.ints(0), keepdims=0, output="attributions")


_BODIES = {
    "Steer": _steer,
    "SkipSteerRmsNorm": _skip_steer_rms_norm,
    "SkipSteerLayerNorm": _skip_steer_layer_norm,
    "IgInterpolate": _ig_interpolate,
    "IgAccumulate": _ig_accumulate,
}


def function_proto(
    op_type: str,
    opset_version: int,
    *,
    with_index: bool = False,
    with_bias: bool = True,
    by_onnxruntime: bool = False,
) -> FunctionProto:
    """The body of one op as a model-local function of domain `grains`.

    Args:
        op_type: a key of `SIGNATURES`.
        opset_version: version of the default domain that the model imports, 17 or newer; the body
            imports the same.
        with_index: the nodes name the optional input `index`.
        with_bias: the nodes name the optional input `bias` (SkipSteerLayerNorm only).
        by_onnxruntime: for SkipSteerRmsNorm, a body around onnxruntime's own
            SkipSimplifiedLayerNormalization: rows that are not steered keep its every bit. For
            graphs that have this operator anyway.

    Raises:
        ValueError: unknown op, an `index` for an op without one, an `index` without a `bias` for an
            op that takes both, or an opset older than 17.
    """
    if op_type not in SIGNATURES:
        raise ValueError(f"unknown op {op_type!r}; the ops of domain {DOMAIN!r}: {list(_BODIES)}")
    if opset_version < MINIMUM_OPSET:
        raise ValueError(
            f"the model imports opset {opset_version}; the function bodies need {MINIMUM_OPSET} or "
            "newer: convert it with onnx.version_converter.convert_version first"
        )
    signature = SIGNATURES[op_type]
    if with_index and "index" not in signature.optional:
        raise ValueError(f"{op_type} takes no input `index`")
    if "bias" in signature.optional and with_index and not with_bias:
        raise ValueError(f"{op_type}: {_NO_GAP}")
    left_out = {"index": not with_index, "bias": not with_bias}
    inputs = [name for name in signature.inputs if not left_out.get(name, False)]

    body = _Body(opset_version)
    opsets = [helper.make_opsetid("", opset_version)]
    if by_onnxruntime and op_type == "SkipSteerRmsNorm":
        _skip_steer_rms_norm_by_onnxruntime(body, frozenset(inputs))
        opsets.append(helper.make_opsetid(_ONNXRUNTIME_DOMAIN, 1))
    else:
        _BODIES[op_type](body, frozenset(inputs))
    return helper.make_function(
        DOMAIN,
        op_type,
        inputs,
        signature.outputs,
        body.nodes,
        opset_imports=opsets,
        attribute_protos=[helper.make_attribute(name, v) for name, v in signature.attributes],
    )


def add_functions(model: ModelProto, *, by_onnxruntime: bool = False) -> None:
    """Give a model the functions that its `grains` nodes need, and the import of their domain.

    Works in place, also for nodes in subgraphs. Functions of the domain that the model has already
    are replaced. The IR version is raised to 9 where it is lower. by_onnxruntime: as in
    `function_proto`.

    Raises:
        ValueError: unknown op, missing input, opset older than 17, or nodes of one op that name
            different optional inputs.
    """
    variants: dict[str, tuple[bool, bool]] = {}
    for node in _grains_nodes(model.graph):
        variant = _optional_inputs(node)
        if variants.setdefault(node.op_type, variant) != variant:
            raise ValueError(
                f"node {node.name!r}: {node.op_type} names other optional inputs than the nodes of "
                "this op before it. One model holds one function per op: give all of them an "
                "`index` (zeros steer every row with vector 0), and a `bias` (zeros), or none"
            )

    others = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(others)
    if not variants:
        return
    opset_version = default_opset(model)
    for op_type, (with_index, with_bias) in variants.items():
        function = function_proto(
            op_type,
            opset_version,
            with_index=with_index,
            with_bias=with_bias,
            by_onnxruntime=by_onnxruntime,
        )
        model.functions.append(function)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))
    model.ir_version = max(model.ir_version, _MINIMUM_IR_VERSION)


def default_opset(model: ModelProto) -> int:
    """The version of the default operator domain that a model imports."""
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            return int(opset.version)
    raise ValueError("the model imports no version of the default ONNX operator domain")


def _optional_inputs(node: NodeProto) -> tuple[bool, bool]:
    """Whether a `grains` node names `index`, and whether it names `bias`; checks its inputs."""
    if node.op_type not in SIGNATURES:
        raise ValueError(
            f"node {node.name!r}: unknown op {node.op_type!r}; the ops of domain {DOMAIN!r}: "
            f"{list(SIGNATURES)}"
        )
    signature = SIGNATURES[node.op_type]
    given = list(node.input)
    while given and not given[-1]:  # trailing empty names say no more than their absence
        given.pop()
    named = {name for name, value in zip(signature.inputs, given, strict=False) if value}
    missing = set(signature.inputs) - named - set(signature.optional)
    if missing or len(given) > len(signature.inputs):
        raise ValueError(
            f"node {node.name!r}: {node.op_type} has inputs {list(node.input)}; expected "
            f"{list(signature.inputs)}, of which {list(signature.optional)} may be left out"
        )
    if "" in given:
        raise ValueError(f"node {node.name!r}: {node.op_type}: {_NO_GAP}")
    return "index" in named, "bias" in named


def _grains_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _grains_nodes(subgraph)
