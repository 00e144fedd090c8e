"""A directory that results stream to as they come, and that an interrupted run goes on from.

    attributions.json              what was asked for: a directory holds one run
    part-00000.safetensors         the numbers of some pairs
    part-00000.jsonl               one line of JSON for each of them
    part-2-of-8-00000.jsonl ...    the same, written by shard 2 of 8

A part's .jsonl is renamed into place last, when its .safetensors is on the disk: a part counts from
that moment on, and wholly. What a killed run left besides is removed by the next one that writes.
No file's content is ever used as a path. docs/formats.md describes the files.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from grains_ext.attribution import records
from grains_ext.attribution.result import Attribution
from grains_ext.files import replacing

RUN_NAME = "attributions.json"
_FORMAT = {"format": "grains.attributions", "version": 1}
_PART = re.compile(r"(part-(?:\d+-of-\d+-)?)(\d{5,})\.jsonl")
_LOCK = ".lock"
_HEAD = ("index", "evaluations", "converged")


class AttributionStore:
    """A directory of one run's results, open for writing.

        with AttributionStore("results", run={"model": "gpt2", "method": "adaptive"}) as store:
            store.append([(0, attribution)])

    directory: made where it is missing. Otherwise it must be empty or hold the same run.
    run: what decides the results (settings, fingerprints of model and pairs) as plain JSON. Not the
        shard: all shards of a run may write into one directory, at the same time.
    shard: (i, n) with 1 <= i <= n where this process writes the i-th of n shares.

    Raises ValueError where the directory holds another run (naming what differs), other files, or
    damaged ones; RuntimeError where another process writes the same shard, or other shares of the
    run; NotADirectoryError.
    """

    def __init__(
        self,
        directory: str | Path,
        run: Mapping[str, Any],
        *,
        shard: tuple[int, int] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.run: dict[str, Any] = json.loads(json.dumps(run, allow_nan=False))
        share, shares = shard or (1, 1)
        if not 1 <= share <= shares:
            raise ValueError(f"shard must be (i, n) with 1 <= i <= n, got {shard}")
        self._prefix = "part-" if shares == 1 else f"part-{share}-of-{shares}-"
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; results stream to a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        # Everyone who opens the directory goes through here one at a time, for an instant.
        with _lock(self.directory / _LOCK, wait=True):
            self._create_or_compare()
            self._lock = self._take_shard(share, shares)
            try:
                self._remove_leftovers()
                parts = _parts(self.directory)
            except BaseException:
                self._lock.close()
                raise
        self._done = {index for part in parts for index in part.indices}
        own = [part.number for part in parts if part.prefix == self._prefix]
        self._next_number = max(own, default=-1) + 1

    @property
    def done(self) -> frozenset[int]:
        """Indices of the stored pairs: all shards' when the directory was opened, and own ones."""
        return frozenset(self._done)

    def append(self, items: Iterable[tuple[int, Attribution]]) -> None:
        """Stores (index, attribution) pairs as one part: all of them or, on an error, none.

        Returns when they are on the disk. Raises ValueError for an index that is negative, given
        twice, or stored already; OSError where the files cannot be written, after which append can
        be called again.
        """
        items = list(items)
        if not items:
            return
        if self._lock.closed:
            raise ValueError(f"the store {self.directory} is closed")
        indices = {index for index, _ in items}
        if len(indices) != len(items) or indices & self._done or min(indices) < 0:
            raise ValueError(
                "indices must be new, different and not negative, got "
                f"{_some(index for index, _ in items)} with {len(self._done)} pairs stored"
            )
        arrays, lines = records.pack(items)
        contents = {
            ".safetensors": records.part_bytes(arrays),
            ".jsonl": "".join(line + "\n" for line in lines).encode(),
        }
        for suffix, content in contents.items():
            path = self.directory / f"{self._prefix}{self._next_number:05d}{suffix}"
            with replacing(path, durable=True) as temporary:
                temporary.write_bytes(content)
        self._next_number += 1
        self._done |= indices

    def load(self, indices: Iterable[int] | None = None) -> list[Attribution]:
        """The stored results: those of ``indices`` in their order, or all by rising index.

        Raises ValueError naming the indices that are not stored, or a damaged file.
        """
        wanted = None if indices is None else list(indices)
        stored = dict(iter_attributions(self.directory, wanted))
        return [stored[index] for index in (sorted(stored) if wanted is None else wanted)]

    def summary(self) -> dict[str, Any]:
        """See `summarize`."""
        return summarize(self.directory)

    def close(self) -> None:
        """Lets another process write this shard. The end of the process does so as well."""
        self._lock.close()

    def __enter__(self) -> AttributionStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create_or_compare(self) -> None:
        path = self.directory / RUN_NAME
        if path.exists():
            differences = _differences(_read_run(path), self.run)
            if differences:
                raise ValueError(
                    f"{self.directory} holds another run: {'; '.join(differences)}. Use the same "
                    "settings to go on with it, or another directory"
                )
            return
        others = [entry.name for entry in self.directory.iterdir() if entry.name[0] != "."]
        if others:
            raise ValueError(
                f"{self.directory} holds no {RUN_NAME}, but other files ({_some(sorted(others))}): "
                "use a new or empty directory"
            )
        with replacing(path, durable=True) as temporary:
            text = json.dumps({**_FORMAT, "run": self.run}, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def _take_shard(self, share: int, shares: int) -> TextIO:
        """Locks this shard, and makes sure that nobody writes shares that overlap with it."""
        for path in self.directory.glob(f"{_LOCK}-*-of-*"):
            if not path.name.endswith(f"-of-{shares}"):
                _lock(path).close()
        return _lock(self.directory / f"{_LOCK}-{share}-of-{shares}")

    def _remove_leftovers(self) -> None:
        """What a killed run left of this shard: temporary files, and parts that do not count."""
        own = re.escape(self._prefix) + r"\d{5,}\."
        temporary = re.compile(rf"\.({own}|{re.escape(RUN_NAME)}).*\.tmp")
        arrays = re.compile(own + "safetensors")
        for entry in list(self.directory.iterdir()):
            uncounted = arrays.fullmatch(entry.name) and not entry.with_suffix(".jsonl").exists()
            if uncounted or temporary.fullmatch(entry.name):
                entry.unlink()


def load_attributions(path: str | Path, *, partial: bool = False) -> list[Attribution]:
    """Results from a directory that `attribute` streamed to, by index, or from one saved file.

    partial: take a directory that lacks pairs, too. The place in the list is then not the pair's
        index; `iter_attributions` gives both.

    Raises FileNotFoundError, and ValueError where pairs are missing or a file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return [Attribution.load(path)]
    stored = dict(iter_attributions(path))
    missing = sorted(set(range(max(stored, default=-1) + 1)) - stored.keys())
    if missing and not partial:
        raise ValueError(
            f"{path} holds {len(stored)} pairs, without {_some(missing)}: run it again to go on "
            "where it stopped, or load what is there with partial=True"
        )
    return [stored[index] for index in sorted(stored)]


def iter_attributions(
    directory: str | Path, indices: Collection[int] | None = None
) -> Iterator[tuple[int, Attribution]]:
    """(index, attribution) of each stored pair, in the order of storing, one part in memory.

    indices: only these; parts without any of them are not read.

    Raises FileNotFoundError, and ValueError naming indices that are not stored or a damaged file.
    """
    directory = Path(directory)
    parts = _open(directory)
    wanted = None if indices is None else set(indices)
    if wanted is not None:
        parts = [part for part in parts if not wanted.isdisjoint(part.indices)]
        missing = wanted - {index for part in parts for index in part.indices}
        if missing:
            raise ValueError(f"{directory} does not hold the pairs {_some(sorted(missing))}")
    for part in parts:
        for index, attribution in part.load():
            if wanted is None or index in wanted:
                yield index, attribution


def stored_indices(directory: str | Path) -> list[int]:
    """The indices of the stored pairs, rising. Raises as `iter_attributions`."""
    return sorted(index for part in _open(Path(directory)) for index in part.indices)


def summarize(directory: str | Path) -> dict[str, Any]:
    """What a directory holds, from the parts' heads alone: quick for any number of pairs.

    ``pairs``, ``parts``, ``not_converged`` (a count), ``share_not_converged``, and
    ``evaluations_per_pair``; the last two are None where nothing is stored yet. Raises as
    `iter_attributions`.
    """
    parts = _open(Path(directory))
    pairs = sum(len(part.indices) for part in parts)
    not_converged = sum(part.not_converged for part in parts)
    evaluations = sum(part.evaluations for part in parts)
    return {
        "pairs": pairs,
        "parts": len(parts),
        "not_converged": not_converged,
        "share_not_converged": not_converged / pairs if pairs else None,
        "evaluations_per_pair": evaluations / pairs if pairs else None,
    }


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A part that counts, and what its head says."""

    lines: Path
    prefix: str
    number: int
    indices: Sequence[int]
    evaluations: int
    not_converged: int

    def load(self) -> list[tuple[int, Attribution]]:
        arrays, _ = records.read_arrays(self.lines.with_suffix(".safetensors"))
        # Not splitlines(): JSON may hold other line separators inside its texts.
        content = self.lines.read_bytes()
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        try:
            return records.unpack(arrays, lines)
        except ValueError as error:
            raise ValueError(f"{self.lines} and its .safetensors are damaged: {error}") from error


def _open(directory: Path) -> list[_Part]:
    _read_run(directory / RUN_NAME)
    return _parts(directory)


def _parts(directory: Path) -> list[_Part]:
    """The parts that count, by name. Raises ValueError where two hold the same pair."""
    parts = []
    homes: dict[int, Path] = {}
    for path in sorted(directory.glob("part-*.jsonl")):
        match = _PART.fullmatch(path.name)
        if match is None:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        part = _read_head(path, match[1], int(match[2]))
        for index in part.indices:
            if index in homes:
                raise ValueError(f"pair {index} is in {homes[index]} and in {path}: remove one")
            homes[index] = path
        parts.append(part)
    return parts


def _read_head(path: Path, prefix: str, number: int) -> _Part:
    arrays_path = path.with_suffix(".safetensors")
    try:
        head, _ = records.read_arrays(arrays_path, _HEAD)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} lacks its {arrays_path.name}: remove it, and the run computes its pairs again"
        ) from error
    indices, evaluations, converged = (head[name] for name in _HEAD)
    if len(indices) and indices.min() < 0:
        raise ValueError(f"{arrays_path} holds the negative index {indices.min()}")
    return _Part(
        path,
        prefix,
        number,
        indices.tolist(),
        sum(evaluations.tolist()),
        int((~converged).sum()),
    )


