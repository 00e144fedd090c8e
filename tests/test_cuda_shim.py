"""The CUDA sources, unmodified, run on the CPU and held to the float64 reference."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grains_ext import reference
from tests import shim_cases
from tests.shim import (
    CSRC,
    DTYPES,
    ROOT,
    RUNTIME,
    Array,
    LaunchError,
    Shim,
    build,
    compiler,
    link,
    placed,
    rebuild,
)
from tests.shim_cases import LAYER, RMS, STEER, Case, Draw, steering_case

# Half a unit in the last place of the result, and the float32 arithmetic before it.
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
FLOAT32_ERROR = 2e-6
SMALLEST = {"float32": 2**-149, "float16": 2**-24, "bfloat16": 2**-133}


@pytest.fixture(scope="module")
def shim() -> Shim:
    if shutil.which(compiler()) is None:
        pytest.skip(f"no C++ compiler ({compiler()}) to build the CUDA sources for the CPU with")
    return Shim(build())


def to_torch(value: Array | float | None) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.int32:
        return torch.from_numpy(value.copy())
    return torch.from_numpy(value.astype(np.float64))


def expected(case: Case) -> tuple[Array, ...]:
    """The float64 reference on the very inputs of the case."""
    inputs = {name: to_torch(value) for name, value in case.inputs.items()}
    result = getattr(reference, case.op)(**inputs, **case.options)
    results = result if isinstance(result, tuple) else (result,)
    return tuple(tensor.numpy() for tensor in results)


def assert_close(actual: Array, wanted: Array, dtype: str, scale: Array | None = None) -> None:
    """Within rounding of each element, and float32 error relative to the largest of its row, or
    to `scale` [R, 1] where intermediate values are larger."""
    exact = wanted
    with np.errstate(over="ignore"):
        wanted = wanted.astype(actual.dtype).astype(np.float64)
    largest = np.abs(wanted).max(axis=-1, keepdims=True, initial=0.0)
    largest = largest if scale is None else np.maximum(largest, scale)
    bound = 2 * ROUNDING[dtype] * np.abs(wanted) + FLOAT32_ERROR * largest + SMALLEST[dtype]
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
    with np.errstate(invalid="ignore"):  # Inf - Inf
        error = np.where(actual == wanted, 0.0, np.abs(actual.astype(np.float64) - exact))
    worst = np.nanmax(error / bound, initial=0.0)
    assert worst <= 1, f"{worst:.3g} times the bound"


def check(shim: Shim, case: Case, dtype: str) -> None:
    results, wanted = case.run(shim), expected(case)
    scales: list[Array | None] = [None] * len(results)
    if case.op == LAYER:
        # Where the mean is large against the spread, rounding of the residual is what is normed.
        residual, weight = wanted[1], case.inputs["weight"]
        assert weight is not None
        spread = np.sqrt(residual.var(-1, keepdims=True) + case.options["eps"])
        scales[0] = np.abs(residual).max(-1, keepdims=True) / spread * np.abs(weight).max()
    for result, exact, scale in zip(results, wanted, scales, strict=True):
        assert result.shape == exact.shape
        assert_close(result, exact, "float32" if result.dtype == np.float32 else dtype, scale)


@pytest.mark.parametrize("case", shim_cases.cases(), ids=lambda c: c.name)
def test_agrees_with_reference(shim: Shim, case: Case) -> None:
    check(shim, case, case.name.split("-")[1])


@given(
    op=st.sampled_from([STEER, RMS, LAYER]),
    dtype=st.sampled_from(list(DTYPES)),
    dim=st.integers(1, 700),
    rows=st.integers(1, 5),
    layout=st.sampled_from(list(shim_cases.LAYOUTS)),
)
def test_agrees_with_reference_at_any_size(
    shim: Shim, op: str, dtype: str, dim: int, rows: int, layout: str
) -> None:
    draw = Draw(f"{dim}-{rows}", dtype, **shim_cases.LAYOUTS[layout])
    check(shim, steering_case(op, dim, dtype, layout, draw, rows), dtype)


@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
@pytest.mark.parametrize("dim", [31, 512, 16384])
def test_scales_of_rows(shim: Shim, op: str, dim: int) -> None:
    """Each row at a scale of its own: float32 sums overflow or vanish, the result does not."""
    scales = [1.0, 1e30, 3e37, 1e-20, 1e-30, 1e-42, 0.0]
    draw = Draw(op, "float32")
    case = steering_case(op, dim, "float32", "gap-8", draw, rows=len(scales))
    for name in ("hidden", "x", "skip", "vectors"):
        if (rows := case.inputs.get(name)) is not None:
            for row, scale in zip(rows, scales, strict=False):
                row[:] = draw.rows(dim, scale=scale)
    case.inputs["vectors"] = draw.rows(len(scales), dim)
    case.inputs["vectors"] *= np.array([*scales[:-1], 1.0], np.float32)[:, None]  # type: ignore[operator]
    case.inputs["strength"] = np.full(len(scales), 0.5, np.float32)
    case.inputs["index"] = np.arange(len(scales), dtype=np.int32)
    check(shim, case, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_extreme_values_of_small_types(shim: Shim, dtype: str) -> None:
    largest, smallest = {"float16": (6e4, 6e-8), "bfloat16": (3e38, 1e-40)}[dtype]
    draw = Draw("extremes", dtype)
    case = steering_case(STEER, 64, dtype, "aligned", draw, rows=2)
    hidden = case.inputs["hidden"]
    assert hidden is not None
    hidden[0] = np.where(hidden[0] > 0, 1, -1) * largest / 4
    hidden[1] = np.where(hidden[1] > 0, 1, -1) * smallest
    case.inputs["index"] = np.zeros(2, np.int32)
    case.inputs["strength"] = np.ones(3, np.float32)
    check(shim, case, dtype)


@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
@pytest.mark.parametrize("dim", [8, 127, 512])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_row(shim: Shim, op: str, dim: int, value: float) -> None:
    draw = Draw("non-finite", "float32")
    case = steering_case(op, dim, "float32", "gap-8", draw, rows=5)
    case.inputs["index"] = np.array([0, 1, 2, 0, 1], np.int32)
    clean = case.run(shim)
    hidden = case.inputs["hidden" if op == STEER else "x"]
    assert hidden is not None
    hidden[2, dim // 2] = value
    for result, before in zip(case.run(shim), clean, strict=True):
        assert np.isnan(result[2]).all()
        np.testing.assert_array_equal(np.delete(result, 2, 0), np.delete(before, 2, 0))
    check(shim, case, "float32")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("dim", [7, 512])
@pytest.mark.parametrize("in_place", [False, True])
def test_strength_zero_and_index_minus_one_keep_every_bit(
    shim: Shim, dtype: str, dim: int, in_place: bool
) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 256, (4, dim * DTYPES[dtype].itemsize), dtype=np.uint8)
    hidden = placed(bits.view(DTYPES[dtype]))  # NaN payloads, infinities, subnormals, both zeros
    before = hidden.copy().view(np.uint8)
    vectors = placed(np.full((2, dim), np.inf, DTYPES[dtype]))
    strength = np.array([0.0, 1.0], np.float32)
    index = np.array([0, -1, 0, -1], np.int32)
    out = shim.steer_add_normalize(
        hidden, vectors, strength, index, out=hidden if in_place else None
    )
    np.testing.assert_array_equal(out.view(np.uint8), before)


@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
@pytest.mark.parametrize("bad", [3, -2, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_index_out_of_range_gives_nan_in_that_row(shim: Shim, op: str, bad: int) -> None:
    case = steering_case(op, 64, "float32", "gap-8", Draw("index", "float32"), rows=4)
    good = case.run(shim)
    index = case.inputs["index"]
    assert index is not None
    index[1] = bad
    for result, before in zip(case.run(shim), good, strict=True):
        assert np.isnan(result[1]).all()
        np.testing.assert_array_equal(np.delete(result, 1, 0), np.delete(before, 1, 0))


@pytest.mark.parametrize("dim", [31, 512, 16384])
@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
def test_in_place(shim: Shim, op: str, dim: int) -> None:
    """Of rows in the float32 range, out of it, and left alone."""
    case = steering_case(op, dim, "float32", "gap-8", Draw("in place", "float32"), rows=4)
    names = ("hidden",) if op == STEER else ("x", "skip")
    for name in names:
        case.inputs[name][1] *= np.float32(1e30)  # type: ignore[index]
    wanted = case.run(shim)
    outputs = ("out",) if op == STEER else ("normed", "residual")
    targets = {output: case.inputs[name] for output, name in zip(outputs, names, strict=True)}
    actual = Case(case.name, op, {**case.inputs, **targets}, case.options).run(shim)
    for result, before in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(result, before)


def test_steering_that_cancels_the_row_leaves_it(shim: Shim) -> None:
    hidden = placed(np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32))
    vectors = placed(-hidden * np.array([[1], [1 + 1e-7], [1 + 1e-3]], np.float32))
    index = np.arange(3, dtype=np.int32)
    out = shim.steer_add_normalize(hidden, vectors, np.array(1, np.float32), index)
    np.testing.assert_array_equal(out[:2], hidden[:2])
    assert_close(out[2:], -hidden[2:].astype(np.float64), "float16")


def test_one_index_for_several_rows(shim: Shim) -> None:
    draw = Draw("batch rows", "float32")
    case = steering_case(STEER, 64, "float32", "aligned", draw, rows=6)
    case.inputs["index"] = np.array([2, -1], np.int32)
    per_row = Case(case.name, STEER, {**case.inputs, "index": np.repeat([2, -1], 3).astype("i4")})
    np.testing.assert_array_equal(case.run(shim)[0], per_row.run(shim)[0])


def test_gaps_between_rows_are_not_written(shim: Shim) -> None:
    case = steering_case(RMS, 64, "float32", "gap-8", Draw("gaps", "float32", gap=8), rows=5)
    outputs = {
        name: placed(np.zeros((5, 64), np.float32), gap=8) for name in ("normed", "residual")
    }
    Case(case.name, RMS, {**case.inputs, **outputs}, case.options).run(shim)
    for output in outputs.values():
        whole = output.base
        assert isinstance(whole, np.ndarray)
        gaps = np.append(whole, np.zeros(8, np.float32) * np.nan).reshape(5, 72)[:, 64:]
        assert np.isnan(gaps).all()


@pytest.mark.parametrize("op", [STEER, RMS, LAYER, shim_cases.INTERPOLATE, shim_cases.ACCUMULATE])
@pytest.mark.parametrize("dim", [7, 512, 5120])
def test_a_grid_smaller_than_the_work(shim: Shim, op: str, dim: int) -> None:
    """Blocks stride over the rows: as they must beyond the grid's limit."""
    draw = Draw("grid", "float32")
    steering = op in (STEER, RMS, LAYER)
    make: Any = steering_case if steering else shim_cases.attribution_case
    case = make(op, dim, "float32", "aligned", draw)
    wanted = case.run(shim)
    shim.set_max_grid(1)
    try:
        actual = case.run(shim)
    finally:
        shim.set_max_grid(0)
    for result, before in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(result, before)


