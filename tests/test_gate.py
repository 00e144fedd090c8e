import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.decoder import DecoderView, prompt_lengths
from grains_ext.demo import vision_world
from grains_ext.demo.vision_run import load_vision_model
from grains_ext.pairs import PreferencePair
from grains_ext.scoring import pad_batch, position_ids_of
from grains_ext.steering import SteeringVectors
from grains_ext.steering.gate import Gate, fit_gate, score
from tests.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from tests.test_apply import INPUT_IDS, random_vectors
from tests.vision_models import tiny_vlm

NEW = {"max_new_tokens": 4, "min_new_tokens": 4}
WORDS = ("sky", "sea", "grass", "rose", "blue", "green", "red", "white", "color", "home", "note")


def texts(ending: str, n: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (n, 6), generator=generator).tolist()
    lengths = torch.randint(2, 7, (n,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in row[:length]) + ending
        for row, length in zip(picks, lengths, strict=True)
    ]


def halfway_gate(model: Any, ids: torch.Tensor, when: str = "prompt", **inputs: Any) -> Gate:
    """One that the last token of row 0 opens, and that of row 1 does not."""
    with torch.no_grad(), DecoderView.of(model).capture([0], positions=-1) as captured:
        model(ids, **inputs)
    first, second = captured[0]
    direction, middle = first - second, (first + second) / 2
    return Gate(0, direction, 0.0, "probe", middle, when)


@given(scale=st.floats(0.01, 100), kind=st.sampled_from(["cosine", "probe"]))
def test_scores(scale: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator)
    direction, center = torch.randn(2, 8, generator=generator)
    found = score(scale * hidden, direction, scale * center, kind)
    assert found.shape == (3, 5)
    shifted = scale * (hidden - center)
    if kind == "cosine":
        expected = torch.cosine_similarity(shifted, direction, dim=-1)
    else:
        expected = shifted @ direction
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert score(center, direction, center, kind) == 0


@torch.no_grad()
def test_decided_at_the_prompts_end_and_held() -> None:
    model = tiny_model("llama")
    plain = model.generate(INPUT_IDS, **NEW)
    vectors = random_vectors()
    with vectors.applied(model, 1.5):
        steered = model.generate(INPUT_IDS, **NEW)
    assert (steered != plain).any(-1).all()
    gated = vectors.with_gate(halfway_gate(model, INPUT_IDS))
    static = {"cache_implementation": "static", "disable_compile": True}
    with gated.applied(model, 1.5) as handle:
        assert handle.decisions == {}
        for options in ({}, static):
            found = model.generate(INPUT_IDS, **options, **NEW)
            assert handle.decisions[0].tolist() == [True, False]
            assert torch.equal(found[0], steered[0])
            assert torch.equal(found[1], plain[1])
        # The next prompt decides anew.
        model.generate(INPUT_IDS.flip(0), **NEW)
        assert handle.decisions[0].tolist() == [False, True]
        for row in (0, 1):
            alone = model.generate(INPUT_IDS[row : row + 1], **NEW)
            assert torch.equal(alone[0], found[row])
        beams = {"num_beams": 3, "num_return_sequences": 2}
        found = model.generate(INPUT_IDS, **beams, **NEW)
        assert handle.decisions[0].tolist() == [True] * 3 + [False] * 3
    assert torch.equal(model.generate(INPUT_IDS, **beams, **NEW)[2:], found[2:])
    with vectors.applied(model, 1.5):
        assert torch.equal(model.generate(INPUT_IDS, **beams, **NEW)[:2], found[:2])


