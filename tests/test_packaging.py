"""What the source archive and the wheel hold, without compiling anything; types, as users see them.

`make wheel` builds both, and tries the wheel in an empty environment.
"""

import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import grains_ext

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def setup(*arguments: str) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=ROOT, check=True)


def tracked(*patterns: str) -> set[str]:
    """Files in git, symbolic links left as they are."""
    found = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(found.stdout.split())


def modules() -> set[str]:
    """Every module of the package, by its path in an installation."""
    ours = tracked("grains_ext/*.py") | {f"grains_ext/{name}" for name in tracked("export/*.py")}
    return {name for name in ours if (ROOT / name).exists()}


def data() -> set[str]:
    return tracked("grains_ext/report/templates/*", "grains_ext/demo/*model/*") | {
        "grains_ext/py.typed",
        "grains_ext/_C.pyi",
    }


def missing(expected: set[str], found: Sequence[str]) -> set[str]:
    assert len(found) == len(set(found)), "a file is there twice"
    return expected - set(found)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("git"), reason="asks git which files there are")
def test_the_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
    setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(tmp_path / f"grains_ext-{grains_ext.__version__}.tar.gz") as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    found = [member.name.partition("/")[2] for member in members if member.isfile()]
    sources = {name for name in tracked("csrc") if (ROOT / name).exists()}
    project = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    project |= {"CHANGELOG.md", "CITATION.cff"}
    assert missing(modules() | data() | sources | project, found) == set()
    assert not [name for name in found if name.endswith(".so")]
    top = {name.partition("/")[0] for name in found if "/" in name}
    assert top <= {"csrc", "grains_ext", "grains_ext.egg-info"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("git"), reason="asks git which files there are")
def test_the_wheel_holds_the_package_once_and_nothing_else(tmp_path: Path) -> None:
    setup(
        *("egg_info", "--egg-base", str(tmp_path)),
        *("build_py", "--build-lib", str(tmp_path / "lib")),
    )
    found = [
        path.relative_to(tmp_path / "lib").as_posix()
        for path in (tmp_path / "lib").rglob("*")
        if path.is_file()
    ]
    assert missing(modules() | data(), found) == set()
    # Modules that git does not know yet may be there; libraries come from the build alone.
    strangers = {name for name in found if not name.endswith(".py")} - data()
    assert strangers == set()
    assert {name.partition("/")[0] for name in found} == {"grains_ext"}


def test_every_package_is_listed() -> None:
    listed = {name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert listed == {str(Path(name).parent) for name in modules()}


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {grains_ext.__version__}\n" in citation
    assert "arXiv:2507.18043" in citation


USE = """\
from typing import assert_type

import torch

import grains_ext as grains
from grains_ext import export, ops
from grains_ext.evaluation import EvaluationReport
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("m")
tokenizer = AutoTokenizer.from_pretrained("m")
pairs = grains.load_pairs("pairs.jsonl")
assert_type(pairs, list[grains.PreferencePair])
for attribution in grains.attribute(model, tokenizer, pairs):
    assert_type(attribution, grains.Attribution)
    assert_type(attribution.converged, bool)
vectors = grains.fit(model, tokenizer, pairs, k=4)
vectors = grains.refine(model, tokenizer, pairs, vectors)
best = grains.tune(model, tokenizer, pairs, vectors, neutral_texts=["Some text."])
assert_type(best, grains.SteeringVectors)
with best.applied(model, strength=1.0) as handle:
    handle.strength = 0.5
best.save_pretrained("folder")
assert_type(grains.evaluate(model, tokenizer, pairs, vectors=best), EvaluationReport)
assert_type(export.inject("a.onnx", best, "b.onnx"), list[export.Injected])
steered = ops.steer_add_normalize(torch.zeros(2, 4), torch.ones(4), torch.tensor(1.0))
assert_type(steered, torch.Tensor)

grains.atribute(model, tokenizer, pairs)  # type: ignore[attr-defined]
best.save_pretrained(3)  # type: ignore[arg-type]
grains.SteeringVectors()  # type: ignore[call-arg]
"""


@pytest.mark.slow
def test_a_users_script_is_checked_strictly(tmp_path: Path) -> None:
    """Each ignore is for a mistake that must be found: one that is not is an error itself."""
    pytest.importorskip("mypy")
    script = tmp_path / "use.py"
    script.write_text(USE)
    # This project's own configuration and cache: what `make lint` has read is not read again.
    command = ("-m", "mypy", "--strict", "--config-file", "pyproject.toml", str(script))
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    ours = [line for line in result.stdout.splitlines() if line.startswith(str(script))]
    assert ours == [], result.stdout
    assert result.returncode in (0, 1), result.stdout + result.stderr
