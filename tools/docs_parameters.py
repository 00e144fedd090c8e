"""Renders docstrings that describe a parameter as ``name: text``, in the order of the signature.

Docstrings here say "strength: the factor a ..." at the margin or under "Args:", several names
together where they are of one kind, with further lines indented. The site shows each such paragraph
as an item of a list.
"""

import re
from typing import Any

from griffe import Class, Extension, Function, Object

_ITEM = re.compile(r"^(?P<indent> *)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>\S.*)$")
_ROLE = re.compile(r":(?:func|class|meth):(`[^`]+`)")


class Parameters(Extension):
    """The extension that mkdocs.yml names."""

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        known = set(cls.members)
        if isinstance(init := cls.members.get("__init__"), Function):
            known |= {parameter.name for parameter in init.parameters}
        _rewrite(cls, known)


def _rewrite(of: Object, known: set[str]) -> None:
    if of.docstring is not None:
        of.docstring.value = as_list(of.docstring.value, known)


def as_list(docstring: str, known: set[str]) -> str:
    """The docstring with each paragraph of a known name as a list item."""
    lines: list[str] = []
    margin: int | None = None  # of the list that is open
    for line in _without_headings(_ROLE.sub(r"\1", docstring).splitlines()):
        item = _ITEM.match(line)
        if item and all(name.strip(" *") in known for name in item["names"].split(",")):
            if margin is None and lines and lines[-1]:
                lines.append("")
            margin = len(item["indent"])
            names = ", ".join(f"`{name.strip()}`" for name in item["names"].split(","))
            lines.append(f"{item['indent']}- {names}: {item['text']}")
        else:
            # A paragraph at the list's margin, or before it, ends the list.
            if margin is not None and line and len(line) - len(line.lstrip()) <= margin:
                if lines[-1]:
                    lines.append("")
                margin = None
            lines.append(line)
    return "\n".join(lines)


def _without_headings(lines: list[str]) -> list[str]:
    """What stands under "Args:" or "Attributes:" moves to the margin."""
    moved: list[str] = []
    indent = 0
    inside = False
    for line in lines:
        if line in ("Args:", "Attributes:"):
            inside, indent = True, 0
            continue
        if inside and line and not line.startswith(" "):
            inside = False
        if inside and line:
            indent = indent or len(line) - len(line.lstrip())
            line = line[indent:] if line[:indent].isspace() else line.lstrip()
        moved.append(line)
    return moved
