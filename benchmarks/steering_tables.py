"""The tables of docs/evidence.md, written from the results of the steering benchmark.

    python -m benchmarks.steering_tables [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. With --check nothing is
written; it fails where the page says another thing than the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "steering-quality.json"
PAGE = ROOT / "docs" / "evidence.md"
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Report = Mapping[str, Any]


def filled(page: str, report: Report) -> str:
    """The page with its tables made anew. Raises KeyError for a table that is not known."""

    def table(match: re.Match[str]) -> str:
        return match[1] + "\n" + TABLES[match[2]](report) + "\n" + match[4]

    return _TABLE.sub(table, page)


def methods(report: Report, world: str) -> str:
    """By method: every seed, the mean, the perplexity, and what the two of ours are ahead by."""
    section = report["worlds"][world]
    closed = {row["method"]: row.get("lead") for row in section["methods_closed"]}
    seeds = [f"seed {seed}" for seed in section["seeds"]]
    rows = [
        [
            *_row(row),
            f"{row['perplexity_ratio']:.3f}",
            _lead(closed[row["method"]]),
            _lead(row.get("lead")),
        ]
        for row in section["methods"]
    ]
    return _table(
        ["", *seeds, "mean", "perplexity", "closed form ahead by", "refined ahead by"], rows
    )


def ablations(report: Report, world: str) -> str:
    rows = report["worlds"][world]["ablations"]
    seeds = [f"seed {seed}" for seed in rows[0]["by_seed"]]
    named = [row | {"method": "default"} if "lead" not in row else row for row in rows]
    return _table(
        ["", *seeds, "mean", "default ahead by"],
        [[*_row(row), _lead(row.get("lead"))] for row in named],
    )


def pooled(report: Report, ours: str) -> str:
    """Against each other method, over the models of both worlds."""
    rows = [
        [row["method"], _signed(row["mean"]), f"{row['ahead']} of {row['models']}"]
        for row in report["pooled"][ours]
    ]
    return _table([f"{ours} against", "ahead by", "in so many models"], rows)


def short(report: Report) -> str:
    """The means alone, worst first, of methods that both worlds have."""
    text, pictures = (
        {row["method"]: row["accuracy"]["mean"] for row in report["worlds"][world]["methods"]}
        for world in ("text", "vision")
    )
    both = text.keys() & pictures.keys()
    names = sorted(both, key=lambda name: (round(text[name] + pictures[name], 6), name))
    rows = [[_marked(n), *(f"{100 * means[n]:.0f} %" for means in (text, pictures))] for n in names]
    return _table(["mean over five seeds", "text", "pictures"], rows)


def _marked(name: str) -> str:
    return f"**{name}**" if name.startswith("GrAInS") else name


def equal_steps(report: Report, key: str = "equal_steps") -> str:
    parts = {"text": "text", "vision": "pictures", "all": "all models"}
    rows = [
        [
            str(row["steps"]),
            row["method"].split(",")[0],
            *(_ahead(row["leads"].get(part)) for part in parts),
        ]
        for row in report[key]
        if row["leads"]
    ]
    return _table(["steps", "GrAInS against", *parts.values()], rows)


def gated(report: Report, world: str) -> str:
    """What a gate is worth on the pairs, and how often it opens."""
    rows = [
        [
            row["method"],
            f"{100 * row['without']['mean']:.1f}",
            _plain(row["accuracy"]),
            _signed(row["gain"]),
            *(f"{100 * row['answered'][name]['mean']:.1f}" for name in ("without", "with")),
            f"{row['perplexity_ratio']:.3f}",
            *(f"{100 * row['open'][name]:.1f}" for name in ("test", "neutral")),
        ]
        for row in report["worlds"][world].get("gated", ())
    ]
    given = ["given without", "given with"]
    opened = ["opened by pairs", "by neutral texts"]
    return _table(["", "without", "with", "gain", *given, "perplexity", *opened], rows)


def changed_elsewhere(report: Report, world: str) -> str:
    """Answers that are changed where none should be: without a gate and behind either, and by
    what has no gate."""
    by_base: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["worlds"][world].get("gated", ()):
        by_base.setdefault(row["method"].partition(", gated")[0], []).append(row["elsewhere"])
    both = {base: found for base, found in by_base.items() if len(found) == 2}
    kinds = list(next(iter(both.values()))[0]) if both else []
    rows = []
    for base, (texts, prompts) in both.items():
        for name, found, column in (
            (base, texts, "without"),
            (f"{base}, gated", texts, "with"),
            (f"{base}, gated by prompts", prompts, "with"),
        ):
            rows.append([name, *(f"{100 * found[kind][column]['mean']:.1f}" for kind in kinds)])
    for name, found in report["worlds"][world].get("elsewhere", {}).items():
        if name in both:
            continue
        rows.append([name, *(f"{100 * found[kind]['without']['mean']:.1f}" for kind in kinds)])
    return _table(["", *kinds], rows)


TABLES: dict[str, Callable[[Report], str]] = {
    "short": short,
    "text": partial(methods, world="text"),
    "pictures": partial(methods, world="vision"),
    "choices, text": partial(ablations, world="text"),
    "choices, pictures": partial(ablations, world="vision"),
    "closed form, both": partial(pooled, ours="GrAInS"),
    "refined, both": partial(pooled, ours="GrAInS, refined"),
    "equal steps": equal_steps,
    "equal steps, all blocks": partial(equal_steps, key="equal_steps_together"),
    "refined in all blocks, both": partial(pooled, ours="GrAInS, refined, all blocks"),
    "gated, text": partial(gated, world="text"),
    "gated, pictures": partial(gated, world="vision"),
    "changed, text": partial(changed_elsewhere, world="text"),
    "changed, pictures": partial(changed_elsewhere, world="vision"),
}


def _row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"],
        *(f"{100 * each['mean']:.1f}" for each in row["by_seed"].values()),
        _plain(row["accuracy"]),
    ]


def _plain(estimate: Mapping[str, float]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _signed(estimate: Mapping[str, float]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _lead(lead: Mapping[str, Any] | None) -> str:
    return _signed(lead["mean"]) if lead else ""


def _ahead(lead: Mapping[str, Any] | None) -> str:
    return f"{_signed(lead)}, {lead['ahead']} of {lead['models']}" if lead else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steering_tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail where it differs")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    made = filled(page, json.loads(RESULTS.read_text()))
    if options.check and made != page:
        sys.exit(f"{PAGE} differs from {RESULTS}: python -m benchmarks.steering_tables")
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
