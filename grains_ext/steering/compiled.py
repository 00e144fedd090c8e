"""Checks around compiled modules: whether their graphs hold the steering.

Hooks of modules that were compiled in place are part of their graphs, so checks stand around those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Reached:
    """A context for each call of something compiled: raises at the end of one that did not come by
    all the steered blocks.

    reached: by block, set by the steering, which graphs do as well, at every call. Of calls that
    overlap, in several threads, the first clears it: one may then answer for another.
    """

    def __init__(self, reached: dict[int, bool], blocks: Sequence[int]) -> None:
        self._reached, self._blocks = reached, blocks
        self._running = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._running == 0:
                self._reached.update(dict.fromkeys(self._blocks, False))
            self._running += 1

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._running -= 1
        if failed is None and not all(self._reached[block] for block in self._blocks):
            raise RuntimeError(
                "the compiled model ran without this steering: torch.compile ignores hooks "
                "that come after its first call. Steer before that call, or call "
                "torch._dynamo.reset() and then the model again, which compiles it anew"
            )


def hooked(module: nn.Module, check: Reached) -> Iterator[RemovableHandle]:
    """Has the check around each call of a module whose hooks run outside of its graph."""

    def after(module: Any, args: Any, output: Any) -> None:
        check.__exit__(RuntimeError if output is None else None)  # None: the call raised

    yield module.register_forward_pre_hook(lambda *_: check.__enter__())
    yield module.register_forward_hook(after, always_call=True)


class CompiledInPlace:
    """Stands in for what ``module.compile()`` made, and has checks around its calls.

    Made by `watch`. The last check that is removed puts back what was there.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
        self._checks: list[Reached] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside of another graph, which has a check of its own
            return self._compiled(*args, **kwargs)
        with ExitStack() as checks:
            for check in self._checks:
                checks.enter_context(check)
            return self._compiled(*args, **kwargs)

    @classmethod
    def watch(cls, module: nn.Module, check: Reached) -> Watch:
        """Has the check around each call of the module's graph, until the watch is removed."""
        standing = module._compiled_call_impl
        if not isinstance(standing, cls):
            standing = cls(module)
            module._compiled_call_impl = standing
        standing._checks.append(check)
        return Watch(standing, check)

    def drop(self, check: Reached) -> None:
        self._checks.remove(check)
        if not self._checks and self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = self._compiled


class Watch:
    """One check, which can be removed as a hook can."""

    def __init__(self, watched: CompiledInPlace, check: Reached) -> None:
        self._watched, self._check = watched, check

    def remove(self) -> None:
        self._watched.drop(self._check)