# --- the run --------------------------------------------------------------------------------------


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {RUN_NAME} in {path.parent}: not a directory of attributions")
    try:
        content = records.read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = {name: content.get(name) for name in _FORMAT} if isinstance(content, dict) else None
    if found != _FORMAT or not isinstance(content.get("run"), dict):
        raise ValueError(
            f"{path} does not describe attributions of this version: expected {_FORMAT} and a "
            f"`run`, got {found}"
        )
    return dict(content["run"])


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs, in words: "method is "adaptive" there and "occlusion" here"."""
    stored, asked = _flat(there), _flat(here)
    return [
        f"{name} is {stored.get(name, 'not set')} there and {asked.get(name, 'not set')} here"
        for name in dict.fromkeys([*stored, *asked])
        if stored.get(name) != asked.get(name)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(inner, ensure_ascii=False)
    return flat


def _some(values: Iterable[Any], limit: int = 5) -> str:
    values = list(values)
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


# --- locks ----------------------------------------------------------------------------------------


def _lock(path: Path, *, wait: bool = False) -> TextIO:
    """The locked file; closing it, or the end of the process however it comes, unlocks.

    Raises RuntimeError where another process holds it, OSError where the file system has no locks.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise RuntimeError(
            f"{path.parent} is being written by {holder or 'another process'} (it holds "
            f"{path.name}): wait for it, or give each process its own shard"
        ) from error
    except OSError as error:
        file.close()
        raise OSError(
            f"cannot lock {path}: {error}. Use a directory on a file system that has locks"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
