"""Builds the CUDA sources for the CPU (csrc/testing) and calls their launchers on numpy arrays.

Only numpy and ml_dtypes are imported: the sanitised build runs in a process of its own, where a
heavier import would cost more than the tests.
"""

import ctypes
import hashlib
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RUNTIME = CSRC / "testing" / "cuda_shim" / "runtime.cpp"
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in enumerate(DTYPES.values())}

Array = NDArray[Any]


# --- The library ---------------------------------------------------------------------------------


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build(*, sanitize: bool = False) -> Path:
    """Compile csrc into one shared library in a folder of its own, or find it compiled."""
    cuda, testing = CSRC / "cuda", CSRC / "testing"
    units = [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), testing / "cuda_driver.cpp"]
    units.append(testing / "cuda_shim" / "runtime.cpp")
    digest = hashlib.sha256(f"{compiler()} {_flags(CSRC, sanitize)}".encode())
    for folder in (cuda, testing, testing / "cuda_shim", CSRC / "include" / "grains"):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda_shim" / digest.hexdigest()[:16] / "libgrains_cuda_shim.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        link(units, library, CSRC, sanitize=sanitize)
    return library


def rebuild(unit: str, sources: Path, *, sanitize: bool = False) -> Path:
    """A library beside `sources`, a changed copy of csrc, of which only `unit` is compiled."""
    others = [o for o in build(sanitize=sanitize).parent.glob("*.o") if o.name != f"{unit}.o"]
    library = sources.with_name("libgrains_cuda_shim.so")
    return link([sources / "cuda" / unit], library, sources, sanitize=sanitize, objects=others)


def link(
    units: list[Path],
    library: Path,
    sources: Path,
    *,
    sanitize: bool = False,
    objects: Iterable[Path] = (),
) -> Path:
    """Compile `units` as C++ against the shim of `sources`, and link them and `objects` into
    `library`; their own objects stay beside it."""
    flags = _flags(sources, sanitize)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled = [Path(scratch) / f"{unit.name}.o" for unit in units]
        commands = [
            [compiler(), *flags, "-x", "c++", "-c", str(unit), "-o", str(target)]
            for unit, target in zip(units, compiled, strict=True)
        ]
        _run_all(commands, at_once=os.cpu_count() or 1)
        linked, parts = Path(scratch) / library.name, map(str, (*compiled, *objects))
        _run_all([[compiler(), *flags, "-shared", *parts, "-o", str(linked)]], 1)
        # Whole or not at all, when several processes build; the library last.
        for path in (*compiled, linked):
            path.replace(library.parent / path.name)
    return library


def _flags(sources: Path, sanitize: bool) -> list[str]:
    # Not optimised: compiling takes longer than running.
    flags = ["-std=c++17", "-O0", "-g", "-ffp-contract=off"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-fPIC", "-fvisibility=hidden"]
    flags += [f"-I{sources / path}" for path in ("testing/cuda_shim", "include", "cuda")]
    if sanitize:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return flags


def _run_all(commands: list[list[str]], at_once: int) -> None:
    running: list[subprocess.Popen[str]] = []
    for command in commands:
        if len(running) == at_once:
            _finish(running.pop(0))
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _finish(process)


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, process.args))}\n{errors}")  # type: ignore[arg-type]


# --- The structs of csrc/include/grains ----------------------------------------------------------


class InterpolateArgs(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input", "baseline", "alphas", "out")),
        *((name, c_int64) for name in ("steps", "batch", "tokens", "dim")),
        ("input_batch_stride", c_int64),
        ("input_token_stride", c_int64),
        ("baseline_batch_stride", c_int64),
        ("baseline_token_stride", c_int64),
        ("alpha_step_stride", c_int64),
        ("alpha_batch_stride", c_int64),
        ("dtype", c_int32),
    ]


