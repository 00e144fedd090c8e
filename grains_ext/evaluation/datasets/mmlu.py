"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
from grains_ext.evaluation.multiple_choice import MultipleChoice

TEMPLATE = "{question}\n{options}\nAnswer:"
_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def mmlu(
    source: Source,
    *,
    examples: Source | None = None,
    n_examples: int = 5,
    template: str = TEMPLATE,
    chat: bool = False,
) -> list[MultipleChoice]:
    """MMLU with the letters as choices.

    source: one of
        - `cais/mmlu` of `datasets` or as parquet: `question`, `choices`, `answer` (0 to 3) and
          `subject`;
        - {subject}_test.csv of the authors' archive, with no header: question, A, B, C, D, letter.
    examples: the dev split in the same layout; each prompt has the first n_examples of its subject,
        answered, before the question (5-shot in the paper).
    template: with "{question}" and "{options}"; the paper's heading stands before it where the
        subject is known. chat: as a user's message.
    """
    shots: dict[str, list[str]] = {}
    for words, true, subject in read(_with_columns(examples), _parse(template)) if examples else ():
        shots.setdefault(subject, []).append(f"{words} {LETTERS[true]}\n\n")
    items = []
    for words, true, subject in read(_with_columns(source), _parse(template)):
        if examples is not None and subject not in shots:
            raise ValueError(f"no example of the subject {subject!r} among the examples")
        header = _HEADER.format(subject=subject.replace("_", " ")) if subject else ""
        words = "".join([header, *shots.get(subject, [])[:n_examples], words])
        labels = tuple(place == true for place in range(4))
        items.append(MultipleChoice(text_prompt(words, chat), tuple(LETTERS[:4]), labels))
    return items


def _parse(template: str) -> Any:
    def parse(row: Row) -> tuple[str, int, str]:
        """(what is asked, the right choice's place, the subject)."""
        choices = texts(row, "choices")
        answer = column(row, "answer")
        known = LETTERS[:4] if isinstance(answer, str) else range(4)
        if len(choices) != 4 or answer not in tuple(known):
            raise ValueError(f"expected four choices and which is right, got {choices}, {answer!r}")
        true = tuple(known).index(answer)
        words = filled(template, question=text(row, "question"), options=lettered(choices))
        return words, true, str(row.get("subject", ""))

    return parse


def _with_columns(source: Source) -> Source:
    """The rows of a .csv with no header, named; any other source as it is."""
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ".csv":
        return list(_csv_rows(Path(source)))
    return source


def _csv_rows(path: Path) -> Iterator[Row]:
    subject = path.stem.removesuffix("_test").removesuffix("_val").removesuffix("_dev")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines: Iterable[list[str]] = csv.reader(file)
        for number, line in enumerate(lines, start=1):
            if len(line) != 6:
                raise ValueError(
                    f"{path}, row {number}: expected question, A, B, C, D and the letter, got "
                    f"{len(line)} fields"
                )
            question, *choices, answer = line
            yield {
                "question": question,
                "choices": choices,
                "answer": answer.strip(),
                "subject": subject,
            }
