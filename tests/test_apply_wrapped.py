"""Steering of models that other packages have wrapped, moved or quantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grains_ext.evaluation import evaluate
from grains_ext.pairs import PreferencePair
from grains_ext.steering import fit_caa, fit_gradient
from grains_ext.steering.fold import fold
from grains_ext.steering.gate import fit_gate
from tests.models import tiny_model, tiny_tokenizer
from tests.test_apply import INPUT_IDS, check_blocks, random_vectors
from tests.test_gate import halfway_gate, texts

NEW = {"max_new_tokens": 4, "min_new_tokens": 4}
PLAIN = replace(random_vectors([0, 2]), normalize=False)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that the logits are afterwards what they were, bit for bit."""
    with torch.no_grad():
        before = model(INPUT_IDS).logits
        yield
        assert torch.equal(model(INPUT_IDS).logits, before)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@torch.no_grad()
def test_lora(positions: Any) -> None:
    """The same as the model with the adapter merged; adapters switch under the steering."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(deepcopy(model), config).eval()
    merged = deepcopy(adapted).merge_and_unload()
    vectors = random_vectors()
    with unchanged(adapted), vectors.applied(merged, positions=positions):
        expected, text = merged(INPUT_IDS).logits, merged.generate(INPUT_IDS, **NEW)
        with vectors.applied(adapted, positions=positions):
            torch.testing.assert_close(adapted(input_ids=INPUT_IDS).logits, expected)
            assert torch.equal(adapted.generate(input_ids=INPUT_IDS, **NEW), text)
            with adapted.disable_adapter(), vectors.applied(model, positions=positions):
                torch.testing.assert_close(adapted(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_training_an_adapter_under_steering() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model("llama"), config)
    with random_vectors([0]).applied(adapted):
        adapted(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@torch.no_grad()
def test_folding_below_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama"), config).eval()
    with unchanged(adapted):
        with PLAIN.applied(adapted):
            expected = adapted(INPUT_IDS).logits
        with PLAIN.folded(adapted):
            torch.testing.assert_close(adapted(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)
            biases = [n for n, p in adapted.named_parameters() if n.endswith("bias")]
    assert biases == [
        f"base_model.model.model.layers.{block}.mlp.down_proj.base_layer.bias" for block in (0, 2)
    ]


@pytest.mark.parametrize("way", ["offload", "dispatch"])
@torch.no_grad()
def test_offloaded_weights(way: str, tmp_path: Path) -> None:
    """Weights that are on the meta device, or on disk, but while a block runs."""
    accelerate = pytest.importorskip("accelerate")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    vectors = random_vectors()
    gated = vectors.with_gate(halfway_gate(model, INPUT_IDS))
    if way == "offload":
        moved = accelerate.cpu_offload(deepcopy(model), execution_device=torch.device("cpu"))
    else:
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(parts, "cpu")
        places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        moved = accelerate.dispatch_model(
            deepcopy(model), places, main_device="cpu", offload_dir=str(tmp_path)
        )
    assert any(p.device.type == "meta" for p in moved.parameters())
    with unchanged(moved):
        for given, positions in ((vectors, "all"), (vectors, "last"), (gated, "all")):
            with given.applied(model, positions=positions):
                expected = model(INPUT_IDS).logits
                text = model.generate(INPUT_IDS, **NEW)
            with given.applied(moved, positions=positions) as handle:
                assert torch.equal(moved(INPUT_IDS).logits, expected)
                assert torch.equal(moved.generate(INPUT_IDS, **NEW), text)
                handle.strength = 0.0
                assert torch.equal(moved(INPUT_IDS).logits, model(INPUT_IDS).logits)
    prompts = texts(" home", 4, 0), texts(" sky", 40, 1)
    found = fit_gate(moved, tokenizer, *prompts, block=1)
    assert found.threshold == fit_gate(model, tokenizer, *prompts, block=1).threshold
    pairs = [PreferencePair("the sky is", "blue", "red"), PreferencePair("the sea is", "a", "b c")]
    for fitted in (fit_caa, fit_gradient):
        there, here = (fitted(m, tokenizer, pairs).directions for m in (moved, model))
        assert all(torch.equal(there[block], here[block]) for block in here)
    there, here = (evaluate(m, tokenizer, pairs, progress=False).unsteered for m in (moved, model))
    assert there == here
    kept_elsewhere = replace(random_vectors([1]), normalize=False)
    with pytest.raises(ValueError, match="block 1 has weights on the meta device"):
        fold(moved, kept_elsewhere)


@torch.no_grad()
def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with unchanged(model):
        check_blocks(model, random_vectors(), 0.7)
        with PLAIN.applied(model):
            expected = model(INPUT_IDS).logits
        with PLAIN.folded(model):
            torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bitsandbytes() -> None:
    """Weights of packed integers: the states' dtype is the model's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64)
    for layer in model.model.layers:
        for owner, name in ((layer.mlp, "down_proj"), (layer.self_attn, "o_proj")):
            full = getattr(owner, name)
            packed = bitsandbytes.nn.Linear4bit(
                64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(full.weight.data, quant_type="nf4")
            setattr(owner, name, packed.to("cpu"))
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.uint8
    generator = torch.Generator().manual_seed(0)
    directions = {b: 3 * torch.randn(64, generator=generator) for b in range(4)}
    vectors = replace(random_vectors([0]), directions=directions)
    with unchanged(model):
        check_blocks(model, vectors, 0.7)
        with pytest.raises(ValueError, match="no linear layer whose bias"):
            fold(model, replace(vectors, normalize=False))


def test_gradient_checkpointing() -> None:
    """The same gradients with and without, at chosen positions too."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with random_vectors().applied(model, positions="last") as handle:
            handle.prompt_length = 3
            model(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


@torch.no_grad()
def test_autocast() -> None:
    model = tiny_model("llama")
    with random_vectors().applied(model, positions="last") as handle:
        with torch.autocast("cpu", torch.bfloat16):
            low = model(INPUT_IDS).logits
        full = model(INPUT_IDS).logits
        handle.strength = 0.0
        assert (full - model(INPUT_IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.15)
