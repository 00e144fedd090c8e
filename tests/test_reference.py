"""The reference itself: the formulas by hand, its gradients, and the laws of the method."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from grains_ext import reference
from tests.op_cases import DTYPES, OPS, make_case


def double_inputs(op: str, rows: tuple[int, ...] = (2, 3), dim: int = 5, **options: Any) -> Any:
    inputs = make_case(op, rows, dim, torch.float32, **options).inputs
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_steering_by_hand() -> None:
    hidden, vector = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 8.0])
    # [3, 4] + 0.5 [2, 8] = [4, 8], whose norm goes from sqrt(80) back to 5.
    expected = torch.tensor([4.0, 8.0]) * 5 / 80**0.5
    torch.testing.assert_close(reference.steer_add_normalize(hidden, vector, 0.5), expected)


def test_every_row_has_its_own_norm() -> None:
    inputs = double_inputs("steer_add_normalize", (3, 4))
    together = reference.steer_add_normalize(**inputs)
    for batch in range(3):
        for token in range(4):
            row = inputs["hidden"][batch, token]
            alone = reference.steer_add_normalize(**(inputs | {"hidden": row}))
            torch.testing.assert_close(together[batch, token], alone)


def test_bank_chooses_by_index() -> None:
    hidden, bank = torch.randn(3, 2, 4).double(), torch.randn(2, 4).double()
    strength = torch.tensor([0.5, -2.0])
    per_row = torch.tensor([[0, 1], [-1, -1], [1, 0]], dtype=torch.int32)
    result = reference.steer_add_normalize(hidden, bank, strength, per_row)
    for position, entry in zip(
        ((i, j) for i in range(3) for j in range(2)), per_row.flatten(), strict=True
    ):
        expected = hidden[position]
        if entry >= 0:
            expected = reference.steer_add_normalize(expected, bank[entry], strength[entry])
        assert torch.equal(result[position], expected)
    per_batch = torch.tensor([1, -1, 0], dtype=torch.int32)
    expected = reference.steer_add_normalize(
        hidden, bank, strength, per_batch.unsqueeze(1).expand(3, 2)
    )
    assert torch.equal(reference.steer_add_normalize(hidden, bank, strength, per_batch), expected)
    with pytest.raises(ValueError, match="`index` is missing: `vectors` is a bank of 2"):
        reference.steer_add_normalize(hidden, bank, strength)


def test_fused_ops_are_steering_and_torch_norms() -> None:
    inputs = double_inputs("skip_steer_layer_norm", (2, 3), 7)
    x, skip, weight, bias = (inputs.pop(k) for k in ("x", "skip", "weight", "bias"))
    residual = reference.steer_add_normalize(x + skip, **inputs)
    normed, kept = reference.skip_steer_layer_norm(
        x, skip, **inputs, weight=weight, bias=bias, eps=1e-3
    )
    torch.testing.assert_close(kept, residual)
    torch.testing.assert_close(normed, functional.layer_norm(residual, (7,), weight, bias, 1e-3))
    normed, _ = reference.skip_steer_layer_norm(x, skip, **inputs, weight=weight)
    torch.testing.assert_close(normed, functional.layer_norm(residual, (7,), weight, None, 1e-5))

    normed, kept = reference.skip_steer_rms_norm(
        x, skip, **inputs, weight=weight, eps=1e-3, weight_offset=1.0
    )
    torch.testing.assert_close(kept, residual)
    torch.testing.assert_close(normed, functional.rms_norm(residual, (7,), weight + 1, 1e-3))


def test_integrated_gradients_of_a_quadratic_are_exact() -> None:
    """f(x) = sum x^2 has the attributions x^2 - x'^2, which the midpoint rule gets exactly."""
    inputs, baseline = torch.randn(2, 3, 5).double(), torch.randn(5).double()
    alphas = (torch.arange(4) + 0.5) / 4
    points = reference.ig_interpolate(inputs, baseline, alphas)
    found = reference.ig_accumulate(2 * points, inputs, baseline, torch.full((4,), 0.25))
    torch.testing.assert_close(found, (inputs**2 - baseline**2).sum(-1))


def test_steps_per_batch_row() -> None:
    inputs, baseline = torch.randn(2, 3, 5).double(), torch.randn(2, 1, 5).double()
    alphas = torch.rand(4, 2)
    points = reference.ig_interpolate(inputs, baseline, alphas)
    grads = torch.randn_like(points)
    found = reference.ig_accumulate(grads, inputs, baseline, alphas)
    for row in range(2):
        one = slice(row, row + 1)
        alone = reference.ig_interpolate(inputs[one], baseline[one], alphas[:, row])
        assert torch.equal(points[:, one], alone)
        alone = reference.ig_accumulate(grads[:, one], inputs[one], baseline[one], alphas[:, row])
        torch.testing.assert_close(found[one], alone)


@pytest.mark.parametrize("bank", [None, 2])
@pytest.mark.parametrize("op", OPS)
def test_gradients(op: str, bank: int | None) -> None:
    inputs = double_inputs(op, bank=bank)
    names = [name for name, value in inputs.items() if value.is_floating_point()]

    def function(*values: Tensor) -> Any:
        return getattr(reference, op)(**(inputs | dict(zip(names, values, strict=True))))

    # alphas at 0 and 1 are exact end points, with no gradient of their own.
    leaves = [inputs[name].requires_grad_(name != "alphas") for name in names]
    torch.autograd.gradcheck(function, leaves)


def test_strength_has_a_gradient_at_zero() -> None:
    inputs = double_inputs("steer_add_normalize")
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def function(strength: Tensor) -> Tensor:
        return reference.steer_add_normalize(**(inputs | {"strength": strength}))

    torch.autograd.gradcheck(function, leaf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_result_dtypes_and_shapes(op: str, dtype: torch.dtype) -> None:
    case = make_case(op, (2, 3), 5, dtype)
    actual = getattr(reference, op)(**case.inputs)
    for result, kernel in zip(
        actual if isinstance(actual, tuple) else (actual,), case.run(), strict=True
    ):
        assert (result.dtype, result.shape) == (kernel.dtype, kernel.shape)


def test_in_place_writes_its_argument() -> None:
    hidden, vector = torch.randn(2, 3), torch.randn(3)
    expected = reference.steer_add_normalize(hidden, vector, 1.0)
    assert reference.steer_add_normalize_(hidden, vector, 1.0) is hidden
    assert torch.equal(hidden, expected)


@given(
    dim=st.integers(1, 20),
    strength=st.floats(-10, 10),
    power=st.integers(-150, 150),
    seed=st.integers(0, 2**31),
)
def test_laws(dim: int, strength: float, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, dim, generator=generator, dtype=torch.float64)
    vector = torch.randn(dim, generator=generator, dtype=torch.float64)
    steered = reference.steer_add_normalize(hidden, vector, strength)
    # The norm stays; strength 0 is the identity; the scale of the space does not matter.
    torch.testing.assert_close(steered.norm(dim=-1), hidden.norm(dim=-1))
    assert torch.equal(reference.steer_add_normalize(hidden, vector, 0.0), hidden)
    scale = 2.0**power
    scaled = reference.steer_add_normalize(hidden * scale, vector * scale, strength)
    torch.testing.assert_close(scaled / scale, steered)
    # Infinite strength is the direction itself, with the row's norm.
    far = reference.steer_add_normalize(hidden, vector, 1e12)
    torch.testing.assert_close(
        far, functional.normalize(vector, dim=-1) * hidden.norm(dim=-1, keepdim=True)
    )
