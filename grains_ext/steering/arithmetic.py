"""Arithmetic of steering vectors: sums, multiples, projections, interpolation, angles, lengths.

Every function works on what is added to a hidden state at strength 1: a direction times its block's
factor (`SteeringVectors.effective`). Results have no block_strengths; eps, normalize and the gate
are the first operand's.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from grains_ext.steering.vectors import SteeringVectors

Missing = Literal["zero", "common"]
# Below this angle, in radians, a great circle and its chord are one in float32.
_SMALL_ANGLE = 1e-4


def add(*vectors: SteeringVectors, missing: Missing = "zero") -> SteeringVectors:
    """The sum, block by block.

    missing: for a block that some have no direction for: "zero", theirs is zero; "common", the
        block is left out.

    The strength is the first one's, and the others' directions are scaled so that the sum at this
    strength is the sum of all of them at their own: add(u, v) pushes as u and v do together.

    Raises ValueError for nothing to add, different hidden sizes, one with normalize and one
    without, a first strength of zero where another's is not, or no block in common
    (missing="common").
    """
    if not vectors:
        raise ValueError("nothing to add: give one or more SteeringVectors")
    first = vectors[0]
    blocks = _blocks(vectors, missing)
    factors = [1.0, *(_relative_strength(first, other) for other in vectors[1:])]
    scaled = [_directions(v) for v in vectors]
    zero = torch.zeros(first.hidden_size, dtype=torch.float64)
    directions = {
        block: sum((f * d.get(block, zero) for f, d in zip(factors, scaled, strict=True)), zero)
        for block in blocks
    }
    return _made(first, directions, "add", vectors)


def subtract(
    minuend: SteeringVectors, subtrahend: SteeringVectors, *, missing: Missing = "zero"
) -> SteeringVectors:
    """The difference, block by block: add(minuend, scale(subtrahend, -1)). Errors as of `add`."""
    difference = add(minuend, scale(subtrahend, -1.0), missing=missing)
    return _made(minuend, _directions(difference), "subtract", (minuend, subtrahend))


def scale(
    vectors: SteeringVectors, factor: float, *, blocks: Iterable[int] | None = None
) -> SteeringVectors:
    """The directions times a number, in all blocks or some; the strength stays.

    Raises ValueError where the factor is not finite, or a block has no direction.
    """
    if not math.isfinite(factor):
        raise ValueError(f"the factor must be a finite number, got {factor}")
    chosen = set(vectors.blocks if blocks is None else vectors.subset(blocks).blocks)
    directions = {
        block: direction * factor if block in chosen else direction
        for block, direction in _directions(vectors).items()
    }
    return _made(vectors, directions, "scale", (vectors,), factor=float(factor))


def project_out(
    vectors: SteeringVectors, *others: SteeringVectors, missing: Missing = "zero"
) -> SteeringVectors:
    """What is left of each direction when its parts along the others' directions are taken away.

    v - Q Qᵀ v, with Q an orthonormal basis (QR) of the others' directions at that block; the result
    is orthogonal to each of them, and not rescaled. The others' lengths and strengths play no part.

    missing: for a block that none of the others have: "zero", nothing is taken away there;
        "common", it is left out.

    Raises ValueError for no others, different hidden sizes, or no block in common.
    """
    if not others:
        raise ValueError("project_out: name one or more SteeringVectors to take away")
    _check_sizes((vectors, *others))
    there = {block for other in others for block in other.blocks}
    common = [block for block in vectors.blocks if block in there]
    if not common:
        raise ValueError(_no_common_blocks((vectors, *others)))
    removed = [_directions(other) for other in others]
    directions = {}
    for block, direction in _directions(vectors).items():
        if block in common:
            basis = _basis([d[block] for d in removed if block in d])
            # Twice is enough for orthogonality to rounding where little is left (Kahan).
            for _ in range(2):
                direction = direction - basis @ (basis.T @ direction)
        elif missing == "common":
            continue
        directions[block] = direction
    return _made(vectors, directions, "project_out", (vectors, *others))


def interpolate(
    start: SteeringVectors,
    end: SteeringVectors,
    weight: float,
    *,
    spherical: bool = False,
) -> SteeringVectors:
    """Between two: start at weight 0, end at 1; beyond them for other weights.

    Linear: (1 - w) u + w v. Spherical: the direction turns along the great circle,
    (sin((1 - w) θ) u' + sin(w θ) v') / sin θ with unit u', v' at the angle θ (Shoemake, "Animating
    Rotation with Quaternion Curves", 1985), and the length goes linearly from ‖u‖ to ‖v‖. So does
    the strength, either way.

    Raises ValueError where the blocks, hidden sizes or normalize differ, the weight is not finite,
    or, for a spherical one, a direction is zero, two are opposite, or the length would be negative.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight must be a finite number, got {weight}")
    _check_sizes((start, end))
    _check_normalize((start, end))
    if start.blocks != end.blocks:
        raise ValueError(
            f"interpolation needs the same blocks on both sides, got {start.blocks} and "
            f"{end.blocks}: take a subset() of each"
        )
    u, v = _directions(start), _directions(end)
    between: Callable[[int, Tensor, Tensor, float], Tensor] = _spherical if spherical else _linear
    directions = {block: between(block, u[block], v[block], weight) for block in u}
    made = _made(
        start, directions, "interpolate", (start, end), weight=float(weight), spherical=spherical
    )
    return made.with_strength((1 - weight) * start.strength + weight * end.strength)


def cosine_table(
    vectors: SteeringVectors, other: SteeringVectors | None = None
) -> dict[tuple[int, int], float]:
    """Cosines of the directions: {(block, block): cosine}.

    With two, of each block that both have, with itself: {(3, 3): 0.7}. With one, of every pair of
    its blocks, which shows how one direction turns through the model. 0 where a direction is zero.

    Raises ValueError for different hidden sizes or no block in common.
    """
    if other is None:
        units = _units(vectors)
        return {(a, b): _cosine(units[a], units[b]) for a in units for b in units}
    _check_sizes((vectors, other))
    common = _blocks((vectors, other), "common")
    u, v = _units(vectors), _units(other)
    return {(block, block): _cosine(u[block], v[block]) for block in common}


def norms(vectors: SteeringVectors) -> dict[int, float]:
    """The length of what is added at strength 1, by block: ‖factor x direction‖."""
    return {block: float(direction.norm()) for block, direction in _directions(vectors).items()}


def _directions(vectors: SteeringVectors) -> dict[int, Tensor]:
    """float64, so that a few operations in a row round no worse than one."""
    return {block: v.double() for block, v in vectors.effective().directions.items()}


def _units(vectors: SteeringVectors) -> dict[int, Tensor]:
    return {b: v / (float(v.norm()) or 1.0) for b, v in _directions(vectors).items()}


def _cosine(unit: Tensor, other: Tensor) -> float:
    """Never beyond 1, where rounding would put it."""
    return max(-1.0, min(1.0, float(unit @ other)))


def _basis(directions: list[Tensor]) -> Tensor:
    """Orthonormal columns [D, r] that span the directions; r = 0 where all are zero."""
    matrix = torch.stack(directions, dim=1)
    lengths = matrix.norm(dim=0)
    matrix = matrix[:, lengths > 0] / lengths[lengths > 0]
    # Of parallel directions one is kept: singular values tell where QR would divide by nothing.
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis: Tensor = left[:, singular > 1e-9 * singular.max()] if singular.numel() else left
    return basis


def _linear(block: int, start: Tensor, end: Tensor, weight: float) -> Tensor:
    return (1 - weight) * start + weight * end


def _spherical(block: int, start: Tensor, end: Tensor, weight: float) -> Tensor:
    lengths = float(start.norm()), float(end.norm())
    if min(lengths) == 0:
        raise ValueError(f"block {block}: a zero direction has no angle; interpolate linearly")
    length = (1 - weight) * lengths[0] + weight * lengths[1]
    if length < 0:
        raise ValueError(
            f"block {block}: weight {weight} would make the length negative ({length:.3g}): take "
            "a weight nearer to the interval from 0 to 1"
        )
    u, v = start / lengths[0], end / lengths[1]
    # atan2 keeps its digits at all angles; acos loses them near 0 and pi.
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if math.pi - angle < _SMALL_ANGLE:
        raise ValueError(
            f"block {block}: the directions are opposite, and no great circle is the shortest; "
            "interpolate linearly"
        )
    if angle < _SMALL_ANGLE:
        turned = _linear(block, u, v, weight)
        scaled: Tensor = length * turned / turned.norm()
        return scaled
    turned = math.sin((1 - weight) * angle) * u + math.sin(weight * angle) * v
    return (length / math.sin(angle)) * turned


def _relative_strength(first: SteeringVectors, other: SteeringVectors) -> float:
    if other.strength == first.strength:
        return 1.0
    if first.strength == 0:
        raise ValueError(
            f"the first vectors' strength is 0, the others' {other.strength}: no scale can make "
            "them push as they do; give the first one a strength (with_strength)"
        )
    return other.strength / first.strength


def _blocks(vectors: Iterable[SteeringVectors], missing: str) -> list[int]:
    vectors = tuple(vectors)
    _check_sizes(vectors)
    _check_normalize(vectors)
    sets = [set(v.blocks) for v in vectors]
    if missing == "zero":
        return sorted(set.union(*sets))
    if missing != "common":
        raise ValueError(f'missing must be "zero" or "common", got {missing!r}')
    if common := sorted(set.intersection(*sets)):
        return common
    raise ValueError(_no_common_blocks(vectors))


def _no_common_blocks(vectors: Iterable[SteeringVectors]) -> str:
    blocks = " and ".join(str(v.blocks) for v in vectors)
    return f"the vectors have no block in common: {blocks}. Fit them at the same blocks"


def _check_sizes(vectors: Iterable[SteeringVectors]) -> None:
    sizes = [v.hidden_size for v in vectors]
    if len(set(sizes)) > 1:
        raise ValueError(f"the vectors' hidden sizes differ, {sizes}: they are of different models")


def _check_normalize(vectors: Iterable[SteeringVectors]) -> None:
    kinds = {v.normalize for v in vectors}
    if len(kinds) > 1:
        raise ValueError(
            "some of the vectors steer with normalisation and some by plain addition: their "
            "directions do not add up; set normalize alike (dataclasses.replace)"
        )


def _made(
    first: SteeringVectors,
    directions: dict[int, Tensor],
    operation: str,
    operands: Iterable[SteeringVectors],
    **details: Any,
) -> SteeringVectors:
    metadata = {
        "method": operation,
        "operands": [operand.metadata for operand in operands],
        **details,
    }
    kept = ("base_model", "base_model_revision", "model_type", "hidden_norms")
    metadata |= {name: first.metadata[name] for name in kept if name in first.metadata}
    plain = {block: direction.float() for block, direction in directions.items()}
    return replace(first, directions=plain, block_strengths=None, metadata=metadata)
