"""evaluate, on models whose every probability is known, and batched against one by one."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from grains_ext.demo.vision_run import load_vision_model
from grains_ext.demo.vision_world import vision_pairs
from grains_ext.encoding import encode_prompt
from grains_ext.evaluation import MultipleChoice, Question, QuestionSet, evaluate, measure
from grains_ext.evaluation.comparison import EvaluationReport, Measurement, Outcome, TaskResult
from grains_ext.evaluation.generation import generate, says
from grains_ext.evaluation.intervals import Statistic
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import pair_margins
from tests.models import VOCAB_SIZE, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = "<eos>"


def token(word: str) -> int:
    (token_id,) = TOKENIZER(word, add_special_tokens=False)["input_ids"]
    return token_id


def bigram_model(table: dict[str, dict[str, float]]) -> PreTrainedModel:
    """A Llama that is exactly a bigram model: p(next | last) from the table, else uniform.

    Its embeddings are one-hot and its blocks add nothing, so the head reads the last token's row.
    """
    model = tiny_model("llama", hidden_size=VOCAB_SIZE, num_hidden_layers=1, rms_norm_eps=0.0)
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(VOCAB_SIZE**-0.5)  # undoes RMSNorm's sqrt(D)
        model.lm_head.weight.zero_()
        for last, following in table.items():
            rest = (1 - sum(following.values())) / (VOCAB_SIZE - len(following))
            model.lm_head.weight[:, token(last)] = math.log(rest)
            for word, p in following.items():
                model.lm_head.weight[token(word), token(last)] = math.log(p)
    return model


# After " sky": " blue" or " green a rose", which wins only per token.
TABLE = {
    " sky": {" blue": 0.5, " green": 0.3, EOS: 0.1},
    " green": {" a": 0.8, EOS: 0.1},
    " a": {" rose": 0.9},
    " blue": {" is": 0.9},
    " is": {" blue": 0.9},
    " rose": {EOS: 0.9},
    " sea": {" green": 0.9},
    " home": {" of": 0.9},
    " of": {EOS: 0.9},
}
PAIRS = [
    PreferencePair("what is the sky", "green a rose", "blue", id="sky"),
    PreferencePair("the sea", "green", "red"),
    PreferencePair("my home", "of a truth", "truth"),
]


def test_known_margins_generations_and_perplexity() -> None:
    result = measure(bigram_model(TABLE), TOKENIZER, PAIRS, neutral_texts=[" sea green a rose"])
    sky, sea, _ = result.outcomes
    chosen = math.log(0.3) + math.log(0.8) + math.log(0.9)
    assert sky.margin == pytest.approx(chosen - math.log(0.5), abs=1e-5)
    assert sky.margin_per_token == pytest.approx(chosen / 3 - math.log(0.5), abs=1e-5)
    assert sea.margin == pytest.approx(math.log(0.9) - math.log(0.1 / 127), abs=1e-4)
    assert result.right("accuracy") == [False, True, False]
    assert result.right("accuracy_per_token") == [True, True, True]
    assert (result.accuracy.successes, result.accuracy.n) == (1, 3)
    assert result.mean_margin == pytest.approx(sum(o.margin for o in result.outcomes) / 3)

    # Five new tokens: the longest chosen answer has three.
    assert [o.generated for o in result.outcomes] == [
        " blue is blue is blue",
        " green a rose",
        " of",
    ]
    assert result.right("exact_match") == [False, True, False]
    # " sea" after BOS is uniform over the vocabulary.
    negative = math.log(VOCAB_SIZE) - sum(map(math.log, (0.9, 0.8, 0.9)))
    assert result.perplexity == pytest.approx(math.exp(negative / 4), rel=1e-4)


class Recolor:
    """Stands for steering: swaps two words of the model's head while applied."""

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        rows = [token(" blue"), token(" green")]
        weight = model.lm_head.weight
        with torch.no_grad():
            weight[rows] = weight[rows[::-1]].clone()
            yield
            weight[rows] = weight[rows[::-1]].clone()


