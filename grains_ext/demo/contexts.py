"""What both demos run in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from transformers.utils import logging as hf_logging


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: for half a million parameters a second one costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without transformers' progress bars: they would flash for models this small."""
    showed_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed_bars:
            hf_logging.enable_progress_bar()


@contextmanager
def step(console: Console, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Says what is going on while it does, and notes under ``name`` how long it took."""
    start = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    seconds[name] = round(time.perf_counter() - start, 2)
