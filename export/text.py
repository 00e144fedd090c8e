"""Text from an exported folder: onnxruntime and tokenizers, no torch (but for images)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grains_ext.encoding import encode_prompt
from grains_ext.export.bank import STRENGTH_NAME
from grains_ext.export.folder import CONFIG_NAME, GENAI_CONFIG_NAME, GRAPH_NAME, VISION_NAME
from grains_ext.export.generate import OnnxDecoder, Sampler, embedding_beside
from grains_ext.export.runtime import Provider, session
from grains_ext.export.tokenizing import FileTokenizer, TokenizerSettings
from grains_ext.export.vision_runtime import ImageReader, Prompt, image_token_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxruntime import SessionOptions

    from grains_ext.pairs import Message

_REPLACEMENT = "\ufffd"
"""What an unfinished UTF-8 character decodes to."""


class TextGenerator:
    """Writes text with a folder that `export_model` made.

    A folder of onnxruntime-genai's model builder, its graph steered by `inject`, does as well.
    Prompts with images, to a vision-language model, go through the processor in the folder:
    transformers, torch and Pillow are imported for those.

    strength: of the steering, in the place of the graph's own; 0 switches it off.
    session_options, providers: as for `session`. The op library is this package's, not the copy in
        the folder: nothing that lies in a folder is executed.

    Raises FileNotFoundError where the folder lacks a file, ValueError where the graph's strength is
    baked in and another is asked for.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        strength: float | None = None,
        session_options: SessionOptions | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"'{folder}' is not a folder; expected one of `grains export`")
        self.tokenizer = load_tokenizer(folder)
        runtime = session(folder / GRAPH_NAME, session_options=session_options, providers=providers)
        overrides = {}
        if strength is not None:
            shapes = {v.name: v.shape for v in runtime.get_overridable_initializers()}
            if STRENGTH_NAME not in shapes:
                raise ValueError(
                    f"the graph in '{folder}' takes no strength: it is not steered, or with "
                    "baked=True. Export it again without, or leave the strength out"
                )
            overrides[STRENGTH_NAME] = np.full(shapes[STRENGTH_NAME], strength, np.float32)
        self._folder = folder
        self._options: Any = {"session_options": session_options, "providers": providers}
        embedding = embedding_beside(folder / GRAPH_NAME, **self._options)
        self.decoder = OnnxDecoder(runtime, embedding=embedding, overrides=overrides)
        self._image_token_id = image_token_id(_json(folder / CONFIG_NAME))
        self._ends = _end_tokens(folder)
        self._context = _context_length(folder)

    def encode(self, prompt: str | list[Message], images: Sequence[Any] = ()) -> list[int]:
        """Token ids; messages go through the chat template. Raises ValueError where there is none,
        or where the prompt leaves no room in the model's context."""
        return list(self._encoded(prompt, images).ids)

    def _encoded(self, prompt: str | list[Message], images: Sequence[Any]) -> Prompt:
        if images:
            encoded = self._encoded_with(prompt, images)
        else:
            encoded = Prompt(encode_prompt(self.tokenizer, prompt))
            if self._image_token_id in encoded.ids:
                raise ValueError(
                    "the prompt has a place for an image, and no image is given with it"
                )
        if self._context is not None and len(encoded.ids) >= self._context:
            raise ValueError(
                f"the prompt has {len(encoded.ids)} tokens, and the model's context ends at "
                f"{self._context}: shorten it"
            )
        return encoded

    def _encoded_with(self, prompt: str | list[Message], images: Sequence[Any]) -> Prompt:
        if not (self._folder / VISION_NAME).is_file():
            raise ValueError(
                f"images were given, and '{self._folder}' has no {VISION_NAME}: it holds a model "
                "of text. Export a vision-language model, with its processor"
            )
        from grains_ext.vision import encode_image_prompt

        processor = self._processor
        if isinstance(prompt, str) and processor.image_token not in prompt:
            # It does not say where the images stand: before what is said of them.
            if getattr(processor, "chat_template", None):
                prompt = [{"role": "user", "content": prompt}]
            else:
                prompt = "".join(f"{processor.image_token} " for _ in images) + prompt
        return Prompt(*encode_image_prompt(processor, prompt, images))

    @cached_property
    def _processor(self) -> Any:
        from grains_ext.vision import load_processor

        return load_processor(str(self._folder), trust_remote_code=False)

    @cached_property
    def _images(self) -> ImageReader:
        return ImageReader(self._folder, **self._options)

    def stream(
        self,
        prompt: str | list[Message],
        *,
        images: Sequence[Any] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """Each new token and the text that it completes, which may be empty.

        It ends after max_new_tokens, at an end token, or where the model's context is full.
        images: paths, PIL images or arrays, one for each image token of the prompt, or image part
            of its messages. A prompt that has none is sent as a user's message with the images in
            front, or, where the model has no chat template, as text with them in front.
        temperature, top_p, seed: as for `Sampler`.
        """
        sampler = Sampler(temperature=temperature, top_p=top_p, seed=seed)
        encoded = self._encoded(prompt, images)
        ids = list(encoded.ids)
        if self._context is not None:
            max_new_tokens = min(max_new_tokens, self._context - len(ids))
        text = _TextStream(self.tokenizer, ids)
        batch = self._images.batch([encoded]) if images else None
        tokens = self.decoder.stream(
            np.array([ids]),
            images=None if batch is None else batch.images,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends,
            sampler=sampler,
        )
        for n, row in enumerate(tokens, start=1):
            token = int(row[0])
            last = n == max_new_tokens or token in self._ends
            yield token, text.add(token, last=last)

    def ends(self, token: int) -> bool:
        """Whether the model ends a text with this token."""
        return token in self._ends


class _TextStream:
    """The text of tokens that come one by one; a token may be a part of a character."""

    def __init__(self, tokenizer: FileTokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        # Of the prompt, only a little: what a token reads like can depend on the one before it.
        self._ids = prompt_ids[-4:]
        self._said = self._text()

    def add(self, token: int, *, last: bool) -> str:
        self._ids.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT) and not last:
            return ""
        # The prompt's piece may begin inside a character; then it reads otherwise now.
        new = text[len(self._said) :]
        # A word that is finished needs no more than its last tokens as a beginning.
        self._ids = self._ids[-8:]
        self._said = self._text()
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def load_tokenizer(folder: Path) -> FileTokenizer:
    """The folder's tokenizer, as transformers reads it. Raises FileNotFoundError without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no tokenizer.json: export the model together with a fast tokenizer"
        )
    text = path.read_text(encoding="utf-8")
    config = _json(folder / "tokenizer_config.json")
    added = {token["content"]: token["id"] for token in json.loads(text).get("added_tokens", [])}
    tokens: dict[str, str] = {}
    for kind in ("bos", "eos", "pad", "unk", "mask"):
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in added:
            tokens[kind] = token
    template = folder / "chat_template.jinja"
    return FileTokenizer(
        text,
        TokenizerSettings(
            special_tokens=tokens,
            special_ids={kind: added[token] for kind, token in tokens.items()},
            chat_template=(
                template.read_text(encoding="utf-8")
                if template.is_file()
                else config.get("chat_template")
            ),
        ),
    )


def _end_tokens(folder: Path) -> frozenset[int]:
    for facts in (
        _json(folder / "generation_config.json"),
        _json(folder / CONFIG_NAME),
        _json(folder / GENAI_CONFIG_NAME).get("model", {}),
    ):
        ends = facts.get("eos_token_id")
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _context_length(folder: Path) -> int | None:
    config = _json(folder / CONFIG_NAME)
    config = config.get("text_config", config)
    length: int | None = (
        config.get("max_position_embeddings")
        or config.get("n_positions")
        or _json(folder / GENAI_CONFIG_NAME).get("model", {}).get("context_length")
    )
    return length


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
