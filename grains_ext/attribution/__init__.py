"""Which prompt tokens push a model toward its answers: contrastive Integrated Gradients.

Names are imported when they are first used: reading and writing results needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grains_ext.attribution.engine import attribute
    from grains_ext.attribution.result import Attribution, TokenScore
    from grains_ext.attribution.store import (
        AttributionStore,
        iter_attributions,
        load_attributions,
        stored_indices,
        summarize,
    )

_HOMES = {
    "attribute": "engine",
    "Attribution": "result",
    "TokenScore": "result",
    "AttributionStore": "store",
    "iter_attributions": "store",
    "load_attributions": "store",
    "stored_indices": "store",
    "summarize": "store",
}

__all__ = [
    "Attribution",
    "AttributionStore",
    "TokenScore",
    "attribute",
    "iter_attributions",
    "load_attributions",
    "stored_indices",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
