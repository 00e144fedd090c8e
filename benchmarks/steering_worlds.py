"""The trained models and pairs that steering is judged on: two worlds, several seeds of each."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaProcessor as Processor

from grains_ext.demo import train, vision_train, vision_world, world
from grains_ext.pairs import PreferencePair
from grains_ext.progress import no_loading_bars

WorldName = Literal["text", "vision"]
WORLDS: tuple[WorldName, ...] = get_args(WorldName)

EMBEDDED: dict[tuple[WorldName, int], Path] = {
    ("text", 1): train.MODEL_DIR,
    ("vision", 0): vision_world.MODEL_DIR,
}
"""These come with the package, and are not trained again."""
TEXT_STEPS, TEXT_LENGTH_GROUPS = 2200, 3
"""A third more than the embedded model's steps: with 1600 half of the seeds fail the check."""

N_FIT, N_DEV, N_TEST = 50, 100, 400
N_STORIES, N_CAPTIONS = 60, 300
"""Neutral stories of dev and of test, of forty scored tokens each; captions to refine with."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model of one world and seed, in float32, and what its training wrote down."""

    world: WorldName
    seed: int
    model: Any
    processor: Any
    log: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.world}-{self.seed}"


@dataclass(frozen=True, eq=False)
class Data:
    """Pairs of one seed: no entity, digit image or cue word of test is in another part.

    neutral_dev, neutral_test: what must not suffer, in the form of pairs whose chosen answer is
    what an unharmed model says (`captions` of pictures), or of stories.
    """

    fit: list[PreferencePair]
    dev: list[PreferencePair]
    test: list[PreferencePair]
    neutral_fit: list[Any]
    """What optimised methods stay close to. Stories are dev's: nothing overfits to them here.
    Captions are of fit's digits: optimised on dev's, the limit would say little of other ones."""
    neutral_dev: list[Any]
    neutral_test: list[Any]

    @classmethod
    def of(cls, name: WorldName, seed: int = 0) -> Data:
        if name == "text":
            return cls(
                world.fit_pairs(seed, N_FIT),
                world.dev_pairs(seed, N_DEV),
                world.test_pairs(seed, N_TEST),
                list(world.stories("dev", seed=seed, n=N_STORIES)),
                list(world.stories("dev", seed=seed, n=N_STORIES)),
                list(world.stories("test", seed=seed, n=N_STORIES)),
            )
        pairs = vision_world.vision_pairs
        return cls(
            pairs("fit", N_FIT, seed),
            pairs("dev", N_DEV, seed),
            pairs("test", N_TEST, seed),
            list(pairs("fit", N_CAPTIONS, seed, "caption")),
            captions("dev", seed),
            captions("test", seed),
        )


def captions(split: vision_world.Split, seed: int = 0) -> list[PreferencePair]:
    """Every digit image of a split asked for once at each place, in pictures of four of them.

    The captions of one digit image stand together, len(PLACES) of them: what a direction does to
    the reading of an image it does at all its places, so that they count as one observation.
    """
    digits, places = vision_world.load_digits(split), list(vision_world.PLACES)
    n = len(digits.labels)
    rng = random.Random(f"captions/{split}/{seed}")
    orders = [rng.sample(range(n), n) for _ in places]
    pictures = [vision_world.picture_of(digits, chosen) for chosen in zip(*orders, strict=True)]

    def caption(index: int, number: int) -> PreferencePair:
        picture, place = pictures[orders[number].index(index)], places[number]
        right = picture.digit_at(place)
        return PreferencePair(
            f"{vision_world.IMAGE} {vision_world.question(place)}",
            right,
            rng.choice([digit for digit in vision_world.DIGITS if digit != right]),
            images=(picture.image(),),
            id=f"caption-{split}-{index}-{place}",
        )

    return [caption(index, number) for index in range(n) for number in range(len(places))]


def folder_of(name: WorldName, seed: int, worlds: Path) -> Path:
    return EMBEDDED.get((name, seed), worlds / f"{name}-{seed}")


def train_missing(name: WorldName, seed: int, worlds: Path) -> Path:
    """Trains the model of a seed where its folder has no log yet: some ten minutes of one core."""
    folder = folder_of(name, seed, worlds)
    if not (folder / train.LOG_NAME).is_file():
        if name == "text":
            config = train.TrainConfig(seed, steps=TEXT_STEPS, length_groups=TEXT_LENGTH_GROUPS)
            train.train_and_save(config, folder)
        else:
            vision_train.train_and_save(vision_train.VisionTrainConfig(seed), folder)
    return folder


def log_of(folder: Path) -> dict[str, Any] | None:
    """What training wrote into the folder; None where it has not, or not yet."""
    path = folder / train.LOG_NAME
    return json.loads(path.read_text()) if path.is_file() else None


def load(name: WorldName, seed: int, worlds: Path) -> Trained:
    """Raises FileNotFoundError where the model is not trained yet."""
    folder = folder_of(name, seed, worlds)
    log = log_of(folder)
    if log is None:
        raise FileNotFoundError(f"{folder} has no {train.LOG_NAME}: train it first (--train)")
    with no_loading_bars():
        if name == "text":
            model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            processor: Any = AutoTokenizer.from_pretrained(folder)
        else:
            model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            processor = Processor.from_pretrained(folder)
    return Trained(name, seed, model.eval().requires_grad_(False), processor, log)
