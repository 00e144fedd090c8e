"""POPE (Li et al. 2023, arXiv 2305.10355): is the object in the picture?"""

from __future__ import annotations

from pathlib import Path

from grains_ext.evaluation.datasets.rows import (
    Row,
    Source,
    column,
    filled,
    image_of,
    read,
    text,
    visual_prompt,
)
from grains_ext.evaluation.questions import Question, QuestionSet


def pope(
    source: Source,
    *,
    image_folder: str | Path | None = None,
    image_token: str | None = None,
    template: str = "{question}",
    max_new_tokens: int = 16,
) -> QuestionSet:
    """POPE's yes-no questions.

    source: coco_pope_{random,popular,adversarial}.json of the authors' repository, an object per
        line with `question_id`, `image` (a file name), `text`, `label`; or `lmms-lab/POPE` of
        `datasets` or as parquet, with `question`, `answer`, `image`.
    image_folder: where the named images are; by default the folder of the file.
    image_token: None makes chat messages; else a plain prompt with the processor's image_token.
    template: with "{question}", to add for instance that one word is enough.
    """

    def question(row: Row) -> Question:
        words = filled(template, question=text(row, "text", "question"))
        label = text(row, "label", "answer").lower()
        return Question(
            visual_prompt(words, image_token),
            (label,),
            images=(image_of(row, source, image_folder, "image"),),
            id=str(column(row, "question_id")),
        )

    return QuestionSet(tuple(read(source, question)), "yes_no", max_new_tokens=max_new_tokens)