class AccumulateArgs(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grads", "input", "baseline", "weights", "out")),
        *((name, c_int64) for name in ("steps", "batch", "tokens", "dim")),
        ("grads_step_stride", c_int64),
        ("grads_batch_stride", c_int64),
        ("grads_token_stride", c_int64),
        ("input_batch_stride", c_int64),
        ("input_token_stride", c_int64),
        ("baseline_batch_stride", c_int64),
        ("baseline_token_stride", c_int64),
        ("weight_step_stride", c_int64),
        ("weight_batch_stride", c_int64),
        ("dtype", c_int32),
    ]


class SteeringArgs(Structure):
    _fields_ = [
        ("vectors", c_void_p),
        ("vectors_stride", c_int64),
        ("bank", c_int64),
        ("strength", c_void_p),
        ("strength_stride", c_int64),
        ("index", c_void_p),
        ("rows_per_index", c_int64),
        ("min_relative_norm", c_float),
    ]


class SteerArgs(Structure):
    _fields_ = [
        ("hidden", c_void_p),
        ("out", c_void_p),
        *((name, c_int64) for name in ("rows", "dim", "hidden_stride", "out_stride")),
        ("steering", SteeringArgs),
        ("dtype", c_int32),
    ]


class SkipNormArgs(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "skip", "weight", "bias", "normed", "residual")),
        *((name, c_int64) for name in ("rows", "dim", "x_stride", "skip_stride")),
        *((name, c_int64) for name in ("normed_stride", "residual_stride")),
        ("steering", SteeringArgs),
        ("eps", c_float),
        ("weight_offset", c_float),
        ("dtype", c_int32),
    ]


class LaunchPlan(Structure):
    _fields_ = [
        ("threads", c_int32),
        ("rows_per_block", c_int32),
        ("vector_elements", c_int32),
        ("elements_per_thread", c_int32),
        ("blocks", c_int64),
        ("programmatic_launch", c_bool),
        ("stays", c_bool),
    ]


class InterpolatePlan(Structure):
    _fields_ = [
        ("threads", c_int32),
        ("vector_elements", c_int32),
        ("steps_per_block", c_int32),
        ("blocks", c_int64),
        ("step_blocks", c_int64),
        ("programmatic_launch", c_bool),
    ]


class AccumulatePlan(Structure):
    _fields_ = [
        ("threads", c_int32),
        ("rows_per_block", c_int32),
        ("column_threads", c_int32),
        ("vector_elements", c_int32),
        ("blocks", c_int64),
        ("programmatic_launch", c_bool),
    ]


# --- The launchers -------------------------------------------------------------------------------


class LaunchError(RuntimeError):
    """A launcher returned an error; the message is the one of `error_string`."""


def _stride(array: Array, axis: int) -> int:
    return array.strides[axis] // array.itemsize


