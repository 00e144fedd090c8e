"""grains export: a folder that runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import load_model
from grains_ext.cli.options import (
    Baked,
    Device,
    Fuse,
    Json,
    Model,
    Strength,
    TrustRemoteCode,
    writable,
)
from grains_ext.cli.output import print_json, say


@command()
def export(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            callback=writable,
            help="The folder to write; with --attribution the .onnx file.",
        ),
    ],
    vectors: Annotated[
        str | None,
        typer.Argument(
            metavar="VECTORS", help="A folder or hub id with steering.safetensors, to steer with."
        ),
    ] = None,
    attribution: Annotated[
        bool,
        typer.Option(
            "--attribution",
            help="Write one graph that scores tokens, in place of a steered model: what 'grains "
            "attribute' runs with no torch.",
        ),
    ] = False,
    baseline: Annotated[
        Literal["bos", "mean", "pad", "unk", "mask", "zero"],
        typer.Option(help="--attribution: the path's other end, where a run names none."),
    ] = "bos",
    method: Annotated[
        Literal["gausslegendre", "riemann_middle"],
        typer.Option(help="--attribution: the rule, where a run names none."),
    ] = "gausslegendre",
    n_steps: Annotated[
        int, typer.Option(min=1, help="--attribution: points on the path, where a run names none.")
    ] = 50,
    strength: Strength = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="The graph's float type.")
    ] = "float32",
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Weights of matrix multiplications; the steering stays float."),
    ] = None,
    runtime: Annotated[
        Literal["ort", "genai"],
        typer.Option(help="genai: also run the folder in onnxruntime-genai, and compare."),
    ] = "ort",
    fuse: Fuse = True,
    baked: Baked = False,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="REPOSITORY", help="Also write a model of NVIDIA Triton to it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder, with all that it holds.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with the steered torch model.")
    ] = True,
    as_json: Json = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export a model to a folder that runs: steered ONNX with KV cache, verified against torch.

    Example: [bold]grains export ./model truthful/ -o steered/ --quantize int4[/bold]

    Example: [bold]grains export ./model --attribution -o attribution.onnx[/bold]
    """
    _check_use(context)
    if attribution:
        from grains_ext.export import export_attribution

        loaded_model, tokenizer = load_model(model, "float32", device, trust_remote_code)
        export_attribution(
            loaded_model,
            tokenizer,
            output,
            baseline=baseline,
            method=method,
            n_steps=n_steps,
            verify=verify,
        )
        if as_json:
            print_json({"output": str(output), "verified": verify})
        else:
            say(f"exported: {output}")
        return
    assert vectors is not None
    from grains_ext.export import export_model, write_triton
    from grains_ext.steering import SteeringVectors

    loaded = SteeringVectors.from_pretrained(vectors)
    loaded_model, tokenizer = load_model(model, dtype, device, trust_remote_code)
    parity = export_model(
        loaded_model,
        tokenizer,
        loaded,
        output,
        strength=strength,
        quantize=quantize,
        runtime=runtime,
        fuse=fuse,
        baked=baked,
        overwrite=overwrite,
        verify=verify,
    )
    in_triton = None if triton is None else write_triton(output, triton, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "output": str(output),
                "parity": None if parity is None else asdict(parity),
                "triton": None if in_triton is None else str(in_triton),
            }
        )
        return
    say(f"exported: {output}")
    if parity is not None:
        say(
            f"largest difference from torch in any logit, over prefill and {parity.steps} cached "
            f"steps: {parity.max_absolute_error:.1e}, {parity.max_relative_error:.1e} of the "
            "largest logit"
        )
        if (quantized := parity.quantization) is not None:
            say(
                f"{quantize} moves the logits by {quantized.weights.relative:.1e} of the largest "
                f"unsteered, {quantized.steered.relative:.1e} steered; at strength 0 the graph is "
                f"the unsteered {quantize} graph up to {quantized.strength_zero.relative:.1e}"
            )
    if in_triton is not None:
        say(f"Triton: {in_triton}")


def _check_use(context: typer.Context) -> None:
    """Raises BadParameter for what belongs to the other kind of export."""
    given = {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    }
    if context.params["attribution"]:
        if context.params["vectors"] is not None:
            raise typer.BadParameter("--attribution scores tokens, and takes no VECTORS")
        if context.params["output"].is_dir():
            raise typer.BadParameter("with --attribution it is a file", param_hint="--output")
        other: tuple[str, ...] = (
            "strength",
            "dtype",
            "quantize",
            "runtime",
            "fuse",
            "baked",
            "triton",
            "overwrite",
        )
        why = "it is for steered models: leave out --attribution"
    else:
        if context.params["vectors"] is None:
            raise typer.BadParameter("give the VECTORS to steer with, or --attribution")
        if context.params["output"].is_file():
            raise typer.BadParameter("it is a file, not a folder", param_hint="--output")
        other = ("baseline", "method", "n_steps")
        why = "it is for --attribution"
    for name in other:
        if name in given:
            raise typer.BadParameter(why, param_hint=given[name])
