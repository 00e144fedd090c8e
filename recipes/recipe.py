"""A recipe: a benchmark, a model and every setting, as plain data: read, checked, written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent

Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way of steering, a row of the table or several. Exactly one of the first four is set."""

    fit: str | None = None
    refine: str | None = None
    prompt: bool = False
    lora: Options | None = None
    options: Options | None = None
    variants: tuple[Options, ...] = ({},)
    draws: int = 1
    images: bool = False
    """Whether it is for models with images alone."""

    @classmethod
    def of(cls, name: str, plain: Mapping[str, Any]) -> Method:
        """Raises ValueError, with the method's name, for settings that are none."""
        if unknown := set(plain) - {field.name for field in fields(cls)}:
            raise ValueError(f"method {name}: unknown settings {sorted(unknown)}")
        method = cls(**{**plain, "variants": tuple(plain.get("variants", ({},)))})
        kinds = (method.fit, method.refine, method.prompt or None, method.lora)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(f"method {name}: give one of fit, refine, prompt and lora")
        return method


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result but the weights and the data."""

    name: str
    model: Options
    benchmark: Options
    kept: Options
    settings: Options

    @property
    def images(self) -> bool:
        """Whether the benchmark is one of pictures."""
        return bool(self.kept["name"] == "mmmu")

    @property
    def attributes(self) -> bool:
        """Whether any method chooses tokens by attribution."""
        return any(method.fit == "grains" for method in self.methods().values())

    def methods(self) -> dict[str, Method]:
        """By name, those that suit the benchmark; `refine` may name only one before it."""
        found: dict[str, Method] = {}
        for name, plain in self.settings["methods"].items():
            method = Method.of(name, plain)
            if method.refine is not None and method.refine not in found:
                raise ValueError(f"method {name} refines {method.refine!r}, which is not before it")
            if self.images or not method.images:
                found[name] = method
        return found

    def rows(self) -> Iterator[tuple[str, Method, int]]:
        """(row of the table, method, number of the draw), in order."""
        for name, method in self.methods().items():
            for draw in range(method.draws):
                yield (name if method.draws == 1 else f"{name}-{draw + 1}"), method, draw

    def only(self, names: Sequence[str]) -> Recipe:
        """With these methods alone. Raises ValueError for an unknown one."""
        return self._chosen(names, lambda name: name in names)

    def without(self, names: Sequence[str]) -> Recipe:
        """Less these methods. Raises ValueError for an unknown one."""
        return self._chosen(names, lambda name: name not in names)

    def _chosen(self, names: Sequence[str], keep: Callable[[str], bool]) -> Recipe:
        methods = self.settings["methods"]
        if unknown := [name for name in names if name not in methods]:
            raise ValueError(f"unknown methods {unknown}: there are {', '.join(methods)}")
        chosen = {name: plain for name, plain in methods.items() if keep(name)}
        return self._with({**self.settings, "methods": chosen})

    def smoke(self) -> Recipe:
        """The same in small: every stage and method, a few items and steps."""
        return self._with(_merged(self.settings, self.settings["smoke"]))

    def with_seed(self, seed: int) -> Recipe:
        return self._with({**self.settings, "seed": seed})

    def _with(self, settings: Options) -> Recipe:
        return Recipe(self.name, self.model, self.benchmark, self.kept, settings)

    def as_yaml(self) -> str:
        text: str = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        return text


def read_recipe(path: Path) -> Recipe:
    """A recipe that was written with `as_yaml`. Raises ValueError where it is none."""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Recipe)}
    if not isinstance(plain, dict) or not names <= set(plain):
        raise ValueError(f"{path}: no recipe, which has {', '.join(sorted(names))}")
    return Recipe(**{name: plain[name] for name in names})


@cache
def recipes() -> dict[str, Recipe]:
    """All of them: each benchmark with each of its models."""
    return {recipe.name: recipe for recipe in _recipes()}


def recipe_named(name: str) -> Recipe:
    if name not in recipes():
        raise ValueError(f"no recipe {name!r}: there are {', '.join(recipes())}")
    return recipes()[name]


def _recipes() -> Iterator[Recipe]:
    models, benchmarks, settings = map(_read, ("models", "benchmarks", "settings"))
    for name, benchmark in benchmarks.items():
        for model in benchmark.get("models", ()):
            kept = benchmark["kept"]
            own = {key: benchmark[key] for key in settings if key in benchmark}
            yield Recipe(
                f"{name}-{model}",
                {"name": model, **models[model]},
                {"name": name, **benchmark},
                {"name": kept, **benchmarks[kept]},
                {**settings, **own},
            )


def _read(name: str) -> Options:
    plain: Options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return plain


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Options:
    """The settings with some changed, down into what is a mapping on both sides."""
    merged = dict(settings)
    for name, value in changes.items():
        own = merged.get(name)
        both = isinstance(own, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(own, value) if both and own is not None else value
    return merged
