"""An exported folder as a model of NVIDIA's Triton Inference Server (onnxruntime backend)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto

from grains_ext.export.folder import GRAPH_NAME, LIBRARY_NAME, replacing_folder, require_free
from grains_ext.export.reading import load_graph
from grains_ext.export.runtime import ort_library_path
from grains_ext.export.saving import external_files

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
}


def write_triton(
    folder: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    library: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `repository/name/`: config.pbtxt, and as version 1 the graph and the op library.

    The client feeds the caches back, as with onnxruntime; the first call gives them length 0.
    Triton feeds no inputs that have a default: the strength is the one in the graph.

    folder: made by `export_model`, or any folder with a steered model.onnx.
    name: the model's, also its folder's; by default that of `folder`.
    library: the op library's path on the serving machine, written to config.pbtxt; by default where
        it is written now. In a container: /models/NAME/1/libgrains_ort.so, where /models is the
        mounted repository.
    overwrite: replaces a model of this name.

    Returns the model's folder, which appears complete or not at all.
    """
    folder = Path(folder)
    source = folder / GRAPH_NAME
    name = folder.resolve().name if name is None else name
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise ValueError(f"name is {name!r}; expected letters, digits, '_', '-' and '.'")
    target = Path(repository) / name
    require_free(target, overwrite=overwrite)
    graph = load_graph(source)
    if library is None:
        library = str(target.resolve() / "1" / LIBRARY_NAME)
    with replacing_folder(target) as work:
        version = work / "1"
        version.mkdir()
        for location, file in external_files(graph, source).items():
            (version / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, version / location)
        shutil.copyfile(source, version / GRAPH_NAME)
        shutil.copyfile(_library(folder), version / LIBRARY_NAME)
        config = _config(graph.graph, name, library)
        (work / "config.pbtxt").write_text(config, encoding="utf-8")
    return target


def _library(folder: Path) -> Path:
    own = folder / LIBRARY_NAME
    return own if own.is_file() else Path(ort_library_path())


def _config(graph: onnx.GraphProto, name: str, library: str) -> str:
    defaults = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in defaults]
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        # Each tensor's own shape says its batch dimension: attention_mask and caches differ in
        # length from input_ids, and Triton must not join requests.
        "max_batch_size: 0",
        f"model_operations {{ op_library_filename: {_quoted(library)} }}",
        *_tensors("input", inputs),
        *_tensors("output", list(graph.output)),
    ]
    return "\n".join(lines) + "\n"


def _tensors(kind: str, values: list[onnx.ValueInfoProto]) -> list[str]:
    entries = []
    for value in values:
        tensor = value.type.tensor_type
        dims = ", ".join(str(dim.dim_value or -1) for dim in tensor.shape.dim)
        entries.append(
            f"  {{ name: {_quoted(value.name)} data_type: {_TYPES[tensor.elem_type]} "
            f"dims: [ {dims} ] }}"
        )
    return [f"{kind} [", ",\n".join(entries), "]"]


def _quoted(text: str) -> str:
    # A JSON string of ASCII is a string of protobuf's text format.
    return json.dumps(text)
