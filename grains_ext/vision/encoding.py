"""Prompts with images as token ids and model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from grains_ext.encoding import EncodedPair, TokenIds, encode_text, prompt_text
from grains_ext.pairs import Message, PreferencePair
from grains_ext.vision.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EncodedImagePair:
    """A pair with images as the model takes it.

    pair: token ids; each image's placeholder in the prompt is expanded to its image tokens.
    inputs: everything the model's forward takes for the prompt beside input_ids and attention_mask:
        pixels and their sizes, and token types where the processor makes them.
    images: the opened images; expansions: what the processor wrote for each image's placeholder.
    """

    pair: EncodedPair
    inputs: dict[str, Tensor]
    images: tuple[Image, ...]
    expansions: tuple[str, ...]


def encode_image_pair(
    processor: Any,
    pair: PreferencePair,
    *,
    separator: str | None = None,
    images: Sequence[Image] | None = None,
) -> EncodedImagePair:
    """Encodes a pair whose prompt has images.

    The prompt is a string with the processor's image token (processor.image_token) once per image,
    or chat messages with a {"type": "image"} part for each, in the order of pair.images. Messages
    with no such part get their images at the start of the first user turn. Prompt and continuations
    are split as in grains_ext.encoding.encode_continuation.

    separator: as there. images: take these in place of pair.images.

    Raises ValueError where an image does not open, for a processor that takes no images, for
    another number of image places than images, and as encode_continuation does.
    """
    prompt = _processed(processor, pair.prompt, images or pair.images or ())
    prompt_ids, [chosen_ids, rejected_ids] = encode_text(
        processor.tokenizer,
        prompt.text,
        [pair.chosen, pair.rejected],
        separator="" if prompt.templated and separator is None else separator,
        add_special_tokens=prompt.add_special_tokens,
    )
    return EncodedImagePair(
        pair=EncodedPair(prompt_ids, chosen_ids, rejected_ids),
        inputs=prompt.inputs(processor, prompt_ids),
        images=prompt.images,
        expansions=prompt.expansions,
    )


def encode_image_prompt(
    processor: Any, prompt: str | list[Message], images: Sequence[Any]
) -> tuple[TokenIds, dict[str, Tensor]]:
    """Token ids of a prompt with images, and its inputs, as encode_image_pair gives them.

    images: whatever grains_ext.vision.open_image opens. Raises as encode_image_pair does.
    """
    processed = _processed(processor, prompt, images)
    prompt_ids, _ = encode_text(
        processor.tokenizer,
        processed.text,
        [],
        add_special_tokens=processed.add_special_tokens,
    )
    return prompt_ids, processed.inputs(processor, prompt_ids)


@dataclass(frozen=True)
class _Processed:
    """A prompt as the processor took it. text: with each placeholder expanded; output: its own."""

    text: str
    templated: bool
    add_special_tokens: bool
    output: Any
    images: tuple[Image, ...]
    expansions: tuple[str, ...]

    def inputs(self, processor: Any, prompt_ids: TokenIds) -> dict[str, Tensor]:
        """What the forward takes beside ids and mask. Raises ValueError where the ids differ."""
        out = self.output
        if tuple(out["input_ids"][0][: len(prompt_ids)]) != prompt_ids:
            raise ValueError(
                f"{type(processor).__name__} encodes the prompt otherwise than its tokenizer does: "
                "set options of the text on the tokenizer itself"
            )
        out.convert_to_tensors("pt")
        return {
            name: value
            for name, value in out.items()
            if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask")
        }


def _processed(processor: Any, prompt: str | list[Message], images: Sequence[Any]) -> _Processed:
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"the prompt has images, and {type(processor).__name__} takes text only: pass the "
            "model's processor (grains_ext.vision.load_processor)"
        )
    opened = tuple(open_image(image) for image in images)
    text, templated = _prompt_text(processor, prompt, len(opened))
    bos = processor.tokenizer.bos_token
    # As transformers' processors do: templates that write no BOS leave it to the tokenizer.
    add_special_tokens = not (templated and bos is not None and text.startswith(bos))
    out = processor(
        text=[text],
        images=list(opened),
        add_special_tokens=add_special_tokens,
        return_text_replacement_offsets=True,
    )
    replaced = out.pop("text_replacement_offsets", None)
    if not replaced:
        raise ValueError(
            f"{type(processor).__name__} does not say where it puts image tokens "
            "(text_replacement_offsets): prompts with images need transformers 5.12 or newer"
        )
    return _Processed(
        text=_expand(text, replaced[0]),
        templated=templated,
        add_special_tokens=add_special_tokens,
        output=out,
        images=opened,
        expansions=tuple(place["replacement"] for place in replaced[0]),
    )


def _expand(text: str, replaced: Sequence[Mapping[str, Any]]) -> str:
    parts, end = [], 0
    for place in replaced:
        start, stop = place["span"]
        parts += [text[end:start], place["replacement"]]
        end = stop
    return "".join([*parts, text[end:]])


def _prompt_text(processor: Any, prompt: str | list[Message], n_images: int) -> tuple[str, bool]:
    """The prompt with one placeholder per image, and whether a chat template wrote it."""
    placeholder = getattr(processor, "image_token", None)
    if placeholder is None:
        raise ValueError(f"{type(processor).__name__} names no image token (image_token)")
    if not isinstance(prompt, str):
        prompt = with_image_parts(prompt, n_images)
    text, templated = prompt_text(processor, prompt)
    n_places = text.count(placeholder)
    if n_places == n_images:
        return text, templated
    if templated:
        raise ValueError(
            f"the chat template writes {n_places} image placeholders ({placeholder}) for "
            f'{n_images} images: give each image its {{"type": "image"}} part in the messages'
        )
    hint = "write it where the image belongs" if n_places == 0 else "write it once for each image"
    raise ValueError(
        f"the prompt has {n_places} image placeholders ({placeholder}) for {n_images} images: "
        f"{hint}, or give the prompt as chat messages"
    )


def with_image_parts(messages: Sequence[Message], n_images: int) -> list[Message]:
    """The messages with their contents as lists of parts, and a part for every image."""
    turns: list[dict[str, Any]] = [
        {**message, "content": _parts(message["content"])} for message in messages
    ]
    n_parts = sum(part.get("type") == "image" for turn in turns for part in turn["content"])
    if n_parts == 0:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("the messages have no user turn that could hold the image")
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif n_parts != n_images:
        raise ValueError(f"the messages have {n_parts} image parts for {n_images} images")
    return list(turns)


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
