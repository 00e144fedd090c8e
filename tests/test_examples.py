"""The C++ example, where a compiler and onnxruntime's header are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from grains_ext import export
from tests.exports import exported_llama

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "cpp" / "steer.cpp"
PROMPT = [1, 20, 40, 60, 77]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as examples/cpp/README.md says, against the Python package's library."""
    include = Path(os.environ.get("ORT_INCLUDE_DIR", "/usr/include/onnxruntime"))
    compiler = shutil.which("c++")
    if compiler is None or not (include / "onnxruntime_cxx_api.h").is_file():
        pytest.skip(f"no onnxruntime header in {include}; set ORT_INCLUDE_DIR to its folder")
    folder = tmp_path_factory.mktemp("cpp")
    [library] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    arguments = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", include, SOURCE]
    arguments += ["libonnxruntime.so.1", "-Wl,-rpath,$ORIGIN", "-o", "steer"]
    result = subprocess.run([compiler, *arguments], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "steer"


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_it_decodes_as_python_does(program: Path, strength: float) -> None:
    folder = exported_llama().folder
    arguments = [program, folder, str(strength), "8", *map(str, PROMPT)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    overrides = {"grains.strength": np.array([strength], np.float32)}
    decoder = export.OnnxDecoder(export.session(folder / "model.onnx"), overrides=overrides)
    expected = decoder.generate(np.array([PROMPT]), max_new_tokens=8)[0].tolist()
    assert [int(line) for line in result.stdout.split()] == expected


def test_its_errors_say_what_is_wrong(program: Path, tmp_path: Path) -> None:
    result = subprocess.run([program, tmp_path, "1", "1", "1"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "libgrains_ort.so" in result.stderr
    assert subprocess.run([program], capture_output=True).returncode == 2
