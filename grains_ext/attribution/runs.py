"""A run over many pairs, whatever engine computes them: groups, streaming, warnings. No torch."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from grains_ext.attribution.result import Attribution
from grains_ext.attribution.store import AttributionStore
from grains_ext.encoding import EncodedPair, pair_name
from grains_ext.pairs import PreferencePair
from grains_ext.progress import attribution_progress

# Pairs are worked on in groups that only the pairs themselves decide, so that a run which is taken
# up again makes the same model calls. Sorted by length within a window, and enough tokens in a
# group to fill model calls (a path takes some 16 points), while an interruption loses little.
_WINDOW = 1024
_GROUP_TOKENS = {"cpu": 512, "cuda": 8192}

Finished = Callable[[int, bool], None]
"""Hears of each pair as it is done: its evaluations, and whether it has converged."""


class Run(Protocol):
    """What computes the pairs of one run."""

    pairs: Sequence[PreferencePair]

    @property
    def device(self) -> str:
        """ "cpu" or "cuda": how much it takes to fill one call."""

    def length(self, number: int) -> int:
        """About how many tokens the prompt of a pair has."""

    def attribute_group(self, group: Sequence[int], finished: Finished) -> dict[int, Attribution]:
        """The results of one group, by the number of the pair."""

    def describe(self) -> dict[str, Any]:
        """What decides the results, as plain JSON, for the directory that holds them."""


def carry_out(
    run: Run,
    *,
    output_dir: str | Path | None,
    limit: int | None,
    shard: tuple[int, int] | None,
    progress: bool,
) -> list[Attribution]:
    """The results of a run's pairs (of this limit and shard), in their order.

    With ``output_dir`` they stream to that directory, and what it holds already is not computed
    again. Pairs that did not converge are counted in a warning.
    """
    groups = _groups(run, limit, shard)
    indices = sorted(index for group in groups for index in group)
    with attribution_progress(progress, len(indices)) as meter:
        if output_dir is None:
            found: dict[int, Attribution] = {}
            for group in groups:
                found |= run.attribute_group(group, meter.count)
            results = [found[index] for index in indices]
        else:
            with AttributionStore(output_dir, run.describe(), shard=shard) as store:
                done = store.done
                for group in groups:
                    new = [index for index in group if index not in done]
                    meter.skip(len(group) - len(new))
                    if new:  # the whole group even so: other calls would round otherwise
                        results_of = run.attribute_group(group, meter.count)
                        store.append((index, results_of[index]) for index in new)
                results = store.load(indices)
    _warn_of_unconverged(results, run.pairs, indices)
    return results


def check_share(limit: int | None, shard: tuple[int, int] | None) -> None:
    """Raises ValueError for a limit or a shard that cannot be."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be (i, n) with 1 <= i <= n, got {shard}")


@contextmanager
def naming(number: int, pair: PreferencePair) -> Iterator[None]:
    """Says of which pair an error speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{pair_name(number, pair)}: {error}") from error


def hash_of_pairs(pairs: Sequence[PreferencePair], encoded: Sequence[EncodedPair | None]) -> str:
    """A fingerprint of pairs, their images' content, and their tokens, where these are known."""
    digest = hashlib.sha256()
    for pair, ids in zip(pairs, encoded, strict=True):
        images = [_hash_of_image(image) for image in pair.images or ()]
        said = [pair.prompt, pair.chosen, pair.rejected, images, pair.id]
        digest.update(json.dumps(said, default=_hash_of_image).encode())
        digest.update(repr(ids).encode())
    return digest.hexdigest()[:16]


def _hash_of_image(image: Any) -> str:
    """Of what `open_image` opens: a file's bytes, or the pixels; of anything else its type."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    digest = hashlib.sha256(type(image).__name__.encode())
    for name in ("size", "shape", "mode", "dtype"):
        digest.update(str(getattr(image, name, "")).encode())
    content = image.tobytes() if hasattr(image, "tobytes") else image
    digest.update(content if isinstance(content, bytes) else b"")
    return digest.hexdigest()


def _groups(run: Run, limit: int | None, shard: tuple[int, int] | None) -> list[list[int]]:
    """Numbers of the pairs that are worked on together; one share of these groups."""
    groups: list[list[int]] = []
    n_pairs = len(run.pairs) if limit is None else min(limit, len(run.pairs))
    for first in range(0, n_pairs, _WINDOW):
        room = 0
        window = range(first, min(first + _WINDOW, n_pairs))
        for number in sorted(window, key=lambda number: -run.length(number)):
            room -= run.length(number)
            if room < 0:
                groups.append([])
                room = _GROUP_TOKENS.get(run.device, 512) - run.length(number)
            groups[-1].append(number)
    share, shares = shard or (1, 1)
    return groups[share - 1 :: shares]


def _warn_of_unconverged(
    results: Sequence[Attribution], pairs: Sequence[PreferencePair], indices: Sequence[int]
) -> None:
    failed = [
        pair_name(index, pairs[index])
        for index, result in zip(indices, results, strict=True)
        if not result.converged
    ]
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(results)} pairs did not converge "
            f"({', '.join(failed[:5])}{', ...' if failed[5:] else ''}): see residual; take more "
            "steps, a larger tolerance or another baseline",
            stacklevel=4,
        )
