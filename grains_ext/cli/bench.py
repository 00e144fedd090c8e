"""grains bench: what steering and attribution cost here."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from grains_ext.cli.app import command
from grains_ext.cli.loading import check_device, load_model
from grains_ext.cli.options import Device, Dtype, Json, TrustRemoteCode, writable
from grains_ext.cli.output import err, out, print_json

_PARTS = ("op", "decode", "attribution", "onnx")


def _parse_parts(value: Any) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else tuple(str(value).split(","))
    if not names or not set(names) <= set(_PARTS):
        raise typer.BadParameter(f"{value!r} is not of {','.join(_PARTS)}")
    return names


@command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder or hub id; else the embedded model."),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            metavar="VECTORS", help="Steer with these; else all blocks, in random directions."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS",
            exists=True,
            help="Attribute the first four of these, and decode the first one's prompt.",
        ),
    ] = None,
    parts: Annotated[
        Any,
        typer.Option(
            "--parts",
            parser=_parse_parts,
            metavar=",".join(_PARTS),
            help="What to time. onnx exports the model first: by default the embedded one only.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each candidate.")] = 9,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Per comparison; slow candidates take fewer turns.")
    ] = 6.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's default otherwise.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"), dir_okay=False, callback=writable, help="Also write the JSON."
        ),
    ] = None,
    as_json: Json = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what steering and attribution cost on this machine: in turns, beside a floor.

    Ratios are times over the baseline's in the same round, median [quartiles].

    Example: [bold]grains bench ./model --parts decode,attribution[/bold]
    """
    import torch

    from grains_ext import bench as benchmark
    from grains_ext.files import write_text
    from grains_ext.pairs import load_pairs
    from grains_ext.steering import SteeringVectors

    chosen = benchmark.PAIRS if pairs is None else load_pairs(pairs)[:4]
    steering = None if vectors is None else SteeringVectors.from_pretrained(vectors)
    if threads is not None:
        torch.set_num_threads(threads)
    if model is None:
        from grains_ext.demo import world
        from grains_ext.demo.run import load_model as load_embedded

        check_device(device)
        loaded, processor = load_embedded()
        loaded = loaded.to(device, None if dtype == "auto" else getattr(torch, dtype))
        chosen = world.test_pairs(0, 4) if pairs is None else chosen
        default = benchmark.installed_parts()
    else:
        loaded, processor = load_model(model, dtype, device, trust_remote_code)
        default = ("op", "decode", "attribution")
    with err.status("starting") as status:
        result = benchmark.bench(
            loaded,
            processor,
            vectors=steering,
            pairs=chosen,
            parts=parts or default,
            budget=benchmark.Budget(rounds, seconds),
            on_part=lambda name: status.update(f"timing: {name}"),
        )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(result, indent=1) + "\n")
    if as_json:
        print_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from grains_ext.timing import header

    model = result["model"]
    out.print(header(), highlight=False, markup=False)
    out.print(
        f"{model['name']}: {model['parameters'] / 1e6:.1f}M parameters, {model['blocks']} blocks, "
        f"{model['dtype']} on {model['device']}, {model['threads']} threads",
        highlight=False,
        markup=False,
    )
    for part in result["parts"]:
        table = Table("", "time", f"time / {part['baseline']}", title=part["title"])
        if part["unit"]:
            table.add_column(part["unit"])
        for each in part["measured"]:
            ratio = each["ratio"]
            row = [
                each["name"],
                _time(each["seconds"]["median"]),
                f"{ratio['median']:.2f} [{ratio['low']:.2f}-{ratio['high']:.2f}]",
            ]
            if part["unit"]:
                row.append(f"{part['per_second'][each['name']]:.3g}")
            table.add_row(*row)
        out.print(table)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
