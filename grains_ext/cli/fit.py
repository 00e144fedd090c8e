"""grains fit: pairs to vectors."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import load_model
from grains_ext.cli.options import (
    Device,
    Dtype,
    Model,
    OutputFolder,
    Pairs,
    SkipBad,
    TrustRemoteCode,
    parse_blocks,
    parse_k,
    parse_modalities,
)
from grains_ext.cli.output import quiet, say


@command(
    on_interrupt="stopped: the pairs that are attributed are in {output}; run the same command "
    "again to go on"
)
def fit(
    model: Model,
    pairs: Pairs,
    output: OutputFolder,
    k: Annotated[
        Any,
        typer.Option(
            parser=parse_k, metavar="N|text=N,image=N", help="Tokens masked per sign and prompt."
        ),
    ] = "10",
    select: Annotated[
        Literal["count", "mass", "stable", "random", "absolute"],
        typer.Option(help="Which tokens: the k strongest, those that hold half of the scores, ..."),
    ] = "count",
    signs: Annotated[
        Literal["both", "positive", "negative"],
        typer.Option(help="What speaks for the chosen answer, against it, or both."),
    ] = "both",
    mask_with: Annotated[
        Literal["attention", "baseline", "bos", "mean", "pad", "unk", "mask", "zero"],
        typer.Option(help="How a token is masked: out of attention, or by another embedding."),
    ] = "attention",
    capture: Annotated[
        Literal["prompt", "continuation"], typer.Option(help="Where the shift is read.")
    ] = "prompt",
    method: Annotated[
        Literal["mean", "pca", "whitened"], typer.Option(help="How shifts become one direction.")
    ] = "mean",
    blocks: Annotated[
        Any,
        typer.Option(parser=parse_blocks, metavar="0,2-5", help="These blocks, not all."),
    ] = None,
    modalities: Annotated[
        Any, typer.Option(parser=parse_modalities, metavar="text,image", help="What may be masked.")
    ] = "text,image",
    baseline: Annotated[
        Literal["bos", "mean", "pad", "unk", "mask", "zero"],
        typer.Option(help="Of the attribution."),
    ] = "bos",
    image_baseline: Annotated[
        Literal["mean", "blur", "zero"], typer.Option(help="Of the attribution, for images.")
    ] = "mean",
    attributions: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The folder that 'grains attribute' wrote for these pairs.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --select random.")] = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn preference pairs into one steering direction per decoder block.

    Example: [bold]grains fit ./model pairs.jsonl -o truthful/ --k 10[/bold]
    """
    import shutil

    from grains_ext.attribution import attribute
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import FitSettings
    from grains_ext.steering import fit as run

    settings = FitSettings(
        k=k,
        select=select,
        signs=signs,
        mask_with=mask_with,
        capture=capture,
        method=method,
        blocks="all" if blocks is None else blocks,
        modalities=modalities,
        baseline=baseline,
        image_baseline=image_baseline,
        seed=seed,
    )
    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded_model, processor = load_model(model, dtype, device, trust_remote_code)
    computed = None
    if attributions is None and select not in ("random", "stable"):
        # On disk while the run lasts, so that one that is stopped goes on; it is removed then, and
        # must not be what somebody else put there.
        attributions = computed = output / ".attributions"
        attribute(
            loaded_model,
            processor,
            loaded_pairs,
            baseline=baseline,
            image_baseline=image_baseline,
            max_batch_tokens=settings.max_batch_tokens,
            output_dir=computed,
            progress=not quiet(),
        )
    vectors = run(
        loaded_model,
        processor,
        loaded_pairs,
        attributions=attributions,
        settings=settings,
        progress=not quiet(),
    )
    vectors.save_pretrained(output)
    if computed is not None:
        shutil.rmtree(computed)
    say(f"{len(vectors.directions)} directions: {output}")
