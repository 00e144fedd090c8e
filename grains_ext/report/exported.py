"""A folder that `export_model` wrote, as a page shows it: what it is, and how far from torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grains_ext.report.parts import Exported, ParityRow, Parts, RateRow
from grains_ext.report.text import blocks_words


def exported(record: Mapping[str, Any], folder: Path, title: str) -> Parts:
    """record: the folder's grains_export.json.

    Raises KeyError, TypeError or ValueError where something is missing or of another kind.
    """
    parity = record["parity"]
    operators = Counter(entry["op_type"] for entry in record["steered"])
    blocks = sorted({entry["block"] for entry in record["steered"]})
    graphs = ("model", "vision", "embedding")  # the latter two of models that read images
    size = sum(path.stat().st_size for name in graphs for path in folder.glob(f"{name}.onnx*"))
    facts: dict[str, object] = {
        "model type": record["model_type"],
        "float type": record["dtype"],
        "weights": record["quantize"] or "not quantised",
        "steered blocks": blocks_words(blocks),
        "strength": f"{record['strength']:g}",
        "operators": ", ".join(f"{n} {name}" for name, n in operators.items()),
        "opset": record["opset"],
    }
    if size:
        facts["graph and weights"] = f"{size / 1e6:,.1f} MB"
    if parity is None:
        facts["verified"] = "no: it was exported with --no-verify"
        return Parts(exported=(Exported(title, facts),))
    facts["verified over"] = f"prefill and {parity['steps']} cached steps"
    if parity["fused_nodes"]:
        facts["run by the op library"] = ", ".join(
            f"{n} {name}" for name, n in parity["fused_nodes"].items()
        )
    return Parts(exported=(Exported(title, facts, _parity_rows(parity)),))


def _parity_rows(parity: Mapping[str, Any]) -> tuple[ParityRow, ...]:
    quantized = parity["quantization"]
    exact, is_final = ("", True) if quantized is None else ("before quantising, ", False)
    rows = [_row(f"{exact}stock onnxruntime, against torch", parity["stock"], is_final)]
    if parity["library"] is not None:
        name = f"{exact}with the op library, against torch"
        rows.append(_row(name, parity["library"], is_final))
    if quantized is not None:
        rows += [
            _row("quantised, unsteered, against torch", quantized["weights"]),
            _row("quantised, steered, against steered torch", quantized["steered"], True),
            _row("quantised at strength 0, against unsteered", quantized["strength_zero"]),
            _row("quantised, with the op library against without", quantized["runtimes"]),
        ]
    return tuple(rows)


def _row(name: str, runtime: Mapping[str, Any], is_error: bool = False) -> ParityRow:
    prefill, decode, relative = (float(runtime[of]) for of in ("prefill", "decode", "relative"))
    return ParityRow(name, prefill, decode, relative, is_error)


def demo_rates(rates: Mapping[str, Any], title: str) -> Exported:
    """Of {name: {"tokens_per_second": {median, low, high}, "relative_to_unsteered": ...}}."""
    rows = [
        _rate_row(name, rate["tokens_per_second"], rate["relative_to_unsteered"])
        for name, rate in rates.items()
    ]
    return Exported(title, rates=tuple(rows))


def benchmark(content: Mapping[str, Any], title: str) -> Parts:
    """What `grains bench` measured, of the parts that count something per second.

    Raises KeyError, TypeError or ValueError where something is missing or of another kind.
    """
    found = []
    for part in content["parts"]:
        rows = []
        for each in part["measured"] if part["per_second"] else ():
            seconds, ratio = each["seconds"], each["ratio"]
            per_turn = part["per_second"][each["name"]] * seconds["median"]
            rate = {name: per_turn / seconds[of] for name, of in _TURNED.items()}
            speed = {name: 1 / ratio[of] for name, of in _TURNED.items()}
            rows.append(_rate_row(each["name"], rate, speed))
        if rows:
            heading = f"{title}: {part['title']}"
            shown = Exported(
                heading,
                rates=tuple(rows),
                unit=part["unit"],
                spread="quartiles",
                baseline=part["baseline"],
            )
            found.append(shown)
    return Parts(exported=tuple(found))


# A long time is a low rate.
_TURNED = {"median": "median", "low": "high", "high": "low"}


def _rate_row(name: str, rate: Mapping[str, Any], ratio: Mapping[str, Any]) -> RateRow:
    return RateRow(
        name,
        float(rate["median"]),
        (float(rate["low"]), float(rate["high"])),
        float(ratio["median"]),
        (float(ratio["low"]), float(ratio["high"])),
    )
