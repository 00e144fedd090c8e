"""Steering: from preference pairs to directions, and from directions to a steered model."""

from grains_ext.steering.apply import SteeringHandle
from grains_ext.steering.baselines import fit_caa, fit_random_direction, fit_random_tokens
from grains_ext.steering.calibrate import STRENGTHS, tune
from grains_ext.steering.fitting import fit
from grains_ext.steering.vectors import SteeringVectors

__all__ = [
    "STRENGTHS",
    "SteeringHandle",
    "SteeringVectors",
    "fit",
    "fit_caa",
    "fit_random_direction",
    "fit_random_tokens",
    "tune",
]
