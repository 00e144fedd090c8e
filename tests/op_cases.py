"""Inputs of every torch op, the float64 reference's answer, and how close a kernel must come."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grains_ext import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEERING_OPS = ("steer_add_normalize", "skip_steer_rms_norm", "skip_steer_layer_norm")
OPS = ("ig_interpolate", "ig_accumulate", *STEERING_OPS)

# Rows per hidden size: the awkward sizes, most rows where rows are short.
ROWS_OF_DIM = {
    1: 4096,
    2: 1000,
    3: 64,
    7: 64,
    8: 64,
    31: 64,
    64: 65,
    127: 64,
    512: 64,
    4096: 3,
    5120: 1,
    8192: 1,
    16384: 3,
}

# Half a unit in the last place of the stored result.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# The float32 arithmetic before it, against the largest element of the row.
FLOAT32_ERROR = 4e-6
SMALLEST = {torch.float32: 2**-149, torch.float16: 2**-24, torch.bfloat16: 2**-133}

Layout = Callable[[Tensor], Tensor]


def unaligned(tensor: Tensor) -> Tensor:
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


def row_strided(tensor: Tensor) -> Tensor:
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 5)
    return wide[..., 2:-3].copy_(tensor)


def last_dim_strided(tensor: Tensor) -> Tensor:
    return tensor.new_empty(*tensor.shape, 2)[..., 0].copy_(tensor)


def not_one_distance(tensor: Tensor) -> Tensor:
    """Rows whose leading dimensions do not collapse into one."""
    if tensor.ndim < 3:
        return last_dim_strided(tensor)
    padded = tensor.new_empty(tensor.shape[0], tensor.shape[1] + 3, *tensor.shape[2:])
    return padded[:, 1:-2].copy_(tensor)


LAYOUTS: dict[str, Layout] = {
    "contiguous": Tensor.contiguous,
    "unaligned": unaligned,
    "row_strided": row_strided,
    "last_dim_strided": last_dim_strided,
    "not_one_distance": not_one_distance,
}


@dataclass(frozen=True)
class Case:
    op: str
    inputs: dict[str, Any]

    def run(self) -> tuple[Tensor, ...]:
        return as_tuple(getattr(ops, self.op)(**self.inputs))

    def expected(self) -> tuple[Tensor, ...]:
        """The reference in float64, on the CPU, of the very values that the kernel gets."""
        return as_tuple(
            getattr(reference, self.op)(**{k: as_double(v) for k, v in self.inputs.items()})
        )

    def check(self) -> None:
        expected = self.expected()
        for actual, wanted, scale in zip(
            self.run(), expected, self._error_scales(expected), strict=True
        ):
            self._compare(actual, wanted, scale)

    def _error_scales(self, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What float32 errors are relative to: all that was added, not what cancellation left."""
        values = {name: as_double(value) for name, value in self.inputs.items()}
        if self.op == "ig_interpolate":
            return (values["input"].abs() + values["baseline"].abs(),)
        if self.op == "ig_accumulate":
            values["input"] = values["input"] - values.pop("baseline")
            zero = torch.zeros_like(values["input"])
            values = {name: value.abs() for name, value in values.items()}
            return (reference.ig_accumulate(**values, baseline=zero),)
        scales = [largest(output) for output in expected]
        if self.op == "skip_steer_layer_norm":
            residual = expected[1]
            centred = residual - residual.mean(-1, keepdim=True)
            deviation = centred.square().mean(-1, keepdim=True).add(1e-5).sqrt()
            scales[0] += largest(residual) / deviation * largest(values["weight"])
        return tuple(scales)

    def _compare(self, actual: Tensor, expected: Tensor, scale: Tensor) -> None:
        dtype = actual.dtype
        assert actual.shape == expected.shape, self.op
        if expected.numel() == 0:
            return
        bound = ROUNDING[dtype] * expected.abs() + FLOAT32_ERROR * scale + SMALLEST[dtype]
        given = actual.cpu().double()
        # What the dtype cannot hold is infinite.
        limit = torch.finfo(dtype).max
        same = (given == expected) | (given.isnan() & expected.isnan())
        same |= given.isinf() & (expected.abs() >= limit * (1 - 2**-8)) & (given * expected > 0)
        wrong = ~(((given - expected).abs() <= bound) | same)
        assert not wrong.any(), (
            f"{self.op} {dtype} {list(actual.shape)}: {int(wrong.sum())} elements are off; first "
            f"{given[wrong][0]}, expected {expected[wrong][0]}"
        )


def largest(rows: Tensor) -> Tensor:
    """The largest magnitude in each row that has one."""
    return rows.abs().nan_to_num(0, 0).amax(-1, keepdim=True) if rows.numel() else rows


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def as_double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def make_case(
    op: str,
    rows: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    layout: Layout = Tensor.contiguous,
    bank: int | None = None,
    scale: float = 1.0,
) -> Case:
    """Random inputs of `op`. `rows` are the leading dimensions, (batch, tokens) for the ig ops."""

    def draw(*shape: int, by: float = scale) -> Tensor:
        return layout((torch.randn(shape, dtype=torch.float64) * by).to(dtype).to(device))

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape).mul(2).sub(1).to(device)

    if op == "ig_interpolate":
        steps, (batch, tokens) = 5, rows
        alphas = torch.rand(steps, batch)
        alphas[0], alphas[-1] = 0, 1
        inputs = {
            "input": draw(batch, tokens, dim),
            "baseline": draw(1, dim),
            "alphas": alphas.to(device),
        }
    elif op == "ig_accumulate":
        steps, (batch, tokens) = 5, rows
        inputs = {
            "grads": draw(steps, batch, tokens, dim, by=1.0),
            "input": draw(batch, tokens, dim),
            "baseline": draw(batch, 1, dim),
            "weights": floats(steps),
        }
    else:
        inputs = {
            "vectors": draw(dim) if bank is None else draw(bank, dim),
            "strength": floats() if bank is None else floats(bank),
        }
        if bank is not None:
            inputs["index"] = torch.randint(-1, bank, rows, dtype=torch.int32, device=device)
        if op == "steer_add_normalize":
            inputs["hidden"] = draw(*rows, dim)
        else:
            inputs |= {"x": draw(*rows, dim), "skip": draw(*rows, dim), "weight": draw(dim, by=1.0)}
        if op == "skip_steer_layer_norm":
            inputs["bias"] = draw(dim, by=1.0)
            inputs["x"] += 4 * scale  # a mean that is large against the spread
    return Case(op, inputs)
