"""How a model does on held-out pairs, tasks and texts, unsteered and under every steering."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from grains_ext.decoder import unwrap
from grains_ext.encoding import encode_continuation
from grains_ext.evaluation.fluency import TextOutcome, fluency_statistics, read
from grains_ext.evaluation.generation import generate_answers, says
from grains_ext.evaluation.intervals import Estimate, PairedChange, Proportion, Statistic
from grains_ext.evaluation.multiple_choice import (
    ChoiceOutcome,
    MultipleChoice,
    choice_statistics,
    choose,
)
from grains_ext.evaluation.questions import Answered, QuestionSet, answer, question_statistics
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.scoring import pair_margins
from grains_ext.steering.neutral import several_texts

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors

Task = Sequence[MultipleChoice] | QuestionSet

UNSTEERED, STEERED = "unsteered", "steered"


@dataclass(frozen=True)
class Outcome:
    """One pair: its margins in nats (positive: chosen preferred), and what the model says."""

    pair_id: str | None
    margin: float
    margin_per_token: float
    generated: str | None
    says_chosen: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What the model did on one task: an outcome per item, and the figures of all of them."""

    outcomes: tuple[ChoiceOutcome | Answered, ...] = field(repr=False)
    statistics: dict[str, Statistic] = field(repr=False, compare=False)


_AnyOutcome = TypeVar("_AnyOutcome", Outcome, ChoiceOutcome, Answered, TextOutcome)
# Fields of outcomes that are always numbers.
_NUMBERS = ("margin", "margin_per_token", "true_mass", "score", "logprob")
# The shares of pairs that a Measurement may hold.
_SHARES = ("accuracy", "accuracy_per_token", "exact_match")


