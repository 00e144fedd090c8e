import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.steering.select import Selection, top_tokens


def test_strongest_first_by_sign() -> None:
    scores = [0.1, -3.0, 2.0, 0.0, -0.5, 1.0]
    assert top_tokens(range(6), scores, 2) == Selection((2, 5), (1, 4))
    assert top_tokens(range(6), scores, 10) == Selection((2, 5, 0), (1, 4))


def test_excluded_tokens_and_ties() -> None:
    assert top_tokens([1, 7, 8, 9], [5.0, 1.0, 1.0, 1.0], 2, exclude_ids={1}).positive == (1, 2)
    assert top_tokens([1, 1], [5.0, -5.0], 2, exclude_ids={1}) == Selection((), ())


@pytest.mark.parametrize(
    ("scores", "k", "reason"),
    [([1.0], 1, "2 token ids"), ([1.0, 2.0], 0, "k must"), ([1.0, np.nan], 1, "finite")],
)
def test_wrong_arguments(scores: list[float], k: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        top_tokens([4, 5], scores, k)


@given(st.lists(st.floats(-1, 1, width=32), max_size=12), st.integers(1, 15))
def test_no_token_left_out_is_stronger(scores: list[float], k: int) -> None:
    selection = top_tokens(range(len(scores)), scores, k)
    for sign, chosen in ((1, selection.positive), (-1, selection.negative)):
        pushes = [sign * score for score in scores]
        eligible = [i for i, push in enumerate(pushes) if push > 0]
        assert len(chosen) == len(set(chosen)) == min(k, len(eligible))
        assert set(chosen) <= set(eligible)
        rest = [pushes[i] for i in eligible if i not in chosen]
        assert not rest or max(rest) <= min(pushes[i] for i in chosen)
