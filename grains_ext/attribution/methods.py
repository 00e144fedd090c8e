"""The attribution methods, each for one pair; the adaptive one is in a file of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grains_ext.attribution.adaptive import adaptive
from grains_ext.attribution.points import Dialogue, Noisy, Occluded, OnPath, Outcome, Path
from grains_ext.attribution.rules import DEFAULT_STEPS, RULES, quadrature, within
from grains_ext.attribution.settings import Settings

# Smilkov et al. 2017 found 10 to 20 % of the input's range to work best.
_NOISE = 0.1
_ENDS = OnPath(np.array([0.0, 1.0]), gradients=False)


def method_of(settings: Settings) -> Callable[[Path], Dialogue]:
    """The method that the settings name, ready to be begun for each pair."""
    n_steps = DEFAULT_STEPS if settings.n_steps == "auto" else int(settings.n_steps)
    match settings.method:
        case "adaptive":
            return lambda path: adaptive(path, settings)
        case "gradient_x_input":
            return lambda path: _sampled(Noisy(1, 0.0, settings.seed))
        case "smoothgrad":
            return lambda path: _sampled(Noisy(n_steps, _NOISE, settings.seed))
        case "occlusion":
            return _occlusion
        case rule if rule in RULES:
            return lambda path: _fixed_rule(rule, n_steps, settings.tolerance)
    raise ValueError(f"no method {settings.method!r}")


def _fixed_rule(rule: str, n_steps: int, tolerance: float) -> Dialogue:
    """Integrated Gradients with a quadrature rule (Sundararajan, Taly, Yan 2017, equation 1)."""
    ends = yield _ENDS
    f_baseline, f_input = ends.values
    nodes, weights = quadrature(rule, n_steps)
    found = yield OnPath(nodes, gradients=True)
    scores = weights @ found.at_tokens
    change = f_input - f_baseline
    return Outcome(
        scores=scores,
        f_input=f_input,
        f_baseline=f_baseline,
        n_steps=n_steps,
        evaluations=n_steps + 2,
        converged=within(scores.sum() - change, change, tolerance),
    )


def _sampled(points: Noisy) -> Dialogue:
    """Gradient x input, averaged over noisy copies of the input.

    Without noise: Shrikumar et al. 2016. With noise: SmoothGrad, Smilkov et al. 2017, times the
    input. Neither promises that scores sum to the change of f.
    """
    ends = yield _ENDS
    f_baseline, f_input = ends.values
    found = yield points
    return Outcome(
        scores=found.at_tokens.mean(0),
        f_input=f_input,
        f_baseline=f_baseline,
        n_steps=points.count,
        evaluations=points.count + 2,
        converged=True,
    )


def _occlusion(path: Path) -> Dialogue:
    """f less what it is with one token at its baseline, token by token (Zeiler and Fergus 2014)."""
    ends = yield _ENDS
    f_baseline, f_input = ends.values
    tokens = path.moving
    found = yield Occluded(tokens)
    scores = np.zeros(len(path.input))
    scores[tokens] = f_input - found.values
    return Outcome(
        scores=scores,
        f_input=f_input,
        f_baseline=f_baseline,
        n_steps=len(tokens),
        evaluations=len(tokens) + 2,
        converged=True,
    )
