"""grains demo: the embedded models."""

from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.options import Json, writable
from grains_ext.cli.output import err, out, print_json


@command(on_interrupt="stopped; {output} is as it was before")
def demo(
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            file_okay=False,
            callback=writable,
            help="The folder to write everything to.",
        ),
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seeds the choice of pairs and every random draw.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pairs and trials.")] = False,
    vision: Annotated[
        bool, typer.Option("--vision", help="A model with pictures: which patches, which words?")
    ] = False,
    as_json: Json = False,
) -> None:
    """Steer the embedded model from wrong to right, with held-out figures and a steered ONNX file.

    Example: [bold]grains demo -o demo-output[/bold]
    """
    console = err if as_json else out
    if vision:
        from grains_ext.demo.vision_run import run_vision_demo as run
    else:
        from grains_ext.demo.run import run_demo as run

    result = run(output, seed=seed, quick=quick, console=console)
    if as_json:
        print_json(result)
