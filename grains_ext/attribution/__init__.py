"""Which prompt tokens push a model toward its answers: contrastive Integrated Gradients."""

from grains_ext.attribution.engine import attribute
from grains_ext.attribution.result import Attribution

__all__ = ["Attribution", "attribute"]
