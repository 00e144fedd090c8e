from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from grains_ext.encoding import encode_pair, encode_prompt
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import continuation_logprobs, perplexity
from grains_ext.steering import STRENGTHS, SteeringVectors, tune
from grains_ext.steering.calibrate import neighbour_sets
from tests.models import HIDDEN_SIZE, N_BLOCKS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NEUTRAL = ["a rose is a rose", "the sea and the sky"]
PAIRS = [
    PreferencePair(f"what color is the {thing}", color, "red")
    for thing in ("sky", "sea", "grass", "rose")
    for color in ("blue", "green")
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def vectors() -> SteeringVectors:
    generator = torch.Generator().manual_seed(3)
    return SteeringVectors(
        {block: 6 * torch.randn(HIDDEN_SIZE, generator=generator) for block in range(N_BLOCKS)},
        metadata={"method": "grains"},
    )


def measured(model: PreTrainedModel) -> tuple[float, float, float]:
    encoded = [encode_pair(TOKENIZER, pair) for pair in PAIRS]
    items = [(e.prompt_ids, ids) for e in encoded for ids in (e.chosen_ids, e.rejected_ids)]
    scores = continuation_logprobs(model, items)
    margins = [c.total - r.total for c, r in zip(scores[::2], scores[1::2], strict=True)]
    return (
        sum(margin > 0 for margin in margins) / len(margins),
        sum(margins) / len(margins),
        perplexity(model, [encode_prompt(TOKENIZER, text) for text in NEUTRAL]),
    )


def test_every_trial_is_what_it_says(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    best = tune(
        model,
        TOKENIZER,
        PAIRS,
        vectors,
        neutral_texts=NEUTRAL,
        blocks=[[0], [1, 3]],
        strengths=[0.2, 0.05],
        max_perplexity_ratio=10.0,
        progress=False,
    )
    tuning = best.metadata["tuning"]
    trials = tuning["trials"]
    assert [(t["blocks"], t["strength"]) for t in trials] == [
        ([0], 0.05),
        ([0], 0.2),
        ([1, 3], 0.05),
        ([1, 3], 0.2),
    ]
    accuracy, margin, reference = measured(model)
    assert tuning["unsteered"] == {
        "accuracy": accuracy,
        "mean_margin": pytest.approx(margin, abs=1e-5),
    }
    for trial in trials:
        with vectors.subset(trial["blocks"]).applied(model, trial["strength"]):
            accuracy, margin, steered = measured(model)
        assert trial["accuracy"] == accuracy
        assert trial["mean_margin"] == pytest.approx(margin, abs=1e-5)
        assert trial["perplexity_ratio"] == pytest.approx(steered / reference, rel=1e-5)
    chosen = max(trials, key=lambda t: (t["accuracy"], t["mean_margin"]))
    assert tuning["chosen"] == chosen
    assert (best.blocks, best.strength) == (chosen["blocks"], chosen["strength"])
    assert best.metadata["method"] == "grains"
    assert torch.equal(best.directions[best.blocks[0]], vectors.directions[best.blocks[0]])


def test_limit_on_perplexity(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    best = tune(
        model,
        TOKENIZER,
        PAIRS,
        vectors,
        neutral_texts=NEUTRAL,
        max_perplexity_ratio=1.05,
        progress=False,
    )
    tuning = best.metadata["tuning"]
    assert tuning["chosen"]["perplexity_ratio"] <= 1.05
    for trial in tuning["trials"]:
        over = trial["perplexity_ratio"] > 1.05
        assert (trial["accuracy"] is None) == over
        assert (trial["mean_margin"] is None) == over
    # A row of the grid ends where it leaves the limit.
    for blocks in neighbour_sets(range(N_BLOCKS)):
        row = [t for t in tuning["trials"] if t["blocks"] == blocks]
        assert [t["strength"] for t in row] == list(STRENGTHS[: len(row)])
        assert all(t["accuracy"] is not None for t in row[:-1])
    with pytest.raises(ValueError, match="no setting keeps the perplexity within 0"):
        tune(
            model,
            TOKENIZER,
            PAIRS,
            vectors,
            strengths=[3.0],
            max_perplexity_ratio=0,
            progress=False,
        )


def test_finds_a_planted_direction(model: PreTrainedModel) -> None:
    """A direction that raises " blue" and " green" in the logits must be found and win."""
    head = model.lm_head.weight.detach()
    good = [TOKENIZER(f" {color}").input_ids[-1] for color in ("blue", "green")]
    bad = TOKENIZER(" red").input_ids[-1]
    planted = head[good].mean(0) - head[bad]
    planted = 8 * planted / planted.norm()
    noise = torch.randn(2, HIDDEN_SIZE)
    vectors = SteeringVectors({0: noise[0], 1: noise[1], 3: planted})
    best = tune(model, TOKENIZER, PAIRS, vectors, max_perplexity_ratio=3.0, progress=False)
    assert 3 in best.blocks
    assert best.metadata["tuning"]["chosen"]["accuracy"] == 1.0
    assert best.metadata["tuning"]["unsteered"]["accuracy"] < 1.0


def test_model_is_left_as_it_was(vectors: SteeringVectors) -> None:
    model = tiny_model("llama").train()
    tune(
        model,
        TOKENIZER,
        PAIRS[:1],
        vectors,
        blocks=[[0]],
        strengths=[0.1],
        max_perplexity_ratio=9,
        progress=False,
    )
    assert model.training
    assert not any(block._forward_hooks for block in model.model.layers)


def test_neighbour_sets() -> None:
    assert neighbour_sets([5]) == [[5]]
    assert neighbour_sets(range(4)) == [
        [0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    for n in (2, 3, 7, 32):
        sets = neighbour_sets(range(n))
        assert sets[-1] == list(range(n))
        assert len({tuple(chosen) for chosen in sets}) == len(sets) <= 3 * n


def test_wrong_arguments(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    for pairs, options, reason in (
        ([], {}, "no dev pairs"),
        (PAIRS, {"strengths": [0.0]}, "strengths must be positive"),
        (PAIRS, {"strengths": []}, "strengths must be positive"),
        (PAIRS, {"blocks": []}, "no block set"),
        (PAIRS, {"blocks": [[9]]}, r"no direction for blocks \[9\]"),
        ([replace(PAIRS[0], prompt=[{"role": "user", "content": "x"}])], {}, "chat template"),
    ):
        with pytest.raises(ValueError, match=reason):
            tune(model, TOKENIZER, pairs, vectors, progress=False, **options)
