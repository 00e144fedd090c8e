"""Parts as the templates draw them: words, formatted numbers, places on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grains_ext.report import view
from grains_ext.report.charts import SHARES, Axis, axis
from grains_ext.report.explorer import FIRST, explorer
from grains_ext.report.parts import (
    Answers,
    Asked,
    Attributed,
    BlockDirection,
    Change,
    Directions,
    Exported,
    Figure,
    HeldOut,
    Interval,
    Measured,
    Parts,
    RateRow,
    Tuning,
)
from grains_ext.report.rendering import template
from grains_ext.report.text import blocks_words
from grains_ext.report.tokens import figure

_FIGURES = {
    "accuracy": ("Accuracy", "pairs whose chosen answer is likelier than the rejected one"),
    "accuracy_per_token": ("Accuracy per token", "the same by log-probability per token"),
    "exact_match": ("Says it", "pairs whose greedy answer is the chosen one, or begins with it"),
    "mean_margin": ("Mean margin", "log p(chosen) − log p(rejected), in nats"),
    "perplexity": ("Perplexity", "of neutral texts"),
    "perplexity_ratio": ("Perplexity", "of neutral texts, over the unsteered model's"),
    "kl_per_token": ("KL per token", "KL(unsteered ‖ steered) on neutral texts, in nats"),
}
# A chart of so few blocks says less than the table.
_MIN_BLOCKS = 3
# Pictures are most of a page's weight: later ones are drawn as patches alone.
_MAX_PICTURES = 100


def page(title: str, parts: Parts) -> dict[str, Any]:
    """The whole page's values."""
    attributions = [each for part in parts.attributed for each in part.attributions]
    return {
        "title": title,
        "glance": glance(parts),
        "held_out": [held_out(part) for part in parts.held_out if part.figures],
        "answers": [answers(part) for part in parts.answers if part.asked],
        "attributed": [attributed(part) for part in parts.attributed if part.attributions],
        "signs": view.directions(attributions),
        "directions": [directions(part) for part in parts.directions if part.blocks],
        "tunings": [tuning(part) for part in parts.tunings],
        "exported": [exported(part) for part in parts.exported],
        "metadata": parts.metadata,
        "commands": parts.commands,
    }


# --- numbers in words -----------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits for what is of the order of one, else significant ones."""
    if value is None or not math.isfinite(value):
        return "–"
    small = value != 0 and abs(value) < 10**-digits
    text = f"{value:.{digits}g}" if small or abs(value) >= 1e5 else f"{value:.{digits}f}"
    return text.replace("-", "−")


def times(value: float | None) -> str:
    return f"× {number(value)}"


def signed(value: float | None, digits: int = 2) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


# --- at a glance ----------------------------------------------------------------------------------


def glance(parts: Parts) -> list[dict[str, str]]:
    """The few figures to see first, of what there is."""
    found = [*_held_out_glance(parts.held_out), *_exported_glance(parts.exported)]
    if parts.attributed:
        total = sum(part.n_pairs or len(part.attributions) for part in parts.attributed)
        failed = sum(part.n_not_converged for part in parts.attributed)
        found.append(
            {
                "label": "Attributed",
                "value": f"{total:,} pair{'s' if total != 1 else ''}",
                "note": f"{failed} of them not converged" if failed else "all converged",
            }
        )
    return found


def _held_out_glance(parts: Iterable[HeldOut]) -> list[dict[str, str]]:
    part = next(iter(parts), None)
    if part is None:
        return []
    figures = {each.name: each.measured for each in part.figures}
    first, *others = figures.get("accuracy", (Measured("", None),))
    if first.value is None:
        return []
    best = max(others, key=lambda each: each.value or 0.0, default=first)
    found = [
        {
            "label": "Held-out accuracy",
            "value": percent(best.value),
            "note": f"{best.condition}; {first.condition} {percent(first.value)}"
            if others
            else f"{first.condition}, {part.n_pairs:,} pairs",
        }
    ]
    ratio = _of(best.condition, figures.get("perplexity_ratio", ()))
    after, before = (
        _of(name, figures.get("perplexity", ())) for name in (best.condition, first.condition)
    )
    if ratio is None and after is not None and before:
        ratio = after / before
    if ratio is not None and others:
        found.append(
            {
                "label": "Perplexity",
                "value": f"× {ratio:.3f}",
                "note": f"{best.condition}, on neutral texts",
            }
        )
    return found


def _of(condition: str, measured: Iterable[Measured]) -> float | None:
    return next((each.value for each in measured if each.condition == condition), None)


