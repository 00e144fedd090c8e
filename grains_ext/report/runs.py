"""What lies in the folders and files that the commands write, recognised by its own marks.

No text inside a file is ever used as a path: pictures come from the pairs that the caller gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains_ext.report import evaluated
from grains_ext.report.exported import benchmark, demo_rates, exported
from grains_ext.report.parts import (
    Attributed,
    Directions,
    Generation,
    MethodRow,
    Parts,
    Tuning,
    comparison,
    continued,
)
from grains_ext.report.steered import vectors

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution
    from grains_ext.pairs import PreferencePair

# A run folder holds the folders of its commands; model folders and data sets lie deeper.
_DEPTH = 3
_FORMAT = re.compile(rb'\s*\{\s*"format"\s*:\s*"(grains\.[\w.-]+)"')
_WRITTEN_BY = (
    "'grains attribute', 'fit', 'refine', 'tune', 'evaluate -o', 'export', 'bench -o' and 'demo' "
    "write what a report can show"
)
_COMMAND = re.compile(r"^command: *[\"']?([a-z-]+)[\"']? *$", re.M)
# A configuration is a page at most; another YAML file is not looked into.
_MAX_CONFIG = 1 << 16

Pictures = Sequence["PreferencePair"] | None


@dataclass(frozen=True)
class _Options:
    pairs: Pictures
    limit: int | None


def read_runs(
    runs: Sequence[str | Path], *, pairs: Pictures = None, limit: int | None = None
) -> Parts:
    """Everything that the runs hold.

    runs: folders that commands wrote, folders of such folders, and single files.
    pairs: those that were attributed, in their order, for their pictures.
    limit: pairs to read of each attribution and evaluation, from the first.

    Raises FileNotFoundError, and ValueError where a path holds no run, one that was stopped half
    way, or one that this version does not read.
    """
    options = _Options(pairs, limit)
    parts = Parts()
    for run in map(Path, runs):
        if not run.exists():
            raise FileNotFoundError(f"no run at {run}: give a folder or file that a command wrote")
        title = run.resolve().name
        if run.is_dir():
            found = _folder(run, title, options)
        else:
            found = _file(run, title, options)
            config = run.with_name(f"{run.name}.yaml")
            found += Parts(
                commands=tuple(_command(config, config.name)) if config.is_file() else ()
            )
        if not found:
            raise ValueError(f"{run} holds no run: {_WRITTEN_BY}")
        if len(runs) == 1:
            # "run/fitted" is "fitted" where there is one run; the run itself keeps its name.
            found = _retitled(found, f"{title}/")
        parts += found
    return replace(
        parts,
        directions=_without_repeats(parts.directions),
        tunings=_without_copies(parts.tunings),
    )


def _folder(folder: Path, title: str, options: _Options, depth: int = _DEPTH) -> Parts:
    names = {entry.name for entry in folder.iterdir() if entry.name[0] != "."}
    _check_complete(folder, names)
    parts = Parts()
    for mark, read in _FOLDERS.items():
        if mark in names:
            with _naming(folder / mark):
                parts += read(folder, title, options)
    for name in sorted(names):
        path = folder / name
        if name in _FOLDERS:
            continue
        if path.is_dir():
            if depth > 1:
                parts += _folder(path, f"{title}/{name}", options, depth - 1)
        elif path.suffix == ".json" and _format_of(path) in _FILES:
            parts += _file(path, title if len(names) == 1 else f"{title}/{path.stem}", options)
        elif path.suffix in (".yaml", ".yml"):
            parts += Parts(commands=tuple(_command(path, f"{title}/{name}")))
    return parts


def _check_complete(folder: Path, names: set[str]) -> None:
    """Raises ValueError for what a stopped command leaves."""
    if "trials.jsonl" in names and "steering_config.json" not in names:
        raise ValueError(
            f"{folder} is of a 'grains tune' that was stopped: run the same command again to go on"
        )
    if any(name.startswith("part-") for name in names) and "attributions.json" not in names:
        raise ValueError(
            f"{folder} has parts of a 'grains attribute' but no attributions.json, which says what "
            "was asked: copy it too"
        )
    if "steering.safetensors" in names and not names & _FOLDERS.keys():
        raise ValueError(
            f"{folder} has steering.safetensors but no steering_config.json, which belongs to it: "
            "copy it too, or run the command again"
        )


def _file(path: Path, title: str, options: _Options) -> Parts:
    if path.suffix == ".safetensors":
        from grains_ext.attribution.result import Attribution

        found = Attribution.load(path)
        return Parts(attributed=(_with_pictures(title, {0: found}, options),))
    kind = _format_of(path) if path.suffix == ".json" else None
    if kind is None:
        raise ValueError(f"{path} is no file of a run: {_WRITTEN_BY}")
    if kind not in _FILES:
        raise ValueError(
            f"{path} is of the format {kind!r}, which this version of grains_ext does not know: "
            "update grains_ext"
        )
    with _naming(path):
        content = json.loads(path.read_bytes())
        version, read = _FILES[kind]
        if content.get("version") != version:
            raise ValueError(
                f"its version is {content.get('version')!r}, this version of grains_ext reads "
                f"{version}: update grains_ext, or run the command again"
            )
        return read(content, title, options)


def _format_of(path: Path) -> str | None:
    """What a JSON file says it is, from its first bytes: others may be large."""
    with path.open("rb") as file:
        match = _FORMAT.match(file.read(256))
    return match[1].decode() if match else None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file that an error speaks of."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{path} is not as grains_ext writes it ({type(error).__name__}: {error}): it is "
            "damaged, or of another version"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        if str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _command(path: Path, title: str) -> Iterator[tuple[str, str]]:
    """(name, text) where the file is the configuration of a command.

    It has the command's name or that of the output beside it: other YAML files speak of commands
    too, and are nobody's business.
    """
    if path.is_file() and path.stat().st_size <= _MAX_CONFIG:
        text = path.read_text(encoding="utf-8", errors="replace")
        match = _COMMAND.search(text)
        if match is None or match[1] == "report":
            return
        if match[1] == path.stem or path.with_suffix("").exists():
            yield f"grains {match[1]} --config {title}", text


# --- kinds of runs --------------------------------------------------------------------------------


def _attributions(folder: Path, title: str, options: _Options) -> Parts:
    from grains_ext.attribution import iter_attributions, stored_indices, summarize

    summary = summarize(folder)
    indices = list(islice(stored_indices(folder), options.limit))
    found = dict(iter_attributions(folder, indices))
    shown = _with_pictures(title, {index: found[index] for index in indices}, options)
    whole = replace(shown, n_pairs=summary["pairs"], n_not_converged=summary["not_converged"])
    return Parts(attributed=(whole,))


def _with_pictures(title: str, found: Mapping[int, Attribution], options: _Options) -> Attributed:
    images = None
    if options.pairs is not None:
        images = tuple(
            _pictures_of(index, attribution, options.pairs) for index, attribution in found.items()
        )
    return Attributed(title, tuple(found.values()), images)


def _pictures_of(
    index: int, attribution: Attribution, pairs: Sequence[PreferencePair]
) -> Sequence[Any] | None:
    if not attribution.images:
        return None
    if index >= len(pairs) or pairs[index].chosen.strip() != attribution.chosen.strip():
        raise ValueError(
            f"pair {index} is not the one that was attributed: give the file of pairs, in the "
            "order, that 'grains attribute' was given"
        )
    return pairs[index].images


def _vectors(folder: Path, title: str, options: _Options) -> Parts:
    from grains_ext.steering import SteeringVectors

    return vectors(SteeringVectors.from_pretrained(folder), title)


def _exported(folder: Path, title: str, options: _Options) -> Parts:
    return exported(json.loads((folder / "grains_export.json").read_bytes()), folder, title)


def _evaluation(content: Mapping[str, Any], title: str, options: _Options) -> Parts:
    found = evaluated.evaluation(content, title)
    answers = tuple(
        replace(each, asked=each.asked[: options.limit], n_asked=len(each.asked))
        for each in found.answers
    )
    return replace(found, answers=answers)


def _demo(content: Mapping[str, Any], title: str, options: _Options) -> Parts:
    """What is in no other file of the demo's folder."""
    rows = [MethodRow(**{**row, "interval": tuple(row["interval"])}) for row in content["rows"]]
    texts = [Generation(**each) for each in content["generations"]]
    return Parts(
        held_out=(comparison(rows, title),),
        answers=(continued(texts, title),),
        exported=(demo_rates(content["export"]["rates"], title),),
    )


