"""What the loaders share: rows of a source, their columns, images below a folder, prompts."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from grains_ext.evaluation.multiple_choice import MultipleChoice
from grains_ext.pairs import Message, PreferencePair, read_rows

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]
"""A .json, .jsonl, .csv or .parquet file, a folder of .parquet parts, or rows."""
T = TypeVar("T")

LETTERS = string.ascii_uppercase
_IMAGE_MENTION = re.compile(r"<image (\d+)>")


def read(source: Source, convert: Callable[[Row], T | None]) -> list[T]:
    """Each row converted, without those that become None.

    Raises ValueError with file, row and reason for a bad row, and where nothing is left.
    """
    found = []
    for where, row in _rows(source):
        try:
            item = convert(row())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if item is not None:
            found.append(item)
    if not found:
        raise ValueError(f"{_name(source)}: no item in it")
    return found


def column(row: Row, *names: str) -> Any:
    """The first of the columns that is there and not None."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with named columns, got {type(row).__name__}")
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"no column {' or '.join(map(repr, names))} in a row of {sorted(row)}")


def text(row: Row, *names: str) -> str:
    value = column(row, *names)
    if not isinstance(value, str):
        raise ValueError(f"{names[0]!r} must be text, got {type(value).__name__}")
    return value.strip()


def texts(row: Row, *names: str) -> list[str]:
    value = column(row, *names)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{names[0]!r} must be a list of texts, got {value!r}")
    return list(value)


def number(row: Row, *names: str) -> float:
    """A finite number, also written as text."""
    value = column(row, *names)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{names[0]!r} must be a number, got {value!r}")
    return found


def filled(template: str, **fields: str) -> str:
    """The template with its fields in place. Raises ValueError where it asks for others."""
    try:
        return template.format(**fields)
    except (LookupError, AttributeError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in fields)
        raise ValueError(
            f"the template may ask for {known}, and writes {{ as {{{{: {error!r}"
        ) from error


def image_in(folder: str | Path, name: str) -> str:
    """The path of an image below a folder.

    Raises ValueError for a URL, an absolute path, or one that leads out of the folder.
    """
    if "://" in name:
        raise ValueError(f"the image {name!r} is a URL: download it and give its folder")
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"the image {name!r} leads out of its folder {str(folder)!r}")
    return str(path)


def image_of(row: Row, source: Source, folder: str | Path | None, *names: str) -> Any:
    """A row's image: an opened one or a record of `datasets` as it is, a path below the folder.

    folder: by default the source itself where it is one, else the one its file is in.
    """
    value = column(row, *names)
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = column(value, "path")
    if not isinstance(value, str):
        return value
    if folder is None:
        if not isinstance(source, str | Path):
            raise ValueError(f"the image {value!r} is a path: give the images' folder")
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return image_in(folder, value)


def visual_prompt(words: str, image_token: str | None, n_images: int = 1) -> str | list[Message]:
    """The prompt of a question about images that stand before it.

    image_token: None makes one chat message of image parts and the text, for the processor's chat
        template; else a plain prompt with the token once per image, each on a line.
    """
    if image_token is None:
        parts: list[dict[str, str]] = [{"type": "image"}] * n_images
        return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
    return "\n".join([*[image_token] * n_images, words])


def visual_prompt_with_mentions(
    words: str, image_token: str | None
) -> tuple[str | list[Message], list[int]]:
    """The prompt of a text that says "<image 1>" where the image belongs, and the numbers."""
    mentioned = [int(number) for number in _IMAGE_MENTION.findall(words)]
    if image_token is not None:
        return _IMAGE_MENTION.sub(lambda _: image_token, words), mentioned
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(_IMAGE_MENTION.split(words)):
        if place % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return [{"role": "user", "content": parts}], mentioned


def text_prompt(words: str, chat: bool) -> str | list[Message]:
    """The text, or a user's message of it."""
    return [{"role": "user", "content": words}] if chat else words


def lettered(options: Iterable[str], form: str = "{letter}. {option}") -> str:
    """The options, one per line behind their letters. Raises ValueError for more than 26."""
    options = list(options)
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, and {len(LETTERS)} letters for them")
    return "\n".join(
        form.format(letter=letter, option=option)
        for letter, option in zip(LETTERS, options, strict=False)
    )


def as_pairs(items: Iterable[MultipleChoice], *, every: bool = False) -> list[PreferencePair]:
    """Preference pairs of multiple-choice items: the first true choice against a false one.

    every: against each false choice, a pair for each; otherwise against the first.
    """
    pairs = []
    for item in items:
        true = [c for c, label in zip(item.choices, item.labels, strict=True) if label]
        false = [c for c, label in zip(item.choices, item.labels, strict=True) if not label]
        pairs += [
            PreferencePair(item.prompt, true[0], other, item.images, item.id)
            for other in (false if every else false[:1])
        ]
    return pairs


def _rows(source: Source) -> Iterator[tuple[str, Callable[[], Any]]]:
    if isinstance(source, str | Path) and Path(source).is_dir():
        files = sorted(Path(source).glob("*.parquet"))
        if not files:
            raise ValueError(f"{source}: no .parquet file in this folder")
        for file in files:
            yield from _rows(file)
        return
    for where, row in read_rows(source):
        yield f"{_name(source)}, {where}", row


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the rows"
