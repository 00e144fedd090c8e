"""Which tokens of a prompt may be masked: by default those that may be reasons for an answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from grains_ext.encoding import TokenIds, prompt_text
from grains_ext.pairs import Message, PreferencePair
from grains_ext.steering.fit_settings import FitSettings
from grains_ext.steering.prompts import Prompt

# Text that no message, template or tokenizer knows; one for each content of a prompt.
_MARK = "\ue000{}\ue001"

# Fewer prompts cannot tell what they share as a frame from what they share by chance.
_LEAST_PROMPTS = 10
_WORD = re.compile(r"\w+")

Span = tuple[int, int]
Frame = frozenset[int]
"""Ids of tokens that nearly all prompts share."""


def candidates(
    processor: Any, prompt: Prompt, settings: FitSettings, frame: Frame = frozenset()
) -> list[int]:
    """Positions that the settings let be masked, rising.

    Text tokens that are not special and come from the prompt string or the messages' contents
    (masking BOS or a role's header breaks the model, not the evidence), that do not say an answer
    and are not of the ``frame`` that all prompts share; image tokens that stand for pixels.

    Raises ValueError where the tokens of a chat template cannot be told apart.
    """
    ids, modality = prompt.ids.prompt_ids, prompt.modality
    allowed: set[int] = set()
    if "text" in settings.modalities:
        allowed = {i for i, kind in enumerate(modality) if kind == "text"}
        if not settings.special_tokens:
            special = special_ids(processor)
            allowed = {i for i in allowed if ids[i] not in special}
        if not settings.template_tokens:
            allowed &= content_positions(processor, prompt)
        if not settings.answer_tokens:
            allowed -= answer_positions(processor, prompt)
        # A prompt that is all frame has its reasons there, if anywhere.
        allowed = {i for i in allowed if ids[i] not in frame} or allowed
    if "image" in settings.modalities and prompt.captured is not None:
        for grid in prompt.captured.images:
            allowed |= {
                place
                for place, box in zip(grid.token_positions, grid.boxes, strict=True)
                if box.any()
            }
    return sorted(allowed)


def frame_of(processor: Any, pairs: Sequence[PreferencePair], settings: FitSettings) -> Frame:
    """Tokens that stand in more than ``settings.max_frequency`` of the prompts.

    None where there are fewer than ten prompts: too few to tell a frame from a topic.
    """
    if settings.max_frequency == 1 or len(pairs) < _LEAST_PROMPTS:
        return frozenset()
    tokenizer = _tokenizer(processor)
    counts: Counter[int] = Counter()
    for pair in pairs:
        text = pair.prompt
        if not isinstance(text, str):
            text = " ".join(said for message in text for said in _texts(message["content"]))
        counts.update(set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    most = settings.max_frequency * len(pairs)
    return frozenset(token for token, count in counts.items() if count > most)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    # None: a turn that calls a tool and says nothing.
    return [part["text"] for part in content or () if isinstance(part.get("text"), str)]


def special_ids(processor: Any) -> frozenset[int]:
    return frozenset(_tokenizer(processor).all_special_ids)


def content_positions(processor: Any, prompt: Prompt) -> set[int]:
    """Positions whose text comes from the prompt string or from the contents of its messages.

    The chat template is rendered a second time with marks for contents; what stands between them is
    the template's. What a processor writes for an image (its rows' names and line ends) is not
    content. A token on a border that holds any content is.

    Raises ValueError where the tokenizer gives no offsets, or the template changes the contents.
    """
    if isinstance(prompt.pair.prompt, str) and prompt.captured is None:
        return set(range(len(prompt.ids.prompt_ids)))
    pieces = _expanded(prompt, processor, _pieces(processor, prompt))
    spans, text = _spans(pieces)
    if not getattr(_tokenizer(processor), "is_fast", False):
        raise ValueError(_cannot_tell("the tokenizer gives no offsets"))
    return _positions_in(spans, _offsets(processor, text, prompt.ids.prompt_ids))


def answer_positions(processor: Any, prompt: Prompt) -> set[int]:
    """Positions of words that one of the answers has and the other has not.

    Without regard to case. A tokenizer that gives no offsets cannot tell words: tokens are compared
    in their place.
    """
    chosen, rejected = prompt.pair.chosen, prompt.pair.rejected
    ids = prompt.ids
    if not getattr(_tokenizer(processor), "is_fast", False):
        telling = set(ids.chosen_ids) ^ set(ids.rejected_ids)
        return {i for i, token in enumerate(ids.prompt_ids) if token in telling}
    words = {match.casefold() for match in _WORD.findall(chosen)}
    words ^= {match.casefold() for match in _WORD.findall(rejected)}
    text = "".join(
        text for text, _ in _expanded(prompt, processor, [(_text(processor, prompt), True)])
    )
    spans = [match.span() for match in _WORD.finditer(text) if match[0].casefold() in words]
    return _positions_in(spans, _offsets(processor, text, ids.prompt_ids)) if spans else set()


def _positions_in(spans: Sequence[Span], offsets: Sequence[Span]) -> set[int]:
    """Which tokens have any of their text in the spans."""
    return {
        i
        for i, (start, end) in enumerate(offsets)
        if any(start < stop and end > begin for begin, stop in spans)
    }


Piece = tuple[str, bool]
"""Some text of a prompt, and whether it is content."""


def _messages(prompt: Prompt) -> str | list[Message]:
    """The prompt as the template gets it."""
    said, images = prompt.pair.prompt, prompt.pair.images
    if isinstance(said, str) or not images:
        return said
    from grains_ext.vision.encoding import with_image_parts

    return with_image_parts(said, len(images))


def _text(processor: Any, prompt: Prompt) -> str:
    """The prompt's text, with a placeholder for each image."""
    return prompt_text(processor, _messages(prompt))[0]


