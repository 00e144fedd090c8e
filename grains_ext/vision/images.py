"""Images of preference pairs, opened: from paths, PIL images, arrays and data-set records."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# The blur's standard deviation, as a share of the longer side: shapes go, colours stay.
_BLUR = 1 / 8


def open_image(source: Any) -> Image:
    """The image as RGB, turned as its EXIF orientation says.

    source: a path; a PIL image; an array [H, W] or [H, W, 1, 3 or 4], uint8 or floating in [0, 1];
        a record {"bytes": ...} or {"path": ...} as `datasets` stores images.

    Raises ValueError with the path and the reason where it does not open, ImportError without
    Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'grains_ext[vision]'") from error
    if isinstance(source, Mapping):
        record = source
        source = record.get("path") if record.get("bytes") is None else BytesIO(record["bytes"])
    if isinstance(source, str | Path | BytesIO):
        name = "the image's bytes" if isinstance(source, BytesIO) else f"the image {str(source)!r}"
        try:
            with Image.open(source) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        except FileNotFoundError as error:
            raise ValueError(f"{name} does not open: no such file") from error
        except (OSError, Image.DecompressionBombError, SyntaxError, RuntimeError) as error:
            raise ValueError(f"{name} does not open: {error}") from error
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        return Image.fromarray(_pixels(source)).convert("RGB")
    raise ValueError(
        "an image must be a path, a PIL image, an array [height, width, channels] or a record with "
        f"`bytes` or `path`; got {type(source).__name__}"
    )


def blurred(image: Image) -> Image:
    """The image after a Gaussian blur that leaves no shapes: an eighth of the longer side."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size)))


def _pixels(array: np.ndarray) -> np.ndarray:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"an image array must be [height, width] or [height, width, 1, 3 or 4], got {shape}"
        )
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        return np.round(array * 255).astype(np.uint8)
    raise ValueError(
        f"an image array must be uint8, or floating in [0, 1]; got {array.dtype} in "
        f"[{array.min()}, {array.max()}]"
    )
