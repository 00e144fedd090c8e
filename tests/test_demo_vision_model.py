"""The embedded LLaVA: small, loadable, made by the committed script, and biased as promised."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from grains_ext.demo import vision_train as train
from grains_ext.demo import vision_world as world
from grains_ext.demo.train import LOG_NAME
from grains_ext.demo.vision_run import load_vision_model

MODEL = world.MODEL_DIR


@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((MODEL / LOG_NAME).read_text())


def test_files_are_small_and_safe() -> None:
    sizes = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sum(sizes.values()) <= 3_000_000
    assert sizes[world.DIGITS_NAME] <= 200_000
    suffixes = {".safetensors", ".json", ".md", ".npz"}
    assert {Path(name).suffix for name in sizes} <= suffixes


def test_auto_classes_load_it() -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    processor = AutoProcessor.from_pretrained(MODEL)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.float16
    (pair,) = world.vision_pairs("test", 1, 0)
    inputs = processor(text=pair.prompt, images=pair.images[0], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    answer = model.float().generate(**inputs, max_new_tokens=2, do_sample=False)
    text = processor.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert text == f"{pair.rejected} ."


def test_processor_is_the_worlds() -> None:
    _, processor = load_vision_model()
    built = train.build_processor()
    assert processor.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert processor.image_token_id == built.image_token_id
    pairs = world.vision_pairs("dev", 3, 0)
    for pair in pairs:
        ours, stored = (
            of(text=pair.prompt, images=pair.images[0], return_tensors="pt")
            for of in (built, processor)
        )
        assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_training_sees_what_the_processor_makes() -> None:
    rng = random.Random(0)
    digits = world.load_digits("train")
    pictures = [world.draw_picture(digits, rng) for _ in range(3)]
    processor = train.build_processor()
    made = processor.image_processor([p.image() for p in pictures], return_tensors="pt")
    assert torch.allclose(made["pixel_values"], train.pixel_values(pictures), atol=1e-6)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_model_has_the_bias_now(split: world.Split) -> None:
    model, processor = load_vision_model()
    check = train.bias_check(model, processor, split, n=60)
    assert train.has_bias(check), check
    # In a mixed prompt it says the hint, not just anything that is not in the picture.
    assert check["mix"]["rejected"] >= 0.8
    assert check["told"]["rejected"] >= 0.9


@pytest.mark.slow
def test_log_is_of_this_model(log: dict) -> None:
    model, processor = load_vision_model()
    assert log["parameters"] == sum(p.numel() for p in model.parameters())
    assert log["split_seed"] == world.SPLIT_SEED
    assert log["has_bias"]
    assert log["vision_accuracy"]["test"] > 0.95
    measured = train.bias_check(model, processor, "dev")
    for kind, shares in log["bias_check"]["dev"].items():
        assert measured[kind] == pytest.approx(shares, abs=0.011)
    for curve, steps in (
        (log["vision_loss"], log["config"]["vision_steps"]),
        (log["caption_loss"], log["config"]["caption_steps"]),
        (log["loss"], log["config"]["steps"]),
    ):
        assert curve[-1][0] == steps
        assert curve[-1][1] < curve[0][1]


@pytest.mark.slow
def test_training_is_deterministic_and_learns() -> None:
    config = train.VisionTrainConfig(
        seed=3,
        vision_steps=30,
        caption_steps=2,
        steps=2,
        warmup_steps=5,
        documents_per_step=4,
        hidden_size=32,
    )
    (first, _, log), (second, _, again) = train.train(config), train.train(config)
    assert log == again
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert log["vision_accuracy"]["test"] > 0.2
    other = train.build_model(
        train.VisionTrainConfig(seed=4, hidden_size=32), train.build_processor()
    )
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_answers_tell_right_from_said() -> None:
    processor = train.build_processor()
    ids = processor.tokenizer.get_vocab()
    pairs = world.vision_pairs("dev", 2, 0)
    logits = torch.zeros(2, len(ids))
    logits[0, ids[pairs[0].chosen]] = 2
    logits[1, ids[pairs[1].chosen]] = 1
    logits[1, ids["."]] = 3
    assert train.answers(logits, processor, pairs) == {
        "right": [True, True],
        "chosen": [True, False],
        "rejected": [False, False],
    }


def test_answer_logits_do_not_depend_on_the_batch() -> None:
    model, processor = load_vision_model()
    pairs = [world.vision_pairs("dev", 1, 0, kind)[0] for kind in world.PROMPT_KINDS]
    together = train.answer_logits(model, processor, pairs)
    alone = train.answer_logits(model, processor, pairs, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_command_writes_a_model_that_loads(tmp_path: Path) -> None:
    config = train.VisionTrainConfig(
        seed=0, vision_steps=1, caption_steps=1, steps=1, documents_per_step=2, hidden_size=16
    )
    train.train_and_save(config, tmp_path / "model")
    log = json.loads((tmp_path / "model" / LOG_NAME).read_text())
    assert log["config"]["seed"] == 0
    assert set(log["bias_check"]["dev"]) == set(world.PROMPT_KINDS)
    assert not log["has_bias"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float16
    assert AutoProcessor.from_pretrained(tmp_path / "model").image_token == world.IMAGE
