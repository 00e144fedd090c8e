"""The analytic backward of steer_add_normalize against autograd through the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grains_ext import ops, reference
from tests.op_cases import DTYPES, OPS, make_case

NAMES = ("hidden", "vectors", "strength")


def gradients(steer: Any, inputs: dict[str, Any], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES}
    result = steer(**(inputs | leaves))
    found = torch.autograd.grad(result, list(leaves.values()), upstream.to(result.dtype))
    return dict(zip(NAMES, found, strict=True))


def as_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def compare(inputs: dict[str, Any], tolerance: float) -> None:
    upstream = torch.randn_like(inputs["hidden"])
    actual = gradients(ops.steer_add_normalize, inputs, upstream)
    expected = gradients(reference.steer_add_normalize, as_double(inputs), upstream)
    for name in NAMES:
        assert actual[name].dtype == inputs[name].dtype
        assert actual[name].shape == inputs[name].shape
        scale = float(expected[name].abs().max()) if expected[name].numel() else 1.0
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank", [None, 1, 4])
def test_backward_matches_the_reference(bank: int | None, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    inputs = make_case("steer_add_normalize", (5, 3), 24, dtype, bank=bank).inputs
    compare(inputs, tolerance)
    compare(inputs | {"strength": torch.tensor(0.7)}, tolerance)
    if bank is not None:  # one index per batch row
        index = torch.arange(-1, 4, dtype=torch.int32).clamp(max=bank - 1)
        compare(inputs | {"index": index}, tolerance)


def test_backward_of_other_shapes() -> None:
    for rows in ((), (1,), (0, 4), (2, 3, 2)):
        compare(make_case("steer_add_normalize", rows, 9, torch.float32).inputs, 1e-5)
    strided = make_case("steer_add_normalize", (4, 6), 9, torch.float32).inputs
    compare(strided | {"hidden": torch.randn(9, 4, 6).permute(1, 2, 0)}, 1e-5)


@pytest.mark.parametrize("power", [-30, -20, 20, 30])
def test_backward_of_huge_and_tiny_rows(power: int) -> None:
    inputs = make_case("steer_add_normalize", (3, 4), 16, torch.float32, scale=10.0**power).inputs
    compare(inputs, 1e-5)


def test_unsteered_rows_pass_their_gradient_on_exactly() -> None:
    hidden, vector = torch.randn(4, 8), torch.randn(8)
    upstream = torch.randn(4, 8)
    inputs: dict[str, Any] = {"hidden": hidden, "vectors": vector, "strength": torch.tensor(0.0)}
    found = gradients(ops.steer_add_normalize, inputs, upstream)
    assert torch.equal(found["hidden"], upstream)
    assert not found["vectors"].any()
    # The strength still has a gradient at 0: it can be learned from there.
    expected = gradients(reference.steer_add_normalize, as_double(inputs), upstream)
    assert found["strength"].abs() > 0.1
    torch.testing.assert_close(found["strength"], expected["strength"].float())

    inputs |= {"strength": torch.tensor(2.0), "index": torch.full((4,), -1, dtype=torch.int32)}
    found = gradients(ops.steer_add_normalize, inputs, upstream)
    assert torch.equal(found["hidden"], upstream)
    assert not found["vectors"].any()
    assert not found["strength"].any()


def test_rows_with_no_direction_left_pass_their_gradient_on() -> None:
    hidden = torch.randn(3, 8)
    hidden[1] = 0
    upstream = torch.randn(3, 8)
    inputs = {"hidden": hidden, "vectors": -hidden[0], "strength": torch.tensor(1.0)}
    found = gradients(ops.steer_add_normalize, inputs, upstream)
    assert torch.equal(found["hidden"][0], upstream[0])
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert not found["hidden"][1].any()  # a zero row stays zero: no direction to first order


def test_only_the_gradients_that_are_needed() -> None:
    inputs = make_case("steer_add_normalize", (2, 3), 8, torch.float32).inputs
    for name in NAMES:
        leaf = inputs[name].clone().requires_grad_()
        ops.steer_add_normalize(**(inputs | {name: leaf})).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_gradient_in_half_precision_accumulates_in_float32() -> None:
    """4096 rows that each add 1e-3 of the sum: bfloat16 accumulation would stop growing."""
    hidden = torch.randn(4096, 4).bfloat16()
    vector = torch.randn(4).bfloat16().requires_grad_()
    result = ops.steer_add_normalize(hidden, vector, 0.3)
    (found,) = torch.autograd.grad(result, vector, hidden.sign())
    wide = vector.detach().double().requires_grad_()
    expected_result = reference.steer_add_normalize(hidden.double(), wide, 0.3)
    (expected,) = torch.autograd.grad(expected_result, wide, hidden.sign().double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", [op for op in OPS if op != "steer_add_normalize"])
def test_ops_without_a_gradient_say_so(op: str) -> None:
    case = make_case(op, (2, 3), 8, torch.float32)
    name = "x" if "x" in case.inputs else "input"
    case.inputs[name].requires_grad_()
    result = case.run()[0]
    with pytest.raises(RuntimeError, match=rf"grains::{op} has no gradient; "):
        result.sum().backward()
    with torch.no_grad():
        assert not case.run()[0].requires_grad


@pytest.mark.parametrize("op", [*OPS, "steer_add_normalize_"])
def test_forward_mode_is_refused(op: str) -> None:
    """A tangent that is lost reads as a derivative of zero."""
    inputs = make_case(op.removesuffix("_"), (2, 3), 8, torch.float32).inputs
    first, value = next(iter(inputs.items()))

    def run(value: Tensor) -> object:
        return getattr(ops, op)(**inputs | {first: value})

    with pytest.raises(NotImplementedError, match=rf"grains::{op} has no forward-mode"):
        torch.func.jvp(run, (value,), (torch.ones_like(value),))
    with torch.autograd.forward_ad.dual_level():
        run(value.clone())


def test_in_place_refuses_gradients() -> None:
    hidden, vector = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"steer_add_normalize_ has no gradient; use"):
        ops.steer_add_normalize_(hidden, vector, 1.0)
    with torch.no_grad():
        ops.steer_add_normalize_(hidden, vector, 1.0)
    with torch.inference_mode():
        ops.steer_add_normalize_(hidden.clone(), vector, 1.0)


def test_in_place_change_of_a_saved_tensor_is_noticed() -> None:
    weight = torch.randn(8, requires_grad=True)
    hidden = torch.randn(3, 8)
    product = (hidden * weight).sum()
    ops.steer_add_normalize_(hidden, torch.randn(8), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
