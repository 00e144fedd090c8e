"""attribute: the laws of Integrated Gradients, and independence of how the work is batched."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from grains_ext.attribution import Attribution, attribute
from grains_ext.attribution.engine import hash_of_weights
from grains_ext.attribution.forward import Batch
from grains_ext.attribution.objective import ScoredLogits
from grains_ext.attribution.path import Baseline
from grains_ext.attribution.rules import quadrature
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
    # OPT's ReLU makes a rough path: thousands of kinks, which no rule takes at a few points.
    tolerance = 0.05 if family == "opt" else 0.01
    for result in run(cached_model(family), PAIRS, tolerance=tolerance):
        change = result.f_input - result.f_baseline
        assert result.residual == pytest.approx(float(result.scores.sum()) - change, abs=1e-5)
        assert abs(result.residual) <= tolerance * max(1, abs(change))
        assert result.converged


@settings(max_examples=6)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.permutations(WORDS))
def test_completeness_on_any_words(words: list[str], answers: list[str]) -> None:
    pair = PreferencePair(" ".join(words), answers[0], " ".join(answers[1:4]))
    (result,) = run(cached_model("gpt2"), [pair], method="gausslegendre", n_steps=32)
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
    (result,) = run(cached_model("llama"), PAIRS[1:2], method="gausslegendre", n_steps=16)
    assert result.tokens == ("<bos>", *"the", " rose")
    assert result.token_ids == encode_pair(TOKENIZER, PAIRS[1]).prompt_ids
    assert result.modality == ("text",) * 5
    assert result.scores.dtype == np.float32
    assert result.scores.shape == (5,)
    assert (result.chosen, result.rejected, result.pair_id) == ("is red of a rose", "white", "rose")
    assert (result.evaluations, result.n_steps, result.baseline) == (18, 16, "bos")
    assert (result.method, result.objective) == ("gausslegendre", "sum")
    assert result.prompt == "<bos>the rose"
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["scores"] == pytest.approx(result.scores.tolist())
    assert plain["tokens"] == list(result.tokens)


FIXED: dict[str, Any] = {"method": "gausslegendre", "n_steps": 5, "tolerance": 10.0}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [FIXED, {"tolerance": 0.01}], ids=["fixed", "adaptive"])
def test_independent_of_batching(family: str, options: dict[str, Any]) -> None:
    model = cached_model(family)
    together = run(model, PAIRS, **options)
    apart = [run(model, [pair], **options)[0] for pair in PAIRS]
    reverse = run(model, PAIRS[::-1], **options)[::-1]
    tight, one_row = (run(model, PAIRS, **options, max_batch_tokens=n) for n in (60, 1))
    for other in (apart, reverse, tight, one_row):
        for a, b in zip(together, other, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)
            assert a.f_input == pytest.approx(b.f_input, abs=1e-5)
            assert a.f_baseline == pytest.approx(b.f_baseline, abs=1e-5)
            assert a.evaluations == b.evaluations


def test_calls_stay_within_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy_on_calls(monkeypatch)
    run(cached_model("llama"), PAIRS * 4, n_steps=16, max_batch_tokens=256)
    sizes = [rows * columns for rows, columns in calls]
    assert max(sizes) <= 256
    assert sum(sizes) / len(sizes) > 128  # and use it


def test_both_answers_are_read_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run(cached_model("llama"), PAIRS, **FIXED)  # what the model honours is known from here on
    calls = spy_on_calls(monkeypatch)
    for pair in PAIRS:
        run(cached_model("llama"), [pair], **FIXED)
    assert [rows for rows, _ in calls] == [2, 5] * len(PAIRS)


def test_eager_and_sdpa_agree() -> None:
    eager, sdpa = (
        run(tiny_model("llama", attn_implementation=name), PAIRS, **FIXED)
        for name in ("eager", "sdpa")
    )
    for a, b in zip(eager, sdpa, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_swapping_the_answers_negates_the_scores() -> None:
    model = cached_model("qwen2")
    swapped = [PreferencePair(p.prompt, p.rejected, p.chosen) for p in PAIRS]
    for a, b in zip(run(model, PAIRS, **FIXED), run(model, swapped, **FIXED), strict=True):
        np.testing.assert_allclose(a.scores, -b.scores, rtol=1e-5, atol=1e-6)
        assert a.f_input == pytest.approx(-b.f_input, abs=1e-6)


def test_tokens_at_the_baseline_score_exactly_zero() -> None:
    pair = PreferencePair("the sky <pad> is <pad> blue", "green", "red")
    (result,) = run(cached_model("llama"), [pair], baseline="pad")
    for token, score in zip(result.tokens, result.scores, strict=True):
        assert (score == 0) == (token in ("<bos>", "<pad>"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    half = run(tiny_model("llama", dtype=dtype), PAIRS)
    full = run(tiny_model("llama", dtype=dtype).float(), PAIRS)
    for a, b in zip(half, full, strict=True):
        assert np.linalg.norm(a.scores - b.scores) < 0.05 * np.linalg.norm(b.scores)


def test_what_did_not_converge_is_flagged_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"2 of 2 pairs did not converge .*1 \(id 'rose'\)"):
        results = run(cached_model("opt"), PAIRS[:2], tolerance=1e-9, n_steps=20)
    assert [result.converged for result in results] == [False, False]
    assert [result.evaluations for result in results] == [20, 20]
    with pytest.warns(UserWarning, match=r"1 of 1 pairs"):
        (result,) = run(
            cached_model("opt"), PAIRS[:1], method="riemann_middle", n_steps=1, tolerance=0.001
        )
    assert not result.converged


def spy_on_calls(
    monkeypatch: pytest.MonkeyPatch, most_rows: int | None = None
) -> list[tuple[int, int]]:
    """(rows, columns) of every model call from here on; more rows than ``most_rows`` fail."""
    calls: list[tuple[int, int]] = []
    original = Batch.objective

    def spied(self: Batch, decoder: DecoderView, steps: Any = None) -> list[Tensor]:
        rows, columns, _ = self.embeddings.shape
        if most_rows is not None and rows > most_rows:
            raise torch.OutOfMemoryError("planted")
        calls.append((rows, columns))
        return original(self, decoder, steps)

    monkeypatch.setattr(Batch, "objective", spied)
    return calls


def test_a_call_that_runs_out_of_memory_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(cached_model("llama"), PAIRS, n_steps=16)
    with monkeypatch.context() as patch:
        calls = spy_on_calls(patch, most_rows=3)
        for a, b in zip(run(cached_model("llama"), PAIRS, n_steps=16), expected, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)
            assert a.f_baseline == pytest.approx(b.f_baseline, abs=1e-5)
        assert max(rows for rows, _ in calls) <= 3
    spy_on_calls(monkeypatch, most_rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(cached_model("llama"), PAIRS, n_steps=16)


@pytest.mark.parametrize("method", ["gradient_x_input", "smoothgrad", "occlusion"])
def test_other_methods_do_not_depend_on_the_batch(method: str) -> None:
    model = cached_model("llama")
    together = run(model, PAIRS, method=method, n_steps=4)
    for number, pair in enumerate(PAIRS):
        if method == "smoothgrad" and number:
            break  # its noise is drawn for the pair's place
        (alone,) = run(model, [pair], method=method, n_steps=4, max_batch_tokens=40)
        np.testing.assert_allclose(alone.scores, together[number].scores, rtol=1e-4, atol=1e-5)


def test_gradient_x_input_and_occlusion_are_what_they_say() -> None:
    model = cached_model("llama")
    decoder = DecoderView.of(model)
    pair = PAIRS[3]
    ids = encode_pair(TOKENIZER, pair)
    prompt = decoder.embed(torch.tensor([ids.prompt_ids]))[0].detach().requires_grad_()

    def f(embeds: Tensor) -> Tensor:
        answer = decoder.embed(torch.tensor([ids.chosen_ids[:-1]]))[0]
        logits = model(inputs_embeds=torch.cat([embeds, answer])[None]).logits[0, -1]
        return logits[ids.chosen_ids[-1]] - logits[ids.rejected_ids[-1]]

    (gradient,) = torch.autograd.grad(f(prompt), prompt)
    (result,) = run(model, [pair], method="gradient_x_input")
    expected = (gradient * prompt).sum(-1).detach()
    np.testing.assert_allclose(result.scores, expected, rtol=1e-4, atol=1e-5)

    (result,) = run(model, [pair], method="occlusion", baseline="mean")
    start = Baseline(decoder, TOKENIZER, "mean").embeddings(ids.prompt_ids, prompt)
    for token in range(len(ids.prompt_ids)):
        without = prompt.clone()
        without[token] = start[token]
        assert result.scores[token] == pytest.approx((f(prompt) - f(without)).item(), abs=1e-4)


def test_smoothgrad_averages_noisy_gradients() -> None:
    model = cached_model("gpt2")
    few, many, again = (
        run(model, PAIRS[:1], method="smoothgrad", n_steps=n, seed=seed)[0]
        for n, seed in ((2, 0), (64, 0), (64, 0))
    )
    np.testing.assert_array_equal(many.scores, again.scores)
    (other,) = run(model, PAIRS[:1], method="smoothgrad", n_steps=64, seed=1)
    spread = np.abs(many.scores - other.scores).max()
    assert 0 < spread < np.abs(few.scores - many.scores).max()


def test_the_objectives_add_up() -> None:
    model = cached_model("llama")

    def scores(objective: Any) -> list[Any]:
        return run(model, PAIRS, **FIXED, objective=objective)

    def half_margin(logits: ScoredLogits) -> Tensor:
        terms = (
            torch.log_softmax(part, -1)[:, torch.arange(len(ids)), ids].sum(-1)
            for part, ids in (
                (logits.chosen_logits, logits.chosen_ids),
                (logits.rejected_logits, logits.rejected_ids),
            )
        )
        return (next(terms) - next(terms)) / 2

    chosen, rejected, both = scores("chosen"), scores("rejected"), scores("sum")
    mean, custom = scores("mean"), scores(half_margin)
    for a, b, c, d, e in zip(chosen, rejected, both, mean, custom, strict=True):
        ids = encode_pair(TOKENIZER, PAIRS[[p.chosen for p in PAIRS].index(c.chosen)])
        np.testing.assert_allclose(a.scores - b.scores, c.scores, rtol=1e-4, atol=1e-5)
        per_token = a.scores / len(ids.chosen_ids) - b.scores / len(ids.rejected_ids)
        np.testing.assert_allclose(d.scores, per_token, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(2 * e.scores, c.scores, rtol=1e-4, atol=1e-5)
        assert e.objective.endswith("half_margin")
    first = scores("first")
    (one_token,) = run(model, [PreferencePair(PAIRS[1].prompt, "is", "white")], **FIXED)
    np.testing.assert_allclose(first[1].scores, one_token.scores, rtol=1e-4, atol=1e-5)


def test_an_objective_must_return_a_value_for_each_point() -> None:
    with pytest.raises(ValueError, match=r"one value for each of the 2 points.*got \[\]"):
        run(cached_model("llama"), PAIRS, **FIXED, objective=lambda scored: torch.zeros(()))


def test_an_objective_must_have_a_gradient() -> None:
    with pytest.raises(ValueError, match="no gradient with respect to the logits"):
        run(
            cached_model("llama"),
            PAIRS,
            **FIXED,
            objective=lambda scored: scored.chosen_logits.detach().sum((-1, -2)),
        )


def test_models_that_cannot_be_attributed() -> None:
    with pytest.raises(ValueError, match=r"in torch.float64; expected float32.*model.float\(\)"):
        run(tiny_model("gpt2", num_hidden_layers=1).double(), PAIRS)
    config = T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        run(T5ForConditionalGeneration(config), PAIRS)


def test_a_chat_template_that_refuses_names_the_pair() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    pair = PreferencePair([{"role": "system", "content": "the"}], "blue", "red", id="s")
    with pytest.raises(ValueError, match=r"pair 0 \(id 's'\): the chat template.*no system role"):
        attribute(cached_model("llama"), tokenizer, [pair])


def test_only_the_span_is_attributed() -> None:
    model = cached_model("llama")
    whole = run(model, PAIRS, tolerance=0.01)
    parts = [run(model, PAIRS, tolerance=0.01, attributed_span=(0, 3))]
    (spared,) = run(model, PAIRS[:1], tolerance=0.01, attributed_span=(-4, 100))
    assert spared.converged
    assert (spared.scores[:-4] == 0).all()
    assert (spared.scores[-4:] != 0).all()
    for result, other in zip(parts[0], whole, strict=True):
        assert result.converged
        assert (result.scores[3:] == 0).all()
        assert result.f_input == pytest.approx(other.f_input, abs=1e-5)


def test_a_system_prompt_is_left_out() -> None:
    tokenizer = tiny_tokenizer(
        add_bos=False,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:",
    )
    system = {"role": "system", "content": "note the truth of the sky"}
    pairs = [
        PreferencePair([system, {"role": "user", "content": text}], " blue", " red is")
        for text in ("what is the sky", "0 sea", "Z")
    ]
    results = attribute(
        cached_model("llama"), tokenizer, pairs, attributed_span="after_system", progress=False
    )
    for result in results:
        first = int(np.flatnonzero(result.scores)[0])
        assert "".join(result.tokens[:first]).strip() == "system: note the truth of the sky\nuser:"
        assert result.converged


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    run(model, PAIRS[:1], **FIXED)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for without in (torch.no_grad, torch.inference_mode):  # a caller's must not silence gradients
        with without():
            run(model, PAIRS[:1], n_steps=16)


def test_a_model_under_training_with_gradient_checkpointing() -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()  # makes embeddings require gradients, by a hook
    for a, b in zip(run(model, PAIRS), run(cached_model("llama"), PAIRS), strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)


def test_an_offloaded_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    moved = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    found = run(moved, PAIRS, **FIXED, output_dir=tmp_path)
    for a, b in zip(found, run(cached_model("llama"), PAIRS, **FIXED), strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    assert hash_of_weights(moved) == hash_of_weights(cached_model("llama"))


class Quantised(Tensor):
    """As torchao's: a weight that linear layers take, and nothing else does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.flatten, Tensor.t, Tensor.matmul):
            raise NotImplementedError(func)
        if func in (Tensor.detach, Tensor.requires_grad_):
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_quantised_weights(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt_neox", num_hidden_layers=2)
    expected = run(model, PAIRS, **FIXED)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().as_subclass(Quantised)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert type(model.get_output_embeddings().weight) is Quantised
    for a, b in zip(run(model, PAIRS, **FIXED, output_dir=tmp_path), expected, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_a_model_without_gradients_is_refused() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=2)
    model.model.norm.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="no gradient with respect to its input embeddings"):
        run(model, PAIRS, **FIXED)


