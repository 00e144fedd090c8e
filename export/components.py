"""Folders that hold one model as several graphs, as exports of vision-language models do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import onnx

from grains_ext.export.errors import GraphError
from grains_ext.export.reading import load_graph
from grains_ext.export.saving import copy_file

T = TypeVar("T")


def edit_components(
    folder: Path,
    output: Path | None,
    *,
    wanted: Callable[[onnx.ModelProto], bool],
    kind: str,
    edit: Callable[[Path, Path | None], T],
) -> dict[str, T]:
    """Edits every wanted graph of a folder, all of them or none.

    output: the folder to write, new, empty, or `folder` itself: then only its graphs change. None:
        `edit` is called without a target. Files that are not edited are copied to a new folder.
    wanted, kind: which graphs, and what they are called in an error.
    edit: called with a graph and where to write it.

    Returns what `edit` gave, by the graph's name. Raises GraphError where no graph is there, or is
    wanted, FileExistsError where `output` is another folder with files in it.
    """
    graphs = sorted(folder.glob("*.onnx"))
    chosen = [graph for graph in graphs if wanted(load_graph(graph))]
    if not graphs:
        raise GraphError(f"'{folder}' holds no ONNX graph{_hint(folder)}")
    if not chosen:
        names = ", ".join(graph.name for graph in graphs)
        raise GraphError(f"no graph in '{folder}' {kind}; its graphs are {names}")
    if output is None:
        return {graph.name: edit(graph, None) for graph in chosen}
    if output.is_dir() and output.samefile(folder):
        return _in_place(chosen, edit)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"'{output}' is there already; give a new folder, or '{folder}'")
    return _to_new_folder(folder, output, chosen, edit)


def _hint(folder: Path) -> str:
    """What a folder without graphs is likely to be, and what to do with it."""
    below = sorted({str(path.parent) for path in folder.glob("*/*.onnx")})
    if below:
        return f"; there are some in {', '.join(map(repr, below))}: give that folder"
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return ": it is a PyTorch model, which `grains export` (export_model) makes graphs of"
    return ": give a graph, or the folder of an export"


def _in_place(graphs: list[Path], edit: Callable[[Path, Path | None], T]) -> dict[str, T]:
    results = {}
    with ExitStack() as cleanup:
        edited = {graph: graph.with_name(f".{graph.name}.{uuid4().hex}.new") for graph in graphs}
        for graph, temporary in edited.items():
            cleanup.callback(temporary.unlink, missing_ok=True)
            results[graph.name] = edit(graph, temporary)
        for graph, temporary in edited.items():
            os.replace(temporary, graph)
    return results


def _to_new_folder(
    folder: Path, output: Path, graphs: list[Path], edit: Callable[[Path, Path | None], T]
) -> dict[str, T]:
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.{uuid4().hex}.tmp")
    work.mkdir()
    try:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file not in graphs:
                copy = work / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy_file(file, copy)
        results = {graph.name: edit(graph, work / graph.name) for graph in graphs}
        os.replace(work, output)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return results
