"""grains gate: vectors that leave other prompts alone."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import lines, load_model
from grains_ext.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    OutputFolder,
    Pairs,
    SkipBad,
    TrustRemoteCode,
    Vectors,
)
from grains_ext.cli.output import print_json, say


@command()
def gate(
    model: Model,
    pairs: Pairs,
    vectors: Vectors,
    output: OutputFolder,
    outside: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Prompts to leave alone: a text file with one a line (.txt), or pairs, whose "
            "prompts and images count. May be given several times.",
        ),
    ],
    block: Annotated[
        int | None,
        typer.Option(min=0, help="Whose output is read; the first that is steered unless given."),
    ] = None,
    kind: Annotated[
        Literal["cosine", "probe"],
        typer.Option(help="By the difference of the means, or a logistic probe."),
    ] = "cosine",
    when: Annotated[
        Literal["prompt", "any", "token"],
        typer.Option(help="Decided at a prompt's end, by any of its tokens, or token by token."),
    ] = "prompt",
    false_positive_rate: Annotated[
        float, typer.Option(help="Of prompts to leave alone, those that may be steered.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves.")] = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit a condition on an early block, so that only prompts like those of the pairs are steered.

    Example: [bold]grains gate ./model pairs.jsonl tuned/ -o gated/ --outside other.txt[/bold]
    """
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors, fit_gate

    inside = load_pairs(pairs, skip_bad=skip_bad)
    others: list[Any] = []
    for path in outside:
        plain = path.suffix.lower() == ".txt"
        others += (lines(path) or []) if plain else load_pairs(path, skip_bad=skip_bad)
    ungated = SteeringVectors.from_pretrained(vectors)
    first = ungated.blocks[0]
    if block is not None and block > first:
        raise typer.BadParameter(
            f"{block} is after block {first}, which is steered: take {first} or an earlier one",
            param_hint="--block",
        )
    loaded_model, processor = load_model(model, dtype, device, trust_remote_code)
    fitted = fit_gate(
        loaded_model,
        processor,
        inside,
        others,
        block=first if block is None else block,
        kind=kind,
        when=when,
        false_positive_rate=false_positive_rate,
        seed=seed,
    )
    ungated.with_gate(fitted).save_pretrained(output)
    if as_json:
        print_json({"block": fitted.block, "kind": kind, "when": when, **fitted.metadata})
    inside_open, outside_open = (
        f"{fitted.metadata[f'held_out_{name}_open']:.0%}" for name in ("inside", "outside")
    )
    say(
        f"a gate at block {fitted.block}, open for {inside_open} of the pairs' prompts that were "
        f"held out and {outside_open} of the others: {output}"
    )
