"""grains_ext.attribute against what users run today, and against its matrix products alone.

    python -m benchmarks.attribution [--quick] [--only steps] [--device cuda] [--output FILE]

Models and pairs are made on the spot (`benchmarks.shapes`). Sections:

- steps: the same rule and number of steps for all, seconds beside the GEMM floor (`gemm_floor`);
- accuracy: each with as few steps as reach the completeness error of the default method;
- memory: peak above the model, each in a process of its own;
- savings: ours with and without packing both answers, and with a cached prefix.

docs/benchmarks.md says how to read it. Candidates take turns within a round; numbers are medians
with quartiles. Packages that are not installed (captum, inseq) are left out, and named. One thread
is timed by its CPU time, which other processes do not disturb; several by the wall clock.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attribution_memory as memory
from benchmarks.attribution_accuracy import Accuracy, accuracy_of, results_of, sweep
from benchmarks.attribution_rivals import available, captum_expert, ours
from benchmarks.gemm_floor import Evaluation, GemmFloor, GemmPeak
from benchmarks.shapes import SHAPES, random_model, random_pairs, trained_model, word_tokenizer
from grains_ext.demo import world
from grains_ext.demo.run import load_model
from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.timing import Spread, header, relative_to, take_turns, write_json

SECTIONS = ("steps", "accuracy", "memory", "savings")
FLOOR, EXPERT = "GEMM floor", "captum expert"
EXPERT_WITH_ERROR = "captum expert, error"
"""What ours always returns: f at both ends of the path and so the error."""
TRAINED = "llama-15m, trained"
SLOW = ("captum LLM", "inseq")
"""Many times slower than the rest: only where a case says so."""
CACHE = Path(__file__).resolve().parents[1] / "build" / "benchmarks"


@dataclass(frozen=True)
class Case:
    """One timed workload: ``model`` is a name in `shapes.SHAPES`, or "embedded"."""

    model: str
    prompt_tokens: int
    continuation_tokens: int
    n_pairs: int
    n_steps: int
    with_slow: bool = False

    def __str__(self) -> str:
        answer = (
            "1 token" if self.continuation_tokens == 1 else f"{self.continuation_tokens} tokens"
        )
        return (
            f"{self.model}, prompt {self.prompt_tokens}, answers of {answer}, "
            f"{self.n_pairs} pairs, {self.n_steps} steps"
        )


CPU_CASES = (
    Case("embedded", 23, 1, 16, 16),
    Case("llama-15m", 32, 1, 8, 16),
    Case("llama-15m", 128, 8, 2, 8, with_slow=True),
    Case("llama-15m", 512, 8, 1, 8),
    Case("gpt2-30m", 128, 8, 2, 8),
    Case("llama-110m", 128, 1, 2, 8),
    Case("llama-110m", 64, 8, 1, 8, with_slow=True),
    Case("llama-110m", 128, 8, 2, 8),
    Case("llama-110m", 128, 8, 1, 32),
)
QUICK_CASES = (Case("embedded", 23, 1, 8, 8), Case("llama-15m", 64, 4, 1, 8, with_slow=True))
CUDA_CASES = (
    Case("llama-1b", 128, 1, 16, 32),
    Case("llama-1b", 128, 8, 16, 32),
    Case("llama-1b", 512, 8, 8, 32),
    Case("llama-8b", 128, 8, 8, 32),
)
CUDA_QUICK_CASES = (Case("llama-1b", 128, 8, 4, 8),)


@dataclass(frozen=True)
class Run:
    """What the command line asked for."""

    console: Console
    device: str
    dtypes: tuple[torch.dtype, ...]
    quick: bool
    rounds: int
    slow_seconds: float
    rival_batch_tokens: int
    models: str

    @property
    def cpu_time(self) -> bool:
        return self.device == "cpu" and torch.get_num_threads() == 1

    @property
    def synchronize(self) -> Callable[[], object] | None:
        return torch.cuda.synchronize if self.device == "cuda" else None

    def turns(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every turn, with a progress bar."""
        with progress_bar() as bar:
            task = bar.add_task("", total=(self.rounds + 1) * len(candidates))
            return take_turns(
                candidates,
                rounds=self.rounds,
                synchronize=self.synchronize,
                clock=time.thread_time if self.cpu_time else time.perf_counter,
                slow_seconds=self.slow_seconds,
                on_turn=lambda name: bar.update(task, advance=1, description=name),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute's look, wide spreads")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; repeatable")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, help="turns of each candidate (5, or 3 with --quick)")
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 on a CPU without instructions for it as well"
    )
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: one has no spread")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; run it on one")
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    run = Run(
        console=console,
        device=options.device,
        dtypes=_dtypes(options.device, options.bf16),
        quick=options.quick,
        rounds=options.rounds or (3 if options.quick else 5),
        slow_seconds=4.0 if options.quick else 20.0,
        rival_batch_tokens=1280 if options.device == "cpu" else 16_384,
        models=options.models,
    )
    clock = "CPU time" if run.cpu_time else "wall clock"
    n_threads = torch.get_num_threads()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{header()}; {n_threads} threads, {clock}; median [quartiles]")
    missing = [package for package in ("captum", "inseq") if package not in _installed()]
    if missing:
        say(f"not installed, so left out: {', '.join(missing)} (pip install '.[bench]')")
    if torch.bfloat16 not in run.dtypes:
        say("bfloat16 left out: this CPU has no instructions for it (--bf16 runs it)")
    rows: list[dict[str, Any]] = []
    sections = {"steps": _steps, "accuracy": _accuracy, "memory": _memory, "savings": _savings}
    for name in options.only or SECTIONS:
        rows += [{"section": name, "threads": n_threads, **row} for row in sections[name](run)]
    if options.output:
        write_json(options.output, "attribution", rows)