def _exported_glance(parts: Iterable[Exported]) -> list[dict[str, str]]:
    found = []
    parts = list(parts)
    errors = [max(row.prefill, row.decode) for part in parts for row in part.parity if row.is_error]
    if errors:
        found.append(
            {
                "label": "Exported graph",
                "value": f"{max(errors):.1e}",
                "note": "largest difference from torch in any logit",
            }
        )
    timed = [row for part in parts for row in part.rates if row.name.startswith("steered")]
    if timed:
        # The native operator where it was timed, as an exported folder runs it.
        row = next((row for row in timed if "op library" in row.name), timed[-1])
        found.append(
            {
                "label": "Decoding speed",
                "value": f"× {row.ratio:.2f}",
                "note": f"of the unsteered; {row.name}",
            }
        )
    return found


# --- held out -------------------------------------------------------------------------------------


def held_out(part: HeldOut) -> dict[str, Any]:
    figures = [_figure(each) for each in part.figures]
    return {
        "title": part.title,
        "n_pairs": part.n_pairs,
        "figures": figures,
        "has_interval": any(row["interval"] for each in figures for row in each["rows"]),
        "has_change": any(row["change"] for each in figures for row in each["rows"]),
    }


def _figure(part: Figure) -> dict[str, Any]:
    label, meaning = _FIGURES.get(part.name, (part.name.replace("_", " "), ""))
    finite = [
        value
        for each in part.measured
        for value in (each.value, *(each.interval or ()))
        if value is not None and math.isfinite(value)
    ]
    along = SHARES if part.is_share else axis(finite)
    show = percent if part.is_share else times if part.name == "perplexity_ratio" else number
    return {
        "label": label,
        "meaning": meaning,
        "low": _tick(along.low, part.is_share),
        "high": _tick(along.high, part.is_share),
        "rows": [
            {
                "condition": each.condition,
                "note": each.note,
                "value": show(each.value),
                "interval": "" if each.interval is None else _interval(each.interval, show),
                "change": "" if each.change is None else _change(each, part),
                "certainty": "" if each.change is None else _certainty(each.change),
                "place": None if each.value is None else along.place(each.value),
                "span": None if each.interval is None else _span(along, each.interval),
            }
            for each in part.measured
        ],
    }


def _tick(value: float, is_share: bool) -> str:
    return f"{100 * value:g} %" if is_share else f"{value:g}".replace("-", "−")


def _interval(interval: Interval, show: Any) -> str:
    low, high = map(show, interval)
    return f"{low.removesuffix(' %')} to {high}"


def _span(along: Axis, interval: Interval) -> tuple[float, float]:
    low, high = map(along.place, interval)
    return low, round(high - low, 2)


def _change(measured: Measured, part: Figure) -> str:
    assert measured.change is not None
    difference = measured.change.difference
    if part.is_share:
        return f"{signed(100 * difference, 1)} points"
    before = (measured.value or 0.0) - difference
    if part.name == "perplexity" and before > 0:
        return times((measured.value or 0.0) / before)
    return signed(difference, 3)


def _certainty(change: Change) -> str:
    """What the change rests on: McNemar's counts and test of a share, else the interval."""
    if change.p_value is not None:
        p = "p < 0.001" if change.p_value < 0.001 else f"p = {change.p_value:.2g}"
        return f"+{change.gained} −{change.lost}, {p}"
    if change.interval is None:
        return ""
    low, high = (signed(each, 3) for each in change.interval)
    return f"{low} to {high}"


# --- answers --------------------------------------------------------------------------------------


def answers(part: Answers) -> dict[str, Any]:
    """Rows of a table that is searched and filtered."""
    draw = template("answers.html.j2").module.row  # type: ignore[attr-defined]
    # What decides "right": first the answer itself, where it was generated and judged.
    judges = [
        name
        for name, of in (("says", "says_chosen"), ("prefers", "margin"))
        if all(getattr(said, of) is not None for each in part.asked for said in each.said)
    ]
    rows = [
        {
            "html": draw(_asked(each), part.conditions),
            "text": _search_text(each),
            "right": {
                "says": [bool(said.says_chosen) for said in each.said],
                "prefers": [(said.margin or 0.0) > 0 for said in each.said],
            },
            "same": [said.text == each.said[0].text for said in each.said],
            "margin": [said.margin for said in each.said],
        }
        for each in part.asked
    ]
    return {
        "title": part.title,
        "conditions": part.conditions,
        "n": len(rows),
        "total": part.n_asked or len(rows),
        "judges": judges,
        "generated": any(said.text is not None for each in part.asked for said in each.said),
        "has_margins": "prefers" in judges,
        **explorer(rows),
    }


