"""tune: which blocks to steer and how strongly, under a limit on lost fluency."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair, encode_prompt
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.scoring import continuation_logprobs, perplexity
from grains_ext.steering.vectors import SteeringVectors

# In lengths of the hidden state, where vectors are fitted by this package.
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0, 1.5, 2.2, 3.3)


@dataclass(frozen=True)
class Trial:
    """One setting that was tried."""

    blocks: list[int]
    strength: float
    perplexity_ratio: float | None
    """Steered over unsteered perplexity of the neutral texts; None where it is not finite."""
    accuracy: float | None = None
    """Share of dev pairs with margin > 0; None where the perplexity was over the limit already."""
    mean_margin: float | None = None
    """Mean of log p(chosen) - log p(rejected), in nats."""


def tune(
    model: Any,
    tokenizer: Any,
    dev_pairs: Iterable[PreferencePair],
    vectors: SteeringVectors,
    *,
    neutral_texts: Sequence[str] | None = None,
    blocks: Iterable[Iterable[int]] | None = None,
    strengths: Sequence[float] | None = None,
    max_perplexity_ratio: float = 1.1,
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    progress: bool = True,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """Chooses the blocks and the strength that answer most dev pairs right within the limit.

    Every block set is tried with rising strengths until the perplexity leaves the limit; a setting
    is better by its accuracy (pairs with log p(chosen) > log p(rejected)), then by mean margin.

    Args:
        model: a transformers causal LM; left as it was.
        tokenizer: its tokenizer.
        dev_pairs: pairs that were not used for fitting.
        vectors: what to tune; their own strength plays no part.
        neutral_texts: texts whose perplexity must not suffer; by default the dev pairs' prompts.
        blocks: the block sets to try; by default runs of 1, 2, 4, ... neighbours, and all.
        strengths: those to try, > 0; by default STRENGTHS, from 0.05 to 3.3.
        max_perplexity_ratio: the limit on steered over unsteered perplexity.
        max_batch_tokens: tokens per model call, padding included.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        progress: show a progress bar.
        decoder: the view of ``model``, where its parts must be named by hand.

    Returns the chosen blocks' vectors at the chosen strength; metadata["tuning"] holds the limit,
    the unsteered accuracy and margin, the chosen trial and every trial. Raises ValueError for no
    pairs, wrong strengths or blocks, or where no setting stays within the limit.
    """
    pairs = list(dev_pairs)
    if not pairs:
        raise ValueError("no dev pairs to tune on")
    grid = sorted(STRENGTHS if strengths is None else strengths)
    if not grid or grid[0] <= 0:
        raise ValueError(f"strengths must be positive numbers, at least one; got {grid}")
    block_sets = neighbour_sets(vectors.blocks) if blocks is None else blocks
    candidates = [vectors.subset(chosen) for chosen in block_sets]
    if not candidates:
        raise ValueError("blocks: no block set to try")

    view = decoder or DecoderView.of(model)
    scorer = _Scorer(
        view, tokenizer, pairs, neutral_texts, max_perplexity_ratio, max_batch_tokens, separator
    )
    unsteered_accuracy, unsteered_margin = scorer.accuracy_and_margin()
    trials: list[Trial] = []
    with progress_bar(progress) as bar:
        task = bar.add_task("tuning", total=len(candidates) * len(grid))
        for row, candidate in enumerate(candidates):
            with candidate.applied(model, grid[0], decoder=view) as handle:
                for strength in grid:
                    handle.strength = strength
                    trials.append(scorer.trial(candidate.blocks, strength))
                    bar.advance(task)
                    if trials[-1].accuracy is None:
                        # Perplexity rises with strength: the rest of the row is out as well.
                        break
            bar.update(task, completed=(row + 1) * len(grid))
    best = _best(trials, max_perplexity_ratio)
    tuning = {
        "max_perplexity_ratio": max_perplexity_ratio,
        "n_pairs": len(pairs),
        "unsteered": {"accuracy": unsteered_accuracy, "mean_margin": unsteered_margin},
        "chosen": asdict(best),
        "trials": [asdict(trial) for trial in trials],
    }
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


class _Scorer:
    """The dev pairs and neutral texts, encoded once, scored as often as there are trials."""

    def __init__(
        self,
        view: DecoderView,
        tokenizer: Any,
        pairs: Sequence[PreferencePair],
        neutral_texts: Sequence[str] | None,
        max_perplexity_ratio: float,
        max_batch_tokens: int,
        separator: str | None,
    ) -> None:
        self._model = view.model
        self._max_batch_tokens = max_batch_tokens
        encoded = [encode_pair(tokenizer, pair, separator=separator) for pair in pairs]
        self._items = [
            (ids.prompt_ids, continuation)
            for ids in encoded
            for continuation in (ids.chosen_ids, ids.rejected_ids)
        ]
        if neutral_texts is None:
            self._neutral = [ids.prompt_ids for ids in encoded]
        else:
            self._neutral = [encode_prompt(tokenizer, text) for text in neutral_texts]
        self._max_ratio = max_perplexity_ratio
        self._unsteered_perplexity = self._perplexity()

    def trial(self, blocks: list[int], strength: float) -> Trial:
        """Scores the model as it is steered now; the pairs only where the perplexity allows."""
        ratio = self._perplexity() / self._unsteered_perplexity
        if not ratio <= self._max_ratio:
            return Trial(blocks, strength, ratio if math.isfinite(ratio) else None)
        return Trial(blocks, strength, ratio, *self.accuracy_and_margin())

    def accuracy_and_margin(self) -> tuple[float, float]:
        scores = continuation_logprobs(
            self._model, self._items, max_batch_tokens=self._max_batch_tokens
        )
        margins = [
            chosen.total - rejected.total
            for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
        ]
        return fmean(margin > 0 for margin in margins), fmean(margins)

    def _perplexity(self) -> float:
        return perplexity(self._model, self._neutral, max_batch_tokens=self._max_batch_tokens)


def _best(trials: Sequence[Trial], max_perplexity_ratio: float) -> Trial:
    within = [t for t in trials if t.accuracy is not None and t.mean_margin is not None]
    if not within:
        ratios = [t.perplexity_ratio for t in trials if t.perplexity_ratio is not None]
        raise ValueError(
            f"no setting keeps the perplexity within {max_perplexity_ratio} times the unsteered "
            f"one; the gentlest made it {min(ratios, default=math.nan):.3g} times: try smaller "
            "strengths or fewer blocks"
        )
    # max keeps the first of equals: fewer blocks, less strength.
    return max(within, key=lambda t: (t.accuracy, t.mean_margin))
