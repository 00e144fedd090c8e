"""What steering costs in onnxruntime on a CPU: at one site, and in a whole decoder.

    python -m benchmarks.onnx [--only sites|models] [--output benchmarks/results/onnx.json]

Ratios are to the *unsteered* graph. One thread is timed by its CPU time, which other processes do
not disturb; all threads by the wall clock, in one pool that the sessions share, so that none spins
while another works.

Each case is written as soon as it is measured, and a later run adds its own to the file. The larger
decoder takes minutes to build and minutes to measure; piece by piece, its graphs made beforehand:

    python -m benchmarks.onnx --only graphs --models "16 x 2048" --folder build/onnx-graphs
    python -m benchmarks.onnx --only models --models "16 x 2048" --folder build/onnx-graphs \
        --weights int4 --passes prefill --threads 2 --output benchmarks/results/onnx-models.json
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks import onnx_models, onnx_results, onnx_sites
from grains_ext import export
from grains_ext.timing import Measurement, header, interleave

DIMS = (512, 1024, 2048, 4096, 8192)
ROWS = (1, 16, 128)
PASSES = {"decode": (128, 1), "prefill": (0, 128)}
"""Cached tokens and new ones."""


def session(model: bytes | Path, *, library: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    return export.session(
        model, library=library, session_options=options, providers=["CPUExecutionProvider"]
    )


def call(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray[Any, Any]]
) -> Callable[[], None]:
    """A run on bound inputs; its outputs stay in the memory that the first run gave them."""
    binding = session.io_binding()
    for name, values in feeds.items():
        # bind_cpu_input refuses inputs that have a default.
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def measure(
    candidates: Mapping[str, Callable[[], object]], *, threads: int, rounds: int
) -> dict[str, Measurement]:
    return interleave(
        candidates,
        baseline="unsteered",
        rounds=rounds,
        turn_seconds=5e-3,
        clock=time.thread_time if threads == 1 else time.perf_counter,
    )


@dataclass(frozen=True)
class Run:
    threads: int
    rounds: int
    output: Path | None
    console: Console

    def add(self, table: Table, facts: dict[str, Any], found: Mapping[str, Measurement]) -> None:
        if len(table.columns) == len(facts):
            table.add_column("unsteered us")
            for name in list(found)[1:]:
                table.add_column(name)
        ratios = [str(m.ratio) for name, m in found.items() if name != "unsteered"]
        microseconds = found["unsteered"].seconds.median * 1e6
        table.add_row(*map(str, facts.values()), f"{microseconds:.2f}", *ratios)
        if self.output:
            threads = {"threads": self.threads}
            rows = [threads | facts | {"way": m.name, "result": m} for m in found.values()]
            onnx_results.add(self.output, rows)

    @property
    def clock(self) -> str:
        return "1 thread, CPU time" if self.threads == 1 else f"{self.threads} threads, wall clock"


def sites(run: Run, dims: Iterable[int], all_rows: Iterable[int] = ROWS) -> None:
    """One residual addition, steered, with its norm."""
    table = Table("hidden size", "rows", title=f"one site; {run.clock}")
    for dim in dims:
        for rows in all_rows:
            # As many as one block of work can hold, so that what a call costs does not show.
            n_sites = max(8, min(64, 2**20 // (rows * dim)))
            rng = np.random.default_rng(0)
            feeds = {
                name: rng.standard_normal((1, rows, dim)).astype(np.float32)
                for name in ("x", "skip")
            }
            calls = {}
            for way in onnx_sites.WAYS:
                model = onnx_sites.chain(way, n_sites, dim).SerializeToString()
                opened = session(model, library=way.library)
                calls[way.name] = call(opened, feeds)
            found = {
                name: measured.divided_by(n_sites)
                for name, measured in measure(calls, threads=run.threads, rounds=run.rounds).items()
            }
            run.add(table, {"hidden size": dim, "rows": rows}, found)
    run.console.print(table)


def models(run: Run, options: argparse.Namespace, folder: Path) -> None:
    """Whole decoders, steered at every block, over a prompt and at one cached step."""
    table = Table("model", "weights", "pass", title=f"a whole decoder; {run.clock}")
    for name, precision in itertools.product(options.models, options.weights):
        shape = onnx_models.SHAPES[name]
        graphs = onnx_models.build(shape, precision, folder / name)
        sessions = {
            "unsteered": session(graphs[0], library=False),
            "function": session(graphs[1], library=False),
            "fused": session(graphs[1], library=True),
        }
        for label in options.passes:
            calls = {
                key: call(opened, onnx_models.feeds(opened, shape, *PASSES[label]))
                for key, opened in sessions.items()
            }
            found = measure(calls, threads=run.threads, rounds=run.rounds)
            run.add(table, {"model": name, "weights": precision, "pass": label}, found)
    run.console.print(table)


def run_all(threads: int, options: argparse.Namespace, folder: Path) -> None:
    # Once in a process, and before the first session.
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    run = Run(threads, options.rounds, options.output, Console(width=150))
    if options.only != "models":
        sites(run, options.dims)
    if options.only != "sites":
        models(run, options, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="add the results to this JSON file")
    parser.add_argument("--only", choices=["sites", "models", "graphs"], help="graphs: make them")
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1 and all")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS, help="of the sites")
    for option, known in (
        ("models", onnx_models.SHAPES),
        ("weights", onnx_models.PRECISIONS),
        ("passes", PASSES),
    ):
        parser.add_argument(f"--{option}", nargs="*", choices=list(known), default=list(known))
    parser.add_argument("--folder", type=Path, help="keep the models' graphs here, or find them")
    options = parser.parse_args()
    Console(width=150).print(header())
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.only == "graphs":
            for name, precision in itertools.product(options.models, options.weights):
                onnx_models.build(onnx_models.SHAPES[name], precision, folder / name)
            return
        for threads in options.threads or sorted({1, len(os.sched_getaffinity(0))}):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                process.submit(run_all, threads, options, folder).result()


if __name__ == "__main__":
    main()
