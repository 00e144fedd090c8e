"""What the demo prints: coloured tokens and tables, with rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grains_ext.report.html import Generation, MethodRow, shades

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution

# Okabe and Ito's blue and orange: told apart with every common colour blindness.
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
# Shades below this stay without colour: they would be noise on the screen.
_FAINT = 0.08


def banner(console: Console, n_parameters: int) -> None:
    text = (
        f"A Llama of {n_parameters / 1e6:.2f}M parameters holds beliefs about made-up things. Here "
        "a prompt states evidence against a belief, after one careful word and two of gossip, and "
        "the model answers from belief. After careful words alone it follows the evidence: it "
        "knows, and does not say. Steering changes no weight."
    )
    console.print(Panel(text, title="grains demo"), highlight=False)


def heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def legend() -> Text:
    """One line that names the two colours."""
    text = Text("toward the chosen answer: ")
    text.append(" blue ", style=_style(1.0)).append("   toward the rejected one: ")
    return text.append(" orange ", style=_style(-1.0))


def tokens(attribution: Attribution, n_strongest: int = 4) -> Group:
    """The prompt with each token's signed share as its background, and the strongest in numbers."""
    scores = [float(score) for score in attribution.scores]
    shaded = Text()
    for token, shade in zip(attribution.tokens, shades(scores), strict=True):
        shaded.append(token, style=_style(shade)).append(" ")
    strongest = sorted(range(len(scores)), key=lambda i: -abs(scores[i]))[:n_strongest]
    numbers = "  ".join(f"{attribution.tokens[i]} {scores[i]:+.2f}" for i in strongest)
    return Group(
        shaded,
        Text(
            f"  chosen {attribution.chosen}, rejected {attribution.rejected}; log-odds "
            f"{attribution.f_input:+.2f}; strongest: {numbers}",
            style="dim",
        ),
    )


def comparison(rows: Iterable[MethodRow]) -> Table:
    """The held-out table."""
    table = Table(title="held-out pairs: new entities, new cue words", title_justify="left")
    table.add_column("method")
    table.add_column("tuned to")
    table.add_column("accuracy, 95 % interval", justify="right")
    table.add_column("perplexity", justify="right")
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.name,
            row.settings,
            f"{100 * row.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{row.perplexity_ratio:.3f}x",
        )
    return table


def generations(texts: Iterable[Generation]) -> Table:
    table = Table(title="greedy continuations of held-out prompts", title_justify="left")
    for name in ("prompt", "evidence says", "unsteered", "steered"):
        table.add_column(name)
    for text in texts:
        # Text, not markup: a prompt may hold brackets.
        table.add_row(*map(Text, (text.prompt, text.chosen, text.before, text.after)))
    return table


def export_facts(exported: Mapping[str, Any]) -> dict[str, str]:
    """What the export measured, as names and values for a table."""
    parity = exported["parity"]
    facts = {
        "largest difference to torch": f"{parity['max_absolute_error']:.1e} in any logit, prefill "
        f"and {parity['steps']} cached steps",
        "steering operators in the session": ", ".join(
            f"{n} {op}" for op, n in parity["fused_nodes"].items()
        ),
    }
    for name, rate in exported["rates"].items():
        speed, ratio = rate["tokens_per_second"], rate["relative_to_unsteered"]
        facts[name] = (
            f"{speed['median']:.0f} tokens/s, {ratio['median']:.3f} of unsteered "
            f"({ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    return facts


def exported(measured: Mapping[str, Any]) -> Table:
    table = Table(title="median of the rounds, 10th to 90th percentile", title_justify="left")
    table.add_column("")
    table.add_column("measured")
    for name, value in export_facts(measured).items():
        table.add_row(name, Text(value))
    return table


def _style(shade: float) -> str:
    """Black on a tint of blue (positive) or orange (negative), for a shade in [-1, 1]."""
    if abs(shade) < _FAINT:
        return ""
    colour = BLUE if shade > 0 else ORANGE
    # Full blue under black text would be hard to read: the strongest tint stops at 70 %.
    weight = 0.15 + 0.55 * abs(shade)
    red, green, blue = (round(255 + weight * (channel - 255)) for channel in colour)
    return f"black on rgb({red},{green},{blue})"
