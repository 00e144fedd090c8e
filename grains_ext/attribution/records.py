"""Attributions as named arrays and lines of JSON: what a saved file and a store's parts hold.

Numbers are read back from the arrays, bit for bit. The lines repeat them for people and other
programs; text, and which tokens belong to which image, are read from the lines. docs/formats.md
describes both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from grains_ext.attribution.result import Attribution
from grains_ext.files import replacing

if TYPE_CHECKING:
    from grains_ext.vision.grid import ImageGrid

Arrays = dict[str, npt.NDArray[Any]]
Lines = Sequence[str | bytes]

_METADATA = {"format": "grains.attribution", "version": "1"}
_LINE = "line"
"""The metadata entry of a saved file that holds its line."""

# N pairs, T tokens and B patches in all; one pair's tokens and patches follow the other's.
_PER_PAIR = {
    "index": np.int64,
    "n_tokens": np.int64,
    "f_input": np.float64,
    "f_baseline": np.float64,
    "residual": np.float64,
    "evaluations": np.int64,
    "n_steps": np.int64,
    "converged": np.bool_,
}
_PER_TOKEN = {"token_ids": np.int64, "scores": np.float32}
_BOXES = "boxes"
_TEXT = ("method", "baseline", "objective", "prompt", "chosen", "rejected")


def save(attribution: Attribution, path: Path) -> None:
    """One attribution as one file: the arrays of one pair, its line in the metadata."""
    arrays, [line] = pack([(0, attribution)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes(arrays, {**_METADATA, _LINE: line}))


def load(path: Path) -> Attribution:
    """What `save` wrote. Raises FileNotFoundError, or ValueError naming the file."""
    arrays, metadata = read_arrays(path)
    if _LINE not in metadata:
        raise ValueError(
            f"{path} is a part of a directory of results: read the directory, not this file"
        )
    try:
        [(_, attribution)] = unpack(arrays, [metadata[_LINE]])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return attribution


def part_bytes(arrays: Arrays) -> bytes:
    """A part's safetensors file."""
    return to_bytes(arrays, _METADATA)


