"""The ops between a decoder's matrix products, and their gradients, against float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grains_ext import _C, decoder_ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DIMS = (1, 2, 7, 16, 31, 64, 127, 300)
# batch, heads, heads of keys, queries, keys, width, width of values
HEADS = (
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 33, 33, 24, 24),
    (1, 3, 3, 142, 142, 64, 64),
    (2, 4, 1, 15, 50, 8, 20),
    (1, 2, 2, 31, 95, 7, 3),
    (0, 2, 2, 3, 3, 4, 4),
)

Function = Callable[..., Any]


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(batch: int, n: int, tokens: int, width: int, **how: Any) -> Tensor:
    """[batch, heads, tokens, width] as projections lay it out."""
    return draw(batch, tokens, n, width, **how).transpose(1, 2)


def hiding(batch: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Causal, with a window, holes, and a soft penalty; every query sees its own key."""
    allowed = torch.ones(queries, keys).tril(keys - queries).triu(keys - queries - 40) > 0
    holes = draw(batch, queries, keys, dtype=torch.float32) > 1.0
    own = torch.eye(keys, dtype=torch.bool)[keys - queries :]
    mask = torch.where(allowed & ~holes | own, 0.0, torch.finfo(dtype).min)
    mask[:, :, ::5] -= torch.where(mask[:, :, ::5] == 0, 2.0, 0.0)
    return mask[:, None].to(dtype)


