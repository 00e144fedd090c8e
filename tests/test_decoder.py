import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from grains_ext.decoder import DecoderView, hidden_states_of, unwrap
from tests.models import FAMILIES, HIDDEN_SIZE, N_BLOCKS, tiny_model

INPUT_IDS = torch.tensor([[1, 20, 30, 40, 50], [1, 21, 31, 41, 51]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_of_every_family(family: str) -> None:
    model = tiny_model(family)
    view = DecoderView.of(model)
    assert (view.n_blocks, view.hidden_size) == (N_BLOCKS, HIDDEN_SIZE)
    with view.capture() as captured:
        output = model(INPUT_IDS, output_hidden_states=True)
    assert sorted(captured) == list(range(N_BLOCKS))
    states = output.hidden_states
    for block in range(N_BLOCKS - 1):
        torch.testing.assert_close(captured[block], states[block + 1])
    # The library's last hidden state is after the final norm, the block's output before it.
    assert view.final_norm is not None
    torch.testing.assert_close(view.final_norm(captured[N_BLOCKS - 1]), states[N_BLOCKS])
    logits = view.head(states[N_BLOCKS])
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(logits, output.logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embed_is_what_the_model_takes(family: str) -> None:
    model = tiny_model(family)
    embeds = DecoderView.of(model).embed(INPUT_IDS)
    torch.testing.assert_close(
        model(inputs_embeds=embeds).logits, model(input_ids=INPUT_IDS).logits
    )


@torch.no_grad()
def test_capture_some_blocks_and_positions() -> None:
    model = tiny_model("llama")
    view = DecoderView.of(model)
    with view.capture() as everything:
        model(INPUT_IDS)
    with view.capture([3, 1], positions=-1) as last:
        model(INPUT_IDS)
    assert sorted(last) == [1, 3]
    assert torch.equal(last[1], everything[1][:, -1])
    with view.capture([2], positions=torch.tensor([0, 3])) as chosen:
        model(INPUT_IDS)
    assert torch.equal(chosen[2], everything[2][[0, 1], [0, 3]])
    assert not any(block._forward_hooks for block in view.blocks)
    with (
        pytest.raises(ValueError, match=r"blocks \[4\] do not exist.* 4 blocks"),
        view.capture([4]),
    ):
        pass


class Wrapper(nn.Module):
    """What peft does: the model sits at base_model.model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


def test_wrapped_models() -> None:
    model = tiny_model("llama")
    expected = DecoderView.of(model)
    for wrapped in (Wrapper(model), nn.DataParallel(model), torch.compile(model)):
        assert unwrap(wrapped) is model
        view = DecoderView.of(wrapped)
        assert view.blocks == expected.blocks
        assert view.model is wrapped


def tiny_llava() -> LlavaForConditionalGeneration:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 4,
    }
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes}
    text = {"model_type": "llama", "vocab_size": 128, **sizes}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def test_never_the_vision_tower() -> None:
    model = tiny_llava()  # whose tower has as many blocks as the language model
    view = DecoderView.of(model)
    assert view.blocks == list(model.model.language_model.layers)
    assert view.head is model.lm_head


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.tokens = nn.Embedding(11, 6)
        self.backbone.stages = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.backbone.norm = nn.LayerNorm(6)
        self.output = nn.Linear(6, 11)


def test_unknown_model_says_how_to_name_the_parts() -> None:
    model = Unknown()
    with pytest.raises(
        ValueError, match=r"DecoderView\.of\(model, blocks=.*backbone\.stages \(3\).*tokens"
    ):
        DecoderView.of(model)
    names = {"embedding": "backbone.tokens", "head": "output"}
    view = DecoderView.of(model, blocks="backbone.stages", **names)
    assert view.blocks == list(model.backbone.stages)
    assert view.final_norm is model.backbone.norm
    assert view.hidden_size == 6
    with pytest.raises(ValueError, match=r"blocks='backbone\.layers': no such module"):
        DecoderView.of(model, blocks="backbone.layers", **names)
    with pytest.raises(ValueError, match="must name a non-empty ModuleList"):
        DecoderView.of(model, blocks="backbone.norm", **names)


def test_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="candidates for the decoder blocks of T5"):
        DecoderView.of(T5ForConditionalGeneration(config))


def test_hidden_states_of_tensor_and_tuple() -> None:
    hidden = torch.zeros(1, 2, 3)
    assert hidden_states_of(hidden) is hidden
    assert hidden_states_of((hidden, None)) is hidden
    with pytest.raises(TypeError, match="got dict"):
        hidden_states_of({})
    with pytest.raises(TypeError, match=r"shape \[2, 3\]"):
        hidden_states_of(hidden[0])
