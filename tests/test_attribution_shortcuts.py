"""The work that is left out changes nothing, and is not left out where a model needs it."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grains_ext.attribution import Attribution, attribute
from grains_ext.attribution import evaluator as evaluator_module
from grains_ext.attribution.evaluator import Evaluator
from grains_ext.attribution.forward import NO_SHORTCUTS, Shortcuts
from grains_ext.attribution.prepare import Prepared
from grains_ext.attribution.shortcuts import head_over, last_block_at
from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from tests.models import FAMILIES, scale_weights, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = "note the sky is green q what is the color of the sky"
PAIRS = [
    PreferencePair(PROMPT, "green is", "blue it is"),
    PreferencePair(PROMPT, "green", "blue"),
    PreferencePair(PROMPT + " a", "the sky is red", "the sky is of a rose"),
]
ALL = [
    Shortcuts(tree=tree, trim=trim, prefix=prefix)
    for tree, trim, prefix in itertools.product((True, False), repeat=3)
]


def scores_with(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, shortcuts: Shortcuts, **options: Any
) -> list[Attribution]:
    with monkeypatch.context() as patch:
        patch.setattr(evaluator_module, "_HONOURED", {})
        patch.setattr(Evaluator, "_honoured", lambda self, prepared: shortcuts)
        return run(model, **options)


def run(model: nn.Module, pairs: list[PreferencePair] = PAIRS, **options: Any) -> list[Attribution]:
    fixed: dict[str, Any] = {"method": "riemann_middle", "n_steps": 3, "tolerance": 10.0}
    return attribute(model, TOKENIZER, pairs, progress=False, **fixed | options)


@pytest.mark.parametrize("family", FAMILIES)
def test_shortcuts_change_nothing(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = tiny_model(family)
    options: dict[str, Any] = {"attributed_span": (9, 100)}
    plain = scores_with(monkeypatch, model, NO_SHORTCUTS, **options)
    for shortcuts in ALL:
        results = scores_with(monkeypatch, model, shortcuts, **options)
        for a, b in zip(results, plain, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)
            assert a.f_input == pytest.approx(b.f_input, abs=1e-5)
            assert a.f_baseline == pytest.approx(b.f_baseline, abs=1e-5)


def found_on(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Shortcuts]:
    """What an attribution run finds the model to honour."""
    found = []
    original = Evaluator._honoured

    def spied(self: Evaluator, prepared: Prepared) -> Shortcuts:
        found.append(original(self, prepared))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_honoured", spied)
        run(model, **options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_all_of_them(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    found = found_on(tiny_model(family), monkeypatch, attributed_span=(9, 100))
    assert found == [Shortcuts()] * 2  # once for a tree, once for one row


def test_found_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert len(found_on(model, monkeypatch)) == 2
    assert found_on(model, monkeypatch) == []


class IgnoresMasks(nn.Module):
    """A model whose attention takes no mask from outside, as some backends' does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return self.module(attention_mask=attention_mask, **kwargs)


def test_a_model_that_ignores_the_mask_reads_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    wrapped = IgnoresMasks(model)
    assert NO_SHORTCUTS in found_on(wrapped, monkeypatch)
    for a, b in zip(run(wrapped), run(model), strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)


class SeesPadding(IgnoresMasks):
    """Takes any mask, but in one layout only tells padding from tokens, as recurrent blocks do."""

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            first = kwargs["inputs_embeds"][:, :1]
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + (first == 0).all(-1, keepdim=True)
        return self.module(attention_mask=attention_mask, **kwargs)


def test_a_model_that_sees_padding_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    wrapped = SeesPadding(model)
    assert set(found_on(wrapped, monkeypatch)) == {NO_SHORTCUTS}
    for a, b in zip(run(wrapped), run(model), strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)


