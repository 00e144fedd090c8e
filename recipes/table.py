"""The table: a row for each condition, a column for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grains_ext import EvaluationReport
from grains_ext.evaluation import Estimate, PairedChange, Proportion
from grains_ext.evaluation.comparison import UNSTEERED
from recipes.recipe import Recipe

if TYPE_CHECKING:
    from recipes.run import Sources

_LEFT_OUT = ("mc0/true_mass", "mc1/true_mass", "mc2/accuracy", "accuracy_per_token")
"""Figures that no benchmark reports."""


def markdown(
    recipe: Recipe, report: EvaluationReport, missed: Sequence[str], sources: Sources
) -> str:
    """The report as Markdown: figures with 95 % intervals, and their changes."""
    figures = _figures(report)
    lines = [
        f"# {recipe.benchmark['title']}, {sources.model_name}",
        "",
        "Figures with 95 % intervals; behind them the change from unsteered with its own interval "
        "and, of a share, McNemar's p.",
        "",
        "| | " + " | ".join(figures) + " |",
        "| --- |" + " --- |" * len(figures),
    ]
    for row, measurement in report.conditions.items():
        statistics = measurement.statistics()
        changes = {} if row == UNSTEERED else report.changes(row)
        cells = [
            _cell(statistics[name].estimate(), changes.get(name)) if name in statistics else ""
            for name in figures
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += [f"| {row} | no setting within the limit |" for row in missed]
    lines += ["", _judged(sources), "", "What the paper does otherwise:", ""]
    lines += [f"- {difference}" for difference in recipe.benchmark["differs"]]
    return "\n".join(lines) + "\n"


def _figures(report: EvaluationReport) -> list[str]:
    """In the order of the conditions' own, without those that say the same thing twice."""
    names: dict[str, None] = {}
    single: Mapping[str, None] = dict.fromkeys(
        f"{task}/true_mass" for task in ("toxigen", "faitheval", "mmlu", "mmmu")
    )
    for measurement in report.conditions.values():
        names |= dict.fromkeys(measurement.statistics())
    return [name for name in names if name not in _LEFT_OUT and name not in single]


def _cell(estimate: Proportion | Estimate, change: PairedChange | None) -> str:
    if change is None:
        return str(estimate)
    p = "" if change.p_value is None else f", p {change.p_value:.2g}"
    return f"{estimate} ({change}{p})"


def _judged(sources: Sources) -> str:
    if sources.judge is None:
        return "Answers in the model's own words were not judged: they are in measured/*.json."
    return f"Answers in the model's own words were judged by {sources.judge_name}."
