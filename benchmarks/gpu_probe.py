"""Whether this Python can run what benchmarks/gpu.sh runs: one line for that script.

    python -m benchmarks.gpu_probe           # what it is; exit code 0: a GPU, 2: none, 1: unfit
    python -m benchmarks.gpu_probe missing   # the requirements that it lacks, one per line

Written for any Python 3, since it says which are too old.
"""

import re
import shutil
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
TEST_TOOLS = {"hypothesis", "pillow", "pytest", "pytest-timeout"}
NOT_NEEDED = {"wheel"}  # nothing is packed


def numbers(version):  # type: ignore[no-untyped-def]
    """The first three numbers of a version, for comparing."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def first_line(error):  # type: ignore[no-untyped-def]
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def fitness():  # type: ignore[no-untyped-def]
    """The exit code, and a line: why not, or the GPU's name, its capability and the torch."""
    if sys.version_info < OLDEST_PYTHON:
        return 1, "Python {}.{} is too old".format(*sys.version_info)
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return 1, f"torch cannot be imported: {first_line(error)}"
    version = torch.__version__
    if numbers(version)[:2] < OLDEST_TORCH:
        return 1, f"torch {version} is too old"
    if torch.version.cuda is None:
        return 2, f"torch {version} has no CUDA"
    try:
        major, minor = torch.cuda.get_device_capability(0)
        name = torch.cuda.get_device_name(0)
        torch.zeros(1, device="cuda")
    except Exception as error:
        return 2, f"torch {version} sees no GPU: {first_line(error)}"
    return 0, f"{name}\t{major}{minor}\t{version}"


def requirements():  # type: ignore[no-untyped-def]
    """What pyproject.toml asks for to build and run the package, and the tools of its tests."""
    import tomllib

    document = tomllib.loads(Path("pyproject.toml").read_text())
    project = document["project"]
    yield from document["build-system"]["requires"]
    yield from project["dependencies"]
    for requirement in project["optional-dependencies"]["dev"]:
        if name_of(requirement) in TEST_TOOLS:
            yield requirement


def name_of(requirement):  # type: ignore[no-untyped-def]
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def is_met(requirement):  # type: ignore[no-untyped-def]
    from importlib import metadata

    name = name_of(requirement)
    bound = re.search(r">=\s*([0-9.]+)", requirement)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return name in ("cmake", "ninja") and shutil.which(name) is not None
    return bound is None or numbers(found) >= numbers(bound.group(1))


if __name__ == "__main__":
    if sys.argv[1:] == ["missing"]:
        for wanted in requirements():
            if name_of(wanted) not in NOT_NEEDED and not is_met(wanted):
                print(wanted)
    else:
        code, line = fitness()
        print(line)
        sys.exit(code)
