"""Text of unknown origin, made fit to be shown: what hides or turns text round is spelled out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Controls but tab and line feed; marks that change the direction of what follows (CVE-2021-42574)
# or show nothing; line separators; tags that no one sees and a model reads; lone surrogates, which
# UTF-8 has no place for. Joiners (U+200C, U+200D) stay: scripts and emoji are written with them.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def fit_to_show(text: str) -> str:
    """The text with such characters as ``[U+202E]``; all others as they are."""
    return _UNFIT.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def all_fit_to_show(value: Any) -> Any:
    """The same for every text in nested mappings, lists and tuples."""
    if isinstance(value, str):
        return fit_to_show(value)
    if isinstance(value, Mapping):
        return {name: all_fit_to_show(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [all_fit_to_show(inner) for inner in value]
    return value


def of_prompt(prompt: Any) -> str:
    """A prompt as text: as it is, or chat messages, each after its role."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"a prompt must be text or chat messages, got {type(prompt).__name__}")
    lines = []
    for message in prompt:
        if not isinstance(message, Mapping):
            raise ValueError(f"a chat message must be an object, got {type(message).__name__}")
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(
                str(part.get("text", f"[{part.get('type')}]"))
                for part in content
                if isinstance(part, Mapping)
            )
        lines.append(f"{message.get('role')}: {content}")
    return "\n".join(lines)


def blocks_words(blocks: Sequence[int]) -> str:
    """ "3", "2–5" for neighbours, else "1, 4"."""
    if len(blocks) > 1 and list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}–{blocks[-1]}"
    return ", ".join(map(str, blocks))
