"""The rivals of the benchmark compute what attribute does, so that their times compare."""

from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from benchmarks import attribution_rivals as rivals
from benchmarks.gemm_floor import Evaluation, GemmFloor
from benchmarks.shapes import TINY, random_model, random_pairs, word_tokenizer
from grains_ext.attribution.sequences import Answer, pack
from grains_ext.encoding import EncodedPair, encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.timing import relative_to, take_turns

TOKENIZER = word_tokenizer(128)
# One-token and several-token answers; answers of different lengths; a first token in common.
PAIRS = [
    *random_pairs(1, 9, 1, vocab_size=128),
    *random_pairs(1, 7, 3, vocab_size=128),
    PreferencePair("w20 w21 w22 w23", "w30", "w31 w32 w33"),
    PreferencePair("w40 w41 w42", "w50 w51", "w50 w52"),
]


@cache
def model_of(family: str) -> PreTrainedModel:
    return random_model(TINY[family]).requires_grad_(False)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, two for each multiplication and addition."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def assert_same(found: rivals.Scores, expected: rivals.Scores) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["riemann_middle", "gausslegendre"])
@pytest.mark.parametrize("name", ["loop", "captum expert", "captum expert, error", "captum LLM"])
def test_rivals_agree_with_ours_at_equal_nodes(name: str, family: str, method: str) -> None:
    if name.startswith("captum"):
        pytest.importorskip("captum", reason="captum is not installed")
    rival = rivals.available()[name]
    found = rival(model_of(family), TOKENIZER, PAIRS, method=method, n_steps=5, max_batch_tokens=60)
    expected = rivals.ours(model_of(family), TOKENIZER, PAIRS, method=method, n_steps=5)
    assert_same(found, expected)


def test_inseq_agrees_for_one_token_from_its_own_baseline() -> None:
    pytest.importorskip("inseq", reason="inseq is not installed")
    [pair] = PAIRS[:1]
    model, rule = model_of("llama"), {"method": "gausslegendre", "n_steps": 5}
    unknown = model.get_input_embeddings().weight[0]
    start = unknown.expand(len(encode_pair(TOKENIZER, pair).prompt_ids), -1).clone()
    expected = rivals.ours(model, TOKENIZER, [pair], **rule, baseline=start)
    assert_same(rivals.inseq_contrastive(model, TOKENIZER, [pair], **rule), expected)


def test_random_models_tell_tokens_apart() -> None:
    for family in TINY:
        results = rivals.ours(
            model_of(family), TOKENIZER, PAIRS, method="riemann_middle", n_steps=64
        )
        for scores in results:
            assert np.abs(scores[1:]).min() > 0
            assert np.abs(scores).sum() > 0.1


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (EncodedPair((1, 9), (5,), (6,)), Evaluation(2, 1)),
        (EncodedPair((1, 9), (5, 7, 8), (6,)), Evaluation(4, 3)),
        (EncodedPair((1, 9), (5, 7, 8), (6, 7)), Evaluation(5, 4)),
        (EncodedPair((1, 9), (5, 7, 8), (5, 6, 8)), Evaluation(5, 3)),
        (EncodedPair((1, 9), (5, 7), (5, 8)), Evaluation(3, 1)),
    ],
)
def test_floor_counts_the_tokens_that_must_be_read(pair: EncodedPair, expected: Evaluation) -> None:
    assert Evaluation.of(pair) == expected
    answers = [
        Answer(ids, (w,) * len(ids))
        for ids, w in ((pair.chosen_ids, 1.0), (pair.rejected_ids, -1.0))
    ]
    [packed] = pack(pair.prompt_ids, answers, tree=True)
    assert len(packed) == expected.n_tokens
    assert len({target.column for target in packed.targets}) == expected.n_scored
    assert packed.n_normalised == expected.n_scored - 1


@pytest.mark.parametrize("family", TINY)
def test_floor_is_the_flops_that_torch_counts(family: str) -> None:
    """Of the products alone, in the calls that it makes."""
    evaluations = [Evaluation(9, 3)] * 5 + [Evaluation(6, 1)]
    floor = GemmFloor(model_of(family), evaluations, values=evaluations[:3], max_batch_tokens=20)
    with Products() as products:
        floor()
    assert products.flops == floor.flops


def test_slow_candidates_sit_out_later_rounds() -> None:
    called: list[str] = []
    candidates = {name: partial(called.append, name) for name in ("slow", "fast")}
    clock = count(step=5.0)  # what a call takes, by this clock
    seconds = take_turns(candidates, rounds=6, clock=lambda: float(next(clock)), slow_seconds=12.0)
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 3, "fast": 3}
    assert called == ["slow", "fast"] * 1 + ["fast", "slow"] + ["slow", "fast"]
    ratio = relative_to("slow", {"slow": [1.0, 2.0, 4.0], "fast": [0.5, 1.0]})["fast"].ratio
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 0.5, 0.5)


def test_no_attribution_does_less_than_the_floor() -> None:
    model, pairs = random_model(TINY["llama"], attention="eager"), PAIRS[1:2]
    model.requires_grad_(False)
    floor = GemmFloor(model, [Evaluation.of(encode_pair(TOKENIZER, pairs[0]))] * 8)
    totals = {}
    for name, run in {**rivals.available(), "ours": rivals.ours}.items():
        with Products() as products:
            run(model, TOKENIZER, pairs, method="gausslegendre", n_steps=8)
        totals[name] = products.flops
    assert floor.flops <= min(totals.values())
    assert totals["ours"] == min(totals.values())
