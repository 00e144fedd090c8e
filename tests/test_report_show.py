"""What .show() prints in a terminal and hands to a notebook."""

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from grains_ext.report.show import legend, tokens
from tests.attributions import attribution
from tests.test_attribution_result import image_grid

BLUE, ORANGE = "48;2;76;156;201", "48;2;238;188;76"


def printed(shown: RenderableType) -> str:
    text = io.StringIO()
    Console(file=text, force_terminal=True, color_system="truecolor", width=150).print(shown)
    return text.getvalue()


def test_token_styles_tell_the_sign() -> None:
    it = attribution(("a", "b", "c"), [2.0, -2.0, 0.01], rejected="[bold]y")
    text = printed(tokens(it))
    assert f"{BLUE}ma" in text
    assert f"{ORANGE}mb" in text
    assert "a +2.00" in text
    assert "[bold]y" in text
    assert "do not trust" not in text
    assert "not converged: do not trust" in printed(
        tokens(attribution(("a",), [1], converged=False))
    )


def test_escape_sequences_are_shown_and_not_obeyed() -> None:
    it = attribution(("\x1b[2J", "a"), [2.0, -2.0], chosen="b\x9b2J", rejected="\x1b]0;title\x07")
    text = printed(tokens(it))
    assert "[U+001B][2J" in text
    assert "\x1b[2J" not in text
    assert "\x9b" not in text
    assert "\x1b]0;" not in text


def test_patches_are_cells_with_their_values() -> None:
    it = attribution(
        ("<image>", "<image>", "?"),
        [1.0, -1.0, 0.5],
        modality=("image", "image", "text"),
        images=(image_grid((0, 1)),),
    )
    text = printed(tokens(it))
    assert f"{BLUE}m +1.00 " in text
    assert f"{ORANGE}m -1.00 " in text
    assert "image 1: +0.00" in text


def test_legend_names_both_directions() -> None:
    assert "toward the chosen answer" in legend().plain
    assert legend(("up", "down")).plain == "up:  blue    down:  orange "


def test_show_prints_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    attribution(("first", "second"), [2.0, -2.0]).show()
    shown = capsys.readouterr().out
    assert "toward the chosen answer" in shown
    assert "first second" in shown


@pytest.mark.parametrize("in_notebook", [True, False])
def test_show_hands_html_to_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_notebook: bool
) -> None:
    displayed: list[Any] = []
    ipython: Any = ModuleType("IPython")
    shell = SimpleNamespace(kernel=object()) if in_notebook else SimpleNamespace()
    ipython.get_ipython = lambda: shell
    display: Any = ModuleType("IPython.display")
    display.HTML, display.display = str, displayed.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    it = attribution(("first",), [2.0])
    it.show()
    assert displayed == ([it._repr_html_()] if in_notebook else [])
    assert ("first" in capsys.readouterr().out) is not in_notebook
