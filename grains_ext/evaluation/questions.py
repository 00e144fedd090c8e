"""Questions that the model answers in its own words, and four ways to judge what it says.

exact: a right answer is what the model says, or what it begins with (`says`), or what it contains
    (`mentions`).
yes_no: object hallucination in the manner of POPE (Li et al. 2023, arXiv 2305.10355): the first
    sentence says no where it has "no" or "not" in it, else yes. With yes as the positive class:
    accuracy, precision, recall, F1, yes rate.
a judge: a rating per answer, its mean and the share of answers below a limit; MMHal-Bench (Sun et
    al. 2023, arXiv 2309.14525, section 3.3) calls a rating below 3 of 6 a hallucination.
win_rate: a judge that compares two answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from grains_ext.evaluation.generation import generate_answers, says
from grains_ext.evaluation.intervals import Estimate, Statistic
from grains_ext.pairs import Message, PreferencePair

Scoring = Literal["exact", "yes_no", "judge"]
Judge = Callable[["Question", str], float]
"""A rating of what the model said; more is better."""


@dataclass(frozen=True)
class Question:
    """What the model is asked.

    prompt, images, id: as of a PreferencePair. answers: right answers, any of which counts; for
    yes_no exactly one, "yes" or "no". notes: what else a judge may want to know.
    """

    prompt: str | list[Message]
    answers: tuple[str, ...] = ()
    images: tuple[Any, ...] | None = None
    id: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.answers, str):
            raise ValueError(f"answers must be a tuple of texts, got the text {self.answers!r}")
        object.__setattr__(self, "answers", tuple(self.answers))
        PreferencePair(self.prompt, "a", "b", self.images, self.id)  # its checks


@dataclass(frozen=True)
class QuestionSet:
    """Questions, how long an answer may be and how it is judged.

    scoring: "exact" or "yes_no", or "judge", with a judge. match: of exact, whether what was
    generated is the answer. low_rating: ratings below it are counted as the share "low_rated"; None
    counts none. max_new_tokens: where generation ends at the latest.

    Raises ValueError where the questions do not fit the scoring.
    """

    questions: tuple[Question, ...]
    scoring: Scoring
    judge: Judge | None = None
    match: Callable[[str, str], bool] = says
    low_rating: float | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))
        if not self.questions:
            raise ValueError("a question set needs at least one question")
        if self.scoring not in get_args(Scoring):
            known = ", ".join(get_args(Scoring))
            raise ValueError(f"scoring must be one of {known}, got {self.scoring!r}")
        if (self.judge is not None) != (self.scoring == "judge"):
            raise ValueError('a judge is given with scoring="judge", and only then')
        for number, question in enumerate(self.questions):
            name = f"question {number}" if question.id is None else f"question {question.id!r}"
            # Every text begins with a blank answer.
            if self.scoring == "exact" and not (
                question.answers and all(map(str.strip, question.answers))
            ):
                raise ValueError(
                    f"{name} has no answer to compare with, or a blank one, {question.answers}: "
                    "give one, or use a judge"
                )
            if self.scoring == "yes_no" and question.answers not in (("yes",), ("no",)):
                got = list(question.answers)
                raise ValueError(f'{name}: its one answer must be "yes" or "no", got {got}')


@dataclass(frozen=True)
class Answered:
    """What the model said to a question."""

    item_id: str | None
    generated: str
    score: float
    """1 or 0 for right or wrong, or the judge's rating."""
    says_yes: bool | None = None
    """Of yes_no."""


def answer(
    model: Any, processor: Any, asked: QuestionSet, *, max_batch_tokens: int = 4096
) -> list[Answered]:
    """The model's greedy answers, judged, in the questions' order."""
    texts = generate_answers(
        model,
        processor,
        [(question.prompt, question.images) for question in asked.questions],
        max_new_tokens=asked.max_new_tokens,
        max_batch_tokens=max_batch_tokens,
    )
    return [_judged(asked, q, text) for q, text in zip(asked.questions, texts, strict=True)]


def _judged(asked: QuestionSet, question: Question, text: str) -> Answered:
    if asked.judge is not None:
        return Answered(question.id, text, float(asked.judge(question, text)))
    if asked.scoring == "exact":
        right = any(asked.match(text, a) for a in question.answers)
        return Answered(question.id, text, float(right))
    yes = says_yes(text)
    return Answered(question.id, text, float(yes == (question.answers == ("yes",))), yes)


def says_yes(text: str) -> bool:
    """POPE's reading of an answer: no where its first sentence holds "no" or "not", else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def question_statistics(asked: QuestionSet, answered: Sequence[Answered]) -> dict[str, Statistic]:
    scores = [each.score for each in answered]
    if asked.scoring == "judge":
        rating = {"rating": Statistic.mean(scores)}
        if asked.low_rating is None:
            return rating
        return rating | {"low_rated": Statistic.share([s < asked.low_rating for s in scores])}
    right = Statistic.share([score == 1 for score in scores])
    if asked.scoring == "exact":
        return {"exact_match": right}
    true = np.array([question.answers == ("yes",) for question in asked.questions])
    said = np.array([bool(each.says_yes) for each in answered])
    hits, false_alarms, misses = true & said, ~true & said, true & ~said
    return {
        "accuracy": right,
        "precision": Statistic.ratio(hits, said),
        "recall": Statistic.ratio(hits, true),
        "f1": Statistic.ratio(2 * hits, 2 * hits + false_alarms + misses),
        "yes_rate": Statistic.share(list(said)),
    }


def win_rate(
    questions: Sequence[Question],
    ours: Sequence[str],
    theirs: Sequence[str],
    judge: Callable[[Question, str, str], float],
    *,
    seed: int = 0,
) -> Estimate:
    """How often ``ours`` beats ``theirs``, with its bootstrap interval; arguments as `wins`."""
    statistic = Statistic.mean(wins(questions, ours, theirs, judge, seed=seed))
    estimate = statistic.estimate(seed=seed)
    assert isinstance(estimate, Estimate)
    return estimate


def wins(
    questions: Sequence[Question],
    ours: Sequence[str],
    theirs: Sequence[str],
    judge: Callable[[Question, str, str], float],
    *,
    seed: int = 0,
) -> list[float]:
    """Of each question 1 where ``ours`` is the better answer, 0 where it is not, 0.5 for a tie.

    judge: (question, first, second) -> 1 where the first answer is better, 0 where the second is,
        0.5 for a tie. Which of the two stands first is drawn for each question, since judges prefer
        a place (Zheng et al. 2023, arXiv 2306.05685, section 3.3).

    Raises ValueError where the three differ in length, or a verdict is not in [0, 1].
    """
    rng = random.Random(seed)
    won = []
    for question, mine, other in zip(questions, ours, theirs, strict=True):
        swapped = rng.random() < 0.5
        verdict = float(judge(question, *((other, mine) if swapped else (mine, other))))
        if not 0 <= verdict <= 1:
            raise ValueError(f"a verdict must be between 0 and 1, got {verdict}")
        won.append(1 - verdict if swapped else verdict)
    return won