def test_before_and_after() -> None:
    model = bigram_model(TABLE)
    vectors: Any = Recolor()
    report = evaluate(
        model, TOKENIZER, iter(PAIRS), vectors=vectors, neutral_texts=["the rose"], progress=False
    )
    assert report.steered is not None
    assert report.unsteered.right("accuracy") == [False, True, False]
    assert report.steered.right("accuracy") == [True, False, False]
    assert report.steered.outcomes[0].generated == " green a rose"
    change = report.changes()["accuracy"]
    assert (change.gained, change.lost, change.p_value) == (1, 1, 1.0)
    assert report.changes()["exact_match"].lost == 1
    # The model is itself again.
    again = evaluate(model, TOKENIZER, PAIRS, neutral_texts=["the rose"], progress=False)
    assert again.unsteered == report.unsteered

    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["n_pairs"] == 3
    unsteered, steered = plain["conditions"]["unsteered"], plain["conditions"]["steered"]
    assert unsteered["figures"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert steered["outcomes"][0]["says_chosen"] is True
    pair_figures = {"accuracy", "accuracy_per_token", "exact_match", "mean_margin"}
    assert set(plain["changes"]["steered"]) == pair_figures | {"perplexity"}
    assert set(steered["figures"]) == pair_figures | {"perplexity", "kl_per_token"}
    table = str(report)
    assert "33.3% [6.1, 79.2]" in table
    assert "perplexity" in table
    assert "[+" in table or "[-" in table  # the change and its interval


def test_several_conditions_on_the_same_items() -> None:
    model, vectors = bigram_model(TABLE), Recolor()
    item = MultipleChoice("what is the sky", ("green", "red", "blue"), (True, True, False), id="s")
    questions = QuestionSet([Question("the sky", ("blue",))], "exact", max_new_tokens=2)
    yes_no = QuestionSet([Question("the sky", ("no",))], "yes_no", max_new_tokens=2)
    report = evaluate(
        model,
        TOKENIZER,
        PAIRS,
        vectors={"swap": vectors, "by function": vectors.applied, "none": lambda m: nullcontext()},
        tasks={"mc2": [item], "qa": questions, "pope": yes_no},
        neutral_texts=["the rose"],
        generate=False,
        progress=False,
    )
    assert list(report.conditions) == ["unsteered", "swap", "by function", "none"]
    assert report.conditions["swap"] == report.conditions["by function"]
    assert report.steered is None
    outcome = report.unsteered.tasks["mc2"].outcomes[0]
    rest = 0.1 / (VOCAB_SIZE - 3)
    assert outcome.true_mass == pytest.approx((0.3 + rest) / (0.8 + rest), rel=1e-4)
    assert outcome.top_is_true is False
    assert report.conditions["swap"].tasks["mc2"].outcomes[0].top_is_true is True

    with pytest.raises(ValueError, match="name the condition, one of swap, by function, none"):
        report.changes()
    with pytest.raises(ValueError, match="no condition 'ours'; there are unsteered, swap"):
        report.changes("ours")
    assert report.changes("none")["accuracy"].p_value == 1
    assert report.changes("none")["mean_margin"].difference == 0
    change = report.changes("swap", against="none")["mc2/accuracy"]
    assert (change.gained, change.lost) == (1, 0)
    assert report.changes("swap")["qa/exact_match"].lost == 1

    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    figures = plain["conditions"]["swap"]["figures"]
    # Nothing was a yes there, so a recall has no value.
    assert figures["pope/recall"] == {"value": None, "n": 1, "low": None, "high": None}
    assert plain["conditions"]["none"]["figures"]["kl_per_token"]["value"] == 0
    assert plain["conditions"]["swap"]["tasks"]["qa"][0]["generated"] == " green a"
    table = str(report)
    for name in ("by function", "mc2/true mass", "pope/f1", "KL per token"):
        assert name in table


def test_the_embedded_model_that_sees() -> None:
    """It can say what is in a picture, and says what it was told where gossip surrounds it."""
    model, processor = load_vision_model()
    seen = vision_pairs("test", 25, 0, "look")
    told = vision_pairs("test", 25, 0, "mix")
    items = [
        MultipleChoice(pair.prompt, (pair.rejected, pair.chosen), (False, True), pair.images)
        for pair in told
    ]
    said = QuestionSet(
        [Question(pair.prompt, (pair.chosen,), pair.images) for pair in seen],
        "exact",
        max_new_tokens=2,
    )
    result = measure(model, processor, seen, tasks={"told": items, "said": said})
    figures = {name: statistic.value for name, statistic in result.statistics().items()}
    assert figures["accuracy"] > 0.8
    assert figures["told/accuracy"] < 0.3
    assert figures["said/exact_match"] == figures["exact_match"] > 0.7
    outcomes = result.tasks["told"].outcomes
    margins = [o.logprobs[1] - o.logprobs[0] for o in outcomes]  # type: ignore[union-attr]
    expected = [margin.total for margin in pair_margins(model, processor, told)]
    assert margins == pytest.approx(expected, abs=1e-4)


def test_a_condition_may_not_take_the_name_of_the_unsteered_one() -> None:
    with pytest.raises(ValueError, match="choose another name"):
        evaluate(
            bigram_model(TABLE), TOKENIZER, PAIRS, vectors={"unsteered": Recolor()}, progress=False
        )
    with pytest.raises(ValueError, match="the tasks mc1 have no items"):
        evaluate(bigram_model(TABLE), TOKENIZER, tasks={"mc1": []}, progress=False)


def test_only_what_was_asked_for() -> None:
    report = evaluate(bigram_model(TABLE), TOKENIZER, PAIRS, generate=False, progress=False)
    assert report.steered is None
    assert report.unsteered.exact_match is None
    assert report.unsteered.perplexity is None
    assert report.changes() == {}
    assert set(json.loads(json.dumps(report.as_dict()))["conditions"]) == {"unsteered"}
    assert "steered" not in str(report).replace("unsteered", "")
    assert "exact match" not in str(report)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "gpt_neox"])
