"""The same recipe in small: a random model of the same transformers class, made-up files in the
layouts of the public ones. What comes out says that every stage runs, and nothing else."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.recipe import Recipe
from tests.models import tiny_model, tiny_tokenizer
from tests.vision_models import tiny_vlm

N_ROWS = 14
"""More than the pairs to fit and to tune on together."""
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_THINGS = ("sky", "sea", "grass", "rose", "home", "grandma", "study")
_COLOURS = ("blue", "green", "red", "white")


def small_model(recipe: Recipe) -> tuple[Any, Any]:
    """A random model of the recipe's class, and its tokenizer, or its processor."""
    family = recipe.model["family"]
    if recipe.model.get("images"):
        return tiny_vlm(family)
    model = tiny_model(family, max_position_embeddings=512)
    return model, tiny_tokenizer(chat_template=_CHAT_TEMPLATE)


def judge(prompt: str) -> str:
    """Stands for a language model's verdict; it depends on the prompt, and on nothing in it."""
    number = sum(prompt.encode()) % 7
    return f"Rating: {number % 2 if 'Rating: 1' in prompt else number}\nBetter: {'AB'[number % 2]}"


def write_data(recipe: Recipe, folder: Path) -> Path:
    """Writes the recipe's files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[recipe.benchmark["name"]](folder)
    _WRITERS[recipe.kept["name"]](folder)
    texts = [f"the {thing} of the {other} is white" for thing, other in _two_things()]
    (folder / "neutral.txt").write_text("\n".join(texts))
    return folder


def _two_things() -> Iterator[tuple[str, str]]:
    return itertools.islice(itertools.permutations(_THINGS, 2), N_ROWS)


def _asked() -> Iterator[tuple[int, str, str, str]]:
    """(number, question, right answer, wrong answer), all questions different."""
    for number, (thing, other) in enumerate(_two_things()):
        right, wrong = _COLOURS[number % 4], _COLOURS[(number + 1 + number % 3) % 4]
        yield number, f"what color is the {thing} of the {other}", right, wrong


def _truthfulqa(folder: Path) -> None:
    rows, lines = [], []
    for _, question, right, wrong in _asked():
        mc1 = {f"{right}.": 1, f"{wrong}.": 0, "rome.": 0}
        mc2 = {f"{right}.": 1, f"the {right}.": 1, f"{wrong}.": 0}
        rows.append({"question": question, "mc1_targets": mc1, "mc2_targets": mc2})
        lines.append([question, right, f"{right}; the {right}", f"{wrong}; rome"])
    (folder / "mc_task.json").write_text(json.dumps(rows))
    header = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
    _write_csv(folder / "TruthfulQA.csv", [header, *lines])


def _toxigen(folder: Path) -> None:
    header = ["text", "target_group", "toxicity_ai", "toxicity_human"]
    for name, word in (("train", "says"), ("test", "note")):
        rows = [
            [f"grandma {word} the {thing} is {right}", "rome", 1 + 3 * (number % 2), 2]
            for number, thing, right, _ in _asked()
        ]
        _write_csv(folder / f"annotated_{name}.csv", [header, *rows])


def _faitheval(folder: Path) -> None:
    rows = [
        {
            "id": f"q{number}",
            "question": question,
            "context": f"a study shows {question} is {right}",
            "choices": {"label": ["A", "B"], "text": [[right, wrong], [wrong, right]][number % 2]},
            "answerKey": "AB"[number % 2],
        }
        for number, question, right, wrong in _asked()
    ]
    (folder / "counterfactual.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _mmhal(folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    questions, pairs = [], []
    for number, question, right, wrong in _asked():
        for kind in ("q", "p"):
            (folder / "images" / f"{kind}{number}.png").write_bytes(_png(f"{kind}{number}"))
        questions.append(
            {
                "question": question,
                "gt_answer": f"it is {right}",
                "image_content": ["sky"],
                "question_type": "attribute",
                "image_id": f"d{number}",
                "image_src": f"https://example.org/q{number}.png",
            }
        )
        message = [{"type": "image"}, {"type": "text", "text": question}]
        pairs.append(
            {
                "prompt": [{"role": "user", "content": message}],
                "chosen": right,
                "rejected": wrong,
                "images": [f"images/p{number}.png"],
            }
        )
    (folder / "response_template.json").write_text(json.dumps(questions))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def _spa_vl(folder: Path) -> None:
    rows = [
        {
            "question": question,
            "chosen": right,
            "rejected": wrong,
            "image": {"bytes": _png(f"v{number}"), "path": f"{number}.png"},
        }
        for number, question, right, wrong in _asked()
    ]
    _write_parquet(folder / "validation" / "validation-00000-of-00001.parquet", rows)
    asked = [
        {"question": row["question"], "image": {"bytes": _png(f"t{n}"), "path": "t.png"}}
        for n, row in enumerate(rows)
    ]
    _write_parquet(folder / "test" / "harm-00000-of-00001.parquet", asked)


def _mmlu(folder: Path) -> None:
    def rows(word: str) -> list[dict[str, Any]]:
        return [
            {"question": f"{word} {question}", "subject": "rome", "choices": list(_COLOURS),
             "answer": _COLOURS.index(right)}
            for _, question, right, _ in _asked()
        ]  # fmt: skip

    _write_parquet(folder / "mmlu" / "test" / "test-00000-of-00001.parquet", rows("q"))
    _write_parquet(folder / "mmlu" / "dev" / "dev-00000-of-00001.parquet", rows("note")[:1])


def _mmmu(folder: Path) -> None:
    rows = [
        {
            "id": f"validation_{number}",
            "question": f"<image 1> {question}",
            "options": str([right, wrong]),
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": {"bytes": _png(f"m{number}"), "path": f"{number}.png"},
        }
        for number, question, right, wrong in _asked()
    ]
    _write_parquet(folder / "mmmu" / "validation-00000-of-00001.parquet", rows)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "truthfulqa": _truthfulqa,
    "toxigen": _toxigen,
    "faitheval": _faitheval,
    "mmhal": _mmhal,
    "spa-vl": _spa_vl,
    "mmlu": _mmlu,
    "mmmu": _mmmu,
}


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _png(name: str) -> bytes:
    """A picture of 16 x 16 pixels that no other name has."""
    from PIL import Image

    seed = int.from_bytes(name.encode(), "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
