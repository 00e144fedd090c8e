"""One HTML page that shows what was attributed, what steering did, and at what price.

The page needs no network: its style is inside, it has no script and no image. Token colours are
signed and colour-blind-safe (blue toward the chosen answer, orange toward the rejected one), and
the sign is also in the underline and the number in the label, for print and screen readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from grains_ext.files import write_text

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution

# Below full opacity, so that the text on a token stays readable in light and dark.
_MAX_ALPHA = 0.75


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
    rows: Sequence[MethodRow] = (),
    generations: Sequence[Generation] = (),
    metadata: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """Writes the page, replacing the file at once or not at all, and returns its path.

    Args:
      attributions: shown as shaded tokens; the shade is relative to the strongest token of each.
      rows: the comparison of methods, in the order to show.
      generations: texts before and after.
      metadata: heading -> {name: value}; each becomes a small table at the end.
    """
    page = _template().render(
        title=title,
        attributions=[
            {"of": attribution, "tokens": _shaded(attribution)} for attribution in attributions
        ],
        rows=rows,
        generations=generations,
        metadata=metadata or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def shades(scores: Sequence[float]) -> list[float]:
    """Each score over the largest absolute score, in [-1, 1]; zeros where all are zero."""
    largest = max((abs(score) for score in scores), default=0.0)
    return [score / largest if largest > 0 else 0.0 for score in scores]


def _shaded(attribution: Attribution) -> list[dict[str, object]]:
    scores = [float(score) for score in attribution.scores]
    return [
        {
            "text": token,
            "score": f"{score:+.3f}",
            "sign": "pos" if shade >= 0 else "neg",
            "alpha": f"{abs(shade) * _MAX_ALPHA:.3f}",
        }
        for token, score, shade in zip(attribution.tokens, scores, shades(scores), strict=True)
    ]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template("report.html.j2")
