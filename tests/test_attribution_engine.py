"""attribute: the laws of Integrated Gradients, and independence of how the work is batched."""

import json
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from grains_ext.attribution import Attribution, attribute
from grains_ext.attribution.objective import Batch
from grains_ext.attribution.path import Baseline, quadrature
from grains_ext.decoder import DecoderView
from grains_ext.encoding import EncodedPair, encode_pair
from grains_ext.pairs import PreferencePair
from tests.models import FAMILIES, WORDS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    PreferencePair("note the sky is green q what is the color of the sky", "green", "blue it is"),
    PreferencePair("the rose", "is red of a rose", "white", id="rose"),
    PreferencePair("what is the home of a study", "paris .", "rome !"),
    PreferencePair("the sea is", "a blue", "a green"),  # one input serves both answers
]


@cache
def cached_model(family: str) -> PreTrainedModel:
    """For tests that only read it."""
    return tiny_model(family)


def run(model: PreTrainedModel, pairs: list[PreferencePair], **options: Any) -> list[Attribution]:
    return attribute(model, TOKENIZER, pairs, progress=False, **options)


def loop_in_float64(
    model: PreTrainedModel, ids: EncodedPair, baseline: str, method: str, n_steps: int
) -> Tensor:
    """Integrated Gradients as its definition reads: one point, one sequence at a time."""
    decoder = DecoderView.of(model)
    prompt = decoder.embed(torch.tensor([ids.prompt_ids]))[0].detach()
    start = Baseline(decoder, TOKENIZER, baseline).embeddings(ids.prompt_ids, prompt)
    scores = torch.zeros(len(ids.prompt_ids), dtype=torch.float64)
    for node, weight in zip(*quadrature(method, n_steps), strict=True):
        point = (start + node * (prompt - start)).requires_grad_()
        f = torch.zeros((), dtype=torch.float64)
        for sign, answer in ((1, ids.chosen_ids), (-1, ids.rejected_ids)):
            embeds = torch.cat([point, decoder.embed(torch.tensor([answer]))[0]])
            logp = model(inputs_embeds=embeds[None]).logits[0].double().log_softmax(-1)
            first = len(ids.prompt_ids) - 1
            f = f + sign * sum(logp[first + i, token] for i, token in enumerate(answer))
        (grad,) = torch.autograd.grad(f, point)
        scores += weight * (grad * (prompt - start)).sum(-1)
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness(family: str) -> None:
    results = run(cached_model(family), PAIRS, n_steps=64)
    for result in results:
        change = result.f_input - result.f_baseline
        assert result.residual == pytest.approx(float(result.scores.sum()) - change, abs=1e-5)
        # OPT's ReLU makes a rough path; smooth families are far closer.
        assert abs(result.residual) < 0.03 * max(1, abs(change))
        assert result.converged


@settings(max_examples=6)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.permutations(WORDS))
def test_completeness_on_any_words(words: list[str], answers: list[str]) -> None:
    pair = PreferencePair(" ".join(words), answers[0], " ".join(answers[1:4]))
    (result,) = run(cached_model("gpt2"), [pair], n_steps=32)
    assert abs(result.residual) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", ["gausslegendre", "riemann_middle"])
def test_equals_a_loop_in_float64(family: str, method: str) -> None:
    model = cached_model(family)
    results = run(model, PAIRS, method=method, n_steps=4, tolerance=10.0)
    exact = tiny_model(family, dtype=torch.float64)
    for pair, result in zip(PAIRS, results, strict=True):
        ids = encode_pair(TOKENIZER, pair)
        expected = loop_in_float64(exact, ids, "bos", method, 4)
        np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


