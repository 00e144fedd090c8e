"""The held-out comparison: every method gets the same pairs, the same tuning and the same limit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from grains_ext.attribution import Attribution
from grains_ext.demo import world
from grains_ext.evaluation import Proportion, measure
from grains_ext.pairs import PreferencePair
from grains_ext.report import MethodRow
from grains_ext.steering import (
    SteeringVectors,
    fit,
    fit_caa,
    fit_random_direction,
    fit_random_tokens,
    refine,
    tune,
)

OURS = "GrAInS (ours)"
REFINED = "GrAInS, refined"
MAX_PERPLEXITY_RATIO = 1.1
# fit's three ways to use the two masked shifts. Tuning chooses, for ours as for random tokens.
SIGNS: dict[Literal["both", "positive", "negative"], str] = {
    "both": "v+ and v-",
    "positive": "v+ alone",
    "negative": "v- alone",
}


@dataclass(frozen=True)
class Sizes:
    """How much is fitted, tried and measured."""

    fit_pairs: int = 80
    dev_pairs: int = 125
    test_pairs: int = 330
    stories: int = 50
    k: int = 4
    """Tokens masked per sign: about as many words of a prompt as carry a cue or the evidence."""
    random_draws: int = 3
    """Each random baseline is fitted, tuned and tested this often: one draw would be luck."""
    strengths: tuple[float, ...] | None = None
    """What tuning tries; None for tune's own grid."""
    refine_steps: int = 40
    """Gradient steps on the direction that did best."""
    speed_tokens: int = 64
    speed_rounds: int = 25


QUICK = Sizes(
    fit_pairs=24,
    dev_pairs=30,
    test_pairs=60,
    stories=12,
    random_draws=1,
    strengths=(0.3, 0.65),
    refine_steps=5,
    speed_tokens=8,
    speed_rounds=2,
)


@dataclass(frozen=True)
class Data:
    """The pairs and stories of one seed. No entity and no cue word of test is in another part."""

    fit_pairs: list[PreferencePair]
    dev_pairs: list[PreferencePair]
    test_pairs: list[PreferencePair]
    dev_stories: list[str]
    test_stories: list[str]

    @classmethod
    def of(cls, seed: int, sizes: Sizes) -> Data:
        return cls(
            world.fit_pairs(seed, sizes.fit_pairs),
            world.dev_pairs(seed, sizes.dev_pairs),
            world.test_pairs(seed, sizes.test_pairs),
            world.stories("dev", seed=seed, n=sizes.stories),
            world.stories("test", seed=seed, n=sizes.stories),
        )


@dataclass(frozen=True)
class Tuned:
    """The variant of a fit that did best on the dev pairs, and every variant, each tuned."""

    best: SteeringVectors
    variants: list[SteeringVectors]

    @property
    def settings(self) -> str:
        signs = self.best.metadata.get("signs")
        blocks = ", ".join(map(str, self.best.blocks))
        chosen = f"block {blocks}, strength {self.best.strength:g}"
        return f"{chosen}, {SIGNS[signs]}" if signs else chosen

    @property
    def dev_accuracies(self) -> dict[str, float]:
        """Of each variant on the dev pairs, at its best block and strength."""
        return {
            SIGNS[vectors.metadata["signs"]]: vectors.metadata["tuning"]["chosen"]["accuracy"]
            for vectors in self.variants
        }


@dataclass(frozen=True)
class Draw:
    """One fit, tuned and tested; not tuned where it is the unsteered model."""

    tuned: Tuned | None
    accuracy: Proportion
    """On the test pairs."""
    perplexity: float
    """Of the test stories."""


