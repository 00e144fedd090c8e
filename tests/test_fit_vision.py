"""Fitting on pairs with images, on every family of vision-language models."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from grains_ext.attribution import attribute
from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from grains_ext.steering import fit
from grains_ext.steering.contrast import Masking, Reading
from grains_ext.steering.extract import StateReader
from grains_ext.steering.fit_settings import FitSettings
from grains_ext.steering.prompts import Prompt, prompt_groups
from tests.vision_models import N_BLOCKS, VISION_FAMILIES, tiny_vlm

TEXT = PreferencePair("the sky is", "blue", "red")


@cache
def cached(family: str) -> Any:
    return tiny_vlm(family)


def pair_of(processor: Any, seed: int = 0) -> PreferencePair:
    image = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    prompt = f"the sky {processor.image_token} what color is"
    return PreferencePair(prompt, "blue", "a red rose", images=(image,))


def prompt_of(family: str) -> Prompt:
    model, processor = cached(family)
    chunk = [(0, pair_of(processor))]
    [[prompt]] = prompt_groups(DecoderView.of(model), processor, chunk, None)
    return prompt


def states(family: str, prompt: Prompt, *readings: Reading, mask: str = "baseline") -> torch.Tensor:
    model, processor = cached(family)
    view = DecoderView.of(model)
    masking = Masking(view, processor, FitSettings(mask_with=mask))
    [(_, found)] = StateReader(view, range(N_BLOCKS), masking=masking).read([(prompt, readings)])
    return found


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_states_are_those_of_the_model_on_pixels(family: str) -> None:
    model, processor = cached(family)
    pair = pair_of(processor)
    prompt = prompt_of(family)
    chosen, rejected = prompt.ids.chosen_ids, prompt.ids.rejected_ids
    found = states(family, prompt, Reading(), Reading.answered(chosen), Reading((), rejected))
    for row, (answer, n_pooled) in enumerate(((None, 1), ("blue", len(chosen)), ("a red rose", 1))):
        text = pair.prompt if answer is None else f"{pair.prompt} {answer}"
        inputs = processor(text=[text], images=list(pair.images or ()), return_tensors="pt")
        with DecoderView.of(model).capture() as captured:
            model(**inputs, use_cache=False)
        expected = torch.stack([captured[b][0, -n_pooled:].mean(0) for b in range(N_BLOCKS)])
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("mask", ["baseline", "attention"])
def test_masked_tokens_leave_no_trace(family: str, mask: str) -> None:
    """A word and an image token: what they were must not matter any more."""
    prompt = prompt_of(family)
    assert prompt.captured is not None
    image = prompt.captured.images[0].token_positions[0]
    word = len(prompt.ids.prompt_ids) - 2
    others = prompt.captured.embeddings.clone()
    others[[image, word]] += 5 * torch.randn(2, others.shape[1])
    # Features for later blocks are the image's own too, and stay.
    other = replace(prompt, captured=replace(prompt.captured, embeddings=others))
    places = (word,) if mask == "baseline" else (word, image)
    if mask == "baseline":
        others[image] = prompt.captured.embeddings[image]
    clean, masked = states(family, prompt, Reading(), Reading(places), mask=mask)
    clean_other, masked_other = states(family, other, Reading(), Reading(places), mask=mask)
    assert (clean - clean_other).abs().max() > 1e-2
    torch.testing.assert_close(masked, masked_other, rtol=1e-4, atol=1e-4)
    assert (masked - clean).abs().max() > 1e-3


def test_masked_image_tokens_become_their_image_s_mean() -> None:
    prompt = prompt_of("llava")
    assert prompt.captured is not None
    places = prompt.captured.images[0].token_positions
    embeddings = prompt.captured.embeddings.clone()
    embeddings[list(places)] = embeddings[list(places)].mean(0)
    averaged = replace(prompt, captured=replace(prompt.captured, embeddings=embeddings))
    [masked] = states("llava", prompt, Reading(places))
    [expected] = states("llava", averaged, Reading())
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_fit_with_text_and_images_mixed(family: str) -> None:
    model, processor = cached(family)
    pairs = [pair_of(processor), TEXT, pair_of(processor, 1)]
    scored = attribute(model, processor, pairs, method="gradient_x_input", progress=False)
    vectors = fit(
        model,
        processor,
        (pair for pair in pairs),
        attributions=scored,
        k={"text": 1, "image": 2},
        method="pca",
        progress=False,
        max_batch_tokens=64,
    )
    assert vectors.blocks == list(range(N_BLOCKS))
    assert vectors.metadata["n_pairs"] == 3
    assert vectors.metadata["k"] == {"text": 1, "image": 2}
    assert all(direction.norm() > 0 for direction in vectors.directions.values())


def test_one_modality_alone() -> None:
    model, processor = cached("qwen2_5_vl")
    pairs = [pair_of(processor), pair_of(processor, 1)]
    scored = attribute(model, processor, pairs, method="gradient_x_input", progress=False)
    text, image, both = (
        fit(model, processor, pairs, attributions=scored, progress=False, **options).directions[1]
        for options in (
            {"k": 1, "modalities": ("text",)},
            {"k": 1, "modalities": ("image",)},
            {"k": {"text": 1, "image": 1}},
        )
    )
    for first, second in ((text, image), (text, both), (image, both)):
        assert torch.cosine_similarity(first, second, dim=0) < 0.999
    with pytest.raises(ValueError, match="no prompt has a token to mask"):
        fit(model, processor, [TEXT], modalities=("image",), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"select": "random", "mask_with": "attention", "progress": False}
    directions = []
    for kind in (torch.float32, dtype):
        model, processor = tiny_vlm("gemma3", dtype=kind)
        directions.append(fit(model, processor, [pair_of(processor)], **options).directions[2])
    assert torch.cosine_similarity(*directions, dim=0) > 0.98


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_the_model_read_before_changes_nothing(family: str) -> None:
    # These models keep the shifts of positions of the rows they read last.
    model, processor = tiny_vlm(family)
    pairs = [pair_of(processor, seed) for seed in range(2)]
    before = fit(model, processor, pairs, k=2, progress=False)
    images = [image for pair in pairs for image in pair.images or ()]
    inputs = processor(
        text=[pair.prompt for pair in pairs] * 2, images=images * 2, return_tensors="pt"
    )
    model.generate(**inputs, max_new_tokens=1)
    after = fit(model, processor, pairs, k=2, progress=False)
    for block, direction in before.directions.items():
        assert torch.equal(after.directions[block], direction)
