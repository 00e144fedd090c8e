"""The ``grains`` command. Each command is a thin caller of the Python function of the same name.

Heavy imports stay inside the commands, so that ``grains --help`` answers at once. Exit codes: 0,
1 for a failure, 2 for wrong use.
"""

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grains_ext.pairs import PreferencePair

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


# A page is for reading; the folder holds the rest.
_N_SHOWN = 50


def _load_model(
    name: str, dtype: str, device: str, trust_remote_code: bool
) -> "tuple[PreTrainedModel, Any]":
    """The model in eval mode, and its tokenizer, or its processor where it reads images."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION_LANGUAGE_MODELS,
    )

    from grains_ext.vision import load_processor

    with _err.status(f"loading {escape(name)}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        reads_images = config.model_type in VISION_LANGUAGE_MODELS
        auto_model = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
        load = load_processor if reads_images else AutoTokenizer.from_pretrained
        processor = load(name, trust_remote_code=trust_remote_code)
        model = auto_model.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    return model.to(device).eval(), processor


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _count_or_auto(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor 'auto'")
    return int(text)


def _span(text: str) -> tuple[int, int] | str:
    if text == "after_system":
        return text
    match = re.fullmatch(r"(-?\d+):(-?\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is neither A:B, two token positions, nor after_system")
    return int(match[1]), int(match[2])


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is not I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def _modalities(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {"text", "image"}:
        raise typer.BadParameter(f"{text!r} is not text, image or text,image")
    return names


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
    vision: Annotated[
        bool, typer.Option("--vision", help="A model with pictures: which patches, which words?")
    ] = False,
    as_json: Json = False,
) -> None:
    """Steer the embedded model from wrong to right, with held-out figures and a steered ONNX file.

    Example: [bold]grains demo -o demo-output[/bold]
    """
    console = _err if as_json else _out
    if vision:
        from grains_ext.demo.vision_run import run_vision_demo as run
    else:
        from grains_ext.demo.run import run_demo as run

    result = run(output, seed=seed, quick=quick, console=console)
    if as_json:
        _print_json(result)


@app.command()
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
        Path, typer.Option("--output", "-o", help="The folder that results stream to.")
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
        Any, typer.Option(parser=_count_or_auto, metavar="N|auto", help="Points on the path.")
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
            parser=_span,
            metavar="A:B|after_system",
            help="Attribute the prompt's tokens A to B - 1 only, negative from the end, or those "
            "after the system prompt.",
        ),
    ] = None,
    modalities: Annotated[
        Any,
        typer.Option(parser=_modalities, metavar="text,image", help="What to attribute."),
    ] = "text,image",
    image_baseline: Annotated[
        Literal["mean", "blur", "zero"], typer.Option(help="The path's other end for images.")
    ] = "mean",
    max_batch_tokens: Annotated[
        Any, typer.Option(parser=_count_or_auto, metavar="N|auto", help="Tokens in one forward.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seeds every random draw.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first pairs of the file only.")
    ] = None,
    shard: Annotated[
        Any,
        typer.Option(
            parser=_shard,
            metavar="I/N",
            help="Take the I-th of N shares; all may write to one folder.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help=f"Also write a page with the first {_N_SHOWN} pairs.")
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
    }
    try:
        from grains_ext import attribution

        if for_graph is not None:
            from grains_ext.export import AttributionGraph

            AttributionGraph(model).attribute(loaded_pairs, **for_graph, **for_both)
        else:
            loaded_model, processor = _load_model(model, dtype, device, trust_remote_code)
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
            _write_attribution_page(html, output, loaded_pairs, pairs.name, model, summary)
    except KeyboardInterrupt:
        _err.print(
            f"stopped: the pairs that are done are in {escape(str(output))}; run the same command "
            "again to go on",
            highlight=False,
        )
        raise typer.Exit(130) from None
    if as_json:
        _print_json(summary)
        return
    per_pair = summary["evaluations_per_pair"]
    _err.print(
        f"{summary['pairs']} pairs, {summary['not_converged']} not converged"
        + (f", {per_pair:.1f} evaluations each" if per_pair is not None else "")
        + f": {escape(str(output))}",
        highlight=False,
    )


def _for_graph(context: typer.Context) -> dict[str, Any]:
    """The options that a graph has defaults of its own for, where they are given.

    Raises BadParameter for options that only the torch engine takes.
    """
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }
    torch_only = ("top_k", "modalities", "image_baseline", "seed", "dtype", "device")
    for name in (*torch_only, "trust_remote_code"):
        if name in given:
            raise typer.BadParameter(
                "it has no meaning for a graph (.onnx): give the model's folder in place of it",
                param_hint="--" + name.replace("_", "-"),
            )
    return {name: context.params[name] for name in ("method", "baseline") if name in given}


def _write_attribution_page(
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
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL.onnx", help="A decoder's ONNX graph, or a folder of graphs."),
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
        Path | None, typer.Option("--output", "-o", help="The ONNX file, or folder, to write.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show what would be steered, and how.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the steering out again: the original graph.")
    ] = False,
    blocks: Annotated[
        str | None, typer.Option(metavar="0,2-5", help="Steer these of the vectors' blocks only.")
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="BLOCK=NAME", help="The tensor, or node, that ends this block."
        ),
    ] = None,
    strength: Strength = None,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="One op for add, steer and norm.")
    ] = True,
    baked: Annotated[
        bool, typer.Option("--baked", help="Constants instead of inputs with defaults.")
    ] = False,
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
        _err.print(f"unsteered: {escape(str(output))}")
        return
    if not vectors:
        raise typer.BadParameter("give the VECTORS to steer with, or --remove")
    loaded = [SteeringVectors.from_pretrained(name) for name in vectors]
    injected = run(
        model,
        loaded[0] if len(loaded) == 1 else loaded,
        output,
        blocks=None if blocks is None else _numbers(blocks),
        tensors=_mapping(tensors or []),
        strength=strength,
        fuse=fuse,
        baked=baked,
        default_index=None if require_index else default_index,
        dry_run=dry_run,
    )
    if as_json:
        _print_json([asdict(entry) for entry in injected])
    elif dry_run:
        table = Table("block", Column("tensor", overflow="fold"), "site", "steered by")
        for entry in injected:
            tensor = f"{entry.graph}: {entry.tensor}" if entry.graph else entry.tensor
            table.add_row(str(entry.block), escape(tensor), entry.site, entry.op_type)
        _out.print(table)
    if not dry_run:
        _err.print(f"steered: {escape(str(output))}, {len(injected)} blocks")


def _numbers(text: str) -> list[int]:
    """0,2-5 as [0, 2, 3, 4, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None:
            raise typer.BadParameter(f"--blocks is {text!r}; expected numbers as in 0,2-5")
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def _mapping(entries: list[str]) -> dict[int, str]:
    """["3=/add_7"] as {3: "/add_7"}."""
    tensors = {}
    for entry in entries:
        block, _, tensor = entry.partition("=")
        if not block.isdecimal() or not tensor:
            raise typer.BadParameter(f"--map is {entry!r}; expected BLOCK=NAME, as in 3=/add_7")
        tensors[int(block)] = tensor
    return tensors


@app.command()
def adapter(
    vectors: Annotated[
        list[str],
        typer.Argument(metavar="VECTORS...", help="As for the graph: one, or a bank of several."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .onnx_adapter file to write.")
    ],
    graph: Annotated[
        Path, typer.Option("--for", metavar="STEERED.onnx", help="The steered graph it is for.")
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
    _err.print(f"written: {escape(str(output))}")


@app.command()
def export(
    model: Model,
    vectors: Vectors,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
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
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="One op for add, steer and norm.")
    ] = True,
    baked: Annotated[
        bool, typer.Option("--baked", help="Constants instead of inputs with defaults.")
    ] = False,
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
    """
    from grains_ext.export import export_model, write_triton
    from grains_ext.steering import SteeringVectors

    loaded = SteeringVectors.from_pretrained(vectors)
    loaded_model, tokenizer = _load_model(model, dtype, device, trust_remote_code)
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
        _print_json(
            {
                "output": str(output),
                "parity": None if parity is None else asdict(parity),
                "triton": None if in_triton is None else str(in_triton),
            }
        )
        return
    _err.print(f"exported: {escape(str(output))}", highlight=False)
    if parity is not None:
        _err.print(
            f"largest difference from torch in any logit, over prefill and {parity.steps} cached "
            f"steps: {parity.max_absolute_error:.1e}, {parity.max_relative_error:.1e} of the "
            "largest logit",
            highlight=False,
        )
        if (quantized := parity.quantization) is not None:
            _err.print(
                f"{quantize} moves the logits by {quantized.weights.relative:.1e} of the largest "
                f"unsteered, {quantized.steered.relative:.1e} steered; at strength 0 the graph is "
                f"the unsteered {quantize} graph up to {quantized.strength_zero.relative:.1e}",
                highlight=False,
            )
    if in_triton is not None:
        _err.print(f"Triton: {escape(str(in_triton))}", highlight=False)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that 'grains export' wrote.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to go on from.")],
    strength: Annotated[
        float | None, typer.Option(help="Overrules the graph's strength; 0 switches steering off.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=1e-9, max=1.0, help="Draw from the likeliest, up to this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Write text with an exported folder, token by token: onnxruntime, no torch.

    Example: [bold]grains generate steered/ "What color is the sky?" --strength 2 --chat[/bold]
    """
    from grains_ext.export import TextGenerator

    generator = TextGenerator(folder, strength=strength)
    pieces = generator.stream(
        [{"role": "user", "content": prompt}] if chat else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    start = time.perf_counter()
    tokens, text = [], ""
    for token, piece in pieces:
        tokens.append(token)
        text += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
        return
    _print_json(
        {
            "prompt": prompt,
            "text": text,
            "tokens": tokens,
            "strength": strength,
            "finish": "stop" if tokens and generator.ends(tokens[-1]) else "length",
            "seconds": time.perf_counter() - start,
        }
    )


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
