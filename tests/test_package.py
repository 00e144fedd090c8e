"""What ``import grains_ext`` promises before anything else is used."""

import subprocess
import sys

import pytest

import grains_ext


@pytest.mark.parametrize("name", grains_ext.__all__)
def test_public_name_is_importable_and_documented(name: str) -> None:
    assert getattr(grains_ext, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = grains_ext.no_such_name


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, grains_ext, grains_ext.cli;"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed.strip() == "[]"
