"""The result file of `benchmarks.onnx`, which grows with what is measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grains_ext.timing import environment, write_json

BENCHMARK = "onnx"


def add(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``rows`` to the file, in the place of earlier ones of the same cases.

    Args:
        path: a new file, or one with results of the same machine and the same versions.
        rows: what was measured (see `facts_of`) and ``result``, a Measurement.

    Raises:
        ValueError: the file was measured elsewhere, or with other versions.
    """
    kept: list[dict[str, Any]] = []
    if path.exists():
        document = json.loads(path.read_text())
        if _place(document["environment"]) != _place(environment()):
            raise ValueError(
                f"{path} was measured on another machine or with other versions, and one file "
                "holds one machine's results: remove it, or give another --output"
            )
        new = [facts_of(row) for row in rows]
        kept = [row for row in document["rows"] if facts_of(row) not in new]
    write_json(path, BENCHMARK, [*kept, *rows])


def facts_of(row: dict[str, Any]) -> dict[str, Any]:
    """All of a row but its result: threads, sizes, the model and so on."""
    return {name: value for name, value in row.items() if name != "result"}


def _place(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "load_average"}
