"""From a method's settings to what steers the model: fitted, refined, tuned on dev, kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grains_ext import SteeringVectors, attribute, fit, refine, tune
from grains_ext.attribution import Attribution
from grains_ext.files import write_text
from grains_ext.steering import (
    baselines,
    fit_caa,
    fit_gradient,
    fit_icv,
    fit_lat,
    fit_probe,
    fit_random_direction,
    fit_random_tokens,
    fit_vti,
)
from grains_ext.steering.calibrate import NothingWithinLimit, neighbour_sets
from recipes.data import Data
from recipes.lora import tuned_lora
from recipes.recipe import Method, Options, Recipe

Condition = SteeringVectors | Callable[[Any], AbstractContextManager[Any]]
"""What `evaluate` takes for one: vectors, or a function from the model to a context."""

_FITS: dict[str, Callable[..., SteeringVectors]] = {
    "grains": fit,
    "random_tokens": fit_random_tokens,
    "random_direction": fit_random_direction,
    "caa": fit_caa,
    "icv": fit_icv,
    "probe": fit_probe,
    "lat": fit_lat,
    "vti": fit_vti,
    "gradient": fit_gradient,
}
_SEEDED = ("random_tokens", "random_direction", "lat", "vti")
_MASKS_TOKENS = ("grains", "random_tokens")
# Around the strength that vectors were refined at.
_REFINED_FACTORS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6)


@dataclass(frozen=True)
class Workshop:
    """One model with its data and the folder that holds everything made of them."""

    recipe: Recipe
    model: Any
    processor: Any
    data: Data
    folder: Path
    progress: bool = True

    @property
    def parts(self) -> tuple[Any, Any, list[Any]]:
        """Model, processor and the pairs to fit on."""
        return self.model, self.processor, self.data.fit

    @cached_property
    def attributions(self) -> list[Attribution]:
        """Of the fit pairs; taken from the folder where an earlier run made them."""
        return attribute(
            *self.parts,
            **self.recipe.settings["attribution"],
            max_batch_tokens=self._budget,
            output_dir=self.folder / "attributions",
            progress=self.progress,
        )

    def tuned(self, row: str, method: Method, draw: int) -> Condition | None:
        """The method as it did best on dev; None where no setting stays within the limit.

        What the folder holds already is read, not made again.
        """
        folder, failure = self.folder / "tuned" / row, failure_of(self.folder, row)
        if failure.is_file():
            return None
        try:
            if method.lora is not None:
                return tuned_lora(self, method.lora, folder)
            if not folder.is_dir():
                self._tuned_vectors(row, method, draw).save_pretrained(folder)
        except NothingWithinLimit as error:
            folder.parent.mkdir(exist_ok=True)
            write_text(failure, json.dumps({"nothing_within_the_limit": str(error)}) + "\n")
            return None
        return SteeringVectors.from_pretrained(folder)

    def _tuned_vectors(self, row: str, method: Method, draw: int) -> SteeringVectors:
        """The best of the method's variants by accuracy on dev, then by mean margin."""
        found, failure = [], None
        for number, variant in enumerate(method.variants):
            name = row if len(method.variants) == 1 else f"{row}-{number + 1}"
            vectors = self._made(name, method, variant, draw)
            try:
                found.append(self._tuned(name, vectors, together=method.refine is not None))
            except NothingWithinLimit as error:
                failure = error
        if not found:
            assert failure is not None
            raise failure
        return max(found, key=_rank)

    def _made(self, name: str, method: Method, variant: Options, draw: int) -> SteeringVectors:
        folder = self.folder / "fitted" / name
        if not folder.is_dir():
            if method.refine is not None:
                made = self._refined(method.refine)
            else:
                assert method.fit is not None
                made = self._fitted(method.fit, {**(method.options or {}), **variant}, draw)
            made.save_pretrained(folder)
        return SteeringVectors.from_pretrained(folder)

    def _fitted(self, name: str, options: Options, draw: int) -> SteeringVectors:
        settings = self.recipe.settings
        options = {**options, "max_batch_tokens": self._budget, "progress": self.progress}
        if name in _MASKS_TOKENS:
            options = {"k": self.recipe.benchmark["k"], **options}
        if name == "grains":
            options["attributions"] = self.attributions
            options["baseline"] = settings["attribution"].get("baseline", "bos")
        if name in _SEEDED:
            options["seed"] = settings["seed"] + draw
        return _FITS[name](*self.parts, **options)

    def _refined(self, start: str) -> SteeringVectors:
        """From the start's variant that did best on dev, all blocks together.

        Where no setting of the start is within the limit, from its first variant.
        """
        method = self.recipe.methods()[start]
        best = self.tuned(start, method, 0)
        signs = best.metadata.get("signs") if isinstance(best, SteeringVectors) else None
        variants = list(method.variants)
        number = next((i for i, each in enumerate(variants) if each.get("signs") == signs), 0)
        name = start if len(variants) == 1 else f"{start}-{number + 1}"
        settings = self.recipe.settings
        return refine(
            *self.parts,
            self._made(name, method, variants[number], 0),
            dev_pairs=self.data.dev,
            neutral_texts=self.data.neutral_dev,
            seed=settings["seed"],
            max_batch_tokens=self._budget,
            progress=self.progress,
            **settings["refine"],
        )

    def _tuned(self, name: str, vectors: SteeringVectors, *, together: bool) -> SteeringVectors:
        settings = self.recipe.settings["tune"]
        trials = self.folder / "trials" / f"{name}.jsonl"
        trials.parent.mkdir(exist_ok=True)
        if together:
            blocks = [vectors.blocks]
            strengths = [factor * vectors.strength for factor in _REFINED_FACTORS]
        else:
            shortest = settings["shortest_run"] * len(vectors.blocks)
            blocks = [run for run in neighbour_sets(vectors.blocks) if len(run) >= shortest]
            strengths = settings["strengths"]
        return tune(
            self.model,
            self.processor,
            self.data.dev,
            vectors,
            neutral_texts=self.data.neutral_dev,
            blocks=blocks,
            strengths=strengths,
            max_perplexity_ratio=settings["max_perplexity_ratio"],
            trials=trials,
            seed=self.recipe.settings["seed"],
            max_batch_tokens=self._budget,
            progress=self.progress,
        )

    @property
    def _budget(self) -> int:
        budget: int = self.recipe.settings["max_batch_tokens"]
        return budget


def failure_of(folder: Path, row: str) -> Path:
    """The file that says that no setting of a row is within the limit."""
    return folder / "tuned" / f"{row}.json"


def told(data: Data, instruction: str) -> Data:
    """The judged items with an instruction in front: prompting in the place of steering.

    Texts that no one prompts for are left out: they stay as they are.
    """
    return replace(
        data,
        test_pairs=baselines.with_instruction(data.test_pairs, instruction),
        choices={
            name: baselines.with_instruction(items, instruction)
            for name, items in data.choices.items()
        },
        asked={
            name: replace(
                asked, questions=tuple(baselines.with_instruction(asked.questions, instruction))
            )
            for name, asked in data.asked.items()
        },
        neutral_test=[],
    )


def _rank(vectors: SteeringVectors) -> tuple[float, float]:
    best = vectors.metadata["tuning"]["chosen"]
    return best["accuracy"], best["mean_margin"]
