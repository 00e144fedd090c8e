"""The sweep of the CUDA kernels, a CPU in the GPU's place: what it runs, sums up and writes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import kernels, kernels_cuda
from grains_ext.timing import Measurement, Spread


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose graphs run once, when they are captured. Returns the choices of `stay`."""

    @contextlib.contextmanager
    def nothing(*_: object) -> Iterator[None]:
        yield

    class Graph:
        def replay(self) -> None:
            pass

    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": object,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda: SimpleNamespace(L2_cache_size=1 << 10),
        "graph": nothing,
        "stream": nothing,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(kernels_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(kernels_cuda, "LARGE", ((8, 64), (16, 32)))
    monkeypatch.setattr(kernels_cuda, "ROW", (1, 64))
    monkeypatch.setattr(kernels_cuda, "TURN_SECONDS", 1e-6)
    monkeypatch.setattr(
        kernels_cuda.importlib.util, "find_spec", lambda name: True if name == "triton" else None
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    chosen: list[str] = []
    monkeypatch.setattr(kernels_cuda, "_set_stay", chosen.append)
    return chosen


def test_every_shape_is_measured_and_written(stays: list[str], tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    console = Console(width=150, record=True)
    kernels.on_cuda(console, 2, output)
    *rows, goals, not_measured = json.loads(output.read_text())["rows"]
    names: dict[tuple[int, int], set[str]] = {}
    for row in rows:
        names.setdefault((row["rows"], row["dim"]), set()).add(row["result"]["name"])
    both = {"copy_", "steer_add_normalize_", "skip_steer_rms_norm"}
    assert names.keys() == {(8, 64), (16, 32), (1, 64)}
    assert all(both < found for found in names.values())
    assert "empty kernel" in names[1, 64]
    assert "steer_add_normalize_, blocks stay" in names[8, 64]
    assert "torch.compile add-RMSNorm, unsteered" in names[8, 64]
    assert {"never", "always"} < set(stays)
    assert stays[-1] == "auto"
    # Three of each large shape, and one of the row.
    assert len(goals["goals"]) == 7
    assert any("flashinfer" in what for what in not_measured["not_measured"])
    assert "share of the bandwidth of copy_" in console.export_text()


def test_what_others_bring_may_fail(stays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no compiler\nsee the log")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    for results, left_out in kernels_cuda.measure(2):
        assert {result.measurement.name for result in results} > {"copy_", "skip_steer_rms_norm"}
        assert any(what.endswith("no compiler") for what in left_out)
    monkeypatch.setattr(torch.ops.grains.skip_steer_rms_norm, "default", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        list(kernels_cuda.measure(2))


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert kernels_cuda._copies(2048, 4096) == 13  # of 16 MiB
    assert kernels_cuda._copies(8192, 8192) == 2
    assert kernels_cuda._copies(1, 4096) == 1


def test_goals_are_of_what_was_measured() -> None:
    def result(name: str, rows: int, dim: int, seconds: float, moved: int) -> kernels_cuda.Result:
        spread = Spread(seconds, seconds, seconds)
        return kernels_cuda.Result(rows, dim, Measurement(name, spread, Spread(1.2, 1, 2)), moved)

    results = [
        result("copy_", 2048, 4096, 1.0, 100),
        result("steer_add_normalize_", 2048, 4096, 1.05, 100),
        result("skip_steer_rms_norm", 2048, 4096, 2.5, 200),
        result("FlashInfer add-RMSNorm, unsteered", 2048, 4096, 2.4, 200),
        result("steer_add_normalize_", 1, 4096, 1.0, 1),
    ]
    found = {goal.what: goal for goal in kernels_cuda.goals(results)}
    assert len(found) == 4
    steer = found["steer_add_normalize_ 2048 x 4096: share of the bandwidth of copy_"]
    assert steer.reached == pytest.approx(1 / 1.05)
    assert steer.met
    assert not found["skip_steer_rms_norm 2048 x 4096: share of the bandwidth of copy_"].met
    (over,) = (goal for what, goal in found.items() if "FlashInfer" in what)
    assert over.reached == pytest.approx(2.5 / 2.4)
    assert over.met
    assert found["steer_add_normalize_, one row: time over empty kernel"].met
    assert kernels_cuda.goals([]) == []