@dataclass(frozen=True)
class Measurement:
    """One model on all pairs, tasks and texts."""

    outcomes: tuple[Outcome, ...] = field(repr=False)
    """In the order of the pairs."""
    texts: tuple[TextOutcome, ...] = field(default=(), repr=False)
    """In the order of the neutral texts, without those of one token."""
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    @property
    def accuracy(self) -> Proportion:
        """Pairs whose chosen answer has the higher summed log-probability; a tie is wrong.

        It is the win rate of chosen against rejected answers.
        """
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
    def perplexity(self) -> float | None:
        """Of the neutral texts, over all their tokens; None where there were none."""
        return self._fluency("perplexity")

    @property
    def kl_per_token(self) -> float | None:
        """KL(unsteered || steered) per token of the neutral texts, in nats; None of unsteered."""
        return self._fluency("kl_per_token")

    def _fluency(self, name: str) -> float | None:
        statistic = fluency_statistics(self.texts).get(name)
        return None if statistic is None else statistic.value

    @property
    def shares(self) -> tuple[str, ...]:
        """The shares that were measured: "accuracy", "accuracy_per_token", "exact_match"."""
        if not self.outcomes:
            return ()
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

    def statistics(self) -> dict[str, Statistic]:
        """Every figure that was measured, by name; a task's are named "task/figure"."""
        figures = {share: Statistic.share(self.right(share)) for share in self.shares}
        if self.outcomes:
            figures["mean_margin"] = Statistic.mean([each.margin for each in self.outcomes])
        for name, task in self.tasks.items():
            figures |= {f"{name}/{figure}": value for figure, value in task.statistics.items()}
        return figures | fluency_statistics(self.texts)

    @classmethod
    def from_dict(
        cls, plain: Mapping[str, Any], tasks: Mapping[str, Task] | None = None
    ) -> Measurement:
        """What `as_dict` gave, from JSON; its figures and intervals are worked out again.

        tasks: those that were measured, which say how their outcomes are counted. Raises ValueError
        for others.
        """
        tasks = dict(tasks or {})
        if set(plain["tasks"]) != set(tasks):
            raise ValueError(
                f"the tasks {sorted(plain['tasks'])} were measured, got {sorted(tasks)}"
            )
        results = {}
        for name, task in tasks.items():
            rows = plain["tasks"][name]
            if isinstance(task, QuestionSet):
                answered = [_read_back(Answered, row) for row in rows]
                results[name] = TaskResult(tuple(answered), question_statistics(task, answered))
            else:
                chosen = [_read_back(ChoiceOutcome, row) for row in rows]
                results[name] = TaskResult(tuple(chosen), choice_statistics(chosen))
        outcomes = [_read_back(Outcome, row) for row in plain["outcomes"]]
        texts = [_read_back(TextOutcome, row) for row in plain["texts"]]
        return cls(tuple(outcomes), tuple(texts), results)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every figure with its interval, and every outcome."""
        return {
            "figures": {
                name: _plain(statistic.estimate()) for name, statistic in self.statistics().items()
            },
            "outcomes": [_plain(outcome) for outcome in self.outcomes],
            "tasks": {
                name: [_plain(outcome) for outcome in task.outcomes]
                for name, task in self.tasks.items()
            },
            "texts": [_plain(text) for text in self.texts],
        }


@dataclass(frozen=True)
class EvaluationReport:
    """The same pairs, tasks and texts under several conditions. ``print`` it for a table.

    conditions: by name; the first is "unsteered", and one steering that was given without a name is
        "steered".
    pairs: what was asked, in the order of the outcomes.
    """

    conditions: dict[str, Measurement]
    pairs: tuple[PreferencePair, ...] = field(default=(), repr=False, compare=False)

    @property
    def unsteered(self) -> Measurement:
        return self.conditions[UNSTEERED]

    @property
    def steered(self) -> Measurement | None:
        """The measurement of the steering that was given without a name."""
        return self.conditions.get(STEERED)

    def changes(
        self, condition: str | None = None, *, against: str = UNSTEERED
    ) -> dict[str, PairedChange]:
        """How each figure of a condition differs from another's on the same items.

        condition: its name; it may be left out where there is one steering. With no steering there
            is no change. Raises ValueError where a name is missing or unknown.

            report.changes("ours", against="caa")["accuracy"].p_value
        """
        if condition is None:
            steerings = [name for name in self.conditions if name != UNSTEERED]
            if not steerings:
                return {}
            if len(steerings) > 1:
                raise ValueError(f"name the condition, one of {', '.join(steerings)}")
            [condition] = steerings
        for name in (condition, against):
            if name not in self.conditions:
                raise ValueError(f"no condition {name!r}; there are {', '.join(self.conditions)}")
        before = self.conditions[against].statistics()
        after = self.conditions[condition].statistics()
        return {
            name: PairedChange.between(before[name], statistic)
            for name, statistic in after.items()
            if name in before
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every condition, and its changes against the unsteered one."""
        return {
            "format": "grains.evaluation",
            "version": 1,
            "n_pairs": len(self.unsteered.outcomes),
            "pairs": [
                {name: getattr(pair, name) for name in ("id", "prompt", "chosen", "rejected")}
                for pair in self.pairs
            ],
            "conditions": {name: each.as_dict() for name, each in self.conditions.items()},
            "changes": {
                condition: {
                    name: _plain(change) for name, change in self.changes(condition).items()
                }
                for condition in self.conditions
                if condition != UNSTEERED
            },
        }

    def __rich__(self) -> Table:
        n_pairs = len(self.unsteered.outcomes)
        items = [f"{n_pairs} held-out pairs"] if n_pairs else []
        items += [f"{name}: {len(task.outcomes)}" for name, task in self.unsteered.tasks.items()]
        # Square brackets in a plain string are markup to Rich: "[nan, nan]" would be a style.
        table = Table(
            "",
            *map(escape, self.conditions),
            title=escape(f"{', '.join(items)} (95 % intervals, McNemar's p)"),
            box=box.SIMPLE_HEAD,
        )
        columns = []
        for condition, measurement in self.conditions.items():
            changes = {} if condition == UNSTEERED else self.changes(condition)
            columns.append(
                {
                    name: _cell(name, statistic.estimate(), changes.get(name))
                    for name, statistic in measurement.statistics().items()
                }
            )
        for name in dict.fromkeys(name for column in columns for name in column):
            cells = [column.get(name, "") for column in columns]
            label = _LABELS.get(name, name.replace("_", " "))
            table.add_row(*map(Text, (label, *cells)))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=max(100, 30 + 34 * len(self.conditions))).print(self)
        return text.getvalue().rstrip()


_LABELS = {
    "accuracy": "accuracy (chosen wins)",
    "mean_margin": "mean margin (nats)",
    "kl_per_token": "KL per token (nats)",
}