@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_is_compiled_with_what_is_changed_meanwhile(in_place: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = tiny_model("gpt2")
    compiled: Any = torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
        compiled = model
    before = model._compiled_call_impl
    (result,) = run(compiled, PAIRS[:1], **FIXED)
    (expected,) = run(cached_model("gpt2"), PAIRS[:1], **FIXED)
    np.testing.assert_array_equal(result.scores, expected.scores)
    assert graphs == []
    assert model._compiled_call_impl is before


def test_threads_take_turns() -> None:
    model = tiny_model("llama")
    expected = run(model, PAIRS)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, model, PAIRS) for _ in range(3)]
    for found in runs:
        for a, b in zip(found.result(), expected, strict=True):
            np.testing.assert_array_equal(a.scores, b.scores)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_adaptive_with_a_limit_below_its_first_points(n_steps: int) -> None:
    with pytest.warns(UserWarning, match="did not converge"):
        (result,) = run(cached_model("llama"), PAIRS[:1], n_steps=n_steps)
    assert result.evaluations == 3


@pytest.mark.parametrize("method", ["gradient_x_input", "smoothgrad", "occlusion"])
@pytest.mark.parametrize("span", [(2, 6), (10, 12)])
def test_other_methods_keep_to_the_span(method: str, span: tuple[int, int]) -> None:
    model = cached_model("llama")
    (result,) = run(model, PAIRS[:1], method=method, n_steps=4, attributed_span=span)
    assert np.flatnonzero(result.scores).tolist() == list(range(*span))