def _pieces(processor: Any, prompt: Prompt) -> list[Piece]:
    messages = _messages(prompt)
    if isinstance(messages, str):
        return [(messages, True)]
    contents: list[str] = []
    marked: list[Message] = [
        {**message, "content": _marked(message["content"], contents)} for message in messages
    ]
    text = _text(processor, prompt)
    rest, _ = prompt_text(processor, marked)
    pieces: list[Piece] = []
    for number, content in enumerate(contents):
        literal, mark, rest = rest.partition(_MARK.format(number))
        # Many templates strip contents.
        said = content if text.startswith(literal + content) else content.strip()
        if not mark or not text.startswith(literal + said):
            raise ValueError(_cannot_tell("its chat template changes or reorders the messages"))
        pieces += [(literal, False), (said, True)]
        text = text[len(literal) + len(said) :]
    if text != rest:
        raise ValueError(_cannot_tell("its chat template depends on the contents of the messages"))
    return [*pieces, (rest, False)]


def _marked(content: Any, contents: list[str]) -> Any:
    """A message's content with marks in the place of its texts, which go to ``contents``."""

    def mark(text: str) -> str:
        contents.append(text)
        return _MARK.format(len(contents) - 1)

    if content is None:
        return None
    if isinstance(content, str):
        return mark(content)
    return [
        {**part, "text": mark(part["text"])} if isinstance(part.get("text"), str) else part
        for part in content
    ]


def _expanded(prompt: Prompt, processor: Any, pieces: list[Piece]) -> list[Piece]:
    """The pieces with each image's placeholder replaced by its expansion, which is no content."""
    if prompt.captured is None:
        return pieces
    image: str = processor.image_token
    waiting: Iterator[str] = iter(prompt.captured.expansions)
    result: list[Piece] = []
    for text, is_content in pieces:
        first, *others = text.split(image)
        result.append((first, is_content))
        for other in others:
            result += [(next(waiting, image), False), (other, is_content)]
    return result


def _spans(pieces: Sequence[Piece]) -> tuple[list[Span], str]:
    """Where the contents are in the joined text, and that text."""
    spans, text = [], ""
    for piece, is_content in pieces:
        if is_content:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return spans, text


def _offsets(processor: Any, text: str, ids: TokenIds) -> list[Span]:
    """Each prompt token's place in the text."""
    tokenizer = _tokenizer(processor)
    # A prompt's closing white space may belong to the continuation's first token, and BOS is the
    # template's affair or the tokenizer's.
    for head in dict.fromkeys((text, text.rstrip())):
        for special in (False, True):
            encoded = tokenizer(
                head, add_special_tokens=special, return_offsets_mapping=True, verbose=False
            )
            if tuple(encoded["input_ids"][: len(ids)]) == tuple(ids):
                return [(start, end) for start, end in encoded["offset_mapping"][: len(ids)]]
    raise ValueError(
        "encoding the prompt again gives other tokens, so that words cannot be told apart: pass "
        "template_tokens=True and answer_tokens=True"
    )


def _cannot_tell(reason: str) -> str:
    return (
        f"the chat template's tokens cannot be told from the messages': {reason}. Pass "
        "template_tokens=True to let them be masked too"
    )


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)
