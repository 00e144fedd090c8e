"""Reads ONNX graphs without their external weights, and what is said of them beside."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from grains_ext.export.errors import GraphError

_LAYER_COUNTS = (
    ("genai_config.json", ("model", "decoder", "num_hidden_layers")),
    ("config.json", ("num_hidden_layers",)),
    ("config.json", ("text_config", "num_hidden_layers")),
    ("config.json", ("n_layer",)),
)
_LFS_POINTER = b"version https://git-lfs"


def load_graph(path: str | Path) -> onnx.ModelProto:
    """Reads an ONNX file, leaving external weights where they are.

    Raises FileNotFoundError, or GraphError where the file is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at '{path}'")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise GraphError(
                f"'{path}' is not an ONNX file but a Git LFS pointer to one: run `git lfs pull`"
            )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, or others on garbage
        raise GraphError(
            f"'{path}' is not an ONNX file, or is cut short ({path.stat().st_size} bytes): {error}"
        ) from error
    if not model.graph.node:
        raise GraphError(f"'{path}' is not an ONNX model: it holds no graph")
    return model


def blocks_in_config(folder: Path) -> int | None:
    """The number of decoder blocks by genai_config.json or config.json in `folder`, if told.

    Raises GraphError where such a file is not JSON.
    """
    for name, path in _LAYER_COUNTS:
        file = folder / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_bytes())
        except ValueError as error:
            raise GraphError(
                f"'{file}', which lies beside the graph, is no JSON: {error}"
            ) from error
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int):
            return value
    return None