def _asked(part: Asked) -> dict[str, Any]:
    return {
        "name": part.name,
        "prompt": part.prompt,
        "chosen": part.chosen,
        "rejected": part.rejected,
        "said": [
            {
                "text": said.text,
                "right": said.says_chosen,
                "prefers": None if said.margin is None else said.margin > 0,
                "margin": None if said.margin is None else signed(said.margin),
            }
            for said in part.said
        ],
    }


def _search_text(part: Asked) -> str:
    texts = [part.name, part.prompt, part.chosen, part.rejected, *(s.text for s in part.said)]
    return "\n".join(text for text in texts if text)


# --- attributions ---------------------------------------------------------------------------------


def attributed(part: Attributed) -> dict[str, Any]:
    draw = template("attribution.html.j2").module.row  # type: ignore[attr-defined]
    pictures = part.images or [None] * len(part.attributions)
    rows = []
    n_pictures = 0
    for number, (each, images) in enumerate(zip(part.attributions, pictures, strict=True)):
        item = figure(each, images if n_pictures < _MAX_PICTURES else None)
        n_pictures += len(images or ())
        is_first = number < FIRST
        rows.append(
            {
                "html": draw(item, is_first),
                "tokens": None
                if is_first
                else [[token["text"], token["score"], token["alpha"]] for token in item["tokens"]],
                "text": "\n".join(
                    filter(None, (each.pair_id, each.prompt, each.chosen, each.rejected))
                ),
                "converged": each.converged,
                "change": abs(each.f_input - each.f_baseline),
                "residual": abs(each.residual),
            }
        )
    total = part.n_pairs or len(rows)
    return {
        "title": part.title,
        "n": len(rows),
        "total": total,
        "some_failed": any(not row["converged"] for row in rows),
        **explorer(rows),
    }


# --- directions -----------------------------------------------------------------------------------


def directions(part: Directions) -> dict[str, Any]:
    lengths = axis(
        [0.0, *(v for each in part.blocks for v in (each.norm, each.hidden_norm or 0.0))]
    )
    cosines = [(each.split_half, each.start_cosine) for each in part.blocks]
    known = [value for pair in cosines for value in pair if value is not None]
    angle = axis([0.0, 1.0, *known])
    return {
        "title": part.title,
        "facts": part.facts,
        "chart": len(part.blocks) >= _MIN_BLOCKS,
        "lengths": _ticks(lengths),
        "cosines": _ticks(angle) if known else None,
        "columns": {
            name: any(getattr(each, name) is not None for each in part.blocks)
            for name in ("hidden_norm", "shift_norm", "split_half", "start_cosine")
        },
        "blocks": [_block(each, lengths, angle) for each in part.blocks],
        "every": max(1, math.ceil(len(part.blocks) / 16)),
    }


def _block(each: BlockDirection, lengths: Axis, cosines: Axis) -> dict[str, Any]:
    return {
        "block": each.block,
        "norm": number(each.norm, 2),
        "hidden_norm": number(each.hidden_norm, 2),
        "shift_norm": number(each.shift_norm, 2),
        "split_half": number(each.split_half, 2),
        "start_cosine": number(each.start_cosine, 2),
        "height": lengths.place(each.norm),
        "hidden_height": None if each.hidden_norm is None else lengths.place(each.hidden_norm),
        "split_place": None if each.split_half is None else cosines.place(each.split_half),
        "start_place": None if each.start_cosine is None else cosines.place(each.start_cosine),
    }


def _ticks(along: Axis) -> list[dict[str, Any]]:
    return [{"at": along.place(tick), "label": f"{tick:g}"} for tick in along.ticks]


# --- tuning ---------------------------------------------------------------------------------------


def tuning(part: Tuning) -> dict[str, Any]:
    full = [
        trial
        for trial in part.trials
        if trial["accuracy"] is not None and trial["perplexity_ratio"] is not None
    ]
    ratios = [1.0, part.max_perplexity_ratio, *(trial["perplexity_ratio"] for trial in full)]
    across = axis([ratio for ratio in ratios if ratio <= 1.25 * part.max_perplexity_ratio])
    steps = [(1.0, part.unsteered)] + [
        (trial["perplexity_ratio"], trial["accuracy"]) for trial in part.frontier
    ]
    return {
        "title": part.title,
        "n_pairs": part.n_pairs,
        "limit": f"{part.max_perplexity_ratio:g}",
        "limit_at": across.place(part.max_perplexity_ratio),
        "chosen": _trial(part.chosen, part.n_pairs),
        "unsteered": {
            "accuracy": percent(part.unsteered),
            "x": across.place(1.0),
            "y": SHARES.place(part.unsteered),
        },
        "frontier": [_trial(trial, part.n_pairs) for trial in part.frontier],
        "marks": [
            {
                **_trial(trial, part.n_pairs),
                "x": across.place(trial["perplexity_ratio"]),
                "y": SHARES.place(trial["accuracy"]),
                "kind": _kind(trial, part),
            }
            for trial in sorted(full, key=lambda t: (t["perplexity_ratio"], t["accuracy"]))
        ],
        "line": _stairs([(across.place(x), SHARES.place(y)) for x, y in steps]),
        "across": _ticks(across),
        "up": [{"at": SHARES.place(tick), "label": f"{100 * tick:g} %"} for tick in SHARES.ticks],
        "maps": _maps(part),
        "n_trials": len(part.trials),
    }


