"""The cases that the CUDA sources are run over on the CPU, and the program that runs them under
the sanitisers: ``python -m tests.shim_cases LIBRARY OUTPUT.npz``."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.shim import DTYPES, Array, Shim, placed

DIMS = (1, 2, 3, 7, 8, 31, 64, 127, 512, 4096, 5120, 8192, 16384)
SANITIZED_DIMS = (1, 7, 8, 31, 64, 1032, 16384)  # every shape of a launch, in fewer sizes
STEER, RMS, LAYER = "steer_add_normalize", "skip_steer_rms_norm", "skip_steer_layer_norm"
INTERPOLATE, ACCUMULATE = "ig_interpolate", "ig_accumulate"


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    inputs: dict[str, Array | None]
    options: dict[str, float] = field(default_factory=dict)

    def run(self, shim: Shim) -> tuple[Array, ...]:
        if self.op in (RMS, LAYER):
            norm = "rms" if self.op == RMS else "layer"
            return shim.skip_steer_norm(norm, **self.inputs, **self.options)  # type: ignore[arg-type]
        return (getattr(shim, self.op)(**self.inputs, **self.options),)


class Draw:
    """Random arrays of one dtype and one layout, from the case's own seed."""

    def __init__(self, name: str, dtype: str, *, offset: int = 0, gap: int = 0) -> None:
        self._random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
        self._dtype = DTYPES[dtype]
        self._layout = {"offset": offset, "gap": gap}

    def rows(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Array:
        values = self._random.standard_normal(shape) * scale + mean
        return placed(values.astype(self._dtype), **self._layout)

    def weights(self, *shape: int) -> Array:
        return placed(self._random.uniform(-2, 2, shape).astype(np.float32))

    def index(self, bank: int, rows: int) -> Array:
        index = self._random.integers(-1, bank, rows, dtype=np.int32)
        index[0] = bank - 1
        index[-1] = -1
        return placed(index)


def row_count(dim: int) -> int:
    """Enough rows for a last block that is not full, where blocks have several rows."""
    return 2 if dim >= 4096 else 3 if dim > 512 else 9 if dim > 64 else 130 if dim > 8 else 261


def steering_case(
    op: str, dim: int, dtype: str, layout: str, draw: Draw, rows: int | None = None
) -> Case:
    rows = row_count(dim) if rows is None else rows
    bank = 3
    steering: dict[str, Array | None] = {
        "vectors": draw.rows(bank, dim),
        "strength": draw.weights(bank),
        "index": draw.index(bank, rows),
    }
    name = f"{op}-{dtype}-{dim}-{layout}"
    if op == STEER:
        return Case(name, op, {"hidden": draw.rows(rows, dim), **steering})
    inputs: dict[str, Array | None] = {
        "x": draw.rows(rows, dim),
        "skip": draw.rows(rows, dim),
        "weight": draw.rows(dim),
        **steering,
    }
    if op == RMS:
        return Case(name, op, inputs, {"eps": 1e-6, "weight_offset": float(dim % 2)})
    # Without a bias for some of the dimensions; a mean that is large against the spread.
    inputs["bias"] = None if dim % 3 == 0 else draw.rows(dim)
    if layout == "aligned":
        inputs["x"] = draw.rows(rows, dim, mean=8.0)
    return Case(name, op, inputs, {"eps": 1e-5})


def attribution_case(op: str, dim: int, dtype: str, layout: str, draw: Draw) -> Case:
    steps = 5 if dim > 512 else 19
    batch, tokens = 2, 3
    name = f"{op}-{dtype}-{dim}-{layout}"
    baseline = draw.rows(dim) if layout == "aligned" else draw.rows(tokens, dim)
    inputs: dict[str, Array | None] = {"input": draw.rows(batch, tokens, dim), "baseline": baseline}
    per_row = draw.weights(steps, batch) if layout == "aligned" else draw.weights(steps)
    if op == INTERPOLATE:
        alphas = np.abs(per_row) / 2
        alphas[0], alphas[-1] = 0, 1
        return Case(name, op, {**inputs, "alphas": alphas})
    return Case(
        name, op, {"grads": draw.rows(steps, batch, tokens, dim), **inputs, "weights": per_row}
    )


# Rows 16-byte aligned; off by one element; and apart by a gap that keeps or breaks the alignment.
LAYOUTS: dict[str, dict[str, int]] = {
    "aligned": {},
    "unaligned": {"offset": 1},
    "gap-8": {"gap": 8},
    "gap-1": {"gap": 1},
}


def cases(dims: Sequence[int] = DIMS) -> Iterator[Case]:
    """Every op, dtype and dimension in the aligned layout; the other layouts where they matter."""
    for op in (STEER, RMS, LAYER, INTERPOLATE, ACCUMULATE):
        make: Any = steering_case if op in (STEER, RMS, LAYER) else attribution_case
        for dtype in DTYPES:
            for dim in dims:
                for layout, options in LAYOUTS.items():
                    if layout != "aligned" and dim not in (8, 31, 512):
                        continue
                    draw = Draw(f"{op}-{dtype}-{dim}-{layout}", dtype, **options)
                    yield make(op, dim, dtype, layout, draw)


def main(library: str, output: str) -> None:
    shim = Shim(Path(library))
    results = {
        f"{case.name}:{number}": array.view(np.uint8)
        for case in cases(SANITIZED_DIMS)
        for number, array in enumerate(case.run(shim))
    }
    np.savez(output, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
