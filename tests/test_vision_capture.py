import numpy as np
import pytest
import torch
from torch import nn

from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from grains_ext.vision import (
    capture_prompt,
    image_baseline_embeddings,
    repeat_rows,
    replaying,
)
from tests.models import HIDDEN_SIZE, tiny_model
from tests.vision_models import N_BLOCKS, VISION_FAMILIES, tiny_vlm

ROWS = 3


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pair_of(processor) -> PreferencePair:
    image = processor.image_token
    prompt = f"the sky {image} is a rose of {image} what color is"
    return PreferencePair(prompt, "blue", "red rose", images=(noise(40, 24), noise(16, 30, 1)))


def full_inputs(processor, pair: PreferencePair) -> dict[str, torch.Tensor]:
    """What a user gives the model: the processor's own call on the whole text."""
    inputs = processor(
        text=[f"{pair.prompt} {pair.rejected}"], images=list(pair.images), return_tensors="pt"
    )
    return dict(inputs)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_parts_of_every_family(family: str) -> None:
    model, _ = tiny_vlm(family)
    view = DecoderView.of(model)
    base = model.model
    stack = base.text_model if hasattr(base, "text_model") else base.language_model
    assert view.stack is stack
    assert view.blocks == list(stack.layers)
    assert len(view.blocks) == N_BLOCKS
    assert (view.embedding, view.head) == (stack.embed_tokens, model.lm_head)
    assert (view.final_norm, view.hidden_size) == (stack.norm, HIDDEN_SIZE)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_replay_is_the_forward_on_pixels(family: str) -> None:
    model, processor = tiny_vlm(family)
    model.requires_grad_(False)
    view = DecoderView.of(model)
    pair = pair_of(processor)
    captured = capture_prompt(view, processor, pair)
    full = model(**full_inputs(processor, pair), use_cache=False).logits
    assert captured.embeddings.shape == (full.shape[1], HIDDEN_SIZE)

    rows = captured.embeddings.repeat(ROWS, 1, 1).requires_grad_()
    with replaying(view, captured.stack_arguments(ROWS)):
        logits = model(inputs_embeds=rows, logits_to_keep=3, use_cache=False).logits
    torch.testing.assert_close(logits, full[:, -3:].expand(ROWS, -1, -1), atol=1e-5, rtol=1e-5)

    (grads,) = torch.autograd.grad(logits[:, -2].log_softmax(-1)[:, 9].sum(), rows)
    assert grads.isfinite().all()
    at_images = [place for grid in captured.images for place in grid.token_positions]
    assert grads[:, at_images].norm(dim=-1).min() > 1e-4
    torch.testing.assert_close(grads[0], grads[-1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_the_replayed_arguments_matter(family: str) -> None:
    """Without the replayed arguments the logits are others, where a family passes any."""
    model, processor = tiny_vlm(family)
    view = DecoderView.of(model)
    captured = capture_prompt(view, processor, pair_of(processor))
    rows = captured.embeddings[None]
    with replaying(view, captured.stack_arguments()):
        right = model(inputs_embeds=rows, use_cache=False).logits
    plain = model(inputs_embeds=rows, use_cache=False).logits
    assert bool(captured.stack_arguments()) != torch.allclose(right, plain, atol=1e-3)
    assert not view.stack._forward_pre_hooks


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_modality_and_ids(family: str) -> None:
    model, processor = tiny_vlm(family)
    pair = pair_of(processor)
    captured = capture_prompt(DecoderView.of(model), processor, pair)
    ids = torch.tensor([[*captured.pair.prompt_ids, *captured.pair.rejected_ids]])
    assert torch.equal(ids, full_inputs(processor, pair)["input_ids"])
    image_id = model.config.image_token_id
    assert captured.modality == tuple(
        "image" if token == image_id else "text" for token in captured.pair.prompt_ids
    )
    assert len(captured.images) == 2
    assert sum(len(grid.token_positions) for grid in captured.images) == captured.modality.count(
        "image"
    )


def test_gemma3_masks() -> None:
    """Tokens of one image see each other; text is causal; local layers see 6 back."""
    model, processor = tiny_vlm("gemma3")
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor))
    length = len(captured.embeddings)
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    for grid in captured.images:
        first, last = grid.token_positions[0], grid.token_positions[-1]
        expected[first : last + 1, first : last + 1] = True
    assert isinstance(captured.mask, dict)
    assert torch.equal(captured.mask["full_attention"], expected)
    assert not captured.mask["sliding_attention"][-1, : length - 6].any()


def test_eager_attention_shows_the_same_mask() -> None:
    model, processor = tiny_vlm("gemma3")
    view = DecoderView.of(model)
    sdpa = capture_prompt(view, processor, pair_of(processor))
    model.set_attn_implementation("eager")
    eager = capture_prompt(view, processor, pair_of(processor))
    assert isinstance(eager.mask, dict)
    assert isinstance(sdpa.mask, dict)
    for kind, mask in sdpa.mask.items():
        assert torch.equal(eager.mask[kind], mask)


