"""tune: which blocks to steer and how strongly, under a limit on lost fluency."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grains_ext.attribution.engine import hash_of_weights
from grains_ext.attribution.runs import hash_of_pairs
from grains_ext.attribution.shortcuts import alone_with
from grains_ext.decoder import DecoderView, prompt_lengths, view_of
from grains_ext.pair_batches import PairBatch, encode_batches
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.steering.neutral import Drift, Neutral, NeutralTexts, several_texts
from grains_ext.steering.positions import Positions
from grains_ext.steering.trials import TrialLog, hash_of_neutral, hash_of_vectors
from grains_ext.steering.vectors import SteeringVectors

# In lengths of the hidden state, where vectors are fitted by this package.
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0, 1.5, 2.2, 3.3)

# Pairs of the first round, of which there are at least so many, and settings of the last one.
_FIRST_SHARE, _FIRST_PAIRS, _FINALISTS = 1 / 8, 16, 4
# The winner's strength is varied by these factors, where the grid is ours.
_POLISH = (1.2, 1.1)
# Counted for a margin that is not finite, in nats: a lost answer, and JSON.
_LOST = -1e4


class NothingWithinLimit(ValueError):
    """Even the gentlest setting costs the neutral texts more than was allowed."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried."""

    blocks: list[int]
    strength: float
    perplexity_ratio: float | None = None
    """Steered over unsteered perplexity of the neutral texts; None where it is not finite, or was
    not measured because the setting was left early."""
    kl: float | None = None
    """KL(unsteered || steered) per token of the neutral texts, in nats; None without max_kl."""
    accuracy: float | None = None
    """Share of dev pairs with margin > 0; None where it was over the limit already."""
    mean_margin: float | None = None
    """Mean of log p(chosen) - log p(rejected), in nats."""
    n_pairs: int = 0
    """How many dev pairs it was scored on. Fewer than all: others were ahead, and it was left."""


@dataclass(frozen=True)
class _Setting:
    """What one trial steers with. Of two that do as well the first one in order is taken."""

    blocks: tuple[int, ...]
    strength: float