def read_arrays(path: Path, names: Sequence[str] | None = None) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a file (those of ``names`` only, where given) and its metadata.

    Raises FileNotFoundError, or ValueError where it is not one of ours, or not a file at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of attributions at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            stored = file.keys()
            arrays = {name: file.get_tensor(name) for name in names or stored if name in stored}
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        # safetensors raises the middle two for element types that numpy lacks.
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    found = {name: metadata.get(name) for name in _METADATA}
    if found != _METADATA:
        raise ValueError(
            f"{path} does not hold attributions of this version: expected {_METADATA} in its "
            f"metadata, got {found}"
        )
    try:
        for name in names or ():
            _column(arrays, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return arrays, metadata


def pack(items: Sequence[tuple[int, Attribution]]) -> tuple[Arrays, list[str]]:
    """The arrays of some pairs, each given with its index, and one line of JSON for each."""
    each = [attribution for _, attribution in items]
    counts = {
        "index": [index for index, _ in items],
        "n_tokens": [len(attribution.tokens) for attribution in each],
    }
    arrays: Arrays = {
        name: np.array(counts[name] if name in counts else [getattr(a, name) for a in each], dtype)
        for name, dtype in _PER_PAIR.items()
    }
    for name, dtype in _PER_TOKEN.items():
        arrays[name] = np.concatenate(
            [np.empty(0, dtype), *(np.asarray(getattr(a, name), dtype) for a in each)]
        )
    boxes = [image.boxes for attribution in each for image in attribution.images]
    arrays[_BOXES] = np.concatenate([np.empty((0, 4)), *boxes], dtype=np.float32)
    return arrays, [_line(index, attribution) for index, attribution in items]


def unpack(arrays: Arrays, lines: Lines) -> list[tuple[int, Attribution]]:
    """(index, attribution) of each pair. Raises ValueError, without the file's name."""
    columns = {name: _column(arrays, name) for name in (*_PER_PAIR, *_PER_TOKEN, _BOXES)}
    n_pairs = len(lines)
    for name in _PER_PAIR:
        if len(columns[name]) != n_pairs:
            raise ValueError(f"`{name}` has {len(columns[name])} entries for {n_pairs} lines")
    token_slices = _slices(columns["n_tokens"].tolist())
    n_tokens = token_slices[-1].stop if token_slices else 0
    for name in _PER_TOKEN:
        if len(columns[name]) != n_tokens:
            raise ValueError(f"`{name}` has {len(columns[name])} entries for {n_tokens} tokens")
    boxes = _Boxes(columns[_BOXES])
    pairs = []
    for row, (line, here) in enumerate(zip(lines, token_slices, strict=True)):
        numbers = {name: columns[name][row].item() for name in _PER_PAIR}
        try:
            pairs.append((numbers["index"], _attribution(line, numbers, columns, here, boxes)))
        except ValueError as error:
            raise ValueError(f"line {row + 1}: {error}") from error
    boxes.check_used_up()
    return pairs


# --- writing --------------------------------------------------------------------------------------


def _line(index: int, attribution: Attribution) -> str:
    fields = {"index": index, **attribution.to_dict()}
    fields["scores"] = [_finite(score) for score in fields["scores"]]
    for name in ("f_input", "f_baseline", "residual"):
        fields[name] = _finite(float(fields[name]))
    for image in fields["images"]:
        del image["boxes"]
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: null stands for them, the arrays tell them apart."""
    return value if math.isfinite(value) else None


# --- reading --------------------------------------------------------------------------------------


def _column(arrays: Arrays, name: str) -> npt.NDArray[Any]:
    if name not in arrays:
        raise ValueError(f"it lacks the array `{name}`")
    array = arrays[name]
    dtype = np.dtype({**_PER_PAIR, **_PER_TOKEN, _BOXES: np.float32}[name])
    fits = array.shape[1:] == (4,) if name == _BOXES else array.ndim == 1
    if array.dtype != dtype or array.ndim < 1 or not fits:
        shape = "[patches, 4]" if name == _BOXES else "one dimension"
        raise ValueError(
            f"`{name}` must be {dtype} of {shape}, got {array.dtype} {list(array.shape)}"
        )
    return array


def _slices(lengths: list[int]) -> list[slice]:
    slices = []
    start = 0
    for length in lengths:  # Python's integers: a sum of hostile lengths must not wrap around
        if length < 0:
            raise ValueError(f"`n_tokens` holds the negative length {length}")
        slices.append(slice(start, start + length))
        start += length
    return slices


class _Boxes:
    """Hands the patches' boxes out in order."""

    def __init__(self, boxes: npt.NDArray[np.float32]) -> None:
        if not ((boxes >= 0) & (boxes <= 1)).all():  # also false for NaN
            raise ValueError("`boxes` must lie in [0, 1]")
        self._boxes = boxes
        self._next = 0

    def take(self, n: int) -> npt.NDArray[np.float32]:
        taken = self._boxes[self._next : self._next + n].copy()
        if len(taken) != n:
            raise ValueError(f"`boxes` has {len(self._boxes)} rows, fewer than there are patches")
        self._next += n
        return taken

    def check_used_up(self) -> None:
        if self._next != len(self._boxes):
            raise ValueError(f"`boxes` has {len(self._boxes)} rows for {self._next} patches")


def _attribution(
    line: str | bytes, numbers: dict[str, Any], columns: Arrays, tokens: slice, boxes: _Boxes
) -> Attribution:
    fields = read_json(line)
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    index = numbers.pop("index")
    if not _is_count(fields.get("index")) or fields["index"] != index:
        raise ValueError(f"its index is {fields.get('index')!r}, the arrays say {index}")
    del numbers["n_tokens"]
    texts: dict[str, Any] = {name: _text(fields, name) for name in _TEXT}
    pair_id = fields.get("pair_id")
    if pair_id is not None and not isinstance(pair_id, str):
        raise ValueError(f"`pair_id` must be text or null, got {pair_id!r}")
    return Attribution(
        tokens=_texts(fields, "tokens"),
        token_ids=tuple(columns["token_ids"][tokens].tolist()),
        modality=_texts(fields, "modality"),
        scores=columns["scores"][tokens].copy(),
        pair_id=pair_id,
        images=_images(fields.get("images"), boxes),
        **numbers,
        **texts,
    )


def read_json(text: str | bytes) -> Any:
    """Strict JSON, which has no NaN. Raises ValueError where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _text(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise ValueError(f"`{name}` must be text, got {fields.get(name)!r}")
    return str(fields[name])


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{name}` must be a list of texts")
    # A hundred thousand pairs repeat a few thousand tokens: each is kept once.
    return tuple(map(intern, values))


def _images(values: Any, boxes: _Boxes) -> tuple[ImageGrid, ...]:
    if not isinstance(values, list):
        raise ValueError(f"`images` must be a list, got {values!r}")
    if not values:
        return ()
    from grains_ext.vision.grid import ImageGrid

    grids = []
    for value in values:
        positions = value.get("token_positions") if isinstance(value, dict) else None
        size = value.get("size") if isinstance(value, dict) else None
        if not isinstance(positions, list) or not all(map(_is_count, positions)):
            raise ValueError("an image's `token_positions` must be a list of whole numbers")
        if not isinstance(size, list) or len(size) != 2 or not all(map(_is_count, size)):
            raise ValueError(f"an image's `size` must be [width, height], got {size!r}")
        if min(size) < 1:
            raise ValueError(f"an image of size {size} has no pixels")
        grids.append(ImageGrid(tuple(positions), boxes.take(len(positions)), (size[0], size[1])))
    return tuple(grids)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
