"""A benchmark's items: pairs to fit and tune on, tasks to judge by, and who may see which."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from grains_ext import PreferencePair, load_pairs
from grains_ext.evaluation import MultipleChoice, Question, datasets
from recipes.recipe import Options, Recipe

Rows = Any
"""What the loaders read: a path, or a split of `datasets`."""
Judged = Literal["truth", "hallucination", "comparison"]
"""How answers are rated: see judging.py."""


@dataclass(frozen=True)
class Asked:
    """Questions that are answered in the model's own words."""

    questions: tuple[Question, ...]
    judged: Judged


@dataclass(frozen=True)
class Items:
    """A benchmark as its files give it, before anything is split."""

    pairs: list[PreferencePair]
    choices: dict[str, list[MultipleChoice]] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    test_pairs: bool = False
    """Whether pairs that are neither fitted nor tuned on are a task of their own."""


@dataclass(frozen=True)
class Data:
    """What each stage may see. No subject of fit or dev is in another part."""

    fit: list[PreferencePair]
    dev: list[PreferencePair]
    test_pairs: list[PreferencePair]
    choices: dict[str, list[MultipleChoice]]
    asked: dict[str, Asked]
    neutral_dev: list[str]
    neutral_test: list[str]

    def describe(self) -> Options:
        """What was drawn, so that another run can be compared: the subjects of every part."""
        subjects = {
            "fit": _subjects(self.fit),
            "dev": _subjects(self.dev),
            "test pairs": _subjects(self.test_pairs),
            **{name: _subjects(items) for name, items in self.choices.items()},
            **{name: _subjects(asked.questions) for name, asked in self.asked.items()},
        }
        pairs = (*self.fit, *self.dev, *self.test_pairs)
        answers = [(pair.chosen, pair.rejected) for pair in pairs]
        choices = [(item.choices, item.labels) for part in self.choices.values() for item in part]
        neutral = (self.neutral_dev, self.neutral_test)
        drawn = (sorted(subjects.items()), answers, choices, neutral)
        return {
            "counts": {name: len(part) for name, part in subjects.items()},
            "sha256": _digest(repr(drawn)),
            "subjects": subjects,
        }


Item = TypeVar("Item", PreferencePair, MultipleChoice, Question)


def load(recipe: Recipe, data: Path | None) -> Data:
    """The recipe's data from a folder, or with None through `datasets.load_dataset`.

    Raises FileNotFoundError naming what is missing, ValueError for a bad row or too few items.
    """
    settings = recipe.settings
    find = _Finder(data)
    items = _BENCHMARKS[recipe.benchmark["name"]](find, recipe.benchmark["sources"])
    kept = _KEPT[recipe.kept["name"]](find, recipe.kept["sources"])
    rng = random.Random(settings["seed"])
    [fit, dev], others = _split(items.pairs, (settings["n_fit"], settings["n_dev"]), rng)
    seen = {subject for part in (fit, dev) for subject in map(subject_of, part)}

    def unseen(part: Iterable[Item], limit: int | None) -> list[Item]:
        """Those whose subject no fit or dev pair has; of more than the limit a random draw."""
        free = [item for item in part if subject_of(item) not in seen]
        return free if limit is None or len(free) <= limit else rng.sample(free, limit)

    n_test = settings["n_test"]
    choices = {name: unseen(part, n_test) for name, part in items.choices.items()}
    choices[recipe.kept["name"]] = unseen(kept, settings["n_kept"])
    asked = {
        name: replace(each, questions=tuple(unseen(each.questions, n_test)))
        for name, each in items.asked.items()
    }
    neutral = find.neutral(settings["n_neutral"], rng)
    half = len(neutral) // 2
    found = Data(
        fit=fit,
        dev=dev,
        test_pairs=unseen(others, n_test) if items.test_pairs else [],
        choices=choices,
        asked=asked,
        neutral_dev=neutral[:half],
        neutral_test=neutral[half:],
    )
    check_disjoint(found)
    return found


def check_disjoint(data: Data) -> None:
    """Raises ValueError where two of fit, dev and test share a subject, or a part is empty."""
    judged: list[Any] = [*data.test_pairs, *(i for part in data.choices.values() for i in part)]
    judged += [question for asked in data.asked.values() for question in asked.questions]
    parts = {"fit": data.fit, "dev": data.dev, "test": judged}
    subjects = {name: set(_subjects(part)) for name, part in parts.items()}
    for one, other in (("fit", "dev"), ("fit", "test"), ("dev", "test")):
        if shared := subjects[one] & subjects[other]:
            raise ValueError(f"{len(shared)} subjects are in {one} and in {other}")
    empty = [name for name, part in (*parts.items(), *data.choices.items()) if not part]
    empty += [name for name, asked in data.asked.items() if not asked.questions]
    if empty:
        raise ValueError(f"nothing is left for {', '.join(empty)}: more items are needed")


def subject_of(item: PreferencePair | MultipleChoice | Question) -> str:
    """What an item is about, for the split: its pictures, or its prompt where it has none.

    Two questions about one picture are one subject; the same question about two pictures is two.
    """
    if item.images:
        return "image " + _digest("".join(map(_image_key, item.images)))
    return "text " + _digest(str(item.prompt))