def test_gradient_x_input_does_not_depend_on_the_baseline() -> None:
    pair = PreferencePair("<pad> <pad> <pad> <pad> <pad> the sky", "blue", "red")
    bos, pad = (
        run(cached_model("llama"), [pair], method="gradient_x_input", baseline=name)[0]
        for name in ("bos", "pad")
    )
    np.testing.assert_allclose(bos.scores, pad.scores, rtol=1e-5, atol=1e-6)


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
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"baseline": "noise"}, "baseline must be one of"),
        ({"baseline": np.zeros(32)}, "baseline must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"objective": "best"}, "objective must be one of"),
        ({"modalities": ("sound",)}, "modalities must name some of text, image"),
        ({"modalities": ("image",)}, r"pair 0: no token is attributed"),
        ({"image_baseline": "black"}, "image_baseline must be one of"),
        ({"attributed_span": (1, 2, 3)}, "attributed_span must be"),
        ({"attributed_span": (60, 70)}, r"pair 0: attributed_span \(60, 70\) holds none"),
        ({"limit": 0}, "limit must be"),
        ({"shard": (0, 2)}, r"shard must be \(i, n\)"),
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
        (PreferencePair("the sky", "blue", "red", images=("sky.png",)), "pair 1: .*sky.png"),
    ],
)
def test_pairs_that_cannot_be_attributed(pair: PreferencePair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cached_model("llama"), [PAIRS[0], pair])


def test_the_last_position_is_used() -> None:
    pair = PreferencePair(" sky" * 127, "blue", "red")  # and BOS; the answers are not read
    assert len(encode_pair(TOKENIZER, pair).prompt_ids) == 128
    (result,) = run(cached_model("opt"), [pair], **FIXED)
    assert np.isfinite(result.scores).all()
