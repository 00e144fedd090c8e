"""The CPU kernels of every instruction set that this machine has, against the float64 reference."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grains_ext
from grains_ext import _C, ops, reference
from tests.op_cases import (
    DTYPES,
    LAYOUTS,
    OPS,
    ROWS_OF_DIM,
    STEERING_OPS,
    make_case,
    not_one_distance,
)


@pytest.fixture(params=_C.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_instruction_set_reaches_the_op_library(isa: str) -> None:
    library = ctypes.CDLL(str(Path(grains_ext.__file__).with_name("libgrains_torch.so")))
    library.grains_cpu_isa.restype = ctypes.c_char_p
    assert library.grains_cpu_isa().decode() == isa == _C.cpu_isa()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_hidden_size(op: str, dtype: torch.dtype) -> None:
    for dim, rows in ROWS_OF_DIM.items():
        make_case(op, (1, rows), dim, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_few_rows(op: str, dtype: torch.dtype) -> None:
    for rows in ((0, 3), (2, 0), (1, 1), (3, 1)):
        make_case(op, rows, 33, dtype).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    for dtype in DTYPES:
        for dim in (1, 8, 45):
            make_case(op, (3, 4), dim, dtype, layout=LAYOUTS[layout]).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STEERING_OPS)
def test_bank(op: str, dtype: torch.dtype) -> None:
    case = make_case(op, (4, 5), 40, dtype, bank=3)
    case.check()
    case.inputs["index"] = torch.tensor([2, -1, 0, 1], dtype=torch.int32)  # one per batch row
    case.check()
    case.inputs["strength"] = torch.tensor(0.5)
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STEERING_OPS)
def test_huge_and_tiny_rows(op: str, dtype: torch.dtype) -> None:
    powers = {torch.float16: (-7, -5, 3, 4)}.get(dtype, (-40, -38, -30, -20, 18, 25, 30, 37))
    for power in powers:
        make_case(op, (2, 3), 100, dtype, scale=10.0**power).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsteered_rows_are_returned_bit_for_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(6, 50).to(dtype)
    hidden[1], hidden[2, 3], hidden[2, 4] = 0, float("nan"), float("inf")
    hidden[3, ::2], hidden[4] = -0.0, torch.finfo(dtype).tiny
    vectors = torch.full((50,), float("inf"), dtype=dtype)
    index = torch.full((6,), -1, dtype=torch.int32)
    off = ops.steer_add_normalize(hidden, vectors, 0.0)
    alone = ops.steer_add_normalize(hidden, vectors, 3.0, index)
    for result in (off, alone):
        assert torch.equal(bits(result), bits(hidden))
        assert result.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_have_no_direction_left_are_unchanged(dtype: torch.dtype) -> None:
    hidden = torch.randn(4, 64).to(dtype)
    hidden[1] = 0
    assert torch.equal(ops.steer_add_normalize(hidden, hidden[0], -1.0)[:2], hidden[:2])
    none = torch.zeros(64, dtype=dtype)
    assert torch.equal(ops.steer_add_normalize(hidden, none, 1.0)[1], hidden[1])
    # eps is relative: with a large one, a row that shrinks by more is returned too.
    assert torch.equal(ops.steer_add_normalize(hidden, hidden[0], -0.875, eps=0.25)[0], hidden[0])
    x, ones = hidden / 2, torch.ones(64, dtype=dtype)
    normed, residual = ops.skip_steer_rms_norm(x, x, hidden[0], -1.0, ones)
    assert torch.equal(residual[:2], (x + x)[:2])
    plain = ops.skip_steer_rms_norm(x, x, hidden[0], 0.0, ones)[0]
    torch.testing.assert_close(normed[:2], plain[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op", STEERING_OPS)
def test_nan_and_inf_stay_in_their_row(op: str, value: float) -> None:
    for dtype in DTYPES:
        case = make_case(op, (5,), 70, dtype)
        clean = case.run()
        case.inputs["hidden" if op == "steer_add_normalize" else "x"][2, 11] = value
        case.check()
        for before, after in zip(clean, case.run(), strict=True):
            others = torch.tensor([0, 1, 3, 4])
            assert torch.equal(before[others], after[others])
            assert after[2].isnan().all()


def test_nan_stays_in_its_token_in_attribution() -> None:
    case = make_case("ig_accumulate", (2, 4), 70, torch.float32)
    clean = case.run()[0]
    case.inputs["grads"][3, 1, 2, 5] = float("nan")
    bad = case.run()[0]
    assert bad.isnan().nonzero().tolist() == [[1, 2]]
    bad[1, 2] = clean[1, 2]
    assert torch.equal(bad, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolation_ends_are_exact(dtype: torch.dtype) -> None:
    case = make_case("ig_interpolate", (2, 3), 37, dtype)
    case.inputs["input"][0, 0, 0] = float("inf")
    points = case.run()[0]
    assert torch.equal(points[-1], case.inputs["input"])
    assert torch.equal(points[0], case.inputs["baseline"].expand_as(points[0]))


def test_broadcast_baselines() -> None:
    for shape in ((9,), (1, 9), (4, 9), (1, 1, 9), (3, 1, 9), (1, 4, 9), (3, 4, 9)):
        for op in ("ig_interpolate", "ig_accumulate"):
            case = make_case(op, (3, 4), 9, torch.float32)
            case.inputs["baseline"] = torch.randn(shape)
            case.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """With strength 0 the residual is x + skip, rounded once: every pattern of bits, and sums that
    are ties, subnormal, infinite, NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    other = every[torch.randperm(len(every))]
    near = (every.float() * 2**-9).to(dtype)
    zero, ones = torch.zeros(64, dtype=dtype), torch.ones(64, dtype=dtype)
    for x, skip in ((every, torch.zeros_like(every)), (every, other), (every, near)):
        x, skip = x.reshape(-1, 64), skip.reshape(-1, 64)
        _, residual = ops.skip_steer_rms_norm(x, skip, zero, 0.0, ones)
        expected = (x.float() + skip.float()).to(dtype)
        assert torch.equal(residual.isnan(), expected.isnan())
        assert torch.equal(residual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("op", STEERING_OPS)
def test_bank_row_is_the_single_vector(op: str) -> None:
    for dtype in DTYPES:
        case = make_case(op, (6,), 100, dtype, bank=2)
        case.inputs["index"] = torch.ones(6, dtype=torch.int32)
        banked = case.run()
        del case.inputs["index"]
        case.inputs["vectors"] = case.inputs["vectors"][1]
        case.inputs["strength"] = case.inputs["strength"][1]
        for a, b in zip(banked, case.run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [(3, 37), (5, 411)])  # 2 and 16 parts for each thread
@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_the_result(op: str, rows: tuple[int, int]) -> None:
    case = make_case(op, rows, 1024, torch.float32)
    alone = case.run()
    torch.set_num_threads(3)
    try:
        together = case.run()
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


# --- in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place(layout: str) -> None:
    for dtype in DTYPES:
        inputs = make_case("steer_add_normalize", (3, 4), 45, dtype, bank=2).inputs
        inputs["hidden"] = hidden = LAYOUTS[layout](inputs["hidden"])
        expected = ops.steer_add_normalize(**inputs)
        version = hidden._version
        assert ops.steer_add_normalize_(**inputs) is hidden
        assert torch.equal(hidden, expected)
        assert hidden._version > version


def test_in_place_touches_only_its_own_rows() -> None:
    storage = torch.randn(5, 4, 20)
    before = storage.clone()
    ops.steer_add_normalize_(storage[1:4, ::2, 3:17], torch.ones(14), 1.0)
    changed = torch.zeros(5, 4, 20, dtype=torch.bool)
    changed[1:4, ::2, 3:17] = True
    assert torch.equal(storage[~changed], before[~changed])
    expected = reference.steer_add_normalize(before[1:4, ::2, 3:17], torch.ones(14), 1.0)
    torch.testing.assert_close(storage[1:4, ::2, 3:17], expected)


def test_in_place_refuses_overlapping_rows() -> None:
    for hidden in (torch.randn(8).expand(3, 8), torch.randn(20).as_strided((3, 8), (4, 1))):
        with pytest.raises(RuntimeError, match=r"`hidden` has rows that overlap in memory"):
            ops.steer_add_normalize_(hidden, torch.ones(8), 1.0)
    hidden = not_one_distance(torch.randn(2, 3, 8)).expand(2, 3, 8)
    ops.steer_add_normalize_(hidden, torch.ones(8), 1.0)


# --- laws -----------------------------------------------------------------------------------------

rows_strategy = st.tuples(
    st.integers(1, 70), st.floats(-3, 3, width=32), st.integers(0, 2**31), st.sampled_from(DTYPES)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_strategy)
def test_norm_is_preserved(drawn: tuple[int, float, int, torch.dtype]) -> None:
    dim, strength, seed, dtype = drawn
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, dim, generator=generator).to(dtype)
    vector = torch.randn(dim, generator=generator).to(dtype)
    steered = ops.steer_add_normalize(hidden, vector, strength).double()
    before, after = hidden.double().norm(dim=-1), steered.norm(dim=-1)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_strategy, st.integers(-60, 60))
def test_scale_of_hidden_and_vector_does_not_matter(
    drawn: tuple[int, float, int, torch.dtype], power: int
) -> None:
    dim, strength, seed, _ = drawn
    generator = torch.Generator().manual_seed(seed)
    hidden, vector = torch.randn(3, dim, generator=generator), torch.randn(dim, generator=generator)
    factor = 2.0**power
    steered = ops.steer_add_normalize(hidden, vector, strength)
    scaled = ops.steer_add_normalize(hidden * factor, vector * factor, strength)
    torch.testing.assert_close(scaled / factor, steered, rtol=1e-5, atol=1e-5)
