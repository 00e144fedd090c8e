"""One HTML page that shows what was attributed, what steering did, and at what price.

The page needs no network: its style, its pictures and its script are inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains_ext.files import write_text
from grains_ext.report import sections
from grains_ext.report.parts import (
    Attributed,
    Generation,
    MethodRow,
    Parts,
    comparison,
    continued,
)
from grains_ext.report.rendering import template
from grains_ext.report.runs import read_runs

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution
    from grains_ext.pairs import PreferencePair

# Pairs of one attribution or evaluation that a page holds: they open in a moment.
LIMIT = 2000


def report(
    runs: Sequence[str | Path] | str | Path,
    path: str | Path,
    *,
    title: str | None = None,
    pairs: Sequence[PreferencePair] | None = None,
    limit: int | None = LIMIT,
) -> Parts:
    """Writes one page of everything that the runs hold, and returns what it shows.

    Args:
      runs: folders that ``grains`` commands wrote, folders that hold such folders, and single files
        (evaluations, attributions).
      path: the page, replaced at once or not at all; folders above it are made.
      title: of the page; by default the runs' names.
      pairs: those that were attributed, in their order: for their pictures, which results do not
        hold. Nothing that a file says is used as a path.
      limit: pairs shown of each attribution and evaluation, from the first; None for all. Figures
        are always of all pairs.

    Raises FileNotFoundError, and ValueError where a path holds no run, one that was stopped half
    way, or one of a newer version; ImportError without Jinja2, or Pillow for pictures.

        report(["results/", "tuned/", "evaluation.json"], "report.html")
    """
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    if not runs:
        raise ValueError("no run to report on")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all; got {limit}")
    template("report.html.j2")  # without Jinja2 nothing need be read
    parts = read_runs(runs, pairs=pairs, limit=limit)
    _write(Path(path), title or ", ".join(Path(run).resolve().name for run in runs), parts)
    return parts


def write_report(
    path: str | Path,
    *,
    title: str,
    attributions: Sequence[Attribution] = (),
    images: Sequence[Sequence[Any] | None] | None = None,
    rows: Sequence[MethodRow] = (),
    generations: Sequence[Generation] = (),
    metadata: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """Writes a page of what is at hand, replacing the file at once or not at all; returns its path.

    Args:
      attributions: shown as shaded tokens; the shade is relative to the strongest token of each.
      images: for each attribution its pictures, or None; see `grains_ext.report.tokens.figure`.
      rows: the comparison of methods, in the order to show.
      generations: texts before and after.
      metadata: heading -> {name: value}; each becomes a small table at the end.
    """
    if images is not None and len(images) != len(attributions):
        raise ValueError(f"{len(attributions)} attributions and images for {len(images)}")
    failed = sum(not each.converged for each in attributions)
    shown = Attributed(
        "", tuple(attributions), None if images is None else tuple(images), n_not_converged=failed
    )
    parts = Parts(
        held_out=(comparison(rows),) if rows else (),
        answers=(continued(generations),) if generations else (),
        attributed=(shown,) if attributions else (),
        metadata=metadata or {},
    )
    path = Path(path)
    _write(path, title, parts)
    return path


def _write(path: Path, title: str, parts: Parts) -> None:
    page = template("report.html.j2").render(**sections.page(title, parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
