import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from grains_ext.encoding import encode_prompt
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import pair_margins, text_divergences
from grains_ext.steering import RefineSettings, SteeringVectors, refine
from grains_ext.steering.gate import Gate
from grains_ext.steering.neutral import Drift, NeutralTexts
from grains_ext.steering.refine import _Run
from tests.models import FAMILIES, HIDDEN_SIZE, N_BLOCKS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NEUTRAL = ["a rose is a rose", "the sea and the sky", "what is the truth of rome"]
PAIRS = [
    PreferencePair(f"what color is the {thing}", color, "red")
    for thing in ("sky", "sea", "grass", "rose")
    for color in ("blue", "green is the truth")
]
DEV_PAIRS = [
    PreferencePair(f"the color of {thing}", color, "red")
    for thing in ("home", "paris", "grandma")
    for color in ("blue", "green")
]


def drawn(blocks: tuple[int, ...] = (1, 2), **options: Any) -> SteeringVectors:
    generator = torch.Generator().manual_seed(3)
    return SteeringVectors(
        {block: 6 * torch.randn(HIDDEN_SIZE, generator=generator) for block in blocks},
        **{"strength": 0.3, "metadata": {"method": "grains", "tuning": {}}} | options,
    )


def image_pairs(processor: Any) -> list[PreferencePair]:
    from PIL import Image

    places = f"{processor.image_token} what color is it"
    return [
        PreferencePair(places, chosen, "red", images=(Image.new("RGB", (16, 16), color),))
        for color, chosen in (("blue", "blue"), ("white", "white"), ("green", "green"))
    ]


def loss_and_drift(
    model: PreTrainedModel, vectors: SteeringVectors, pairs: list[PreferencePair], beta: float = 1.0
) -> tuple[float, float]:
    """By other means than refine's: the objective, term by term."""
    with vectors.applied(model):
        margins = [margin.total for margin in pair_margins(model, TOKENIZER, pairs)]
    losses = -torch.nn.functional.logsigmoid(beta * torch.tensor(margins)) / beta
    ids = [encode_prompt(TOKENIZER, text) for text in NEUTRAL]
    drift = sum(text_divergences(model, ids, partial(vectors.applied, model)))
    return float(losses.mean()), drift / sum(len(sequence) - 1 for sequence in ids)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def run(model: PreTrainedModel, vectors: SteeringVectors, **options: Any) -> SteeringVectors:
    options = {"neutral_texts": NEUTRAL, "progress": False, "steps": 8} | options
    return refine(model, TOKENIZER, options.pop("pairs", PAIRS), vectors, **options)


def test_lowers_its_objective_and_says_what_it_was(model: PreTrainedModel) -> None:
    start = drawn()
    options = {"steps": 12, "evaluate_every": 4, "learning_rate": 0.1, "drift_weight": 2.0}
    refined = run(model, start, dev_pairs=DEV_PAIRS, shorten=False, **options)
    curve = refined.metadata["refine"]["curve"]
    assert curve[0]["step"] == 0
    assert [entry["step"] for entry in curve[1:]] == list(range(1, 13))
    # Step 1's loss is the start's; step 0 is its look at the dev pairs.
    loss, drift = loss_and_drift(model, start, PAIRS)
    assert curve[1]["loss"] == pytest.approx(loss, rel=1e-4)
    assert curve[1]["drift"] == pytest.approx(drift, rel=1e-4)
    looks = [entry for entry in curve if "dev_loss" in entry]
    assert [entry["step"] for entry in looks] == [0, 4, 8, 12]
    best = min(looks, key=lambda entry: entry["dev_loss"] + 2.0 * entry["dev_drift"])
    assert best["step"] == refined.metadata["refine"]["best_step"] > 0
    loss, drift = loss_and_drift(model, refined, DEV_PAIRS)
    assert best["dev_loss"] == pytest.approx(loss, rel=1e-4)
    assert best["dev_drift"] == pytest.approx(drift, rel=1e-4)
    assert loss + 2.0 * drift < looks[0]["dev_loss"] + 2.0 * looks[0]["dev_drift"]
    assert refined.metadata["method"] == "grains"
    assert "tuning" not in refined.metadata
    assert refined.strength == start.strength


