"""MMMU (Yue et al. 2024, arXiv 2311.16502)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from grains_ext.evaluation.datasets.rows import (
    LETTERS,
    Row,
    Source,
    column,
    filled,
    image_of,
    lettered,
    read,
    text,
    visual_prompt_with_mentions,
)
from grains_ext.evaluation.generation import mentions
from grains_ext.evaluation.multiple_choice import MultipleChoice
from grains_ext.evaluation.questions import Question, QuestionSet
from grains_ext.pairs import Message

TEMPLATE = (
    "{question}\n{options}\n\nAnswer with the option's letter from the given choices directly."
)
OPEN_TEMPLATE = "{question}\n\nAnswer the question using a single word or phrase."


def mmmu(
    source: Source,
    *,
    image_folder: str | Path | None = None,
    image_token: str | None = None,
    template: str = TEMPLATE,
) -> list[MultipleChoice]:
    """MMMU's multiple-choice questions, with the letters as choices; open ones are left out.

    source: a subject of `MMMU/MMMU` of `datasets`, a parquet file of it or a folder of them:
        columns `id`, `question`, `options` (a list, also written as text), `answer` (a letter),
        `question_type`, and `image_1` to `image_7`. "<image 1>" in question and options says where
        an image belongs.
    image_folder: where images are that are given as paths; by default the folder of the file.
    image_token: None makes chat messages; else a plain prompt with the processor's image_token.
    template: with "{question}" and "{options}".
    """

    def item(row: Row) -> MultipleChoice | None:
        if text(row, "question_type") != "multiple-choice":
            return None
        options = _options(column(row, "options"))
        letters = tuple(LETTERS[: len(options)])
        answer = text(row, "answer")
        if answer not in letters:
            raise ValueError(f"the answer {answer!r} is none of the letters {list(letters)}")
        words = filled(
            template,
            question=text(row, "question"),
            options=lettered(options, "({letter}) {option}"),
        )
        prompt, images = _illustrated(row, words, source, image_folder, image_token)
        labels = tuple(letter == answer for letter in letters)
        return MultipleChoice(prompt, letters, labels, images, text(row, "id"))

    return read(source, item)


def mmmu_open(
    source: Source,
    *,
    image_folder: str | Path | None = None,
    image_token: str | None = None,
    template: str = OPEN_TEMPLATE,
    max_new_tokens: int = 32,
) -> QuestionSet:
    """MMMU's open questions; an answer is right where it holds a right one. As `mmmu`.

    `answer` is a text, or a list of them written as text.
    """

    def question(row: Row) -> Question | None:
        if text(row, "question_type") != "open":
            return None
        words = filled(template, question=text(row, "question"))
        prompt, images = _illustrated(row, words, source, image_folder, image_token)
        answer = text(row, "answer")
        answers = _options(answer) if answer.startswith("[") else [answer]
        return Question(prompt, tuple(answers), images, text(row, "id"))

    questions = tuple(read(source, question))
    return QuestionSet(questions, "exact", match=mentions, max_new_tokens=max_new_tokens)


def _illustrated(
    row: Row,
    words: str,
    source: Source,
    image_folder: str | Path | None,
    image_token: str | None,
) -> tuple[str | list[Message], tuple[Any, ...] | None]:
    """The prompt, and its images in the order in which it mentions them."""
    prompt, mentioned = visual_prompt_with_mentions(words, image_token)
    images = tuple(image_of(row, source, image_folder, f"image_{n}") for n in mentioned)
    return prompt, images or None


def _options(options: Any) -> list[str]:
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)  # literals alone: nothing is run
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"the list {options!r} does not read: {error}") from error
    if not isinstance(options, list) or not options:
        raise ValueError(f"expected a list of texts, got {options!r}")
    return [str(option) for option in options]
