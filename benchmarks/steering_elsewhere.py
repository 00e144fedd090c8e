"""Prompts that no method is meant to change, and whose answers a method changes all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from benchmarks.steering_statistics import bits_of, outcomes, over_seeds
from benchmarks.steering_worlds import WorldName
from grains_ext.demo import vision_world, world
from grains_ext.pairs import PreferencePair

if TYPE_CHECKING:
    from benchmarks.steering_search import ScoredPairs

N_ELSEWHERE = 200
"""Prompts of each kind."""

Answers: TypeAlias = "Callable[[ScoredPairs], Tensor]"
"""int64 [n]: the likeliest next token after each prompt."""
Elsewhere = dict[str, list[PreferencePair]]


def elsewhere(name: WorldName, split: Literal["fit", "dev", "test"], n: int) -> Elsewhere:
    """Prompts that are not to be steered, by kind, with the right answer chosen.

    agrees: the pairs' mixture of cue words, but what is said is right: the evidence is what the
        model believes, the hint is the digit. careful, look: two of the wanted cue words, which the
        model obeys by itself. know, caption: the question alone.
    """
    if name == "text":
        mixed = world.pairs("mix", split, seed=1, n=n)
        others = {kind: world.pairs(kind, split, seed=1, n=n) for kind in ("careful", "know")}
        return {"agrees": [_said(pair, pair.chosen, pair.rejected) for pair in mixed], **others}
    pairs = vision_world.vision_pairs
    mixed = pairs(split, n, 1)
    return {
        "agrees": [_said(pair, pair.rejected, pair.chosen) for pair in mixed],
        "look": pairs(split, n, 1, "look"),
        "caption": pairs(split, n, 1, "caption"),
    }


def staying(name: WorldName, n: int) -> list[PreferencePair]:
    """n fit prompts of each kind but `agrees`, which only what a model knows tells from those that
    are to be steered."""
    kinds = elsewhere(name, "fit", n)
    del kinds["agrees"]
    return [pair for pairs in kinds.values() for pair in pairs]


def _said(pair: PreferencePair, said: str, right: str) -> PreferencePair:
    """The pair with `right` in place of what its prompt says."""
    prompt = str(pair.prompt)
    assert prompt.count(f" is {said} .") == 1
    return replace(
        pair, prompt=prompt.replace(f" is {said} .", f" is {right} ."), chosen=right, rejected=said
    )


def changed_answers(
    kinds: Mapping[str, ScoredPairs], ways: Mapping[str, Answers]
) -> dict[str, dict[str, str]]:
    """By kind, as bits: which answers are right unsteered, and which each way changes."""
    found: dict[str, dict[str, str]] = {}
    for kind, items in kinds.items():
        before = items.answers()
        marks = {"right": before == items.chosen}
        marks |= {name: answers(items) != before for name, answers in ways.items()}
        found[kind] = {name: bits_of(mark.tolist()) for name, mark in marks.items()}
    return found


def changed_summary(seeds: Sequence[Mapping[str, Mapping[str, str]]]) -> dict[str, dict[str, Any]]:
    """By kind: how many are right unsteered, and how many answers each way changes."""
    found: dict[str, dict[str, Any]] = {}
    for kind in seeds[0] if seeds else ():
        found[kind] = {
            name: asdict(over_seeds([outcomes(seed[kind][name]) for seed in seeds]))
            for name in ("right", "without", "with")
            if all(name in seed[kind] for seed in seeds)
        }
    return found
