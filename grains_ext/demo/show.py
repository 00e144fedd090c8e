"""What the demo prints, with rich: its words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grains_ext.report import Generation, MethodRow


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
