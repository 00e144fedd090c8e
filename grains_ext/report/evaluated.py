"""What `EvaluationReport.as_dict` wrote, as figures and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grains_ext.report.parts import (
    Answers,
    Asked,
    Change,
    Figure,
    HeldOut,
    Interval,
    Measured,
    Parts,
    Said,
)
from grains_ext.report.text import of_prompt

FORMAT, VERSION = "grains.evaluation", 1


def evaluation(content: Mapping[str, Any], title: str) -> Parts:
    """Raises KeyError, TypeError or ValueError where something is missing or of another kind."""
    conditions: Mapping[str, Any] = content["conditions"]
    changes: Mapping[str, Any] = content["changes"]
    names = list(dict.fromkeys(name for each in conditions.values() for name in each["figures"]))
    figures = []
    for name in names:
        measured = [
            _measured(condition, each["figures"][name], changes.get(condition, {}).get(name))
            for condition, each in conditions.items()
            if name in each["figures"]
        ]
        is_share = any("successes" in each["figures"].get(name, {}) for each in conditions.values())
        figures.append(Figure(name, is_share, tuple(measured)))
    held_out = HeldOut(title, tuple(figures), int(content["n_pairs"]))
    asked = _asked(content, title)
    return Parts(held_out=(held_out,), answers=(asked,) if asked.asked else ())


def _measured(condition: str, figure: Mapping[str, Any], change: Any) -> Measured:
    return Measured(
        condition,
        _number(figure["value"]),
        _interval(figure),
        int(figure["n"]),
        change=None if change is None else _change(change),
    )


def _change(fields: Mapping[str, Any]) -> Change | None:
    difference = _number(fields["difference"])
    if difference is None:
        return None
    return Change(
        difference, _interval(fields), fields["gained"], fields["lost"], _number(fields["p_value"])
    )


def _asked(content: Mapping[str, Any], title: str) -> Answers:
    conditions: Mapping[str, Any] = content["conditions"]
    rows = []
    columns = [each["outcomes"] for each in conditions.values()]
    for number, (pair, *outcomes) in enumerate(zip(content["pairs"], *columns, strict=True)):
        rows.append(
            Asked(
                of_prompt(pair["prompt"]),
                str(pair["chosen"]),
                tuple(
                    Said(
                        None if each["generated"] is None else str(each["generated"]),
                        each["says_chosen"],
                        _number(each["margin"]),
                    )
                    for each in outcomes
                ),
                str(pair["rejected"]),
                str(number if pair["id"] is None else pair["id"]),
            )
        )
    return Answers(title, tuple(conditions), tuple(rows))


def _interval(fields: Mapping[str, Any]) -> Interval | None:
    low, high = _number(fields["low"]), _number(fields["high"])
    return None if low is None or high is None else (low, high)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