def test_attention_without_a_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_vlm("gemma3")
    monkeypatch.setattr(  # a function that says who sees whom, as flex attention has
        "transformers.models.gemma3.modeling_gemma3.create_masks_for_vision_model",
        lambda **_: {"full_attention": lambda *_: True},
    )
    with pytest.raises(ValueError, match=r'shows no mask .*got function.*attn_implementation="sd'):
        capture_prompt(DecoderView.of(model), processor, pair_of(processor))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_positions_have_three_axes_and_leave_no_trace(family: str) -> None:
    model, processor = tiny_vlm(family)
    text = torch.tensor([[1, 20, 30, 40]])
    before = model(inputs_embeds=model.get_input_embeddings()(text)).logits
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor))
    assert captured.position_ids is not None
    assert captured.position_ids.shape == (3, len(captured.embeddings))
    at_image = captured.position_ids[:, list(captured.images[0].token_positions)]
    rows, columns = at_image[1] - at_image[1, 0], at_image[2] - at_image[2, 0]
    assert (rows.tolist(), columns.tolist()) == (sorted([0, 1, 2] * 5), [0, 1, 2, 3, 4] * 3)
    # The model shifts positions by the last prompt's images when it gets embeddings alone.
    after = model(inputs_embeds=model.get_input_embeddings()(text)).logits
    assert torch.equal(before, after)


def test_qwen3_deep_features_are_repeated_by_row() -> None:
    model, processor = tiny_vlm("qwen3_vl")
    captured = capture_prompt(DecoderView.of(model), processor, pair_of(processor))
    n = captured.modality.count("image")
    length = len(captured.embeddings)
    assert captured.stack_kwargs["visual_pos_masks"].shape == (1, length)
    repeated = repeat_rows(captured.stack_kwargs, 4)
    assert repeated["visual_pos_masks"].shape == (4, length)
    for one, many in zip(
        captured.stack_kwargs["deepstack_visual_embeds"],
        repeated["deepstack_visual_embeds"],
        strict=True,
    ):
        assert one.shape == (n, HIDDEN_SIZE)
        assert torch.equal(many, torch.cat([one] * 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model, processor = tiny_vlm(family, dtype=dtype)
    view = DecoderView.of(model)
    pair = pair_of(processor)
    captured = capture_prompt(view, processor, pair)
    assert captured.embeddings.dtype == dtype
    inputs = full_inputs(processor, pair)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    full = model(**inputs, use_cache=False).logits
    with replaying(view, captured.stack_arguments(2)):
        rows = captured.embeddings.repeat(2, 1, 1)
        logits = model(inputs_embeds=rows, use_cache=False).logits
    torch.testing.assert_close(logits, full.expand(2, -1, -1), atol=0.05, rtol=0.05)


def test_a_capture_runs_no_block_and_leaves_the_model_as_it_was() -> None:
    model, processor = tiny_vlm("llava")
    model.train()
    view = DecoderView.of(model)
    ran = []
    for block in view.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    captured = capture_prompt(view, processor, pair_of(processor))
    assert not ran
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not captured.embeddings.requires_grad
    assert not view.stack._forward_pre_hooks


class Wrapper(nn.Module):
    """What peft does: the model sits at base_model.model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


def test_wrapped_models() -> None:
    model, processor = tiny_vlm("llava")
    pair = pair_of(processor)
    plain = capture_prompt(DecoderView.of(model), processor, pair)
    wrapped = capture_prompt(DecoderView.of(Wrapper(model)), processor, pair)
    assert torch.equal(plain.embeddings, wrapped.embeddings)


def test_a_model_without_images() -> None:
    _, processor = tiny_vlm("llava")
    view = DecoderView.of(tiny_model("llama"))
    with pytest.raises(ValueError, match="the prompt has images, and LlamaForCausalLM takes none"):
        capture_prompt(view, processor, pair_of(processor))


def test_a_family_without_a_layout() -> None:
    model, processor = tiny_vlm("llava")
    model.config.model_type = "fuyu"
    with pytest.raises(ValueError, match=r"'fuyu' cannot be placed .* supported: llava, llava_nex"):
        capture_prompt(DecoderView.of(model), processor, pair_of(processor))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_image_baselines(family: str) -> None:
    model, processor = tiny_vlm(family)
    view = DecoderView.of(model)
    pair = pair_of(processor)
    captured = capture_prompt(view, processor, pair)
    kinds = {
        kind: image_baseline_embeddings(view, processor, pair, captured, kind)
        for kind in ("mean", "blur", "zero")
    }
    places = [place for grid in captured.images for place in grid.token_positions]
    real = captured.embeddings[places]
    assert {kind.shape for kind in kinds.values()} == {real.shape}
    assert not kinds["zero"].any()
    n_first = len(captured.images[0].token_positions)
    has_pixels = torch.from_numpy(
        np.concatenate([grid.boxes for grid in captured.images]).any(axis=1)
    )
    for part in (slice(0, n_first), slice(n_first, None)):
        mean = real[part][has_pixels[part]].mean(0)
        torch.testing.assert_close(
            kinds["mean"][part][has_pixels[part]], mean.expand_as(real[part][has_pixels[part]])
        )
    torch.testing.assert_close(kinds["mean"][~has_pixels], real[~has_pixels])
    # Blurring moves the features of pixels, and of nothing else.
    moved = (kinds["blur"] - real).norm(dim=-1)
    assert moved[has_pixels].min() > 1e-3
    assert not moved[~has_pixels].any()


def test_unknown_image_baseline() -> None:
    model, processor = tiny_vlm("llava")
    view = DecoderView.of(model)
    pair = pair_of(processor)
    captured = capture_prompt(view, processor, pair)
    with pytest.raises(ValueError, match="must be one of mean, blur, zero, got 'noise'"):
        image_baseline_embeddings(view, processor, pair, captured, "noise")
