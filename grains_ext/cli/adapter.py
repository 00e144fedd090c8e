"""grains adapter: vectors as an .onnx_adapter file."""

from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.options import Strength, writable
from grains_ext.cli.output import say


@command()
def adapter(
    vectors: Annotated[
        list[str],
        typer.Argument(metavar="VECTORS...", help="As for the graph: one, or a bank of several."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            dir_okay=False,
            callback=writable,
            help="The .onnx_adapter file to write.",
        ),
    ],
    graph: Annotated[
        Path,
        typer.Option(
            "--for",
            metavar="STEERED.onnx",
            exists=True,
            dir_okay=False,
            help="The steered graph it is for.",
        ),
    ],
    strength: Strength = None,
) -> None:
    """Write vectors as an .onnx_adapter file, which switches the steering of a graph run by run.

    Example: [bold]grains adapter truthful/ --for steered.onnx -o truthful.onnx_adapter[/bold]
    """
    from grains_ext.export import write_adapter
    from grains_ext.steering import SteeringVectors

    loaded = [SteeringVectors.from_pretrained(name) for name in vectors]
    write_adapter(
        loaded[0] if len(loaded) == 1 else loaded, output, model_path=graph, strength=strength
    )
    say(f"written: {output}")
