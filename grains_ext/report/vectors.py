"""SteeringVectors as a table in a notebook: each block's direction, and how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains_ext.report.rendering import template

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors


@dataclass(frozen=True)
class BlockRow:
    """One block's direction. Cells are "" where the metadata does not say."""

    block: int
    norm: str
    share: float
    """The length as a share of the longest one, in [0, 1]: the bar."""
    of_hidden: str
    """The length over the mean length of the block's hidden states."""
    strength: str
    stability: str
    """The cosine of the directions that two halves of the pairs gave."""
    turned: str
    """The cosine with the direction that refining began from."""


def vectors_fragment(vectors: SteeringVectors) -> str:
    """One <div> with its style, for a page that is there already: a notebook's cell.

    It needs no network and no script. Metadata is taken as it comes, from any tool: what is not
    there, or is of another kind, is left out; all of it is escaped.
    """
    rows = block_rows(vectors)
    return template("vectors_fragment.html.j2").render(
        title=_title(vectors),
        rows=rows,
        shows={
            name: any(getattr(row, name) for row in rows)
            for name in ("of_hidden", "stability", "turned")
        },
        made=how_made(vectors),
    )


def block_rows(vectors: SteeringVectors) -> list[BlockRow]:
    """The table's lines, in the blocks' order."""
    metadata = vectors.metadata
    hidden = mapping(metadata, "hidden_norms")
    halves = mapping(metadata, "split_half_cosine")
    turned = mapping(mapping(metadata, "refine"), "cosine_with_start")
    norms = {block: float(v.norm()) for block, v in vectors.directions.items()}
    longest = max(norms.values()) or 1.0
    rows = []
    for block, norm in norms.items():
        mean = number(hidden.get(str(block)))
        rows.append(
            BlockRow(
                block=block,
                norm=f"{norm:.4g}",
                share=norm / longest,
                of_hidden=f"{norm / mean:.2f}" if mean else "",
                strength=f"{vectors.strength * vectors.factor(block):.4g}",
                stability=_cosine(halves.get(str(block))),
                turned=_cosine(turned.get(str(block))),
            )
        )
    return rows


def how_made(vectors: SteeringVectors) -> dict[str, str]:
    """What the metadata and the settings say, in words."""
    metadata, gate = vectors.metadata, vectors.gate
    tuning, refine = mapping(metadata, "tuning"), mapping(metadata, "refine")
    versions = mapping(metadata, "versions")
    facts = {
        "model": _name(metadata.get("base_model")),
        "method": _method(metadata),
        "pairs": metadata.get("n_pairs"),
        "baseline": metadata.get("baseline"),
        "masked with": metadata.get("masked_with"),
        "refined": _refined(refine),
        "tuned": _tuned(tuning),
        "gate": gate and f"{gate.kind} at block {gate.block}, decided for each {gate.when}",
        "made with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "", {}, [])}


def _title(vectors: SteeringVectors) -> str:
    blocks = vectors.blocks
    count = f"{len(blocks)} blocks" if len(blocks) > 1 else "one block"
    length = "token norms restored" if vectors.normalize else "plain addition"
    return (
        f"Steering vectors: {count} × {vectors.hidden_size}, strength {vectors.strength:g}, "
        f"{length}"
    )


def _name(model: Any) -> Any:
    """A folder on somebody's machine by its last name; a hub id as it is."""
    return Path(model).name if isinstance(model, str) and Path(model).is_absolute() else model


def _method(metadata: Mapping[str, Any]) -> str:
    method = metadata.get("method")
    details = {
        "": metadata.get("aggregate"),
        "k = ": metadata.get("k"),
        "signs ": metadata.get("signs"),
    }
    words = [f"{name}{value}" for name, value in details.items() if value is not None]
    return ", ".join(map(str, [method, *words])) if method is not None else ""


def _refined(refine: Mapping[str, Any]) -> str:
    if not refine:
        return ""
    words = [f"{refine['n_pairs']} pairs"] if "n_pairs" in refine else []
    if "best_step" in refine:
        words.append(f"step {refine['best_step']} was best")
    return ", ".join(words) or "yes"


def _tuned(tuning: Mapping[str, Any]) -> str:
    chosen, before = mapping(tuning, "chosen"), mapping(tuning, "unsteered")
    after = number(chosen.get("accuracy"))
    start = number(before.get("accuracy"))
    ratio = number(chosen.get("perplexity_ratio"))
    words = []
    if after is not None:
        known = "" if start is None else f"{100 * start:.1f} % → "
        words.append(f"{known}{100 * after:.1f} % of {tuning.get('n_pairs', 'the')} dev pairs")
    if ratio is not None:
        words.append(f"perplexity {ratio:.3f}x")
    return ", ".join(words)


def mapping(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = of.get(name)
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return number if math.isfinite(number) else None


def _cosine(value: Any) -> str:
    cosine = number(value)
    return "" if cosine is None else f"{cosine:+.2f}"