@pytest.mark.parametrize(("length", "growth"), [("fixed", 4.0), ("at_most", 1.0), ("at_most", 1.5)])
def test_lengths(model: PreTrainedModel, length: str, growth: float) -> None:
    start = drawn()
    refined = run(model, start, length=length, growth=growth, drift_weight=1.0)
    for block, direction in refined.directions.items():
        before, after = float(start.directions[block].norm()), float(direction.norm())
        if length == "fixed":
            assert after == pytest.approx(before, rel=1e-5)
        assert after <= growth * before * (1 + 1e-5)
        cosine = torch.cosine_similarity(direction, start.directions[block], dim=0)
        said = refined.metadata["refine"]["cosine_with_start"][str(block)]
        assert said == pytest.approx(float(cosine), abs=1e-5)
        assert said < 0.999


def test_scale_of_the_start_plays_no_part(model: PreTrainedModel) -> None:
    """A direction ten times as long at a tenth of the strength is the same steering."""
    start = drawn()
    longer = replace(
        start,
        directions={block: 10 * v for block, v in start.directions.items()},
        strength=start.strength / 10,
    )
    factored = replace(
        start, strength=2 * start.strength, block_strengths=dict.fromkeys(start.blocks, 0.5)
    )
    expected = run(model, start, steps=4)
    for other, factor in ((longer, 10.0), (factored, 1.0)):
        refined = run(model, other, steps=4)
        for block in start.blocks:
            assert torch.allclose(
                refined.directions[block], factor * expected.directions[block], rtol=1e-3, atol=1e-3
            )


def test_begins_at_the_share_of_its_length_with_the_least_loss(model: PreTrainedModel) -> None:
    good = run(model, drawn(), drift_weight=10.0)
    start = good.with_strength(4 * good.strength)
    refined = run(model, start, steps=1, learning_rate=1e-6, drift_weight=10.0)

    def objective(share: float) -> float:
        loss, drift = loss_and_drift(model, start.with_strength(share * start.strength), PAIRS)
        return loss + 10.0 * drift

    share = refined.metadata["refine"]["start_share"]
    assert 0.1 < share < 0.6
    step = math.sqrt(0.5)
    assert objective(share) < min(objective(share / step), objective(share * step))
    for block, direction in refined.directions.items():
        assert torch.allclose(direction, share * start.directions[block], rtol=1e-3, atol=1e-3)
    as_given = run(model, start, steps=1, learning_rate=1e-6, shorten=False)
    assert as_given.metadata["refine"]["start_share"] == 1.0


def test_a_step_looks_at_enough_answers(model: PreTrainedModel) -> None:
    """Captions have a few scored tokens each: one call of the model would be mostly noise."""
    texts = [PreferencePair(f"say {n} {n + 1} {n + 2}", "blue", "red") for n in range(90)]
    drawn_texts: list[int] = []

    class Spy(NeutralTexts):
        def divergence(self, number: int, reference: torch.Tensor) -> torch.Tensor:
            drawn_texts.append(number)
            return super().divergence(number, reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[_Run.__module__], "NeutralTexts", Spy)
        run(model, drawn(), steps=1, neutral_texts=texts, max_batch_tokens=64, shorten=False)
    assert len(drawn_texts) == len(set(drawn_texts)) > 10


def test_starts_from_zero(model: PreTrainedModel) -> None:
    zero = replace(drawn(), directions={block: torch.zeros(HIDDEN_SIZE) for block in (0, 2)})
    refined = run(model, zero, dev_pairs=DEV_PAIRS)
    before, _ = loss_and_drift(model, zero, DEV_PAIRS)
    after, _ = loss_and_drift(model, refined, DEV_PAIRS)
    assert after < before
    assert all(direction.any() for direction in refined.directions.values())


