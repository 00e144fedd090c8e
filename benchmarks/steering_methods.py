"""Every method of the steering benchmark, as functions from one model to its tuned result."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.steering_elsewhere import N_ELSEWHERE, changed_answers, elsewhere, staying
from benchmarks.steering_lora import lora_result
from benchmarks.steering_refine import Refiner
from benchmarks.steering_search import (
    TRIALS_PER_BLOCK,
    Bench,
    Choice,
    Result,
    ScoredPairs,
    scored,
)
from benchmarks.steering_worlds import Trained
from grains_ext.attribution import Attribution, attribute
from grains_ext.demo import vision_world, world
from grains_ext.pairs import PreferencePair
from grains_ext.steering import (
    RefineSettings,
    SteeringVectors,
    fit,
    fit_caa,
    fit_gradient,
    fit_icv,
    fit_lat,
    fit_probe,
    fit_random_direction,
    fit_random_tokens,
    fit_vti,
)

SIGNS = ("both", "positive", "negative")
K = 2
"""Tokens masked per sign: as many as a prompt has words that speak for an answer."""
DRAWS = 3
"""Of each random method; its accuracy is their mean."""
BASELINE = "bos"
REFINE = RefineSettings(
    steps=40, learning_rate=0.4, growth=4.0, drift_weight=30.0, pairs_per_step=25, evaluate_every=20
)
"""Growth: a direction that costs no drift may become four times as strong; tuning decides."""
FALLING = replace(REFINE, learning_rate=0.8, decay="linear")
"""As far a way in as many steps, of which the last ones settle."""
HALF = replace(FALLING, steps=20)
FEW_STEPS = replace(REFINE, steps=10, evaluate_every=5)
"""A rate that stays: in ten steps a falling one leaves zero far behind, on dev."""
TOGETHER = RefineSettings(evaluate_every=10)
"""`refine`'s own settings, for all blocks together."""
TOGETHER_HALF, TOGETHER_FEW = replace(TOGETHER, steps=20), replace(TOGETHER, steps=10)


