"""An attribution as HTML: shaded tokens, patches over the picture, and what they add up to.

The same figure stands in a page of its own, in a notebook's cell and in a report. It needs no
network and, in a notebook, no script. Token colours are signed and colour-blind-safe (blue for
positive, orange for negative); the sign is also in the line under a token, and in the number that
shows on hover and focus, in print, and to screen readers.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from grains_ext.report import view
from grains_ext.report.rendering import template

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution
    from grains_ext.vision.grid import ImageGrid

# Below full opacity, so that the text on a token stays readable in light and dark.
_MAX_ALPHA = 0.75
# Pictures are embedded at twice the pixels a side that the page shows of them, for dense screens.
_MAX_SIDE = 640
# So few pixels a side are drawn as squares, not blurred, and kept as they are.
_COARSE = 128
# The picture's width over its height may differ this much from the attributed image's.
_ASPECT_TOLERANCE = 0.02


def attribution_page(attribution: Attribution, images: Sequence[Any] | None = None) -> str:
    """A whole page; see `grains_ext.attribution.Attribution.to_html`."""
    return _render("attribution_page.html.j2", attribution, images)


def attribution_fragment(attribution: Attribution, images: Sequence[Any] | None = None) -> str:
    """The same as one <div> with its style, for a page that is there already: a notebook."""
    return _render("attribution_fragment.html.j2", attribution, images)


def figure(attribution: Attribution, images: Sequence[Any] | None = None) -> dict[str, Any]:
    """What the template's ``figure`` draws.

    images: the pictures, as anything that `grains_ext.vision.open_image` opens.

    Raises ValueError where their number or shape is not that of the attribution's images.
    """
    if images is not None and len(images) != len(attribution.images):
        raise ValueError(
            f"the prompt has {len(attribution.images)} images, {len(images)} pictures were given"
        )
    seen = view.view(attribution)
    sources = [None] * len(seen.pictures) if images is None else images
    return {
        "of": attribution,
        "objective": view.objective_words(attribution),
        "sums": view.sums_words(attribution),
        "verdict": view.verdict(attribution),
        "tokens": [
            {"text": piece.text, **_shading(piece.score, piece.shade)} for piece in seen.pieces
        ],
        "pictures": [
            _picture(picture, source, grid)
            for picture, source, grid in zip(
                seen.pictures, sources, attribution.images, strict=True
            )
        ],
    }


def _render(name: str, attribution: Attribution, images: Sequence[Any] | None) -> str:
    return template(name).render(
        item=figure(attribution, images), signs=view.directions([attribution])
    )


def _shading(score: float, shade: float) -> dict[str, Any]:
    """alpha: how much of the colour, below 0 of that of negative scores."""
    return {
        "score": f"{score:+.3f}",
        "alpha": round(shade * _MAX_ALPHA, 3),
    }


def _picture(picture: view.Picture, source: Any, grid: ImageGrid) -> dict[str, Any]:
    width, height = picture.size
    label = (
        f"Image {picture.number}, {width} × {height} pixels, {picture.n_tokens} tokens that sum to "
        f"{picture.total:+.3f}"
    )
    strongest = picture.strongest
    if strongest is not None:
        x0, y0, x1, y1 = strongest.box
        label += (
            f"; strongest patch {strongest.score:+.3f}, {50 * (x0 + x1):.0f} % from the left and "
            f"{50 * (y0 + y1):.0f} % from the top"
        )
    if picture.without_pixels:
        label += f"; tokens that stand for no pixels: {picture.without_pixels:+.3f}"
    return {
        "label": label,
        "number": picture.number,
        "width": width,
        "height": height,
        "coarse": max(width, height) <= _COARSE,
        "data": None if source is None else _data_uri(source, grid),
        "layers": [
            [
                {
                    "position": patch.position,
                    "left": f"{100 * patch.box[0]:.4g}",
                    "top": f"{100 * patch.box[1]:.4g}",
                    "width": f"{100 * (patch.box[2] - patch.box[0]):.4g}",
                    "height": f"{100 * (patch.box[3] - patch.box[1]):.4g}",
                    **_shading(patch.score, patch.shade),
                }
                for patch in layer
            ]
            for layer in picture.layers
        ],
    }


def _data_uri(source: Any, grid: ImageGrid) -> str:
    from grains_ext.vision.images import open_image

    picture = open_image(source)
    (width, height), (expected_width, expected_height) = picture.size, grid.size
    aspect = width * expected_height / (height * expected_width)
    if abs(aspect - 1) > _ASPECT_TOLERANCE:
        raise ValueError(
            f"a picture of {width} x {height} pixels was given for an image of {expected_width} x "
            f"{expected_height}: give the image that was attributed"
        )
    kind = "png" if max(picture.size) <= _COARSE else "jpeg"
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    content = BytesIO()
    picture.save(content, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