# --- the same steps for all -----------------------------------------------------------------------


def _steps(run: Run) -> Iterator[dict[str, Any]]:
    cases = {
        ("cpu", False): CPU_CASES,
        ("cpu", True): QUICK_CASES,
        ("cuda", False): CUDA_CASES,
        ("cuda", True): CUDA_QUICK_CASES,
    }[run.device, run.quick]
    for case in cases:
        if run.models in case.model:
            yield from _timed_case(run, case)


def _timed_case(run: Run, case: Case) -> Iterator[dict[str, Any]]:
    """All candidates on one case, in every dtype; the rivals in the first only."""
    candidates: dict[str, Callable[[], object]] = {}
    flops: dict[str, float] = {}
    for dtype in run.dtypes:
        suffix = "" if dtype == run.dtypes[0] else f" {_short(dtype)}"
        model, tokenizer, pairs = _workload(run, case, dtype)
        per_step = [Evaluation.of(encode_pair(tokenizer, pair)) for pair in pairs]
        batch_tokens = 2048 if run.device == "cpu" else 16_384
        floor = GemmFloor(
            model, per_step * case.n_steps, values=per_step * 2, max_batch_tokens=batch_tokens
        )
        peak = GemmPeak(dtype, run.device)
        candidates |= {f"{FLOOR}{suffix}": floor, f"GEMM peak{suffix}": peak}
        flops |= {f"{FLOOR}{suffix}": floor.flops, f"GEMM peak{suffix}": peak.flops}
        common = {"method": "gausslegendre", "n_steps": case.n_steps}
        candidates[f"ours{suffix}"] = partial(ours, model, tokenizer, pairs, **common)
        if suffix == "":
            for name, rival in available().items():
                if case.with_slow or name not in SLOW:
                    batch = {"max_batch_tokens": run.rival_batch_tokens}
                    candidates[name] = partial(rival, model, tokenizer, pairs, **common, **batch)
    seconds = run.turns(candidates)
    to_floor = relative_to(FLOOR, seconds)
    table = Table(
        *("", "seconds", "/ floor", "x captum expert", "x captum expert, error"),
        *("GFLOP/s", "pairs/s"),
        title=str(case),
    )
    for name, result in to_floor.items():
        median = result.seconds.median
        is_peak = name.startswith("GEMM peak")
        faster = None if is_peak else _speedup(seconds, name, EXPERT)
        alike = None if is_peak else _speedup(seconds, name, EXPERT_WITH_ERROR)
        table.add_row(
            name,
            "" if is_peak else str(result.seconds),
            "" if is_peak else str(_own_floor(seconds, name)),
            "" if faster is None else str(faster),
            "" if alike is None else str(alike),
            f"{flops[name] / median / 1e9:.0f}" if name in flops else "",
            f"{case.n_pairs / median:.2f}" if name not in flops else "",
        )
        yield {
            "case": asdict(case),
            "result": result,
            "over_own_floor": None if is_peak else asdict(_own_floor(seconds, name)),
            "times_captum_expert": None if faster is None else asdict(faster),
            "times_captum_expert_with_error": None if alike is None else asdict(alike),
            "gflop": flops[name] / 1e9 if name in flops else None,
        }
    run.console.print(table)


def _own_floor(seconds: Mapping[str, list[float]], name: str) -> Spread:
    """Relative to the floor of the candidate's dtype."""
    floor = f"{FLOOR} bf16" if name.endswith("bf16") else FLOOR
    return relative_to(floor, {floor: seconds[floor], name: seconds[name]})[name].ratio


