"""A directory of results: parts count wholly or not at all, whatever ends the process."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grains_ext.attribution import (
    Attribution,
    AttributionStore,
    iter_attributions,
    load_attributions,
    stored_indices,
    summarize,
)
from tests.attributions import attribution, bits
from tests.test_attribution_result import image_grid

RUN = {"model": "tiny", "settings": {"method": "adaptive", "tolerance": 0.05}, "pairs": "ab12"}


def pair(index: int, **changes: Any) -> tuple[int, Attribution]:
    """Pair ``index`` with an image, and a line separator that JSON does not escape."""
    it = attribution(
        ("<bos>", "<image>", "<image>", f"word {index}", "a\nb\u2028c"),
        [index, 0.1, -1e-8, 3.0, 1 / 3],
        modality=("text", "image", "image", "text", "text"),
        images=(image_grid(),),
        **changes,
    )
    return index, it


def assert_holds(directory: Path, indices: list[int]) -> None:
    assert sorted(index for index, _ in iter_attributions(directory)) == indices
    for index, it in zip(indices, load_attributions(directory, partial=True), strict=True):
        assert bits(it) == bits(pair(index)[1])


def test_results_come_back_by_index_bit_for_bit(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "results"
    with AttributionStore(directory, RUN) as store:
        assert store.done == frozenset()
        store.append([pair(3), pair(0)])
        store.append([])
        store.append([pair(2), pair(1)])
        assert store.done == {0, 1, 2, 3}
        assert [bits(it) for it in store.load()] == [bits(pair(i)[1]) for i in range(4)]
        assert [bits(it) for it in store.load([2, 0])] == [bits(pair(i)[1]) for i in (2, 0)]
        with pytest.raises(ValueError, match="does not hold the pairs 7"):
            store.load([0, 7])
    assert_holds(directory, [0, 1, 2, 3])
    assert [index for index, _ in iter_attributions(directory)] == [3, 0, 2, 1]
    assert [index for index, _ in iter_attributions(directory, [1, 3])] == [3, 1]
    assert stored_indices(directory) == [0, 1, 2, 3]


def test_a_part_is_readable_lines_of_json(tmp_path: Path) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0), pair(1, f_input=float("nan"), prompt="naïve ü")])
    text = (tmp_path / "part-00000.jsonl").read_text(encoding="utf-8")
    first, second = map(json.loads, text.removesuffix("\n").split("\n"))
    assert first["index"] == 0
    assert first["pair_id"] == "p-0"
    assert first["tokens"][3] == "word 0"
    assert first["scores"] == [0.0, 0.1, -1e-8, 3.0, 0.33333334]
    assert first["images"] == [{"token_positions": [1, 2], "size": [40, 20]}]
    assert second["f_input"] is None
    assert "naïve ü" in text
    stored = load_file(tmp_path / "part-00000.safetensors")
    assert stored["scores"].dtype == np.float32
    assert stored["boxes"].shape == (4, 4)
    run = json.loads((tmp_path / "attributions.json").read_text())
    assert run["run"] == RUN


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0), pair(2)])
    with AttributionStore(tmp_path, RUN) as store:
        assert store.done == {0, 2}
        store.append([pair(1)])
    assert_holds(tmp_path, [0, 1, 2])


def test_missing_pairs_are_named_unless_a_part_is_asked_for(tmp_path: Path) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0), pair(3)])
    with pytest.raises(ValueError, match="without 1, 2"):
        load_attributions(tmp_path)
    assert len(load_attributions(tmp_path, partial=True)) == 2


def test_indices_must_be_new(tmp_path: Path) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0)])
        for wrong in ([pair(0)], [pair(1), pair(1)], [(-1, pair(1)[1])]):
            with pytest.raises(ValueError, match="must be new, different and not negative"):
                store.append(wrong)
    assert_holds(tmp_path, [0])
    with pytest.raises(ValueError, match="closed"):
        store.append([pair(1)])


def test_summary_counts_without_reading_the_lines(tmp_path: Path) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        assert store.summary()["evaluations_per_pair"] is None
        store.append([pair(0, evaluations=10), pair(1, evaluations=30, converged=False)])
        store.append([pair(2, evaluations=20), pair(3, evaluations=20)])
        for path in tmp_path.glob("*.jsonl"):
            path.write_text("not read")
        assert (
            summarize(tmp_path)
            == store.summary()
            == {
                "pairs": 4,
                "parts": 2,
                "not_converged": 1,
                "share_not_converged": 0.25,
                "evaluations_per_pair": 20.0,
            }
        )


# --- another run's directory ----------------------------------------------------------------------


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    AttributionStore(tmp_path, RUN).close()
    other = {"model": "tiny", "settings": {"method": "occlusion"}, "pairs": "ab12", "seed": 1}
    with pytest.raises(ValueError, match="holds another run") as error:
        AttributionStore(tmp_path, other)
    message = str(error.value)
    assert 'settings.method is "adaptive" there and "occlusion" here' in message
    assert "settings.tolerance is 0.05 there and not set here" in message
    assert "seed is not set there and 1 here" in message
    assert "pairs" not in message
    # Tuples and lists are the same JSON.
    AttributionStore(tmp_path / "t", {"span": (1, 2)}).close()
    AttributionStore(tmp_path / "t", {"span": [1, 2]}).close()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"other files \(thesis\.tex\)"):
        AttributionStore(tmp_path, RUN)
    with pytest.raises(NotADirectoryError, match="is a file"):
        AttributionStore(tmp_path / "thesis.tex", RUN)
    for read in (summarize, load_attributions, lambda path: list(iter_attributions(path))):
        with pytest.raises(FileNotFoundError, match="not a directory of attributions"):
            read(tmp_path)


# --- several writers ------------------------------------------------------------------------------


def test_shards_write_into_one_directory_at_the_same_time(tmp_path: Path) -> None:
    with (
        AttributionStore(tmp_path, RUN, shard=(1, 2)) as first,
        AttributionStore(tmp_path, RUN, shard=(2, 2)) as second,
    ):
        first.append([pair(0)])
        second.append([pair(1)])
        first.append([pair(2)])
    names = {path.name for path in tmp_path.glob("part-*.jsonl")}
    assert names == {
        "part-1-of-2-00000.jsonl",
        "part-1-of-2-00001.jsonl",
        "part-2-of-2-00000.jsonl",
    }
    assert_holds(tmp_path, [0, 1, 2])
    # What shards have left over, a single process may finish.
    with AttributionStore(tmp_path, RUN) as store:
        assert store.done == {0, 1, 2}
        store.append([pair(3)])
    assert_holds(tmp_path, [0, 1, 2, 3])


@pytest.mark.parametrize("other", [(1, 2), (1, 3), (2, 4), None])
def test_a_second_writer_of_the_same_pairs_is_refused(
    tmp_path: Path, other: tuple[int, int] | None
) -> None:
    with AttributionStore(tmp_path, RUN, shard=(1, 2)):
        with pytest.raises(RuntimeError, match=f"is being written by process {os.getpid()} on"):
            AttributionStore(tmp_path, RUN, shard=other)
        AttributionStore(tmp_path, RUN, shard=(2, 2)).close()
    AttributionStore(tmp_path, RUN, shard=other).close()


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_a_shard_that_cannot_be_is_refused(tmp_path: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shard must be"):
        AttributionStore(tmp_path, RUN, shard=shard)


# --- failures and kills ---------------------------------------------------------------------------


def child(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked process that ends with no cleanup at all; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    return process


def die_at(function: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the ``call``-th call of os.``function`` the end of this process."""
    original = getattr(os, function)
    left = [call]

    def wrapped(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    monkeypatch.setattr(os, function, wrapped)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", range(1, 13))
def test_a_kill_at_any_step_leaves_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    def work() -> None:
        die_at(function, call, monkeypatch)
        with AttributionStore(tmp_path, RUN) as store:
            store.append([pair(0), pair(1)])
            store.append([pair(2), pair(3)])

    os.waitpid(child(work), 0)
    with AttributionStore(tmp_path, RUN) as store:
        done = sorted(store.done)
        assert done in ([], [0, 1], [0, 1, 2, 3])
        leftovers = [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"]
        assert leftovers == []
        assert len(list(tmp_path.glob("part-*"))) == len(done)
        rest = [pair(index) for index in range(4) if index not in store.done]
        store.append(rest)
    assert_holds(tmp_path, [0, 1, 2, 3])


def test_a_kill_while_parts_are_written_loses_no_stored_pair(tmp_path: Path) -> None:
    """Killed three times at whatever moment; each run goes on with new indices."""
    for _ in range(3):

        def work() -> None:
            with AttributionStore(tmp_path, RUN) as store:
                while True:
                    store.append([pair(len(store.done)), pair(len(store.done) + 1)])

        before = len(list(tmp_path.glob("part-*.jsonl")))
        process = child(work)
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("part-*.jsonl"))) < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        done = [index for index, _ in iter_attributions(tmp_path)]
        assert done == list(range(len(done)))
        assert len(done) >= 2 * (before + 3)
    assert_holds(tmp_path, done)


