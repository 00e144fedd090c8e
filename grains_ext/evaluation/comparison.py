"""How a model does on held-out pairs, before and after steering."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from grains_ext.encoding import encode_pairs, encode_prompt
from grains_ext.evaluation.generation import generate as generate_texts
from grains_ext.evaluation.generation import says
from grains_ext.evaluation.intervals import PairedChange, Proportion
from grains_ext.evaluation.multiple_choice import margins as pair_margins
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.scoring import perplexity

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors


@dataclass(frozen=True)
class Outcome:
    """One pair: its margins in nats (positive: chosen preferred), and what the model says."""

    pair_id: str | None
    margin: float
    margin_per_token: float
    generated: str | None
    says_chosen: bool | None


# The shares a Measurement may hold.
_SHARES = ("accuracy", "accuracy_per_token", "exact_match")


@dataclass(frozen=True)
class Measurement:
    """One model on all pairs."""

    outcomes: tuple[Outcome, ...] = field(repr=False)
    """In the order of the pairs."""
    perplexity: float | None
    """Of the neutral texts, over all their tokens; None where there were none."""

    @property
    def accuracy(self) -> Proportion:
        """Pairs whose chosen answer has the higher summed log-probability; a tie is wrong."""
        return Proportion.of(self.right("accuracy"))

    @property
    def accuracy_per_token(self) -> Proportion:
        """The same by the mean log-probability per token."""
        return Proportion.of(self.right("accuracy_per_token"))

    @property
    def exact_match(self) -> Proportion | None:
        """Pairs whose generation is the chosen answer or begins with it (`says`), if generated."""
        return Proportion.of(self.right("exact_match")) if "exact_match" in self.shares else None

    @property
    def mean_margin(self) -> float:
        """Mean of log p(chosen | prompt) - log p(rejected | prompt), in nats."""
        return fmean(outcome.margin for outcome in self.outcomes)

    @property
    def shares(self) -> tuple[str, ...]:
        """The shares that were measured: "accuracy", "accuracy_per_token", "exact_match"."""
        generated = self.outcomes[0].generated is not None
        return tuple(name for name in _SHARES if generated or name != "exact_match")

    def right(self, share: str) -> list[bool]:
        """Per pair, whether it counts for the share."""
        match share:
            case "accuracy":
                return [outcome.margin > 0 for outcome in self.outcomes]
            case "accuracy_per_token":
                return [outcome.margin_per_token > 0 for outcome in self.outcomes]
            case _:
                return [bool(outcome.says_chosen) for outcome in self.outcomes]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, every outcome included."""
        shares = {name: Proportion.of(self.right(name)) for name in self.shares}
        return {
            **{name: asdict(share) | {"value": share.value} for name, share in shares.items()},
            "mean_margin": self.mean_margin,
            "perplexity": self.perplexity,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class EvaluationReport:
    """Unsteered and, where vectors were given, steered. ``print`` it for a table."""

    unsteered: Measurement
    steered: Measurement | None = None

    def changes(self) -> dict[str, PairedChange]:
        """Steered against unsteered on the same pairs, for each share that was measured."""
        if self.steered is None:
            return {}
        return {
            name: PairedChange.of(self.unsteered.right(name), self.steered.right(name))
            for name in self.unsteered.shares
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: both measurements and the changes."""
        return {
            "n_pairs": len(self.unsteered.outcomes),
            "unsteered": self.unsteered.as_dict(),
            "steered": None if self.steered is None else self.steered.as_dict(),
            "changes": {name: asdict(change) for name, change in self.changes().items()},
        }

    def __rich__(self) -> Table:
        measurements = [self.unsteered, *([] if self.steered is None else [self.steered])]
        table = Table(
            "",
            "unsteered",
            *(["steered", "change", "p"] if self.steered is not None else []),
            title=f"{len(self.unsteered.outcomes)} held-out pairs (95 % intervals, McNemar's p)",
            box=box.SIMPLE_HEAD,
        )
        changes = self.changes()
        for name in self.unsteered.shares:
            row = [
                name.replace("_", " "),
                *(str(Proportion.of(m.right(name))) for m in measurements),
            ]
            if change := changes.get(name):
                row += [str(change), f"{change.p_value:.2g}"]
            table.add_row(*row)
        margins = [measurement.mean_margin for measurement in measurements]
        row = ["mean margin (nats)", *(f"{margin:.3f}" for margin in margins)]
        table.add_row(*row, *(f"{b - a:+.3f}" for a, b in pairwise(margins)))
        perplexities = [m.perplexity for m in measurements if m.perplexity is not None]
        if perplexities:
            row = ["perplexity", *(f"{value:.3f}" for value in perplexities)]
            table.add_row(*row, *(f"x {b / a:.3f}" for a, b in pairwise(perplexities)))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue().rstrip()


def evaluate(
    model: Any,
    tokenizer: Any,
    test_pairs: Iterable[PreferencePair],
    *,
    vectors: SteeringVectors | None = None,
    neutral_texts: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    generate: bool = True,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
    progress: bool = True,
) -> EvaluationReport:
    """Measure a model on held-out pairs, unsteered and, with ``vectors``, steered by them.

    Args:
        model: a transformers causal LM; left as it was.
        tokenizer: its tokenizer.
        test_pairs: pairs that were used neither to fit nor to tune.
        vectors: steer with these, at their own strength.
        neutral_texts: unrelated texts for perplexity; None leaves it out.
        max_new_tokens: how much to generate per prompt; None is the longest chosen answer and two
            tokens more, enough to see where the answer's last word ends.
        generate: whether to generate at all; it is the slow part.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        max_batch_tokens: tokens per model call, padding included.
        progress: show a progress bar.

    Raises ValueError for no pairs, images, or a pair that does not encode.

        report = evaluate(model, tokenizer, test_pairs, vectors=vectors)
        print(report)
    """
    pairs = list(test_pairs)
    conditions: dict[str, AbstractContextManager[Any]] = {"unsteered": nullcontext()}
    if vectors is not None:
        conditions["steered"] = vectors.applied(model)
    measurements = []
    with progress_bar(progress) as bar:
        task = bar.add_task("evaluating", total=len(conditions))
        for name, condition in conditions.items():
            bar.update(task, description=f"evaluating, {name}")
            with condition:
                measurements.append(
                    measure(
                        model,
                        tokenizer,
                        pairs,
                        neutral_texts=neutral_texts,
                        max_new_tokens=max_new_tokens,
                        generate=generate,
                        separator=separator,
                        max_batch_tokens=max_batch_tokens,
                    )
                )
            bar.advance(task)
    return EvaluationReport(*measurements)


def measure(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    neutral_texts: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    generate: bool = True,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
) -> Measurement:
    """One half of `evaluate`: the model as it stands, hooks and all. Arguments as there."""
    if not pairs:
        raise ValueError("no pairs to evaluate")
    text_tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    pad_id = text_tokenizer.pad_token_id
    if pad_id is None:
        pad_id = text_tokenizer.eos_token_id or 0
    budget = {"pad_id": pad_id, "max_batch_tokens": max_batch_tokens}
    encoded = encode_pairs(tokenizer, pairs, separator=separator)
    margins = pair_margins(model, encoded, **budget)
    texts: list[str | None] = [None] * len(pairs)
    if generate:
        longest = max(len(ids.chosen_ids) for ids in encoded)
        texts[:] = generate_texts(
            model,
            text_tokenizer,
            [ids.prompt_ids for ids in encoded],
            max_new_tokens=longest + 2 if max_new_tokens is None else max_new_tokens,
            **budget,
        )
    outcomes = tuple(
        Outcome(
            pair_id=pair.id,
            margin=margin.total,
            margin_per_token=margin.per_token,
            generated=text,
            says_chosen=None if text is None else says(text, pair.chosen),
        )
        for pair, margin, text in zip(pairs, margins, texts, strict=True)
    )
    return Measurement(
        outcomes=outcomes,
        perplexity=(
            perplexity(model, [encode_prompt(tokenizer, text) for text in neutral_texts], **budget)
            if neutral_texts
            else None
        ),
    )
