"""The ops against a copy of the same bytes and against eager PyTorch.

    python -m benchmarks.kernels [--device cuda] [--output benchmarks/results/kernels.json]

`copy_` of the hidden states is the floor that ratios are relative to: what any pass over the data
costs. In place and out of place are measured apart, because out of place the allocation of the
result dominates at prefill size (`clone` pays it too). One thread is timed by its CPU time, which
other processes do not disturb; several by the wall clock. On a GPU: `benchmarks/kernels_cuda.py`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grains_ext import ops
from grains_ext.timing import header, interleave, write_json

DIM = 4096
ROWS = (1, 64, 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager_steer(hidden: Tensor, vector: Tensor, strength: Tensor) -> Tensor:
    h = hidden.float()
    s = h + strength * vector.float()
    ratio = h.norm(dim=-1, keepdim=True) / s.norm(dim=-1, keepdim=True)
    return (s * ratio).to(hidden.dtype)


def eager_skip_norm(
    x: Tensor, skip: Tensor, vector: Tensor, strength: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    residual = eager_steer(x + skip, vector, strength)
    return torch.nn.functional.rms_norm(residual, (DIM,), weight, 1e-6), residual


def candidates(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    hidden, skip = (torch.randn(rows, DIM).to(dtype) for _ in range(2))
    vector, weight = (torch.randn(DIM).to(dtype) for _ in range(2))
    strength = torch.tensor(0.7)
    target = torch.empty_like(hidden)
    return {
        "copy_": lambda: target.copy_(hidden),
        "clone": hidden.clone,
        "steer_": lambda: ops.steer_add_normalize_(hidden, vector, strength),
        "steer": lambda: ops.steer_add_normalize(hidden, vector, strength),
        "eager steer_": lambda: hidden.copy_(eager_steer(hidden, vector, strength)),
        "eager steer": lambda: eager_steer(hidden, vector, strength),
        "skip_steer_rms": lambda: ops.skip_steer_rms_norm(hidden, skip, vector, strength, weight),
        "eager skip_steer_rms": lambda: eager_skip_norm(hidden, skip, vector, strength, weight),
    }


def on_cpu(console: Console, rounds: int) -> list[dict[str, Any]]:
    console.print(
        f"{header()}; hidden size {DIM}; inference mode; time / copy_, median [quartiles]"
    )
    results: list[dict[str, Any]] = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        clock = "1 thread, CPU time" if threads == 1 else f"{threads} threads, wall clock"
        table = Table("dtype", "rows", "copy_ us", title=clock)
        for dtype in DTYPES:
            for rows in ROWS:
                with torch.inference_mode():
                    measured = interleave(
                        candidates(rows, dtype),
                        baseline="copy_",
                        rounds=rounds,
                        clock=time.thread_time if threads == 1 else time.perf_counter,
                    )
                shown = [name for name in measured if name != "copy_"]
                if len(table.columns) == 3:
                    for name in shown:
                        table.add_column(name)
                table.add_row(
                    str(dtype).removeprefix("torch.").replace("float", "f"),
                    str(rows),
                    f"{measured['copy_'].seconds.median * 1e6:.1f}",
                    *(str(measured[name].ratio) for name in shown),
                )
                results += [
                    {"threads": threads, "dtype": str(dtype), "rows": rows, "result": result}
                    for result in measured.values()
                ]
        console.print(table)
    return results


def on_cuda(console: Console, rounds: int, output: Path | None) -> None:
    from benchmarks import kernels_cuda

    console.print(f"{header()}; bfloat16, from CUDA graphs; median [quartiles]")
    results: list[kernels_cuda.Result] = []
    left_out: list[str] = []
    with torch.inference_mode():
        for found, missing in kernels_cuda.measure(rounds):
            results += found
            left_out += [what for what in missing if what not in left_out]
            console.print(_cuda_table(found))
            if output:  # after each shape: there is little time on a machine that is lent
                write_json(output, "kernels", _cuda_rows(results, left_out))
    for goal in kernels_cuda.goals(results):
        sign = "<=" if goal.at_most else ">="
        verdict = "reached" if goal.met else "MISSED"
        console.print(f"{goal.what}: {goal.reached:.3f} ({sign} {goal.bound}: {verdict})")
    for what in left_out:
        console.print(f"not measured: {what}")


def _cuda_table(results: list[Any]) -> Table:
    table = Table("rows x dim", "kernel", "us", "GB/s", "time / copy_ (one row: / empty kernel)")
    for result in results:
        measured = result.measurement
        table.add_row(
            f"{result.rows} x {result.dim}",
            measured.name,
            f"{measured.seconds.median * 1e6:.2f}",
            f"{result.gigabytes_per_second:.0f}",
            str(measured.ratio),
        )
    return table


def _cuda_rows(results: list[Any], left_out: list[str]) -> list[dict[str, Any]]:
    from benchmarks import kernels_cuda

    rows: list[dict[str, Any]] = [
        {
            "rows": result.rows,
            "dim": result.dim,
            "bytes": result.bytes_moved,
            "gigabytes_per_second": result.gigabytes_per_second,
            "result": result.measurement,
        }
        for result in results
    ]
    goals = [asdict(goal) | {"met": goal.met} for goal in kernels_cuda.goals(results)]
    return [*rows, {"goals": goals}, {"not_measured": left_out}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    console = Console(width=150)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda: torch sees no GPU (torch.cuda.is_available() is False)")
        on_cuda(console, options.rounds, options.output)
        return
    results = on_cpu(console, options.rounds)
    if options.output:
        write_json(options.output, "kernels", results)


if __name__ == "__main__":
    main()
