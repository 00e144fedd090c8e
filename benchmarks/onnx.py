"""What steering costs in onnxruntime on a CPU: at one site, and in a whole decoder.

    python -m benchmarks.onnx [--only sites|models] [--output benchmarks/results/onnx.json]

Ratios are to the *unsteered* graph. One thread is timed by its CPU time, which other processes do
not disturb; all threads by the wall clock, in one pool that the sessions share, so that none spins
while another works.
"""

import argparse
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

from benchmarks import onnx_models, onnx_sites
from grains_ext import export
from grains_ext.timing import Measurement, header, interleave, write_json

DIMS = (512, 1024, 2048, 4096, 8192)
ROWS = (1, 16, 128)
PAST, PROMPT = 128, 128


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
    """A run on bound inputs; onnxruntime allocates the outputs, as in use."""
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
    console: Console
    results: list[dict[str, Any]]

    def add(self, table: Table, facts: dict[str, Any], found: Mapping[str, Measurement]) -> None:
        if len(table.columns) == len(facts):
            table.add_column("unsteered us")
            for name in list(found)[1:]:
                table.add_column(name)
        ratios = [str(m.ratio) for name, m in found.items() if name != "unsteered"]
        microseconds = found["unsteered"].seconds.median * 1e6
        table.add_row(*map(str, facts.values()), f"{microseconds:.2f}", *ratios)
        threads = {"threads": self.threads}
        self.results.extend(threads | facts | {"result": m} for m in found.values())

    @property
    def clock(self) -> str:
        return "1 thread, CPU time" if self.threads == 1 else f"{self.threads} threads, wall clock"


def sites(run: Run, dims: Iterable[int] = DIMS, all_rows: Iterable[int] = ROWS) -> None:
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


def models(run: Run, names: Iterable[str], folder: Path) -> None:
    """Whole decoders, steered at every block, over a prompt and at one cached step."""
    table = Table("model", "weights", "pass", title=f"a whole decoder; {run.clock}")
    for name in names:
        shape = onnx_models.SHAPES[name]
        for precision in onnx_models.PRECISIONS:
            graphs = onnx_models.build(shape, precision, folder / name)
            sessions = {
                "unsteered": session(graphs[0], library=False),
                "function": session(graphs[1], library=False),
                "fused": session(graphs[1], library=True),
            }
            for label, past, tokens in (("decode", PAST, 1), ("prefill", 0, PROMPT)):
                calls = {
                    key: call(opened, onnx_models.feeds(opened, shape, past, tokens))
                    for key, opened in sessions.items()
                }
                found = measure(calls, threads=run.threads, rounds=run.rounds)
                run.add(table, {"model": name, "weights": precision, "pass": label}, found)
    run.console.print(table)


def run_all(threads: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    # Once in a process, and before the first session.
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    run = Run(threads, options.rounds, Console(width=150), [])
    if options.only != "models":
        sites(run)
    if options.only != "sites":
        models(run, options.models, folder)
    return run.results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--only", choices=["sites", "models"])
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1 and all")
    names = list(onnx_models.SHAPES)
    parser.add_argument("--models", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    Console(width=150).print(header())
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads or sorted({1, len(os.sched_getaffinity(0))}):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                results += process.submit(run_all, threads, options, Path(folder)).result()
    if options.output:
        write_json(options.output, "onnx", results)


if __name__ == "__main__":
    main()
