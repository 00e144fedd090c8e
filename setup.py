"""Builds the three native libraries with CMake and Ninja. Metadata lives in pyproject.toml.

Build without isolation (``pip install --no-build-isolation .``): the op library is compiled against
the headers of the torch that is installed, and an isolated build sees none.
Environment: GRAINS_CUDA=ON|OFF|AUTO, CMAKE_CUDA_ARCHITECTURES, CMAKE_BUILD_PARALLEL_LEVEL,
CMAKE_ARGS (passed on as they are).
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "grains_ext"


def torch_root() -> Path:
    """The folder of the installed torch, found without importing it: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "grains_ext: torch is not installed in the environment that builds. Install it first "
            "(pip install 'torch>=2.11'), then build with: pip install --no-build-isolation ."
        )
    return Path(spec.submodule_search_locations[0])


def pybind11_cmake_dir() -> Path:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("grains_ext: pybind11 is not installed in the environment that builds")
    return Path(spec.submodule_search_locations[0]) / "share" / "cmake" / "pybind11"


class CMakeBuild(build_ext):  # type: ignore[misc]
    """One CMake build makes all libraries; the Extension entry only tells setuptools of _C."""

    def build_extension(self, ext: Extension) -> None:
        # One folder of our own, not pip's temporary one: a rebuild then compiles what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            cache.unlink()  # of the tree that this one was copied from
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DGRAINS_OUTPUT_DIR={build / PACKAGE}",
            f"-DGRAINS_TORCH_ROOT={torch_root()}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGRAINS_CUDA={os.environ.get('GRAINS_CUDA', 'AUTO').upper()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # pip-installed cmake and ninja lie beside the interpreter, whether or not it is activated.
        scripts = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        self._copy(build / PACKAGE, Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        """In place and editable: setuptools copies _C only, the op libraries go with it."""
        super().copy_extensions_to_source()
        self._copy(Path(self.build_lib) / PACKAGE, ROOT / PACKAGE)

    def _copy(self, source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for library in sorted(source.glob("*.so")):
            self.copy_file(str(library), str(target))


setup(
    ext_modules=[Extension("grains_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
