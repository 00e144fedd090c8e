"""grains attribute: scores for each token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import load_model
from grains_ext.cli.options import (
    Device,
    Dtype,
    Json,
    Pairs,
    SkipBad,
    TrustRemoteCode,
    parse_count,
    parse_modalities,
    parse_shard,
    parse_span,
    writable,
)
from grains_ext.cli.output import print_json, quiet, say

if TYPE_CHECKING:
    from grains_ext.pairs import PreferencePair

# A page is for reading; the folder holds the rest.
_N_SHOWN = 50


@command(
    on_interrupt="stopped: the pairs that are done are in {output}; run the same command again to "
    "go on"
)
def attribute(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or hub id, or a graph (.onnx) by export_attribution.",
        ),
    ],
    pairs: Pairs,
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            file_okay=False,
            callback=writable,
            help="The folder that results stream to.",
        ),
    ],
    method: Annotated[
        Literal[
            "adaptive",
            "gausslegendre",
            "riemann_middle",
            "gradient_x_input",
            "smoothgrad",
            "occlusion",
        ],
        typer.Option(help="How scores are computed."),
    ] = "adaptive",
    baseline: Annotated[
        Literal["bos", "mean", "pad", "unk", "mask", "zero"],
        typer.Option(help="The path's other end."),
    ] = "bos",
    objective: Annotated[
        Literal["sum", "mean", "first", "chosen", "rejected"],
        typer.Option(
            help="log p(chosen) - log p(rejected): summed, per token, at the first token that "
            "differs; or one answer alone."
        ),
    ] = "sum",
    n_steps: Annotated[
        Any, typer.Option(parser=parse_count, metavar="N|auto", help="Points on the path.")
    ] = "auto",
    tolerance: Annotated[
        float, typer.Option(help="Completeness error, relative to the change of the objective.")
    ] = 0.05,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Stop once the set of the K strongest tokens is settled."),
    ] = None,
    attributed_span: Annotated[
        Any,
        typer.Option(
            parser=parse_span,
            metavar="A:B|after_system",
            help="Attribute the prompt's tokens A to B - 1 only, negative from the end, or those "
            "after the system prompt.",
        ),
    ] = None,
    modalities: Annotated[
        Any,
        typer.Option(parser=parse_modalities, metavar="text,image", help="What to attribute."),
    ] = "text,image",
    image_baseline: Annotated[
        Literal["mean", "blur", "zero"], typer.Option(help="The path's other end for images.")
    ] = "mean",
    max_batch_tokens: Annotated[
        Any, typer.Option(parser=parse_count, metavar="N|auto", help="Tokens in one forward.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seeds every random draw.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first pairs of the file only.")
    ] = None,
    shard: Annotated[
        Any,
        typer.Option(
            parser=parse_shard,
            metavar="I/N",
            help="Take the I-th of N shares; all may write to one folder.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            callback=writable,
            help=f"Also write a page with the first {_N_SHOWN} pairs.",
        ),
    ] = None,
    as_json: Json = False,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score each prompt token, and image patch, by how far it pushes the model toward an answer.

    Run again with the same settings, it goes on where it stopped.

    Example: [bold]grains attribute ./model pairs.jsonl -o results/ --html results.html[/bold]
    """
    from grains_ext.pairs import load_pairs

    for_graph = _for_graph(context) if model.endswith(".onnx") else None
    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    for_both = {
        "objective": objective,
        "n_steps": n_steps,
        "tolerance": tolerance,
        "attributed_span": attributed_span,
        "max_batch_tokens": max_batch_tokens,
        "output_dir": output,
        "limit": limit,
        "shard": shard,
        "progress": not quiet(),
    }
    from grains_ext import attribution

    if for_graph is not None:
        from grains_ext.export import AttributionGraph

        AttributionGraph(model).attribute(loaded_pairs, **for_graph, **for_both)
    else:
        loaded_model, processor = load_model(model, dtype, device, trust_remote_code)
        attribution.attribute(
            loaded_model,
            processor,
            loaded_pairs,
            method=method,
            baseline=baseline,
            top_k=top_k,
            modalities=modalities,
            image_baseline=image_baseline,
            seed=seed,
            **for_both,
        )
    summary = {"output": str(output), **attribution.summarize(output)}
    if html is not None:
        _write_page(html, output, loaded_pairs, pairs.name, model, summary)
    if as_json:
        print_json(summary)
        return
    per_pair = summary["evaluations_per_pair"]
    say(
        f"{summary['pairs']} pairs, {summary['not_converged']} not converged"
        + (f", {per_pair:.1f} evaluations each" if per_pair is not None else "")
        + f": {output}"
    )


def _for_graph(context: typer.Context) -> dict[str, Any]:
    """The options that a graph has defaults of its own for, where they are given.

    Raises BadParameter for options that only the torch engine takes.
    """
    torch_only = ("top_k", "modalities", "image_baseline", "seed", "dtype", "device")
    both = ("method", "baseline")
    given = {
        name
        for option in cast(list[Any], context.command.params)
        if (name := option.name) in (*both, *torch_only, "trust_remote_code")
        and (source := context.get_parameter_source(name)) is not None
        and source.name != "DEFAULT"
        # A config file names all options, most of them with their defaults.
        and not (
            source.name == "DEFAULT_MAP"
            and _as_text(context.params[name]) == _as_text(option.default)
        )
    }
    for name in (*torch_only, "trust_remote_code"):
        if name in given:
            raise typer.BadParameter(
                "it has no meaning for a graph (.onnx): give the model's folder in place of it",
                param_hint="--" + name.replace("_", "-"),
            )
    return {name: context.params[name] for name in both if name in given}


def _as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _write_page(
    path: Path,
    results: Path,
    pairs: "list[PreferencePair]",
    pairs_name: str,
    model: str,
    summary: dict[str, Any],
) -> None:
    """The first results by index, with the pictures of their pairs."""
    from grains_ext.attribution import iter_attributions, stored_indices
    from grains_ext.report import write_report

    shown = stored_indices(results)[:_N_SHOWN]
    found = dict(iter_attributions(results, shown))
    write_report(
        path,
        title=f"Attribution of {pairs_name} by {Path(model).name}",
        attributions=[found[index] for index in shown],
        images=[pairs[index].images if found[index].images else None for index in shown],
        metadata={"Results": {"pairs shown": f"the first {len(shown)}", **summary}},
    )
