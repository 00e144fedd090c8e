"""Multiple choice, questions and neutral texts: each figure against its definition."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.batching import token_divergences
from grains_ext.encoding import encode_prompt
from grains_ext.evaluation import (
    MultipleChoice,
    Question,
    QuestionSet,
    evaluate,
    measure,
    win_rate,
)
from grains_ext.evaluation.fluency import read
from grains_ext.evaluation.generation import generate_answers
from grains_ext.evaluation.multiple_choice import ChoiceOutcome, choose
from grains_ext.evaluation.questions import Answered, question_statistics, says_yes
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import perplexity, text_divergences
from grains_ext.steering import SteeringVectors
from tests.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from tests.test_pair_batches import IMAGES, by_hand, image_pairs
from tests.vision_models import VISION_FAMILIES, tiny_vlm

TOKENIZER = tiny_tokenizer()
LOGPROBS = st.floats(-3000, 0)


def steering(*, seed: int = 0) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors({1: torch.randn(HIDDEN_SIZE, generator=generator)}, strength=2.0)


# --- multiple choice ------------------------------------------------------------------------------


@given(st.lists(st.tuples(LOGPROBS, st.booleans()), min_size=2, max_size=8))
def test_choices_by_their_definition(scored: list[tuple[float, bool]]) -> None:
    logprobs, labels = [score for score, _ in scored], [label for _, label in scored]
    if len(set(labels)) < 2:
        return
    outcome = ChoiceOutcome.of("a", logprobs, labels)
    true = [score for score, label in scored if label]
    false = [score for score, label in scored if not label]
    assert outcome.top_is_true == (max(true) > max(false))
    mass = math.exp(np.logaddexp.reduce(true) - np.logaddexp.reduce(logprobs))
    assert outcome.true_mass == pytest.approx(mass, abs=1e-9)


def test_choices_are_scored_as_continuations() -> None:
    model = tiny_model("llama")
    prompt, choices = "what color is the sky", ("blue", "red rose", "a lie of rome")
    [outcome] = choose(
        model, TOKENIZER, [MultipleChoice(prompt, choices, (True, False, False), id="sky")]
    )
    pairs = [PreferencePair(prompt, choices[0], other) for other in choices[1:]]
    (blue, red), (_, lie) = (by_hand(model, TOKENIZER, pair) for pair in pairs)
    assert outcome.logprobs == pytest.approx((blue, red, lie), abs=5e-5)
    assert outcome.item_id == "sky"


def test_choices_about_an_image() -> None:
    model, processor = tiny_vlm("llava_next")
    items = [
        MultipleChoice(pair.prompt, (pair.rejected, pair.chosen), (False, True), pair.images)
        for pair in image_pairs(processor)
    ]
    for item, outcome in zip(items, choose(model, processor, items), strict=True):
        pair = PreferencePair(item.prompt, item.choices[1], item.choices[0], item.images)
        assert outcome.logprobs == pytest.approx(by_hand(model, processor, pair)[::-1], abs=5e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_letters_about_an_image_cost_one_row_per_question(family: str) -> None:
    model, processor = tiny_vlm(family)
    letters, labels = (" blue", " red", " green", " rose", " sea"), (True, *[False] * 4)
    items = [
        MultipleChoice(pair.prompt, letters, labels, pair.images)
        for pair in image_pairs(processor)[:3]
    ]
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(tuple(output.shape[:2]))
    )
    outcomes = choose(model, processor, items)
    hook.remove()
    assert rows == [(3, 1)]
    for item, outcome in zip(items, outcomes, strict=True):
        for place in (1, 4):
            pair = PreferencePair(item.prompt, letters[0], letters[place], item.images)
            expected = by_hand(model, processor, pair)
            assert (outcome.logprobs[0], outcome.logprobs[place]) == pytest.approx(
                expected, abs=5e-5
            )


# --- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is not.", False),
        ("There is no dog in the image.", False),
        ("It does not show one", False),
        ("A dog. It is not a cat.", True),
        ("No", False),
        ("Nothing of the kind", True),
        ("", True),
    ],
)
def test_yes_and_no_as_pope_reads_them(text: str, expected: bool) -> None:
    assert says_yes(text) is expected


def test_yes_no_counts() -> None:
    labels, said = "yyyynnnnnn", "yyynynnnnn"  # 3 hits, 1 miss, 1 false alarm, 5 right noes
    words = {"y": "yes", "n": "no"}
    asked = QuestionSet([Question("a dog?", (words[label],)) for label in labels], "yes_no")
    answered = [
        Answered(None, "", float(a == b), b == "y") for a, b in zip(labels, said, strict=True)
    ]
    figures = {name: s.value for name, s in question_statistics(asked, answered).items()}
    assert figures == pytest.approx(
        {"accuracy": 0.8, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "yes_rate": 0.4}
    )
    silent = [Answered(None, "no", float(label == "n"), False) for label in labels]
    figures = {name: s.value for name, s in question_statistics(asked, silent).items()}
    assert math.isnan(figures["precision"])
    assert (figures["recall"], figures["f1"], figures["yes_rate"]) == (0, 0, 0)


def test_judged_questions_and_exact_ones() -> None:
    model = tiny_model("llama")
    prompts = ["the sky is", "the grass is"]
    said = generate_answers(model, TOKENIZER, [(p, None) for p in prompts], max_new_tokens=3)
    exact = QuestionSet(
        [Question(prompts[0], (said[0], "never")), Question(prompts[1], ("never",))],
        "exact",
        max_new_tokens=3,
    )
    ratings = iter([6.0, 2.0])
    judged = QuestionSet(
        [Question(p, id=str(i)) for i, p in enumerate(prompts)],
        "judge",
        lambda question, answer: next(ratings),
        low_rating=3,
        max_new_tokens=3,
    )
    result = measure(model, TOKENIZER, tasks={"exact": exact, "judged": judged})
    figures = {name: statistic.value for name, statistic in result.statistics().items()}
    assert figures == {"exact/exact_match": 0.5, "judged/rating": 4.0, "judged/low_rated": 0.5}
    assert [o.generated for o in result.tasks["judged"].outcomes] == said  # type: ignore[union-attr]


def test_question_sets_that_do_not_fit() -> None:
    question = Question("a dog?", id="dog")
    with pytest.raises(ValueError, match="'dog' has no answer"):
        QuestionSet([question], "exact")
    with pytest.raises(ValueError, match="'dog': its one answer must be"):
        QuestionSet([question], "yes_no")
    with pytest.raises(ValueError, match="a judge is given with"):
        QuestionSet([question], "judge")
    with pytest.raises(ValueError, match="at least one question"):
        QuestionSet([], "exact")
    with pytest.raises(ValueError, match=r"scoring must be one of exact, .* got 'Exact'"):
        QuestionSet([question], "Exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="or a blank one"):  # every text begins with it
        QuestionSet([Question("a dog?", ("a dog", ""))], "exact")
    with pytest.raises(ValueError, match="answers must be a tuple of texts, got the text 'yes'"):
        Question("a dog?", "yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_batches_with_images_generate_what_single_prompts_do(family: str) -> None:
    model, processor = tiny_vlm(family)
    model.eval()
    prompts = [(pair.prompt, pair.images) for pair in image_pairs(processor)]
    options: Any = {"max_new_tokens": 4}
    single = [generate_answers(model, processor, [prompt], **options)[0] for prompt in prompts]
    assert generate_answers(model, processor, prompts, **options) == single
    assert len(set(single)) > 1


def test_win_rate() -> None:
    questions = [Question("q")] * 200
    ours, theirs = ["long answer"] * 200, ["short"] * 200

    def longer(question: Question, first: str, second: str) -> float:
        return 0.5 if len(first) == len(second) else float(len(first) > len(second))

    assert win_rate(questions, ours, theirs, longer).value == 1
    assert win_rate(questions, theirs, ours, longer).value == 0
    assert win_rate(questions, ours, ours, longer).value == 0.5
    # A judge that always prefers the first place decides nothing.
    biased = win_rate(questions, ours, theirs, lambda question, first, second: 1.0)
    assert biased.low < 0.5 < biased.high
    with pytest.raises(ValueError, match="between 0 and 1"):
        win_rate(questions, ours, theirs, lambda question, first, second: 2.0)


# --- neutral texts --------------------------------------------------------------------------------

TEXTS = ["the sky is blue", "a rose is a rose is a rose", "truth", "what is the color of the sea"]


def test_divergence_per_text_by_hand() -> None:
    model, vectors = tiny_model("qwen2"), steering()
    sequences = [encode_prompt(TOKENIZER, text) for text in TEXTS]
    expected = []
    for sequence in sequences:
        ids = torch.tensor([sequence[:-1]])
        with torch.no_grad():
            before = model(ids).logits[0].double().log_softmax(-1)
            with vectors.applied(model):
                after = model(ids).logits[0].double().log_softmax(-1)
        expected.append(float((before.exp() * (before - after)).sum()))
    for budget in (1, 20, 4096):
        got = text_divergences(
            model, sequences, lambda: vectors.applied(model), max_batch_tokens=budget, pad_id=3
        )
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert min(expected) > 0.01
    assert text_divergences(model, sequences, nullcontext) == [0.0] * len(TEXTS)


def test_texts_under_steering() -> None:
    model, vectors = tiny_model("llama"), steering()
    sequences = [encode_prompt(TOKENIZER, text) for text in TEXTS]
    result = measure(model, TOKENIZER, neutral_texts=[*TEXTS, ""], vectors=vectors)
    with vectors.applied(model):
        expected = perplexity(model, sequences)
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    divergences = text_divergences(model, sequences, lambda: vectors.applied(model))
    assert result.kl_per_token == pytest.approx(sum(divergences) / n_tokens)
    assert measure(model, TOKENIZER, neutral_texts=TEXTS).kl_per_token is None
    with pytest.raises(ValueError, match="at least one of two tokens"):
        read(model, TOKENIZER, [""])
    # Without BOS a blank text has no token at all.
    bare = tiny_tokenizer(add_bos=False)
    assert read(model, bare, [*TEXTS, " "]) == read(model, bare, TEXTS)


class Compiled(torch.nn.Module):
    """What torch.compile returns, as far as it matters: graphs that know of no later hook."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a graph ran that does not see the steering")


