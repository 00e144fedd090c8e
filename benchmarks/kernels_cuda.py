"""What `benchmarks/kernels.py --device cuda` measures: each op beside the GPU's own bandwidth.

Everything runs from CUDA graphs, so that Python and the launch queue do not count. A graph works
through copies of its tensors that together exceed the level-2 cache several times: a 2048 x 4096
tensor would otherwise never leave it. Blocks of one row each and blocks that stay for many rows are
measured apart, beside what the launch plan chooses of them. The floor is `copy_` of the same hidden
states by the same rules; for one row, where nothing but the launch counts, it is a kernel that does
nothing.
"""

import ctypes
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_ext import ops
from grains_ext.timing import Measurement, interleave

DTYPE = torch.bfloat16
LARGE = ((2048, 4096), (8192, 8192))
ROW = (1, 4096)
CALLS_PER_GRAPH = 20
FLOOR = "copy_"
EMPTY = "empty kernel"


@dataclass(frozen=True)
class Candidate:
    """`call(i)` works on copy i of the tensors; `moved` is the bytes it must read and write;
    `stay`: whether blocks stay for many rows ("auto", "never", "always")."""

    call: Callable[[int], object]
    moved: int
    stay: str = "auto"


@dataclass(frozen=True)
class Result:
    rows: int
    dim: int
    measurement: Measurement
    bytes_moved: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes_moved / self.measurement.seconds.median / 1e9


def measure(rounds: int) -> tuple[list[Result], list[str]]:
    """All shapes, and in words what could not be measured."""
    left_out: list[str] = []
    results = []
    for rows, dim in (*LARGE, ROW):
        floor = EMPTY if rows == 1 else FLOOR
        found = _candidates(rows, dim, left_out)
        graphs = {name: _graph(candidate) for name, candidate in found.items()}
        measured = interleave(
            graphs, baseline=floor, rounds=rounds, synchronize=torch.cuda.synchronize
        )
        for name, measurement in measured.items():
            per_call = measurement.divided_by(CALLS_PER_GRAPH)
            results.append(Result(rows, dim, per_call, found[name].moved))
        del graphs, found
        torch.cuda.empty_cache()
    return results, sorted(set(left_out))


def _graph(candidate: Candidate) -> Callable[[], None]:
    """A replay of the candidate's call of CALLS_PER_GRAPH copies in turn."""
    _set_stay(candidate.stay)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):  # compiles, and allocates what is allocated once
            candidate.call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS_PER_GRAPH):
            candidate.call(i)
    _set_stay("auto")
    return graph.replay


def _set_stay(choice: str) -> None:
    library = ctypes.CDLL(str(Path(ops.__file__).with_name("libgrains_torch.so")))
    if library.grains_set_cuda_stay(choice.encode()) != 1:
        raise ValueError(f"choice is {choice!r}, expected auto, never or always")


def _candidates(rows: int, dim: int, left_out: list[str]) -> dict[str, Candidate]:
    cache = torch.cuda.get_device_properties().L2_cache_size
    size = rows * dim * DTYPE.itemsize
    copies = max(2, min(64, -(-4 * cache // size))) if rows > 1 else 1

    def tensors() -> list[Tensor]:
        return [torch.randn(rows, dim, device="cuda", dtype=DTYPE) for _ in range(copies)]

    x, skip, out = tensors(), tensors(), tensors()
    vector, weight = (torch.randn(dim, device="cuda", dtype=DTYPE) for _ in range(2))
    strength = torch.tensor(0.7, device="cuda")
    turn = itertools.cycle(range(copies))  # goes on where the last call stopped
    steer_ = torch.ops.grains.steer_add_normalize_.default
    fused = torch.ops.grains.skip_steer_rms_norm.default

    def on_next(function: Callable[[int], object]) -> Callable[[int], object]:
        return lambda _: function(next(turn))

    found = {
        FLOOR: Candidate(on_next(lambda i: out[i].copy_(x[i])), 2 * size),
        "steer_add_normalize_": Candidate(
            on_next(lambda i: steer_(x[i], vector, strength, None, 1e-6)), 2 * size
        ),
        "skip_steer_rms_norm": Candidate(
            on_next(lambda i: fused(x[i], skip[i], vector, strength, weight, None, 1e-6, 0.0)),
            4 * size,
        ),
    }
    if rows > 1:
        for name in ("steer_add_normalize_", "skip_steer_rms_norm"):
            for stay, blocks in (("never", "one row per block"), ("always", "blocks stay")):
                found[f"{name}, {blocks}"] = replace(found[name], stay=stay)
    if rows == 1:
        found[EMPTY] = Candidate(lambda _: torch.cuda._sleep(0), 0)

    def add_norm(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        residual = a + b
        return torch.nn.functional.rms_norm(residual, (dim,), weight, 1e-6), residual

    if importlib.util.find_spec("triton") is None:
        left_out.append("torch.compile's add-RMSNorm: triton is not installed")
    else:
        compiled = torch.compile(add_norm, dynamic=False)
        found["torch.compile add-RMSNorm, unsteered"] = Candidate(
            on_next(lambda i: compiled(x[i], skip[i])), 4 * size
        )
    flashinfer = _flashinfer()
    if flashinfer is None:
        left_out.append("FlashInfer's add-RMSNorm: flashinfer is not installed")
    else:
        found["FlashInfer add-RMSNorm, unsteered"] = Candidate(
            on_next(lambda i: flashinfer.fused_add_rmsnorm(x[i], skip[i], weight, 1e-6)), 4 * size
        )
    return found


def _flashinfer() -> Any:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    return flashinfer
