"""Integrated Gradients that knows its error, and looks closer where it is large.

A gradient at a point of the path comes with f there. So between any two neighbouring points the
attributions, integrated along a cubic spline, must sum to the change of f: a test of every interval
that costs nothing. Intervals that fail it are halved; no point is ever thrown away. On trained
models with a token baseline this took a half to two thirds of the points that the midpoint rule
needs for the same error, and less than panels of Gauss or Patterson nodes, which crowd at the ends
of the path where nothing happens (docs/decisions/006).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import CubicSpline

from grains_ext.attribution.points import Dialogue, OnPath, Outcome, Path
from grains_ext.attribution.rules import within
from grains_ext.attribution.settings import Settings

Array = npt.NDArray[np.float64]

# Fewer stop too early by luck; more are wasted on smooth paths.
_FIRST_INTERVALS = 12
# In one round all intervals are halved whose error is this share of the largest: fewer rounds, at
# the price of some points.
_SHARE = 0.3
# Narrower ones are not halved: f jumps there.
_NARROWEST = 1e-4
_MOST_STEPS = 128
# A gradient at the baseline that many times larger than any other is no part of a smooth path.
_SINGULAR = 100.0


@dataclass(frozen=True)
class _Integral:
    """What is known of a path after some points."""

    scores: Array
    """[T]."""
    errors: Array
    """Of each interval: its scores' sum less the change of f."""
    bends: Array
    """Of each interval: how far the spline is from the straight line, over tokens summed."""


def adaptive(path: Path, settings: Settings) -> Dialogue:
    """Halves intervals until the errors are within the tolerance and the scores stand still.

    The scores stand still when the last round moved them, together, by no more than the tolerance's
    share of their absolute sum; with ``top_k``, when the k largest scores and the k smallest are
    those of the round before.
    """
    # Three points at least: the coarser path below is made of every second one.
    most = _MOST_STEPS if settings.n_steps == "auto" else max(3, int(settings.n_steps))
    # f is no more exact than the numbers it is computed in.
    resolution = torch.finfo(path.input.dtype).eps
    intervals = min(_FIRST_INTERVALS, most - 1)
    alphas = np.linspace(0.0, 1.0, intervals - intervals % 2 + 1)
    found = yield OnPath(alphas, gradients=True)
    values, at_tokens = found.values, found.at_tokens
    # Before the first round stands the coarser path of every second point.
    before = _integral(alphas[::2], values[::2], at_tokens[::2]).scores
    while True:
        integral = _integral(alphas, values, at_tokens)
        change = float(values[-1] - values[0])
        noise = resolution * max(1.0, float(np.abs(values).max()))
        errors = np.where(np.abs(integral.errors) > noise, np.abs(integral.errors), 0.0)
        scale = max(abs(change), float(np.abs(integral.scores).sum()))
        moved = float(np.abs(integral.scores - before).sum())
        if settings.top_k is None:
            still = within(moved, scale, settings.tolerance)
        else:
            still = _strongest(before, settings.top_k) == _strongest(
                integral.scores, settings.top_k
            )
        complete = within(float(integral.errors.sum()), change, settings.tolerance)
        if still and complete:
            break
        # The test sees sums over tokens. Where it finds nothing and the scores move even so, errors
        # of tokens cancel: then what counts is how far from straight their gradients are.
        seen = not within(float(errors.sum()), scale, settings.tolerance) or not complete
        doubtful = errors if seen else integral.bends
        doubtful = np.where(np.diff(alphas) > _NARROWEST, doubtful, 0.0)
        due = np.flatnonzero((doubtful >= _SHARE * doubtful.max()) & (doubtful > 0))
        due = due[np.argsort(-doubtful[due])][: most - len(alphas)]
        if len(due) == 0:
            break
        new = (alphas[due] + alphas[due + 1]) / 2
        found = yield OnPath(new, gradients=True)
        order = np.argsort(np.concatenate([alphas, new]), kind="stable")
        alphas = np.concatenate([alphas, new])[order]
        values = np.concatenate([values, found.values])[order]
        at_tokens = np.concatenate([at_tokens, found.at_tokens])[order]
        before = integral.scores
    return Outcome(
        scores=integral.scores,
        f_input=float(values[-1]),
        f_baseline=float(values[0]),
        n_steps=len(alphas),
        evaluations=len(alphas),
        converged=still and complete,
    )


def _integral(alphas: Array, values: Array, at_tokens: Array) -> _Integral:
    """The spline through the gradients at the tokens, [n, T], integrated interval by interval."""
    sizes = np.abs(at_tokens).sum(-1)
    # Norms scale an infinitesimal input up to unit size: at a zero baseline the gradient is huge
    # and belongs to no interval of any width.
    first = 1 if len(alphas) > 2 and sizes[0] > _SINGULAR * sizes[1:].max() else 0
    per_interval = _weights(tuple(alphas), first) @ at_tokens[first:]
    straight = np.diff(alphas)[:, None] * (at_tokens[1:] + at_tokens[:-1]) / 2
    return _Integral(
        scores=per_interval.sum(0),
        errors=per_interval.sum(-1) - np.diff(values),
        bends=np.abs(per_interval - straight).sum(-1),
    )


@lru_cache(maxsize=64)  # every pair begins at the same points
def _weights(alphas: tuple[float, ...], first: int) -> Array:
    """[n - 1, n - first]: each interval's integral, linear in the values from ``first`` on."""
    spline = CubicSpline(alphas[first:], np.eye(len(alphas) - first), extrapolate=True)
    return np.diff(spline.antiderivative()(alphas), axis=0)


def _strongest(scores: Array, k: int) -> tuple[frozenset[int], frozenset[int]]:
    rising = np.argsort(scores, kind="stable")
    return (
        frozenset(int(i) for i in rising[-k:] if scores[i] > 0),
        frozenset(int(i) for i in rising[:k] if scores[i] < 0),
    )
