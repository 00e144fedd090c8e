"""grains report: runs as a page."""

from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.options import Json, writable
from grains_ext.cli.output import err, print_json, say


@command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            exists=True,
            help="Folders and files that commands wrote, or folders that hold such folders.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"), dir_okay=False, callback=writable, help="The page to write."
        ),
    ] = Path("report.html"),
    title: Annotated[
        str | None, typer.Option(help="Of the page; by default the runs' names.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS",
            exists=True,
            help="The file of pairs that was attributed, for its pictures.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Pairs to show of each attribution and evaluation.")
    ] = 2000,
    as_json: Json = False,
) -> None:
    """Make one page of what was attributed, fitted, tuned, evaluated and exported.

    It needs no network to be read, and is searched, filtered and printed in a browser.

    Example: [bold]grains report results/ tuned/ evaluation.json -o report.html[/bold]
    """
    from grains_ext.pairs import load_pairs
    from grains_ext.report import report as run

    with err.status("reading the runs"):
        parts = run(
            runs,
            output,
            title=title,
            pairs=None if pairs is None else load_pairs(pairs),
            limit=limit,
        )
    shown = parts.counts()
    size = output.stat().st_size
    if as_json:
        print_json({"output": str(output), "bytes": size, "shows": shown})
        return
    if pairs is None and any(
        each.images for part in parts.attributed for each in part.attributions
    ):
        say("pictures are not in the results: give the file of pairs with --pairs to show them")
    said = ", ".join(f"{name} {count}" for name, count in shown.items())
    say(f"{said}; {size / 1e6:.1f} MB: {output}")