@torch.no_grad()
def test_told_prompt_lengths_and_chunks() -> None:
    """The state at the prompt's end decides, wherever the forwards are cut."""
    model = tiny_model("llama")
    vectors = random_vectors()
    gated = vectors.with_gate(halfway_gate(model, INPUT_IDS))
    with gated.applied(model, 1.5) as handle:
        expected = model.generate(INPUT_IDS, **NEW)
        handle.prompt_length = INPUT_IDS.shape[1]
        for options in ({}, {"use_cache": False}):
            assert torch.equal(model.generate(INPUT_IDS, **options, **NEW), expected)
        model.generate(INPUT_IDS, prefill_chunk_size=4, **NEW)
        assert handle.decisions[0].tolist() == [True, False]
        handle.prompt_length = None
        # Prompt and continuation in one forward, with prompts that end in different columns.
        longer = torch.tensor([[*INPUT_IDS[0], 7, 8], [4, *INPUT_IDS[1], 9]])
        with prompt_lengths(model, [6, 7]):
            model(longer)
        assert handle.decisions[0][0]
        cache = model(INPUT_IDS).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match=r"decided on a prompt of 2 rows, and 1 rows"):
            model(INPUT_IDS[:1, :1], past_key_values=cache)


@torch.no_grad()
def test_padding() -> None:
    model = tiny_model("llama")
    rows = [(1, 20, 30, 40, 50), (1, 21, 31)]
    left, mask = pad_batch(rows, pad_id=3)
    inputs = {"attention_mask": mask, "position_ids": position_ids_of(mask)}
    gate = halfway_gate(model, left, **inputs)
    with random_vectors().with_gate(gate).applied(model) as handle:
        model(left, **inputs)
        assert handle.decisions[0].tolist() == [True, False]
        right, mask = pad_batch(rows[::-1], pad_id=3, side="right")
        model(right, attention_mask=mask)
        assert handle.decisions[0].tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_each_token_by_itself(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    view = DecoderView.of(model)
    gate = halfway_gate(model, INPUT_IDS, when="token")
    vectors = random_vectors([1]).with_gate(gate)
    with (
        view.capture([0, 1]) as before,
        vectors.applied(model) as handle,
        view.capture([1]) as after,
    ):
        model(INPUT_IDS)
        moved = (before[1] != after[1]).any(-1)
        assert gate.center is not None
        passes = score(before[0], gate.direction, gate.center, "probe") > 0
        assert torch.equal(moved, passes)
        assert passes.any()
        assert not passes.all()
        assert handle.decisions == {}
    with vectors.applied(model, 2.0) as handle:
        cached = model.generate(INPUT_IDS, **NEW)
        assert torch.equal(model.generate(INPUT_IDS, use_cache=False, **NEW), cached)
    with (
        random_vectors([1]).with_gate(gate).applied(model, positions="last"),
        view.capture([1]) as c,
    ):
        model(INPUT_IDS)
    assert not torch.equal(c[1], before[1])


def one_token_gate(model: Any, token: int) -> Gate:
    """One that this token passes, wherever it is, in a block that looks at no other token."""
    states = model.model.embed_tokens.weight.detach()
    return Gate(0, states[token], 0.99, "cosine", when="any")


@torch.no_grad()
def test_any_token_of_the_prompt_opens_it_and_it_holds() -> None:
    model = tiny_model("llama")
    for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        part.weight.zero_()  # the first block gives what it got
    inside, outside, first = (1, 20, 30, 40, 50), (1, 21, 31, 41, 51), (30, 22, 32, 42, 52)
    ids = torch.tensor([inside, outside, first])
    vectors = random_vectors([1, 2])
    gated = vectors.with_gate(one_token_gate(model, 30))
    plain = model.generate(ids, **NEW)
    with vectors.applied(model, 1.5):
        steered = model.generate(ids, **NEW)
    assert (steered != plain).any(-1).all()
    expected = [True, False, False]  # a first token does not count
    static = {"cache_implementation": "static", "disable_compile": True}
    with gated.applied(model, 1.5) as handle:
        for options in ({}, static, {"prefill_chunk_size": 2}, {"use_cache": False}):
            handle.prompt_length = None if options in ({}, static) else ids.shape[1]
            found = model.generate(ids, **options, **NEW)
            assert handle.decisions[0].tolist() == expected
            assert torch.equal(found[1:], plain[1:])
            if "prefill_chunk_size" not in options:  # the chunk before it is left alone
                assert torch.equal(found[0], steered[0])
        # What follows the prompt opens nothing.
        handle.prompt_length = 2
        model(ids)
        assert handle.decisions[0].tolist() == [False] * 3
        # Padding, whatever it is, counts as little as the first token behind it.
        handle.prompt_length = None
        for side in ("left", "right"):
            padded, mask = pad_batch([inside, outside[:3], first[:3]], 30, side)
            model(padded, attention_mask=mask, position_ids=position_ids_of(mask))
            assert handle.decisions[0].tolist() == expected
        padded, mask = pad_batch([inside, outside[:3], first[:3]], 30)
        model.generate(padded, attention_mask=mask, **static, **NEW)
        assert handle.decisions[0].tolist() == expected


@torch.no_grad()
def test_many_rows() -> None:
    """More than there is room for at first."""
    model = tiny_model("llama", num_hidden_layers=2)
    gate = halfway_gate(model, INPUT_IDS)
    ids = INPUT_IDS.repeat(600, 1)
    with random_vectors([0]).with_gate(gate).applied(model) as handle:
        model(ids[:, -1:])
        model(INPUT_IDS)
        assert handle.decisions[0].tolist() == [True, False]
        cache = model(ids).past_key_values
        assert handle.decisions[0].tolist() == [True, False] * 600
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", ["cosine", "probe"])
@pytest.mark.parametrize("when", ["prompt", "any", "token"])
def test_fitted_gate(kind: str, when: str) -> None:
    """Calibrated: of new outside prompts, about the chosen share opens it, and most inside ones."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    inside, outside = texts(" grandma says", 60, 1), texts(" study shows", 120, 2)
    gate = fit_gate(
        model, tokenizer, inside, outside, block=1, kind=kind, when=when, false_positive_rate=0.1
    )
    assert (gate.block, gate.kind, gate.when) == (1, kind, when)
    torch.testing.assert_close(gate.direction.norm(), torch.tensor(1.0))
    assert gate.metadata["held_out_outside_open"] <= 0.1
    assert (gate.metadata["n_inside"], gate.metadata["n_outside"]) == (60, 120)
    again = fit_gate(
        model, tokenizer, inside, outside, block=1, kind=kind, when=when, false_positive_rate=0.1
    )
    assert torch.equal(again.direction, gate.direction)
    assert again.threshold == gate.threshold
    if when != "prompt":
        return  # their rate: see the next test
    assert gate.metadata["held_out_inside_open"] > 0.7
    vectors = random_vectors([1, 2]).with_gate(gate)
    opened = []
    for group in (texts(" grandma says", 100, 3), texts(" study shows", 100, 4)):
        ids = [tuple(tokenizer(text).input_ids) for text in group]
        batch, mask = pad_batch(ids, pad_id=3)
        with vectors.applied(model) as handle, torch.no_grad():
            model(batch, attention_mask=mask, position_ids=position_ids_of(mask))
            opened.append(float(handle.decisions[0].float().mean()))
    assert opened[0] > 0.7
    assert opened[1] < 0.22


@pytest.mark.parametrize("when", ["prompt", "any", "token"])
def test_calibration_holds_on_average(when: str) -> None:
    """Same distribution inside and outside: the share of new prompts let in is the rate.

    With "token", of prompts of which any token is let in; the first one does not count.
    """
    vectors = random_vectors([0])
    model, tokenizer = tiny_model("llama", num_hidden_layers=1), tiny_tokenizer()
    shares = []
    for seed in range(8):
        pool = texts(" home", 150, 100 + seed)
        gate = fit_gate(
            model,
            tokenizer,
            pool[:10],
            pool[10:110],
            block=0,
            when=when,
            false_positive_rate=0.2,
            seed=seed,
        )
        ids, mask = pad_batch([tuple(tokenizer(t).input_ids) for t in pool[110:]], pad_id=3)
        with (
            torch.no_grad(),
            DecoderView.of(model).capture([0]) as captured,
            vectors.with_gate(gate).applied(model) as handle,
        ):
            model(ids, attention_mask=mask, position_ids=position_ids_of(mask))
        if when == "token":
            assert gate.center is not None
            scores = score(captured[0], gate.direction, gate.center, gate.kind)
            scores = scores.masked_fill(mask.cumsum(1) <= 1, -torch.inf)  # and the first token
            shares.append(float((scores > gate.threshold).any(1).float().mean()))
        else:
            shares.append(float(handle.decisions[0].float().mean()))
    assert 0.1 < sum(shares) / len(shares) < 0.3


def test_wrong_fits() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    some = texts("", 10, 0)
    with pytest.raises(ValueError, match=r"4 prompts inside and 38 outside .*got 10 and 10"):
        fit_gate(model, tokenizer, some, some, block=1)
    with pytest.raises(ValueError, match=r"same states at block 1"):
        fit_gate(model, tokenizer, ["q"] * 4, ["q"] * 40, block=1)
    with pytest.raises(ValueError, match=r"blocks \[9\] do not exist"):
        fit_gate(model, tokenizer, some, some, block=9)
    with pytest.raises(ValueError, match=r"false_positive_rate must be in \(0, 1\)"):
        fit_gate(model, tokenizer, some, some, block=1, false_positive_rate=0.0)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        fit_gate(model, tokenizer, some, some, block=1, kind="tree")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": -1}, "whole number from 0, got -1"),
        ({"kind": "x"}, "`kind` must be one of"),
        ({"when": "x"}, "`when` must be one of"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"direction": torch.zeros(3)}, "direction is zero"),
        ({"direction": torch.tensor([1.0, torch.nan, 0])}, "not finite"),
        ({"center": torch.ones(4)}, "center has 4 values, its direction 3"),
    ],
)
def test_wrong_gates(options: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"block": 0, "direction": torch.ones(3), "threshold": 0.0}
    with pytest.raises(ValueError, match=reason):
        Gate(**(given | options))


def test_gate_of_another_model() -> None:
    with pytest.raises(ValueError, match="different models"):
        random_vectors().with_gate(Gate(0, torch.ones(HIDDEN_SIZE + 1), 0.0))


# --- Prompts with images --------------------------------------------------------------------------


@cache
def vlm(family: str) -> Any:
    return tiny_vlm(family)


embedded = cache(load_vision_model)


def picture(bright: bool, seed: int) -> np.ndarray:
    low, high = (128, 256) if bright else (0, 128)
    return np.random.default_rng(seed).integers(low, high, (24, 40, 3), dtype=np.uint8)


def told_apart_by_pictures(processor: Any, bright: bool, n: int, seed: int) -> list[PreferencePair]:
    """Same words inside and outside."""
    prompts = [f"{text} {processor.image_token} what color is" for text in texts("", n, seed)]
    return [
        PreferencePair(prompt, "blue", "red", images=(picture(bright, 100 * seed + i),))
        for i, prompt in enumerate(prompts)
    ]


def batch_of(processor: Any, pairs: Sequence[PreferencePair]) -> Any:
    return processor(
        text=[str(pair.prompt) for pair in pairs],
        images=[list(pair.images or ()) for pair in pairs],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_pictures_open_a_gate_and_leave_the_other_rows_alone(family: str) -> None:
    model, processor = vlm(family)
    inside = told_apart_by_pictures(processor, True, 10, 1)
    outside = told_apart_by_pictures(processor, False, 20, 2)
    gate = fit_gate(
        model,
        processor,
        [*inside[:-1], (inside[-1].prompt, inside[-1].images)],
        outside,
        block=1,
        false_positive_rate=0.1,
        max_batch_tokens=200,
    )
    assert gate.metadata["held_out_inside_open"] == 1.0
    new = [
        *told_apart_by_pictures(processor, True, 2, 3),
        *told_apart_by_pictures(processor, False, 2, 4),
    ]
    inputs = batch_of(processor, [new[0], new[2], new[1], new[3]])
    vectors = random_vectors([1, 2])
    plain = model.generate(**inputs, **NEW, output_logits=True, return_dict_in_generate=True)
    with vectors.applied(model, 1.5):
        steered = model.generate(**inputs, **NEW, output_logits=True, return_dict_in_generate=True)
    with vectors.with_gate(gate).applied(model, 1.5) as handle:
        found = model.generate(**inputs, **NEW, output_logits=True, return_dict_in_generate=True)
        assert handle.decisions[0].tolist() == [True, False, True, False]
    for row, expected in enumerate((steered, plain, steered, plain)):
        for step in range(NEW["max_new_tokens"]):
            assert torch.equal(found.logits[step][row], expected.logits[step][row])
    assert (steered.logits[0] != plain.logits[0]).any(-1).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_states_of_mixed_prompts_are_those_of_the_model(family: str) -> None:
    """Text, several pictures and one, in batches: a token gate's largest scores by hand."""
    model, processor = vlm(family)
    image = processor.image_token
    inside = told_apart_by_pictures(processor, True, 6, 1)
    prompts: list[Any] = [
        *texts("", 4, 5),
        *told_apart_by_pictures(processor, False, 4, 2),
        *(
            (f"{image} the {image} sea {n}", [picture(False, n), picture(True, n)])
            for n in range(4)
        ),
    ]
    gate = fit_gate(
        model, processor, inside, prompts, block=1, when="token", false_positive_rate=0.2, seed=3
    )
    assert gate.center is not None
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    fitted, largest = [], []
    for place, index in enumerate(order):
        each = prompts[index]
        pair = each if isinstance(each, PreferencePair) else None
        text, images = (pair.prompt, pair.images) if pair else (each, None)
        if isinstance(each, tuple):
            text, images = each
        inputs = processor(text=[text], images=list(images or ()) or None, return_tensors="pt")
        with DecoderView.of(model).capture([1]) as captured:
            model(**inputs)
        states = captured[1][0, 1:]
        if place < 6:
            fitted.append(states)
        else:
            largest.append(score(states, gate.direction, gate.center, gate.kind).max())
    torch.testing.assert_close(gate.center, torch.cat(fitted).mean(0), rtol=1e-4, atol=1e-4)
    rank = math.ceil(7 * 0.8)
    assert gate.threshold == pytest.approx(
        float(torch.stack(largest).sort().values[rank - 1]), 1e-4
    )


def test_prompts_with_images_that_do_not_encode() -> None:
    model, processor = vlm("llava")
    good = told_apart_by_pictures(processor, True, 20, 1)
    missing = [*good[:3], ("the <image> sky", ["missing.png"])]
    with pytest.raises(ValueError, match=r"inside_prompts: pair 3: .*'missing.png' does not open"):
        fit_gate(model, processor, missing, good, block=1, false_positive_rate=0.1)
    with pytest.raises(ValueError, match=r"outside_prompts: pair 2: the prompt is empty"):
        fit_gate(
            model, processor, good, [*good[:2], " ", *good[3:]], block=1, false_positive_rate=0.1
        )
    with pytest.raises(ValueError, match=r"outside_prompts: pair 0: .* takes text only: pass the"):
        fit_gate(
            model, processor.tokenizer, texts("", 4, 0), good, block=1, false_positive_rate=0.1
        )
    with pytest.raises(ValueError, match=r"inside_prompts: a prompt with images is \(prompt, \["):
        fit_gate(model, processor, [("a", "b.png")] * 4, good, block=1, false_positive_rate=0.1)
    with pytest.raises(ValueError, match="inside_prompts must be several prompts"):
        fit_gate(model, processor, "the sky", good, block=1)


@pytest.mark.parametrize("when", ["prompt", "any", "token"])
@torch.no_grad()
def test_the_embedded_model_with_pictures(when: str) -> None:
    """Hints open the gate, captions do not: neither pictures nor cue words were seen before."""
    model, processor = embedded()
    inside, outside = (vision_world.vision_pairs("fit", 40, 0, kind) for kind in ("mix", "caption"))
    gate = fit_gate(model, processor, inside, outside, block=1, when=when, false_positive_rate=0.05)
    new = [
        pair
        for pairs in zip(
            *(vision_world.vision_pairs("test", 20, 1, kind) for kind in ("mix", "caption")),
            strict=True,
        )
        for pair in pairs
    ]
    inputs = batch_of(processor, new)
    vectors = SteeringVectors({1: torch.randn(model.config.text_config.hidden_size)})
    plain = model(**inputs).logits[:, -1]
    with vectors.with_gate(gate).applied(model, 0.5):
        found = model(**inputs).logits[:, -1]
    moved = (found != plain).any(-1)
    assert moved[::2].float().mean() > 0.9
    assert moved[1::2].float().mean() < 0.2