class Shim:
    """The launchers of one built library. Outputs not given are made, and poisoned with NaN."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.error_string.restype = c_char_p
        for name, struct, sizes in (
            ("ig_interpolate", InterpolateArgs, "size_of_interpolate_args"),
            ("ig_accumulate", AccumulateArgs, "size_of_accumulate_args"),
            ("steer_add_normalize", SteerArgs, "size_of_steer_args"),
            ("skip_steer_rms_norm", SkipNormArgs, "size_of_skip_norm_args"),
            ("skip_steer_layer_norm", SkipNormArgs, "size_of_skip_norm_args"),
        ):
            getattr(self._library, name).argtypes = [POINTER(struct)]
            assert getattr(self._library, sizes)() == ctypes.sizeof(struct), struct.__name__

    def _call(self, name: str, args: Structure) -> None:
        error = getattr(self._library, name)(ctypes.byref(args))
        if error != 0:
            raise LaunchError(self._library.error_string(error).decode())

    def set_compute_capability(self, capability: int) -> None:
        self._library.set_compute_capability(capability)

    def set_multiprocessors(self, count: int) -> None:
        self._library.set_multiprocessors(count)

    def was_programmatic(self) -> bool:
        """Whether the last launch could start before the kernel ahead of it had finished."""
        return bool(self._library.was_programmatic())

    @contextmanager
    def staying(self, choice: str) -> Iterator[None]:
        """Whether blocks stay for many rows: "auto", "never" or "always"."""
        self._set_stay(choice)
        try:
            yield
        finally:
            self._set_stay("auto")

    def _set_stay(self, choice: str) -> None:
        if self._library.grains_set_cuda_stay(choice.encode()) != 1:
            raise ValueError(f"choice is {choice!r}, expected auto, never or always")

    def set_max_grid(self, blocks: int) -> None:
        self._library.set_max_grid(blocks)

    def ig_interpolate(self, input: Array, baseline: Array, alphas: Array) -> Array:
        """[B, T, D], broadcastable, float32 [S] or [S, B] -> [S, B, T, D]."""
        batch, tokens, dim = input.shape
        baseline = np.broadcast_to(baseline, input.shape)
        out = poisoned((len(alphas), *input.shape), input.dtype)
        args = InterpolateArgs(
            input.ctypes.data, baseline.ctypes.data, alphas.ctypes.data, out.ctypes.data,
            len(alphas), batch, tokens, dim,
            _stride(input, 0), _stride(input, 1), _stride(baseline, 0), _stride(baseline, 1),
            _stride(alphas, 0), _stride(alphas, 1) if alphas.ndim == 2 else 0,
            _CODES[input.dtype],
        )  # fmt: skip
        self._call("ig_interpolate", args)
        return out

    def ig_accumulate(self, grads: Array, input: Array, baseline: Array, weights: Array) -> Array:
        """[S, B, T, D], [B, T, D], broadcastable, float32 [S] or [S, B] -> float32 [B, T]."""
        steps, batch, tokens, dim = grads.shape
        baseline = np.broadcast_to(baseline, input.shape)
        out = poisoned((batch, tokens), DTYPES["float32"])
        args = AccumulateArgs(
            grads.ctypes.data, input.ctypes.data, baseline.ctypes.data, weights.ctypes.data,
            out.ctypes.data, steps, batch, tokens, dim,
            _stride(grads, 0), _stride(grads, 1), _stride(grads, 2),
            _stride(input, 0), _stride(input, 1), _stride(baseline, 0), _stride(baseline, 1),
            _stride(weights, 0), _stride(weights, 1) if weights.ndim == 2 else 0,
            _CODES[input.dtype],
        )  # fmt: skip
        self._call("ig_accumulate", args)
        return out

    @staticmethod
    def _steering(
        rows: int, vectors: Array, strength: Array, index: Array | None, eps: float
    ) -> SteeringArgs:
        bank = vectors if vectors.ndim == 2 else vectors[None]
        return SteeringArgs(
            bank.ctypes.data, _stride(bank, 0), len(bank),
            strength.ctypes.data, 0 if strength.ndim == 0 else 1,
            None if index is None else index.ctypes.data,
            1 if index is None else rows // len(index), eps,
        )  # fmt: skip

    def steer_add_normalize(
        self,
        hidden: Array,
        vectors: Array,
        strength: Array,
        index: Array | None = None,
        eps: float = 1e-6,
        out: Array | None = None,
    ) -> Array:
        """[R, D], [D] or [N, D], float32 [] or [N], int32 [R] or a divisor of it -> [R, D]."""
        rows, dim = hidden.shape
        out = poisoned(hidden.shape, hidden.dtype) if out is None else out
        args = SteerArgs(
            hidden.ctypes.data, out.ctypes.data, rows, dim, _stride(hidden, 0), _stride(out, 0),
            self._steering(rows, vectors, strength, index, eps), _CODES[hidden.dtype],
        )  # fmt: skip
        self._call("steer_add_normalize", args)
        return out

    def skip_steer_norm(
        self,
        norm: str,
        x: Array,
        skip: Array,
        vectors: Array,
        strength: Array,
        weight: Array,
        bias: Array | None = None,
        index: Array | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        normed: Array | None = None,
        residual: Array | None = None,
    ) -> tuple[Array, Array]:
        """`norm` is "rms" or "layer"; the rest as in the op -> (normed, residual)."""
        rows, dim = x.shape
        normed = poisoned(x.shape, x.dtype) if normed is None else normed
        residual = poisoned(x.shape, x.dtype) if residual is None else residual
        args = SkipNormArgs(
            x.ctypes.data, skip.ctypes.data, weight.ctypes.data,
            None if bias is None else bias.ctypes.data,
            normed.ctypes.data, residual.ctypes.data, rows, dim,
            _stride(x, 0), _stride(skip, 0), _stride(normed, 0), _stride(residual, 0),
            self._steering(rows, vectors, strength, index, 1e-6),
            eps, weight_offset, _CODES[x.dtype],
        )  # fmt: skip
        self._call(f"skip_steer_{norm}_norm", args)
        return normed, residual

    def plan(
        self, rows: int, dim: int, dtype: str, capability: int = 90, aligned: bool = True
    ) -> LaunchPlan:
        return self._plan("plan", LaunchPlan(), (rows, dim), dtype, capability, aligned)

    def plan_staying(
        self, plan: LaunchPlan, rows: int, resident_threads: int, stay: str = "auto"
    ) -> LaunchPlan:
        staying = LaunchPlan.from_buffer_copy(plan)
        self._library.plan_staying(
            ctypes.byref(staying), c_int64(rows), c_int64(resident_threads),
            c_int(("auto", "never", "always").index(stay)),
        )  # fmt: skip
        return staying

    def plan_interpolate(
        self, rows: int, steps: int, dim: int, dtype: str, capability: int = 90,
        aligned: bool = True,
    ) -> InterpolatePlan:  # fmt: skip
        plan = InterpolatePlan()
        return self._plan("plan_interpolate", plan, (rows, steps, dim), dtype, capability, aligned)

    def plan_accumulate(
        self, rows: int, steps: int, dim: int, dtype: str, capability: int = 90,
        aligned: bool = True,
    ) -> AccumulatePlan:  # fmt: skip
        plan = AccumulatePlan()
        return self._plan("plan_accumulate", plan, (rows, steps, dim), dtype, capability, aligned)

    def _plan(
        self, name: str, plan: Any, sizes: tuple[int, ...], dtype: str, capability: int,
        aligned: bool,
    ) -> Any:  # fmt: skip
        code = _CODES[DTYPES[dtype]]
        getattr(self._library, name)(
            *map(c_int64, sizes), c_int(code), c_int(capability), c_int(aligned),
            ctypes.byref(plan),
        )  # fmt: skip
        return plan


# --- Arrays --------------------------------------------------------------------------------------


def poisoned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """NaN everywhere, so that an element nobody writes is seen."""
    with np.errstate(invalid="ignore"):
        return placed(np.broadcast_to(np.array(np.nan, dtype), shape))


def placed(array: Array, *, offset: int = 0, gap: int = 0) -> Array:
    """A copy of `array` in memory of its own, of which it is the very end: a read past the last
    element leaves the allocation. The first element is 16-byte aligned plus `offset` elements, and
    `gap` NaN elements lie between rows."""
    dim = array.shape[-1]
    count = math.prod(array.shape[:-1])
    with np.errstate(invalid="ignore"):  # numpy warns of a NaN that becomes a bfloat16
        memory = np.full(max(offset + count * (dim + gap) - gap, 1), np.nan, array.dtype)
    assert memory.ctypes.data % 16 == 0
    itemsize = array.itemsize
    view = np.ndarray(
        (count, dim), array.dtype, memory, offset * itemsize, ((dim + gap) * itemsize, itemsize)
    )
    view[...] = array.reshape(count, dim)
    if array.ndim == 1:
        return view[0]
    if array.ndim == 2:
        return view
    strides = [itemsize, (dim + gap) * itemsize]
    for size in array.shape[-2:0:-1]:
        strides.append(strides[-1] * size)
    return np.lib.stride_tricks.as_strided(view, array.shape, strides[::-1])
