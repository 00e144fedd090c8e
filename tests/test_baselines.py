import pytest
import torch
from transformers import PreTrainedModel

from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.steering import baselines, fit_caa, fit_random_direction, fit_random_tokens
from tests.models import N_BLOCKS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    PreferencePair("study says the sky is", "blue", "a red sea"),
    PreferencePair("the color of a rose", "is white", "green"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("gpt2")


@torch.no_grad()
def last_states(model: PreTrainedModel, ids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    with DecoderView.of(model).capture() as captured:
        model(torch.tensor([ids]))
    return {block: hidden[0, -1] for block, hidden in captured.items()}


def test_caa_is_the_mean_difference_at_the_last_token(model: PreTrainedModel) -> None:
    vectors = fit_caa(model, TOKENIZER, PAIRS)
    differences, norms = [], []
    for pair in PAIRS:
        ids = encode_pair(TOKENIZER, pair)
        chosen = last_states(model, ids.prompt_ids + ids.chosen_ids)
        rejected = last_states(model, ids.prompt_ids + ids.rejected_ids)
        differences.append([chosen[b] - rejected[b] for b in range(N_BLOCKS)])
        norms.append([last_states(model, ids.prompt_ids)[b].norm() for b in range(N_BLOCKS)])
    for block in range(N_BLOCKS):
        mean = torch.stack([d[block] for d in differences]).mean(0)
        norm = torch.stack([n[block] for n in norms]).mean()
        torch.testing.assert_close(
            vectors.directions[block], mean / mean.norm() * norm, rtol=1e-4, atol=1e-4
        )
    assert vectors.metadata["method"] == "caa"


@pytest.mark.parametrize("fit", [fit_random_tokens, fit_random_direction])
def test_random_ones_follow_the_seed(model: PreTrainedModel, fit) -> None:
    first, again, other = (fit(model, TOKENIZER, PAIRS, seed=seed) for seed in (1, 1, 2))
    for block in range(N_BLOCKS):
        assert torch.equal(first.directions[block], again.directions[block])
        assert not torch.equal(first.directions[block], other.directions[block])
    assert first.metadata["seed"] == 1
    part = fit(model, TOKENIZER, PAIRS, seed=1, blocks=[2])
    torch.testing.assert_close(part.directions[2], first.directions[2])


def test_all_methods_speak_of_strength_alike(model: PreTrainedModel) -> None:
    """Every direction is as long as the typical hidden state at the last prompt token."""
    for fit in (fit_caa, fit_random_tokens, fit_random_direction):
        vectors = fit(model, TOKENIZER, PAIRS, blocks=[0, 3])
        assert vectors.strength == 0.5
        for block in (0, 3):
            states = [
                last_states(model, encode_pair(TOKENIZER, pair).prompt_ids)[block] for pair in PAIRS
            ]
            expected = torch.stack(states).norm(dim=-1).mean()
            torch.testing.assert_close(
                vectors.directions[block].norm(), expected, rtol=1e-4, atol=1e-4
            )


def test_random_tokens_never_mask_bos(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        baselines,
        "fit_selections",
        lambda model, tokenizer, prompts, selections, **options: seen.extend(selections),
    )
    fit_random_tokens(model, TOKENIZER, PAIRS, k=50)
    for selection in seen:
        assert 0 not in selection.positive + selection.negative
        assert selection.positive
        assert selection.negative
