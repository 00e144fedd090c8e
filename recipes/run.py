"""A recipe from its data to its table; what is finished in the output folder is not done again."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import grains_ext
from grains_ext import EvaluationReport
from grains_ext.decoder import DecoderView
from grains_ext.evaluation import Measurement, measure
from grains_ext.evaluation.comparison import UNSTEERED
from grains_ext.evaluation.generation import generate_answers
from grains_ext.files import write_text
from recipes import judging, table
from recipes.data import Data, load
from recipes.methods import Workshop, failure_of, told
from recipes.recipe import Options, Recipe, read_recipe

PROMPT = "prompt"


@dataclass(frozen=True)
class Sources:
    """Where a run's parts come from.

    model: gives the model and its tokenizer, or its processor. model_name: as the user named it.
    data: a folder, or None for `datasets`. judge: rates answers; None leaves them as they are.
    dtype: of the model's weights, for the record.
    """

    model: Callable[[], tuple[Any, Any]]
    model_name: str
    data: Path | None
    judge: judging.Ask | None = None
    judge_name: str | None = None
    dtype: str | None = None


def run(
    recipe: Recipe,
    sources: Sources,
    output: Path,
    *,
    progress: bool = True,
    console: Console | None = None,
) -> EvaluationReport:
    """Runs what is not finished yet, and writes table.md and results.json.

    Raises ValueError where the folder holds a run of another recipe, model, dtype or data.
    """
    console = console or Console(stderr=True, quiet=not progress)
    _check_installed(recipe)
    output.mkdir(parents=True, exist_ok=True)
    _claim(recipe, output)
    clock = _Clock(output / "stages.json", console)
    data = load(recipe, sources.data)
    _check_same(output, {"model": sources.model_name, "dtype": sources.dtype, **data.describe()})
    rows = [UNSTEERED, *(row for row, _, _ in recipe.rows())]
    if not all(_is_finished(output, row) for row in rows):
        model, processor = sources.model()
        model.requires_grad_(False)
        clock.watch(model)
        _work(Workshop(recipe, model, processor, data, output, progress), clock)
    measured = {
        row: json.loads(_measured_file(output, row).read_text(encoding="utf-8"))
        for row in rows
        if _measured_file(output, row).is_file()
    }
    missed = [row for row in rows if row not in measured]
    report = _report(data, measured, sources.judge)
    text = table.markdown(recipe, report, missed, sources)
    write_text(output / "table.md", text)
    results = {
        "recipe": recipe.name,
        "model": sources.model_name,
        "dtype": sources.dtype,
        "judge": sources.judge_name,
        "environment": _environment(),
        "nothing_within_the_limit": missed,
        "stages": clock.stages,
        **report.as_dict(),
    }
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    return report


def _work(shop: Workshop, clock: _Clock) -> None:
    """Everything that needs the model; what is in the folder already is taken from there."""
    output = shop.folder
    if shop.recipe.attributes:
        with clock.stage("attribute", needed=not (output / "tuned").is_dir()):
            _ = shop.attributions
    conditions: dict[str, Any] = {UNSTEERED: None}
    for row, method, draw in shop.recipe.rows():
        if method.prompt:
            conditions[row] = PROMPT
            continue
        needed = not ((output / "tuned" / row).is_dir() or failure_of(output, row).is_file())
        with clock.stage(f"fit and tune {row}", needed=needed):
            found = shop.tuned(row, method, draw)
        if found is not None:
            conditions[row] = found
    for row, condition in conditions.items():
        path = _measured_file(output, row)
        if not path.is_file():
            with clock.stage(f"evaluate {row}", needed=True):
                _measure(shop, condition, path)


# --- one condition --------------------------------------------------------------------------------


def _measure(shop: Workshop, condition: Any, path: Path) -> None:
    """Writes {"measurement": as_dict of all that needs no judge, "said": {task: [answers]}}."""
    data = shop.data
    if condition == PROMPT:
        data, condition = told(data, shop.recipe.benchmark["instruction"]), None
    budget = shop.recipe.settings["max_batch_tokens"]
    measurement = measure(
        shop.model,
        shop.processor,
        data.test_pairs,
        vectors=condition,
        tasks=data.choices,
        neutral_texts=data.neutral_test,
        generate=False,
        max_batch_tokens=budget,
    )
    said = {}
    with _steered(shop.model, condition):
        for name, asked in data.asked.items():
            said[name] = generate_answers(
                shop.model,
                shop.processor,
                [(question.prompt, question.images) for question in asked.questions],
                max_new_tokens=shop.recipe.settings["max_new_tokens"],
                max_batch_tokens=budget,
            )
    found = {"measurement": measurement.as_dict(), "said": said}
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(found, ensure_ascii=False) + "\n")


@contextmanager
def _steered(model: Any, condition: Any) -> Iterator[None]:
    if condition is None:
        yield
        return
    with condition.applied(model) if hasattr(condition, "applied") else condition(model):
        yield


def _report(
    data: Data, measured: dict[str, Options], judge: judging.Ask | None
) -> EvaluationReport:
    conditions = {}
    unsteered = measured[UNSTEERED]["said"]
    for row, found in measured.items():
        measurement = Measurement.from_dict(found["measurement"], data.choices)
        rated = {}
        for name, asked in data.asked.items() if judge is not None else ():
            assert judge is not None
            others = None if row == UNSTEERED else unsteered[name]
            result = judging.rated(asked, found["said"][name], others, judge)
            if result is not None:
                rated[name] = result
        conditions[row] = replace(measurement, tasks={**measurement.tasks, **rated})
    return EvaluationReport(conditions)


def _check_installed(recipe: Recipe) -> None:
    """Before hours of work, not after them."""
    adapters = [name for name, method in recipe.methods().items() if method.lora is not None]
    if adapters and importlib.util.find_spec("peft") is None:
        raise ImportError(f"{adapters[0]} needs peft: install it, or leave the method out")


# --- the folder -----------------------------------------------------------------------------------


def _claim(recipe: Recipe, output: Path) -> None:
    """Writes config.yaml, or checks that the folder's own says the same."""
    path = output / "config.yaml"
    if path.is_file():
        if differing := _differing(read_recipe(path), recipe):
            raise ValueError(
                f"{output} holds a run with other settings ({', '.join(differing)}): take another "
                "folder, or delete this one"
            )
    else:
        write_text(path, recipe.as_yaml())