@dataclass(frozen=True, eq=False)
class Run:
    """One model's bench, and what several methods share."""

    bench: Bench
    signs: str | None = None
    """Those that tuning chose for the closed form, where that is known already."""
    _attributions: dict[str, list[Attribution]] = field(default_factory=dict)

    @property
    def trained(self) -> Trained:
        return self.bench.trained

    @property
    def parts(self) -> tuple[Any, Any, list[PreferencePair]]:
        """Model, processor and the pairs to fit on."""
        return self.trained.model, self.trained.processor, self.bench.data.fit

    def attributions(self, baseline: str) -> list[Attribution]:
        if baseline not in self._attributions:
            self._attributions[baseline] = attribute(*self.parts, baseline=baseline, progress=False)
        return self._attributions[baseline]

    def fitted(self, **options: Any) -> SteeringVectors:
        """Ours, with options of `fit`."""
        options = {"k": K, "baseline": BASELINE, **options}
        attributions = self.attributions(options["baseline"])
        return fit(*self.parts, attributions=attributions, progress=False, **options)

    def by_signs(self, **options: Any) -> dict[str, SteeringVectors]:
        """Once for each way to use the two signs: tuning chooses."""
        return {signs: self.fitted(signs=signs, **options) for signs in SIGNS}

    @cached_property
    def tuned_fit(self) -> Result:
        return self.bench.tuned(self.by_signs())

    @cached_property
    def caa(self) -> SteeringVectors:
        return fit_caa(*self.parts)

    @cached_property
    def refiner(self) -> Refiner:
        return Refiner.of(self.bench)

    @cached_property
    def told_what_stays(self) -> Run:
        """The same, with prompts among the neutral texts whose answers are to stay."""
        bench = copy.copy(self.bench)
        own = staying(self.trained.world, len(bench.data.fit))
        bench.data = replace(bench.data, neutral_fit=[*bench.data.neutral_fit, *own])
        return Run(bench, self.signs, self._attributions)

    @cached_property
    def limits(self) -> dict[int, float]:
        """The largest strength of the gradient's direction within the limit, by block."""
        return {
            block: self.bench.largest_strength({block: direction}) or 0.1
            for block, direction in fit_gradient(*self.parts).directions.items()
        }

    def refined(self, start: SteeringVectors, settings: RefineSettings = REFINE) -> Result:
        return self.bench.tuned({"": self.refined_vectors(start, settings)})

    def refined_vectors(self, start: SteeringVectors, settings: RefineSettings) -> SteeringVectors:
        """The blocks of the first half, each on its own, to be tuned like the rest.

        All starts have the same strength. Later blocks were never the best for an optimised
        direction; leaving them out saves half of the time, for all starts alike.
        """
        vectors: dict[int, torch.Tensor] = {}
        for block in start.blocks[: -(-len(start.blocks) // 2)]:
            one = start.subset([block]).with_strength(self.limits[block])
            best = self.refiner(one, settings)
            vectors |= best.directions
        return replace(start, directions=vectors)

    def refined_together(
        self, start: SteeringVectors, settings: RefineSettings, *, with_elsewhere: bool
    ) -> Result:
        """All blocks at once, at the strength that fitted vectors come with.

        with_elsewhere: also what that changes where nothing should change.
        """
        best = self.refiner(start, settings)
        result = self.bench.tuned({"": best}, together=True)
        if result.choice is None or not with_elsewhere:
            return result
        changed = self.bench.changed_elsewhere(best.directions, result.choice.strength)
        return replace(result, details=changed)

    @property
    def starts(self) -> dict[str, Callable[[], SteeringVectors]]:
        """What refining begins with."""

        def best_fit() -> SteeringVectors:
            if self.signs is not None:
                return self.fitted(signs=self.signs)
            choice = self.tuned_fit.choice
            return self.fitted(signs=choice.variant if choice else SIGNS[0])

        def zeros() -> SteeringVectors:
            nothing = {block: torch.zeros_like(v) for block, v in self.caa.directions.items()}
            return replace(self.caa, directions=nothing)

        return {"GrAInS": best_fit, "CAA": lambda: self.caa, "zero": zeros}


def unsteered(run: Run) -> list[Result]:
    return [run.bench.unsteered()]


def closed_form(run: Run) -> list[Result]:
    return [run.tuned_fit]


def random_tokens(run: Run) -> list[Result]:
    """The same tokens may be masked, chosen by a draw in place of the scores."""
    return [
        run.bench.tuned(
            {signs: fit_random_tokens(*run.parts, k=K, signs=signs, seed=seed) for signs in SIGNS}
        )
        for seed in range(DRAWS)
    ]


def random_tokens_any(run: Run) -> list[Result]:
    """Any token may be masked but special ones."""
    free: dict[str, Any] = {"answer_tokens": True, "max_frequency": 1.0}
    return [
        run.bench.tuned(
            {
                signs: fit_random_tokens(*run.parts, k=K, signs=signs, seed=seed, **free)
                for signs in SIGNS
            }
        )
        for seed in range(DRAWS)
    ]


def random_direction(run: Run) -> list[Result]:
    return [
        run.bench.tuned({"": fit_random_direction(*run.parts, seed=seed)}) for seed in range(DRAWS)
    ]


def caa(run: Run) -> list[Result]:
    return [run.bench.tuned({"": run.caa})]


def icv(run: Run) -> list[Result]:
    return [run.bench.tuned({"": fit_icv(*run.parts)})]


def lat(run: Run) -> list[Result]:
    return [run.bench.tuned({"": fit_lat(*run.parts)})]


def probe(run: Run) -> list[Result]:
    return [run.bench.tuned({"": fit_probe(*run.parts)})]


def vti(run: Run) -> list[Result]:
    """For pictures alone."""
    return [run.bench.tuned({"": fit_vti(*run.parts)})]


def gradient(run: Run) -> list[Result]:
    return [run.bench.tuned({"": fit_gradient(*run.parts)})]


def lora(run: Run) -> list[Result]:
    return [lora_result(run.bench, REFINE)]


def refined(start: str, settings: RefineSettings) -> Callable[[Run], list[Result]]:
    return lambda run: [run.refined(run.starts[start](), settings)]


def prompt_only(run: Run) -> list[Result]:
    """Words of the wanted register in front: as many draws of one to four as others have trials."""
    return [_prompted(run, within_limit=True)]


def prompt_beyond_limit(run: Run) -> list[Result]:
    """The same whatever it does to the perplexity."""
    return [_prompted(run, within_limit=False)]


def _prompted(run: Run, *, within_limit: bool) -> Result:
    bench, name = run.bench, run.trained.world
    words = (
        world.cue_words("careful", "fit")
        if name == "text"
        else vision_world.cue_words("look", "fit")
    )
    rng = random.Random(0)
    n_trials = TRIALS_PER_BLOCK * bench.view.n_blocks
    trials: list[tuple[Choice, str]] = []
    for trial in range(n_trials):
        instruction = " ".join(rng.choices(words, k=1 + trial % 4))
        dev = ScoredPairs.of(run.trained, bench.view, _told(bench.data.dev, instruction))
        trials.append((Choice.of(instruction, [], 1.0, dev.margins()), instruction))
    for choice, instruction in sorted(trials, key=lambda trial: trial[0].rank, reverse=True):
        if within_limit:
            neutral = scored(run.trained, bench.view, _told(bench.data.neutral_dev, instruction))
            if bench.rise(neutral.nlls()) > bench.limit.log_ratio:
                continue
        test = ScoredPairs.of(run.trained, bench.view, _told(bench.data.test, instruction))
        changed = _changed_by(run, instruction)
        neutral = scored(run.trained, bench.view, _told(bench.data.neutral_test, instruction))
        right = (test.margins() > 0).tolist()
        return Result(right, bench.ratio(neutral.nlls()), choice, n_trials, changed)
    return replace(bench.unsteered(), trials=n_trials)


def _changed_by(run: Run, instruction: str) -> dict[str, Any]:
    """What the words in front do to prompts that nothing is meant to change, as details."""
    bench = run.bench
    kinds = elsewhere(run.trained.world, "test", N_ELSEWHERE)

    def told(items: ScoredPairs) -> torch.Tensor:
        [kind] = [kind for kind, own in bench.elsewhere.items() if own is items]
        own = ScoredPairs.of(run.trained, bench.view, _told(kinds[kind], instruction))
        return own.answers()

    return {"elsewhere": changed_answers(bench.elsewhere, {"without": told})}


def _told(items: Iterable[Any], instruction: str) -> list[Any]:
    """Texts and pairs with an instruction in front, behind the picture where there is one."""

    def told(text: str) -> str:
        before, image, rest = text.rpartition(vision_world.IMAGE)
        return f"{before}{image} {instruction} {rest}".strip()

    return [
        told(item) if isinstance(item, str) else replace(item, prompt=told(str(item.prompt)))
        for item in items
    ]


def refined_together(
    start: str, settings: RefineSettings, *, with_elsewhere: bool = False
) -> Callable[[Run], list[Result]]:
    return lambda run: [
        run.refined_together(run.starts[start](), settings, with_elsewhere=with_elsewhere)
    ]


def told_what_stays(method: Callable[[Run], list[Result]]) -> Callable[[Run], list[Result]]:
    return lambda run: method(run.told_what_stays)


METHODS: dict[str, Callable[[Run], list[Result]]] = {
    "unsteered": unsteered,
    "GrAInS": closed_form,
    "GrAInS, refined": refined("GrAInS", REFINE),
    "CAA, refined": refined("CAA", REFINE),
    "zero, refined": refined("zero", REFINE),
    "GrAInS, 20 steps": refined("GrAInS", HALF),
    "CAA, 20 steps": refined("CAA", HALF),
    "zero, 20 steps": refined("zero", HALF),
    "GrAInS, 10 steps": refined("GrAInS", FEW_STEPS),
    "CAA, 10 steps": refined("CAA", FEW_STEPS),
    "zero, 10 steps": refined("zero", FEW_STEPS),
    "GrAInS, falling rate": refined("GrAInS", FALLING),
    "CAA, falling rate": refined("CAA", FALLING),
    "zero, falling rate": refined("zero", FALLING),
    "GrAInS, refined, all blocks": refined_together("GrAInS", TOGETHER, with_elsewhere=True),
    "CAA, refined, all blocks": refined_together("CAA", TOGETHER),
    "zero, refined, all blocks": refined_together("zero", TOGETHER),
    "GrAInS, 20 steps, all blocks": refined_together("GrAInS", TOGETHER_HALF),
    "CAA, 20 steps, all blocks": refined_together("CAA", TOGETHER_HALF),
    "zero, 20 steps, all blocks": refined_together("zero", TOGETHER_HALF),
    "GrAInS, 10 steps, all blocks": refined_together("GrAInS", TOGETHER_FEW),
    "CAA, 10 steps, all blocks": refined_together("CAA", TOGETHER_FEW),
    "zero, 10 steps, all blocks": refined_together("zero", TOGETHER_FEW),
    "gradient direction": gradient,
    "CAA": caa,
    "ICV": icv,
    "probe (ITI)": probe,
    "LAT (RepE)": lat,
    "VTI": vti,
    "random tokens": random_tokens,
    "random tokens, any": random_tokens_any,
    "random direction": random_direction,
    "prompt only": prompt_only,
    "prompt, no limit": prompt_beyond_limit,
    "LoRA": lora,
    "GrAInS, refined, all blocks, told what stays": told_what_stays(
        refined_together("GrAInS", TOGETHER, with_elsewhere=True)
    ),
    "LoRA, told what stays": told_what_stays(lora),
}


def ablation(**options: Any) -> Callable[[Run], list[Result]]:
    return lambda run: [run.bench.tuned(run.by_signs(**options))]


# What `fit` was before: the token replaced by BOS, any word a candidate.
BEFORE = {"mask_with": "bos", "answer_tokens": True, "max_frequency": 1.0}
ABLATIONS: dict[str, Callable[[Run], list[Result]]] = {
    "all as before": ablation(**BEFORE),
    "masked by <bos>": ablation(mask_with="bos"),
    "masked by <unk>": ablation(mask_with="unk"),
    "answer words too": ablation(answer_tokens=True),
    "frame words too": ablation(max_frequency=1.0),
    "attributed from <unk>": ablation(baseline="unk"),
    "attributed from the mean": ablation(baseline="mean"),
    "k = 1": ablation(k=1),
    "k = 4": ablation(k=4),
    "k = 10": ablation(k=10),
    "half of the mass": ablation(k=10, select="mass", mass=0.5),
    "whitened": ablation(method="whitened"),
    "PCA": ablation(method="pca"),
    "at the answer": ablation(capture="continuation"),
    "absolute scores": ablation(select="absolute"),
}
