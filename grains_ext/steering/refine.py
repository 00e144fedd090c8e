"""refine: a few dozen gradient steps on the directions themselves, from a fit or from anything."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.progress import TextColumn
from torch import Tensor
from torch.nn.functional import logsigmoid

from grains_ext.attribution.shortcuts import alone_with
from grains_ext.decoder import DecoderView, view_of
from grains_ext.pair_batches import PairBatch, encode_batches
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.steering.apply import check_fits
from grains_ext.steering.live import live_steering
from grains_ext.steering.neutral import Neutral, NeutralTexts, several_texts
from grains_ext.steering.vectors import SteeringVectors

# Neutral tokens in one call of the model.
_NEUTRAL_TOKENS = 1024
# A step goes on to further neutral texts until it has scored so many tokens, or read so many. Of a
# pair only the answer is scored: one call of captions has few, and their mean is mostly noise.
_NEUTRAL_SCORED, _NEUTRAL_READ = 512, 4096
# Of the start's length; the loss is looked at from the first on, until it rises.
_SHARES = tuple(2 ** (-n / 2) for n in range(9))
# In float16 gradients of single tokens underflow; Adam does not see the factor.
_FLOAT16_SCALE = 1024.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class RefineSettings:
    """The options of `refine`. Raises ValueError, naming the option, for a wrong value.

    steps: optimiser steps, at most.
    learning_rate: how far Adam moves a direction in a step, in lengths of the direction as it was.
        So the same default serves models of all sizes and scales.
    decay: "linear", the rate falls from there towards zero, step by step; "none", it stays.
    beta: of the loss, see `refine`.
    drift_weight: nats of loss per nat of drift; 0 leaves the neutral texts out.
    shorten: begin at the share of the directions' length, 1 or less, that has the least loss.
        Fitted directions of several blocks together often move a model much further than drift
        allows, and the first steps would go into the way back. Not with ``length`` "fixed".
    length: "at_most", no direction becomes longer than ``growth`` times what it is; "fixed", none
        becomes longer or shorter.
    growth: see length. A start within a limit on fluency may become much stronger where that costs
        no drift; tune the strength again afterwards.
    pairs_per_step: pairs that a step's gradient is the mean of; all where there are fewer.
    evaluate_every: steps between two looks at the dev pairs.
    patience: looks without improvement, after which it stops; None never stops early.
    seed: of the order in which pairs and neutral texts are drawn.
    max_batch_tokens: tokens per model call, padding included. Gradients of several calls are added
        up; less memory is needed for less.
    separator: joins prompt and continuation; None is the rule of `encode_pair`.
    """

    steps: int = 40
    learning_rate: float = 0.4
    decay: str = "none"
    beta: float = 1.0
    drift_weight: float = 30.0
    shorten: bool = True
    length: str = "at_most"
    growth: float = 4.0
    pairs_per_step: int = 64
    evaluate_every: int = 5
    patience: int | None = 4
    seed: int = 0
    max_batch_tokens: int = 4096
    separator: str | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "pairs_per_step", "evaluate_every", "max_batch_tokens")
        for name in counts + (() if self.patience is None else ("patience",)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, may_be_zero in (
            ("learning_rate", False),
            ("beta", False),
            ("growth", False),
            ("drift_weight", True),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not may_be_zero):
                least = "0 or more" if may_be_zero else "more than 0"
                raise ValueError(f"{name} must be a number, {least}, got {value!r}")
        if self.length not in ("fixed", "at_most"):
            raise ValueError(f'length must be "fixed" or "at_most", got {self.length!r}')
        if self.decay not in ("linear", "none"):
            raise ValueError(f'decay must be "linear" or "none", got {self.decay!r}')


def refine(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    vectors: SteeringVectors,
    *,
    dev_pairs: Iterable[PreferencePair] | None = None,
    neutral_texts: Sequence[Neutral] | None = None,
    settings: RefineSettings | None = None,
    progress: bool = True,
    decoder: DecoderView | None = None,
    **options: Any,
) -> SteeringVectors:
    """Improves steering vectors by a few dozen gradient steps on the pairs, all blocks together.

    With the model steered by the vectors at their own strength, m = log p(chosen) - log p(rejected)
    and d the drift, the mean over tokens of neutral text of KL(unsteered || steered), it minimises

        mean over pairs of -log sigmoid(beta m) / beta  +  drift_weight d

    by Adam, and shortens after each step what became longer than ``length`` allows. The weights are
    not touched; gradients flow through the steering op. The loss is that of DPO (Rafailov et al.,
    2023) without a reference model; for directions, as in BiPO (Cao et al., 2024, arXiv
    2406.00045).

        vectors = fit(model, tokenizer, pairs)
        vectors = refine(model, tokenizer, pairs, vectors, dev_pairs=dev_pairs, neutral_texts=texts)

    Args:
        model: a transformers causal LM or vision-language model, in any precision; left as it was.
        processor: its tokenizer, or for pairs with images its processor.
        pairs: a few dozen pairs to learn from: those of the fit, say.
        vectors: where to start, and which blocks; their strength is the one to steer at. A
            direction of zeros starts from zero, and gets the length of its block's hidden states.
            A gate is kept, and plays no part here.
        dev_pairs: pairs that were not used for fitting, for early stopping: the directions with the
            least loss on them are returned (drift included), of the start, as shortened, and every
            ``evaluate_every``-th step. None: the last step's.
        neutral_texts: what should stay as it is: texts, or pairs, with images or without, of which
            the chosen answer counts; by default the pairs' prompts.
        settings: a RefineSettings in place of options.
        progress: show a progress bar with loss and dev accuracy.
        decoder: the view of ``model``, where its parts must be named by hand.
        options: steps, learning_rate, drift_weight and the other fields of `RefineSettings`.

    Returns the same vectors with other directions. metadata["refine"] holds the settings, the
    curve, the share of the start's length that it began at, the step that was chosen, and the
    cosines with the start; a "tuning" of the start is dropped: tune again. Raises ValueError for
    no pairs, a strength of 0, vectors of another model or a loss that is not finite; TypeError for
    settings together with options.
    """
    if settings is not None and options:
        raise TypeError(f"give settings or options, not both (got {', '.join(options)})")
    settings = settings or RefineSettings(**options)
    pairs = list(pairs)
    dev = None if dev_pairs is None else list(dev_pairs)
    if not pairs or (dev is not None and not dev):
        raise ValueError(f"no {'dev' if pairs else 'preference'} pairs to refine on")
    if vectors.strength == 0:
        raise ValueError("the vectors' strength is 0: nothing reaches the model (with_strength)")
    texts = several_texts(neutral_texts)
    view = view_of(model, decoder)
    check_fits(vectors, view)

    encode = partial(
        encode_batches,
        processor,
        separator=settings.separator,
        max_batch_tokens=settings.max_batch_tokens,
    )
    with alone_with(view.model), torch.inference_mode(False), torch.no_grad():
        neutral = None
        if settings.drift_weight:
            neutral = NeutralTexts(
                view,
                processor,
                texts,
                pairs,
                separator=settings.separator,
                max_batch_tokens=min(settings.max_batch_tokens, _NEUTRAL_TOKENS),
            )
            neutral.prepare()
        batches = encode(pairs)
        run = _Run(view, vectors, settings, batches, neutral, None if dev is None else encode(dev))
        with progress_bar(progress, TextColumn("{task.fields[state]}")) as bar:
            task = bar.add_task("refining", total=settings.steps, state="")
            for state in run.steps():
                bar.update(task, advance=1, state=state)
            bar.update(task, completed=settings.steps)
    return run.result(len(pairs), None if dev is None else len(dev))


class _Run:
    """One optimisation: the directions in units of their lengths, and what is known of them."""

    def __init__(
        self,
        view: DecoderView,
        vectors: SteeringVectors,
        settings: RefineSettings,
        batches: Sequence[PairBatch],
        neutral: NeutralTexts | None,
        dev: Sequence[PairBatch] | None,
    ) -> None:
        self.view, self.vectors, self.settings = view, vectors, settings
        self.neutral, self.dev = neutral, dev
        self.lengths = _lengths(view, vectors, batches)
        self.start = {block: v / self.lengths[block] for block, v in vectors.directions.items()}
        self.units = {block: v.clone().requires_grad_() for block, v in self.start.items()}
        # A step of Adam moves every coordinate by about its rate: a vector by rate x sqrt(D).
        self.optimizer = torch.optim.Adam(
            self.units.values(),
            lr=settings.learning_rate / math.sqrt(vectors.hidden_size),
            betas=(0.9, 0.98),
        )
        falling = settings.decay == "linear"
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: max(0.0, 1 - done / settings.steps) if falling else 1.0
        )
        rng = random.Random(settings.seed)
        sizes = [len(batch.indices) for batch in batches]
        self.draw = _in_turn(list(batches), sizes, settings.pairs_per_step, rng)
        shares = [_share_of_step(neutral, n) for n in range(len(neutral))] if neutral else []
        self.neutral_draw = _in_turn(list(range(len(shares))), shares, 1, rng)
        self.scale = _FLOAT16_SCALE if _is_float16(view) else 1.0
        self.curve: list[dict[str, float]] = []
        self.best = {block: unit.detach().clone() for block, unit in self.units.items()}
        self.best_loss, self.best_step = math.inf, 0
        self.start_share = 1.0

    def steps(self) -> Iterator[str]:
        """Runs them; yields after each what to show of it."""
        settings = self.settings
        shown = ""
        from_zero = not all(unit.any() for unit in self.start.values())
        if settings.shorten and settings.length != "fixed" and not from_zero:
            self._shorten()
        if self.dev is not None and not from_zero:
            self.curve.append({"step": 0, **self._evaluate(0)})
        for step in range(1, settings.steps + 1):
            entry: dict[str, float] = {"step": step, **self._step()}
            self.curve.append(entry)
            if self.dev is None:
                self._keep(step)
            elif step % settings.evaluate_every == 0 or step == settings.steps:
                entry |= self._evaluate(step)
                shown = f", dev accuracy {100 * entry['dev_accuracy']:.0f} %"
            yield f"loss {entry['loss']:.3f}{shown}"
            waited = step - self.best_step
            patience = settings.patience
            if self.dev is not None and patience and waited >= patience * settings.evaluate_every:
                return

    def result(self, n_pairs: int, n_dev_pairs: int | None) -> SteeringVectors:
        if self.dev is not None and not math.isfinite(self.best_loss):
            raise ValueError(
                "the dev pairs' loss, drift included, was never finite: take a smaller strength, "
                "or load the model in float32 or bfloat16"
            )
        directions = {block: self.lengths[block] * unit for block, unit in self.best.items()}
        cosines = {
            str(block): float(torch.cosine_similarity(unit, self.start[block], dim=0))
            for block, unit in self.best.items()
        }
        metadata = {key: value for key, value in self.vectors.metadata.items() if key != "tuning"}
        metadata["refine"] = {
            "settings": asdict(self.settings),
            "strength": self.vectors.strength,
            "n_pairs": n_pairs,
            "n_dev_pairs": n_dev_pairs,
            "start_share": self.start_share,
            "best_step": self.best_step,
            "cosine_with_start": cosines,
            "curve": self.curve,
        }
        return replace(self.vectors, directions=directions, metadata=metadata)

    def _shorten(self) -> None:
        """Scales the start to the share of its length with the least loss on what a step sees."""
        batches, numbers = next(self.draw), next(self.neutral_draw)
        least = math.inf
        for share in _SHARES:
            self._scale_start(share)
            total, drift = self._look(batches, numbers, learn=False)
            loss = total + self.settings.drift_weight * drift
            if least < math.inf and not loss < least:
                break
            if math.isfinite(loss):
                self.start_share, least = share, loss
        self._scale_start(self.start_share)
        self._keep(0)

    def _scale_start(self, share: float) -> None:
        for block, unit in self.units.items():
            unit.copy_(share * self.start[block])

    def _look(
        self, batches: Sequence[PairBatch], numbers: Sequence[int], *, learn: bool
    ) -> tuple[float, float]:
        """The loss of these pairs and the drift of these neutral texts, as steered now.

        learn: adds the gradient to that of the directions.
        """
        n_pairs = sum(len(batch.indices) for batch in batches)
        total = drift = 0.0
        for batch in batches:
            with torch.set_grad_enabled(learn), self._steering():
                loss = self._losses(batch).sum() / n_pairs
                if learn:
                    (self.scale * loss).backward()
            total += float(loss.detach())
        if self.neutral is not None:
            n_tokens = sum(self.neutral.n_tokens(number) for number in numbers)
            for number in numbers:
                reference = self.neutral.reference(number)
                with torch.set_grad_enabled(learn), self._steering():
                    share = self.neutral.divergence(number, reference) / n_tokens
                    if learn:
                        (self.scale * self.settings.drift_weight * share).backward()
                drift += float(share.detach())
        return total, drift

    def _step(self) -> dict[str, float]:
        self.optimizer.zero_grad()
        total, drift = self._look(next(self.draw), next(self.neutral_draw), learn=True)
        gradients = [unit.grad for unit in self.units.values() if unit.grad is not None]
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            raise ValueError(
                f"the gradient at step {len(self.curve)} is not finite (loss {total:.3g}, drift "
                f"{drift:.3g}): take a smaller strength, or load the model in float32 or bfloat16"
            )
        self.optimizer.step()
        self.schedule.step()
        fixed = self.settings.length == "fixed"
        longest = 1.0 if fixed else self.settings.growth
        for unit in self.units.values():
            length = float(unit.norm())
            if length > 0 and (length > longest or fixed):
                unit.mul_(longest / length)
        return {"loss": total} | ({"drift": drift} if self.neutral is not None else {})

    def _evaluate(self, step: int) -> dict[str, float]:
        """The dev pairs' loss and accuracy and the neutral texts' drift, as steered now."""
        assert self.dev is not None
        losses: list[float] = []
        right: list[bool] = []
        for batch in self.dev:
            with self._steering():
                margins = self._margins(batch)
            losses += self._loss_of(margins).tolist()
            right += (margins > 0).tolist()
        found = {"dev_loss": fmean(losses), "dev_accuracy": fmean(right)}
        loss = found["dev_loss"]
        if self.neutral is not None:
            drift = self.neutral.drift(self._steering, with_kl=True)
            assert drift.kl is not None
            found |= {"dev_drift": drift.kl, "perplexity_ratio": drift.perplexity_ratio}
            loss += self.settings.drift_weight * drift.kl
        if loss < self.best_loss:
            self.best_loss = loss
            self._keep(step)
        # JSON has no infinity.
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _keep(self, step: int) -> None:
        self.best_step = step
        self.best = {block: unit.detach().clone() for block, unit in self.units.items()}

    def _losses(self, batch: PairBatch) -> Tensor:
        return self._loss_of(self._margins(batch))

    def _loss_of(self, margins: Tensor) -> Tensor:
        return -logsigmoid(self.settings.beta * margins) / self.settings.beta

    def _margins(self, batch: PairBatch) -> Tensor:
        """log p(chosen) - log p(rejected) of the pairs, float32 [n]."""
        model = self.view.model
        chosen, rejected = batch.logprobs(model(**batch.arguments(model)).logits)
        return chosen - rejected

    @contextmanager
    def _steering(self) -> Iterator[None]:
        vectors = self.vectors
        directions = {block: self.lengths[block] * unit for block, unit in self.units.items()}
        strengths = {block: vectors.strength * vectors.factor(block) for block in directions}
        with live_steering(
            self.view, directions, strengths, normalize=vectors.normalize, eps=vectors.eps
        ):
            yield


def _lengths(
    view: DecoderView, vectors: SteeringVectors, batches: Sequence[PairBatch]
) -> dict[int, float]:
    """Of each direction; of a zero one, the mean length of the block's states before an answer."""
    lengths = {block: float(v.norm()) for block, v in vectors.directions.items()}
    zeros = [block for block, length in lengths.items() if length == 0]
    if zeros:
        batch = batches[0]
        before_answer = -1 - batch.continuation_mask().sum(1)
        with view.capture(zeros, before_answer) as captured:
            view.model(**batch.arguments(view.model))
        for block in zeros:
            lengths[block] = float(captured[block].float().norm(dim=-1).mean())
    return lengths


def _share_of_step(neutral: NeutralTexts, number: int) -> float:
    """What a batch of neutral texts is of those that one step looks at."""
    scored, read = neutral.n_tokens(number), neutral.n_read(number)
    return max(scored / _NEUTRAL_SCORED, read / _NEUTRAL_READ)


def _in_turn(
    items: list[_T], sizes: Sequence[float], enough: float, rng: random.Random
) -> Iterator[list[_T]]:
    """Whole items, `enough` of them together, each once before any comes again; all where there
    are no more."""
    if sum(sizes) <= enough:
        while True:
            yield items
    stream = _shuffled(list(range(len(items))), rng)
    while True:
        drawn = [next(stream)]
        while sum(sizes[i] for i in drawn) < enough:
            drawn.append(next(stream))
        yield [items[i] for i in drawn]


def _shuffled(items: list[_T], rng: random.Random) -> Iterator[_T]:
    while items:
        yield from rng.sample(items, len(items))


def _is_float16(view: DecoderView) -> bool:
    return any(parameter.dtype == torch.float16 for parameter in view.model.parameters())
