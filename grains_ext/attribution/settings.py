"""Every choice that an attribution run makes, checked once and written beside its results."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor

from grains_ext.attribution.objective import OBJECTIVES, Objective
from grains_ext.attribution.rules import BASELINES, RULES
from grains_ext.attribution.span import Span, check_span

METHODS = ("adaptive", *RULES, "gradient_x_input", "smoothgrad", "occlusion")
IMAGE_BASELINES = ("mean", "blur", "zero")
MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Settings:
    """The options of `grains_ext.attribute`, which describes them.

    Raises ValueError, naming the option, for a value that none of its kind can have.
    """

    method: str = "adaptive"
    baseline: str | Tensor = "bos"
    objective: Objective = "sum"
    n_steps: int | Literal["auto"] = "auto"
    tolerance: float = 0.05
    top_k: int | None = None
    attributed_span: Span = None
    modalities: tuple[str, ...] = MODALITIES
    image_baseline: str = "mean"
    max_batch_tokens: int | Literal["auto"] = "auto"
    seed: int = 0
    separator: str | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("image_baseline", self.image_baseline, IMAGE_BASELINES)
        if not isinstance(self.baseline, Tensor):
            _one_of("baseline", self.baseline, BASELINES, " or a tensor")
        if not callable(self.objective):
            _one_of("objective", self.objective, OBJECTIVES, " or a callable")
        for name in ("n_steps", "max_batch_tokens"):
            _count(name, getattr(self, name), "auto")
        _count("top_k", self.top_k, None)
        check_span(self.attributed_span)
        if not (isinstance(self.tolerance, int | float) and self.tolerance > 0):
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if not self.modalities or not set(self.modalities) <= set(MODALITIES):
            raise ValueError(
                f"modalities must name some of {', '.join(MODALITIES)}, got {self.modalities!r}"
            )

    @property
    def objective_name(self) -> str:
        """A callable's qualified name."""
        if isinstance(self.objective, str):
            return self.objective
        name = getattr(self.objective, "__qualname__", type(self.objective).__qualname__)
        return f"{self.objective.__module__}.{name}"

    def describe(self) -> dict[str, Any]:
        """What decides the results, as plain JSON: two runs that agree in it may share a folder.

        A tensor baseline is named by its hash, a callable objective by its name and its code.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.baseline, Tensor):
            values = self.baseline.detach().float().cpu().contiguous().numpy()
            plain["baseline"] = f"tensor {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"
        plain["objective"] = self.objective_name
        if isinstance(code := getattr(self.objective, "__code__", None), CodeType):
            # A function may be edited under its name, and lambdas share one.
            plain["objective_code"] = hashlib.sha256(repr(_parts(code)).encode()).hexdigest()[:16]
        if isinstance(self.attributed_span, tuple):
            plain["attributed_span"] = list(self.attributed_span)
        plain["modalities"] = list(self.modalities)
        plain["torch"] = str(torch.__version__)
        return plain


def _parts(code: CodeType) -> tuple[object, ...]:
    """What a function does, without where it stands."""
    constants: list[object] = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant = _parts(constant)
        elif isinstance(constant, frozenset):  # of `in {...}`: its order differs between processes
            constant = sorted(map(repr, constant))
        constants.append(constant)
    return code.co_code, code.co_names, code.co_varnames, constants


def _one_of(name: str, value: object, known: tuple[str, ...], more: str = "") -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}{more}, got {value!r}")


def _count(name: str, value: object, instead: str | None) -> None:
    if value == instead:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be {instead!r} or an integer of at least 1, got {value!r}")