def _speedup(seconds: Mapping[str, list[float]], name: str, rival: str) -> Spread | None:
    """How many times as fast as the rival."""
    if rival not in seconds:
        return None
    return relative_to(name, {name: seconds[name], rival: seconds[rival]})[rival].ratio


# --- the same accuracy for all --------------------------------------------------------------------


def _accuracy(run: Run) -> Iterator[dict[str, Any]]:
    if run.device != "cpu":
        run.console.print("accuracy: measured on a CPU, where the trained models are; left out")
        return
    made = {"embedded": _embedded} if run.quick else {"embedded": _embedded, TRAINED: _trained}
    for name, make in made.items():
        if run.models in name:
            yield from _matched(run, name, *make(run))


def _embedded(run: Run) -> tuple[Any, Any, list[PreferencePair]]:
    model, tokenizer = load_model()
    n_pairs = 4 if run.quick else 24
    return model, tokenizer, _world_pairs(n_pairs)


def _trained(run: Run) -> tuple[Any, Any, list[PreferencePair]]:
    model, language, _ = trained_model(SHAPES["llama-15m"], CACHE)
    pairs = language.pairs(6, 40, 1, seed=1) + language.pairs(6, 32, 4, seed=1)
    return model, word_tokenizer(SHAPES["llama-15m"].vocab_size), pairs


def _matched(
    run: Run, name: str, model: Any, tokenizer: Any, pairs: list[PreferencePair]
) -> Iterator[dict[str, Any]]:
    """What each needs to be as good as `attribute` by default, and how long that takes."""
    model.requires_grad_(False)
    with run.console.status(f"{name}: reference"):
        reference = results_of(
            model, tokenizer, pairs, method="riemann_middle", n_steps=128 if run.quick else 512
        )
        defaults = {
            f"ours{'' if dtype == torch.float32 else ' ' + _short(dtype)}": partial(
                results_of, _as(model, dtype), tokenizer, pairs
            )
            for dtype in run.dtypes
        }
        found = {key: accuracy_of(call(), reference) for key, call in defaults.items()}
    table = Table(
        *("", "gradients", "error p50", "p90", "top 5", "top 10", "L1 p90", "seconds"),
        "x captum expert",
        title=f"{name}, {len(pairs)} pairs, default tolerance",
    )
    candidates: dict[str, Callable[[], object]] = dict(defaults)
    goal = max(found.values(), key=lambda accuracy: accuracy.residual_p90)
    for method in ("riemann_middle", "gausslegendre"):
        with run.console.status(f"{name}: {method}"):
            steps = list(sweep(model, tokenizer, pairs, reference, method, goal))
        for n_steps, accuracy in steps:
            table.add_row(f"{method} {n_steps}", *_shown(accuracy), "", "")
            yield {"model": name, "method": method, "n_steps": n_steps, **asdict(accuracy)}
        fixed = {"method": method, "n_steps": steps[-1][0]}
        if steps[-1][1].at_least(goal):
            found[f"ours {method}"] = steps[-1][1]
            candidates[f"ours {method}"] = partial(ours, model, tokenizer, pairs, **fixed)
            if "captum" in _installed():
                found[f"captum {method}"] = steps[-1][1]
                batch = {"max_batch_tokens": run.rival_batch_tokens}
                captum = partial(captum_expert, model, tokenizer, pairs, **fixed, **batch)
                candidates[f"captum {method}"] = captum
    seconds = run.turns(candidates)
    # The rule with which captum is faster.
    experts = [key for key in candidates if key.startswith("captum")]
    best = min(experts, key=lambda key: np.median(seconds[key]), default="ours")
    for key, accuracy in found.items():
        timed = relative_to(key, {key: seconds[key], best: seconds[best]})
        faster = timed[best].ratio
        table.add_row(key, *_shown(accuracy), str(timed[key].seconds), str(faster))
        yield {
            "model": name,
            "candidate": key,
            **asdict(accuracy),
            "seconds": asdict(timed[key].seconds),
            "times_captum_expert": asdict(faster) if experts else None,
        }
    run.console.print(table)


def _shown(accuracy: Accuracy) -> list[str]:
    shares = (accuracy.top_5, accuracy.top_10)
    return [
        f"{accuracy.gradients:.1f}",
        f"{accuracy.residual_p50:.4f}",
        f"{accuracy.residual_p90:.4f}",
        *(f"{share:.3f}" for share in shares),
        f"{accuracy.l1_p90:.4f}",
    ]


# --- memory ---------------------------------------------------------------------------------------


