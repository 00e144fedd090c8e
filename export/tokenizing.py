"""A transformers tokenizer from its tokenizer.json, with neither transformers nor torch.

It answers the calls that `grains_ext.encoding` makes, so that one rule splits prompt and
continuation in either world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# Before it, jinja2's sandbox is known to leak; templates come with models, from anywhere.
_LEAST_JINJA = (3, 1, 6)
# Ends in a space: whether it is still there tells whether the template trims.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_KINDS = ("bos", "eos", "pad", "unk", "mask")


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer knows beside its tokenizer.json; plain JSON values."""

    special_tokens: dict[str, str] = field(default_factory=dict)
    """"bos" and so on: the token."""
    special_ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    image_token: str | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerSettings:
        """Those of a transformers tokenizer. Raises ValueError where it has no tokenizer.json."""
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, which alone can be written "
                "into a file: load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        names = [
            kind for kind in _KINDS if getattr(tokenizer, f"{kind}_token_id", None) is not None
        ]
        template = tokenizer.chat_template
        if isinstance(template, Mapping):  # several by name; transformers takes this one
            template = template.get("default")
        return cls(
            special_tokens={name: str(getattr(tokenizer, f"{name}_token")) for name in names},
            special_ids={name: int(getattr(tokenizer, f"{name}_token_id")) for name in names},
            chat_template=template,
            image_token=getattr(tokenizer, "image_token", None),
        )


class FileTokenizer:
    """A tokenizer as `grains_ext.encoding` takes it.

    text: the content of a tokenizer.json. Raises ImportError without the package `tokenizers`,
    ValueError where the text describes no tokenizer.
    """

    is_fast = True
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    mask_token_id: int | None

    def __init__(self, text: str, settings: TokenizerSettings) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                "splitting text into tokens needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"the tokenizer cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = settings
        self.chat_template = settings.chat_template
        self.image_token = settings.image_token
        for kind in _KINDS:
            setattr(self, f"{kind}_token_id", settings.special_ids.get(kind))

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {
            "input_ids": encoding.ids,
            "offset_mapping": encoding.offsets,
            "special_tokens_mask": encoding.special_tokens_mask,
        }

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """The messages as the model's template writes them. Raises ValueError where it refuses."""
        assert not tokenize
        assert self.chat_template is not None
        # The template sees plain data alone, and no key without a value.
        plain = [
            {key: value for key, value in message.items() if value is not None}
            for message in json.loads(json.dumps(list(messages)))
        ]
        if continue_final_message:
            _mark_end(plain[-1])
        text = _rendered(
            self.chat_template,
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{f"{kind}_token": token for kind, token in self._settings.special_tokens.items()},
        )
        return _up_to_mark(text) if continue_final_message else text


def _rendered(template: str, **values: Any) -> str:
    """As transformers renders chat templates (transformers.utils.chat_template_utils)."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "prompts that are chat messages need jinja2 for the model's template: pip install "
            "'jinja2>=3.1.6', or give prompts as strings"
        ) from error
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal())
    if version < _LEAST_JINJA:
        raise ImportError(
            f"chat templates need jinja2 3.1.6 or newer, for its sandbox; here is "
            f"{jinja2.__version__}: pip install -U jinja2"
        )

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"it sets {name!r}")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": lambda **entries: entries,
    }
    try:
        return environment.from_string(template).render(**values)
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the model's chat template: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise ValueError(f"the model's chat template: {message}")


def _mark_end(message: dict[str, Any]) -> None:
    """Marks where the message ends, for the template to carry along."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _MARK
        return
    texts = [part for part in content if isinstance(part, dict) and "text" in part]
    if not texts:
        raise ValueError("the last message holds no text that could be continued")
    texts[-1]["text"] += _MARK


def _up_to_mark(text: str) -> str:
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise ValueError("the chat template leaves out the last message, so nothing can follow it")
    kept = text[:place]
    # Where the template trims messages, the mark lost its space.
    return kept if text[place:].startswith(_MARK) else kept.rstrip()
