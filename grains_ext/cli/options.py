"""The arguments and options that commands share, and the parsers of their values."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def writable(path: Path | None) -> Path | None:
    """Said before the work, not after it: a path that cannot be written."""
    if path is None:
        return None
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if there != path and not there.is_dir():
        raise typer.BadParameter(f"{path}: '{there}' is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: no permission in '{there}'")
    return path


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")]
Pairs = Annotated[
    Path,
    typer.Argument(
        metavar="PAIRS", exists=True, help="JSONL, CSV or Parquet with preference pairs."
    ),
]
Vectors = Annotated[
    str, typer.Argument(metavar="VECTORS", help="A folder or hub id with steering.safetensors.")
]
OutputFolder = Annotated[
    Path,
    typer.Option("--output", "-o", file_okay=False, callback=writable, help="The folder to write."),
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
Neutral = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="A text file, one neutral text a line, for perplexity."
    ),
]
Fuse = Annotated[bool, typer.Option("--fuse/--no-fuse", help="One op for add, steer and norm.")]
Baked = Annotated[bool, typer.Option("--baked", help="Constants instead of inputs with defaults.")]

# Values come as text from the command line, and as what the parser returned from a config file.


def parse_count(value: Any) -> int | Literal["auto"]:
    text = str(value)
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor 'auto'")
    return int(text)


def parse_span(value: Any) -> tuple[int, int] | str:
    """A:B, or after_system."""
    if value == "after_system":
        return "after_system"
    match = re.fullmatch(r"(-?\d+):(-?\d+)", _joined(value, ":"))
    if match is None:
        raise typer.BadParameter(f"{value!r} is neither A:B, two token positions, nor after_system")
    return int(match[1]), int(match[2])


def parse_shard(value: Any) -> tuple[int, int]:
    """I/N."""
    match = re.fullmatch(r"(\d+)/(\d+)", _joined(value, "/"))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{value!r} is not I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def parse_modalities(value: Any) -> tuple[str, ...]:
    names = tuple(_joined(value, ",").split(","))
    if not set(names) <= {"text", "image"}:
        raise typer.BadParameter(f"{value!r} is not text, image or text,image")
    return names


def parse_k(value: Any) -> int | dict[str, int]:
    """10, or text=4,image=6."""
    if isinstance(value, dict):
        value = ",".join(f"{name}={count}" for name, count in value.items())
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    parts = [part.partition("=") for part in str(value).split(",")]
    if not all(name in ("text", "image") and count.isdecimal() for name, _, count in parts):
        raise typer.BadParameter(f"{value!r} is neither a number from 1 nor e.g. text=4,image=6")
    return {name: int(count) for name, _, count in parts}


def parse_blocks(value: Any) -> list[int]:
    """0,2-5 as [0, 2, 3, 4, 5]."""
    numbers: list[int] = []
    for part in _joined(value, ",").split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span:
            raise typer.BadParameter(f"{value!r} is no list of blocks; expected e.g. 0,2-5")
        numbers.extend(span)
    return numbers


def _joined(value: Any, separator: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return separator.join(map(str, value))
    return str(value)
