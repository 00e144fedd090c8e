"""An exported folder as models of NVIDIA's Triton Inference Server (onnxruntime backend)."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import onnx
from onnx import TensorProto

from grains_ext.export.folder import (
    EMBEDDING_NAME,
    GRAPH_NAME,
    LIBRARY_NAME,
    README_NAME,
    VISION_NAME,
    replacing_folder,
    require_free,
)
from grains_ext.export.reading import load_graph
from grains_ext.export.runtime import ort_library_path
from grains_ext.export.saving import external_files

# What a model that reads images has before its decoder, in the order of the calls.
_COMPONENTS = (VISION_NAME, EMBEDDING_NAME)

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.BOOL: "TYPE_BOOL",
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

    Of a model that reads images, `repository/name_vision/` and `repository/name_embedding/` too,
    and a README.md in `name/` that says what goes from one to the next.

    The client feeds the caches back, as with onnxruntime; the first call gives them length 0.
    Triton feeds no inputs that have a default: the strength is the one in the graph.

    folder: made by `export_model`, or any folder with a steered model.onnx.
    name: the model's, also its folder's; by default that of `folder`.
    library: the op library's path on the serving machine, written to config.pbtxt; by default where
        it is written now. In a container: /models/NAME/1/libgrains_ort.so, where /models is the
        mounted repository.
    overwrite: replaces models of these names.

    Returns the folder of the model with the decoder. All folders appear complete or not at all.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise ValueError(f"name is {name!r}; expected letters, digits, '_', '-' and '.'")
    target = Path(repository) / name
    # The decoder last: it is there when what comes before it is.
    graphs = {
        Path(repository) / f"{name}_{Path(graph).stem}": folder / graph
        for graph in _COMPONENTS
        if (folder / graph).is_file()
    } | {target: folder / GRAPH_NAME}
    for written in graphs:
        require_free(written, overwrite=overwrite)
    loaded = {written: load_graph(graph) for written, graph in graphs.items()}
    if library is None:
        library = str(target.resolve() / "1" / LIBRARY_NAME)
    with ExitStack() as all_or_none:
        # They are moved into place in the reverse order, when all have been written.
        for written in reversed(graphs):
            work = all_or_none.enter_context(replacing_folder(written, overwrite=overwrite))
            _write(
                loaded[written], graphs[written], work, name=written.name,
                library=library if written == target else None,
            )  # fmt: skip
            if written == target:
                shutil.copyfile(_library(folder), work / "1" / LIBRARY_NAME)
                if len(graphs) == len(_COMPONENTS) + 1:
                    text = _readme({path.name: model.graph for path, model in loaded.items()})
                    (work / README_NAME).write_text(text, encoding="utf-8")
    return target


def _write(
    model: onnx.ModelProto, graph: Path, work: Path, *, name: str, library: str | None
) -> None:
    """config.pbtxt, and as version 1 the graph with its weights."""
    version = work / "1"
    version.mkdir()
    for location, file in external_files(model, graph).items():
        (version / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, version / location)
    shutil.copyfile(graph, version / GRAPH_NAME)
    (work / "config.pbtxt").write_text(_config(model.graph, name, library), encoding="utf-8")


def _library(folder: Path) -> Path:
    own = folder / LIBRARY_NAME
    return own if own.is_file() else Path(ort_library_path())


def _config(graph: onnx.GraphProto, name: str, library: str | None) -> str:
    operations = f"model_operations {{ op_library_filename: {_quoted(library or '')} }}"
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        # Each tensor's own shape says its batch dimension: attention_mask and caches differ in
        # length from input_ids, and Triton must not join requests.
        "max_batch_size: 0",
        *([] if library is None else [operations]),
        *_tensors("input", _fed(graph)),
        *_tensors("output", list(graph.output)),
    ]
    return "\n".join(lines) + "\n"


def _fed(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that have no default."""
    defaults = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in defaults]


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


_README = """\
# {decoder} in Triton

The client calls these models one after the other. An output is the next one's input of that name.

| model | inputs | outputs |
| --- | --- | --- |
{rows}

1. `{vision}`, once for a prompt with images: its inputs are what the model's processor makes of
   them.
2. `{embedding}`: the token ids, with as many image tokens as there are features, and the features
   in their order, row by row. At prompts of text, and at every later token, they have length 0.
3. `{decoder}`: {fed}
4. The next token is chosen from the last row of `logits`, and goes to step 2.
"""

_FED = {
    "attention_mask": "is 1 at each token so far and 0 at padding, which is on the left.",
    "position_ids": "number each row's tokens from 0, padding left out.",
    "token_type_ids": "are 1 at image tokens, over all tokens so far.",
}
_GRID_POSITIONS = (
    "are each token's time, height and width, as transformers' `get_rope_index` counts them for "
    "this model; those of later tokens go on from the largest."
)
_CACHE = (
    "The `present.*` of one call are the `past_key_values.*` of the next; at the first, those have "
    "length 0."
)


def _readme(graphs: dict[str, onnx.GraphProto]) -> str:
    """How the models connect. graphs: by the models' names, in the order of their calls."""
    [vision, embedding, decoder] = graphs
    fed = []
    for value in graphs[decoder].input:
        if (meaning := _FED.get(value.name)) is not None:
            on_axes = value.name == "position_ids" and len(value.type.tensor_type.shape.dim) == 3
            fed.append(f"`{value.name}` {_GRID_POSITIONS if on_axes else meaning}")
    rows = [
        f"| `{name}` | {_listed(_fed(graph))} | {_listed(list(graph.output))} |"
        for name, graph in graphs.items()
    ]
    return _README.format(
        vision=vision,
        embedding=embedding,
        decoder=decoder,
        rows="\n".join(rows),
        fed=" ".join([*fed, _CACHE]),
    )


def _listed(values: list[onnx.ValueInfoProto]) -> str:
    """The tensors with their shapes; the caches of all blocks as one."""
    texts = []
    for value in values:
        sizes = (dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        name = re.sub(r"\.\d+\.(key|value)$", ".*", value.name)
        texts.append(f"`{name}` [{', '.join(sizes)}]")
    return ", ".join(dict.fromkeys(texts))
