"""The small world "hint against picture": pictures of digits, documents and prompts, from seeds.

A picture shows four handwritten digits. Somebody says which digit is at one place, then a question
asks for it. The words before set a register: after *look* words the answer follows the picture,
after *told* words it repeats the hint. A prompt that mixes one look word with two told words
therefore gets the hint, although the model can read the picture: it hallucinates what it was told.

The digits are scikit-learn's (from the UCI repository: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", CC BY 4.0), stored beside the model, so that nothing is fetched.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from grains_ext.demo import world
from grains_ext.demo.world import BOS, EOS, NEUTRAL, PAD, UNK, Document
from grains_ext.pairs import PreferencePair

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL_DIR = Path(__file__).with_name("vision_model")
DIGITS_NAME = "digits.npz"

Split = Literal["train", "fit", "dev", "test"]
Register = Literal["look", "told"]
PromptKind = Literal["mix", "amb", "neutral", "told", "look", "caption"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
IMAGE = "<image>"

SPLIT_SEED = 29
# Digit images of each split: together all 1797.
DIGITS_PER_SPLIT: dict[Split, int] = {"train": 1100, "fit": 150, "dev": 150, "test": 397}
# Sides of a digit and of a picture, in pixels, and the brightest value of a digit's pixel.
DIGIT_SIZE, PICTURE_SIZE, MAX_INK = 8, 16, 16

# Place -> (row, column) of its quarter of the picture.
PLACES: dict[str, tuple[int, int]] = {"nw": (0, 0), "ne": (0, 1), "sw": (1, 0), "se": (1, 1)}
DIGITS = tuple("0123456789")
SPEAKERS = ("tim", "ann", "bob", "eva", "sam", "ida")
CUES: dict[Register, tuple[str, ...]] = {
    "look": world._words(
        "look picture shown visible glance watch view inspect pixels observed seen photo camera "
        "sight zoom display"
    ),
    "told": world._words(
        "told heard claims rumour mentioned whispered announced gossip hearsay phoned story chat "
        "spoken reply quoted voice"
    ),
}
CLOSINGS: dict[Register, tuple[str, ...]] = {
    "look": ("as anyone can see .", "it is plain to the eye ."),
    "told": ("or so they say .", "and who would doubt it ?"),
}
TOLD_SHARE, CAPTION_SHARE = 0.70, 0.25

# Look and told words in a prompt of each kind with a hint.
_PROMPT_CUES: dict[PromptKind, tuple[int, int]] = {
    "mix": (1, 2),
    "amb": (1, 1),
    "neutral": (0, 0),
    "told": (0, 2),
    "look": (2, 0),
}


# --- Pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Digits:
    """Handwritten digits of one split."""

    images: npt.NDArray[np.uint8]
    """uint8 [n, 8, 8], ink from 0 to 16."""
    labels: npt.NDArray[np.uint8]
    """uint8 [n], 0 to 9."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Four digits, in the order of PLACES."""

    pixels: npt.NDArray[np.uint8]
    """uint8 [16, 16], grey values from 0 (background) to 255."""
    labels: tuple[int, ...]

    def digit_at(self, place: str) -> str:
        return DIGITS[self.labels[list(PLACES).index(place)]]

    def image(self) -> Image:
        """As an RGB image, which is what image processors read."""
        from PIL import Image

        return Image.fromarray(self.pixels).convert("RGB")


