import dataclasses
import json

import pytest
import torch
from transformers import PreTrainedModel

from grains_ext.attribution import Attribution, attribute
from grains_ext.attribution.path import Baseline
from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import continuation_logprobs
from grains_ext.steering import SteeringVectors, fit
from grains_ext.steering.extract import Masked, last_token_states
from grains_ext.steering.select import top_tokens
from tests.models import N_BLOCKS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    PreferencePair(f"{source} says the {thing} is {color}. what color is", color, "red")
    for source, thing, color in (
        ("study", "sky", "blue"),
        ("a grandma", "sea", "green"),
        ("rumour", "rose", "white"),
    )
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def attributions(model: PreTrainedModel) -> list[Attribution]:
    return attribute(model, TOKENIZER, PAIRS, n_steps=16, tolerance=10.0, progress=False)


def with_scores(attribution: Attribution, scores: dict[int, float]) -> Attribution:
    values = attribution.scores * 0
    for position, score in scores.items():
        values[position] = score
    return dataclasses.replace(attribution, scores=values)


@torch.no_grad()
def hidden_by_hand(model: PreTrainedModel, ids: tuple[int, ...], masked: tuple[int, ...]) -> dict:
    """One prompt alone, unpadded: each block's output at the last token."""
    view = DecoderView.of(model)
    embeds = view.embed(torch.tensor([ids]))
    start = Baseline(view, TOKENIZER, "bos").embeddings(ids, embeds[0])
    embeds[0, list(masked)] = start[list(masked)]
    with view.capture() as captured:
        model(inputs_embeds=embeds)
    return {block: hidden[0, -1] for block, hidden in captured.items()}


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 4096])
def test_states_of_padded_batches(model: PreTrainedModel, max_batch_tokens: int) -> None:
    view = DecoderView.of(model)
    sequences = [
        Masked((1, 20, 30, 40, 50), (2, 4)),
        Masked((1, 21)),
        Masked((1, 22, 32, 42), (1,)),
    ]
    states = last_token_states(
        view,
        sequences,
        [0, 3],
        baseline=Baseline(view, TOKENIZER, "bos"),
        max_batch_tokens=max_batch_tokens,
    )
    for row, sequence in enumerate(sequences):
        expected = hidden_by_hand(model, sequence.token_ids, sequence.positions)
        for block in (0, 3):
            torch.testing.assert_close(states[block][row], expected[block], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="need a baseline"):
        last_token_states(view, sequences, [0])


def test_direction_is_the_difference_of_the_mean_shifts_directions(
    model: PreTrainedModel, attributions: list[Attribution]
) -> None:
    k = 2
    vectors = fit(model, TOKENIZER, PAIRS, k=k, attributions=attributions)
    shifts: dict[int, list[tuple[torch.Tensor, ...]]] = {block: [] for block in range(N_BLOCKS)}
    norms: dict[int, list[float]] = {block: [] for block in range(N_BLOCKS)}
    for attribution in attributions:
        ids = attribution.token_ids
        chosen = top_tokens(ids, attribution.scores, k, exclude_ids={1})
        assert len(chosen.positive) == len(chosen.negative) == k
        clean = hidden_by_hand(model, ids, ())
        toward = hidden_by_hand(model, ids, chosen.positive)
        away = hidden_by_hand(model, ids, chosen.negative)
        for block in range(N_BLOCKS):
            shifts[block].append((clean[block] - toward[block], clean[block] - away[block]))
            norms[block].append(float(clean[block].norm()))
    for block in range(N_BLOCKS):
        v_plus, v_minus = (torch.stack(s).mean(0) for s in zip(*shifts[block], strict=True))
        mean = v_plus / v_plus.norm() - v_minus / v_minus.norm()
        norm = sum(norms[block]) / len(norms[block])
        expected = mean / mean.norm() * norm
        torch.testing.assert_close(vectors.directions[block], expected, rtol=1e-3, atol=1e-3)
        assert vectors.metadata["hidden_norms"][str(block)] == pytest.approx(norm, rel=1e-4)
        shift = vectors.metadata["shift_norms"][str(block)]
        assert shift == pytest.approx(float(mean.norm()), rel=1e-3)


def test_steering_moves_toward_the_chosen_answers(
    model: PreTrainedModel, attributions: list[Attribution]
) -> None:
    """A random model has no beliefs, but the sign of v must be right on the fitting pairs."""
    encoded = [encode_pair(TOKENIZER, pair) for pair in PAIRS]
    items = [(e.prompt_ids, ids) for e in encoded for ids in (e.chosen_ids, e.rejected_ids)]

    def margin() -> float:
        scores = continuation_logprobs(model, items)
        return sum(c.total - r.total for c, r in zip(scores[::2], scores[1::2], strict=True))

    vectors = fit(model, TOKENIZER, PAIRS, k=3, attributions=attributions)
    plain = margin()
    with vectors.applied(model, 0.2) as handle:
        toward = margin()
        handle.strength = -0.2
        away = margin()
    assert away < plain < toward


