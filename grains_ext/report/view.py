"""What there is to show of an attribution, in the order of the prompt; HTML and terminal draw it.

Shades are scores in [-1, 1], relative to the strongest. Tokens and whole images share one scale, so
that they can be compared; patches, each a small part of an image, have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution
    from grains_ext.vision.grid import ImageGrid

# Methods whose scores are a share of f's change; another's residual is no error.
_COMPLETE = ("adaptive", "gausslegendre", "riemann_middle")
_CONTRAST = "log p(chosen) − log p(rejected)"
_OBJECTIVES = {
    "sum": _CONTRAST,
    "mean": f"{_CONTRAST} per token",
    "first": f"{_CONTRAST} at the first token that differs",
    "chosen": "log p(chosen)",
    "rejected": "log p(rejected)",
}
_DIRECTIONS = {
    **dict.fromkeys(
        ("sum", "mean", "first"), ("toward the chosen answer", "toward the rejected one")
    ),
    "chosen": ("toward the chosen answer", "away from it"),
    "rejected": ("toward the rejected answer", "away from it"),
}
# Two boxes overlap where they share more than this part of the smaller one: neighbours meet at
# edges that were rounded to float32.
_OVERLAP = 0.01


@dataclass(frozen=True)
class Piece:
    """A token, or a run of one image's tokens."""

    text: str
    score: float
    shade: float


@dataclass(frozen=True)
class Patch:
    """The pixels of one token: a box as shares of the picture's width and height."""

    position: int
    box: tuple[float, float, float, float]
    score: float
    shade: float


@dataclass(frozen=True)
class Picture:
    """One image: layers of patches that do not overlap (the whole and its tiles, say)."""

    number: int
    """Counted from 1."""
    size: tuple[int, int]
    n_tokens: int
    total: float
    without_pixels: float
    """The sum of the scores of its tokens that stand for no pixels (line ends, padding)."""
    layers: tuple[tuple[Patch, ...], ...]

    @property
    def strongest(self) -> Patch | None:
        patches = [patch for layer in self.layers for patch in layer]
        return max(patches, key=lambda patch: abs(patch.score), default=None)


@dataclass(frozen=True)
class View:
    pieces: tuple[Piece, ...]
    pictures: tuple[Picture, ...]


def view(attribution: Attribution) -> View:
    """The prompt as pieces, and its pictures as layers of patches."""
    scores = attribution.scores.astype(np.float64)
    image_of = {
        position: number
        for number, image in enumerate(attribution.images, start=1)
        for position in image.token_positions
    }
    texts: list[str] = []
    values: list[float] = []
    start = 0
    while start < len(scores):
        number = image_of.get(start)
        stop = start + 1
        while number is not None and image_of.get(stop) == number:
            stop += 1
        if number is None:
            texts.append(visible(attribution.tokens[start]))
        else:
            texts.append(f"[image {number}: {stop - start} token{'s' if stop - start > 1 else ''}]")
        values.append(float(scores[start:stop].sum()))
        start = stop
    pieces = map(Piece, texts, values, shades(values))
    return View(tuple(pieces), _pictures(attribution.images, scores))


def shades(scores: npt.ArrayLike) -> list[float]:
    """Each score over the largest absolute score, in [-1, 1]; zeros where all are zero.

    What is not a number has no shade, and infinity the full one.
    """
    values = np.nan_to_num(np.asarray(scores, dtype=np.float64))
    largest = np.abs(values).max(initial=0.0)
    shares: list[float] = (values / largest if largest > 0 else np.zeros_like(values)).tolist()
    return shares


def visible(token: str) -> str:
    """A token with its white space drawn, where there is nothing else to see."""
    token = token.replace("\n", "⏎").replace("\t", "⇥")
    return token if token.strip() else token.replace(" ", "␣") or "∅"


def objective_words(attribution: Attribution) -> str:
    return _OBJECTIVES.get(attribution.objective, f"the objective {attribution.objective}")


def directions(attributions: Sequence[Attribution]) -> tuple[str, str]:
    """What a positive and a negative score mean, for all of the attributions."""
    words = {_DIRECTIONS.get(attribution.objective) for attribution in attributions} or {None}
    first = words.pop()
    return ("raises the objective", "lowers it") if words or first is None else first


def sums_words(attribution: Attribution) -> str:
    """ "Text tokens sum to +1.200, image tokens to -0.300"."""
    sums = attribution.modality_sums()
    if not sums:
        return "There are no tokens"
    parts = [f"{name} tokens {'sum ' if not i else ''}to" for i, name in enumerate(sums)]
    words = ", ".join(
        f"{part} {total:+.3f}" for part, total in zip(parts, sums.values(), strict=True)
    )
    return words[0].upper() + words[1:]


def verdict(attribution: Attribution) -> str:
    """What ``converged`` says, in words."""
    if not attribution.converged:
        return "not converged: do not trust the values"
    if attribution.method not in _COMPLETE:
        return f"scores of {attribution.method} need not add up to the change"
    return "converged: the scores add up within the tolerance"


def _pictures(images: Sequence[ImageGrid], scores: npt.NDArray[np.float64]) -> tuple[Picture, ...]:
    covering = []
    for image in images:
        x0, y0, x1, y1 = image.boxes.T
        covering.append(np.flatnonzero((x1 > x0) & (y1 > y0)))
    positions = [
        image.token_positions[i] for image, here in zip(images, covering, strict=True) for i in here
    ]
    shade_of = dict(zip(positions, shades(scores[positions]), strict=True))
    pictures = []
    for number, (image, here) in enumerate(zip(images, covering, strict=True), start=1):
        patches = [
            Patch(
                position,
                tuple(image.boxes[i].tolist()),
                scores[position].item(),
                shade_of[position],
            )
            for i, position in ((i, image.token_positions[i]) for i in here)
        ]
        total = float(scores[list(image.token_positions)].sum())
        covered = sum(patch.score for patch in patches)
        pictures.append(
            Picture(
                number,
                image.size,
                len(image.token_positions),
                total,
                total - covered if len(here) < len(image.token_positions) else 0.0,
                _layers(patches),
            )
        )
    return tuple(pictures)


def _layers(patches: Sequence[Patch]) -> tuple[tuple[Patch, ...], ...]:
    """Patches in their order, with a new layer where one overlaps with any of the current layer."""
    layers: list[list[Patch]] = []
    boxes = np.empty((0, 4))
    for patch in patches:
        box = np.array(patch.box)
        if not layers or _overlaps(box, boxes):
            layers.append([])
            boxes = np.empty((0, 4))
        layers[-1].append(patch)
        boxes = np.concatenate([boxes, box[None]])
    return tuple(map(tuple, layers))


def _overlaps(box: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64]) -> bool:
    shared = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    smaller = np.minimum(areas, (box[2:] - box[:2]).prod())
    return bool((shared.clip(0).prod(1) > _OVERLAP * smaller).any())
