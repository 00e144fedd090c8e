"""What an installed wheel must do, run by `make wheel` in an environment that has nothing else.

Run from outside the repository: python -P tests/wheel_smoke.py
"""

import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch

import grains_ext
from grains_ext import export, ops, reference
from grains_ext.demo.train import MODEL_DIR
from grains_ext.demo.vision_world import MODEL_DIR as VISION_MODEL_DIR


def command(*arguments: str) -> str:
    """Standard output of the installed `grains`."""
    script = Path(sys.executable).with_name("grains")
    return subprocess.run(
        [script, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    package = Path(grains_ext.__file__).parent
    assert "site-packages" in package.parts, f"this is not the wheel: {package}"
    assert importlib.metadata.version("grains_ext") == grains_ext.__version__

    torch.manual_seed(0)
    hidden, vector, strength = torch.randn(3, 64), torch.randn(64), torch.tensor(2.0)
    steered = torch.ops.grains.steer_add_normalize(hidden, vector, strength)
    torch.testing.assert_close(steered, reference.steer_add_normalize(hidden, vector, strength))
    torch.testing.assert_close(steered, ops.steer_add_normalize(hidden, vector, strength))

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(export.ort_library_path()))

    for name in ("py.typed", "_C.pyi", "report/templates/page.html.j2"):
        assert importlib.resources.files("grains_ext").joinpath(name).is_file(), name
    for folder in (MODEL_DIR, VISION_MODEL_DIR):
        assert (folder / "model.safetensors").is_file(), folder

    facts = json.loads(command("info", "--json"))
    assert facts["cpu"]["instruction_set"] in facts["cpu"]["supported"]
    subprocess.run([sys.executable, "-m", "grains_ext", "--help"], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        result = json.loads(command("demo", "--quick", "--json", "-o", folder))
        assert (Path(folder) / "report.html").is_file()
    print(f"the wheel works: {facts['packages']}\ndemo: {json.dumps(result)[:400]} ...")


if __name__ == "__main__":
    main()