def test_drift_weight_trades_loss_for_drift(model: PreTrainedModel) -> None:
    free, held = (run(model, drawn(), drift_weight=weight, steps=10) for weight in (0.0, 100.0))
    free_loss, free_drift = loss_and_drift(model, free, PAIRS)
    held_loss, held_drift = loss_and_drift(model, held, PAIRS)
    assert held_drift < 0.5 * free_drift
    assert free_loss < held_loss
    assert "drift" not in free.metadata["refine"]["curve"][0]


def test_accumulated_gradients_are_the_whole_batch(model: PreTrainedModel) -> None:
    whole = run(model, drawn(), steps=3)
    parts = run(model, drawn(), steps=3, max_batch_tokens=40, neutral_texts=NEUTRAL[:1])
    same = run(model, drawn(), steps=3, neutral_texts=NEUTRAL[:1])
    assert not torch.equal(whole.directions[1], same.directions[1])
    for block in same.blocks:
        assert torch.allclose(parts.directions[block], same.directions[block], atol=1e-3)


def test_stops_when_dev_pairs_no_longer_improve(model: PreTrainedModel) -> None:
    against = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in PAIRS]
    start = drawn()
    refined = run(
        model, start, dev_pairs=against, steps=40, evaluate_every=1, patience=3, drift_weight=0.0
    )
    assert refined.metadata["refine"]["best_step"] == 0
    assert refined.metadata["refine"]["curve"][-1]["step"] == 3
    for block in start.blocks:
        assert torch.allclose(refined.directions[block], start.directions[block], atol=1e-5)


def test_a_rate_that_falls_takes_half_of_the_last_of_two_steps(model: PreTrainedModel) -> None:
    def directions(**options: Any) -> torch.Tensor:
        return run(model, drawn((1,)), growth=100.0, drift_weight=1.0, **options).directions[1]

    first = directions(steps=1, decay="linear")
    assert torch.equal(first, directions(steps=1, decay="none"))
    falls, stays = (directions(steps=2, decay=decay) - first for decay in ("linear", "none"))
    torch.testing.assert_close(falls, stays / 2, rtol=1e-3, atol=1e-4)