def _differing(one: Recipe, other: Recipe) -> Sequence[str]:
    names = ["name", "model", "benchmark", "kept"]
    differing = [name for name in names if getattr(one, name) != getattr(other, name)]
    keys = one.settings.keys() | other.settings.keys()
    return differing + sorted(
        key for key in keys if one.settings.get(key) != other.settings.get(key)
    )


def _check_same(output: Path, used: Options) -> None:
    """Writes what was used to inputs.json, or checks that it is what the folder's run used."""
    path = output / "inputs.json"
    if not path.is_file():
        write_text(path, json.dumps(used, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in ("model", "dtype", "sha256"):
        if before[name] != used[name]:
            what = "data" if name == "sha256" else f"{name} ({before[name]})"
            raise ValueError(f"{output} holds a run with another {what}: take another folder")


def _measured_file(output: Path, row: str) -> Path:
    return output / "measured" / f"{row}.json"


def _is_finished(output: Path, row: str) -> bool:
    return _measured_file(output, row).is_file() or failure_of(output, row).is_file()


class _Clock:
    """Seconds, model tokens and peak memory of every stage, added up over taken-up runs."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console
        self.stages: dict[str, Options] = json.loads(path.read_text()) if path.is_file() else {}
        self._tokens = 0

    def watch(self, model: Any) -> None:
        """Counts the tokens that reach the first decoder block, padding included."""

        def count(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._tokens += hidden.shape[:-1].numel()

        DecoderView.of(model).blocks[0].register_forward_pre_hook(count, with_kwargs=True)

    @contextmanager
    def stage(self, name: str, *, needed: bool) -> Iterator[None]:
        start, tokens = time.perf_counter(), self._tokens
        if needed:
            self.console.print(f"{name} ...", highlight=False)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        if needed:
            seconds = time.perf_counter() - start
            spent: Options = {"seconds": seconds, "tokens": self._tokens - tokens}
            if torch.cuda.is_available():
                spent["peak_bytes"] = torch.cuda.max_memory_allocated()
            self.stages[name] = spent
            write_text(self.path, json.dumps(self.stages, indent=1) + "\n")


def _environment() -> Options:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "grains_ext": grains_ext.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": cuda or platform.machine(),
    }