@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("dim", [8, 512, 1032, 2056])
def test_blocks_that_stay(shim: Shim, op: str, dtype: str, dim: int) -> None:
    """Three visits of a block, of ordinary rows and of every kind that is treated apart, against
    the float64 reference, and bit for bit against blocks of one visit each."""
    visits = 3 * shim.plan(1, dim, dtype).rows_per_block
    draw = Draw(f"{op}-{dim}", dtype, gap=8)
    case = steering_case(op, dim, dtype, "gap-8", draw, rows=max(visits - 1, 12))
    case.inputs.update(vectors=draw.rows(dim), strength=np.array(0.7, np.float32), index=None)
    names = ("hidden",) if op == STEER else ("x", "skip")
    vector = case.inputs["vectors"]
    rows = [array for name in names if (array := case.inputs[name]) is not None]
    assert vector is not None
    with np.errstate(over="ignore"):
        for row in (2, 7):
            rows[0][row] *= {"float32": 1e30, "float16": 1e4, "bfloat16": 1e30}[dtype]
        rows[0][3, dim // 2] = np.nan
        rows[-1][5, 0] = np.inf
        for array in rows:
            array[4] = 0.0
        rows[0][6] = vector * np.array(-0.75, vector.dtype)  # nearly, and then exactly, cancelled
        rows[0][8] = vector * np.array(-0.7, vector.dtype)
    outputs = ("out",) if op == STEER else ("normed", "residual")

    def run(stay: str, in_place: bool = False) -> tuple[Array, ...]:
        copies = {name: placed(array, gap=8) for name, array in zip(names, rows, strict=True)}
        targets = dict(zip(outputs, copies.values(), strict=True)) if in_place else {}
        shim.set_max_grid(1)
        try:
            with shim.staying(stay):
                return Case("", op, {**case.inputs, **copies, **targets}, case.options).run(shim)
        finally:
            shim.set_max_grid(0)

    wanted = run("never")
    for in_place in (False, True):
        for result, before in zip(run("always", in_place), wanted, strict=True):
            # As float32: of ml_dtypes' types, NaN is not equal to NaN.
            np.testing.assert_array_equal(result.astype("f4"), before.astype("f4"))
    if op == STEER:  # what the norms make of a row that is nearly cancelled is rounding
        assert_close(wanted[0], expected(case)[0], dtype)


@pytest.mark.parametrize("op", [STEER, RMS, LAYER])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_blocks_that_stay_agree_with_reference(shim: Shim, op: str, dtype: str) -> None:
    for dim in (8, 512, 5120):
        draw = Draw(f"{dim}", dtype)
        rows = 3 * shim.plan(1, dim, dtype).rows_per_block + 1
        case = steering_case(op, dim, dtype, "aligned", draw, rows=rows)
        case.inputs.update(vectors=draw.rows(dim), index=None)
        for strength in (-1.3, 0.0):
            case.inputs["strength"] = np.array(strength, np.float32)
            shim.set_multiprocessors(1)
            try:
                with shim.staying("always"):
                    check(shim, case, dtype)
            finally:
                shim.set_multiprocessors(132)


@pytest.mark.parametrize("op", [STEER, RMS, "ig_interpolate", "ig_accumulate"])
def test_programmatic_launch_where_the_code_of_the_device_waits(shim: Shim, op: str) -> None:
    """The shim is compiled for 7.5, 8.0 and 9.0: a device of 10.0 may run what lacks the wait."""
    names = {c.op: c for c in shim_cases.cases()}
    wanted = names[op].run(shim)
    assert shim.was_programmatic()
    try:
        for capability in (75, 89, 100, 120):
            shim.set_compute_capability(capability)
            np.testing.assert_array_equal(names[op].run(shim)[0], wanted[0])
            assert not shim.was_programmatic()
    finally:
        shim.set_compute_capability(90)


@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_steer(shim: Shim, rows: int, dim: int) -> None:
    hidden, vector = np.zeros((rows, dim), np.float32), np.zeros(dim, np.float32)
    one = np.array(1, np.float32)
    assert shim.steer_add_normalize(hidden, vector, one).shape == (rows, dim)
    for norm in ("rms", "layer"):
        shim.skip_steer_norm(norm, hidden, hidden, vector, one, vector)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 0, 3, 8), (4, 2, 0, 8), (4, 2, 3, 0)])
