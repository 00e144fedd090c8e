from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.vision import encode_image_pair
from tests.models import tiny_tokenizer
from tests.vision_models import VISION_FAMILIES, tiny_vlm

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color"}]}


def decoded(processor: Any, ids: tuple[int, ...]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_placeholder_in_a_string(family: str) -> None:
    _, processor = tiny_vlm(family)
    prompt = f"the {processor.image_token} sky is"
    pair = PreferencePair(prompt, "blue", "red rose", images=(IMAGE,))
    encoded = encode_image_pair(processor, pair)
    whole = processor(text=[f"{prompt} red rose"], images=[IMAGE])["input_ids"][0]
    assert encoded.pair.prompt_ids + encoded.pair.rejected_ids == tuple(whole)
    assert decoded(processor, encoded.pair.chosen_ids) == " blue"
    assert decoded(processor, encoded.pair.rejected_ids) == " red rose"
    assert decoded(processor, encoded.pair.prompt_ids).endswith(" sky is")
    [expansion] = encoded.expansions
    assert expansion in decoded(processor, encoded.pair.prompt_ids)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_messages(family: str) -> None:
    """As the processor's own chat template and call, with nothing between prompt and answer."""
    _, processor = tiny_vlm(family)
    pair = PreferencePair([QUESTION], "blue", "red", images=(IMAGE,))
    encoded = encode_image_pair(processor, pair)
    expected = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, QUESTION["content"][1]]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )["input_ids"][0]
    assert encoded.pair.prompt_ids == tuple(expected)
    assert decoded(processor, encoded.pair.chosen_ids) == "blue"


def test_two_images_in_their_order() -> None:
    _, processor = tiny_vlm("qwen2_vl")
    content = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"}]
    small = IMAGE[:16, :24]
    pair = PreferencePair([{"role": "user", "content": content}], "a", "b", images=(small, IMAGE))
    encoded = encode_image_pair(processor, pair)
    assert encoded.inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 6, 10]]
    assert [image.size for image in encoded.images] == [(24, 16), (40, 24)]
    assert [text.count("<|image_pad|>") for text in encoded.expansions] == [6, 15]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "see"}, {"role": "user", "content": "what color"}],
        [
            {"role": "system", "content": "see"},
            {"role": "user", "content": [{"type": "text", "text": "what color"}]},
        ],
    ],
)
def test_messages_without_image_parts_get_them_at_the_first_user_turn(messages: list) -> None:
    _, processor = tiny_vlm("llava")
    encoded = encode_image_pair(processor, PreferencePair(messages, "a", "b", images=(IMAGE,)))
    explicit = [{"role": "system", "content": [{"type": "text", "text": "see"}]}, QUESTION]
    expected = encode_image_pair(processor, PreferencePair(explicit, "a", "b", images=(IMAGE,)))
    assert encoded.pair == expected.pair
    assert "see\nuser:<image>" in decoded(processor, encoded.pair.prompt_ids)
    assert messages[1]["content"] in ("what color", [{"type": "text", "text": "what color"}])


def test_unfinished_assistant_turn_is_continued() -> None:
    _, processor = tiny_vlm("llava")
    answer = {"role": "assistant", "content": "it is"}
    encoded = encode_image_pair(
        processor, PreferencePair([QUESTION, answer], " blue", " red", images=(IMAGE,))
    )
    assert decoded(processor, encoded.pair.prompt_ids).endswith("assistant:it is")
    assert decoded(processor, encoded.pair.chosen_ids) == " blue"


def test_trailing_space_moves_to_the_continuation() -> None:
    _, processor = tiny_vlm("qwen2_vl")
    image = processor.image_token
    ids = [
        encode_image_pair(processor, PreferencePair(prompt, "blue", "red", images=(IMAGE,))).pair
        for prompt in (f"{image} the sky is", f"{image} the sky is ")
    ]
    assert ids[0] == ids[1]


def test_bos_of_the_template_is_not_doubled() -> None:
    _, processor = tiny_vlm("gemma3")
    pair = PreferencePair([QUESTION], "blue", "red", images=(IMAGE,))
    without = encode_image_pair(processor, pair).pair
    processor.chat_template = "<bos>" + processor.chat_template
    assert encode_image_pair(processor, pair).pair == without
    bos = processor.tokenizer.bos_token_id
    assert without.prompt_ids.count(bos) == 1


def test_appended_eos_is_left_out() -> None:
    _, processor = tiny_vlm("llava")
    pair = PreferencePair("the <image> sky is", "blue", "red", images=(IMAGE,))
    expected = encode_image_pair(processor, pair).pair
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert encode_image_pair(processor, pair).pair == expected


@pytest.mark.parametrize(
    ("prompt", "n_images", "message"),
    [
        ("the sky is", 1, r"0 image placeholders \(<image>\) for 1 images: write it where the"),
        ("<image> sky", 2, r"1 image placeholders \(<image>\) for 2 images: write it once for ea"),
        ("<image> <image> sky", 1, "2 image placeholders .* for 1 images"),
        ([QUESTION], 2, "1 image parts for 2 images"),
        ([{"role": "system", "content": "see"}], 1, "no user turn that could hold the image"),
    ],
)
def test_places_and_images_differ_in_number(prompt: Any, n_images: int, message: str) -> None:
    _, processor = tiny_vlm("llava")
    with pytest.raises(ValueError, match=message):
        encode_image_pair(processor, PreferencePair(prompt, "a", "b", images=(IMAGE,) * n_images))


def test_template_that_drops_images() -> None:
    _, processor = tiny_vlm("llava")
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template writes 0 image placeholders"):
        encode_image_pair(processor, PreferencePair([QUESTION], "a", "b", images=(IMAGE,)))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_place_without_an_image(family: str) -> None:
    """As text it would be an embedding that no image filled."""
    _, processor = tiny_vlm(family)
    for prompt in (f"the {processor.image_token} sky", [QUESTION]):
        with pytest.raises(ValueError, match=r"has a place for an image .* no image is given"):
            encode_pair(processor, PreferencePair(prompt, "a", "b"))
    text_only = [{"role": "user", "content": [{"type": "text", "text": "what color"}]}]
    ids = encode_pair(processor, PreferencePair(text_only, "a", "b"))
    assert decoded(processor, ids.prompt_ids) == "user:what color\nassistant:"


def test_a_tokenizer_takes_no_images() -> None:
    pair = PreferencePair("the <image> sky", "a", "b", images=(IMAGE,))
    with pytest.raises(ValueError, match=r"TokenizersBackend takes text only: .*load_processor"):
        encode_image_pair(tiny_tokenizer(), pair)


def test_merge_across_the_boundary_is_an_error() -> None:
    _, processor = tiny_vlm("llava")
    pair = PreferencePair("<image> so t", "he sky", "zz", images=(IMAGE,))
    with pytest.raises(ValueError, match="merges the end of the prompt"):
        encode_image_pair(processor, pair, separator="")


def test_missing_file_names_path_and_reason() -> None:
    _, processor = tiny_vlm("llava")
    pair = PreferencePair("<image> sky", "a", "b", images=("/nowhere/sky.png",))
    with pytest.raises(ValueError, match=r"'/nowhere/sky\.png' does not open: no such file"):
        encode_image_pair(processor, pair)