def _subjects(items: Iterable[Any]) -> list[str]:
    return [subject_of(item) for item in items]


def _image_key(image: Any) -> str:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    content = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.sha256(content).hexdigest()


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _split(
    pairs: Sequence[PreferencePair], sizes: tuple[int, int], rng: random.Random
) -> tuple[list[list[PreferencePair]], list[PreferencePair]]:
    """One pair for each subject drawn into the parts; and every pair of the other subjects."""
    by_subject: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_subject.setdefault(subject_of(pair), []).append(pair)
    order = list(by_subject)
    rng.shuffle(order)
    if len(order) <= sum(sizes):
        raise ValueError(
            f"{len(order)} different prompts or pictures with pairs are not enough for "
            f"{sizes[0]} to fit, {sizes[1]} to tune and some to test"
        )
    parts, start = [], 0
    for size in sizes:
        parts.append([by_subject[subject][0] for subject in order[start : start + size]])
        start += size
    return parts, [pair for subject in order[start:] for pair in by_subject[subject]]


# --- where rows come from -------------------------------------------------------------------------


class _Finder:
    """Finds a source in the data folder, or loads it by name."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def rows(self, source: Options) -> Rows:
        found = self.optional(source)
        if found is None:
            raise FileNotFoundError(
                f"--data {self.folder} has none of {', '.join(source['files'])}"
                + (f" (of {source['datasets'][0]})" if "datasets" in source else "")
            )
        return found

    def optional(self, source: Options) -> Rows | None:
        if self.folder is not None:
            paths = [self.folder / name for name in source["files"]]
            return next((path for path in paths if path.exists()), None)
        if "datasets" not in source:
            raise FileNotFoundError(
                f"there is no public data set for {' or '.join(source['files'])}: give --data a "
                "folder that has it"
            )
        from datasets import load_dataset

        name, configuration, split = source["datasets"]
        return load_dataset(name, configuration, split=split)

    def neutral(self, n: int, rng: random.Random) -> list[str]:
        """Ordinary texts: the paragraphs of neutral.txt, or WikiText-2's."""
        if self.folder is not None:
            path = self.folder / "neutral.txt"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: ordinary text that should stay fluent, one paragraph per line"
                )
            lines = path.read_text(encoding="utf-8").splitlines()
        else:
            from datasets import load_dataset

            lines = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="validation")[
                "text"
            ]
        texts = list(dict.fromkeys(line.strip() for line in lines if len(line.split()) >= 4))
        if len(texts) < 2:
            raise ValueError("the neutral text needs two paragraphs of four words or more")
        return texts if len(texts) <= n else rng.sample(texts, n)


# --- the benchmarks -------------------------------------------------------------------------------


def _truthfulqa(find: _Finder, sources: Options) -> Items:
    sets = datasets.truthfulqa(find.rows(sources["choices"]), template="{question}", chat=True)
    asked = {}
    if (rows := find.optional(sources["questions"])) is not None:
        questions = datasets.truthfulqa_questions(
            rows, _judged_later, template="{question}", chat=True
        ).questions
        asked["generation"] = Asked(questions, "truth")
    return Items(datasets.as_pairs(sets["mc1"]), sets, asked)


def _toxigen(find: _Finder, sources: Options) -> Items:
    fitted = datasets.toxigen(find.rows(sources["fit"]), chat=True)
    return Items(
        datasets.as_pairs(fitted),
        {"toxigen": datasets.toxigen(find.rows(sources["test"]), chat=True)},
    )


def _faitheval(find: _Finder, sources: Options) -> Items:
    items = datasets.faitheval(find.rows(sources["choices"]), chat=True)
    return Items(datasets.as_pairs(items), {"faitheval": items})


def _mmhal(find: _Finder, sources: Options) -> Items:
    questions = datasets.mmhal(find.rows(sources["questions"]), _judged_later).questions
    asked = {"mmhal": Asked(questions, "hallucination")}
    return Items(load_pairs(find.rows(sources["pairs"])), {}, asked, test_pairs=True)


def _spa_vl(find: _Finder, sources: Options) -> Items:
    asked = {}
    if (rows := find.optional(sources["questions"])) is not None:
        asked["spa-vl"] = Asked(datasets.spa_vl_questions(rows), "comparison")
    return Items(datasets.spa_vl(find.rows(sources["pairs"])), {}, asked, test_pairs=True)


def _mmlu(find: _Finder, sources: Options) -> list[MultipleChoice]:
    return datasets.mmlu(find.rows(sources["test"]), examples=find.rows(sources["dev"]), chat=True)


def _mmmu(find: _Finder, sources: Options) -> list[MultipleChoice]:
    return datasets.mmmu(find.rows(sources["test"]))


def _judged_later(question: Question, answer: str) -> float:
    raise AssertionError("answers are kept, and rated when the table is made")


_BENCHMARKS: dict[str, Callable[[_Finder, Options], Items]] = {
    "truthfulqa": _truthfulqa,
    "toxigen": _toxigen,
    "faitheval": _faitheval,
    "mmhal": _mmhal,
    "spa-vl": _spa_vl,
}
_KEPT: dict[str, Callable[[_Finder, Options], list[MultipleChoice]]] = {
    "mmlu": _mmlu,
    "mmmu": _mmmu,
}
