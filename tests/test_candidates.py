from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.steering.candidates import candidates, content_positions, frame_of
from grains_ext.steering.fit_settings import FitSettings
from grains_ext.steering.prompts import Prompt, prompt_groups
from tests.models import tiny_tokenizer
from tests.vision_models import VISION_FAMILIES, tiny_vlm

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def prompt_of(tokenizer: Any, prompt: Any) -> Prompt:
    pair = PreferencePair(prompt, "blue", "red")
    return Prompt(0, pair, encode_pair(tokenizer, pair))


def said(tokenizer: Any, prompt: Prompt, places: Any) -> str:
    return tokenizer.decode([prompt.ids.prompt_ids[place] for place in sorted(places)])


def test_a_string_is_all_content_but_its_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    prompt = prompt_of(tokenizer, "study says the sky is")
    length = len(prompt.ids.prompt_ids)
    assert candidates(tokenizer, prompt, FitSettings()) == list(range(1, length))
    everything = candidates(tokenizer, prompt, FitSettings(special_tokens=True))
    assert everything == list(range(length))
    assert candidates(tokenizer, prompt, FitSettings(modalities=("image",))) == []


def test_words_of_one_answer_are_left_out() -> None:
    tokenizer = tiny_tokenizer()
    pair = PreferencePair("rumour says Blue. red is the color", "the sky is blue", "red is the sky")
    prompt = Prompt(0, pair, encode_pair(tokenizer, pair))
    # Both say "the sky is"; "blue" and "red" tell them apart.
    content = candidates(tokenizer, prompt, FitSettings())
    assert said(tokenizer, prompt, content) == "rumour says . is the color"
    everything = candidates(tokenizer, prompt, FitSettings(answer_tokens=True))
    assert said(tokenizer, prompt, everything) == "rumour says Blue. red is the color"


def test_without_offsets_tokens_are_compared() -> None:
    tokenizer = tiny_tokenizer()
    pair = PreferencePair(
        "rumour says blue. red is the color",
        "the sky is blue",
        "red is the sky",
    )
    prompt = Prompt(0, pair, encode_pair(tokenizer, pair))
    slow = SimpleNamespace(is_fast=False, all_special_ids=tokenizer.all_special_ids)
    content = candidates(slow, prompt, FitSettings())
    assert said(tokenizer, prompt, content) == "rumour says. is the color"
    chat = tiny_tokenizer(chat_template=TEMPLATE)
    prompt = prompt_of(chat, [{"role": "user", "content": "what is"}])
    slow.chat_template, slow.apply_chat_template = TEMPLATE, chat.apply_chat_template
    with pytest.raises(ValueError, match="gives no offsets"):
        candidates(slow, prompt, FitSettings())


def test_what_nearly_all_prompts_say_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    things = ["sky", "sea", "grass", "rose", "truth", "lie", "paris", "rome", "study", "rumour"]
    pairs = [PreferencePair(f"what color is the {thing}", "blue", "red") for thing in things]
    frame = frame_of(tokenizer, pairs, FitSettings())
    prompt = prompt_of(tokenizer, pairs[2].prompt)
    content = candidates(tokenizer, prompt, FitSettings(), frame)
    assert said(tokenizer, prompt, content).strip() == "grass"
    assert frame_of(tokenizer, pairs, FitSettings(max_frequency=1)) == frozenset()
    assert frame_of(tokenizer, pairs[:9], FitSettings()) == frozenset()
    # A prompt that is all frame keeps its tokens.
    prompt = prompt_of(tokenizer, "what color is")
    assert said(tokenizer, prompt, candidates(tokenizer, prompt, FitSettings(), frame)) == (
        "what color is"
    )


def test_the_frame_of_messages_is_what_they_say() -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    parts = [{"type": "text", "text": "what is"}]
    pairs = [PreferencePair([{"role": "user", "content": parts}], "blue", "red")] * 10
    decoded = {tokenizer.decode([token]) for token in frame_of(tokenizer, pairs, FitSettings())}
    assert {" is"} <= decoded
    assert not decoded & {"[", "]"}


