"""Where the path of an image's tokens starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from grains_ext.vision.capture import CapturedPrompt, capture_prompt

IMAGE_BASELINES = ("mean", "blur", "zero")


@torch.no_grad()
def image_baseline_embeddings(
    decoder: DecoderView,
    processor: Any,
    pair: PreferencePair,
    captured: CapturedPrompt,
    kind: str = "mean",
) -> Tensor:
    """Baseline embeddings [n, D] of a prompt's n image tokens, in their order.

    kind:
    - "mean": every token that stands for pixels gets the mean of its own image's; a token that
      stands for none (a line end) keeps its embedding;
    - "blur": what the model makes of the images blurred past recognition (one more run of the
      vision tower);
    - "zero": zeros, off the distribution that a model knows, as for text.

    captured: of this pair, whose dtype the baselines have.

    Raises ValueError for another kind.
    """
    if kind not in IMAGE_BASELINES:
        raise ValueError(
            f"image baseline must be one of {', '.join(IMAGE_BASELINES)}, got {kind!r}"
        )
    if kind == "blur":
        captured = capture_prompt(decoder, processor, pair, separator=captured.separator, blur=True)
    places = [place for grid in captured.images for place in grid.token_positions]
    embeddings = captured.embeddings[places]
    if kind == "zero":
        return torch.zeros_like(embeddings)
    if kind == "mean":
        start = 0
        for grid in captured.images:
            stop = start + len(grid.token_positions)
            has_pixels = torch.from_numpy(grid.boxes.any(axis=1)).to(embeddings.device)
            of_image = embeddings[start:stop]
            of_image[has_pixels] = of_image[has_pixels].mean(0, dtype=torch.float32).to(of_image)
            start = stop
    return embeddings
