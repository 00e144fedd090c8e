"""grains convert: vectors between the files of different tools."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grains_ext.cli.app import command
from grains_ext.cli.options import parse_blocks, writable
from grains_ext.cli.output import say

_Format = Literal["grains", "gguf", "svec", "lm-eval", "steering-vectors"]


@command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="FROM", help="A file of another tool, or our folder or hub id.")
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="TO", callback=writable, help="The file, or our folder, to write."),
    ],
    read_as: Annotated[
        _Format | None, typer.Option("--from", help="By default told from the file's name.")
    ] = None,
    write_as: Annotated[
        _Format | None, typer.Option("--to", help="Needed for .pt, which two tools use.")
    ] = None,
    blocks: Annotated[
        Any,
        typer.Option(
            parser=parse_blocks,
            metavar="0,2-5",
            help="These of the blocks only; GGUF has no place for block 0.",
        ),
    ] = None,
    layer_shift: Annotated[
        int,
        typer.Option(help="Added to the layers of a GGUF file; -1 for llama.cpp's own generator."),
    ] = 0,
    model_type: Annotated[
        str | None, typer.Option(help="Of the model's config, where the vectors do not say.")
    ] = None,
) -> None:
    """Convert steering vectors: llama.cpp, repeng, EasySteer, IBM, lm-evaluation-harness.

    Example: [bold]grains convert truthful/ truthful.gguf --blocks 1-15[/bold]
    """
    import warnings

    from grains_ext.steering.formats import read_vectors, write_vectors

    vectors = read_vectors(source, read_as, **({"layer_shift": layer_shift} if layer_shift else {}))
    if blocks is not None:
        vectors = vectors.subset(blocks)
    output.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_vectors(
            vectors, output, write_as, **({"model_type": model_type} if model_type else {})
        )
    for warning in caught:
        say(f"warning: {warning.message}")
    say(f"{len(vectors.directions)} directions: {output}")