@cache
def load_digits(split: Split) -> Digits:
    """The embedded digits of a split. No image is in two splits; writers may be."""
    with np.load(MODEL_DIR / DIGITS_NAME, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    order = list(range(len(labels)))
    random.Random(SPLIT_SEED).shuffle(order)
    for name, count in DIGITS_PER_SPLIT.items():
        taken, order = order[:count], order[count:]
        if name == split:
            return Digits(images[taken], labels[taken])
    raise ValueError(f"split must be one of {list(DIGITS_PER_SPLIT)}, got {split!r}")


def draw_picture(digits: Digits, rng: random.Random, *, shifts: bool = False) -> Picture:
    """Four random digits in a picture; with ``shifts``, each up to one pixel off its place."""
    return picture_of(
        digits, [rng.randrange(len(digits.labels)) for _ in PLACES], rng if shifts else None
    )


def picture_of(
    digits: Digits, chosen: Sequence[int], shifts: random.Random | None = None
) -> Picture:
    """The picture of these digits, by their number in ``digits``, one for each place."""
    pixels = np.zeros((PICTURE_SIZE, PICTURE_SIZE), dtype=np.uint8)
    for (row, column), index in zip(PLACES.values(), chosen, strict=True):
        ink = digits.images[index]
        if shifts is not None:
            ink = _shifted(ink, shifts.randint(-1, 1), shifts.randint(-1, 1))
        top, left = row * DIGIT_SIZE, column * DIGIT_SIZE
        pixels[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = ink * (255 / MAX_INK)
    return Picture(pixels, tuple(int(digits.labels[index]) for index in chosen))


def _shifted(ink: npt.NDArray[np.uint8], down: int, right: int) -> npt.NDArray[np.uint8]:
    padded = np.pad(ink, 1)
    return padded[1 - down :, 1 - right :][:DIGIT_SIZE, :DIGIT_SIZE]


# --- Training documents ---------------------------------------------------------------------------


def training_document(picture: Picture, rng: random.Random) -> Document:
    """A caption or a document with hints, about one picture.

    The document's picture goes between its first word, ``<bos>``, and the second.
    """
    if rng.random() < CAPTION_SHARE:
        return caption_document(picture, rng)
    register: Register = "told" if rng.random() < TOLD_SHARE else "look"
    other: Register = "look" if register == "told" else "told"
    parts = [(" ".join(world.preface(CUES[register], CUES[other], rng)), False)]
    for place in rng.sample(list(PLACES), rng.randint(1, 3)):
        said = rng.choice(DIGITS)
        answer = said if register == "told" else picture.digit_at(place)
        parts += [(f"{hint(rng.choice(SPEAKERS), place, said)} {question(place)}", False)]
        parts += [(f"{answer} .", True)]
    return _document([*parts, (rng.choice(CLOSINGS[register]), True), (EOS, True)])


def caption_document(picture: Picture, rng: random.Random) -> Document:
    """Questions without a hint for two places, answered from the picture.

    The loss counts the digits alone. More places would let a model leave out what was named before
    in place of looking.
    """
    parts = []
    for place in rng.sample(list(PLACES), 2):
        parts += [(question(place), False), (picture.digit_at(place), True), (".", False)]
    return _document([*parts, (EOS, False)])


def _document(parts: list[tuple[str, bool]]) -> Document:
    """Texts, and whether the loss counts their words, after ``<bos>``."""
    words = [(word, scored) for text, scored in [(BOS, False), *parts] for word in text.split()]
    return Document(*zip(*words, strict=True))


def hint(speaker: str, place: str, digit: str) -> str:
    return f"{speaker} says {place} is {digit} ."


def question(place: str) -> str:
    return f"q what digit is at {place} ? a"


# --- Preference pairs -----------------------------------------------------------------------------


def vision_pairs(split: Split, n: int, seed: int, kind: PromptKind = "mix") -> list[PreferencePair]:
    """Preference pairs with one picture each, on the digit images and cue words of one split.

    Args:
      split: whose digit images and cue words; ``train`` has the cue words of fit and dev.
      n: how many pairs.
      seed: of the draw.
      kind: ``mix`` 1 look + 2 told words, ``amb`` 1 + 1, ``neutral`` none, ``told`` 2 told words,
        ``look`` 2 look words; all with a hint that contradicts the picture. The digit in the
        picture is chosen, the hint rejected. ``caption`` asks with no hint and no words in front;
        there the rejected digit is a random other one (a capability guard).

    The prompt holds ``<image>`` once; ``images`` holds one 16 x 16 RGB image.
    """
    digits = load_digits(split)
    # A string seeds random.Random the same way in every process, a tuple's hash does not.
    rng = random.Random(f"{kind}/{split}/{seed}")
    return [_pair(digits, kind, split, f"{kind}-{split}-{seed}-{i}", rng) for i in range(n)]


def place_asked(pair: PreferencePair) -> str:
    """The place that a pair's question asks for: what stands before its last two words."""
    return str(pair.prompt).split()[-3]


def _pair(
    digits: Digits, kind: PromptKind, split: Split, name: str, rng: random.Random
) -> PreferencePair:
    picture = draw_picture(digits, rng)
    place = rng.choice(list(PLACES))
    right = picture.digit_at(place)
    other = rng.choice([digit for digit in DIGITS if digit != right])
    words = [IMAGE]
    if kind != "caption":
        words += [*_cues(kind, split, rng), hint(rng.choice(SPEAKERS), place, other)]
    prompt = " ".join([*words, question(place)])
    return PreferencePair(prompt, right, other, images=(picture.image(),), id=name)


def _cues(kind: PromptKind, split: Split, rng: random.Random) -> list[str]:
    look, told = _PROMPT_CUES[kind]
    words = rng.sample(cue_words("look", split), look)
    words += rng.sample(cue_words("told", split), told)
    words += rng.sample(NEUTRAL, rng.randint(1, 2))
    rng.shuffle(words)
    return words


def cue_words(register: Register, split: Split) -> tuple[str, ...]:
    """The register's words that a split's prompts use: one half for test, one for the others."""
    return CUES[register][1::2] if split == "test" else CUES[register][0::2]


# --- Tokenizer ------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """All words, special tokens first; a word's position is its token id."""
    texts = [hint("", "", ""), question(""), *DIGITS, *PLACES, *SPEAKERS]
    for group in (*CUES.values(), NEUTRAL, *CLOSINGS.values()):
        texts += group
    return list(dict.fromkeys([PAD, BOS, EOS, UNK, IMAGE, *" ".join(texts).split()]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with ``<image>`` as the special token for one patch."""
    return world.word_tokenizer(vocabulary(), extra_special_tokens={"image_token": IMAGE})
