"""Preference pairs, and reading them from the files and data sets that people have."""

import codecs
import csv
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from grains_ext.files import write_text

Row = Mapping[str, Any]
Message = Mapping[str, Any]

# Columns of the common preference sets, by role; the first one present is taken. The names are
# compared in lower case with "_" for " ", so that TruthfulQA.csv's "Best Answer" is best_answer.
_PROMPT = ("prompt", "question", "instruction", "query")
_CHOSEN = ("chosen", "best_answer", "correct_answer", "preferred", "answer_matching_behavior")
_REJECTED = (
    "rejected",
    "best_incorrect_answer",
    "incorrect_answers",
    "incorrect_answer",
    "dispreferred",
    "answer_not_matching_behavior",
)
_LAYOUTS = (
    "prompt/chosen/rejected, question/best_answer/incorrect_answers, question/mc1_targets, "
    "or chosen/rejected message lists that share the prompt's turns"
)


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with the answer that is wanted and the one that is not.

    prompt: a string, or chat messages ({"role": ..., "content": ...}) for the tokenizer's chat
        template. chosen, rejected: the two continuations, different and not blank.
    images: for vision-language models, in the order of the prompt's image places: paths, PIL
        images, arrays [height, width, channels] or records with `bytes` or `path`. They are opened
        when they are needed (grains_ext.vision). URLs are refused: nothing is downloaded here.
    id: any name that finds the pair again in reports.

    Raises ValueError where a field is missing, blank or of the wrong type, chosen == rejected, or
    an image is a URL.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str
    images: tuple[Any, ...] | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            if not self.prompt.strip():
                raise ValueError("the prompt is empty")
        else:
            _check_messages("prompt", self.prompt)
        for name, text in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not isinstance(text, str):
                raise ValueError(f"`{name}` must be a string, got {_shown(text)}")
            if not text.strip():
                raise ValueError(f"the {name} answer is empty")
        said = [self.prompt, self.chosen, self.rejected, self.id]
        try:
            json.dumps(said, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{half!r} is half of a surrogate pair, which no text has") from error
        if self.chosen.strip() == self.rejected.strip():
            raise ValueError(f"chosen and rejected are the same: {_shown(self.chosen)}")
        for image in self.images or ():
            if isinstance(image, str) and "://" in image:
                raise ValueError(
                    f"the image {_shown(image)} is a URL: download it and give its path"
                )


def load_pairs(
    source: str | Path | Iterable[Row | PreferencePair], *, skip_bad: bool = False
) -> list[PreferencePair]:
    """Reads preference pairs.

    source: a .jsonl, .json (a list, or an object per line), .csv or .parquet file (the last needs
        pyarrow), or anything that yields mappings: a list, a generator, one split of a `datasets`
        object.
        Relative paths of images in a file are looked up beside that file.
    skip_bad: go on after a bad row, and warn once with the number left out. Otherwise the first
        bad row raises ValueError with the file, the line and the reason.

    Raises FileNotFoundError, ValueError (unknown file type, bad row, no pair at all), ImportError.

        pairs = load_pairs("pairs.jsonl", skip_bad=True)
    """
    file = Path(source) if isinstance(source, str | Path) else None
    name = "pairs" if file is None else str(source)
    pairs: list[PreferencePair] = []
    problems: list[str] = []
    for where, read_row in read_rows(source):
        try:
            pair = pair_from_row(read_row())
            if file is not None and pair.images:
                images = tuple(_from_folder(image, file.parent) for image in pair.images)
                pair = replace(pair, images=images)
            pairs.append(pair)
        except ValueError as error:
            problem = f"{name}, {where}: {error}"
            if not skip_bad:
                raise ValueError(
                    f"{problem} (skip_bad=True, --skip-bad, leaves bad rows out)"
                ) from error
            problems.append(problem)
    if problems:
        total = len(pairs) + len(problems)
        warnings.warn(
            f"skipped {len(problems)} bad of {total} rows; the first: {problems[0]}", stacklevel=2
        )
    if not pairs:
        raise ValueError(f"{name}: no preference pair in it")
    return pairs


def save_pairs(pairs: Iterable[PreferencePair], path: str | Path) -> None:
    """Writes pairs as JSON lines that load_pairs reads back, with absolute paths of images.

    Raises TypeError where an image is no path (save it and give its path in its place).
    """
    lines = []
    for pair in pairs:
        row: dict[str, Any] = {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        if pair.images is not None:
            row["images"] = [
                str(Path(image).absolute()) if isinstance(image, str | Path) else image
                for image in pair.images
            ]
        if pair.id is not None:
            row["id"] = pair.id
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(Path(path), "".join(lines))


def pair_from_row(row: Row | PreferencePair) -> PreferencePair:
    """One row of a data set as a pair. Raises ValueError with the reason where it is none."""
    if isinstance(row, PreferencePair):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with named fields, got {_shown(row)}")
    fields = {
        str(name).strip().lower().replace(" ", "_"): value
        for name, value in row.items()
        if value is not None
    }
    chosen = _first(fields, _CHOSEN)
    rejected = _first(fields, _REJECTED)
    if rejected is not None and rejected is fields.get("incorrect_answers"):
        rejected = _first_listed(rejected)
    if chosen is None and rejected is None and "mc1_targets" in fields:
        chosen, rejected = _multiple_choice(fields["mc1_targets"])
    if chosen is None or rejected is None:
        missing = "preferred" if chosen is None else "dispreferred"
        raise ValueError(
            f"no {missing} answer among the fields {sorted(fields)}; expected {_LAYOUTS}"
        )
    prompt = _first(fields, _PROMPT)
    if _is_messages(chosen) and _is_messages(rejected):
        prompt, chosen, rejected = _split_conversations(prompt, chosen, rejected)
    if prompt is None:
        raise ValueError(f"no prompt among the fields {sorted(fields)}; expected {_LAYOUTS}")
    system = fields.get("system")
    if isinstance(prompt, str) and isinstance(system, str) and system.strip():
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    images = fields.get("images", fields.get("image"))
    if images is not None:
        images = tuple(images) if isinstance(images, list | tuple) else (images,)
    return PreferencePair(
        prompt=list(prompt)
        if isinstance(prompt, Iterable) and not isinstance(prompt, str)
        else prompt,
        chosen=_one_answer(chosen),
        rejected=_one_answer(rejected),
        images=images or None,
        id=str(fields["id"]) if "id" in fields else None,
    )


# --- reading rows: (where, a function that returns the row) ---------------------------------------


def read_rows(source: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each row of a source of `load_pairs`: where it stands, and what reads it or raises."""
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping):
            raise ValueError(
                f"expected rows, got a mapping with the keys {list(source)}: pass one split of it, "
                "or a list of rows"
            )
        for i, row in enumerate(source):
            yield f"row {i}", partial(_same, row)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; of a data set on the hub pass what datasets.load_dataset returns"
        )
    match path.suffix.lower():
        case ".json" if _begins_with(path, b"["):
            try:
                rows = _parse_json(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            for i, row in enumerate(rows):
                yield f"row {i}", partial(_same, row)
        case ".jsonl" | ".ndjson" | ".json":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"line {number}", partial(_parse_json, line)
        case ".csv":
            yield from _csv_rows(path)
        case ".parquet":
            yield from _parquet_rows(path)
        case suffix:
            raise ValueError(
                f"{path}: cannot read preference pairs from a {suffix or 'nameless'} file; "
                "expected .jsonl, .json, .csv or .parquet"
            )


def _csv_rows(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _ = reader.fieldnames  # reads the header
            line = reader.line_num
            for row in reader:
                yield f"line {line + 1}", partial(_checked_csv_row, row)
                line = reader.line_num  # a quoted field may span lines
    except csv.Error as error:  # a field of more than 128 KiB
        raise ValueError(f"{path}, line {line + 1}: {error}; convert it to .jsonl") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _checked_csv_row(row: dict[Any, Any]) -> Row:
    if None in row:
        raise ValueError(f"more fields than the header names: {row[None]}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs pyarrow: pip install pyarrow, or convert the file to .jsonl"
        ) from error
    start = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for i, row in enumerate(batch.to_pylist()):
            yield f"row {start + i}", partial(_same, row)
        start += batch.num_rows


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ValueError(f"not valid JSON: {error}") from error


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(mark)


def _same(row: Any) -> Any:
    return row


# --- the shapes a row can have --------------------------------------------------------------------


def _from_folder(image: Any, folder: Path) -> Any:
    """An image's relative path as one below the folder; anything else as it is."""
    return str((folder / image).absolute()) if isinstance(image, str | Path) else image


def _first(fields: Row, names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if name in fields), None)


def _one_answer(answer: Any) -> Any:
    """The answer's text, from a string, a list (the first) or one assistant message."""
    if isinstance(answer, list | tuple) and answer:
        if _is_messages(answer) and len(answer) == 1:
            return _text_of(answer[0]["content"])
        return answer[0]
    return answer


def _first_listed(answers: Any) -> Any:
    """Of TruthfulQA.csv's several answers in one field, "a; b", the first."""
    return answers.split(";")[0] if isinstance(answers, str) else answers


def _multiple_choice(targets: Any) -> tuple[Any, Any]:
    """TruthfulQA's {"choices": [...], "labels": [1, 0, ...]}: the first right and wrong."""
    try:
        answers = list(zip(targets["choices"], targets["labels"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`mc1_targets` must hold `choices` and `labels`: {error}") from error
    right = next((choice for choice, label in answers if label), None)
    wrong = next((choice for choice, label in answers if not label), None)
    return right, wrong


def _split_conversations(
    prompt: Any, chosen: list[Message], rejected: list[Message]
) -> tuple[Any, Any, Any]:
    """Two conversations that differ in their last turn, as (prompt, chosen, rejected).

    A `prompt` of messages stands before them (TRL's explicit prompt). A string beside full
    conversations repeats their first turn (UltraFeedback) and is left out for it.
    """
    *turns, last_chosen = chosen
    *other_turns, last_rejected = rejected
    if list(turns) != list(other_turns):
        raise ValueError(
            "the chosen and rejected conversations must share every turn but the last one"
        )
    for name, message in (("chosen", last_chosen), ("rejected", last_rejected)):
        if message["role"] != "assistant":
            raise ValueError(
                f"the {name} conversation must end with an assistant turn, got {message['role']!r}"
            )
    if _is_messages(prompt):
        turns = [*prompt, *turns]
    chosen_text, rejected_text = (
        _text_of(last_chosen["content"]),
        _text_of(last_rejected["content"]),
    )
    return turns or prompt, chosen_text, rejected_text


def _text_of(content: Any) -> Any:
    """A message's content as a string where it is a list of text parts, as beside image parts."""
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )


def _check_messages(name: str, value: Any) -> None:
    if not _is_messages(value):
        raise ValueError(
            f"`{name}` must be a string or a list of messages with `role` and `content`, "
            f"got {_shown(value)}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
