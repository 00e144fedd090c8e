"""Steering vectors as a page shows them: lengths, stability, and what tune tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grains_ext.report.parts import BlockDirection, Directions, Parts, Tuning
from grains_ext.report.text import blocks_words
from grains_ext.report.vectors import how_made, mapping, number

if TYPE_CHECKING:
    from grains_ext.steering import SteeringVectors


def vectors(loaded: SteeringVectors, title: str) -> Parts:
    """Raises KeyError, TypeError or ValueError where the metadata is not fit's or tune's."""
    metadata = loaded.metadata
    refined = mapping(metadata, "refine")
    facts = {
        "blocks": blocks_words(loaded.blocks),
        "strength": f"{loaded.strength:g}",
        "token norms": "restored" if loaded.normalize else "not restored (plain addition)",
        **how_made(loaded),
    }
    directions = Directions(
        title,
        tuple(
            BlockDirection(
                block,
                float(direction.norm()),
                _of(mapping(metadata, "hidden_norms"), block),
                _of(mapping(metadata, "shift_norms"), block),
                # It is of the directions before they were refined.
                None if refined else _of(mapping(metadata, "split_half_cosine"), block),
                _of(mapping(refined, "cosine_with_start"), block),
            )
            for block, direction in loaded.directions.items()
        ),
        facts,
    )
    tuned = metadata.get("tuning")
    tunings = () if tuned is None else (_tuning(tuned, title),)
    return Parts(directions=(directions,), tunings=tunings)


def _tuning(tuning: Mapping[str, Any], title: str) -> Tuning:
    return Tuning(
        title,
        int(tuning["n_pairs"]),
        float(tuning["max_perplexity_ratio"]),
        float(tuning["unsteered"]["accuracy"]),
        tuple(map(_trial, tuning["trials"])),
        tuple(map(_trial, tuning["frontier"])),
        _trial(tuning["chosen"]),
    )


def _trial(trial: Mapping[str, Any]) -> dict[str, Any]:
    measured = ("perplexity_ratio", "accuracy", "mean_margin")
    return {
        "blocks": [int(block) for block in trial["blocks"]],
        "strength": float(trial["strength"]),
        "n_pairs": int(trial["n_pairs"]),
        **{name: None if trial[name] is None else float(trial[name]) for name in measured},
    }


def _of(values: Mapping[str, Any], block: int) -> float | None:
    return number(values.get(str(block)))
