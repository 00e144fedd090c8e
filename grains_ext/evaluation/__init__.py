"""How a model does on held-out pairs and texts, before and after steering."""

from grains_ext.evaluation.comparison import EvaluationReport, Measurement, evaluate, measure
from grains_ext.evaluation.intervals import PairedChange, Proportion

__all__ = [
    "EvaluationReport",
    "Measurement",
    "PairedChange",
    "Proportion",
    "evaluate",
    "measure",
]
