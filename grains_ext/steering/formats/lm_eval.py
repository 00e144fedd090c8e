"""`.pt` files for lm-evaluation-harness's ``--model steered``.

{hookpoint: {"steering_vector": [D], "steering_coefficient": float, "action": "add", "bias": None,
"head_index": None}}, hookpoints being module names below `model.base_model`. The harness adds and
does not restore the norm. They are pickles; here they are read with weights_only, which runs none.
"""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from grains_ext.files import replacing
from grains_ext.steering.formats import checked
from grains_ext.steering.vectors import SteeringVectors

_BLOCK = re.compile(r"(?:.+\.)?(?:layers|h|blocks|block)\.(\d{1,6})")
# Where `base_model` keeps its blocks, by model_type; `layers` for all others.
_BLOCKS_AT = {
    "gpt2": "h",
    "gpt_bigcode": "h",
    "gpt_neo": "h",
    "gptj": "h",
    "bloom": "h",
    "falcon": "h",
    "opt": "decoder.layers",
}


def is_one(path: Path) -> bool:
    """Whether a .pt file is laid out as the harness's, rather than another tool's."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError):
        return False
    return isinstance(data, dict) and all(
        isinstance(entry, dict) and "steering_vector" in entry for entry in data.values()
    )


def read(path: Path) -> SteeringVectors:
    """The directions of a file for the harness, added without restoring the norm.

    Raises ValueError for another layout, and for steering that is not the addition of a vector to
    a block's output (clamping, single heads, biases, other modules).
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no file of plain tensors (it is read with weights_only): {error}"
        ) from error
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: expected {{hookpoint: settings}}, got {type(data).__name__}")
    directions, strengths = {}, {}
    for hookpoint, entry in data.items():
        block = _block(path, hookpoint, entry)
        if block in directions:
            raise ValueError(f"{path}: two hookpoints are block {block}, {hookpoint!r} is one")
        try:
            directions[block] = checked.direction(entry["steering_vector"])
            strengths[block] = float(entry.get("steering_coefficient", 1.0))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: {hookpoint!r}: {error}") from error
    metadata = {"read_from": "lm-eval"}
    return checked.vectors(path, directions, metadata, block_strengths=strengths)


def write(vectors: SteeringVectors, path: Path, *, blocks_at: str | None = None) -> None:
    """Writes directions that act at strength 1 for the harness.

    blocks_at: the blocks' module name below `model.base_model`; by default `layers`, or what the
        model_type in the vectors' metadata is known to have, as `h` for gpt2.
    """
    home = blocks_at or _BLOCKS_AT.get(str(vectors.metadata.get("model_type")), "layers")
    data = {
        f"{home}.{block}": {
            "steering_vector": direction,
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for block, direction in vectors.directions.items()
    }
    with replacing(path) as temporary:
        torch.save(data, temporary)


def _block(path: Path, hookpoint: Any, entry: Any) -> int:
    match = _BLOCK.fullmatch(str(hookpoint))
    if match is None:
        raise ValueError(f"{path}: hookpoint {hookpoint!r} is no decoder block, as 'layers.3' is")
    vector = entry.get("steering_vector") if isinstance(entry, dict) else None
    if not isinstance(vector, torch.Tensor):
        raise ValueError(f"{path}: {hookpoint!r} has no tensor `steering_vector`")
    for name, needed in (("action", "add"), ("bias", None), ("head_index", None)):
        if entry.get(name, needed) != needed:
            raise ValueError(
                f"{path}: {hookpoint!r} has {name}={entry[name]!r}; only {needed!r} can be used"
            )
    return int(match[1])
