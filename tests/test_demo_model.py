"""The embedded model: small, loadable, made by the committed script, and biased as promised."""

import json
import random
from pathlib import Path

import pytest
import torch

from grains_ext.demo import train, world
from grains_ext.demo.run import load_model

MODEL = train.MODEL_DIR


@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((MODEL / train.LOG_NAME).read_text())


def test_files_are_small_and_safe() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 3_000_000
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 3_100_000
    assert {file.suffix for file in MODEL.iterdir()} <= {".safetensors", ".json", ".md"}


def test_tokenizer_is_the_worlds() -> None:
    _, tokenizer = load_model()
    built = world.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    text = world.test_pairs(0, 1)[0].prompt
    assert tokenizer(text).input_ids == built(text).input_ids
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(built, f"{name}_token_id")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_model_has_the_bias_now(split: str) -> None:
    model, tokenizer = load_model()
    check = train.bias_check(model, tokenizer, split, n=100)  # type: ignore[arg-type]
    assert train.has_bias(check), check
    assert check["folk"] <= check["mix"] + 0.05
    # A story has a few places with up to a dozen equally likely words, and no choice elsewhere.
    assert check["perplexity"] < 2


def test_log_is_of_this_model(log: dict) -> None:
    model, tokenizer = load_model()
    assert log["parameters"] == sum(p.numel() for p in model.parameters())
    assert log["world_seed"] == world.WORLD_SEED
    assert log["has_bias"]
    measured = train.bias_check(model, tokenizer, "dev")
    assert measured == pytest.approx(log["bias_check"]["dev"], abs=0.011)
    steps, losses = zip(*log["loss"], strict=True)
    assert steps[-1] == log["config"]["steps"]
    assert losses[-1] < losses[0]


def test_training_is_deterministic_and_learns() -> None:
    config = train.TrainConfig(seed=3, steps=12, documents_per_step=8, hidden_size=32)
    (first, _, curve), (second, _, again) = train.train(config), train.train(config)
    assert curve == again
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    other, _, _ = train.train(train.TrainConfig(seed=4, steps=1, hidden_size=32))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_batch_scores_and_blanks_the_right_words() -> None:
    rng = random.Random(0)
    documents = [world.training_document(world.build_world(), rng) for _ in range(40)]
    ids = world.build_tokenizer().get_vocab()
    input_ids, attention_mask, labels = train.make_batch(documents, ids, rng, blank_rate=0.5)
    blanks = torch.tensor([ids[word] for word in train.BLANKS])
    for row, document in enumerate(documents):
        n = len(document.words)
        true_ids = torch.tensor([ids[word] for word in document.words])
        assert attention_mask[row].sum() == n
        scored = torch.tensor(document.scored)
        assert torch.equal(labels[row, :n][scored], true_ids[scored])
        assert (labels[row, :n][~scored] == -100).all()
        assert (labels[row, n:] == -100).all()
        assert input_ids[row, 0] == ids[world.BOS]
        changed = input_ids[row, :n][input_ids[row, :n] != true_ids]
        assert torch.isin(changed, blanks).all()
        assert len(changed.unique()) <= 1
    share = torch.isin(input_ids[attention_mask == 1], blanks).float().mean()
    assert 0.4 < share < 0.6


def test_command_writes_a_model_that_loads(tmp_path: Path) -> None:
    config = train.TrainConfig(seed=0, steps=1, documents_per_step=2, hidden_size=16)
    train.train_and_save(config, tmp_path / "model")
    log = json.loads((tmp_path / "model" / train.LOG_NAME).read_text())
    assert log["config"]["seed"] == 0
    assert set(log["bias_check"]["dev"]) == {*world.PROMPT_KINDS, "perplexity"}
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not log["has_bias"]
