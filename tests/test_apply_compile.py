"""Steering inside compiled graphs and CUDA graphs: it changes, they do not."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

from grains_ext.steering.apply import SteeringHandle
from grains_ext.steering.bank import SteeringBank
from tests.models import tiny_model
from tests.test_apply import INPUT_IDS, random_vectors
from tests.test_gate import halfway_gate

Step = tuple[list[float], list[int]]  # the strengths of both members, the members of both rows

STEPS: list[Step] = [([1.0, 0.5], [0, 1]), ([0.4, 2.0], [0, 1]), ([0.4, 0.0], [-1, 1])]
STEPS += [([0.4, 2.0], [1, 0]), ([1.0, 0.5], [0, 0])]
WAYS = ("last", "gates", pytest.param("any", marks=pytest.mark.slow))


def two_members(model: nn.Module, way: str, device: str = "cpu") -> tuple[SteeringBank, Any]:
    """(the bank, the positions to steer): by position, or all behind a gate of each kind."""
    members = [random_vectors([0, 1], seed=1), random_vectors([1], seed=2)]
    if way == "last":
        return SteeringBank(members), "last"
    ids = INPUT_IDS.to(device)
    whens = ("any", "any") if way == "any" else ("prompt", "token")
    gates = [halfway_gate(model, ids, when=when) for when in whens]
    return SteeringBank([v.with_gate(g) for v, g in zip(members, gates, strict=True)]), "all"


def decode(
    model: nn.Module,
    handle: SteeringHandle,
    step: Callable[[Tensor, StaticCache], Tensor],
    device: str = "cpu",
) -> Tensor:
    """Logits [steps, 2, V]: a prompt, then one token after the other while steering changes."""
    handle.strengths, rows = [1.0, 1.0], [0, 0]
    handle.rows(rows)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(INPUT_IDS.to(device), past_key_values=cache, use_cache=True)
    ids = torch.tensor([[5], [6]], device=device)
    found = []
    for strengths, rows in STEPS:
        handle.strengths = strengths
        handle.rows(rows)
        found.append(step(ids, cache).clone())
    return torch.stack(found)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_no_recompile(way: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    bank, positions = two_members(model, way)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []

    def step(ids: Tensor, cache: StaticCache) -> Tensor:
        logits = compiled(ids, past_key_values=cache, use_cache=True).logits
        counts.append(counter.frame_count)
        return logits

    with bank.applied(model, positions=positions) as handle:
        expected = decode(
            model, handle, lambda ids, cache: model(ids, past_key_values=cache).logits
        )
        found = decode(model, handle, step)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # Another text of the same shape: as every token of a long generation.
        torch.testing.assert_close(decode(model, handle, step), expected, rtol=1e-4, atol=1e-4)
    assert len(set(counts)) == 1


@torch.no_grad()
def test_steering_that_comes_too_late() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    vectors = random_vectors([0, 1])
    unsteered = compiled(INPUT_IDS, use_cache=False).logits
    with vectors.applied(compiled):
        with pytest.raises(RuntimeError, match="ran without this steering"):
            compiled(INPUT_IDS, use_cache=False)
        expected = model(INPUT_IDS, use_cache=False).logits
    torch._dynamo.reset()
    with vectors.applied(compiled):
        torch.testing.assert_close(compiled(INPUT_IDS, use_cache=False).logits, expected)
    assert torch.equal(compiled(INPUT_IDS, use_cache=False).logits, unsteered)


@pytest.mark.parametrize("place", ["model", "stack", "blocks"])
@torch.no_grad()
def test_a_model_compiled_in_place(place: str) -> None:
    """Steered before its first call it runs as without graphs; later it does or the call raises."""
    model = tiny_model("llama", num_hidden_layers=2)
    vectors, later = random_vectors([0, 1]), random_vectors([1], seed=3)
    with vectors.applied(model):
        expected = model(INPUT_IDS, use_cache=False).logits
        with later.applied(model):
            both = model(INPUT_IDS, use_cache=False).logits
    unsteered = model(INPUT_IDS, use_cache=False).logits
    torch._dynamo.reset()
    modules = {"model": [model], "stack": [model.model], "blocks": list(model.model.layers)}[place]
    for module in modules:
        module.compile(backend="eager", fullgraph=True)
    compiled = [module._compiled_call_impl for module in modules]
    with vectors.applied(model):
        torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, expected)
        # Where a graph has hooks, torch notices more of them.
        with later.applied(model):
            torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, both)
        torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, expected)
    assert [module._compiled_call_impl for module in modules] == compiled
    torch._dynamo.reset()
    torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, unsteered)
    first, second = vectors.apply(model), later.apply(model)
    if place == "blocks":  # a block's own hooks are noticed at any time
        torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, both)
    else:
        with pytest.raises(RuntimeError, match="ran without this steering"):
            model(INPUT_IDS, use_cache=False)
    first.remove()  # not in the order in which they came
    second.remove()
    assert [module._compiled_call_impl for module in modules] == compiled
    torch._dynamo.reset()
    with vectors.applied(model):
        torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("place", ["wrapper", "model"])
@torch.no_grad()
def test_a_graph_from_before_the_steering_is_found_behind_a_steered_one(place: str) -> None:
    """What one shape's graph did says nothing of another's."""
    model = tiny_model("llama", num_hidden_layers=2)
    torch._dynamo.reset()
    compiled: Any = model
    if place == "wrapper":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    one, four = INPUT_IDS[:1], INPUT_IDS[:1].repeat(4, 1)
    unsteered = compiled(one, use_cache=False).logits
    with random_vectors([0, 1]).applied(compiled):
        assert not torch.allclose(compiled(four, use_cache=False).logits[:1], unsteered, atol=1e-4)
        with pytest.raises(RuntimeError, match="ran without this steering"):
            compiled(one, use_cache=False)
        with pytest.raises(RuntimeError, match="indices"):  # a call that fails is not asked
            compiled(four.float(), use_cache=False)
        compiled(four, use_cache=False)
    assert torch.equal(compiled(one, use_cache=False).logits, unsteered)


@torch.no_grad()
def test_prompts_of_a_compiled_model() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with random_vectors([0, 1]).applied(compiled, positions="generated") as handle:
        counts = []
        for length in ([2, 2], [4, 1], [6, 6]):
            handle.prompt_length = length
            expected = model(INPUT_IDS, use_cache=False).logits
            found = compiled(INPUT_IDS, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1


class _Callback(StoppingCriteria):
    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.call(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def test_strength_changes_during_generation() -> None:
    """By a callback, and from another thread: from the next token on."""
    model = tiny_model("llama")
    prompt = INPUT_IDS[:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6}

    def generate(change: Callable[[], None]) -> Tensor:
        def at(length: int) -> None:
            if length == prompt.shape[1] + 3:
                change()

        criteria = StoppingCriteriaList([_Callback(at)])
        return model.generate(prompt, stopping_criteria=criteria, **options)

    with random_vectors().applied(model, 1.5) as handle:
        constant = generate(lambda: None)

        def off() -> None:
            handle.strength = 0.0

        def off_in_a_thread() -> None:
            thread = threading.Thread(target=off)
            thread.start()
            thread.join()

        changed = generate(off)
        handle.strength = 1.5
        assert torch.equal(generate(off_in_a_thread), changed)
        # By hand: three tokens with steering, then three on the same cache without.
        handle.strength = 1.5
        start = model.generate(
            prompt, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
        )
        handle.strength = 0.0
        rest = model.generate(
            start.sequences,
            past_key_values=start.past_key_values,
            max_new_tokens=3,
            min_new_tokens=3,
        )
    assert torch.equal(changed, rest)
    assert torch.equal(changed[:, :9], constant[:, :9])
    assert not torch.equal(changed, constant)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_cuda_graph(way: str) -> None:
    """One captured decoding step, replayed while strengths, rows and prompts change."""
    model = tiny_model("llama", num_hidden_layers=2).cuda()
    bank, positions = two_members(model, way, "cuda")
    with bank.applied(model, positions=positions) as handle:
        handle.rows([0, 0])
        cache = StaticCache(config=model.config, max_cache_len=16)
        ids = torch.tensor([[5], [6]], device="cuda")

        def prompt() -> None:
            cache.reset()
            model(INPUT_IDS.cuda(), past_key_values=cache, use_cache=True)

        def run() -> Tensor:
            return model(ids, past_key_values=cache, use_cache=True).logits

        def every_step(step: Callable[[], Tensor]) -> Tensor:
            handle.strengths = [1.0, 1.0]
            handle.rows([0, 0])
            prompt()
            found = []
            for strengths, rows in STEPS:
                handle.strengths = strengths
                handle.rows(rows)
                found.append(step().clone())
            return torch.stack(found)

        expected = every_step(run)
        graph = torch.cuda.CUDAGraph()
        prompt()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        prompt()
        with torch.cuda.graph(graph):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        torch.testing.assert_close(every_step(replay), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_removal_restores_the_model(dtype: torch.dtype) -> None:
    """Modules, hooks and attributes, and every bit of the logits."""
    model = tiny_model("llama", dtype=dtype)
    model(INPUT_IDS)

    def everything() -> list[Any]:
        return [
            (name, set(vars(module)), dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    before, logits = everything(), model(INPUT_IDS).logits
    weights = copy.deepcopy(model.state_dict())
    gated = random_vectors().with_gate(halfway_gate(model, INPUT_IDS))
    handles = [gated.apply(model, positions="last"), random_vectors([1]).apply(model)]
    with random_vectors(seed=5).applied(model, positions="prompt"):
        model.generate(INPUT_IDS, max_new_tokens=3)
    # Not in the order in which they came.
    for handle in handles:
        handle.remove()
    assert everything() == before
    assert torch.equal(model(INPUT_IDS).logits, logits)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
