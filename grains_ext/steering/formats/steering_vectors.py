"""`SteeringVector` objects of the steering-vectors package, as `torch.save` writes them.

Their layer numbers are 0-based block outputs; they add, and know no norms. The file is a pickle of
one dataclass: it is read with weights_only, that class alone being let in, and no code of theirs
is needed to read it.
"""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from grains_ext.files import replacing
from grains_ext.steering.formats import checked
from grains_ext.steering.formats.folding import at_strength_one
from grains_ext.steering.vectors import SteeringVectors

_THEIR_NAME = "steering_vectors.steering_vector.SteeringVector"


@dataclass
class _SteeringVector:
    """Stands in for theirs while a file is read."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


def read(path: Path) -> SteeringVectors:
    """The directions of a saved SteeringVector, strength 1, added without restoring the norm.

    Raises ValueError for any other content, or for directions of parts of a block.
    """
    try:
        with torch.serialization.safe_globals([(_SteeringVector, _THEIR_NAME)]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} holds no SteeringVector (it is read with weights_only): {error}"
        ) from error
    try:
        return from_object(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(vectors: SteeringVectors, path: Path) -> None:
    """Saves directions that act at strength 1 with `torch.save`; needs their package."""
    theirs = to_object(vectors)
    with replacing(path) as temporary:
        torch.save(theirs, temporary)


def from_object(theirs: Any) -> SteeringVectors:
    """From a `steering_vectors.SteeringVector` in memory. Raises ValueError as `read` does."""
    layers = getattr(theirs, "layer_activations", None)
    if not isinstance(layers, dict):
        raise ValueError(f"expected a SteeringVector, got {type(theirs).__name__}")
    layer_type = getattr(theirs, "layer_type", "decoder_block")
    if layer_type != "decoder_block":
        raise ValueError(
            f"its directions are of layer_type {layer_type!r}; only 'decoder_block' can be used"
        )
    return SteeringVectors(
        {layer: checked.direction(tensor) for layer, tensor in layers.items()},
        normalize=False,
        metadata={"read_from": "steering-vectors"},
    )


def to_object(vectors: SteeringVectors) -> Any:
    """As a `steering_vectors.SteeringVector`, strengths multiplied in. Needs their package."""
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise ImportError("this format needs its package: pip install steering-vectors") from error
    return SteeringVector(layer_activations=dict(at_strength_one(vectors).directions))