def test_nothing_to_attribute(shim: Shim, shape: tuple[int, int, int, int]) -> None:
    grads, weights = np.ones(shape, np.float32), np.ones(shape[0], np.float32)
    input, baseline = np.ones(shape[1:], np.float32), np.zeros(shape[3], np.float32)
    assert shim.ig_interpolate(input, baseline, weights).shape == shape
    scores = shim.ig_accumulate(grads, input, baseline, weights)
    np.testing.assert_array_equal(scores, np.zeros(shape[1:3], np.float32))


def test_a_row_too_long_is_refused(shim: Shim) -> None:
    vector = np.zeros(1, np.float32)
    hidden = np.lib.stride_tricks.as_strided(vector, (1, 2**30 + 1), (0, 0))
    with pytest.raises(LaunchError, match="invalid argument"):
        shim.steer_add_normalize(hidden, vector, np.array(1, np.float32), out=hidden)


# --- What the shim itself can see ----------------------------------------------------------------


def sanitized(library: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """All cases in a process of its own, under AddressSanitizer and UBSan."""
    asan = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip(f"{compiler()} has no AddressSanitizer library")
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.shim_cases", str(library), str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_sanitizers_find_nothing(shim: Shim, tmp_path: Path) -> None:
    output = tmp_path / "results.npz"
    process = sanitized(build(sanitize=True), output)
    assert process.returncode == 0, process.stderr
    results = np.load(output)
    for case in shim_cases.cases(shim_cases.SANITIZED_DIMS):
        for number, array in enumerate(case.run(shim)):
            np.testing.assert_array_equal(results[f"{case.name}:{number}"], array.view(np.uint8))


MISUSE = """
#include <cuda_runtime.h>

#define API extern "C" __attribute__((visibility("default")))

__global__ void some_threads_skip_the_barrier(int) {
  if (threadIdx.x < 64) __syncthreads();
}
__global__ void some_lanes_return(int) {
  if (threadIdx.x % 32 == 31) return;
  __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void a_mask_too_small(int) { __shfl_xor_sync(0xffu, 1, 8); }

static int launch(void (*kernel)(int), unsigned threads) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, 0);
}
API int launch_some_threads_skip_the_barrier() {
  return launch(some_threads_skip_the_barrier, 128);
}
API int launch_some_lanes_return() { return launch(some_lanes_return, 128); }
API int launch_a_mask_too_small() { return launch(a_mask_too_small, 8); }
API int launch_too_many_threads() { return launch(a_mask_too_small, 1025); }
API const char* message(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
"""


@pytest.fixture(scope="module")
def misuse(shim: Shim, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("misuse") / "misuse.cu"
    source.write_text(MISUSE)
    library = ctypes.CDLL(str(link([source, RUNTIME], source.with_suffix(".so"), CSRC)))
    library.message.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some_threads_skip_the_barrier", "64 threads wait at a barrier, 0 in a shuffle, 64 have"),
        ("some_lanes_return", "124 in a shuffle, 4 have returned"),
        ("a_mask_too_small", "a shuffle outside its mask"),
        ("too_many_threads", "invalid configuration"),
    ],
)
def test_the_shim_fails_a_launch_that_a_gpu_would_hang_in(
    misuse: ctypes.CDLL, kernel: str, message: str
) -> None:
    error = getattr(misuse, f"launch_{kernel}")()
    assert error != 0
    assert message in misuse.message(error).decode()


def planted(folder: Path, file: str, pattern: str, replacement: str) -> Path:
    """A copy of csrc with one bug in it."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    path = sources / "cuda" / file
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1, f"{file} has no {pattern!r}"
    path.write_text(text)
    return sources


@pytest.mark.slow
def test_a_planted_missing_barrier_is_caught(tmp_path: Path) -> None:
    sources = planted(tmp_path, "row_threads.cuh", r"__syncthreads\(\);", "")
    library = Shim(rebuild("steer_add_normalize.cu", sources))
    case = steering_case(STEER, 4096, "float32", "aligned", Draw("planted", "float32"))
    with pytest.raises(AssertionError, match="times the bound"):
        check(library, case, "float32")


@pytest.mark.slow
def test_a_planted_over_read_is_caught(tmp_path: Path) -> None:
    sources = planted(tmp_path, "steered_row.cuh", r"at\(k\) < end", "at(k) <= end")
    library = rebuild("steer_add_normalize.cu", sources, sanitize=True)
    process = sanitized(library, tmp_path / "results.npz")
    assert process.returncode != 0
    assert "heap-buffer-overflow" in process.stderr
