"""The CUDA kernels against the float64 reference, and what only a GPU can show."""

import pytest
import torch

from grains_ext import ops
from tests.op_cases import DTYPES, LAYOUTS, OPS, ROWS_OF_DIM, STEERING_OPS, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_hidden_size(op: str, dtype: torch.dtype) -> None:
    for dim, rows in ROWS_OF_DIM.items():
        make_case(op, (1, rows), dim, dtype, device="cuda").check()


@pytest.mark.parametrize("op", OPS)
def test_few_and_many_rows(op: str) -> None:
    for rows in ((0, 3), (2, 0), (1, 1), (4, 1024)):
        make_case(op, rows, 136, torch.bfloat16, device="cuda").check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    for dtype in DTYPES:
        for dim in (1, 8, 45, 512):
            make_case(op, (3, 4), dim, dtype, device="cuda", layout=LAYOUTS[layout]).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STEERING_OPS)
def test_bank_and_scales(op: str, dtype: torch.dtype) -> None:
    make_case(op, (4, 5), 40, dtype, device="cuda", bank=3).check()
    powers = (-5, 3) if dtype == torch.float16 else (-38, -30, -20, 18, 25, 30)
    for power in powers:
        make_case(op, (2, 3), 100, dtype, device="cuda", scale=10.0**power).check()


@pytest.mark.parametrize("op", STEERING_OPS)
def test_index_outside_the_bank_is_nan(op: str) -> None:
    case = make_case(op, (4,), 24, torch.float32, device="cuda", bank=2)
    case.inputs["index"] = torch.tensor([0, 2, -2, 1], dtype=torch.int32, device="cuda")
    for result in case.run():
        assert result.isnan().all(-1).tolist() == [False, True, True, False]


def test_in_place_and_unsteered_rows() -> None:
    for dtype in DTYPES:
        inputs = make_case("steer_add_normalize", (3, 4), 72, dtype, device="cuda", bank=2).inputs
        expected = ops.steer_add_normalize(**inputs)
        unchanged = ops.steer_add_normalize(**(inputs | {"strength": 0.0}))
        assert torch.equal(unchanged, inputs["hidden"])
        ops.steer_add_normalize_(**inputs)
        assert torch.equal(inputs["hidden"], expected)


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    hidden = torch.randn(8, 4096, device="cuda")
    vector, strength = torch.randn(4096, device="cuda"), torch.tensor(1.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.steer_add_normalize(hidden, vector, strength)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steered = ops.steer_add_normalize(hidden, vector, strength)
    for value in (0.5, 0.0, -2.0):
        strength.fill_(value)
        graph.replay()
        expected = ops.steer_add_normalize(hidden, vector, strength)
        assert torch.equal(steered, expected)


def test_devices_must_agree() -> None:
    hidden, vector = torch.randn(2, 8, device="cuda"), torch.randn(8)
    with pytest.raises(RuntimeError, match="`vectors` is on cpu, but `hidden` is on cuda:0"):
        ops.steer_add_normalize(hidden, vector, 1.0)
    with pytest.raises(RuntimeError, match="`strength` is on cpu, but `hidden` is on cuda:0"):
        ops.steer_add_normalize(hidden, vector.cuda(), torch.tensor(1.0))
