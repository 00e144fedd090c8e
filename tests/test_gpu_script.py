"""benchmarks/gpu.sh on machines that lack something: it says what, and its exit code tells."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_probe

ROOT = Path(__file__).resolve().parents[1]
BASICS = (
    *("bash", "cat", "column", "cp", "cut", "dirname", "grep", "head", "mktemp", "rm", "sleep"),
    *("tail", "tee", "timeout", "touch", "tr"),
)


class Machine:
    """A copy of the script, and a PATH with the shell's tools and those that are pretended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "bin"
        self.tools.mkdir()
        for name in BASICS:
            found = shutil.which(name)
            if found is None:
                pytest.skip(f"{name} is not installed")
            (self.tools / name).symlink_to(found)
        self.script = folder / "repository" / "benchmarks" / "gpu.sh"
        self.script.parent.mkdir(parents=True)
        for name in ("gpu.sh", "gpu_report.py"):
            shutil.copy(ROOT / "benchmarks" / name, self.script.parent)

    def pretend(self, name: str, body: str = "true") -> None:
        path = self.tools / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def pretend_gpu(self) -> None:
        self.pretend(
            "nvidia-smi",
            'case "$*" in *name*) echo "NVIDIA Test 9";; *compute_cap*) echo 9.0;; esac',
        )

    def pretend_python(self, **answers: str) -> None:
        """Whose torch sees the GPU, and which can do everything. `answers`: what it does instead,
        by a word of its command."""
        known = {
            "gpu_report": f'exec {sys.executable} "$@"',
            "missing": "exit 0",
            "gpu_probe": "printf 'NVIDIA Test 9\\t90\\t2.13.0\\n'",
            "setup.py": "true",
            "venv": "true",
            "-m pytest": 'echo "12 passed"',
        }
        cases = [f'*"{word}"*) {body};;' for word, body in (known | answers).items()]
        self.pretend("python3", f'case "$*" in {" ".join(cases)} esac')

    def start(self) -> subprocess.Popen[str]:
        # Neither CUDA_HOME nor HOME: what is installed in the usual place is found all the same.
        environment = {"PATH": str(self.tools), "RESULTS": str(self.folder / "results")}
        return subprocess.Popen(
            [str(self.tools / "bash"), str(self.script)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> tuple[int, str]:
        process = self.start()
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def report(self) -> dict:
        files = sorted((self.folder / "results").iterdir())
        assert [path.suffix for path in files] == [".json", ".log"]
        assert files[0].name.startswith("nvidia-test-9-")
        return json.loads(files[0].read_text())

    def states(self) -> dict[str, str]:
        return {step["step"]: step["state"] for step in self.report()["steps"]}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def complete(machine: Machine) -> Machine:
    """Everything is there, and all steps pass."""
    machine.pretend_gpu()
    machine.pretend_python()
    machine.pretend("nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    machine.pretend("cmake")
    machine.pretend("compute-sanitizer")
    return machine


ALL_PASSED = {
    "build": "passed",
    "tests": "passed",
    "kernels": "passed",
    "build cuda_check": "passed",
    **dict.fromkeys(("memcheck", "racecheck", "initcheck", "synccheck"), "passed"),
}


def test_without_a_gpu_it_says_so_and_measures_nothing(machine: Machine) -> None:
    code, output = machine.run()
    assert code == 3, output
    assert "nvidia-smi lists no GPU" in output
    assert not (machine.folder / "results").exists()


def test_everything_runs_and_passes(complete: Machine) -> None:
    code, output = complete.run()
    assert code == 0, output
    assert complete.states() == ALL_PASSED
    machine = complete.report()["machine"]
    assert machine["nvcc"] == "13.0"
    details = {step["step"]: step["detail"] for step in complete.report()["steps"]}
    assert details["tests"] == "12 passed"


@pytest.mark.slow
def test_a_missing_sanitizer_is_left_out(complete: Machine) -> None:
    (complete.tools / "compute-sanitizer").unlink()
    if "compute-sanitizer: left out" not in complete.run()[1]:
        pytest.skip("there is one in /usr/local/cuda")
    states = complete.states()
    assert {states[step] for step in ("build", "tests", "kernels")} == {"passed"}


@pytest.mark.slow
def test_a_finding_of_the_sanitizer_fails(complete: Machine) -> None:
    complete.pretend("compute-sanitizer", 'case "$*" in *racecheck*) exit 9;; esac')
    code, output = complete.run()
    assert code == 1, output
    assert complete.states() == ALL_PASSED | {"racecheck": "failed"}


@pytest.mark.slow
def test_a_sanitizer_that_does_not_run_on_this_machine_is_left_out(complete: Machine) -> None:
    complete.pretend("compute-sanitizer", "echo '==== Error: Device not supported.'; exit 1")
    code, output = complete.run()
    assert code == 3, output
    assert complete.states()["memcheck"] == "left out"


@pytest.mark.slow
def test_a_build_that_fails_leaves_a_report_and_the_sanitizer(complete: Machine) -> None:
    complete.pretend_python(**{"setup.py": "echo 'no pybind11'; exit 1"})
    code, output = complete.run()
    assert code == 1, output
    states = complete.states()
    assert states["build"] == "failed"
    assert states["memcheck"] == "passed"
    assert "tests" not in states
    assert complete.report()["steps"][0]["detail"] == "exit code 1: no pybind11"


@pytest.mark.slow
def test_packages_that_cannot_be_fetched_are_left_out(complete: Machine) -> None:
    complete.pretend_python(
        missing="echo 'pybind11>=3.0'", venv="echo 'No module named venv'; exit 1"
    )
    code, output = complete.run()
    assert code == 3, output
    assert "missing: pybind11>=3.0" in output
    assert complete.states() == {"packages": "left out", **ALL_PASSED}


@pytest.mark.slow
def test_a_torch_that_sees_no_gpu(complete: Machine) -> None:
    complete.pretend_python(gpu_probe="echo 'torch 2.13.0+cpu has no CUDA'; exit 2")
    code, output = complete.run()
    assert code == 3, output
    assert "torch 2.13.0+cpu has no CUDA" in output
    left_out = {"tests": "left out", "kernels": "left out"}
    assert complete.states() == ALL_PASSED | left_out


@pytest.mark.slow
def test_without_torch_and_network_the_sanitizer_runs(complete: Machine) -> None:
    complete.pretend_python(gpu_probe="echo 'torch cannot be imported'; exit 1")
    complete.pretend("make", "echo 'ERROR: Could not find a version of torch'; exit 2")
    code, output = complete.run()
    assert code == 3, output
    states = complete.states()
    assert states["make setup"] == states["Python"] == "left out"
    assert states["configure cuda_check"] == states["memcheck"] == "passed"


@pytest.mark.slow
def test_stopped_from_outside_it_leaves_what_it_has(complete: Machine) -> None:
    complete.pretend_python(**{"-m pytest": "touch started; exec sleep 60"})
    process = complete.start()
    deadline = time.monotonic() + 30
    while not (complete.script.parents[1] / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert complete.states() == {"build": "passed", "gpu.sh": "failed"}


def test_requirements_are_compared_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert gpu_probe.is_met("pytest")
    assert gpu_probe.is_met("pytest>=1.0")
    assert not gpu_probe.is_met("pytest>=1000")
    assert not gpu_probe.is_met("no-such-package-of-that-name")
    names = {gpu_probe.name_of(wanted) for wanted in gpu_probe.requirements()}
    assert {"torch", "pybind11", "rich", "pytest-timeout"} <= names
    assert "selenium" not in names
