"""Interleaved timing, for `grains bench` and the benchmarks.

Candidates take turns within a round, so that a machine that speeds up, slows down or does other
work treats them alike; ratios are taken round by round and reported as median and quartiles.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


@dataclass(frozen=True)
class Measurement:
    """Seconds per call, and the same divided by the baseline's in the same round."""

    name: str
    seconds: Spread
    ratio: Spread

    def divided_by(self, calls: int) -> "Measurement":
        """Of one of ``calls`` equal parts of what was timed."""
        seconds = Spread(*(value / calls for value in asdict(self.seconds).values()))
        return Measurement(self.name, seconds, self.ratio)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 25,
    turn_seconds: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Measurement]:
    """Time `candidates` in turns: `take_turns`, summed up relative to the baseline candidate."""
    seconds = take_turns(
        candidates, rounds=rounds, turn_seconds=turn_seconds, clock=clock, synchronize=synchronize
    )
    return relative_to(baseline, seconds)


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    turn_seconds: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    slow_seconds: float = math.inf,
    on_turn: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one number per round that it took part in.

    Args:
        candidates: name -> function of no arguments.
        rounds: how often each has its turn, >= 2.
        turn_seconds: a turn repeats its call for about this long, so that reading the clock does
            not matter.
        clock: seconds. `time.thread_time` leaves out what other processes took, and serves where
            all the work is on the calling thread.
        synchronize: waits for asynchronous work (torch.cuda.synchronize) before each clock reading.
        slow_seconds: a candidate that has used up this many seconds sits out the later rounds,
            after two turns at the earliest.
        on_turn: told the candidate's name after every turn, warm-up included.
    """
    wait = synchronize or (lambda: None)

    def turn(name: str, repeats: int) -> float:
        wait()
        start = clock()
        for _ in range(repeats):
            candidates[name]()
        wait()
        elapsed = clock() - start
        if on_turn:
            on_turn(name)
        return elapsed / repeats

    repeats: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for name in candidates:
        once = turn(name, 1)  # warm up: allocations, lazy set-up
        if once < 0.1:
            once = turn(name, 2)
        repeats[name] = max(1, round(turn_seconds / max(once, 1e-9)))
        # What takes seconds has warmed up in a small part of them.
        seconds[name] = [once if once > 2.0 else turn(name, repeats[name])]
    order = list(candidates)
    for _ in range(rounds - 1):
        order.append(order.pop(0))  # nobody always runs after the same neighbour
        for name in order:
            if len(seconds[name]) < 2 or sum(seconds[name]) < slow_seconds:
                seconds[name].append(turn(name, repeats[name]))
    return seconds


def relative_to(baseline: str, seconds: Mapping[str, list[float]]) -> dict[str, Measurement]:
    """Sums up the turns; ratios are taken in the rounds that both took part in."""
    return {
        name: Measurement(
            name,
            Spread.of(times),
            # Sitting out is for good: both took part in the first rounds.
            Spread.of([t / b for t, b in zip(times, seconds[baseline], strict=False)]),
        )
        for name, times in seconds.items()
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    from grains_ext import _C

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = (
        *("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx"),
        *("captum", "inseq"),
    )
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "instruction_set": _C.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "build": _C.build_info(),
        "versions": {name: found for name in packages if (found := version(name))},
    }


def header() -> str:
    """`environment` for people, in one line."""
    found = environment()
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['processor']}, {found['cores']} cores, {found['instruction_set']}, load "
        f"{found['load_average']}; {found['gpu'] or 'no GPU'}; {versions}"
    )


def write_json(path: Path, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """`rows` hold plain values and Measurements."""
    plain = [
        {k: asdict(v) if isinstance(v, Measurement) else v for k, v in row.items()} for row in rows
    ]
    document = {"benchmark": benchmark, "environment": environment(), "rows": plain}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