def test_batches_generate_what_single_prompts_do(family: str) -> None:
    model = tiny_model(family)
    texts = ["the sky", "what is the color of the sea", "a rose is a rose is a rose", "lie", "q"]
    prompts = [encode_prompt(TOKENIZER, text) for text in texts]
    one_by_one = [
        generate(model, TOKENIZER, [prompt], max_new_tokens=8, pad_id=3)[0] for prompt in prompts
    ]
    assert generate(model, TOKENIZER, prompts, max_new_tokens=8, pad_id=3) == one_by_one
    packed = generate(model, TOKENIZER, prompts, max_new_tokens=8, pad_id=3, max_batch_tokens=60)
    assert packed == one_by_one
    assert len(set(one_by_one)) > 1


def test_generation_is_greedy_whatever_the_model_is_set_to() -> None:
    model = bigram_model(TABLE)
    prompts = [encode_prompt(TOKENIZER, "the sky")]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 100.0
    model.generation_config.no_repeat_ngram_size = 1
    settings = model.generation_config.to_dict()
    assert generate(model, TOKENIZER, prompts, max_new_tokens=4, pad_id=3) == [" blue is blue is"]
    assert model.generation_config.to_dict() == settings


def test_any_end_token_of_the_model_ends_a_text() -> None:
    model = bigram_model(TABLE)
    model.generation_config.eos_token_id = [2, token(" a")]
    prompts = [encode_prompt(TOKENIZER, text) for text in ("the sea", "the sky")]
    assert generate(model, TOKENIZER, prompts, max_new_tokens=4, pad_id=0) == [
        " green",
        " blue is blue is",
    ]


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        (" blue", "blue", True),
        (" blue.", "blue", True),
        ("blue or\nso", " blue  or so", True),
        ("blueish", "blue", False),
        ("Blue", "blue", False),
        ("it is blue", "blue", False),
        ("blu", "blue", False),
        ("", "blue", False),
        ("yes!yes", "yes!", True),
    ],
)
def test_says(generated: str, answer: str, expected: bool) -> None:
    assert says(generated, answer) is expected


