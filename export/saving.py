"""Writes an edited ONNX graph: checked, at once, its external weights not rewritten."""

from __future__ import annotations

import filecmp
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from grains_ext.export.locate import GraphError
from grains_ext.files import replacing


def save_graph(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Writes `model`, an edited copy of the file `source`, to `target`, which may be `source`.

    External weights are shared in one folder, and copied where `target` lies in another one: onnx
    refuses to load weights that are hard or symbolic links.

    Raises onnx.checker.ValidationError where the edit broke the graph, FileExistsError where
    other weights lie in the place of the linked ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _place_external_data(model, source.parent, target.parent)
    with replacing(target) as temporary:
        _check(model, temporary, source)
        onnx.save(model, str(temporary))


def _check(model: onnx.ModelProto, temporary: Path, source: Path) -> None:
    """onnx.checker, on a file: larger graphs do not pass in memory, and weights are looked up."""
    # onnxruntime keeps this operator in the standard domain, where the checker does not know it.
    foreign = [
        node
        for node in model.graph.node
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain
    ]
    for node in foreign:
        node.domain = "com.microsoft"
    try:
        onnx.save(model, str(temporary))
        onnx.checker.check_model(str(temporary))
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(str(source))
        except onnx.checker.ValidationError:
            # Not our edit's fault, and onnxruntime is less strict.
            warnings.warn(f"onnx.checker refuses '{source}' already: {error}", stacklevel=4)
        else:
            raise
    finally:
        for node in foreign:
            node.domain = ""


def _place_external_data(model: onnx.ModelProto, source: Path, target: Path) -> None:
    locations = {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(locations):
        origin, copy = source / location, target / location
        # By its name: in the hub's cache each file is a link to elsewhere, and that is right.
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise GraphError(f"the graph's weights file '{location}' lies outside its folder")
        if not origin.is_file():
            raise FileNotFoundError(f"the graph's weights file '{origin}' is missing")
        if copy.exists():
            if copy.samefile(origin) or filecmp.cmp(copy, origin, shallow=False):
                continue
            raise FileExistsError(
                f"'{copy}' holds other weights; choose another output folder, or remove it"
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as temporary:
            shutil.copyfile(origin, temporary)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)
