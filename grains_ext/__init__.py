"""Gradient-attribution steering of language and vision-language models.

    import grains_ext as grains

    pairs = grains.load_pairs("pairs.jsonl")
    vectors = grains.fit(model, tokenizer, pairs)
    with vectors.applied(model, strength=1.0):
        model.generate(...)

The names below are imported when they are first used: ``import grains_ext`` alone is quick and
needs neither transformers nor onnxruntime.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grains_ext.attribution import Attribution, attribute, load_attributions
    from grains_ext.decoder import DecoderView
    from grains_ext.evaluation import EvaluationReport, evaluate
    from grains_ext.pairs import PreferencePair, load_pairs, save_pairs
    from grains_ext.steering import SteeringVectors, fit, tune
    from grains_ext.steering.refine import refine

__version__ = "0.1.0"

_HOMES = {
    "Attribution": "grains_ext.attribution",
    "attribute": "grains_ext.attribution",
    "load_attributions": "grains_ext.attribution",
    "DecoderView": "grains_ext.decoder",
    "EvaluationReport": "grains_ext.evaluation",
    "evaluate": "grains_ext.evaluation",
    "PreferencePair": "grains_ext.pairs",
    "load_pairs": "grains_ext.pairs",
    "save_pairs": "grains_ext.pairs",
    "SteeringVectors": "grains_ext.steering",
    "fit": "grains_ext.steering",
    "refine": "grains_ext.steering",
    "tune": "grains_ext.steering",
}

__all__ = [
    "Attribution",
    "DecoderView",
    "EvaluationReport",
    "PreferencePair",
    "SteeringVectors",
    "attribute",
    "evaluate",
    "fit",
    "load_attributions",
    "load_pairs",
    "refine",
    "save_pairs",
    "tune",
]


if not TYPE_CHECKING:  # a type checker would take every name, mistyped ones too, for Any

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'grains_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
