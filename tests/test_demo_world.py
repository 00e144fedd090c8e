"""The demo's small world: reproducible, properly split, and covered by its tokenizer."""

import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grains_ext.demo import world

WORLD = world.build_world()
TOKENIZER = world.build_tokenizer()
SPLITS: tuple[world.Split, ...] = ("fit", "dev", "test")


def documents(seed: int, n: int) -> list[world.Document]:
    rng = random.Random(seed)
    return [world.training_document(WORLD, rng) for _ in range(n)]


def test_world_is_a_function_of_its_seed() -> None:
    world.build_world.cache_clear()
    assert world.build_world() == WORLD
    assert world.build_world(1) != WORLD
    assert documents(3, 20) == documents(3, 20) != documents(4, 20)
    assert world.test_pairs(0, 30) == world.test_pairs(0, 30) != world.test_pairs(1, 30)


def test_world_is_the_same_in_another_process() -> None:
    # String hashes differ between processes: nothing drawn may depend on them.
    expression = (
        "repr((build_world(), dev_pairs(0, 50), vocabulary(), stories('dev', seed=0, n=9)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"from grains_ext.demo.world import *; print({expression})"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
    )
    assert run.stdout.strip() == eval(expression, vars(world))


def test_entities_are_split_without_overlap() -> None:
    assert {split: len(WORLD.entities[split]) for split in SPLITS} == {
        "fit": 40,
        "dev": 25,
        "test": 55,
    }
    assert len(set(WORLD.all_entities)) == 120


@pytest.mark.parametrize("register", ["careful", "gossip"])
def test_test_cue_words_are_held_out(register: world.Register) -> None:
    fit, dev, test = (set(world.cue_words(register, split)) for split in SPLITS)
    assert fit == dev
    assert not fit & test
    assert fit | test == set(world.CUES[register])
    assert len(fit) == len(test) == 8


def test_groups_of_words_do_not_overlap() -> None:
    groups = [*world.VALUES.values(), *world.CUES.values(), world.NEUTRAL, WORLD.all_entities]
    for a, b in itertools.combinations(groups, 2):
        assert not set(a) & set(b)


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_use_only_their_split(split: world.Split) -> None:
    others = {e for s in SPLITS if s != split for e in WORLD.entities[s]}
    foreign = {w for r in world.CUES for w in world.CUES[r]} - {
        w for r in world.CUES for w in world.cue_words(r, split)
    }
    for kind in world.PROMPT_KINDS:
        for pair in world.pairs(kind, split, seed=0, n=60):
            assert not set(pair.prompt.split()) & (others | foreign)


@given(st.sampled_from(SPLITS), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_mix_pairs_state_evidence_against_belief(split: world.Split, seed: int) -> None:
    for pair in world.pairs("mix", split, seed=seed, n=20):
        words = pair.prompt.split()
        careful, gossip = (
            sum(word in world.CUES[register] for word in words)
            for register in ("careful", "gossip")
        )
        assert (careful, gossip) == (1, 2)
        note = words.index("note")
        attribute, entity, value = words[note + 2], words[note + 4], words[note + 6]
        assert pair.chosen == value
        assert pair.rejected == WORLD.beliefs[entity, attribute] != value
        assert pair.prompt.endswith(world.question(entity, attribute))


def test_know_pairs_prefer_the_belief_and_show_no_evidence() -> None:
    for pair in world.pairs("know", "test", seed=0, n=40):
        words = pair.prompt.split()
        assert "note" not in words
        assert pair.chosen == WORLD.beliefs[words[6], words[4]] != pair.rejected


def test_pairs_go_through_all_topics_before_one_comes_again() -> None:
    pairs = world.test_pairs(0, 110)
    assert len({pair.prompt.split("question")[1] for pair in pairs}) == 110
    assert len({pair.id for pair in world.test_pairs(0, 200)}) == 200


def test_stories_of_the_splits_are_disjoint() -> None:
    dev = world.stories("dev", seed=0, n=150)
    test = world.stories("test", seed=0, n=150)
    assert len(set(dev)) == len(set(test)) == 150
    assert not set(dev) & set(test)
    shown = {" ".join(document.words[1:-1]) for document in documents(0, 3000)}
    assert not shown & {*dev, *test}
    assert {world.story_split(text) for text in shown if "both" in text} == {"train"}


def test_tokenizer_knows_every_word() -> None:
    texts = [" ".join(document.words[1:-1]) for document in documents(0, 500)]
    for split in SPLITS:
        pairs = world.pairs("mix", split, seed=0, n=99)
        texts += [f"{pair.prompt} {pair.chosen} {pair.rejected}" for pair in pairs]
    texts += world.stories("dev", seed=0, n=100) + world.stories("test", seed=0, n=100)
    for text in texts:
        ids = TOKENIZER(text).input_ids
        assert TOKENIZER.unk_token_id not in ids
        assert ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.decode(ids[1:]) == text
    assert TOKENIZER("nonsense").input_ids[1:] == [TOKENIZER.unk_token_id]


def test_vocabulary_is_used_and_has_no_double() -> None:
    words = world.vocabulary()
    assert len(set(words)) == len(words) == len(TOKENIZER)
    seen = {word for document in documents(1, 5000) for word in document.words}
    assert set(words) - seen == {world.PAD, world.UNK}


def test_only_answers_closings_and_stories_are_scored() -> None:
    for document in documents(2, 300):
        scored = " ".join(w for w, s in zip(document.words, document.scored, strict=True) if s)
        assert not document.scored[0]
        assert scored.endswith(world.EOS)
        assert "note" not in scored
        assert "question" not in scored
        assert not set(scored.split()) & {w for words in world.CUES.values() for w in words}
