"""Checks behind modules that were compiled in place, whose own hooks are part of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class CompiledInPlace:
    """Stands in for what ``module.compile()`` made, and calls checks after it.

    Made by `watch`. The last check that is removed puts back what was there.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
        self._checks: list[Callable[[], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._compiled(*args, **kwargs)
        for check in self._checks:
            check()
        return output

    @classmethod
    def watch(cls, module: nn.Module, check: Callable[[], None]) -> Watch:
        """Calls ``check`` after each call of the module's graph, until the watch is removed."""
        standing = module._compiled_call_impl
        if not isinstance(standing, cls):
            standing = cls(module)
            module._compiled_call_impl = standing
        standing._checks.append(check)
        return Watch(standing, check)

    def drop(self, check: Callable[[], None]) -> None:
        self._checks.remove(check)
        if not self._checks and self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = self._compiled


class Watch:
    """One check, which can be removed as a hook can."""

    def __init__(self, watched: CompiledInPlace, check: Callable[[], None]) -> None:
        self._watched, self._check = watched, check

    def remove(self) -> None:
        self._watched.drop(self._check)