def _memory(run: Run) -> Iterator[dict[str, Any]]:
    model = {"cpu": "llama-110m", "cuda": "llama-1b"}[run.device]
    if run.quick and run.device == "cpu":
        model = "llama-15m"
    n_steps = 8 if run.quick else 32
    jobs: list[tuple[str, str, int | str]] = [("ours", "ours", "auto")]
    if "captum" in _installed():
        jobs += [
            (f"{EXPERT}, batches of {run.rival_batch_tokens}", EXPERT, run.rival_batch_tokens),
            (f"{EXPERT}, one batch", EXPERT, 1 << 30),
        ]
    jobs.append(("loop", "loop", 0))
    if run.quick:
        jobs = jobs[:2]
    title = f"peak above {model}, one pair of 128 tokens (120 + 8), {n_steps} steps"
    table = Table("", "MB", title=title)
    for shown, candidate, batch_tokens in jobs:
        job = memory.Job(
            candidate,
            model,
            prompt_tokens=120,
            continuation_tokens=8,
            # A loop holds one step at a time.
            n_steps=2 if candidate == "loop" else n_steps,
            max_batch_tokens=batch_tokens,
            device=run.device,
            dtype=_name(run.dtypes[0]),
            threads=torch.get_num_threads(),
        )
        with run.console.status(f"memory: {shown}"):
            peak = memory.measure(job)
        table.add_row(shown, f"{peak / 1e6:.0f}")
        yield {**asdict(job), "shown": shown, "bytes": peak}
    run.console.print(table)


# --- what the savings save ------------------------------------------------------------------------


def _savings(run: Run) -> Iterator[dict[str, Any]]:
    case = Case("llama-1b" if run.device == "cuda" else "llama-15m", 128, 8, 2, 8)
    model, tokenizer, pairs = _workload(run, case, run.dtypes[0])
    call = partial(
        results_of, model, tokenizer, pairs, method="gausslegendre", n_steps=case.n_steps
    )

    def apart() -> None:
        call(objective="chosen")
        call(objective="rejected")

    candidates: dict[str, Callable[[], object]] = {
        "both answers in one sequence": call,
        "each answer for itself": apart,
        **{
            f"first {n} of {case.prompt_tokens} tokens cached": partial(
                call, attributed_span=(n, case.prompt_tokens)
            )
            for n in ((64,) if run.quick else (32, 64, 96))
        },
    }
    measured = relative_to("both answers in one sequence", run.turns(candidates))
    table = Table("", "seconds", "relative", title=f"savings: {case}")
    for name, result in measured.items():
        table.add_row(name, str(result.seconds), str(result.ratio))
        yield {"case": asdict(case), "result": result}
    run.console.print(table)


# --- workloads ------------------------------------------------------------------------------------


def _workload(run: Run, case: Case, dtype: torch.dtype) -> tuple[Any, Any, list[PreferencePair]]:
    """Model with frozen weights, tokenizer and pairs of a case."""
    if case.model == "embedded":
        model, tokenizer = load_model()
        return _as(model, dtype).requires_grad_(False), tokenizer, _world_pairs(case.n_pairs)
    shape = SHAPES[case.model]
    model = random_model(shape, dtype=dtype, device=run.device).requires_grad_(False)
    pairs = random_pairs(
        case.n_pairs, case.prompt_tokens, case.continuation_tokens, vocab_size=shape.vocab_size
    )
    return model, word_tokenizer(shape.vocab_size), pairs


def _world_pairs(n_pairs: int) -> list[PreferencePair]:
    """Of the embedded model's world, every second one with answers of several tokens."""
    pairs = []
    for number, pair in enumerate(world.pairs("mix", "test", seed=0, n=n_pairs)):
        if number % 2:
            careful, gossip = (
                world.CLOSINGS[register][number % len(world.CLOSINGS[register])]
                for register in ("careful", "gossip")
            )
            pair = PreferencePair(
                pair.prompt, f"{pair.chosen} . {careful}", f"{pair.rejected} . {gossip}"
            )
        pairs.append(pair)
    return pairs


def _dtypes(device: str, bf16: bool) -> tuple[torch.dtype, ...]:
    if device == "cuda":
        return (torch.bfloat16,)
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return (torch.float32, torch.bfloat16) if bf16 or fast else (torch.float32,)


def _as(model: Any, dtype: torch.dtype) -> Any:
    """The model, or a copy in another dtype."""
    if model.dtype == dtype:
        return model
    copy = type(model)(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]


def _installed() -> set[str]:
    return {name.split()[0] for name in available()}


if __name__ == "__main__":
    main()