@pytest.mark.parametrize("failing", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_append_stores_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, call: int
) -> None:
    owner: Any = Path if failing == "write_bytes" else os
    original = getattr(owner, failing)
    left = [call]

    def fail(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("disk full")
        return original(*args)

    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0)])
        with monkeypatch.context() as patch:
            patch.setattr(owner, failing, fail)
            with pytest.raises(OSError, match="disk full"):
                store.append([pair(1), pair(2)])
        assert store.done == {0}
        assert_holds(tmp_path, [0])
        store.append([pair(1), pair(2)])
    assert_holds(tmp_path, [0, 1, 2])


def test_what_belongs_to_nobody_is_not_removed(tmp_path: Path) -> None:
    AttributionStore(tmp_path, RUN).close()
    kept = ["notes.txt", ".part-1-of-2-00000.jsonl.77.tmp", "part-1-of-2-00000.safetensors"]
    for name in [*kept, ".part-00000.jsonl.77.tmp", ".attributions.json.9.tmp"]:
        (tmp_path / name).write_text("")
    AttributionStore(tmp_path, RUN).close()
    names = {path.name for path in tmp_path.iterdir()}
    assert set(kept) < names
    assert not names & {".part-00000.jsonl.77.tmp", ".attributions.json.9.tmp"}


