"""What the site's generator does not check: the navigation, and that the reference is complete."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import grains_ext
from grains_ext import export

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def listed(item: Any) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(item, str):
        yield item
    else:
        for inner in item.values() if isinstance(item, dict) else item:
            yield from listed(inner)


def documented() -> Iterator[Any]:
    """The objects that the reference shows: those it names, and those of a package's __all__."""
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M):
            found = resolve(name)
            yield found
            if isinstance(found, ModuleType):
                folder = Path(found.__file__ or "").parent
                for member in getattr(found, "__all__", ()):
                    value = getattr(found, member)
                    # A module of the same name hides it from the site's reader; so does silence.
                    if not (folder / f"{member}.py").exists() and inspect.getdoc(value):
                        yield value


def resolve(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(home), attribute)


def test_the_navigation_lists_the_pages_that_there_are() -> None:
    # The base loader reads a tag that names a Python function as text.
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    decisions = {page for page in pages if page.startswith("decisions/0")}
    assert sorted(listed(settings["nav"])) == sorted(pages - decisions)


def test_every_decision_is_in_their_list() -> None:
    text = (DOCS / "decisions/README.md").read_text(encoding="utf-8")
    links = re.findall(r"^- \[(.+)\]\((.+)\)$", text, re.M)
    assert sorted(link for _, link in links) == sorted(
        path.name for path in DOCS.glob("decisions/0*.md")
    )


@pytest.mark.parametrize("module", [grains_ext, export], ids=["grains_ext", "export"])
def test_the_reference_has_every_public_name(module: ModuleType) -> None:
    shown = list(documented())
    missing = [
        name
        for name in module.__all__
        if not any(getattr(module, name) is found for found in shown)
    ]
    assert missing == []
