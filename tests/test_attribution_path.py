"""Quadrature rules and baselines."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grains_ext.attribution.path import Baseline
from grains_ext.attribution.rules import RULES, quadrature
from grains_ext.decoder import DecoderView
from tests.models import tiny_model, tiny_tokenizer

PROMPT = (1, 40, 41, 42)  # BOS first
NO_BOS = (40, 41, 42)


def start_of(
    decoder: DecoderView, tokenizer: Any, prompt_ids: tuple[int, ...], baseline: str | Tensor
) -> Tensor:
    embeds = decoder.embed(torch.tensor([prompt_ids]))[0].detach()
    return Baseline(decoder, tokenizer, baseline).embeddings(prompt_ids, embeds)


@pytest.fixture(scope="module")
def decoder() -> DecoderView:
    return DecoderView.of(tiny_model("llama"))


@given(method=st.sampled_from(RULES), n_steps=st.integers(1, 200))
def test_quadrature_integrates_lines_exactly(method: str, n_steps: int) -> None:
    nodes, weights = quadrature(method, n_steps)
    assert nodes.shape == weights.shape == (n_steps,)
    assert np.all((nodes > 0) & (nodes < 1))
    assert np.all(np.diff(nodes) > 0)
    assert np.sum(weights) == pytest.approx(1)
    assert np.sum(weights * nodes) == pytest.approx(0.5)


@given(n_steps=st.integers(1, 12), data=st.data())
def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1(n_steps: int, data: st.DataObject) -> None:
    degree = data.draw(st.integers(0, 2 * n_steps - 1))
    nodes, weights = quadrature("gausslegendre", n_steps)
    assert np.sum(weights * nodes**degree) == pytest.approx(1 / (degree + 1))


def test_riemann_middle_is_the_midpoints() -> None:
    nodes, weights = quadrature("riemann_middle", 4)
    np.testing.assert_allclose(nodes, [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(weights, 0.25)


@pytest.mark.parametrize(
    ("method", "n_steps", "message"),
    [("simpson", 4, "method must be one of gausslegendre"), ("riemann_middle", 0, "at least 1")],
)
def test_quadrature_errors(method: str, n_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quadrature(method, n_steps)


@pytest.mark.parametrize(("name", "token_id"), [("bos", 1), ("pad", 3), ("unk", 0)])
def test_token_baselines_keep_a_leading_bos(decoder: DecoderView, name: str, token_id: int) -> None:
    table = decoder.embedding.weight
    start = start_of(decoder, tiny_tokenizer(), PROMPT, name)
    torch.testing.assert_close(start[0], table[1])
    torch.testing.assert_close(start[1:], table[token_id].expand(3, -1))
    start = start_of(decoder, tiny_tokenizer(), NO_BOS, name)
    torch.testing.assert_close(start, table[token_id].expand(3, -1))


def test_mean_baseline_is_over_the_tokenizers_tokens() -> None:
    decoder = DecoderView.of(tiny_model("llama", vocab_size=160))  # 32 rows are only padding
    start = start_of(decoder, tiny_tokenizer(), PROMPT, "mean")
    torch.testing.assert_close(start[1], decoder.embedding.weight[:128].mean(0))


def test_embeddings_are_as_the_model_takes_them() -> None:
    decoder = DecoderView.of(tiny_model("gemma2"))  # scales its embeddings by sqrt(D)
    start = start_of(decoder, tiny_tokenizer(), PROMPT, "bos")
    scaled = decoder.embed(torch.tensor([[1]]))[0, 0]
    torch.testing.assert_close(start, scaled.expand(4, -1))
    assert not torch.allclose(scaled, decoder.embedding.weight[1])


def test_tensor_baselines(decoder: DecoderView) -> None:
    tokenizer = tiny_tokenizer()
    one = torch.randn(32)
    start = start_of(decoder, tokenizer, PROMPT, one)
    torch.testing.assert_close(start[0], decoder.embedding.weight[1])
    torch.testing.assert_close(start[1:], one.expand(3, -1))
    each = torch.randn(4, 32)
    torch.testing.assert_close(start_of(decoder, tokenizer, PROMPT, each), each)
    with pytest.raises(ValueError, match="4 rows, the prompt 3 tokens"):
        start_of(decoder, tokenizer, NO_BOS, each)
    with pytest.raises(ValueError, match=r"D = 32.*\[16\]"):
        Baseline(decoder, tokenizer, torch.zeros(16))


def test_zero_warns_only_without_position_embeddings(
    decoder: DecoderView, recwarn: pytest.WarningsRecorder
) -> None:
    for family in ("gpt2", "opt"):
        Baseline(DecoderView.of(tiny_model(family)), tiny_tokenizer(), "zero")
    assert not recwarn
    with pytest.warns(UserWarning, match="without position embeddings"):
        start = start_of(decoder, tiny_tokenizer(), NO_BOS, "zero")
    assert torch.count_nonzero(start) == 0


def test_what_stands_in_for_a_missing_bos(decoder: DecoderView) -> None:
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    with pytest.warns(UserWarning, match=r"no BOS token: the baseline uses EOS \(id 2\)"):
        baseline = Baseline(decoder, tokenizer, "bos")
    assert baseline.name == "eos"
    start = baseline.embeddings(NO_BOS, decoder.embed(torch.tensor([NO_BOS]))[0])
    torch.testing.assert_close(start, decoder.embedding.weight[2].expand(3, -1))


@pytest.mark.parametrize(
    ("name", "message"), [("mask", "no such token"), ("noise", "must be one of bos, mean")]
)
def test_baseline_errors(decoder: DecoderView, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Baseline(decoder, tiny_tokenizer(), name)
