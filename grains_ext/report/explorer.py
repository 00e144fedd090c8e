"""Many rows on one page: the first ones as HTML, the others as data that the page's script draws.

A row is {"html": its markup, "text": what is searched, ...what it is filtered and sorted by}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grains_ext.report.text import all_fit_to_show

if TYPE_CHECKING:
    from markupsafe import Markup

FIRST = 20
"""Rows that stand on the page without the script, and that each "Show more" adds."""


def explorer(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``first``: the markup of the first rows; ``data``: all of them for the script."""
    data = [
        {**row, "html": None} if number < FIRST else dict(row) for number, row in enumerate(rows)
    ]
    return {
        "first": [row["html"] for row in rows[:FIRST]],
        "data": as_script({"step": FIRST, "rows": data}),
    }


def as_script(data: Any) -> Markup:
    """JSON that may stand in a <script>: no text can end the element or begin a comment."""
    from markupsafe import Markup

    text = json.dumps(
        _finite(all_fit_to_show(data)), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