@dataclass(frozen=True)
class MethodResult:
    """A method and its draws: one, or several where the method is random."""

    name: str
    draws: list[Draw]

    def row(self, unsteered_perplexity: float) -> MethodRow:
        """The line of the table. Several draws are pooled: the interval covers their pairs."""
        n = sum(draw.accuracy.n for draw in self.draws)
        outcomes = [
            i < draw.accuracy.successes for draw in self.draws for i in range(draw.accuracy.n)
        ]
        accuracy = Proportion.of(outcomes)
        if len(self.draws) == 1:
            tuned = self.draws[0].tuned
            settings = tuned.settings if tuned else ""
        else:
            each = ", ".join(f"{100 * draw.accuracy.value:.0f}" for draw in self.draws)
            settings = f"{len(self.draws)} draws: {each} %"
        ratios = [draw.perplexity / unsteered_perplexity for draw in self.draws]
        return MethodRow(
            self.name,
            accuracy.value,
            (accuracy.low, accuracy.high),
            n,
            sum(ratios) / len(ratios),
            settings,
        )

    def as_dict(self, unsteered_perplexity: float) -> dict[str, Any]:
        """Plain values for JSON, with every trial of the tuning."""
        return {
            "name": self.name,
            "draws": [
                {
                    "correct": draw.accuracy.successes,
                    "n": draw.accuracy.n,
                    "accuracy": draw.accuracy.value,
                    "interval": [draw.accuracy.low, draw.accuracy.high],
                    "perplexity": draw.perplexity,
                    "perplexity_ratio": draw.perplexity / unsteered_perplexity,
                    "settings": draw.tuned.settings if draw.tuned else None,
                    "tuning": [
                        {"signs": vectors.metadata.get("signs"), **vectors.metadata["tuning"]}
                        for vectors in (draw.tuned.variants if draw.tuned else [])
                    ],
                }
                for draw in self.draws
            ],
        }


def fit_methods(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[PreferencePair],
    attributions: Sequence[Attribution],
    *,
    k: int,
    seeds: Sequence[int],
) -> dict[str, list[list[SteeringVectors]]]:
    """Every method's draws, each with its variants; the random methods once per seed."""
    ours = [
        fit(model, tokenizer, pairs, k=k, signs=signs, attributions=attributions, progress=False)
        for signs in SIGNS
    ]
    return {
        OURS: [ours],
        "CAA": [[fit_caa(model, tokenizer, pairs)]],
        "random tokens": [
            [fit_random_tokens(model, tokenizer, pairs, k=k, signs=s, seed=seed) for s in SIGNS]
            for seed in seeds
        ],
        "random direction": [
            [fit_random_direction(model, tokenizer, pairs, seed=seed)] for seed in seeds
        ],
    }


def tuned(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    variants: Sequence[SteeringVectors],
    *,
    strengths: Sequence[float] | None = None,
) -> Tuned:
    """Variant, block and strength with the best accuracy on the dev pairs within the limit."""
    results = [
        tune(
            model,
            tokenizer,
            data.dev_pairs,
            vectors,
            neutral_texts=data.dev_stories,
            blocks=[[block] for block in vectors.blocks],
            strengths=strengths,
            max_perplexity_ratio=MAX_PERPLEXITY_RATIO,
            progress=False,
        )
        for vectors in variants
    ]
    chosen = [vectors.metadata["tuning"]["chosen"] for vectors in results]
    ranks = [(trial["accuracy"], trial["mean_margin"]) for trial in chosen]
    return Tuned(results[ranks.index(max(ranks))], results)


def refined(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    start: SteeringVectors,
    *,
    steps: int,
    strengths: Sequence[float] | None = None,
) -> Tuned:
    """Gradient steps on directions that were tuned, on the pairs they are of; then tuned again."""
    better = refine(
        model,
        tokenizer,
        data.fit_pairs,
        start,
        dev_pairs=data.dev_pairs,
        neutral_texts=data.dev_stories,
        steps=steps,
        progress=False,
    )
    return tuned(model, tokenizer, data, [better], strengths=strengths)


def judged(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    tuned: Tuned | None,
) -> Draw:
    """The model, steered where something was tuned, on the test pairs and test stories."""
    with tuned.best.applied(model) if tuned else nullcontext():
        measured = measure(
            model, tokenizer, data.test_pairs, neutral_texts=data.test_stories, generate=False
        )
    assert measured.perplexity is not None
    return Draw(tuned, measured.accuracy, measured.perplexity)
