"""An attribution for the eyes: coloured tokens in a terminal, with rich, or HTML in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from grains_ext.report import view
from grains_ext.report.text import fit_to_show

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution

# Okabe and Ito's blue and orange: told apart with every common colour blindness.
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
# Shades below this stay without colour: they would be noise on the screen.
_FAINT = 0.08
# A row of more patches than this is drawn without their numbers.
_NUMBERED = 10


def show(attribution: Attribution, images: Sequence[Any] | None = None) -> None:
    """Shows it where the caller works; see `grains_ext.attribution.Attribution.show`."""
    if _in_notebook():
        from IPython.display import HTML, display

        from grains_ext.report.tokens import attribution_fragment

        display(HTML(attribution_fragment(attribution, images)))
        return
    console = Console()
    console.print(legend(view.directions([attribution])))
    console.print(tokens(attribution), highlight=False)


def legend(
    directions: tuple[str, str] = ("toward the chosen answer", "toward the rejected one"),
) -> Text:
    """One line that names the two colours."""
    text = Text(f"{directions[0]}: ")
    text.append(" blue ", style=style(1.0)).append(f"   {directions[1]}: ")
    return text.append(" orange ", style=style(-1.0))


def tokens(attribution: Attribution, n_strongest: int = 4) -> Group:
    """The prompt with each token's signed share as its background, and the strongest in numbers.

    Below it the patches of its images, one block for each layer.
    """
    seen = view.view(attribution)
    shaded = Text()
    for piece in seen.pieces:
        shaded.append(fit_to_show(piece.text), style=style(piece.shade)).append(" ")
    strongest = sorted(seen.pieces, key=lambda piece: -abs(piece.score))[:n_strongest]
    numbers = "  ".join(f"{fit_to_show(piece.text)} {piece.score:+.2f}" for piece in strongest)
    doubt = "" if attribution.converged else f"; {view.verdict(attribution)}"
    lines: list[RenderableType] = [
        shaded,
        Text(
            f"  chosen {fit_to_show(attribution.chosen)}, "
            f"rejected {fit_to_show(attribution.rejected)}; "
            f"{view.objective_words(attribution)} {attribution.f_input:+.2f}; "
            f"strongest: {numbers}{doubt}",
            style="dim",
        ),
    ]
    for picture in seen.pictures:
        lines.append(Text(f"  image {picture.number}: {picture.total:+.2f}", style="dim"))
        for layer in picture.layers:
            lines += [_patches(layer), Text()]
    return Group(*lines)


def style(shade: float) -> str:
    """Black on a tint of blue (positive) or orange (negative), for a shade in [-1, 1]."""
    if abs(shade) < _FAINT:
        return ""
    colour = BLUE if shade > 0 else ORANGE
    # Full blue under black text would be hard to read: the strongest tint stops at 70 %.
    weight = 0.15 + 0.55 * abs(shade)
    red, green, blue = (round(255 + weight * (channel - 255)) for channel in colour)
    return f"black on rgb({red},{green},{blue})"


def _patches(layer: Sequence[view.Patch]) -> Text:
    """A row of cells for each row of patches: those whose boxes begin at the same height."""
    rows: dict[float, list[view.Patch]] = {}
    for patch in sorted(layer, key=lambda patch: (round(patch.box[1], 4), patch.box[0])):
        rows.setdefault(round(patch.box[1], 4), []).append(patch)
    numbered = max(map(len, rows.values())) <= _NUMBERED
    text = Text()
    for row in rows.values():
        text.append("\n  " if text else "  ")
        for patch in row:
            text.append(f" {patch.score:+.2f} " if numbered else "  ", style=style(patch.shade))
    return text


def _in_notebook() -> bool:
    """Whether IPython is there and talks to a front end that displays HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
