"""Wrong arguments: an error that names the argument, what was given and what was expected."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grains_ext import _C, ops
from tests.op_cases import OPS, STEERING_OPS, make_case

HALF, WIDE = torch.float16, torch.float64


def first(op: str) -> str:
    return {"steer_add_normalize": "hidden"}.get(op, "x" if op in STEERING_OPS else "input")


def raises(op: str, message: str, **changes: Any) -> None:
    inputs = make_case(op, (2, 3), 8, torch.float32).inputs
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**(inputs | changes))


@pytest.mark.parametrize("op", OPS)
def test_unsupported_dtype(op: str) -> None:
    name = first(op)
    raises(
        op,
        rf"grains::{op}: `{name}` is float64, expected float32, float16 or bfloat16; convert",
        **{name: torch.randn(2, 3, 8, dtype=WIDE)},
    )


@pytest.mark.parametrize("op", STEERING_OPS)
def test_steering_arguments(op: str) -> None:
    shape = rf"for `{first(op)}` of shape \[2, 3, 8\]"
    raises(op, rf"`vectors` has shape \[7\], expected \[D\] or .* {shape}", vectors=torch.ones(7))
    raises(op, r"`vectors` has shape \[1, 1, 8\]", vectors=torch.ones(1, 1, 8))
    raises(op, r"`vectors` has shape \[0, 8\], expected .* at least one", vectors=torch.ones(0, 8))
    raises(op, r"`vectors` is float16, but `\w+` is float32", vectors=torch.ones(8, dtype=HALF))
    raises(op, r"`strength` is float64, expected float32", strength=torch.ones((), dtype=WIDE))
    raises(
        op,
        r"`strength` has shape \[2\], expected \[\] or \[N\].* for `vectors` of shape \[8\]",
        strength=torch.ones(2),
    )
    raises(op, r"`index` is missing: `vectors` is a bank of 3", vectors=torch.ones(3, 8))


@pytest.mark.parametrize("op", STEERING_OPS)
def test_index(op: str) -> None:
    bank = torch.ones(3, 8)
    raises(op, r"`index` is int64, expected int32", vectors=bank, index=torch.zeros(2, 3).long())
    for wrong in ((3,), (2, 4), (2, 3, 1), ()):
        raises(
            op,
            rf"`index` has shape \[{', '.join(map(str, wrong))}\], expected all dimensions but",
            vectors=bank,
            index=torch.zeros(wrong, dtype=torch.int32),
        )
    for bad in (3, -2):
        index = torch.tensor([[0, 1, 2], [-1, bad, 0]], dtype=torch.int32)
        raises(
            op,
            rf"`index` is {bad} at position 4, expected -1 to 2 .* shape \[3, 8\]",
            vectors=bank,
            index=index,
        )


def test_rows() -> None:
    for wrong in ((), (3, 0)):
        raises(
            "steer_add_normalize", r"`hidden` has shape \[.*hidden size", hidden=torch.ones(wrong)
        )
    for eps in (-1.0, 1.0, float("nan")):
        raises("steer_add_normalize", r"`eps` is .*, expected a number in \[0, 1\)", eps=eps)
    hidden = torch.ones(3, 8, dtype=WIDE)
    with pytest.raises(RuntimeError, match=r"grains::steer_add_normalize_: `hidden` is float64"):
        ops.steer_add_normalize_(hidden, hidden[0], 1.0)


@pytest.mark.parametrize("op", STEERING_OPS[1:])
def test_fused_arguments(op: str) -> None:
    raises(op, r"`skip` has shape \[2, 8\], expected the same shape", skip=torch.ones(2, 8))
    raises(op, r"`skip` is float16, but `x` is float32", skip=torch.ones(2, 3, 8, dtype=HALF))
    raises(op, r"`weight` has shape \[1, 8\], expected \[D\]", weight=torch.ones(1, 8))
    raises(op, r"`weight` is float16, but `x` is float32", weight=torch.ones(8, dtype=HALF))
    raises(op, r"`eps` is -1, expected a number >= 0", eps=-1.0)


def test_layer_norm_bias() -> None:
    raises("skip_steer_layer_norm", r"`bias` has shape \[9\], expected \[D\]", bias=torch.ones(9))


@pytest.mark.parametrize("op", OPS[:2])
def test_attribution_arguments(op: str) -> None:
    name = "alphas" if op == "ig_interpolate" else "weights"
    raises(op, r"`input` has shape \[3, 8\], expected \[batch, tokens,", input=torch.ones(3, 8))
    for wrong in ((7,), (3, 3, 8), (1, 2, 3, 8)):
        raises(op, r"`baseline` has shape .*, expected .* broadcasts", baseline=torch.ones(wrong))
    raises(op, r"`baseline` is float16, but `input`", baseline=torch.ones(8, dtype=HALF))
    raises(op, rf"`{name}` is float64, expected float32", **{name: torch.ones(5, dtype=WIDE)})
    for wrong in ((), (5, 3), (5, 2, 1)):
        raises(op, rf"`{name}` has shape .*expected \[steps\] or", **{name: torch.ones(wrong)})


def test_accumulate_steps() -> None:
    raises("ig_accumulate", r"`weights` has shape \[4\], .* one weight per", weights=torch.ones(4))
    for wrong in ((5, 2, 8), (5, 2, 4, 8)):
        raises("ig_accumulate", r"`grads` has shape .*expected \[steps", grads=torch.ones(wrong))


def test_instruction_set_must_be_supported() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is not one of .*generic"):
        _C.set_cpu_isa("sse9")


def test_unknown_instruction_set_in_the_environment_is_reported() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from grains_ext import _C; print(_C.cpu_isa())"],
        env={"GRAINS_CPU_ISA": "sse9"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GRAINS_CPU_ISA=sse9 is unknown or not supported" in result.stderr
    assert result.stdout.strip() == _C.supported_isas()[-1]


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"is not built; build it with `make setup`"):
        ops._load_library(tmp_path / "libgrains_torch.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"does not load with torch .* build it with"):
        ops._load_library(tmp_path / "broken.so")