def _benchmark(content: Mapping[str, Any], title: str, options: _Options) -> Parts:
    return benchmark(content, title)


_FOLDERS: dict[str, Callable[[Path, str, _Options], Parts]] = {
    "attributions.json": _attributions,
    "steering_config.json": _vectors,
    "grains_export.json": _exported,
}
_FILES: dict[str, tuple[int, Callable[[Mapping[str, Any], str, _Options], Parts]]] = {
    evaluated.FORMAT: (evaluated.VERSION, _evaluation),
    "grains.demo": (1, _demo),
    "grains.bench": (1, _benchmark),
}


# --- all runs together ----------------------------------------------------------------------------


def _retitled(parts: Parts, prefix: str) -> Parts:
    def shorter(titled: Any) -> Any:
        return replace(titled, title=titled.title.removeprefix(prefix))

    names = ("held_out", "answers", "attributed", "directions", "tunings", "exported")
    lists: dict[str, Any] = {name: tuple(map(shorter, getattr(parts, name))) for name in names}
    commands = tuple((name.replace(prefix, "", 1), text) for name, text in parts.commands)
    return replace(parts, **lists, commands=commands)


def _without_copies(found: Sequence[Tuning]) -> tuple[Tuning, ...]:
    """Each once, the last one of equals: an exported folder has a copy of its vectors."""
    last = {repr(replace(each, title="")): place for place, each in enumerate(found)}
    return tuple(found[place] for place in sorted(last.values()))


def _without_repeats(found: Sequence[Directions]) -> tuple[Directions, ...]:
    """Without those whose directions are all among another's: tune keeps some of what fit made."""
    kept = []
    for number, each in enumerate(found):
        own = set(each.blocks)
        if not any(
            own < set(other.blocks) or (own == set(other.blocks) and place < number)
            for place, other in enumerate(found)
        ):
            kept.append(each)
    return tuple(kept)