def values_and_gradients(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [draw(*t.shape, dtype=torch.float32, seed=9).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def agree(function: Function, expected: Function, *inputs: Tensor) -> None:
    found = values_and_gradients(function, inputs)
    reference_values = values_and_gradients(expected, tuple(t.double() for t in inputs))
    tolerance = TOLERANCE[inputs[0].dtype]
    for a, b in zip(found, reference_values, strict=True):
        assert a.dtype == inputs[0].dtype
        assert a.shape == b.shape
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def rms_case(x: Tensor, offset: float) -> None:
    weight = draw(x.shape[-1], dtype=x.dtype, seed=1)
    agree(
        lambda x: decoder_ops.rms_norm(x, weight, 1e-5, offset),
        lambda x: reference.rms_norm(x, weight.double(), 1e-5, offset),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(isa: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        rms_case(draw(3, 5, dim, dtype=dtype), offset=dim % 2)
    rms_case(draw(0, 8, dtype=dtype), 0.0)
    rms_case(heads(2, 3, 5, 16, dtype=dtype), 1.0)
    rms_case(draw(6, 9, dtype=dtype).T, 0.0)


@pytest.mark.parametrize("power", [-25, -18, 18])
def test_rms_norm_of_huge_and_tiny_rows(isa: str, power: int) -> None:
    x = draw(4, 40, dtype=torch.float32) * 10.0**power
    expected = reference.rms_norm(x.double(), torch.ones(40).double(), 0.0)
    found = decoder_ops.rms_norm(x, torch.ones(40), 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(isa: str, dtype: torch.dtype, activation: Any) -> None:
    def check(gate: Tensor, up: Tensor) -> None:
        agree(
            lambda gate, up: decoder_ops.gated_activation(gate, up, activation),
            lambda gate, up: reference.gated_activation(gate, up, activation),
            gate,
            up,
        )

    for dim in DIMS:
        check(4 * draw(3, 2, dim, dtype=dtype), draw(3, 2, dim, dtype=dtype, seed=1))
    both = draw(3, 2, 46, dtype=dtype)
    check(*both.chunk(2, dim=-1))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation_far_out(isa: str, activation: Any) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0, 1e4])
    agree(
        lambda gate, up: decoder_ops.gated_activation(gate, up, activation),
        lambda gate, up: reference.gated_activation(gate, up, activation),
        gate,
        torch.ones(9),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(isa: str, dtype: torch.dtype) -> None:
    for batch, n, n_kv, tokens, _, width, _ in HEADS:
        for size in {width // 2 * 2, width // 4 * 2} - {0}:
            cos, sin = (draw(batch, tokens, size, dtype=dtype, seed=seed) for seed in (1, 2))
            agree(
                lambda q, k, cos=cos, sin=sin: decoder_ops.rotary(q, k, cos, sin),
                lambda q, k, cos=cos, sin=sin: reference.rotary(q, k, cos.double(), sin.double()),
                heads(batch, n, tokens, width, dtype=dtype),
                heads(batch, n_kv, tokens, width, dtype=dtype, seed=3).contiguous(),
            )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(isa: str, dtype: torch.dtype, masked: bool) -> None:
    for batch, n, n_kv, queries, keys, width, v_width in HEADS:
        mask = hiding(batch, queries, keys, dtype) if masked else None
        agree(
            lambda q, k, v, mask=mask: decoder_ops.attention(q, k, v, mask, 0.3),
            lambda q, k, v, mask=mask: reference.attention(q, k, v, mask, 0.3),
            heads(batch, n, queries, width, dtype=dtype),
            heads(batch, n_kv, keys, width, dtype=dtype, seed=1),
            heads(batch, n_kv, keys, v_width, dtype=dtype, seed=2).contiguous(),
        )


def test_attention_of_a_query_that_sees_nothing(isa: str) -> None:
    """Its weights are those of its scores' rounding: all alike."""
    q, k, v = (heads(1, 1, 4, 8, dtype=torch.float32, seed=seed) for seed in range(3))
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 1] = torch.finfo(torch.float32).min
    found = decoder_ops.attention(q, k, v, mask, 1.0)
    torch.testing.assert_close(found, reference.attention(q, k, v, mask, 1.0))
    torch.testing.assert_close(found[0, 0, 1], v[0, 0].mean(0))


def cases(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of every op as it is registered."""
    x, up = draw(2, 3, 8, dtype=dtype), draw(2, 3, 8, dtype=dtype, seed=1)
    q, k, v = (heads(2, n, 5, 8, dtype=dtype, seed=n) for n in (4, 2, 2))
    attend = {"q": q, "k": k, "v": v, "mask": hiding(2, 5, 5, dtype), "scale": 0.3}
    out, lse = torch.ops.grains.attention.default(*attend.values())
    norm = {"x": x, "weight": draw(8, dtype=dtype)}
    rstd = torch.ops.grains.rms_norm.default(*norm.values())[1]
    table = {"cos": draw(2, 5, 8, dtype=dtype), "sin": draw(2, 5, 8, dtype=dtype, seed=1)}
    return {
        "rms_norm": norm,
        "rms_norm_backward": {"grad": up, **norm, "rstd": rstd},
        "gated_activation": {"gate": x, "up": up, "activation": 1},
        "gated_activation_backward": {"grad": up, "gate": x, "up": up, "activation": 0},
        "rotary": {"q": q, "k": k, **table},
        "attention": attend,
        "attention_backward": {
            "grad": out,
            **{name: attend[name] for name in ("q", "k", "v", "mask")},
            "out": out,
            "lse": lse,
            "scale": 0.3,
        },
    }


@pytest.mark.parametrize("op", cases(torch.float32))
def test_opcheck(op: str) -> None:
    inputs = cases(torch.float32)[op]
    differentiable = not op.endswith("backward")
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if differentiable:
        for name in ("x", "gate", "up", "q", "k", "v"):
            if name in inputs:
                inputs[name].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.grains, op).default, (), inputs, test_utils=tests)


@pytest.mark.parametrize("op", cases(torch.float32))
def test_fake_kernels(op: str) -> None:
    inputs = cases(torch.bfloat16)[op]
    call = getattr(torch.ops.grains, op).default
    real = call(**inputs)
    with FakeTensorMode() as mode:
        fake = call(**{name: convert(mode, value) for name, value in inputs.items()})
    real, fake = (out if isinstance(out, tuple) else (out,) for out in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def convert(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def test_weights_have_no_gradients() -> None:
    weight = torch.ones(8, requires_grad=True)
    out = decoder_ops.rms_norm(torch.randn(3, 8, requires_grad=True), weight)
    with pytest.raises(RuntimeError, match="rms_norm has no gradient for `weight`: detach it"):
        out.sum().backward()
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    cos = torch.ones(1, 3, 4, requires_grad=True)
    turned, _ = decoder_ops.rotary(q, q, cos, torch.ones(1, 3, 4))
    with pytest.raises(RuntimeError, match="rotary has no gradient for `cos`"):
        turned.sum().backward()
    mask = torch.zeros(1, 1, 3, 3, requires_grad=True)
    out = decoder_ops.attention(q, q, q, mask, 1.0)
    with pytest.raises(RuntimeError, match="attention has no gradient for `mask`"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("rms_norm", {"x": torch.ones(3, 8).double()}, "`x` is float64, expected float32"),
        ("rms_norm", {"weight": torch.ones(7)}, r"`weight` has shape \[7\], expected \[D\]"),
        ("rms_norm", {"eps": -1.0}, "`eps` is -1, expected a number >= 0"),
        ("gated_activation", {"up": torch.ones(2, 3, 7)}, r"`up` has shape \[2, 3, 7\]"),
        ("gated_activation", {"activation": 2}, "`activation` is 2, expected 0"),
        ("rotary", {"cos": torch.ones(2, 5, 10)}, r"`cos` has shape .* at most width"),
        ("rotary", {"sin": torch.ones(2, 5, 6)}, "expected the shape of `cos`"),
        ("attention", {"q": torch.ones(2, 8)}, r"`q` has shape \[2, 8\], expected \[batch, heads"),
        ("attention", {"k": torch.ones(2, 3, 5, 8)}, "a number of heads that divides it"),
        ("attention", {"v": torch.ones(2, 2, 4, 8)}, "the same batch, heads and keys"),
        ("attention", {"mask": torch.ones(2, 1, 5, 4)}, r"`mask` has shape \[2, 1, 5, 4\]"),
        ("attention", {"mask": torch.ones(2, 1, 5, 5).half()}, "`mask` is float16, but `q`"),
    ],
)
def test_wrong_arguments(op: str, changes: dict[str, Any], message: str) -> None:
    inputs = cases(torch.float32)[op] | changes
    with pytest.raises(RuntimeError, match=rf"grains::{op}: .*{message}"):
        getattr(torch.ops.grains, op).default(**inputs)


@pytest.mark.parametrize("keys", [2**42, 2**56])
def test_attention_without_memory(keys: int) -> None:
    """One key, expanded: the scores of as many exceed every address space."""
    k = torch.ones(1, 1, 1, 8).expand(1, 1, keys, 8)
    with pytest.raises(RuntimeError, match=f"grains::attention: no memory .* {keys} keys"):
        decoder_ops.attention(torch.ones(1, 1, 2, 8), k, k, None, 1.0)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, got 'relu'"):
        decoder_ops.gated_activation(torch.ones(1), torch.ones(1), "relu")  # type: ignore[arg-type]