class CarriesOn(IgnoresMasks):
    """Takes any mask and hides no column by it: what stands before a token is carried on to it."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.module.get_input_embeddings()(input_ids)
        before = (inputs_embeds + 2e-3).cumsum(1)
        return self.module(inputs_embeds=inputs_embeds + 0.02 * before.sin(), **kwargs)


@pytest.mark.parametrize("kind", ["rwkv", "llama"])
def test_a_model_that_hides_no_padding_reads_rows_of_one_length_at_a_time(kind: str) -> None:
    model: nn.Module
    if kind == "llama":
        model = CarriesOn(tiny_model("llama"))
    else:
        sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["rwkv"](**sizes)).eval()
        scale_weights(model)
    pairs = [PreferencePair("the " + "sky " * n, "a", "blue is") for n in (8, 7)]
    pairs += [PreferencePair("the " + "sky " * n, "red", "blue") for n in (6, 5)]
    for pair, result in zip(pairs, run(model, pairs), strict=True):
        chosen, rejected = (  # one row each, alone in its call
            run(model, [pair], objective=name, max_batch_tokens=1)[0].scores
            for name in ("chosen", "rejected")
        )
        np.testing.assert_allclose(result.scores, chosen - rejected, rtol=1e-4, atol=1e-5)


def test_a_model_that_reads_ids_beside_their_embeddings_is_refused() -> None:
    model: Any = tiny_model("llama")

    def also_by_id(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("input_ids") is not None:
            ids = kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = model.model.embed_tokens(ids) + ids[..., None] / 128
        return args, kwargs

    model.model.register_forward_pre_hook(also_by_id, with_kwargs=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM computes other logits from a prompt's"):
        run(model)


class RefusesCaches(IgnoresMasks):
    def forward(self, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise IndexError("another kind of cache")
        return self.module(**kwargs)


def test_a_model_with_a_cache_of_its_own_reads_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    wrapped = RefusesCaches(model)
    assert set(found_on(wrapped, monkeypatch, attributed_span=(9, 100))) == {
        Shortcuts(prefix=False)
    }


class RefusesMasks(IgnoresMasks):
    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None or attention_mask.ndim == 4:
            raise TypeError("only padding masks")
        return self.module(attention_mask=attention_mask, **kwargs)


def test_a_model_that_refuses_the_mask_reads_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(found_on(RefusesMasks(tiny_model("gpt2")), monkeypatch)) == {NO_SHORTCUTS}


def test_a_window_that_the_pair_leaves_keeps_the_model_s_own_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = tiny_model("mistral", sliding_window=6)
    assert found_on(narrow, monkeypatch) == []
    plain = scores_with(monkeypatch, narrow, NO_SHORTCUTS)
    for a, b in zip(run(narrow), plain, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
    wide = run(tiny_model("mistral", sliding_window=None))
    assert np.abs(wide[0].scores - plain[0].scores).max() > 1e-3  # the window matters here


def test_a_block_with_an_unknown_argument_is_not_cut_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")

    def with_more(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"bias_per_column": torch.zeros(3)}

    model.model.layers[-1].register_forward_pre_hook(with_more, with_kwargs=True)
    assert set(found_on(model, monkeypatch)) == {Shortcuts(trim=False)}


def test_steering_hooks_are_attributed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    direction = torch.randn(32)

    def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + direction

    with torch.no_grad():
        before = run(model)
    hooks = [block.register_forward_hook(steer) for block in model.model.layers]
    fast, plain = run(model), scores_with(monkeypatch, model, NO_SHORTCUTS)
    for a, b, c in zip(fast, plain, before, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        assert np.abs(a.scores - c.scores).max() > 1e-3
    for hook in hooks:
        hook.remove()


def test_the_model_s_parts_are_left_as_they_were() -> None:
    model = tiny_model("gpt2")
    decoder = DecoderView.of(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    with (
        pytest.raises(RuntimeError, match="planted"),
        last_block_at(decoder, 1),
        head_over(decoder, torch.tensor([3, 5])),
    ):
        raise RuntimeError("planted")
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(decoder.head)
    assert not decoder.blocks[-1]._forward_pre_hooks


def test_a_head_of_another_kind_is_left_alone() -> None:
    decoder = DecoderView.of(tiny_model("llama"))
    wrapped = nn.Sequential(decoder.head)
    other = DecoderView(**{**vars(decoder), "head": wrapped})
    with head_over(other, torch.tensor([1])) as sliced:
        assert not sliced
        assert wrapped(torch.zeros(1, 32)).shape == (1, 128)
    with head_over(decoder, torch.tensor([1, 7])) as sliced:
        assert sliced
        assert decoder.head(torch.zeros(1, 32)).shape == (1, 2)
