"""The ``grains`` command. Each command is a thin caller of the Python function of the same name.

Heavy imports stay inside the commands, so that ``grains --help`` answers at once. Exit codes: 0,
1 for a failure, 2 for wrong use.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find what pushes a model toward an answer, steer it, and ship the steered model.",
)
# Tables and messages go to standard error under --json, so that standard output holds JSON alone.
_out = Console()
_err = Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")]
Pairs = Annotated[
    Path, typer.Argument(metavar="PAIRS", help="JSONL, CSV or Parquet with preference pairs.")
]
Vectors = Annotated[
    str, typer.Argument(metavar="VECTORS", help="A folder or hub id with steering.safetensors.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read; say how many.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Load the model's weights in this dtype."),
]
Device = Annotated[str, typer.Option(help="The torch device the model runs on.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Strength = Annotated[
    float | None, typer.Option(help="Overrules the strength stored with the vectors.")
]


def _load_model(
    name: str, dtype: str, device: str, trust_remote_code: bool
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _err.status(f"loading {escape(name)}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    return model.to(device).eval(), tokenizer


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the instruction set in use and which kernels would run.

    Example: [bold]grains info --json[/bold]
    """
    from rich.table import Table

    from grains_ext.info import collect

    facts = collect()
    if as_json:
        _print_json(facts)
        return
    table = Table("what", "is", title="grains_ext")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "not installed")
    for group in ("cpu", "cuda", "build"):
        for key, value in facts[group].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(f"{group} {key.replace('_', ' ')}", escape(text))
    table.add_row("onnxruntime library", escape(facts["onnxruntime_library"]))
    _out.print(table)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write everything to.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seeds the choice of pairs and every random draw.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pairs and trials.")] = False,
    as_json: Json = False,
) -> None:
    """Steer the embedded model from wrong to right, with held-out figures and a steered ONNX file.

    Example: [bold]grains demo -o demo-output[/bold]
    """
    from grains_ext.demo.run import run_demo

    result = run_demo(output, seed=seed, quick=quick, console=_err if as_json else _out)
    if as_json:
        _print_json(result)


