"""grains inject: steering into an ONNX graph."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from grains_ext.cli.app import command
from grains_ext.cli.options import (
    Baked,
    Fuse,
    Json,
    Strength,
    parse_blocks,
    writable,
)
from grains_ext.cli.output import out, print_json, say


@command()
def inject(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx",
            exists=True,
            help="A decoder's ONNX graph, or a folder of graphs.",
        ),
    ],
    vectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VECTORS...",
            help="Folder or hub id with steering.safetensors; several make a bank to choose from "
            "by the input grains.index.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"), callback=writable, help="The ONNX file, or folder, to write."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show what would be steered, and how.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the steering out again: the original graph.")
    ] = False,
    blocks: Annotated[
        Any,
        typer.Option(
            parser=parse_blocks, metavar="0,2-5", help="Steer these of the vectors' blocks only."
        ),
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="BLOCK=NAME", help="The tensor, or node, that ends this block."
        ),
    ] = None,
    strength: Strength = None,
    fuse: Fuse = True,
    baked: Baked = False,
    default_index: Annotated[
        int, typer.Option(help="Bank: which vectors steer a row where no grains.index is fed.")
    ] = 0,
    require_index: Annotated[
        bool, typer.Option("--require-index", help="Bank: grains.index has no default.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add steering to an ONNX graph that is already exported, or replace it, or take it out.

    Example: [bold]grains inject model.onnx truthful/ -o steered.onnx --strength 2[/bold]
    """
    from grains_ext.export import inject as run
    from grains_ext.export import remove_steering
    from grains_ext.steering import SteeringVectors

    if output is None and not dry_run:
        raise typer.BadParameter("give the file to write: -o steered.onnx, or --dry-run")
    if remove:
        if vectors or dry_run:
            raise typer.BadParameter("--remove takes no VECTORS and no --dry-run")
        assert output is not None
        remove_steering(model, output)
        say(f"unsteered: {output}")
        return
    if not vectors:
        raise typer.BadParameter("give the VECTORS to steer with, or --remove")
    loaded = [SteeringVectors.from_pretrained(name) for name in vectors]
    injected = run(
        model,
        loaded[0] if len(loaded) == 1 else loaded,
        output,
        blocks=blocks,
        tensors=_mapping(tensors or []),
        strength=strength,
        fuse=fuse,
        baked=baked,
        default_index=None if require_index else default_index,
        dry_run=dry_run,
    )
    if as_json:
        print_json([asdict(entry) for entry in injected])
    elif dry_run:
        table = Table("block", Column("tensor", overflow="fold"), "site", "steered by")
        for entry in injected:
            tensor = f"{entry.graph}: {entry.tensor}" if entry.graph else entry.tensor
            table.add_row(str(entry.block), escape(tensor), entry.site, entry.op_type)
        out.print(table)
    if not dry_run:
        say(f"steered: {output}, {len(injected)} blocks")


def _mapping(entries: list[str]) -> dict[int, str]:
    """["3=/add_7"] as {3: "/add_7"}."""
    tensors = {}
    for entry in entries:
        block, _, tensor = entry.partition("=")
        if not block.isdecimal() or not tensor:
            raise typer.BadParameter(f"--map is {entry!r}; expected BLOCK=NAME, as in 3=/add_7")
        tensors[int(block)] = tensor
    return tensors
