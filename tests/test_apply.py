import pytest
import torch
from torch import Tensor, nn

from grains_ext.decoder import DecoderView
from grains_ext.scoring import pad_batch, position_ids_of
from grains_ext.steering.vectors import SteeringVectors
from tests.models import FAMILIES, HIDDEN_SIZE, N_BLOCKS, tiny_model

INPUT_IDS = torch.tensor([[1, 20, 30, 40, 50, 60], [1, 21, 31, 41, 51, 61]])


def random_vectors(blocks: range | list[int] = range(N_BLOCKS), seed: int = 0) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        {block: 3 * torch.randn(HIDDEN_SIZE, generator=generator) for block in blocks},
        strength=0.4,
    )


def formula(hidden: Tensor, direction: Tensor, strength: float) -> Tensor:
    h = hidden.double()
    s = h + strength * direction.double()
    return s * h.norm(dim=-1, keepdim=True) / s.norm(dim=-1, keepdim=True)


@torch.no_grad()
def check_blocks(model: nn.Module, vectors: SteeringVectors, strength: float) -> None:
    """Captures each block's output before and after the steering hook of one forward."""
    view = DecoderView.of(model)
    with (
        view.capture(vectors.blocks) as before,
        vectors.applied(model, strength),
        view.capture(vectors.blocks) as after,
    ):
        model(INPUT_IDS)
    for block, direction in vectors.directions.items():
        assert after[block].dtype == before[block].dtype
        torch.testing.assert_close(
            after[block].double(),
            formula(before[block], direction.to(before[block].dtype), strength),
            rtol=1e-5 if before[block].dtype == torch.float32 else 1e-2,
            atol=1e-5 if before[block].dtype == torch.float32 else 1e-2,
        )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family(family: str) -> None:
    model = tiny_model(family)
    vectors = random_vectors()
    check_blocks(model, vectors, 0.7)

    plain = model(INPUT_IDS).logits
    with vectors.applied(model) as handle:
        steered = model(INPUT_IDS).logits
        assert (steered - plain).abs().max() > 0.01
        handle.strength = 0.0
        assert torch.equal(model(INPUT_IDS).logits, plain)
        handle.strength = vectors.strength
        assert torch.equal(model(INPUT_IDS).logits, steered)
    assert torch.equal(model(INPUT_IDS).logits, plain)
    assert not any(block._forward_hooks for block in DecoderView.of(model).blocks)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_cached_equals_uncached(family: str) -> None:
    model = tiny_model(family)
    prompt, mask = pad_batch([(1, 20, 30, 40, 50), (1, 21, 31)], pad_id=3)
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6}
    with random_vectors().applied(model):
        cached = model.generate(prompt, use_cache=True, **options)
        uncached = model.generate(prompt, use_cache=False, **options)
        alone = model.generate(
            torch.tensor([[1, 21, 31]]),
            attention_mask=torch.ones(1, 3, dtype=torch.int64),
            max_new_tokens=6,
            min_new_tokens=6,
        )
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[1, -6:], alone[0, -6:])
    assert not torch.equal(cached, model.generate(prompt, **options))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padded_row_equals_row_alone(family: str) -> None:
    model = tiny_model(family)
    input_ids, mask = pad_batch([(1, 20, 30, 40, 50, 60), (1, 21, 31)], pad_id=3)
    with random_vectors().applied(model):
        batch = model(input_ids, attention_mask=mask, position_ids=position_ids_of(mask)).logits
        alone = model(torch.tensor([[1, 21, 31]])).logits
    torch.testing.assert_close(batch[1, -3:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_blocks(tiny_model("llama", dtype=dtype), random_vectors([1, 3]), 0.5)


@torch.no_grad()
def test_tuple_outputs_keep_their_other_items() -> None:
    """transformers 4 returned (hidden states, cache, ...)."""

    class TupleBlock(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.linear = nn.Linear(size, size)

        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            return self.linear(hidden), "cache"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(8, HIDDEN_SIZE)
            self.layers = nn.ModuleList([TupleBlock(HIDDEN_SIZE)])
            self.head = nn.Linear(HIDDEN_SIZE, 8)

    model = Model()
    view = DecoderView.of(model, blocks="layers", embedding="tokens", head="head")
    hidden = torch.randn(2, 3, HIDDEN_SIZE)
    plain, _ = model.layers[0](hidden)
    vectors = random_vectors([0])
    with vectors.applied(model, decoder=view):
        steered, rest = model.layers[0](hidden)
    assert rest == "cache"
    expected = formula(plain, vectors.directions[0], vectors.strength)
    torch.testing.assert_close(steered.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_handles_stack_in_order() -> None:
    model = tiny_model("llama")
    view = DecoderView.of(model)
    first, second = random_vectors([2], seed=1), random_vectors([2], seed=2)
    with (
        view.capture([2]) as before,
        first.applied(model, 0.5),
        second.applied(model, 0.9),
        view.capture([2]) as after,
    ):
        model(INPUT_IDS)
    expected = formula(formula(before[2], first.directions[2], 0.5), second.directions[2], 0.9)
    torch.testing.assert_close(after[2].double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows() -> None:
    model = tiny_model("llama")
    plain = model(INPUT_IDS).logits
    with random_vectors().applied(model) as handle:
        steered = model(INPUT_IDS).logits
        handle.rows([-1, 0])
        some = model(INPUT_IDS).logits
        assert torch.equal(some[0], plain[0])
        torch.testing.assert_close(some[1], steered[1])
        with pytest.raises((RuntimeError, ValueError), match="index"):
            model(INPUT_IDS[:1])
        handle.rows(None)
        assert torch.equal(model(INPUT_IDS).logits, steered)
        with pytest.raises(ValueError, match=r"0 \(steer\) or -1.*got \[1\]"):
            handle.rows([0, 1])


def test_gradients_flow_through() -> None:
    model = tiny_model("llama")
    embeds = DecoderView.of(model).embed(INPUT_IDS).detach().requires_grad_()
    with random_vectors().applied(model):
        model(inputs_embeds=embeds).logits.logsumexp(-1).sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad).all()
    assert embeds.grad.abs().sum() > 0


def test_applied_ends_with_an_exception() -> None:
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), random_vectors().applied(model):
        _ = 1 / 0
    assert not any(block._forward_hooks for block in DecoderView.of(model).blocks)


def test_handle_made_in_inference_mode_works_outside_it() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        handle = random_vectors([0]).apply(model)
        model(INPUT_IDS)
    handle.strength = 0.3
    model(INPUT_IDS).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_remove_twice() -> None:
    model = tiny_model("llama")
    handle = random_vectors([0]).apply(model, 2.0)
    assert handle.strength == 2.0
    handle.remove()
    handle.remove()
    assert not model.model.layers[0]._forward_hooks


def test_vectors_of_another_model() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="has 7 values, the model's hidden size is 32"):
        SteeringVectors({0: torch.ones(7)}).apply(model)
    with pytest.raises(ValueError, match=r"blocks \[9\] do not exist"):
        SteeringVectors({9: torch.ones(HIDDEN_SIZE)}).apply(model)
    for strength in (float("nan"), 1e39):  # infinite in float32
        with pytest.raises(ValueError, match="must be finite in float32"):
            SteeringVectors({0: torch.ones(HIDDEN_SIZE)}).apply(model, strength)
    assert not model.model.layers[0]._forward_hooks


@torch.no_grad()
def test_compiled_model_sees_strength_without_recompile() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    compiles = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        compiles.append(graph)
        return graph.forward

    with random_vectors([0, 1]).applied(model) as handle:
        eager = {}
        for strength in (0.4, 0.0, 1.1):
            handle.strength = strength
            eager[strength] = model(INPUT_IDS, use_cache=False).logits
        compiled = torch.compile(model, backend=backend)
        for strength, expected in eager.items():
            handle.strength = strength
            torch.testing.assert_close(compiled(INPUT_IDS, use_cache=False).logits, expected)
            if strength == 0.4:
                n_compiled = len(compiles)
    assert len(compiles) == n_compiled
