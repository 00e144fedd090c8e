"""`.svec` files of IBM's activation-steering: JSON, 0-based block outputs, added as they are."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from grains_ext.files import write_text
from grains_ext.steering.formats import checked
from grains_ext.steering.vectors import SteeringVectors


def read(path: Path) -> SteeringVectors:
    """The directions of a .svec file, strength 1, added without restoring the norm.

    Raises ValueError for a file that is not laid out as theirs.
    """
    try:
        data = json.loads(path.read_bytes())
        directions = {_block(layer): _vector(v) for layer, v in data["directions"].items()}
        model_type = data["model_type"]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(
            f'{path} is not a .svec file: expected JSON with "model_type" and "directions" '
            f"{{layer: numbers}} ({error})"
        ) from error
    metadata = {
        "read_from": "svec",
        "model_type": model_type,
        "explained_variances": _finite(data.get("explained_variances")),
    }
    return checked.vectors(path, directions, metadata)


def write(vectors: SteeringVectors, path: Path, *, model_type: str | None = None) -> None:
    """Writes directions that act at strength 1 as a .svec file.

    model_type: of the model's config; by default the one in the vectors' metadata, else "unknown".
    """
    variances = _finite(vectors.metadata.get("explained_variances"))
    data = {
        "model_type": model_type or vectors.metadata.get("model_type") or "unknown",
        "directions": {str(block): v.tolist() for block, v in vectors.directions.items()},
        # Theirs reads one for each layer.
        "explained_variances": {
            str(block): variances.get(str(block), 1.0) for block in vectors.blocks
        },
    }
    write_text(path, json.dumps(data))


def _finite(variances: Any) -> dict[str, float]:
    """Of the layers that have one; our own files hold no NaN."""
    known = variances if isinstance(variances, dict) else {}
    return {
        layer: value
        for layer, value in known.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _block(layer: str) -> int:
    if not re.fullmatch(r"0|[1-9]\d{0,5}", layer):
        raise ValueError(f"{layer!r} is no layer")
    return int(layer)


def _vector(values: Any) -> torch.Tensor:
    # Newer versions write [1, D]: they leave room for one direction per token.
    return checked.direction(torch.tensor(values, dtype=torch.float32))