def test_attributions_are_computed_where_none_are_given(
    model: PreTrainedModel, attributions: list[Attribution]
) -> None:
    given = fit(
        model,
        TOKENIZER,
        PAIRS,
        k=2,
        attributions=attribute(model, TOKENIZER, PAIRS, progress=False),
    )
    computed = fit(model, TOKENIZER, PAIRS, k=2, progress=False)
    for block in range(N_BLOCKS):
        assert torch.equal(given.directions[block], computed.directions[block])


def test_pca_has_the_mean_s_sign(model: PreTrainedModel, attributions: list[Attribution]) -> None:
    # Only tokens of one sign: v = aggregate(h - h+), a single projection.
    one_sign = [with_scores(a, {2: 1.0, 3: 2.0}) for a in attributions]
    mean = fit(model, TOKENIZER, PAIRS, attributions=one_sign)
    pca = fit(model, TOKENIZER, PAIRS, attributions=one_sign, method="pca")
    for block in range(N_BLOCKS):
        cosine = torch.cosine_similarity(mean.directions[block], pca.directions[block], dim=0)
        assert cosine > 0.5
        torch.testing.assert_close(pca.directions[block].norm(), mean.directions[block].norm())
    assert pca.metadata["aggregate"] == "pca"


def test_signs(model: PreTrainedModel, attributions: list[Attribution]) -> None:
    both, positive, negative = (
        fit(model, TOKENIZER, PAIRS, k=2, attributions=attributions, signs=signs)
        for signs in ("both", "positive", "negative")
    )
    for block in range(N_BLOCKS):
        total = positive.directions[block] + negative.directions[block]
        assert torch.cosine_similarity(total, both.directions[block], dim=0) > 0.9999
    assert positive.metadata["signs"] == "positive"
    only_negative = [with_scores(a, {2: -1.0}) for a in attributions]
    with pytest.raises(ValueError, match="no prompt has a token to mask"):
        fit(model, TOKENIZER, PAIRS, attributions=only_negative, signs="positive")


def test_pairs_without_tokens_of_a_sign_do_not_count(
    model: PreTrainedModel, attributions: list[Attribution]
) -> None:
    some = [with_scores(a, {}) for a in attributions]
    some[1] = with_scores(attributions[1], {2: 1.0})
    vectors = fit(model, TOKENIZER, PAIRS, attributions=some)
    ids = attributions[1].token_ids
    shift = hidden_by_hand(model, ids, ())[2] - hidden_by_hand(model, ids, (2,))[2]
    assert torch.cosine_similarity(vectors.directions[2], shift, dim=0) > 0.9999
    with pytest.raises(ValueError, match="no prompt has a token to mask"):
        fit(model, TOKENIZER, PAIRS, attributions=[with_scores(a, {0: 5.0}) for a in attributions])


def test_blocks_strength_and_metadata(
    model: PreTrainedModel, attributions: list[Attribution], tmp_path
) -> None:
    vectors = fit(model, TOKENIZER, PAIRS, k=2, blocks=[3, 1], attributions=attributions)
    assert vectors.blocks == [1, 3]
    assert vectors.strength == 0.5
    everything = fit(model, TOKENIZER, PAIRS, k=2, attributions=attributions)
    assert torch.equal(everything.directions[3], vectors.directions[3])
    expected = {"method": "grains", "aggregate": "mean", "k": 2, "baseline": "bos", "n_pairs": 3}
    assert expected.items() <= vectors.metadata.items()
    assert vectors.metadata["model_type"] == "llama"
    json.dumps(vectors.metadata)
    vectors.save_pretrained(tmp_path)
    assert SteeringVectors.from_pretrained(tmp_path).metadata == vectors.metadata


def test_training_mode_and_gradients_are_restored(attributions: list[Attribution]) -> None:
    model = tiny_model("llama").train()
    fit(model, TOKENIZER, PAIRS, k=2, attributions=attributions)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(block._forward_hooks for block in model.model.layers)


def test_wrong_arguments(model: PreTrainedModel, attributions: list[Attribution]) -> None:
    for change, reason in (
        ({"method": "median"}, '"mean" or "pca"'),
        ({"signs": "+"}, "signs must be one of both, positive, negative"),
        ({"blocks": "some"}, 'blocks must be "all"'),
        ({"blocks": []}, "no blocks"),
        ({"blocks": [7]}, r"blocks \[7\] do not exist"),
        ({"k": 0}, "k must be"),
        ({"attributions": attributions[::-1]}, "do not belong to these 3 pairs"),
    ):
        with pytest.raises(ValueError, match=reason):
            fit(model, TOKENIZER, PAIRS, **{"attributions": attributions, **change})
    with pytest.raises(ValueError, match="no preference pairs"):
        fit(model, TOKENIZER, [], attributions=[])
    with_image = dataclasses.replace(PAIRS[0], images=("a.png",))
    with pytest.raises(ValueError, match="images"):
        fit(model, TOKENIZER, [with_image], attributions=attributions[:1])
