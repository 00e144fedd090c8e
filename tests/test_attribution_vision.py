"""Image and text tokens attributed together, on every family of vision-language models."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grains_ext.attribution import attribute
from grains_ext.attribution import evaluator as evaluator_module
from grains_ext.attribution.evaluator import Evaluator
from grains_ext.attribution.forward import NO_SHORTCUTS, Shortcuts
from grains_ext.pairs import PreferencePair
from tests.vision_models import VISION_FAMILIES, tiny_vlm


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(text: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f" {text}"}]},
    ]


PAIRS = [
    PreferencePair(asked("what is the color of it"), "blue is", "green it is", images=(picture(),)),
    PreferencePair(asked("the sky"), "red", "white", images=(picture(1),)),
]
FIXED: dict[str, Any] = {"method": "riemann_middle", "n_steps": 3, "tolerance": 100.0}


@cache
def cached(family: str) -> Any:
    return tiny_vlm(family)


def run(family: str, pairs: list[PreferencePair] = PAIRS, **options: Any) -> Any:
    model, processor = cached(family)
    return attribute(model, processor, pairs, progress=False, **options)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_image_and_text_scores_sum_to_the_change_of_f(family: str) -> None:
    for result in run(family, tolerance=0.02):
        change = result.f_input - result.f_baseline
        assert result.converged
        assert abs(float(result.scores.sum()) - change) <= 0.02 * max(1, abs(change))
        sums = result.modality_sums()
        assert sums["image"] != 0
        assert sums["text"] != 0
        placed = [p for image in result.images for p in image.token_positions]
        assert placed == [i for i, kind in enumerate(result.modality) if kind == "image"]
        heat = result.images[0].heatmap(result.scores)
        assert heat.shape == (20, 24)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_shortcuts_and_batches_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    original = Evaluator._honoured

    def spied(self: Evaluator, prepared: Any) -> Shortcuts:
        found.append(original(self, prepared))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluator_module, "_HONOURED", {})
        patch.setattr(Evaluator, "_honoured", spied)
        together = run(family, **FIXED)
    # Qwen3-VL adds deep features to image tokens in its first blocks, here also in its last one.
    assert all(shortcuts.tree for shortcuts in found)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator_module, "_HONOURED", {})
        patch.setattr(Evaluator, "_honoured", lambda self, prepared: NO_SHORTCUTS)
        plain = run(family, **FIXED)
    apart = [run(family, [pair], **FIXED)[0] for pair in PAIRS]
    for a, b, c in zip(together, plain, apart, strict=True):
        for other in (b, c):
            np.testing.assert_allclose(a.scores, other.scores, rtol=1e-4, atol=1e-5)
            assert a.f_baseline == pytest.approx(other.f_baseline, abs=1e-5)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_f_is_that_of_the_model_on_pixels(family: str) -> None:
    model, processor = cached(family)
    for pair, result in zip(PAIRS, run(family, **FIXED), strict=True):
        text = processor.apply_chat_template(pair.prompt, add_generation_prompt=True)
        inputs = processor(text=[text], images=list(pair.images or ()), return_tensors="pt")
        values = []
        for answer in (pair.chosen, pair.rejected):
            ids = processor.tokenizer(text + answer, add_special_tokens=False).input_ids
            prompt = processor.tokenizer(text, add_special_tokens=False).input_ids
            extra = torch.tensor([ids[len(prompt) :]])
            whole = dict(inputs)
            whole["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in whole:
                    whole[name] = torch.cat([whole[name], torch.zeros_like(extra)], dim=1)
            with torch.no_grad():
                logp = model(**whole).logits[0].log_softmax(-1)
            first = whole["input_ids"].shape[1] - extra.shape[1] - 1
            values.append(sum(float(logp[first + i, t]) for i, t in enumerate(extra[0])))
        assert result.f_input == pytest.approx(values[0] - values[1], abs=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_one_modality_alone(family: str) -> None:
    both, text, image = (
        run(family, modalities=kinds, tolerance=0.02)
        for kinds in (("text", "image"), ("text",), ("image",))
    )
    for a, b, c in zip(both, text, image, strict=True):
        is_image = np.array([kind == "image" for kind in a.modality])
        assert (b.scores[is_image] == 0).all()
        assert (c.scores[~is_image] == 0).all()
        assert b.f_input == pytest.approx(c.f_input, abs=1e-5)
        assert b.converged
        assert c.converged


def test_a_system_prompt_before_an_image_is_left_out() -> None:
    """Its template writes no BOS, so that the tokenizer adds one."""
    system = {"role": "system", "content": "note the truth"}
    pair = PreferencePair([system, *asked("the sky")], "red", "white", images=(picture(),))
    (result,) = run("llava", [pair], attributed_span="after_system", **FIXED)
    first = int(np.flatnonzero(result.scores)[0])
    assert "".join(result.tokens[:first]) == "<bos>system:note the truth\nuser:"


def test_image_baselines_differ_and_all_are_complete() -> None:
    results = {kind: run("llava", image_baseline=kind)[0] for kind in ("mean", "blur", "zero")}
    baselines = {round(result.f_baseline, 4) for result in results.values()}
    assert len(baselines) == 3
    assert all(result.converged for result in results.values())


def test_text_pairs_and_image_pairs_in_one_call() -> None:
    text = PreferencePair("the color of the sky", "blue is", "red")
    mixed = run("internvl", [PAIRS[0], text, PAIRS[1]], **FIXED)
    for pair, result in zip([PAIRS[0], text, PAIRS[1]], mixed, strict=True):
        (alone,) = run("internvl", [pair], **FIXED)
        np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert set(mixed[1].modality) == {"text"}


def test_half_precision() -> None:
    model, processor = tiny_vlm("qwen2_vl")
    results = attribute(model.to(torch.bfloat16), processor, PAIRS, progress=False, tolerance=0.1)
    assert all(np.isfinite(result.scores).all() for result in results)


def test_an_image_that_does_not_open_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    pair = PreferencePair(asked("the sky"), "red", "white", images=(str(broken),), id="b")
    with pytest.raises(ValueError, match=r"pair 1 \(id 'b'\).*broken\.png.*does not open"):
        run("llava", [PAIRS[0], pair])


def test_a_tokenizer_takes_no_images() -> None:
    model, processor = cached("llava")
    with pytest.raises(ValueError, match=r"pair 0: .*processor"):
        attribute(model, processor.tokenizer, PAIRS, progress=False)
