"""The op library and the functions on the oldest onnxruntime that is supported.

It lies in a folder of its own, beside the one of the environment (the Makefile puts it there):
    pip install --target build/onnxruntime-1.20 --no-deps onnxruntime==1.20.1
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = ROOT / "build" / "onnxruntime-1.20"
# "bank" takes all of test_export_bank.py.
SMOKE = "reference or bank or inlines or subgraphs or twice or threads or promise or chain or rows"


@pytest.fixture
def environment() -> dict[str, str]:
    """Variables under which Python imports the oldest onnxruntime."""
    if not OLDEST.is_dir():
        message = f"{OLDEST} is not there; see the top of this file for the command that makes it"
        if os.environ.get("GRAINS_REQUIRE_ORT_VERSIONS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return {**os.environ, "PYTHONPATH": f"{OLDEST}{os.pathsep}{ROOT}"}


def _python(environment: dict[str, str], *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_ops_and_functions_on_the_oldest_onnxruntime(environment: dict[str, str]) -> None:
    version = _python(environment, "-c", "import onnxruntime; print(onnxruntime.__version__)")
    assert version.startswith("1.20."), version
    output = _python(
        environment,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", SMOKE),
        *("tests/test_ort_ops.py", "tests/test_ort_functions.py", "tests/test_export_bank.py"),
    )
    assert " passed" in output
    assert "skipped" not in output, output
