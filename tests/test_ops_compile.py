"""The ops under torch.library.opcheck, fake tensors, torch.compile and torch.export."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grains_ext import ops
from tests.op_cases import OPS, as_tuple, make_case

IN_PLACE = "steer_add_normalize_"


def arguments(op: str, **options: Any) -> dict[str, Any]:
    return make_case(op.removesuffix("_"), (2, 3), 8, torch.float32, **options).inputs


@pytest.mark.parametrize("bank", [None, 2])
@pytest.mark.parametrize("op", [*OPS, IN_PLACE])
def test_opcheck(op: str, bank: int | None) -> None:
    inputs = arguments(op, bank=bank)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if op in ("steer_add_normalize", IN_PLACE):
        tests.append("test_aot_dispatch_dynamic")
    if op == "steer_add_normalize":
        inputs["hidden"].requires_grad_()
        inputs["vectors"].requires_grad_()
    overload = getattr(torch.ops.grains, op).default
    torch.library.opcheck(overload, (), inputs, test_utils=tests)


class Calls(TorchDispatchMode):
    """The overloads that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_the_overload_without_autograd_is_for_calls_without_gradients(op: str) -> None:
    case = make_case(op, (2, 3), 8, torch.float32)
    wanted = as_tuple(getattr(torch.ops.grains, op).default(**case.inputs))
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context, Calls() as calls:
            results = case.run()
        assert f"grains.{op}.no_grad" in calls.names
        for result, expected in zip(results, wanted, strict=True):
            assert torch.equal(result, expected)
    next(iter(case.inputs.values())).requires_grad_()
    with Calls() as calls:
        assert as_tuple(case.run())[0].requires_grad
    assert f"grains.{op}.default" in calls.names


@pytest.mark.parametrize("overload", ["default", "no_grad"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_fake_kernels(op: str, device: str, overload: str) -> None:
    """Shapes, dtypes, strides and devices of the results, with no kernel and no device."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(op, (2, 3), 8, dtype)
        real = case.run()
        with FakeTensorMode():
            fake_inputs = {
                name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device)
                for name, v in case.inputs.items()
            }
            fakes = as_tuple(getattr(getattr(torch.ops.grains, op), overload)(**fake_inputs))
        for fake, actual in zip(fakes, real, strict=True):
            assert (fake.shape, fake.dtype) == (actual.shape, actual.dtype)
            assert fake.stride() == actual.stride()
            assert fake.device.type == device


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("ig_interpolate", "baseline", (7,)),
        ("ig_interpolate", "alphas", (5, 4)),
        ("ig_accumulate", "grads", (5, 2, 3, 9)),
        ("ig_accumulate", "weights", (5, 4)),
        ("steer_add_normalize", "vectors", (7,)),
        ("steer_add_normalize", "strength", (3,)),
        ("steer_add_normalize_", "vectors", (7,)),
        ("skip_steer_rms_norm", "skip", (2, 8)),
        ("skip_steer_rms_norm", "weight", (7,)),
        ("skip_steer_layer_norm", "bias", (7,)),
    ],
)
def test_fake_kernels_check_shapes(op: str, name: str, shape: tuple[int, ...]) -> None:
    inputs = arguments(op) | {name: torch.ones(shape)}
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
        with pytest.raises(RuntimeError, match=rf"grains::{op}: `{name}` has shape"):
            getattr(torch.ops.grains, op).default(**fake)


def block(hidden: Tensor, vector: Tensor, strength: Tensor, weight: Tensor) -> Tensor:
    steered = ops.steer_add_normalize(hidden * 2, vector, strength)
    normed, residual = ops.skip_steer_rms_norm(steered, hidden, vector, strength, weight)
    ops.steer_add_normalize_(normed, vector, 0.5)
    return normed + residual


def path(input: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    points = ops.ig_interpolate(input, baseline, alphas)
    return ops.ig_accumulate(points.cos(), input, baseline, alphas)


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)


def test_compile_is_one_dynamic_graph() -> None:
    fast = compiled(block, dynamic=True)
    vector, weight = torch.randn(8), torch.randn(8)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens, strength in ((2, 3, 0.5), (4, 7, -1.0), (3, 2, 2.0)):
            given = (torch.randn(batch, tokens, 8), vector, torch.tensor(strength), weight)
            torch.testing.assert_close(fast(*given), block(*given))


def test_compiled_strength_can_be_changed_in_place() -> None:
    hidden, vector = torch.randn(2, 3, 8), torch.randn(8)
    strength = torch.tensor(1.0)
    fast = compiled(lambda: ops.steer_add_normalize(hidden, vector, strength))
    before = fast()
    with torch._dynamo.config.patch(error_on_recompile=True):
        strength.fill_(0.0)
        assert torch.equal(fast(), hidden)
    assert not torch.equal(before, hidden)


def test_compile_with_bank_and_index() -> None:
    inputs = arguments("steer_add_normalize", bank=3)
    fast = compiled(ops.steer_add_normalize)
    assert torch.equal(fast(**inputs), ops.steer_add_normalize(**inputs))


def test_compile_attribution() -> None:
    given = torch.randn(2, 3, 8), torch.randn(8), torch.linspace(0, 1, 5)
    torch.testing.assert_close(compiled(path)(*given), path(*given))


def test_compiled_backward() -> None:
    def loss(hidden: Tensor, vector: Tensor, strength: Tensor) -> Tensor:
        return ops.steer_add_normalize(hidden, vector, strength).square().cos().sum()

    eager = [torch.randn(4, 8), torch.randn(8), torch.tensor(0.4)]
    fast = copy.deepcopy(eager)
    for tensor in (*eager, *fast):
        tensor.requires_grad_()
    loss(*eager).backward()
    compiled(loss)(*fast).backward()
    for a, b in zip(eager, fast, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_export_with_dynamic_shapes() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("vector", torch.randn(8))
            self.register_buffer("strength", torch.tensor(0.5))
            self.register_buffer("weight", torch.randn(8))

        def forward(self, hidden: Tensor) -> Tensor:
            return block(hidden, self.vector, self.strength, self.weight)

    module = Block()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(
        module, (torch.randn(2, 3, 8),), dynamic_shapes=({0: batch, 1: tokens},)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"grains.steer_add_normalize.default", "grains.skip_steer_rms_norm.default"} <= targets
    other = torch.randn(5, 9, 8)
    torch.testing.assert_close(program.module()(other), module(other))
