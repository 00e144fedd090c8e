"""What the model reads for a pair, and which terms of the objective are scored on it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.attribution.objective import answers_of
from grains_ext.attribution.sequences import Answer, Packed, Target, common_prefix, pack
from grains_ext.encoding import EncodedPair

PROMPT = (1, 5, 6)
tokens = st.lists(st.integers(10, 13), min_size=1, max_size=5).map(tuple)


def pair(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> EncodedPair:
    return EncodedPair(PROMPT, chosen, rejected)


def only_row(ids: EncodedPair, objective: str = "sum") -> Packed:
    (row,) = pack(PROMPT, answers_of(ids, objective), tree=True)
    return row


def test_one_token_answers_share_everything() -> None:
    row = only_row(pair((10,), (20,)))
    assert row.token_ids == PROMPT
    assert row.targets == (Target(2, 10, 1.0), Target(2, 20, -1.0))
    assert not row.is_tree
    assert (row.n_scored, row.n_normalised) == (1, 0)


def test_answers_part_after_what_both_begin_with() -> None:
    row = only_row(pair((10, 11, 12), (10, 20, 21, 22)))
    assert row.token_ids == (*PROMPT, 10, 11, 20, 21)
    assert row.depths == (0, 1, 2, 3, 4, 4, 5)
    assert row.branches == (0, 0, 0, 0, 1, 2, 2)
    # The first token of both cancels, and at the parting the normaliser does.
    assert [target.column for target in row.targets] == [3, 3, 4, 5, 6]
    assert row.n_normalised == 3
    assert row.columns == ((2, 3, 4), (2, 3, 5, 6))
    expected = torch.ones(7, 7).tril().bool()
    expected[5:, 4] = False  # the second branch does not see the first
    assert torch.equal(row.allowed(), expected)


def test_a_model_s_own_mask_is_laid_out_along_the_branches() -> None:
    row = only_row(pair((10, 11), (20, 21)))
    linear = torch.ones(5, 5).tril().bool()
    linear[0, 1] = True  # image tokens see each other
    linear[4, 0] = False  # a window
    allowed = row.allowed(linear)
    assert allowed[0, 1]
    assert not allowed[0, 2]
    for packed_row, depth in enumerate(row.depths):
        for column, other in enumerate(row.depths):
            apart = row.branches[column] not in (0, row.branches[packed_row])
            assert allowed[packed_row, column] == (bool(linear[depth, other]) and not apart)


@given(tokens, tokens)
def test_every_answer_is_read_as_if_alone(
    chosen: tuple[int, ...], rejected: tuple[int, ...]
) -> None:
    if chosen == rejected:
        return
    ids = pair(chosen, rejected)
    (row,) = pack(PROMPT, [Answer(a, (1.0,) * len(a)) for a in (chosen, rejected)], tree=True)
    allowed = row.allowed()
    for answer, columns in zip((chosen, rejected), row.columns, strict=True):
        for place, column in enumerate(columns):
            seen = allowed[column].nonzero().flatten().tolist()
            assert tuple(row.token_ids[c] for c in seen) == (*PROMPT, *answer[:place])
            assert [row.depths[c] for c in seen] == list(range(len(seen)))
    shared = common_prefix(chosen[:-1], rejected[:-1])
    assert len(row) == len(PROMPT) + len(chosen) + len(rejected) - 2 - shared
    apart = pack(PROMPT, answers_of(ids, "sum"), tree=False)
    assert [r.token_ids for r in apart] == [(*PROMPT, *a[:-1]) for a in (chosen, rejected)]
    assert not any(r.is_tree for r in apart)


def test_objectives_weigh_tokens() -> None:
    ids = pair((10, 11), (10, 20, 21))
    weights = {
        name: [answer.weights for answer in answers_of(ids, name)]
        for name in ("sum", "mean", "first", "chosen", "rejected")
    }
    assert weights["sum"] == [(1, 1), (-1, -1, -1)]
    assert weights["mean"] == [(0.5, 0.5), (-1 / 3,) * 3]
    assert weights["first"] == [(0, 1), (-0, -1, -0)]
    assert weights["chosen"] == [(1, 1)]
    assert weights["rejected"] == [(1, 1, 1)]
    assert only_row(ids, "first").token_ids == (*PROMPT, 10)
    assert only_row(ids, "chosen").token_ids == (*PROMPT, 10)


@pytest.mark.parametrize(
    ("chosen", "rejected", "objective", "message"),
    [
        ((10,), (10,), "sum", "same tokens"),
        ((10,), (10, 11), "first", "begins with the whole other"),
        ((10,), (11,), "best", "objective must be one of"),
    ],
)
def test_objectives_that_do_not_exist(
    chosen: tuple[int, ...], rejected: tuple[int, ...], objective: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answers_of(pair(chosen, rejected), objective)
