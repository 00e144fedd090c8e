"""grains refine: gradient steps on the directions."""

from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import lines, load_model
from grains_ext.cli.options import (
    Device,
    Dtype,
    Model,
    Neutral,
    OutputFolder,
    Pairs,
    SkipBad,
    Strength,
    TrustRemoteCode,
    Vectors,
)
from grains_ext.cli.output import quiet, say


@command()
def refine(
    model: Model,
    pairs: Pairs,
    vectors: Vectors,
    output: OutputFolder,
    dev: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS", exists=True, help="Other pairs, to stop early by."),
    ] = None,
    neutral: Neutral = None,
    strength: Strength = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the order of pairs and texts.")] = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Improve directions by a few dozen gradient steps; the model's weights stay as they are.

    Example: [bold]grains refine ./model pairs.jsonl truthful/ -o refined/ --dev dev.jsonl[/bold]
    """
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors
    from grains_ext.steering import refine as run

    neutral_texts = lines(neutral)
    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    dev_pairs = None if dev is None else load_pairs(dev, skip_bad=skip_bad)
    start = SteeringVectors.from_pretrained(vectors)
    if strength is not None:
        start = start.with_strength(strength)
    loaded_model, processor = load_model(model, dtype, device, trust_remote_code)
    refined = run(
        loaded_model,
        processor,
        loaded_pairs,
        start,
        dev_pairs=dev_pairs,
        neutral_texts=neutral_texts,
        steps=steps,
        seed=seed,
        progress=not quiet(),
    )
    refined.save_pretrained(output)
    say(f"{len(refined.directions)} directions: {output}")