def evaluate(
    model: Any,
    tokenizer: Any,
    test_pairs: Iterable[PreferencePair] = (),
    *,
    vectors: SteeringVectors | Mapping[str, Any] | None = None,
    tasks: Mapping[str, Task] | None = None,
    neutral_texts: Iterable[str] | None = None,
    max_new_tokens: int | None = None,
    generate: bool = True,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
    progress: bool = True,
) -> EvaluationReport:
    """Measure a model on held-out data, unsteered and under each steering.

    Args:
        model: a transformers causal or vision-language model; left as it was. Where something
            steers it, a model from torch.compile is measured without its compiled graphs.
        tokenizer: its tokenizer, or its processor, which pairs and tasks with images need.
        test_pairs: pairs that were used neither to fit nor to tune.
        vectors: steer with these, at their own strength; or several by name. Beside vectors a name
            may stand for a function from the model to a context in which it is changed, such as one
            that switches an adapter on.
        tasks: by name, lists of MultipleChoice items and QuestionSets; see evaluation.datasets.
        neutral_texts: unrelated texts for perplexity and, of each steering, KL(unsteered ||
            steered) per token; None leaves both out.
        max_new_tokens: how much to generate per pair's prompt; None is the longest chosen answer
            and two tokens more, enough to see where the answer's last word ends.
        generate: whether to generate after the pairs' prompts at all; it is the slow part.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        max_batch_tokens: tokens per model call, padding included.
        progress: show a progress bar.

    Raises ValueError for nothing to evaluate, a condition named "unsteered", a model with an
    encoder, or an item that does not encode or is longer than the model has positions.

        report = evaluate(model, tokenizer, test_pairs, vectors={"ours": ours, "caa": caa})
        print(report)
    """
    pairs, tasks, neutral_texts = _listed(test_pairs, tasks, neutral_texts)
    if not isinstance(vectors, Mapping):
        vectors = {} if vectors is None else {STEERED: vectors}
    if UNSTEERED in vectors:
        raise ValueError(f"{UNSTEERED!r} is the condition without steering: choose another name")
    if vectors:
        model = _uncompiled(model)
    steerings: dict[str, Any] = {UNSTEERED: None, **vectors}
    conditions = {}
    n_parts = bool(pairs) * (1 + generate) + len(tasks) + bool(neutral_texts)
    with progress_bar(progress) as bar:
        bar_task = bar.add_task("evaluating", total=n_parts * len(steerings))
        for name, steering in steerings.items():
            bar.update(bar_task, description=f"evaluating, {name}")
            conditions[name] = measure(
                model,
                tokenizer,
                pairs,
                vectors=steering,
                tasks=tasks,
                neutral_texts=neutral_texts,
                max_new_tokens=max_new_tokens,
                generate=generate,
                separator=separator,
                max_batch_tokens=max_batch_tokens,
                on_part=partial(bar.advance, bar_task),
            )
    return EvaluationReport(conditions, tuple(pairs))


def measure(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair] = (),
    *,
    vectors: SteeringVectors | Callable[[Any], AbstractContextManager[Any]] | None = None,
    tasks: Mapping[str, Task] | None = None,
    neutral_texts: Iterable[str] | None = None,
    max_new_tokens: int | None = None,
    generate: bool = True,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
    on_part: Callable[[], object] | None = None,
) -> Measurement:
    """One condition of `evaluate`; arguments as there.

    vectors: None measures the model as it stands, hooks and all.
    on_part: called when the pairs, the generations, each task and the texts are done.
    """
    pairs, tasks, neutral_texts = _listed(pairs, tasks, neutral_texts)
    if getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has an encoder: only decoders are measured"
        )
    if vectors is not None:
        model = _uncompiled(model)
    done = on_part or (lambda: None)
    steered = None if vectors is None else partial(_context, vectors, model)
    results, outcomes, texts = {}, [], []
    with steered() if steered else nullcontext():
        if pairs:
            margins = pair_margins(
                model, tokenizer, pairs, separator=separator, max_batch_tokens=max_batch_tokens
            )
            done()
            said: list[str | None] = [None] * len(pairs)
            if generate:
                longest = max_new_tokens or 2 + max(
                    _answer_length(tokenizer, pair, separator) for pair in pairs
                )
                said[:] = generate_answers(
                    model,
                    tokenizer,
                    [(pair.prompt, pair.images) for pair in pairs],
                    max_new_tokens=longest,
                    max_batch_tokens=max_batch_tokens,
                )
                done()
            outcomes = [
                Outcome(
                    pair_id=pair.id,
                    margin=margin.total,
                    margin_per_token=margin.per_token,
                    generated=text,
                    says_chosen=None if text is None else says(text, pair.chosen),
                )
                for pair, margin, text in zip(pairs, margins, said, strict=True)
            ]
        for name, task in tasks.items():
            results[name] = _task_result(model, tokenizer, task, separator, max_batch_tokens)
            done()
    if neutral_texts:
        texts = read(
            model, tokenizer, neutral_texts, steered=steered, max_batch_tokens=max_batch_tokens
        )
        done()
    return Measurement(tuple(outcomes), tuple(texts), results)