def tune(
    model: Any,
    processor: Any,
    dev_pairs: Iterable[PreferencePair],
    vectors: SteeringVectors,
    *,
    neutral_texts: Sequence[Neutral] | None = None,
    blocks: Iterable[Iterable[int]] | None = None,
    strengths: Sequence[float] | None = None,
    max_perplexity_ratio: float = 1.1,
    max_kl: float | None = None,
    positions: Positions = "all",
    trials: str | Path | None = None,
    seed: int = 0,
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    progress: bool = True,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """Chooses the blocks and the strength that answer most dev pairs right within the limit.

    For each block set the largest strength within the limit is found by bisection (perplexity rises
    with strength). All settings up to there are scored on an eighth of the dev pairs, the better
    half of them on as many again, and so on, until the best four have seen all pairs: successive
    halving (Jamieson and Talwalkar, 2016). A setting is better by its accuracy (pairs with
    log p(chosen) > log p(rejected)), then by its mean margin. With our own strengths, not the
    caller's, the winner's is then varied by a tenth and a fifth.

    Args:
        model: a transformers causal LM or vision-language model; left as it was.
        processor: its tokenizer, or for pairs with images its processor.
        dev_pairs: pairs that were not used for fitting.
        vectors: what to tune; their own strength plays no part.
        neutral_texts: what must stay as fluent as it is: texts, or pairs, with images or without,
            of which the chosen answer counts; by default the dev pairs' prompts.
        blocks: the block sets to try; by default runs of 1, 2, 4, ... neighbours, and all.
        strengths: those to try, > 0; by default STRENGTHS, from 0.05 to 3.3.
        max_perplexity_ratio: the limit on steered over unsteered perplexity.
        max_kl: a limit on KL(unsteered || steered) per token of the neutral texts, in nats, beside
            the other; None does not measure it, which halves the work on these texts.
        positions: the tokens that are to be steered, by a name that SteeringVectors.apply takes.
        trials: a JSON-lines file for every measurement as it is made. Where it is there already,
            what it holds is not measured again; limits, block sets and strengths may differ from
            the earlier run's.
        seed: of the order in which dev pairs are seen.
        max_batch_tokens: tokens per model call, padding included.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        progress: show a progress bar, and at the end the frontier.
        decoder: the view of ``model``, where its parts must be named by hand.

    Returns the chosen blocks' vectors at the chosen strength. metadata["tuning"] holds the limits,
    the unsteered accuracy and margin, the chosen trial, every trial, the frontier (no other trial
    is at once more accurate and more fluent) and how much was evaluated. Raises ValueError for no
    pairs, wrong strengths or blocks, or ``trials`` of another run; NothingWithinLimit, which is
    one, where no setting stays within the limit.
    """
    pairs = list(dev_pairs)
    if not pairs:
        raise ValueError("no dev pairs to tune on")
    grid = sorted(STRENGTHS if strengths is None else set(strengths))
    if not grid or not all(strength > 0 and math.isfinite(strength) for strength in grid):
        raise ValueError(f"strengths must be positive numbers, at least one; got {grid}")
    if not isinstance(positions, str):
        raise ValueError("tune steers positions by name: a mask fits one batch, not the dev pairs'")
    if max_kl is not None and not max_kl > 0:
        raise ValueError(f"max_kl must be more than 0 nats, or None for no limit; got {max_kl}")
    block_sets = neighbour_sets(vectors.blocks) if blocks is None else blocks
    candidates = [tuple(vectors.subset(chosen).blocks) for chosen in block_sets]
    if not candidates:
        raise ValueError("blocks: no block set to try")

    texts = several_texts(neutral_texts)
    view = view_of(model, decoder)
    log = TrialLog(
        trials,
        {
            "model": getattr(getattr(view.model, "config", None), "name_or_path", None) or None,
            "weights": hash_of_weights(view.model),
            "vectors": hash_of_vectors(vectors),
            "dev_pairs": hash_of_pairs(pairs, [None] * len(pairs)),
            "neutral_texts": hash_of_neutral(texts),
            "positions": positions,
            "separator": separator,
            "seed": seed,
        },
    )
    with alone_with(view.model), torch.no_grad():
        meter = _Meter(
            vectors,
            view,
            log,
            _Rounds(processor, pairs, seed, separator, max_batch_tokens),
            NeutralTexts(
                view,
                processor,
                texts,
                pairs,
                separator=separator,
                max_batch_tokens=max_batch_tokens,
                positions=positions,
            ),
            positions,
            (max_perplexity_ratio, max_kl),
        )
        unsteered = meter.unsteered()
        with progress_bar(progress) as bar:
            best = _search(meter, candidates, grid, bar)
            if strengths is None:
                best = _polished(meter, best)
    tuning = {
        "max_perplexity_ratio": max_perplexity_ratio,
        "max_kl": max_kl,
        "n_pairs": len(pairs),
        "unsteered": {"accuracy": _accuracy(unsteered), "mean_margin": fmean(unsteered)},
        "chosen": asdict(meter.trial(best)),
        "trials": [asdict(trial) for trial in meter.trials()],
        "frontier": [asdict(trial) for trial in frontier(meter.trials(), len(pairs))],
        "evaluations": meter.evaluations,
    }
    if progress:
        _print_frontier(tuning)
    chosen = vectors.subset(best.blocks).with_strength(best.strength)
    return replace(chosen, metadata={**vectors.metadata, "tuning": tuning})


def neighbour_sets(blocks: Iterable[int]) -> list[list[int]]:
    """The block sets that tune tries: about 3 n for n blocks.

    Each block, runs of 2, 4, 8, ... neighbours that overlap by half, and all blocks.
    """
    ordered = sorted(blocks)
    sets = [[block] for block in ordered]
    length = 2
    while length < len(ordered):
        starts = range(0, len(ordered) - length + 1, length // 2)
        sets += [ordered[start : start + length] for start in starts]
        length *= 2
    return sets if len(ordered) == 1 else [*sets, ordered]


def frontier(trials: Iterable[Trial], n_pairs: int) -> list[Trial]:
    """The trials on all pairs that no other one beats in accuracy and perplexity, by perplexity."""
    full = [
        (trial.perplexity_ratio, -trial.accuracy, -(trial.mean_margin or 0.0), trial)
        for trial in trials
        if trial.n_pairs == n_pairs
        and trial.accuracy is not None
        and trial.perplexity_ratio is not None
    ]
    kept: list[Trial] = []
    for _, _, _, trial in sorted(full, key=lambda entry: entry[:3]):
        if not kept or (trial.accuracy or 0.0) > (kept[-1].accuracy or 0.0):
            kept.append(trial)
    return kept


class _Rounds:
    """The dev pairs in a drawn order, cut into rounds; each is encoded when it is first needed."""

    def __init__(
        self,
        processor: Any,
        pairs: Sequence[PreferencePair],
        seed: int,
        separator: str | None,
        max_batch_tokens: int,
    ) -> None:
        self._pairs = list(pairs)
        random.Random(seed).shuffle(self._pairs)
        self._encode = partial(
            encode_batches, processor, separator=separator, max_batch_tokens=max_batch_tokens
        )
        n = len(pairs)
        self.ends = [min(n, max(_FIRST_PAIRS, math.ceil(n * _FIRST_SHARE)))]
        while self.ends[-1] < n:
            self.ends.append(min(n, 2 * self.ends[-1]))
        self._batches: dict[int, list[PairBatch]] = {}

    def span(self, number: int) -> tuple[int, int]:
        """Which pairs are new in a round."""
        return (0, *self.ends)[number], self.ends[number]

    def batches(self, number: int) -> list[PairBatch]:
        if number not in self._batches:
            start, stop = self.span(number)
            self._batches[number] = self._encode(self._pairs[start:stop])
        return self._batches[number]


class _Meter:
    """Measures settings, each at most once, and remembers all of it."""

    def __init__(
        self,
        vectors: SteeringVectors,
        view: DecoderView,
        log: TrialLog,
        rounds: _Rounds,
        neutral: NeutralTexts,
        positions: Positions,
        limits: tuple[float, float | None],
    ) -> None:
        self.vectors, self.view, self.log = vectors, view, log
        self.rounds, self.neutral, self.positions = rounds, neutral, positions
        self.max_ratio, self.max_kl = limits
        self.evaluations = {"neutral_texts": 0, "pairs": 0}
        self._drifts: dict[_Setting, Drift] = {}
        self._margins: dict[_Setting, list[float]] = {}
        self._prepared = False

    def unsteered(self) -> list[float]:
        """Margins of all pairs."""
        nothing = _Setting((), 0.0)
        return [m for number in range(len(self.rounds.ends)) for m in self._round(nothing, number)]

    def margins(self, setting: _Setting, number: int) -> None:
        """Scores a setting on the pairs of all rounds up to this one."""
        known = self._margins.setdefault(setting, [])
        for each in range(number + 1):
            if self.rounds.span(each)[0] >= len(known):
                known += self._round(setting, each)

    def rank(self, setting: _Setting) -> tuple[float, float]:
        margins = self._margins[setting]
        return _accuracy(margins), fmean(margins)

    def within(self, setting: _Setting) -> bool:
        """Whether a setting keeps the limits."""
        drift = self._drift(setting)
        if not drift.perplexity_ratio <= self.max_ratio:
            return False
        return self.max_kl is None or (drift.kl is not None and drift.kl <= self.max_kl)

    def gentlest(self) -> float:
        ratios = [drift.perplexity_ratio for drift in self._drifts.values()]
        return min((ratio for ratio in ratios if math.isfinite(ratio)), default=math.nan)

    def trial(self, setting: _Setting) -> Trial:
        drift = self._drifts.get(setting)
        margins = self._margins.get(setting)
        return Trial(
            blocks=list(setting.blocks),
            strength=setting.strength,
            perplexity_ratio=None if drift is None else _finite(drift.perplexity_ratio),
            kl=None if drift is None or drift.kl is None else _finite(drift.kl),
            accuracy=_accuracy(margins) if margins else None,
            mean_margin=fmean(margins) if margins else None,
            n_pairs=len(margins or ()),
        )

    def trials(self) -> list[Trial]:
        settings = {**self._drifts, **self._margins}
        return [
            self.trial(s)
            for s in sorted(settings, key=lambda s: (len(s.blocks), s.blocks, s.strength))
        ]

    def _drift(self, setting: _Setting) -> Drift:
        if setting not in self._drifts:
            measured = {"blocks": list(setting.blocks), "strength": setting.strength}
            stored = self.log.get(measure="drift", **measured)
            if stored is None or (self.max_kl is not None and "kl" not in stored):
                drift = self._measured_drift(setting)
                stored = {"perplexity_ratio": _finite(drift.perplexity_ratio)}
                if drift.kl is not None:
                    stored["kl"] = _finite(drift.kl)
                self.log.put(stored, measure="drift", **measured)
            ratio = stored["perplexity_ratio"]
            kl = stored.get("kl")
            self._drifts[setting] = Drift(math.inf if ratio is None else ratio, kl)
        return self._drifts[setting]

    def _measured_drift(self, setting: _Setting) -> Drift:
        if not self._prepared:
            self.neutral.prepare()
            self._prepared = True
        self.evaluations["neutral_texts"] += 1
        return self.neutral.drift(partial(self._steered, setting), with_kl=self.max_kl is not None)

    def _round(self, setting: _Setting, number: int) -> list[float]:
        span = list(self.rounds.span(number))
        measured = {"blocks": list(setting.blocks), "strength": setting.strength, "pairs": span}
        margins: list[float] | None = self.log.get(measure="margins", **measured)
        if margins is None:
            found: dict[int, float] = {}
            with self._steered(setting):
                for batch in self.rounds.batches(number):
                    found |= zip(batch.indices, self._batch_margins(batch), strict=True)
            margins = [found[index] for index in sorted(found)]
            self.evaluations["pairs"] += len(margins)
            self.log.put(margins, measure="margins", **measured)
        return margins

    def _batch_margins(self, batch: PairBatch) -> Iterator[float]:
        model = self.view.model
        with prompt_lengths(model, batch.prompt_lengths()):
            chosen, rejected = batch.logprobs(model(**batch.arguments(model)).logits)
        for margin in (chosen - rejected).tolist():
            yield margin if math.isfinite(margin) else _LOST

    def _steered(self, setting: _Setting) -> Any:
        if not setting.blocks:
            return nullcontext()
        chosen = self.vectors.subset(setting.blocks)
        return chosen.applied(
            self.view.model, setting.strength, positions=self.positions, decoder=self.view
        )


def _search(
    meter: _Meter, candidates: Sequence[tuple[int, ...]], grid: Sequence[float], bar: Progress
) -> _Setting:
    """The best setting of the grid within the limits."""
    task = bar.add_task("fluency", total=len(candidates))
    settings: list[_Setting] = []
    strongest: list[_Setting] = []
    for blocks in candidates:
        row = [_Setting(blocks, strength) for strength in grid]
        within = row[: _n_within(meter, row)]
        settings += within
        strongest += within[-1:]
        bar.advance(task)
    if not settings:
        limit = f"the perplexity within {meter.max_ratio} times the unsteered one"
        if meter.max_kl is not None:
            limit += f" and KL within {meter.max_kl} nats per token"
        raise NothingWithinLimit(
            f"no setting keeps {limit}; the gentlest made the perplexity {meter.gentlest():.3g} "
            "times the unsteered one: try smaller strengths or fewer blocks"
        )
    # One order for all ties: fewer blocks first, then less strength.
    for number, n_pairs in enumerate(meter.rounds.ends):
        task = bar.add_task(f"{n_pairs} dev pairs", total=len(settings))
        for setting in settings:
            meter.margins(setting, number)
            bar.advance(task)
        settings = sorted(settings, key=meter.rank, reverse=True)
        if n_pairs < meter.rounds.ends[-1]:
            kept = max(_FINALISTS, math.ceil(len(settings) / 2))
            if number == len(meter.rounds.ends) - 2:
                # None where what is left is gentler than what was measured, and yet worse.
                settings = _first_within(meter, settings, _FINALISTS) or strongest
            else:
                settings = settings[:kept]
    return _first_within(meter, settings, 1)[0]


def _n_within(meter: _Meter, row: Sequence[_Setting]) -> int:
    """How many settings, of rising strength, keep the limits."""
    low, high = 0, len(row)
    while low < high:
        middle = (low + high) // 2
        if meter.within(row[middle]):
            low = middle + 1
        else:
            high = middle
    return low


def _first_within(meter: _Meter, ranked: Sequence[_Setting], n: int) -> list[_Setting]:
    """The first n that keep the limits: fluency need not fall steadily, so each is measured."""
    found: list[_Setting] = []
    for setting in ranked:
        if len(found) == n:
            break
        if meter.within(setting):
            found.append(setting)
    return found


def _polished(meter: _Meter, best: _Setting) -> _Setting:
    """The winner at a strength between those of the grid, where that is better."""
    last = len(meter.rounds.ends) - 1
    for factor in _POLISH:
        for strength in (best.strength * factor, best.strength / factor):
            tried = replace(best, strength=float(f"{strength:.4g}"))
            if not meter.within(tried):
                continue
            meter.margins(tried, last)
            if meter.rank(tried) > meter.rank(best):
                best = tried
                break
    return best


def _accuracy(margins: Sequence[float]) -> float:
    return fmean(margin > 0 for margin in margins)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print_frontier(tuning: dict[str, Any]) -> None:
    table = Table("blocks", "strength", "accuracy", "mean margin", "perplexity", box=None)
    unsteered = tuning["unsteered"]
    accuracy, margin = unsteered["accuracy"], unsteered["mean_margin"]
    table.add_row("none", "", f"{100 * accuracy:.1f} %", f"{margin:.3f}", "x 1")
    for trial in tuning["frontier"]:
        table.add_row(
            ", ".join(map(str, trial["blocks"])),
            f"{trial['strength']:g}",
            f"{100 * trial['accuracy']:.1f} %",
            f"{trial['mean_margin']:.3f}",
            f"x {trial['perplexity_ratio']:.4f}",
        )
    Console(stderr=True).print(table)