@app.command()
def attribute(
    model: Model,
    pairs: Pairs,
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSON Lines file to write.")],
    baseline: Annotated[
        str, typer.Option(help="bos, mean, pad, mask, unk or zero: the path's other end.")
    ] = "bos",
    method: Annotated[
        Literal["gausslegendre", "riemann_middle"], typer.Option(help="The quadrature rule.")
    ] = "gausslegendre",
    n_steps: Annotated[str, typer.Option(help="A number of steps, or 'auto'.")] = "auto",
    tolerance: Annotated[
        float, typer.Option(help="Completeness error, relative to the change of the objective.")
    ] = 0.05,
    max_batch_tokens: Annotated[int, typer.Option(help="Padded tokens in one forward.")] = 4096,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score each prompt token by how far it pushes the model toward the chosen answer.

    Example: [bold]grains attribute ./model pairs.jsonl -o attributions.jsonl[/bold]
    """
    from grains_ext.attribution import attribute as run
    from grains_ext.files import write_text
    from grains_ext.pairs import load_pairs

    if n_steps != "auto" and not n_steps.isdecimal():
        raise typer.BadParameter(
            f"{n_steps!r} is neither a number nor 'auto'", param_hint="n-steps"
        )
    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded_model, tokenizer = _load_model(model, dtype, device, trust_remote_code)
    results = run(
        loaded_model,
        tokenizer,
        loaded_pairs,
        baseline=baseline,
        method=method,
        n_steps="auto" if n_steps == "auto" else int(n_steps),
        tolerance=tolerance,
        max_batch_tokens=max_batch_tokens,
    )
    lines = [json.dumps(result.to_dict(), ensure_ascii=False) + "\n" for result in results]
    write_text(output, "".join(lines))
    converged = sum(result.converged for result in results)
    _err.print(f"{len(results)} pairs, {converged} within tolerance: {escape(str(output))}")


@app.command()
def fit(
    model: Model,
    pairs: Pairs,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    k: Annotated[int, typer.Option(min=1, help="Tokens masked per sign.")] = 10,
    method: Annotated[Literal["mean", "pca"], typer.Option(help="How shifts become one.")] = "mean",
    baseline: Annotated[str, typer.Option(help="As in 'grains attribute'.")] = "bos",
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn preference pairs into one steering direction per decoder block.

    Example: [bold]grains fit ./model pairs.jsonl -o truthful/ --k 10[/bold]
    """
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import fit as run

    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded_model, tokenizer = _load_model(model, dtype, device, trust_remote_code)
    vectors = run(loaded_model, tokenizer, loaded_pairs, k=k, method=method, baseline=baseline)
    vectors.save_pretrained(output)
    _err.print(f"{len(vectors.directions)} directions: {escape(str(output))}")


@app.command()
def tune(
    model: Model,
    pairs: Pairs,
    vectors: Vectors,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    neutral: Annotated[
        Path | None, typer.Option(help="A text file, one neutral text a line, for perplexity.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float, typer.Option(min=1.0, help="Steered over unsteered perplexity, at most.")
    ] = 1.1,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose blocks and strength on pairs that were not used for fitting.

    Example: [bold]grains tune ./model dev.jsonl truthful/ -o tuned/ --neutral neutral.txt[/bold]
    """
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors
    from grains_ext.steering import tune as run

    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded_vectors = SteeringVectors.from_pretrained(vectors)
    loaded_model, tokenizer = _load_model(model, dtype, device, trust_remote_code)
    best = run(
        loaded_model,
        tokenizer,
        loaded_pairs,
        loaded_vectors,
        neutral_texts=_lines(neutral),
        max_perplexity_ratio=max_perplexity_ratio,
    )
    best.save_pretrained(output)
    blocks = ", ".join(map(str, sorted(best.directions)))
    _err.print(f"blocks {blocks}, strength {best.strength:g}: {escape(str(output))}")


@app.command()
def evaluate(
    model: Model,
    pairs: Pairs,
    vectors: Annotated[str | None, typer.Option(help="A folder or hub id with vectors.")] = None,
    strength: Strength = None,
    neutral: Annotated[
        Path | None, typer.Option(help="A text file, one neutral text a line, for perplexity.")
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

    Example: [bold]grains evaluate ./model test.jsonl --vectors tuned/ --json[/bold]
    """
    from grains_ext.evaluation import evaluate as run
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors

    loaded_pairs = load_pairs(pairs, skip_bad=skip_bad)
    loaded = SteeringVectors.from_pretrained(vectors) if vectors is not None else None
    if loaded is None and strength is not None:
        raise typer.BadParameter("--strength needs --vectors", param_hint="strength")
    if loaded is not None and strength is not None:
        loaded = loaded.with_strength(strength)
    loaded_model, tokenizer = _load_model(model, dtype, device, trust_remote_code)
    report = run(
        loaded_model,
        tokenizer,
        loaded_pairs,
        vectors=loaded,
        neutral_texts=_lines(neutral),
        generate=generate,
    )
    if as_json:
        _print_json(report.as_dict())
    else:
        _out.print(report)


@app.command()
def inject(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A decoder's ONNX graph.")],
    vectors: Vectors,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    strength: Strength = None,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="One op for add, steer and norm.")
    ] = True,
    baked: Annotated[
        bool, typer.Option("--baked", help="Constants instead of inputs with defaults.")
    ] = False,
) -> None:
    """Add steering to an ONNX graph that is already exported.

    Example: [bold]grains inject model.onnx truthful/ -o steered.onnx --strength 2[/bold]
    """
    from grains_ext.export import inject as run
    from grains_ext.steering import SteeringVectors

    loaded = SteeringVectors.from_pretrained(vectors)
    run(model, loaded, output, strength=strength, fuse=fuse, baked=baked)
    _err.print(f"steered: {escape(str(output))}")


@app.command()
def export(
    model: Model,
    vectors: Vectors,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    strength: Strength = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export a model to a steered ONNX graph with KV cache, verified against torch.

    Example: [bold]grains export ./model truthful/ -o steered/[/bold]
    """
    from grains_ext.export import export_model
    from grains_ext.steering import SteeringVectors

    loaded = SteeringVectors.from_pretrained(vectors)
    loaded_model, tokenizer = _load_model(model, "float32", device, trust_remote_code)
    export_model(loaded_model, tokenizer, loaded, output, strength=strength)
    _err.print(f"exported: {escape(str(output))}")


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    """Entry point: a user's mistake prints one message; GRAINS_DEBUG=1 shows the traceback."""
    try:
        app()
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("GRAINS_DEBUG"):
            raise
        _err.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