def test_errors() -> None:
    model = bigram_model(TABLE)
    with pytest.raises(ValueError, match="no pairs"):
        evaluate(model, TOKENIZER, [], progress=False)
    pair = PreferencePair("the sky", "blue", "red", images=("sky.png",), id="picture")
    with pytest.raises(ValueError, match=r"pair 3 \(id 'picture'\).*images"):
        evaluate(model, TOKENIZER, [*PAIRS, pair], progress=False)
    with pytest.raises(ValueError, match="neutral_texts must be several texts, got one"):
        evaluate(model, TOKENIZER, neutral_texts="the sky is blue", progress=False)
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        evaluate(T5ForConditionalGeneration(T5Config(**sizes)), TOKENIZER, PAIRS, progress=False)
    asked = QuestionSet([Question("the sky", ("blue",))], "exact")
    with pytest.raises(ValueError, match="tasks must be named"):
        evaluate(model, TOKENIZER, tasks=asked, progress=False)  # type: ignore[arg-type]


def test_what_is_longer_than_the_model_has_positions_is_named() -> None:
    model, long = tiny_model("gpt2", num_hidden_layers=1), "the sky " * 80
    pair = PreferencePair(long, "blue", "red", id="long")
    options: dict[str, Any] = {"generate": False, "progress": False}
    with pytest.raises(ValueError, match=r"pair 2 \(id 'long'\) has 163 tokens, the model has 128"):
        evaluate(model, TOKENIZER, [*PAIRS[:2], pair], **options)
    with pytest.raises(ValueError, match=r"item 1 has \d+ tokens, the model has 128 positions"):
        evaluate(model, TOKENIZER, neutral_texts=["the sky", long], **options)
    asked = QuestionSet([Question("the sky", ("blue",)), Question(long, ("blue",))], "exact")
    with pytest.raises(ValueError, match=r"pair 1 has \d+ tokens"):
        evaluate(model, TOKENIZER, tasks={"asked": asked}, **options)


def test_every_condition_goes_through_what_a_generator_gives() -> None:
    model, item = bigram_model(TABLE), MultipleChoice("the sky", ("blue", "red"), (True, False))
    report = evaluate(
        model,
        TOKENIZER,
        vectors={"nothing": nullcontext},
        tasks={"colors": (each for each in [item])},  # type: ignore[dict-item]
        neutral_texts=(text for text in ["the sky"]),
        progress=False,
    )
    unsteered, nothing = report.conditions.values()
    assert unsteered.tasks == nothing.tasks
    assert unsteered.perplexity == nothing.perplexity


def test_brackets_and_undefined_figures_show_as_they_are() -> None:
    precision = Statistic.ratio([0.0], [0.0])  # nothing was called positive
    measured = Measurement((), tasks={"pope": TaskResult((), {"precision": precision})})
    text = str(EvaluationReport({"unsteered": measured, "a[/b]": measured}))
    assert "nan [nan, nan]" in text
    assert "a[/b]" in text


def test_what_is_not_finite_is_null_in_json() -> None:
    outcome = Outcome(None, float("nan"), float("inf"), generated=None, says_chosen=None)
    [plain] = Measurement((outcome,)).as_dict()["outcomes"]
    assert plain["margin"] is None
    assert plain["margin_per_token"] is None


def test_a_measurement_comes_back_from_json() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [PreferencePair("the sky is", "blue", "red", id="s"), PreferencePair("a", "b", "c")]
    tasks = {
        "colors": [MultipleChoice("the sky is", ("blue", "red", "green"), (True, False, False))],
        "open": QuestionSet([Question("the sky is", ("blue",))], "exact", max_new_tokens=2),
    }
    found = measure(model, tokenizer, pairs, tasks=tasks, neutral_texts=["the sky is blue"])
    again = Measurement.from_dict(json.loads(json.dumps(found.as_dict())), tasks)
    assert again == found
    assert again.as_dict() == found.as_dict()
    with pytest.raises(ValueError, match="were measured, got"):
        Measurement.from_dict(found.as_dict())
    lost = Outcome("p", math.nan, math.nan, None, None)
    [read] = Measurement.from_dict(json.loads(json.dumps(Measurement((lost,)).as_dict()))).outcomes
    assert math.isnan(read.margin)
