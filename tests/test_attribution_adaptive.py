"""The adaptive rule on functions whose integrals are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.attribution.adaptive import adaptive
from grains_ext.attribution.points import Evaluated, Outcome, Path
from grains_ext.attribution.settings import Settings

Array = npt.NDArray[np.float64]
PATH = Path(0, torch.ones(2, 1), torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))


def solve(
    f: Callable[[Array], Array],
    gradient: Callable[[Array], Array],
    path: Path = PATH,
    **options: Any,
) -> Outcome:
    """Runs the rule on f(alpha) with per-token gradients [n, T] that sum to f'."""
    dialogue = adaptive(path, Settings(**options))
    points: Any = next(dialogue)
    while True:
        try:
            points = dialogue.send(Evaluated(f(points.alphas), gradient(points.alphas)))
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


def two_tokens(a: Array, b: Array) -> Array:
    return np.stack([a, b], axis=-1)


def test_a_smooth_path_takes_the_first_points_only() -> None:
    outcome = solve(
        lambda x: x + x**3, lambda x: two_tokens(np.ones_like(x), 3 * x**2), tolerance=0.01
    )
    assert outcome.converged
    assert outcome.evaluations == outcome.n_steps == 13
    np.testing.assert_allclose(outcome.scores, [1, 1], atol=1e-12)


@given(st.floats(0.02, 0.98), st.floats(2, 300), st.sampled_from([0.05, 0.01]))
def test_a_step_anywhere_is_found(place: float, steepness: float, tolerance: float) -> None:
    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-np.clip(steepness * (x - place), -500, 500)))

    def slope(x: Array) -> Array:
        return steepness * sigmoid(x) * (1 - sigmoid(x))

    outcome = solve(
        lambda x: 5 * sigmoid(x) - 2 * x,
        lambda x: two_tokens(5 * slope(x), np.full_like(x, -2.0)),
        tolerance=tolerance,
    )
    jump = 5 * float(sigmoid(np.array([1.0]))[0] - sigmoid(np.array([0.0]))[0])
    assert outcome.converged
    assert abs(outcome.scores.sum() - (jump - 2)) <= tolerance * max(1, abs(jump - 2))
    np.testing.assert_allclose(outcome.scores, [jump, -2], atol=3 * tolerance * (jump + 2))


def test_points_gather_where_the_path_is_steep() -> None:
    seen: list[float] = []

    def f(x: Array) -> Array:
        seen.extend(x)
        return np.asarray(np.tanh(200 * (x - 0.7)))

    solve(f, lambda x: two_tokens(200 / np.cosh(200 * (x - 0.7)) ** 2, 0 * x))
    late = np.array(seen[13:])
    assert len(late) > 4
    assert (np.abs(late - 0.7) < 0.2).all()
    assert np.median(np.abs(late - 0.7)) < 0.03


def test_a_jump_is_given_up_and_said() -> None:
    outcome = solve(lambda x: np.where(x < 0.3, 0.0, 4.0), lambda x: two_tokens(0 * x, 0 * x))
    assert not outcome.converged
    assert outcome.evaluations < 128  # and not at the price of all points


def test_the_limit_holds() -> None:
    rough = np.random.default_rng(0)
    for limit in (5, 40):
        outcome = solve(
            lambda x: rough.normal(size=len(x)) * 50,
            lambda x: two_tokens(rough.normal(size=len(x)) * 50, 0 * x),
            n_steps=limit,
        )
        assert not outcome.converged
        assert outcome.evaluations == limit


def test_a_singular_gradient_at_the_baseline_is_left_out() -> None:
    def gradient(x: Array) -> Array:
        return two_tokens(np.where(x == 0, 1e9, 2.0), 0 * x)

    outcome = solve(lambda x: 2 * x, gradient)
    assert outcome.converged
    np.testing.assert_allclose(outcome.scores, [2, 0], atol=1e-9)


def hidden_wave(x: Array) -> Array:
    """Large parts that cancel in the sum over tokens, which is 3."""
    wave = 30 * np.sin(60 * x)
    return two_tokens(4 + wave, -1 - wave)


def test_errors_that_cancel_between_tokens_are_found() -> None:
    outcome = solve(lambda x: 3 * x, hidden_wave, tolerance=0.02)
    assert outcome.converged
    wave = 30 * (1 - np.cos(60)) / 60
    np.testing.assert_allclose(outcome.scores, [4 + wave, -1 - wave], atol=0.05 * 7)


def test_top_k_stops_when_the_strongest_stand_still() -> None:
    exact = solve(lambda x: 3 * x, hidden_wave, tolerance=0.002)
    strongest = solve(lambda x: 3 * x, hidden_wave, tolerance=0.002, top_k=1)
    assert strongest.converged
    assert strongest.evaluations < exact.evaluations
    assert strongest.scores[0] > 0 > strongest.scores[1]


def test_half_precision_noise_is_no_error_of_the_path() -> None:
    path = Path(0, PATH.input.bfloat16(), PATH.baseline.bfloat16(), PATH.attributed)
    noise = np.random.default_rng(0)
    outcome = solve(
        lambda x: 10 * x + noise.normal(size=len(x)) * 0.01,
        lambda x: two_tokens(np.full_like(x, 10.0), 0 * x),
        path=path,
    )
    assert outcome.converged
    assert outcome.evaluations == 13