def test_what_the_template_writes_is_left_out() -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    messages = [
        {"role": "system", "content": "user"},  # as a header would say
        {"role": "user", "content": "  the sky is "},
        {"role": "assistant", "content": "a sea"},
        {"role": "user", "content": "what is"},
    ]
    prompt = prompt_of(tokenizer, messages)
    assert "[user]" in tokenizer.decode(prompt.ids.prompt_ids)
    content = candidates(tokenizer, prompt, FitSettings())
    assert said(tokenizer, prompt, content) == ("userthe sky isa seawhat is")
    with_template = candidates(tokenizer, prompt, FitSettings(template_tokens=True))
    assert with_template == list(range(len(prompt.ids.prompt_ids)))


def test_a_turn_that_says_nothing() -> None:
    """As one that calls a tool."""
    template = TEMPLATE.replace("m.content |", "(m.content or '') |")
    tokenizer = tiny_tokenizer(chat_template=template)
    turns = [("user", "study says blue"), ("assistant", None), ("user", "what color is the sky")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = prompt_of(tokenizer, messages)
    content = candidates(tokenizer, prompt, FitSettings())
    assert said(tokenizer, prompt, content) == "study sayswhat color is the sky"
    pairs = [prompt.pair] * 10
    assert frame_of(tokenizer, pairs, FitSettings()) == set(
        tokenizer("study says blue what color is the sky", add_special_tokens=False).input_ids
    )


def test_a_template_that_puts_the_system_prompt_into_the_first_turn() -> None:
    tokenizer = tiny_tokenizer(
        chat_template=(  # as Gemma's does
            "{{ bos_token }}{% if messages[0].role == 'system' %}"
            "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
            "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
            "{% for m in rest %}<{{ 'model' if m.role == 'assistant' else m.role }}>"
            "{{ first if loop.first else '' }}{{ m.content | trim }}\n{% endfor %}<model>"
        )
    )
    messages = [
        {"role": "system", "content": "truth"},
        {"role": "user", "content": " the sky is\n"},
        {"role": "assistant", "content": "blue"},  # an answer
        {"role": "user", "content": "a sea"},
    ]
    prompt = prompt_of(tokenizer, messages)
    content = candidates(tokenizer, prompt, FitSettings())
    assert said(tokenizer, prompt, content) == "truththe sky isa sea"


def test_an_answer_that_is_begun_is_content() -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    messages = [
        {"role": "user", "content": "what color"},
        {"role": "assistant", "content": "it is"},
    ]
    prompt = prompt_of(tokenizer, messages)
    content = content_positions(tokenizer, prompt)
    assert said(tokenizer, prompt, content) == "what colorit is"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }} ({{ m.content | length }}){% endfor %}",
    ],
)
def test_a_template_that_changes_contents_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    prompt = prompt_of(tokenizer, [{"role": "user", "content": "what is"}])
    with pytest.raises(ValueError, match="template_tokens=True"):
        candidates(tokenizer, prompt, FitSettings())
    assert candidates(tokenizer, prompt, FitSettings(template_tokens=True))


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("chat", [False, True])
def test_images_and_what_is_written_around_them(family: str, chat: bool) -> None:
    model, processor = tiny_vlm(family)
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    text = "what color is the sky"
    prompt: Any = f"{processor.image_token} {text}"
    if chat:
        prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f" {text}"}]}
        ]
    pair = PreferencePair(prompt, "blue", "red", images=(image,))
    [[encoded]] = prompt_groups(DecoderView.of(model), processor, [(0, pair)], None)
    assert encoded.captured is not None
    allowed = candidates(processor, encoded, FitSettings())
    words = [place for place in allowed if encoded.modality[place] == "text"]
    assert said(processor.tokenizer, encoded, words).strip() == text
    [grid] = encoded.captured.images
    with_pixels = [p for p, box in zip(grid.token_positions, grid.boxes, strict=True) if box.any()]
    assert [place for place in allowed if place not in words] == with_pixels
