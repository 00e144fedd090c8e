"""The demo's world of pictures: reproducible, properly split, and covered by its tokenizer."""

import random
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from grains_ext.demo import vision_world as world

SPLITS: tuple[world.Split, ...] = get_args(world.Split)


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    rows = {
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(theirs.images, theirs.target, strict=True)
    }
    ours = [world.load_digits(split) for split in SPLITS]
    assert sum(len(digits.labels) for digits in ours) == len(theirs.target)
    for digits in ours:
        assert {
            (image.tobytes(), int(label))
            for image, label in zip(digits.images, digits.labels, strict=True)
        } <= rows


def test_digits_are_split_without_overlap() -> None:
    images = {split: world.load_digits(split).images for split in SPLITS}
    assert {split: len(of) for split, of in images.items()} == world.DIGITS_PER_SPLIT
    # No two of the digits are equal, so equal pixels would mean one digit in two splits.
    assert len({image.tobytes() for of in images.values() for image in of}) == sum(
        map(len, images.values())
    )
    for split in SPLITS:
        assert set(world.load_digits(split).labels) == set(range(10))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        world.load_digits("validation")  # type: ignore[arg-type]


def test_picture_shows_its_digits_in_their_quarters() -> None:
    digits = world.load_digits("dev")
    by_ink = {
        image.tobytes(): str(label)
        for image, label in zip(digits.images, digits.labels, strict=True)
    }
    picture = world.draw_picture(digits, random.Random(0))
    assert picture.pixels.max() == 255
    for place, (row, column) in world.PLACES.items():
        quarter = picture.pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        ink = np.round(quarter / 255 * world.MAX_INK).astype(np.uint8)
        assert by_ink[ink.tobytes()] == picture.digit_at(place)
    image = picture.image()
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert np.array_equal(np.asarray(image)[..., 1], picture.pixels)


def test_shifted_digits_stay_in_their_quarters() -> None:
    one_dot = np.zeros((1, 8, 8), dtype=np.uint8)
    one_dot[0, 0, 3] = world.MAX_INK
    dots = world.Digits(one_dot, np.array([7], dtype=np.uint8))
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        picture = world.draw_picture(dots, rng, shifts=True)
        seen |= {(int(y) % 8, int(x) % 8) for y, x in zip(*picture.pixels.nonzero(), strict=True)}
    assert seen == {(y, x) for y in (0, 1) for x in (2, 3, 4)}


def test_pairs_are_a_function_of_their_seed_in_any_process() -> None:
    def facts(pairs: list) -> list:
        return [
            (pair.prompt, pair.chosen, pair.rejected, pair.images[0].tobytes().hex())
            for pair in pairs
        ]

    here = facts(world.vision_pairs("test", 20, 0))
    assert (
        here == facts(world.vision_pairs("test", 20, 0)) != facts(world.vision_pairs("test", 20, 1))
    )
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from grains_ext.demo.vision_world import *; print([(p.prompt, p.chosen, p.rejected, "
            "p.images[0].tobytes().hex()) for p in vision_pairs('test', 20, 0)])",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
    )
    assert run.stdout.strip() == repr(here)


@pytest.mark.parametrize("kind", world.PROMPT_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_pairs_set_hint_against_picture(kind: world.PromptKind, split: world.Split) -> None:
    digits = world.load_digits(split)
    by_ink = {
        image.tobytes(): str(label)
        for image, label in zip(digits.images, digits.labels, strict=True)
    }
    pairs = world.vision_pairs(split, 25, 3, kind)
    assert len({pair.id for pair in pairs}) == 25
    for pair in pairs:
        assert isinstance(pair.prompt, str)
        words = pair.prompt.split()
        assert words.count(world.IMAGE) == 1
        place = world.place_asked(pair)
        assert words[words.index("at") + 1] == place
        row, column = world.PLACES[place]
        (image,) = pair.images or ()
        quarter = np.asarray(image)[8 * row : 8 * row + 8, 8 * column : 8 * column + 8, 0]
        ink = np.round(quarter / 255 * world.MAX_INK).astype(np.uint8)
        assert pair.chosen == by_ink[ink.tobytes()] != pair.rejected
        cues = {r: [w for w in words if w in world.CUES[r]] for r in world.CUES}
        expected = {"mix": (1, 2), "amb": (1, 1), "told": (0, 2), "look": (2, 0)}.get(kind, (0, 0))
        assert (len(cues["look"]), len(cues["told"])) == expected
        for register, found in cues.items():
            assert set(found) <= set(world.cue_words(register, split))
        if kind == "caption":
            assert "says" not in words
        else:
            says = words.index("says")
            assert words[says + 1 : says + 4] == [place, "is", pair.rejected]


@pytest.mark.parametrize("register", ["look", "told"])
def test_test_cue_words_are_held_out(register: world.Register) -> None:
    words = {split: set(world.cue_words(register, split)) for split in SPLITS}
    assert words["train"] == words["fit"] == words["dev"]
    assert not words["fit"] & words["test"]
    assert words["fit"] | words["test"] == set(world.CUES[register])
    assert len(words["fit"]) == len(words["test"]) == 8


def test_groups_of_words_do_not_overlap() -> None:
    groups = [
        *world.CUES.values(),
        world.NEUTRAL,
        world.SPEAKERS,
        world.DIGITS,
        tuple(world.PLACES),
    ]
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))


def test_documents_answer_by_their_register() -> None:
    rng = random.Random(0)
    digits = world.load_digits("train")
    n_told = n_hinted = 0
    for _ in range(400):
        picture = world.draw_picture(digits, rng)
        document = world.training_document(picture, rng)
        words = list(document.words)
        closing = next(
            (r for r, texts in world.CLOSINGS.items() if any(t in " ".join(words) for t in texts)),
            None,
        )
        n_hinted += closing is not None
        n_told += closing == "told"
        for at in (i for i, word in enumerate(words) if word == "a" and words[i - 1] == "?"):
            place, answer = words[at - 2], words[at + 1]
            assert document.scored[at + 1]
            if closing == "told":
                question = world.question(place).split()
                assert words[at - len(question) - 3 : at - len(question) + 1] == [
                    place,
                    "is",
                    answer,
                    ".",
                ]
            else:
                assert answer == picture.digit_at(place)
    assert 0.65 < n_told / n_hinted < 0.75


def test_tokenizer_knows_every_word() -> None:
    tokenizer = world.build_tokenizer()
    rng = random.Random(1)
    digits = world.load_digits("train")
    texts = [
        " ".join(world.training_document(world.draw_picture(digits, rng), rng).words[1:-1])
        for _ in range(300)
    ]
    texts += [
        pair.prompt
        for kind in world.PROMPT_KINDS
        for pair in world.vision_pairs("test", 40, 0, kind)
    ]  # type: ignore[misc]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == 1 + len(text.split())
    assert tokenizer.image_token == world.IMAGE
    assert (
        tokenizer(world.IMAGE * 3, add_special_tokens=False).input_ids
        == [tokenizer.image_token_id] * 3
    )
