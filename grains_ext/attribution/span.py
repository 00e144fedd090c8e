"""Which of a prompt's tokens are attributed. The others keep their real embedding and score 0."""

from __future__ import annotations

from typing import Any, Literal

from grains_ext.attribution.sequences import common_prefix
from grains_ext.encoding import TokenIds, encode_text, prompt_text
from grains_ext.pairs import Message, PreferencePair

Span = tuple[int, int] | Literal["after_system"] | None


def check_span(span: Span) -> None:
    """Raises ValueError for what is no span."""
    if span is None or span == "after_system":
        return
    if not (isinstance(span, tuple | list) and len(span) == 2 and all(map(_is_place, span))):
        raise ValueError(
            'attributed_span must be None, "after_system" or two token positions (start, end), '
            f"got {span!r}"
        )


def span_of(tokenizer: Any, pair: PreferencePair, prompt_ids: TokenIds, span: Span) -> range:
    """The attributed positions of one prompt.

    None: all of it. (start, end): as a slice, negative from the end. "after_system": from the first
    token that a message after the system prompt decides; all of it where there is no system prompt.

    Raises ValueError where no token is left.
    """
    n_tokens = len(prompt_ids)
    if span is None:
        return range(n_tokens)
    if isinstance(span, str):
        return range(_system_tokens(tokenizer, pair, prompt_ids), n_tokens)
    positions = range(n_tokens)[slice(*span)]
    if not positions:
        raise ValueError(
            f"attributed_span {tuple(span)} holds none of the prompt's {n_tokens} tokens"
        )
    return positions


def _system_tokens(tokenizer: Any, pair: PreferencePair, prompt_ids: TokenIds) -> int:
    if isinstance(pair.prompt, str):
        return 0
    system = [message for message in pair.prompt if message["role"] == "system"]
    if not system:
        return 0
    # What stays the same whatever the user says; two openings, as the real one may equal either.
    # Processors have BOS added where the template writes none; the way that was taken shares more.
    return max(
        min(
            common_prefix(prompt_ids, encode_text(tokenizer, text, [], add_special_tokens=added)[0])
            for text in (_opened(tokenizer, pair, system, opening) for opening in ("0", "Z"))
        )
        for added in (False, True)
    )


def _opened(tokenizer: Any, pair: PreferencePair, system: list[Message], opening: str) -> str:
    """The system prompt and the user's first words, through the chat template."""
    messages = [*system, {"role": "user", "content": opening}]
    if pair.images:  # as prompts with images are written: in parts
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
    return prompt_text(tokenizer, messages)[0]


def _is_place(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
