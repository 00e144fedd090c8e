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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_ext import ops
from grains_ext.timing import Measurement, interleave

DEVICE = "cuda"
DTYPE = torch.bfloat16
LARGE = ((2048, 4096), (8192, 8192))
ROW = (1, 4096)
CALLS_PER_GRAPH = 20
CALLS_PER_GRAPH_OF_ONE_ROW = 200
TURN_SECONDS = 10e-3
"""Waiting for the device at the end of a turn takes some 20 us of it."""
FLOOR = "copy_"
EMPTY = "empty kernel"
STEER = "steer_add_normalize_"
FUSED = "skip_steer_rms_norm"


@dataclass(frozen=True)
class Candidate:
    """`call(i)` works on copy i of the tensors; `moved` is the bytes it must read and write;
    `stay`: whether blocks stay for many rows ("auto", "never", "always"); `other`: not ours, and
    left out where it does not run."""

    call: Callable[[int], object]
    moved: int
    stay: str = "auto"
    other: bool = False


@dataclass(frozen=True)
class Result:
    rows: int
    dim: int
    measurement: Measurement
    bytes_moved: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes_moved / self.measurement.seconds.median / 1e9


@dataclass(frozen=True)
class Goal:
    """`reached` is to be at least, or with `at_most` at most, `bound`."""

    what: str
    reached: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.reached <= self.bound if self.at_most else self.reached >= self.bound


def goals(results: list[Result]) -> list[Goal]:
    """What the kernels are to reach, beside what they do, of those that were measured."""
    found = {(r.rows, r.dim, r.measurement.name): r for r in results}
    goals = []
    for rows, dim in LARGE:
        floor = found.get((rows, dim, FLOOR))
        for name in (STEER, FUSED):
            ours = found.get((rows, dim, name))
            if ours and floor:
                share = ours.gigabytes_per_second / floor.gigabytes_per_second
                what = f"{name} {rows} x {dim}: share of the bandwidth of copy_"
                goals.append(Goal(what, share, 0.92, at_most=False))
        for key, other in found.items():
            ours = found.get((rows, dim, FUSED))
            if ours and key[:2] == (rows, dim) and "unsteered" in key[2]:
                ratio = ours.measurement.seconds.median / other.measurement.seconds.median
                goals.append(Goal(f"{FUSED} {rows} x {dim}: time over {key[2]}", ratio, 1.05))
    if row := found.get((*ROW, STEER)):
        goals.append(
            Goal(f"{STEER}, one row: time over {EMPTY}", row.measurement.ratio.median, 1.3)
        )
    return goals


def measure(rounds: int) -> Iterator[tuple[list[Result], list[str]]]:
    """One shape after the other: its results, and in words what could not be measured."""
    for rows, dim in (*LARGE, ROW):
        left_out: list[str] = []
        copies = _copies(rows, dim)
        found = _candidates(rows, dim, copies, left_out)
        least = CALLS_PER_GRAPH if rows > 1 else CALLS_PER_GRAPH_OF_ONE_ROW
        calls = copies * -(-least // copies)
        graphs = {}
        for name, candidate in found.items():
            try:
                graphs[name] = _graph(candidate, copies, calls)
            except Exception as error:
                if not candidate.other:
                    raise
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                left_out.append(f"{name}, {rows} x {dim}: {reason}")
        measured = interleave(
            graphs,
            baseline=EMPTY if rows == 1 else FLOOR,
            rounds=rounds,
            turn_seconds=TURN_SECONDS,
            synchronize=torch.cuda.synchronize,
        )
        yield (
            [
                Result(rows, dim, measurement.divided_by(calls), found[name].moved)
                for name, measurement in measured.items()
            ],
            left_out,
        )
        del graphs, found
        torch.cuda.empty_cache()


def _graph(candidate: Candidate, copies: int, calls: int) -> Callable[[], None]:
    """A replay of `calls` calls of the candidate, on one copy after the other.

    What a call returns is held until its copy has its next turn: else all calls would write to the
    same memory, which then stays in the cache.
    """
    results: dict[int, object] = {}
    _set_stay(candidate.stay)
    try:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(3):  # compiles, and allocates what is allocated once
                candidate.call(i % copies)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                results[i % copies] = candidate.call(i % copies)
    finally:
        _set_stay("auto")
    return graph.replay


def _set_stay(choice: str) -> None:
    library = ctypes.CDLL(str(Path(ops.__file__).with_name("libgrains_torch.so")))
    if library.grains_set_cuda_stay(choice.encode()) != 1:
        raise ValueError(f"choice is {choice!r}, expected auto, never or always")


def _copies(rows: int, dim: int) -> int:
    """So many that together they are four times the level-2 cache; one row stays in it."""
    if rows == 1:
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return int(max(2, min(64, -(-4 * cache // (rows * dim * DTYPE.itemsize)))))


def _candidates(rows: int, dim: int, copies: int, left_out: list[str]) -> dict[str, Candidate]:
    size = rows * dim * DTYPE.itemsize

    def tensors() -> list[Tensor]:
        return [torch.randn(rows, dim, device=DEVICE, dtype=DTYPE) for _ in range(copies)]

    x, skip, out = tensors(), tensors(), tensors()
    vector, weight = (torch.randn(dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    strength = torch.tensor(0.7, device=DEVICE)
    steer_ = torch.ops.grains.steer_add_normalize_.default
    fused = torch.ops.grains.skip_steer_rms_norm.default
    found = {
        FLOOR: Candidate(lambda i: out[i].copy_(x[i]), 2 * size),
        "neg, a kernel of PyTorch": Candidate(lambda i: torch.neg(x[i], out=out[i]), 2 * size),
        STEER: Candidate(lambda i: steer_(x[i], vector, strength, None, 1e-6), 2 * size),
        FUSED: Candidate(
            lambda i: fused(x[i], skip[i], vector, strength, weight, None, 1e-6, 0.0), 4 * size
        ),
    }
    if rows > 1:
        for name in (STEER, FUSED):
            for stay, blocks in (("never", "one row per block"), ("always", "blocks stay")):
                found[f"{name}, {blocks}"] = replace(found[name], stay=stay)
    else:
        found[EMPTY] = Candidate(lambda _: torch.cuda._sleep(0), 0)

    def add_norm(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        residual = a + b
        return torch.nn.functional.rms_norm(residual, (dim,), weight, 1e-6), residual

    if importlib.util.find_spec("triton") is None:
        left_out.append("torch.compile's add-RMSNorm: triton is not installed")
    else:
        compiled = torch.compile(add_norm, dynamic=False)
        found["torch.compile add-RMSNorm, unsteered"] = Candidate(
            lambda i: compiled(x[i], skip[i]), 4 * size, other=True
        )
    flashinfer = _flashinfer()
    if flashinfer is None:
        left_out.append("FlashInfer's add-RMSNorm: flashinfer is not installed")
    else:
        found["FlashInfer add-RMSNorm, unsteered"] = Candidate(
            lambda i: flashinfer.fused_add_rmsnorm(x[i], skip[i], weight, 1e-6),
            4 * size,
            other=True,
        )
    return found


def _flashinfer() -> Any:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    return flashinfer
