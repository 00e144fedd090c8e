"""Which pixels each image token covers, and scores of tokens as a map over the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ImageGrid:
    """Which pixels each token of one image covers.

    token_positions: places of the image's n tokens among the prompt's tokens, rising.
    boxes: float32 [n, 4], x0 y0 x1 y1 as shares of the original image's width and height, in
        [0, 1]. A token that stands for no pixels (a line end, padding beside the picture) has an
        empty box, all zeros. Boxes overlap where a model reads an image both whole and in tiles.
    size: width and height of the original image in pixels.
    """

    token_positions: tuple[int, ...]
    boxes: npt.NDArray[np.float32]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.token_positions), 4):
            raise ValueError(
                f"{len(self.token_positions)} tokens need boxes [{len(self.token_positions)}, 4], "
                f"got {list(self.boxes.shape)}"
            )

    def heatmap(
        self, scores: npt.ArrayLike, width: int | None = None, height: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Scores spread evenly over their tokens' boxes, float32 [height, width].

        The map sums to the scores of all tokens that have a box, whatever its size; boxes that
        overlap add up.

        scores: one per token of this image [n], or per token of the whole prompt.
        width, height: of the map, by default the original image's.

        Raises ValueError for scores of another length.
        """
        values = np.asarray(scores, dtype=np.float64)
        n = len(self.token_positions)
        if values.ndim == 1 and len(values) > max(self.token_positions, default=-1):
            values = values[list(self.token_positions)]
        if values.shape != (n,):
            raise ValueError(
                f"scores must be [{n}], one per token of the image, or one per token of the "
                f"prompt; got shape {list(values.shape)}"
            )
        x0, y0, x1, y1 = self.boxes.astype(np.float64).T
        columns = _coverage(x0, x1, width or self.size[0])
        rows = _coverage(y0, y1, height or self.size[1])
        area = columns.sum(1) * rows.sum(1)
        density = np.divide(values, area, out=np.zeros(n), where=area > 0)
        heat: npt.NDArray[np.float32] = ((rows * density[:, None]).T @ columns).astype(np.float32)
        return heat


def _coverage(start: np.ndarray, stop: np.ndarray, n_pixels: int) -> np.ndarray:
    """How much of each pixel lies within [start, stop] of the axis, [n, n_pixels] in [0, 1]."""
    edges = np.arange(n_pixels)
    covered: np.ndarray = np.clip(
        np.minimum(edges + 1, stop[:, None] * n_pixels)
        - np.maximum(edges, start[:, None] * n_pixels),
        0,
        1,
    )
    return covered
