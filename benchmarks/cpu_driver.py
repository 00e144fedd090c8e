"""The CPU kernels as a program of their own (csrc/testing/cpu_driver.cpp): built, and asked.

Natively it counts instructions and times the kernels with no Python around them; built for 64-bit
Arm it runs under qemu-user. It needs cmake and ninja, but neither torch nor Python's headers.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    "steer_add_normalize",
    "steer_add_normalize_",
    "skip_steer_rms_norm",
    "skip_steer_layer_norm",
    "ig_interpolate",
    "ig_accumulate",
)
DECODER_OPS = (
    "rms_norm",
    "rms_norm_backward",
    "gated_activation",
    "gated_activation_backward",
    "rotary",
    "attention",
    "attention_backward",
)
"""What is between a decoder's matrix products: counted and timed only."""
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


_ALONE = ["-DGRAINS_DRIVER_ONLY=ON", "-DGRAINS_CUDA=OFF"]


class MissingToolError(RuntimeError):
    """What is not installed, and how to install it."""


@dataclass(frozen=True)
class Output:
    op: str
    dtype: str
    values: NDArray[Any]
    """[rows, columns]"""


@dataclass(frozen=True)
class Driver:
    command: tuple[str, ...]

    def _run(self, *arguments: object) -> bytes:
        words = [*self.command, *map(str, arguments)]
        result = subprocess.run(words, capture_output=True)
        if result.returncode != 0:
            raise RuntimeError(result.stderr.decode().strip() or f"{words} failed")
        return result.stdout

    def isas(self) -> list[str]:
        """The compiled instruction sets that this processor has, the best one last."""
        return self._run("isas").decode().split()

    def compiler(self) -> str:
        return self._run("compiler").decode().strip()

    def outputs(self, isa: str) -> list[Output]:
        """What every op makes of the same inputs, with rows of NaN, infinities and extremes."""
        data, results = self._run("outputs", isa), []
        while data:
            line, data = data.split(b"\n", 1)
            op, dtype, rows, _, size = line.decode().split()
            kind = np.float32 if op == "ig_accumulate" else DTYPES[dtype]
            values = np.frombuffer(data[: int(size)], kind).reshape(int(rows), -1)
            results.append(Output(op, dtype, values))
            data = data[int(size) :]
        return results

    def count(self, isa: str, op: str, dtype: str, rows: int, dim: int) -> int:
        """Instructions of one call on one thread. RuntimeError where ptrace is not allowed."""
        return int(self._run("count", isa, op, dtype, rows, dim))

    def times(
        self, isa: str, op: str, dtype: str, rows: int, dim: int, rounds: int
    ) -> list[tuple[float, float]]:
        """Per round, nanoseconds of CPU time: one call, and memcpy of as much memory traffic."""
        lines = self._run("time", isa, op, dtype, rows, dim, rounds).decode().splitlines()
        return [(float(op_time), float(copy)) for op_time, copy in map(str.split, lines)]


def native() -> Driver:
    """Of the kernels as setup.py compiled them, where it did."""
    package = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    cache = package / "CMakeCache.txt"
    # Not a tree that was copied here: its sources are elsewhere.
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in cache.read_text():
        return Driver((str(_build(package)),))
    return Driver((str(_build(ROOT / "build" / "cpu_driver-native", _ALONE)),))


def arm() -> Driver:
    """For 64-bit Arm, under qemu-user. MissingToolError where either is not installed."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            raise MissingToolError(
                f"{tool} is not installed: apt-get install g++-aarch64-linux-gnu qemu-user"
            )
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    # Static: the emulator then needs no Arm libraries.
    target += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    folder = ROOT / "build" / "cpu_driver-aarch64"
    return Driver((emulator, str(_build(folder, [*_ALONE, *target]))))


def _build(folder: Path, options: list[str] | None = None) -> Path:
    """The program in a build folder; options: those to configure it with, None where it is."""
    scripts = str(Path(sys.executable).parent)  # pip's cmake and ninja, activated or not
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            raise MissingToolError(f"{tool} is not installed: pip install {tool}")
    target = "grains_cpu_driver"
    commands = [["cmake", "--build", str(folder), "--target", target]]
    if options is not None:
        commands.insert(0, ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options])
    for command in commands:
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return folder / target
