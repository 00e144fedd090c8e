"""What was found in the file of another tool, as vectors, or an error that names the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_ext.steering.vectors import SteeringVectors

# Far beyond any model. A small file may hold a tensor of any size, by strides of 0.
_MOST_VALUES = 1 << 20


def direction(tensor: Tensor) -> Tensor:
    """[D] of [D] or [1, ..., D]. Raises ValueError for any other tensor."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or not 0 < tensor.numel() <= _MOST_VALUES or tensor.numel() != tensor.shape[-1]:
        raise ValueError(
            f"a direction is {list(tensor.shape)} of {tensor.layout}, {tensor.dtype}; expected "
            "[hidden size] of plain numbers"
        )
    return tensor.detach().flatten()


def vectors(
    path: Path, directions: Mapping[int, Tensor], metadata: dict[str, Any], **options: Any
) -> SteeringVectors:
    """Directions that are added, without restoring the norm."""
    try:
        return SteeringVectors(dict(directions), normalize=False, metadata=metadata, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
