"""The result file of the onnxruntime benchmark: pieces measured one by one make one table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import onnx_results


def _row(threads: int, way: str, seconds: float) -> dict[str, Any]:
    return {"threads": threads, "way": way, "result": {"seconds": seconds}}


def test_a_case_takes_the_place_of_its_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    onnx_results.add(path, [_row(1, "fused", 1.0), _row(1, "steer", 2.0)])
    onnx_results.add(path, [_row(2, "fused", 3.0)])
    onnx_results.add(path, [_row(1, "fused", 4.0)])
    assert json.loads(path.read_text())["rows"] == [
        _row(1, "steer", 2.0),
        _row(2, "fused", 3.0),
        _row(1, "fused", 4.0),
    ]


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    onnx_results.add(path, [_row(1, "fused", 1.0)])
    document = json.loads(path.read_text())
    document["environment"]["load_average"] += 1  # of the hour, not of the machine
    path.write_text(json.dumps(document))
    onnx_results.add(path, [_row(2, "fused", 1.0)])
    document["environment"]["processor"] = "another"
    before = json.dumps(document)
    path.write_text(before)
    with pytest.raises(ValueError, match=r"another machine.*give another --output"):
        onnx_results.add(path, [_row(1, "fused", 1.0)])
    assert path.read_text() == before
