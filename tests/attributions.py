"""Attributions made by hand, for tests of what is done with them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from grains_ext.attribution import Attribution


def attribution(tokens: tuple[str, ...], scores: Sequence[float], /, **changes: Any) -> Attribution:
    values: dict[str, Any] = {
        "tokens": tokens,
        "token_ids": tuple(range(len(tokens))),
        "modality": ("text",) * len(tokens),
        "scores": np.array(scores, dtype=np.float32),
        "f_input": 1.25,
        "f_baseline": -0.5,
        "residual": 0.0125,
        "evaluations": 18,
        "n_steps": 16,
        "converged": True,
        "method": "gausslegendre",
        "baseline": "bos",
        "prompt": " ".join(tokens),
        "chosen": "red",
        "rejected": "blue",
        "pair_id": "p-0",
    }
    return Attribution(**{**values, **changes})


def bits(attribution: Attribution) -> dict[str, Any]:
    """Every field in a form where == means bit for bit, the types of the numbers included."""
    plain: dict[str, Any] = {}
    for field in fields(attribution):
        value = getattr(attribution, field.name)
        if isinstance(value, np.ndarray):
            value = (value.dtype, value.shape, value.tobytes())
        elif isinstance(value, float):
            value = np.float64(value).tobytes()
        elif field.name == "images":
            value = [
                (image.token_positions, image.size, image.boxes.dtype, image.boxes.tobytes())
                for image in value
            ]
        plain[field.name] = (type(getattr(attribution, field.name)), value)
    return plain