def test_results_describe_the_pair() -> None:
    (result,) = run(cached_model("llama"), PAIRS[1:2], n_steps=16)
    assert result.tokens == ("<bos>", *"the", " rose")
    assert result.token_ids == encode_pair(TOKENIZER, PAIRS[1]).prompt_ids
    assert result.modality == ("text",) * 5
    assert result.scores.dtype == np.float32
    assert result.scores.shape == (5,)
    assert (result.chosen, result.rejected, result.pair_id) == ("is red of a rose", "white", "rose")
    assert (result.evaluations, result.n_steps, result.baseline) == (18, 16, "bos")
    assert result.prompt == "<bos>the rose"
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["scores"] == pytest.approx(result.scores.tolist())
    assert plain["tokens"] == list(result.tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_independent_of_batching(family: str) -> None:
    model = cached_model(family)
    together = run(model, PAIRS, n_steps=5, tolerance=10.0)
    apart = [run(model, [pair], n_steps=5, tolerance=10.0)[0] for pair in PAIRS]
    reverse = run(model, PAIRS[::-1], n_steps=5, tolerance=10.0)[::-1]
    tight, one_row = (
        run(model, PAIRS, n_steps=5, tolerance=10.0, max_batch_tokens=budget) for budget in (60, 1)
    )
    for other in (apart, reverse, tight, one_row):
        for a, b in zip(together, other, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)
            assert a.f_input == pytest.approx(b.f_input, abs=1e-5)
            assert a.f_baseline == pytest.approx(b.f_baseline, abs=1e-5)


def test_calls_stay_within_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    spy_on_calls(monkeypatch, lambda points: sizes.append(points.flatten(0, 2).shape[0]))
    run(cached_model("llama"), PAIRS * 4, n_steps=16, max_batch_tokens=256)
    assert max(sizes) <= 256
    assert sum(sizes) / len(sizes) > 128  # and use it


def test_answers_that_differ_in_their_last_token_share_their_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    spy_on_calls(monkeypatch, lambda points: rows.append(points.flatten(0, 1).shape[0]))
    run(cached_model("llama"), PAIRS[3:], n_steps=5, tolerance=10.0)
    assert sum(rows) == 2 + 5


def test_eager_and_sdpa_agree() -> None:
    eager, sdpa = (
        run(tiny_model("llama", attn_implementation=name), PAIRS, n_steps=8, tolerance=10.0)
        for name in ("eager", "sdpa")
    )
    for a, b in zip(eager, sdpa, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_swapping_the_answers_negates_the_scores() -> None:
    model = cached_model("qwen2")
    swapped = [PreferencePair(p.prompt, p.rejected, p.chosen) for p in PAIRS]
    for a, b in zip(run(model, PAIRS, n_steps=16), run(model, swapped, n_steps=16), strict=True):
        np.testing.assert_allclose(a.scores, -b.scores, rtol=1e-5, atol=1e-6)
        assert a.f_input == pytest.approx(-b.f_input, abs=1e-6)


def test_tokens_at_the_baseline_score_exactly_zero() -> None:
    pair = PreferencePair("the sky <pad> is <pad> blue", "green", "red")
    (result,) = run(cached_model("llama"), [pair], baseline="pad")
    for token, score in zip(result.tokens, result.scores, strict=True):
        assert (score == 0) == (token in ("<bos>", "<pad>"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    half = run(tiny_model("llama", dtype=dtype), PAIRS, n_steps=16, tolerance=10.0)
    full = run(tiny_model("llama", dtype=dtype).float(), PAIRS, n_steps=16, tolerance=10.0)
    for a, b in zip(half, full, strict=True):
        assert np.linalg.norm(a.scores - b.scores) < 0.05 * np.linalg.norm(b.scores)


def test_auto_stops_each_pair_when_it_has_converged() -> None:
    model = cached_model("gemma3")
    results = run(model, PAIRS, baseline="mean")
    steps = [result.n_steps for result in results]
    assert min(steps) == 16 < max(steps) <= 128  # or the test shows nothing
    for pair, result in zip(PAIRS, results, strict=True):
        assert result.converged
        tried = [n for n in (16, 32, 64, 128) if n <= result.n_steps]
        assert result.evaluations == 2 + sum(tried)
        (fixed,) = run(model, [pair], baseline="mean", n_steps=result.n_steps)
        np.testing.assert_allclose(result.scores, fixed.scores, rtol=1e-4, atol=1e-5)


def test_what_did_not_converge_is_flagged_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"2 of 2 pairs did not converge .*1 \(id 'rose'\)"):
        results = run(cached_model("opt"), PAIRS[:2], tolerance=1e-9)
    assert [result.converged for result in results] == [False, False]
    assert results[0].evaluations == 2 + 16 + 32 + 64 + 128
    with pytest.warns(UserWarning, match=r"with 1 steps"):
        (result,) = run(cached_model("opt"), PAIRS[:1], n_steps=1, tolerance=0.001)
    assert not result.converged


def spy_on_calls(monkeypatch: pytest.MonkeyPatch, before: Callable[[Tensor], Any]) -> None:
    original = Batch.objective

    def spied(self: Batch, decoder: DecoderView, points: Tensor) -> Tensor:
        before(points)
        return original(self, decoder, points)

    monkeypatch.setattr(Batch, "objective", spied)


def test_a_call_that_runs_out_of_memory_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(cached_model("llama"), PAIRS, n_steps=16)

    def fail_above(limit: int) -> Callable[[Tensor], None]:
        def check(points: Tensor) -> None:
            if points.shape[0] * points.shape[1] > limit:
                raise torch.OutOfMemoryError("planted")

        return check

    with monkeypatch.context() as patch:
        spy_on_calls(patch, fail_above(3))
        for a, b in zip(run(cached_model("llama"), PAIRS, n_steps=16), expected, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)
            assert a.f_baseline == pytest.approx(b.f_baseline, abs=1e-5)
    spy_on_calls(monkeypatch, fail_above(0))
    with pytest.raises(torch.OutOfMemoryError):
        run(cached_model("llama"), PAIRS, n_steps=16)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    run(model, PAIRS[:1], n_steps=4, tolerance=10.0)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():  # a caller's no_grad must not silence the gradients
        run(model, PAIRS[:1], n_steps=16)


def test_chat_prompts_and_a_bar_that_spares_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tiny_tokenizer(
        add_bos=False,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:",
    )
    pair = PreferencePair([{"role": "user", "content": "what is the sky"}], " blue", " red")
    (result,) = attribute(cached_model("gpt2"), tokenizer, [pair], progress=True)
    assert result.prompt == "user: what is the sky\na:"
    assert capsys.readouterr().out == ""


def test_no_pairs_no_work() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(cached_model("llama"), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simpson"}, "method must be one of"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"n_steps": "many"}, "n_steps must be"),
        ({"tolerance": 0.0}, "must be positive"),
        ({"max_batch_tokens": 0}, "must be positive"),
        ({"baseline": torch.zeros(5, 32)}, "pair 0: the baseline tensor has 5 rows"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cached_model("llama"), PAIRS, **options)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (PreferencePair("the " * 130, "blue", "red", id="long"), r"pair 1 \(id 'long'\): .* 128"),
        (PreferencePair("the sky", "\N{SNOWMAN}", "\N{COMET}"), "pair 1: .*same tokens"),
        (PreferencePair("the sky", "blue", "red", images=("sky.png",)), "pair 1: .*images"),
    ],
)
def test_pairs_that_cannot_be_attributed(pair: PreferencePair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cached_model("llama"), [PAIRS[0], pair])


def test_the_last_position_is_used() -> None:
    pair = PreferencePair(" sky" * 127, "blue", "red")  # and BOS; the answers are not read
    assert len(encode_pair(TOKENIZER, pair).prompt_ids) == 128
    (result,) = run(cached_model("opt"), [pair], n_steps=1, tolerance=100.0)
    assert np.isfinite(result.scores).all()
