"""One HTML page that shows what was attributed, what steering did, and at what price.

The page needs no network: its style and its pictures are inside, it has no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains_ext.files import write_text
from grains_ext.report.rendering import template
from grains_ext.report.tokens import figure
from grains_ext.report.view import directions

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution


@dataclass(frozen=True)
class MethodRow:
    """One line of the comparison on held-out pairs."""

    name: str
    accuracy: float
    """Share of pairs answered with the chosen continuation, in [0, 1]."""
    interval: tuple[float, float]
    """The 95 % interval of the accuracy."""
    n: int
    """How many pairs it was measured on."""
    perplexity_ratio: float
    """Perplexity on neutral text, steered over unsteered."""
    settings: str = ""
    """What tuning chose, such as ``block 2, strength 4``."""


@dataclass(frozen=True)
class Generation:
    """One prompt continued before and after steering."""

    prompt: str
    chosen: str
    before: str
    after: str


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
    """Writes the page, replacing the file at once or not at all, and returns its path.

    Args:
      attributions: shown as shaded tokens; the shade is relative to the strongest token of each.
      images: for each attribution its pictures, or None; see `grains_ext.report.tokens.figure`.
      rows: the comparison of methods, in the order to show.
      generations: texts before and after.
      metadata: heading -> {name: value}; each becomes a small table at the end.
    """
    pictures = [None] * len(attributions) if images is None else images
    page = template("report.html.j2").render(
        title=title,
        directions=directions(attributions),
        attributions=[figure(*each) for each in zip(attributions, pictures, strict=True)],
        rows=rows,
        generations=generations,
        metadata=metadata or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