def _kind(trial: Mapping[str, Any], part: Tuning) -> str:
    if _same(trial, part.chosen):
        return "chosen"
    if any(_same(trial, each) for each in part.frontier):
        return "best"
    return "tried" if trial["n_pairs"] == part.n_pairs else "part"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["blocks"] == other["blocks"] and one["strength"] == other["strength"])


def _trial(trial: Mapping[str, Any], n_pairs: int) -> dict[str, Any]:
    blocks = trial["blocks"]
    scored = trial["n_pairs"]
    return {
        "blocks": blocks_words(blocks),
        "noun": "block" if len(blocks) == 1 else "blocks",
        "strength": f"{trial['strength']:g}",
        "accuracy": percent(trial["accuracy"]),
        "margin": signed(trial["mean_margin"]),
        "perplexity": number(trial["perplexity_ratio"]),
        "on": "" if scored == n_pairs else f" on {scored} of {n_pairs} pairs",
    }


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path over points of rising x: along, then up. y grows downward in SVG."""
    (x, y), *others = points
    path = f"M{x:g} {100 - y:g}"
    for x, y in others:
        path += f"H{x:g}V{100 - y:g}"
    return path


def _maps(part: Tuning) -> list[dict[str, Any]]:
    """Accuracy by strength and block set, one map for each number of blocks in a set."""
    lengths = sorted({len(trial["blocks"]) for trial in part.trials if trial["blocks"]})
    maps = []
    for length in lengths:
        trials = [trial for trial in part.trials if len(trial["blocks"]) == length]
        sets = sorted({tuple(trial["blocks"]) for trial in trials})
        at = {(tuple(trial["blocks"]), trial["strength"]): trial for trial in trials}
        maps.append(
            {
                "length": length,
                "sets": [blocks_words(blocks) for blocks in sets],
                "rows": [
                    {
                        "strength": f"{strength:g}",
                        "cells": [_cell(at.get((blocks, strength)), part) for blocks in sets],
                    }
                    for strength in sorted({trial["strength"] for trial in trials}, reverse=True)
                ],
            }
        )
    return maps


def _cell(trial: Mapping[str, Any] | None, part: Tuning) -> dict[str, Any] | None:
    if trial is None:
        return None
    words = _trial(trial, part.n_pairs)
    accuracy, ratio = trial["accuracy"], words["perplexity"]
    if accuracy is None:
        return {"kind": "over", "text": "×", "alpha": "0", "title": f"perplexity × {ratio}"}
    return {
        "kind": _kind(trial, part),
        "text": f"{100 * accuracy:.0f}",
        "alpha": f"{0.75 * accuracy:.3f}",
        "title": f"accuracy {words['accuracy']}{words['on']}, perplexity × {ratio}",
    }


# --- exported -------------------------------------------------------------------------------------


def exported(part: Exported) -> dict[str, Any]:
    along = axis([1.0, *(v for row in part.rates for v in (row.ratio, *row.ratio_spread))])
    return {
        "title": part.title,
        "facts": part.facts,
        "parity": [
            {
                "name": row.name,
                "prefill": f"{row.prefill:.1e}",
                "decode": f"{row.decode:.1e}",
                "relative": f"{row.relative:.1e}",
            }
            for row in part.parity
        ],
        "rates": [_rate(row, along) for row in part.rates],
        "unit": part.unit,
        "spread": part.spread,
        "baseline": part.baseline,
        "low": f"{along.low:g}",
        "high": f"{along.high:g}",
        "one": along.place(1.0),
    }


def _rate(row: RateRow, along: Axis) -> dict[str, Any]:
    digits = 0 if row.rate >= 20 else 2
    return {
        "name": row.name,
        "rate": f"{row.rate:,.{digits}f}",
        "rate_spread": " to ".join(f"{value:,.{digits}f}" for value in row.rate_spread),
        "milliseconds": f"{1000 / row.rate:.3g}" if row.rate else "–",
        "ratio": times(row.ratio),
        "ratio_spread": _interval(row.ratio_spread, number),
        "place": along.place(row.ratio),
        "span": _span(along, row.ratio_spread),
    }
