"""grains evaluate: held-out pairs before and after."""

import json
from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import lines, load_model
from grains_ext.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Neutral,
    Pairs,
    SkipBad,
    Strength,
    TrustRemoteCode,
    writable,
)
from grains_ext.cli.output import out, print_json, quiet
from grains_ext.files import write_text


@command()
def evaluate(
    model: Model,
    pairs: Pairs,
    vectors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VECTORS|NAME=VECTORS",
            help="A folder or hub id with vectors; again, with a name each, to compare several.",
        ),
    ] = None,
    strength: Strength = None,
    neutral: Neutral = None,
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            dir_okay=False,
            callback=writable,
            help="Also write the JSON, which 'grains report' shows.",
        ),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Also generate and compare.")
    ] = True,
    skip_bad: SkipBad = False,
    as_json: Json = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure accuracy and perplexity on held-out pairs, before and after steering.

    Example: [bold]grains evaluate ./model test.jsonl --vectors ours=a/ --vectors caa=b/[/bold]
    """
    if not vectors and strength is not None:
        raise typer.BadParameter("it needs --vectors", param_hint="--strength")

    from grains_ext.evaluation import evaluate as run
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors

    neutral_texts = lines(neutral)
    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded = {
        name: SteeringVectors.from_pretrained(source)
        for name, source in _named(vectors or []).items()
    }
    if strength is not None:
        loaded = {name: each.with_strength(strength) for name, each in loaded.items()}
    loaded_model, tokenizer = load_model(model, dtype, device, trust_remote_code)
    report = run(
        loaded_model,
        tokenizer,
        loaded_pairs,
        vectors=loaded,
        neutral_texts=neutral_texts,
        generate=generate,
        progress=not quiet(),
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(report.as_dict())
    else:
        out.print(report)


def _named(entries: list[str]) -> dict[str, str]:
    """["ours=a/", "caa=b/"] as {"ours": "a/", "caa": "b/"}; one alone needs no name."""
    if len(entries) == 1 and "=" not in entries[0]:
        return {"steered": entries[0]}
    named = {}
    for entry in entries:
        name, found, source = entry.partition("=")
        if not found or not name or name in named:
            raise typer.BadParameter(
                f"{entry!r}: of several, each needs a name of its own, as in ours=tuned/",
                param_hint="--vectors",
            )
        named[name] = source
    return named
