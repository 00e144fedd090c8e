"""Control vectors in GGUF: llama.cpp, repeng, EasySteer.

Tensors `direction.N`, float32 [D], are added to the output of the 0-based block N. llama.cpp
ignores N = 0 and reads no metadata; repeng wants `controlvector.model_hint`, the model_type.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grains_ext.files import replacing
from grains_ext.steering.formats import checked
from grains_ext.steering.vectors import SteeringVectors

_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,5})")


def read(path: Path, *, layer_shift: int = 0) -> SteeringVectors:
    """The directions of a GGUF control vector, strength 1, added without restoring the norm.

    layer_shift: added to the file's layer numbers. Files by llama.cpp's cvector-generator count
        one more than others; -1 puts theirs right.

    Raises ValueError for another kind of GGUF file, a tensor that is no direction, or directions
    that were taken from something else than the blocks' outputs.
    """
    gguf = _package()
    try:
        reader = _reader(gguf)(path)
    except Exception as error:  # whatever numpy or the package say of bytes that are no GGUF
        raise ValueError(f"{path} is not a valid GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{path} holds {architecture!r}, not a control vector: general.architecture is to be "
            f"{_ARCHITECTURE!r}"
        )
    _check_component(path, fields.get(f"{_ARCHITECTURE}.easysteer"))
    directions = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise ValueError(
                f"{path}: expected tensors named direction.<layer>, got {tensor.name!r}"
            )
        values = np.array(tensor.data)
        if values.dtype not in (np.float32, np.float16):
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}; expected F32 or F16"
            )
        try:
            directions[int(match[1]) + layer_shift] = checked.direction(torch.from_numpy(values))
        except ValueError as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
    if any(block < 0 for block in directions):
        raise ValueError(
            f"{path}: layer_shift={layer_shift} makes block {min(directions)} of its lowest layer"
        )
    metadata = {
        name.removeprefix(f"{_ARCHITECTURE}."): value
        for name, value in fields.items()
        if name.startswith(f"{_ARCHITECTURE}.")
    }
    described = {
        "read_from": "gguf",
        "layer_shift": layer_shift,
        "model_type": metadata.pop("model_hint", None),
        "gguf": metadata,
    }
    return checked.vectors(path, directions, described)


def write(
    vectors: SteeringVectors, path: Path, *, model_type: str | None = None, layer_shift: int = 0
) -> None:
    """Writes directions that act at strength 1 as a GGUF control vector.

    model_type: of the model's config; by default the one in the vectors' metadata. repeng asks
        for it. layer_shift: as in `read`, taken away from the block numbers here.

    Raises ValueError for block 0, which llama.cpp cannot steer, or where no model_type is known.
    """
    gguf = _package()
    layers = {block - layer_shift: direction for block, direction in vectors.directions.items()}
    if min(layers) < 1:
        raise ValueError(
            "GGUF control vectors start at layer 1: block "
            f"{min(layers) + layer_shift} cannot be written. Leave it out (--blocks): "
            f"vectors.subset({[block for block in vectors.blocks if block - layer_shift >= 1]})"
        )
    hint = model_type or vectors.metadata.get("model_type")
    if not hint:
        raise ValueError("no model_type in the vectors' metadata: give model_type=, as in 'llama'")
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        try:
            writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
            for layer, direction in layers.items():
                writer.add_tensor(f"direction.{layer}", direction.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _check_component(path: Path, native: Any) -> None:
    """EasySteer says in a JSON field what its directions belong to."""
    if native is None:
        return
    try:
        component = json.loads(native).get("component")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: controlvector.easysteer is not its JSON: {error}") from error
    if component not in (None, "hidden_states"):
        raise ValueError(
            f"{path}: its directions belong to {component!r}; only those of the blocks' outputs "
            "('hidden_states') can be used"
        )


def _reader(gguf: Any) -> Any:
    """Theirs, which counts on past a file's end: a length in it would be obeyed for ever."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            found = super()._get(offset, dtype, count, **order)
            if len(found) < count:
                raise ValueError(f"it ends before byte {offset}, where more was announced")
            return found

    return Reader


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install gguf") from error
    return gguf