def test_a_compiled_model_is_steered_all_the_same() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    options: Any = {"vectors": steering(), "generate": False, "progress": False}
    pairs = [PreferencePair("the sky is", "blue", "red")]
    report = evaluate(Compiled(model), TOKENIZER, pairs, **options)
    assert report == evaluate(model, TOKENIZER, pairs, **options)
    assert report.steered != report.unsteered


def test_divergence_of_tokens() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    assert token_divergences(logits, logits).abs().max() < 1e-6
    other = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(token_divergences(logits, other), expected.float())
    impossible = logits.clone()
    impossible[..., 0] = -torch.inf
    assert token_divergences(impossible, logits).isfinite().all()
    assert token_divergences(logits, impossible).isinf().all()


def test_divergence_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, other = torch.randn(2, 4, 5, 7).unbind(0)
    expected = token_divergences(logits, other)
    monkeypatch.setattr("grains_ext.batching._CHUNK_ELEMENTS", 14)
    torch.testing.assert_close(token_divergences(logits, other), expected)


def test_image_and_text_pairs_in_one_measurement() -> None:
    model, processor = tiny_vlm("qwen2_vl")
    model.eval()
    pairs = image_pairs(processor)
    result = measure(model, processor, pairs)
    for pair, outcome in zip(pairs, result.outcomes, strict=True):
        chosen, rejected = by_hand(model, processor, pair)
        assert outcome.margin == pytest.approx(chosen - rejected, abs=1e-4)
        assert outcome.generated is not None
    assert len(IMAGES) == 3
    assert result.shares == ("accuracy", "accuracy_per_token", "exact_match")
