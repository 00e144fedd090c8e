"""Settings that hold for every test: one thread, fixed seeds, fixed hypothesis examples."""

import gc
import os

import pytest
import torch
from hypothesis import settings

# What is imported stays: by default the collector goes through all of it again and again.
gc.set_threshold(50_000, 20, 20)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("grains", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("grains")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes none waits long for the last one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one of the tests' processes makes there, the others find."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(pytestconfig, "workerinput") else base
    os.environ["GRAINS_TESTS_SHARED"] = str(shared)
