"""FaithEval (Ming et al. 2024, arXiv 2410.03727): does an answer follow the context it is given?"""

from __future__ import annotations

from typing import Literal

from grains_ext.evaluation.datasets.rows import (
    LETTERS,
    Row,
    Source,
    column,
    filled,
    lettered,
    read,
    text,
    text_prompt,
    texts,
)
from grains_ext.evaluation.generation import holds
from grains_ext.evaluation.multiple_choice import MultipleChoice
from grains_ext.evaluation.questions import Question, QuestionSet

TEMPLATE = (
    "You are an expert in retrieval question answering. Read the context and the question, and "
    "answer by the context alone.\nContext: {context}\nQuestion: {question}\n{options}\nAnswer:"
)
# What to say where the context holds no answer, or two.
_SAY = {
    "unanswerable": "If there is no information available from the context, the answer should be "
    "'unknown'.",
    "inconsistent": "If there is conflicting information or multiple answers in the context, the "
    "answer should be 'conflict'.",
}
# An answer is right where any of these is in it: the authors' lists for loose matching.
_RIGHT = {
    "unanswerable": ("unknown", "no answer", "no information", "not", "unclear"),
    "inconsistent": (
        "conflict",
        "conflicting",
        "inconsistent",
        "inconsistency",
        "contradiction",
        "contradictory",
        "disagreement",
        "two answers",
        "2 answers",
        "multiple answers",
    ),
}


def faitheval(
    source: Source, *, template: str = TEMPLATE, chat: bool = False
) -> list[MultipleChoice]:
    """The counterfactual task: the context says what is not so, and its answer is the right one.

    source: `Salesforce/FaithEval-counterfactual-v1.0` of `datasets` or as parquet or .jsonl:
        columns `context`, `question`, `choices` {"label": [...], "text": [...]}, `answerKey`, `id`.
    template: with "{context}", "{question}" and "{options}", the choices behind their letters; the
        letters are the choices. chat: as a user's message.
    """

    def item(row: Row) -> MultipleChoice:
        choices = column(row, "choices")
        labels, options = texts(choices, "label"), texts(choices, "text")
        key = text(row, "answerKey")
        if key not in labels:
            raise ValueError(f"the answerKey {key!r} is none of the choices {labels}")
        letters = tuple(LETTERS[: len(labels)])
        if len(labels) != len(options):
            raise ValueError(f"{len(labels)} labels and {len(options)} texts of choices")
        words = filled(
            template,
            context=text(row, "context"),
            question=text(row, "question"),
            options=lettered(options),
        )
        true = tuple(label == key for label in labels)
        name = str(row["id"]) if row.get("id") is not None else None
        return MultipleChoice(text_prompt(words, chat), letters, true, id=name)

    return read(source, item)


def faitheval_questions(
    source: Source,
    kind: Literal["unanswerable", "inconsistent"],
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
) -> QuestionSet:
    """The tasks whose context holds no answer, or two: the model should say so.

    kind: which of the two, "unanswerable" or "inconsistent". An answer is right where it holds one
        of the authors' phrases, also within a word ("conflicts"), as in their script.
    source: `Salesforce/FaithEval-unanswerable-v1.0` or `-inconsistent-v1.0` of `datasets` or as
        parquet or .jsonl: columns `context`, `question` and `qid` or `id`.
    """

    if kind not in _SAY:
        raise ValueError(f"kind must be one of {', '.join(_SAY)}, got {kind!r}")

    def question(row: Row) -> Question:
        words = (
            "You are an expert in retrieval question answering. Respond with the exact answer "
            f"only. {_SAY[kind]}\nContext: {text(row, 'context')}\n"
            f"Question: {text(row, 'question')}\nAnswer:"
        )
        name = row.get("qid", row.get("id"))
        return Question(
            text_prompt(words, chat), _RIGHT[kind], id=None if name is None else str(name)
        )

    questions = tuple(read(source, question))
    return QuestionSet(questions, "exact", match=holds, max_new_tokens=max_new_tokens)
