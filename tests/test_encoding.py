from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.encoding import encode_continuation, encode_pair, encode_prompt
from grains_ext.pairs import PreferencePair
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def text_of(ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_default_separator_is_one_space() -> None:
    prompt, continuation = encode_continuation(TOKENIZER, "so the sky is", "blue")
    assert text_of(prompt) == "so the sky is"
    assert text_of(continuation) == " blue"
    assert prompt == encode_prompt(TOKENIZER, "so the sky is")
    assert len(continuation) == 1


@pytest.mark.parametrize("prompt", ["the sky is ", "the sky is", "the sky is\n"])
def test_white_space_on_either_side_is_the_separator(prompt: str) -> None:
    continuation = "blue" if prompt[-1].isspace() else " blue"
    ids = encode_continuation(TOKENIZER, prompt, continuation)
    assert text_of(ids[0]) + text_of(ids[1]) == prompt + continuation


def test_trailing_space_moves_to_the_continuation() -> None:
    """As its own token the space would leave "blue" in letters, which the model never saw."""
    trailing = encode_continuation(TOKENIZER, "the sky is ", "blue")
    assert trailing == encode_continuation(TOKENIZER, "the sky is", "blue")


def test_both_answers_share_the_prompt() -> None:
    # " blue" merges with the trailing space, "zz" does not: one rule for both.
    pair = encode_pair(TOKENIZER, PreferencePair("the sky is ", "blue", "\nzz"))
    assert text_of(pair.prompt_ids) == "the sky is"
    assert text_of(pair.chosen_ids) == " blue"
    assert text_of(pair.rejected_ids) == " \nzz"


def test_separator_overrules() -> None:
    _, continuation = encode_continuation(TOKENIZER, "sky", "blue", separator=":")
    assert text_of(continuation) == ":blue"


def test_bos_as_the_tokenizer_does() -> None:
    assert encode_prompt(TOKENIZER, "sky")[0] == TOKENIZER.bos_token_id
    without = tiny_tokenizer(add_bos=False)
    assert encode_prompt(without, "sky") == encode_prompt(TOKENIZER, "sky")[1:]
    assert encode_prompt(TOKENIZER, "") == (TOKENIZER.bos_token_id,)
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompt(without, "")


def test_appended_eos_is_left_out() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert encode_prompt(tokenizer, "sky") == encode_prompt(TOKENIZER, "sky")
    assert encode_continuation(tokenizer, "sky", "blue") == encode_continuation(
        TOKENIZER, "sky", "blue"
    )


def test_merge_across_the_boundary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"merges the end of the prompt.*'so the sky'"):
        encode_continuation(TOKENIZER, "so t", "he sky", separator="")


def test_unknown_word_across_the_boundary_is_an_error() -> None:
    """Both encode to one <unk>: the ids alone show no merge, the offsets do."""
    with pytest.raises(ValueError, match="merges"):
        encode_continuation(TOKENIZER, "日", "本", separator="")


def test_empty_continuation_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        encode_continuation(TOKENIZER, "sky", "", separator="")


class SlowTokenizer:
    """The interface of a tokenizer without offsets."""

    is_fast = False
    bos_token_id = TOKENIZER.bos_token_id

    def __call__(self, text: str, *, return_offsets_mapping: bool, **kwargs: Any) -> dict:
        assert not return_offsets_mapping
        return TOKENIZER(text, **kwargs)


def test_tokenizer_without_offsets() -> None:
    pair = PreferencePair("so the sky is ", "blue", "red rose")
    assert encode_pair(SlowTokenizer(), pair) == encode_pair(TOKENIZER, pair)
    with pytest.raises(ValueError, match="merges"):
        encode_continuation(SlowTokenizer(), "so t", "he", separator="")


def test_processor_uses_its_tokenizer() -> None:
    processor = SimpleNamespace(tokenizer=TOKENIZER)
    assert encode_prompt(processor, "sky") == encode_prompt(TOKENIZER, "sky")


def test_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "sky?"}]
    prompt, continuation = encode_continuation(tokenizer, messages, "blue")
    # The template's own BOS and no second one; no separator.
    assert tokenizer.decode(prompt) == "<bos>user:sky?\nassistant:"
    assert text_of(continuation) == "blue"


def test_unfinished_assistant_turn_is_continued() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [
        {"role": "user", "content": "sky?"},
        {"role": "assistant", "content": "The sky is"},
    ]
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == "<bos>user:sky?\n<bos>assistant:The sky is"


def test_messages_without_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(TOKENIZER, [{"role": "user", "content": "sky?"}])


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30)


@given(ASCII, ASCII)
def test_parts_are_the_whole(prompt: str, continuation: str) -> None:
    prompt_ids, ids = encode_continuation(TOKENIZER, prompt, " " + continuation)
    joined = prompt + " " + continuation
    assert prompt_ids + ids == tuple(TOKENIZER(joined)["input_ids"])
    assert text_of(prompt_ids).rstrip() == prompt.rstrip()
