"""Which prompt tokens push a model toward its answers: contrastive Integrated Gradients."""

from grains_ext.attribution.engine import attribute
from grains_ext.attribution.result import Attribution, TokenScore
from grains_ext.attribution.store import (
    AttributionStore,
    iter_attributions,
    load_attributions,
    stored_indices,
    summarize,
)

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
