"""A tokenizer from its file alone splits text as transformers does."""

from __future__ import annotations

from typing import Any

import pytest

from grains_ext.encoding import encode_continuation, encode_prompt
from grains_ext.export.tokenizing import FileTokenizer, TokenizerSettings
from tests.models import tiny_tokenizer

TEMPLATES = {
    "plain": (
        "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    ),
    "trimming": (
        "{{ bos_token }}{%- for m in messages %}\n  {{- '[' + m['role'] + ']' }}"
        "{{ m['content'] | trim }}{{ eos_token }}\n{%- endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "loops": (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content | tojson }}"
        "{{ '|' if tools is none }}{% endfor %}"
    ),
}
MESSAGES = [
    {"role": "system", "content": "the truth"},
    {"role": "user", "content": "what <color> is the sky", "name": None},
]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "the sky is "}]


def both(**options: Any) -> tuple[Any, FileTokenizer]:
    tokenizer = tiny_tokenizer(**options)
    text = tokenizer.backend_tokenizer.to_str()
    return tokenizer, FileTokenizer(text, TokenizerSettings.of(tokenizer))


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("prompt", ["the sky is", "the sky is ", "a:\n", "x é <bos> rome"])
def test_text_is_split_as_by_transformers(prompt: str, add_bos: bool) -> None:
    tokenizer, ours = both(add_bos=add_bos)
    expected = encode_continuation(tokenizer, prompt, "blue truth")
    assert encode_continuation(ours, prompt, "blue truth") == expected
    assert ours.decode(expected[0]) == tokenizer.decode(expected[0])
    assert ours.bos_token_id == 1
    assert ours.mask_token_id is None


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    ours = FileTokenizer(tokenizer.backend_tokenizer.to_str(), TokenizerSettings.of(tokenizer))
    assert encode_prompt(ours, "the sky is") == encode_prompt(tiny_tokenizer(), "the sky is")


@pytest.mark.parametrize("messages", [MESSAGES, BEGUN])
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_written_as_by_transformers(name: str, messages: Any) -> None:
    tokenizer, ours = both(chat_template=TEMPLATES[name])
    answered = messages is BEGUN
    options = {
        "tokenize": False,
        "add_generation_prompt": not answered,
        "continue_final_message": answered,
    }
    expected = tokenizer.apply_chat_template(messages, **options)
    assert ours.apply_chat_template(messages, **options) == expected
    assert encode_prompt(ours, messages) == encode_prompt(tokenizer, messages)


def test_parts_of_messages_can_be_continued() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }};"
        "{% endfor %}{% endfor %}"
    )
    tokenizer, ours = both(chat_template=template)
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": t} for t in ("the", "sky")]}
    ]
    options = {"tokenize": False, "add_generation_prompt": False, "continue_final_message": True}
    expected = tokenizer.apply_chat_template(messages, **options)
    assert ours.apply_chat_template(messages, **options) == expected == "assistant:the;sky"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "chat template: no system role"),
        ("{% for %}", "chat template: "),
        ("{{ ''.__class__.__mro__ }}", "chat template: "),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "chat template: "),
    ],
)
def test_templates_that_refuse_or_try_to_break_out(template: str, message: str) -> None:
    _, ours = both(chat_template=template)
    with pytest.raises(ValueError, match=message):
        encode_prompt(ours, MESSAGES)


def test_a_template_that_drops_the_last_message_cannot_be_continued() -> None:
    _, ours = both(chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="leaves out the last message"):
        encode_prompt(ours, BEGUN)


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        FileTokenizer("{}", TokenizerSettings())
    with pytest.raises(ValueError, match="dict is not a fast tokenizer"):
        TokenizerSettings.of({})