def test_seed_decides_the_draws(model: PreTrainedModel) -> None:
    options = {"pairs_per_step": 3, "max_batch_tokens": 40, "steps": 3}
    first, again, other = (run(model, drawn(), seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.directions[1], again.directions[1])
    assert first.metadata == again.metadata
    assert not torch.equal(first.directions[1], other.directions[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Directions stay float32 and go where float32's do."""
    expected = run(model, drawn(), steps=6, shorten=False)
    half = run(tiny_model("llama", dtype=dtype), drawn(), steps=6, shorten=False)
    for block, direction in half.directions.items():
        assert direction.dtype == torch.float32
        assert torch.cosine_similarity(direction, expected.directions[block], dim=0) > 0.98
    losses = [entry["loss"] for entry in half.metadata["refine"]["curve"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = tiny_model(family)
    refined = run(model, drawn(), steps=3, learning_rate=0.2)
    losses = [entry["loss"] for entry in refined.metadata["refine"]["curve"]]
    assert fmean(losses[1:]) < losses[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_images(family: str) -> None:
    pytest.importorskip("PIL")
    from tests.vision_models import tiny_vlm

    model, processor = tiny_vlm(family)
    pairs = image_pairs(processor)
    refined = refine(
        model, processor, pairs, drawn((0, 1)), dev_pairs=pairs, steps=4, learning_rate=0.2,
        drift_weight=1.0, progress=False,
    )  # fmt: skip
    curve = refined.metadata["refine"]["curve"]
    assert curve[-1]["loss"] < curve[1]["loss"]
    with refined.applied(model):
        margins = [margin.total for margin in pair_margins(model, processor, pairs)]
    expected = -torch.nn.functional.logsigmoid(torch.tensor(margins)).mean()
    assert curve[-1]["dev_loss"] == pytest.approx(float(expected), rel=1e-3)


def test_neutral_pairs_keep_their_answers(model: PreTrainedModel) -> None:
    """Of a neutral pair the chosen answer's tokens count, after its prompt."""
    kept = PreferencePair("what is the truth of rome", "sea", "sky")
    start = drawn()
    refined = run(model, start, neutral_texts=[kept], steps=1, shorten=False)
    prompt = encode_prompt(TOKENIZER, kept.prompt)
    logits = []
    for steering in (nullcontext(), start.applied(model)):
        with steering, torch.no_grad():
            logits.append(model(torch.tensor([prompt])).logits[0, -1])
    p, q = (each.log_softmax(-1) for each in logits)
    expected = float((p.exp() * (p - q)).sum())
    assert refined.metadata["refine"]["curve"][0]["drift"] == pytest.approx(expected, rel=1e-3)


def test_plain_addition_and_a_gate(model: PreTrainedModel) -> None:
    gate = Gate(block=0, direction=torch.ones(HIDDEN_SIZE), threshold=0.0)
    start = drawn(normalize=False, strength=0.1, gate=gate)
    refined = run(model, start, steps=2, learning_rate=0.01, drift_weight=0.0)
    assert refined.gate is gate
    assert not refined.normalize
    loss, _ = loss_and_drift(model, start.with_gate(None), PAIRS)
    assert refined.metadata["refine"]["curve"][0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    run(model, drawn(), steps=2, dev_pairs=DEV_PAIRS)
    assert model.training
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        assert weight.grad is None
        assert torch.equal(weight, before[name])
    assert not any(block._forward_hooks for block in model.model.layers)


def test_in_inference_mode(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        refined = run(model, drawn(), steps=2)
    losses = [entry["loss"] for entry in refined.metadata["refine"]["curve"]]
    assert losses[1] < losses[0]


def test_dev_loss_that_is_never_finite(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Drift(float("inf"), float("nan"))
    monkeypatch.setattr(NeutralTexts, "drift", lambda *given, **options: lost)
    with pytest.raises(ValueError, match="never finite"):
        run(model, drawn(), steps=1, dev_pairs=PAIRS[:2])


def test_wrong_arguments(model: PreTrainedModel) -> None:
    vectors = drawn()
    other_size = SteeringVectors({0: torch.ones(HIDDEN_SIZE + 1)})
    beyond = SteeringVectors({N_BLOCKS: torch.ones(HIDDEN_SIZE)})
    for given, options, reason in (
        (vectors, {"pairs": []}, "no preference pairs"),
        (vectors, {"dev_pairs": []}, "no dev pairs"),
        (vectors.with_strength(0.0), {}, "strength is 0"),
        (other_size, {}, "made for another model"),
        (beyond, {}, r"blocks \[4\] do not exist"),
        (vectors, {"steps": 0}, "steps must be a whole number"),
        (vectors, {"patience": 0}, "patience must be"),
        (vectors, {"learning_rate": 0.0}, "learning_rate must be a number, more than 0"),
        (vectors, {"drift_weight": -1}, "drift_weight must be a number, 0 or more"),
        (vectors, {"decay": "cosine"}, 'decay must be "linear" or "none"'),
        (vectors, {"length": "short"}, '"at_most" or "fixed"|"fixed" or "at_most"'),
        (vectors, {"neutral_texts": []}, "neutral texts"),
        (vectors, {"neutral_texts": "the sky is blue"}, "several texts, got one"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(model, given, **options)
    with pytest.raises(TypeError, match="settings or options, not both"):
        run(model, vectors, settings=RefineSettings(), steps=3)
    with pytest.raises(TypeError, match="stepz"):
        run(model, vectors, stepz=3)