# --- files that are not right ---------------------------------------------------------------------


def rewrite(path: Path, **arrays: Any) -> None:
    metadata = {"format": "grains.attribution", "version": "1"}
    save_file({**load_file(path), **arrays}, path, metadata)


def lines_of(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "part-00000.safetensors").unlink(), r"part-00000\.jsonl lacks its part"),
        (lambda d: (d / "part-00000.safetensors").write_bytes(b"x"), "not a valid safetensors"),
        (
            lambda d: rewrite(d / "part-00000.safetensors", index=np.array([0, -1])),
            r"part-00000\.safetensors holds the negative index -1",
        ),
        (
            lambda d: rewrite(d / "part-00000.safetensors", index=np.array([0, 2])),
            r"pair 2 is in .*part-00000\.jsonl and in .*part-00001\.jsonl",
        ),
        (
            lambda d: rewrite(d / "part-00000.safetensors", index=np.array([0, 0])),
            r"pair 0 is in .*part-00000\.jsonl and in .*part-00000\.jsonl",
        ),
        (
            lambda d: rewrite(d / "part-00000.safetensors", index=np.array([0, 9])),
            "line 2: its index is 1, the arrays say 9",
        ),
        (
            lambda d: rewrite(d / "part-00000.safetensors", index=np.array([0.0, np.nan])),
            "`index` must be int64",
        ),
        (lambda d: lines_of(d / "part-00000.jsonl", lambda lines: lines[:1]), "for 1 lines"),
        (lambda d: lines_of(d / "part-00000.jsonl", lambda _: []), "for 0 lines"),
        (lambda d: lines_of(d / "part-00000.jsonl", lambda x: [*x[:-1], x[-1][:50]]), "line 2"),
        (lambda d: (d / "part-00000.jsonl").write_bytes(b"\xff\n{}\n"), "line 1: not valid JSON"),
        (lambda d: (d / "attributions.json").write_text('{"run": NaN}'), "NaN is no JSON number"),
        (lambda d: (d / "attributions.json").write_text("[]"), "does not describe"),
        (
            lambda d: (d / "attributions.json").write_text('{"version": 2, "run": {}}'),
            "this version",
        ),
    ],
)
def test_a_damaged_directory_is_refused_by_file(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    with AttributionStore(tmp_path, RUN) as store:
        store.append([pair(0), pair(1)])
        store.append([pair(2)])
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_attributions(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_part_that_is_no_file_is_refused(tmp_path: Path) -> None:
    AttributionStore(tmp_path, RUN).close()
    os.mkfifo(tmp_path / "part-00000.jsonl")
    with pytest.raises(ValueError, match=r"part-00000\.jsonl is not a file"):
        load_attributions(tmp_path)


def test_names_inside_the_files_are_no_paths(tmp_path: Path) -> None:
    """A run that names files elsewhere changes nothing there."""
    directory = tmp_path / "results"
    run = {"../../outside": "../outside", "part": "/etc/passwd"}
    with AttributionStore(directory, run) as store:
        store.append([pair(0, pair_id="../../outside", prompt="/etc/passwd")])
    (directory / "part-..-00000.jsonl").write_text("ignored: not a part's name")
    assert load_attributions(directory)[0].pair_id == "../../outside"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