def _uncompiled(model: Any) -> Any:
    """The model inside torch.compile's wrapper, whose graphs do not see steering put on later."""
    return getattr(model, "_orig_mod", model)


def _context(steering: Any, model: Any) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = (
        steering.applied(model) if hasattr(steering, "applied") else steering(model)
    )
    return context


def _listed(
    pairs: Iterable[PreferencePair],
    tasks: Mapping[str, Task] | None,
    texts: Iterable[str] | None,
) -> tuple[list[PreferencePair], dict[str, Task], list[str]]:
    """All of it in memory, since every condition goes through it. Raises ValueError for nothing."""
    if tasks is not None and not isinstance(tasks, Mapping):
        raise ValueError(f'tasks must be named, {{"name": items}}, got {type(tasks).__name__}')
    named: dict[str, Task] = {
        name: task if isinstance(task, QuestionSet) else list(task)
        for name, task in (tasks or {}).items()
    }
    listed = list(pairs), named, several_texts(texts) or []
    if not any(listed):
        raise ValueError("no pairs to evaluate, and no tasks or neutral texts in their place")
    if empty := [name for name, task in named.items() if isinstance(task, list) and not task]:
        raise ValueError(f"the tasks {', '.join(empty)} have no items")
    return listed


def _task_result(
    model: Any, tokenizer: Any, task: Task, separator: str | None, max_batch_tokens: int
) -> TaskResult:
    if isinstance(task, QuestionSet):
        answered = answer(model, tokenizer, task, max_batch_tokens=max_batch_tokens)
        return TaskResult(tuple(answered), question_statistics(task, answered))
    chosen = choose(model, tokenizer, task, separator=separator, max_batch_tokens=max_batch_tokens)
    return TaskResult(tuple(chosen), choice_statistics(chosen))


def _answer_length(tokenizer: Any, pair: PreferencePair, separator: str | None) -> int:
    """How many tokens the chosen answer has; beside an image, after a prompt that has none."""
    prompt = pair.prompt
    if pair.images:
        prompt = "x"
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return len(encode_continuation(tokenizer, prompt, pair.chosen, separator=separator)[1])


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass's fields, and a figure's value; None for what JSON has no number for."""
    fields = asdict(value)
    if isinstance(value, Proportion | Estimate):
        fields["value"] = value.value
    plain: dict[str, Any] = _finite(fields)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_back(kind: type[_AnyOutcome], row: Mapping[str, Any]) -> _AnyOutcome:
    """The outcome of its plain fields; where a number must be, None was one that is not finite."""
    fields: dict[str, Any] = {
        name: math.nan if value is None and name in _NUMBERS else value
        for name, value in row.items()
    }
    if "logprobs" in fields:
        fields["logprobs"] = tuple(math.nan if p is None else p for p in fields["logprobs"])
    return kind(**fields)


def _cell(name: str, estimate: Proportion | Estimate, change: PairedChange | None) -> str:
    lines = [str(estimate)]
    if change is not None:
        p = "" if change.p_value is None else f" p {change.p_value:.2g}"
        lines.append(f"{change}{p}")
        if name == "perplexity":
            before = estimate.value - change.difference
            lines[-1] = f"x {estimate.value / before:.3f}  {lines[-1]}"
    return "\n".join(lines)
