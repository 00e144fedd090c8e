"""Prompts and continuations as token ids, split exactly at the boundary between them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from grains_ext.pairs import Message, PreferencePair

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair. prompt_ids + chosen_ids is the encoding of the joined text."""

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds


def encode_prompt(tokenizer: Any, prompt: str | list[Message]) -> TokenIds:
    """The prompt's token ids, with BOS where the tokenizer adds one, ready to be continued.

    tokenizer: a tokenizer or a processor. Messages go through its chat template, up to the point
    where the assistant speaks. A closing EOS or SEP that the tokenizer appends is left out.

    Raises ValueError where there is no chat template for messages, or no token at all.
    """
    text, templated = prompt_text(tokenizer, prompt)
    ids = _tokenize(tokenizer, text, add_special_tokens=not templated)[0]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    return ids


def encode_continuation(
    tokenizer: Any, prompt: str | list[Message], continuation: str, *, separator: str | None = None
) -> tuple[TokenIds, TokenIds]:
    """Token ids of the prompt and of what follows it, from one encoding of both together.

    separator: what joins them; by default one space, or nothing where either side brings white
        space or the prompt is made of messages. It belongs to the continuation's tokens.
    White space at the prompt's end that the tokenizer merges with the continuation (" blue" is one
    token in most vocabularies) is counted to the continuation.

    Raises ValueError where the prompt's tokens are no prefix of the joined text's tokens.
    """
    prompt_ids, [continuation_ids] = _encode(tokenizer, prompt, [continuation], separator)
    return prompt_ids, continuation_ids


def encode_pair(
    tokenizer: Any, pair: PreferencePair, *, separator: str | None = None
) -> EncodedPair:
    """Both continuations of a pair after the same prompt tokens; see encode_continuation."""
    prompt_ids, [chosen_ids, rejected_ids] = _encode(
        tokenizer, pair.prompt, [pair.chosen, pair.rejected], separator
    )
    return EncodedPair(prompt_ids, chosen_ids, rejected_ids)


def encode_pairs(
    tokenizer: Any, pairs: Iterable[PreferencePair], *, separator: str | None = None
) -> list[EncodedPair]:
    """encode_pair for each, in order. Raises ValueError naming the pair, also for images."""
    encoded = []
    for index, pair in enumerate(pairs):
        try:
            if pair.images:
                raise ValueError("it has images, and only text prompts are supported")
            encoded.append(encode_pair(tokenizer, pair, separator=separator))
        except ValueError as error:
            raise ValueError(f"{pair_name(index, pair)}: {error}") from error
    return encoded


def pair_name(index: int, pair: PreferencePair) -> str:
    """How messages call the pair at a place in a list."""
    return f"pair {index}" if pair.id is None else f"pair {index} (id {pair.id!r})"


def encode_text(
    tokenizer: Any,
    text: str,
    continuations: list[str],
    *,
    separator: str | None = None,
    add_special_tokens: bool = True,
) -> tuple[TokenIds, list[TokenIds]]:
    """Token ids of a text and of each of its continuations; see encode_continuation.

    separator: None is one space, or nothing where either side brings white space.
    add_special_tokens: whether the tokenizer adds its own, as BOS, to the text.
    """
    joined = [text + _joint(text, c, separator) + c for c in continuations]
    problem = ""
    # A second try with the prompt's trailing white space on the continuations' side.
    for head in dict.fromkeys((text, text.rstrip())):
        prompt_ids = _tokenize(tokenizer, head, add_special_tokens=add_special_tokens)[0]
        tails = []
        for whole in joined:
            ids, ends = _tokenize(tokenizer, whole, add_special_tokens=add_special_tokens)
            n = len(prompt_ids)
            # The offsets catch what equal ids hide: one <unk> for a word over the boundary.
            crosses = ends is not None and 0 < n <= len(ends) and ends[n - 1] > len(head)
            if ids[:n] != prompt_ids or crosses:
                problem = problem or whole[max(0, len(head) - 20) : len(head) + 20]
                break
            tails.append(ids[n:])
        if len(tails) == len(joined):
            return _checked(text, prompt_ids, continuations, tails)
    raise ValueError(
        "the tokenizer merges the end of the prompt with the start of the continuation, around "
        f"{problem!r}, so the prompt's tokens are no prefix of the whole: end the prompt at a "
        'word, or put white space between them (separator=" ")'
    )


def _encode(
    tokenizer: Any,
    prompt: str | list[Message],
    continuations: list[str],
    separator: str | None,
) -> tuple[TokenIds, list[TokenIds]]:
    text, templated = prompt_text(tokenizer, prompt)
    placeholder = getattr(tokenizer, "image_token", None)
    if placeholder and placeholder in text:
        raise ValueError(
            f"the prompt has a place for an image ({placeholder}), and no image is given with it"
        )
    return encode_text(
        tokenizer,
        text,
        continuations,
        separator="" if templated and separator is None else separator,
        add_special_tokens=not templated,
    )


def _checked(
    text: str,
    prompt_ids: TokenIds,
    continuations: list[str],
    tails: list[TokenIds],
) -> tuple[TokenIds, list[TokenIds]]:
    if not prompt_ids:
        raise ValueError(f"the prompt {text!r} has no tokens")
    for continuation, ids in zip(continuations, tails, strict=True):
        if not ids:
            raise ValueError(f"the continuation {continuation!r} has no tokens")
    return prompt_ids, tails


def _joint(text: str, continuation: str, separator: str | None) -> str:
    if separator is not None:
        return separator
    return "" if text[-1:].isspace() or continuation[:1].isspace() else " "


def prompt_text(tokenizer: Any, prompt: str | list[Message]) -> tuple[str, bool]:
    """The prompt as text, and whether a chat template wrote it (with its own special tokens)."""
    if isinstance(prompt, str):
        return prompt, False
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the prompt is a list of messages, but {type(tokenizer).__name__} has no chat "
            "template: set tokenizer.chat_template, or give the prompt as a string"
        )
    # A last turn by the assistant is a beginning that the continuation completes.
    answered = prompt[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(prompt),
            tokenize=False,
            add_generation_prompt=not answered,
            continue_final_message=answered,
        )
    except Exception as error:
        if type(error).__module__ != "jinja2.exceptions":
            raise
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return text, True


def _tokenize(
    tokenizer: Any, text: str, *, add_special_tokens: bool
) -> tuple[TokenIds, list[int] | None]:
    """Ids, and each token's end in the text where the tokenizer gives offsets."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's own tokenizer
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=fast,
        return_special_tokens_mask=True,
        verbose=False,
    )
    length = len(encoded["input_ids"])
    if add_special_tokens:
        # The first token stays: an empty prompt's BOS is what the model continues.
        while length > 1 and encoded["special_tokens_mask"][length - 1]:
            length -= 1
    ids = tuple(encoded["input_ids"][:length])
    ends = [end for _, end in encoded["offset_mapping"][:length]] if fast else None
    return ids, ends
