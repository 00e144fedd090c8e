"""What the first block makes of a path's points is made of its ends, where its norm allows it."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grains_ext.attribution import Attribution, attribute, first_block
from grains_ext.attribution import evaluator as evaluator_module
from grains_ext.attribution.evaluator import Evaluator
from grains_ext.attribution.first_block import (
    BETWEEN,
    Stretch,
    ends_of,
    products_from_ends,
    readers_of,
)
from grains_ext.attribution.forward import Shortcuts
from grains_ext.decoder import DecoderView
from grains_ext.pairs import PreferencePair
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    PreferencePair("note the sky is green q what is the color of the sky", "green is", "blue it"),
    PreferencePair("the rose", "red of a", "white"),
]
READ = {
    "llama": ("q_proj", "k_proj", "v_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "fc1"),  # attention and MLP share a norm
    "phi3": ("qkv_proj",),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),  # a norm for each
    "olmo": ("q_proj", "k_proj", "v_proj"),  # a norm without weights
    "olmo2": ("q_proj", "k_proj", "v_proj"),  # no norm before them
}


def run(model: nn.Module, **options: Any) -> list[Attribution]:
    fixed: dict[str, Any] = {"method": "riemann_middle", "n_steps": 3, "tolerance": 10.0}
    return attribute(model, TOKENIZER, PAIRS, progress=False, **fixed | options)


def without_ends(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[Attribution]:
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_find_readers", lambda self, prepared: ())
        return run(model)


def what_is_known(model: nn.Module) -> list[Shortcuts]:
    [known] = evaluator_module._HONOURED[model].values()
    return list(known.values())


def assert_same(found: list[Attribution], expected: list[Attribution]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        assert a.f_input == pytest.approx(b.f_input, abs=1e-5)


@pytest.mark.parametrize("family", READ)
def test_matrices_that_read_the_block_s_input_are_multiplied_with_the_ends_alone(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = tiny_model(family)
    expected = without_ends(monkeypatch, model)
    run(model)  # what it honours is known from here on
    block = DecoderView.of(model).blocks[0]
    matrices = {
        module: name.rpartition(".")[-1]
        for name, module in block.named_modules()
        if name.endswith(READ[family])
    }
    assert tuple(matrices.values()) == READ[family]
    products: list[nn.Module] = []
    with monkeypatch.context() as patch:
        for kind in {type(module) for module in matrices}:
            original = kind.forward

            def spied(self: Any, x: Tensor, original: Any = original) -> Tensor:
                if self in matrices and x.ndim > 1:  # biases of a norm go through them as well
                    products.append(self)
                return original(self, x)

            patch.setattr(kind, "forward", spied)
        assert_same(run(model), expected)
    # To see which they are, a forward of the block as it is.
    assert [matrices[module] for module in products] == list(READ[family])
    assert not any("forward" in vars(module) for module in model.modules())


class Block(nn.Module):
    def __init__(self, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        self.norm, self.matrix = norm, nn.Linear(8, 5, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        read: Tensor = self.matrix(self.norm(hidden_states))
        return read


@settings(max_examples=20)
@given(
    st.sampled_from(["rms", "layer"]),
    st.booleans(),
    st.floats(0, 1),
    st.floats(-3, 1),
    st.integers(0, 2**31 - 1),
)
def test_products_and_their_derivatives_along_the_path(
    kind: str, bias: bool, alpha: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    norm = nn.RMSNorm(8, eps=1e-6) if kind == "rms" else nn.LayerNorm(8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0)
    block = Block(norm, bias).requires_grad_(False)
    start, end = 10**size * torch.randn(2, 3, 8)
    end[1] = start[1]
    decoder: Any = type("Decoder", (), {"blocks": [block]})
    points = torch.stack([start, end, torch.lerp(start, end, BETWEEN)])
    readers = readers_of(decoder, lambda: block(points))
    ends = ends_of(decoder, readers, lambda: block(points))
    assert ends is not None
    assert ends.moving.tolist() == [True, False, True]

    alphas = torch.full((1, 3), alpha, requires_grad=True)
    exact_block = deepcopy(block).double()
    expected = exact_block((1 - alphas[..., None].double()) * start + alphas[..., None] * end)
    with products_from_ends(readers, [Stretch(ends, slice(0, 1), alphas)], (1, 4)):
        found = block(torch.zeros(1, 4, 8))[:, 1:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(1, 3, 5)
    (slope,) = torch.autograd.grad((found * weights).sum(), alphas)
    (exact,) = torch.autograd.grad((expected * weights).sum(), alphas)
    torch.testing.assert_close(slope, exact, rtol=1e-3, atol=1e-3)


def test_an_input_off_the_line_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def squash(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (torch.tanh(args[0]), *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(squash, with_kwargs=True)
    found: list[Any] = []
    original = evaluator_module.ends_of

    def spied(*args: Any) -> Any:
        found.append(original(*args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluator_module, "ends_of", spied)
        results = run(model)
    assert set(found) == {None}
    assert_same(results, without_ends(monkeypatch, model))


def test_a_norm_that_something_else_reads_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = without_ends(monkeypatch, model)

    class Own(nn.Linear):
        """Known by no name."""

    model.model.layers[0].self_attn.k_proj.__class__ = Own
    evaluator_module._HONOURED.pop(model)
    assert_same(run(model), expected)
    assert set(what_is_known(model)) == {Shortcuts(ends=False)}


def test_a_hook_that_comes_later_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = run(model)
    hook = model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(
        lambda module, args: (args[0] + 1.0,)
    )
    after = run(model)
    assert_same(after, without_ends(monkeypatch, model))
    assert np.abs(after[0].scores - before[0].scores).max() > 1e-3
    hook.remove()
    assert_same(run(model), before)


def test_a_call_that_fails_before_it_begins_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory may run out while what stands in for the matrices is made; the call is made again."""
    model = tiny_model("gpt_neox")  # two norms read the block's input
    expected = run(model)
    original = first_block._coefficients
    left = [2]

    def fails_once(*args: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("planted")
        return original(*args)

    monkeypatch.setattr(first_block, "_coefficients", fails_once)
    assert_same(run(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())
