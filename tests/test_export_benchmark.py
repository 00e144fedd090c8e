"""The benchmark of injection: its graphs are such as exporters write, and no weight is read."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from benchmarks import inject as benchmark
from grains_ext.export.inject import inject, remove_steering
from grains_ext.steering.vectors import SteeringVectors


@pytest.mark.parametrize(
    ("make", "kind"), [(benchmark.fused, "skip_norm"), (benchmark.plain, "add")]
)
def test_its_graphs_are_steered_and_restored(
    make: Callable[[], benchmark.Graph],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "BLOCKS", 3)
    graph = make()
    source, steered = tmp_path / "model.onnx", tmp_path / "steered.onnx"
    onnx.save(graph.model(), str(source))
    with (tmp_path / "weights").open("wb") as weights:
        weights.truncate(graph.size)
    vectors = SteeringVectors({block: torch.ones(benchmark.HIDDEN) for block in range(3)})
    injected = inject(source, vectors, steered)
    assert [(entry.site, entry.op_type) for entry in injected] == [(kind, "SkipSteerRmsNorm")] * 3
    remove_steering(steered, tmp_path / "restored.onnx")
    restored, before = (
        onnx.load(str(path), load_external_data=False)
        for path in (tmp_path / "restored.onnx", source)
    )
    assert restored == before
    assert (tmp_path / "weights").stat().st_blocks == 0
