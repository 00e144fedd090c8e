"""The launch plan is a pure function: it is checked for every size without a GPU."""

from collections.abc import Iterator

import pytest

from grains_ext import _C
from tests.shim import DTYPES, Shim
from tests.test_cuda_shim import shim  # noqa: F401  (the fixture)

MAX_GRID_X, MAX_GRID_Y = 2**31 - 1, 65535
SHORTER_ROWS = range(1, 20_001)
LONGER_ROWS = (32_768, 65_536, 100_003, 2**20, 2**30)


def sizes() -> Iterator[tuple[int, str, bool]]:
    for dtype in DTYPES:
        for aligned in (True, False):
            for dim in (*SHORTER_ROWS, *LONGER_ROWS):
                yield dim, dtype, aligned


def vector_width(dim: int, dtype: str, aligned: bool) -> int:
    width = 16 // DTYPES[dtype].itemsize
    return width if aligned and dim % width == 0 else 1


def test_every_row_plan_is_legal() -> None:
    for dim, dtype, aligned in sizes():
        plan = _C.launch_plan(1000, dim, dtype, 90, aligned)
        row_threads, rest = divmod(plan["threads"], plan["rows_per_block"])
        assert rest == 0
        assert plan["threads"] % 32 == 0
        assert 32 <= plan["threads"] <= 512  # the kernels' __launch_bounds__
        assert plan["vector_elements"] == vector_width(dim, dtype, aligned)
        # Sums within a row go by shuffles in a warp, or over whole warps of a block of one row.
        assert row_threads in (1, 2, 4, 8, 16, 32) or plan["rows_per_block"] == 1
        assert plan["blocks"] == -(-1000 // plan["rows_per_block"])
        kept = plan["elements_per_thread"]
        assert kept % plan["vector_elements"] == 0
        assert kept == 0 or row_threads * kept >= dim  # the registers hold the row
        assert kept > 0 or plan["vector_elements"] == 1 or dim > 8192


def test_rows_of_common_models_stay_in_registers() -> None:
    for dim in (768, 1024, 2048, 2560, 3072, 4096, 5120, 8192):
        for dtype in DTYPES:
            assert _C.launch_plan(1, dim, dtype, 90)["elements_per_thread"] == 16


@pytest.mark.parametrize("rows", [1, 2**31 - 1, 2**31, 2**40])
def test_blocks_stay_within_the_grid(rows: int) -> None:
    for dim in (1, 100, 4096):
        plan = _C.launch_plan(rows, dim, "float32", 90)
        wanted = -(-rows // plan["rows_per_block"])
        assert plan["blocks"] == min(wanted, MAX_GRID_X)


def test_blocks_stay_where_rows_are_many_and_share_them_evenly(shim: Shim) -> None:  # noqa: F811
    resident = 132 * 1024
    for dim, dtype, _ in sizes():
        if dim % 8 or dim > 8192:
            continue
        for rows in (1, 1000, 8192, 100_003):
            plan = shim.plan(rows, dim, dtype)
            staying = shim.plan_staying(plan, rows, resident)
            groups = -(-rows // plan.rows_per_block)
            assert staying.stays == (groups // (resident // plan.threads) >= 16)
            if not staying.stays:
                assert staying.blocks == plan.blocks
                continue
            assert staying.blocks <= resident // plan.threads
            visits = -(-groups // staying.blocks)
            assert visits >= 16
            assert (visits - 1) * staying.blocks < groups  # one fewer would not do
    assert not shim.plan_staying(shim.plan(8192, 8192, "float32"), 8192, resident, "never").stays
    alone = shim.plan_staying(shim.plan(3, 4096, "float32"), 3, 0, "always")
    assert (alone.stays, alone.blocks) == (True, 1)  # a GPU whose blocks do not fit still runs


def test_rows_that_are_read_twice_do_not_stay(shim: Shim) -> None:  # noqa: F811
    for dim, aligned in ((16384, True), (4096, False), (31, True)):
        plan = shim.plan(10**6, dim, "bfloat16", aligned=aligned)
        assert not shim.plan_staying(plan, 10**6, 132 * 1024, "always").stays


def test_programmatic_launch_from_hopper_on() -> None:
    for capability in (75, 80, 86, 89):
        assert not _C.launch_plan(1, 64, "float16", capability)["programmatic_launch"]
    for capability in (90, 100, 120):
        assert _C.launch_plan(1, 64, "float16", capability)["programmatic_launch"]


def test_every_interpolation_plan_is_legal(shim: Shim) -> None:  # noqa: F811
    for dim, dtype, aligned in sizes():
        plan = shim.plan_interpolate(100, 20, dim, dtype, aligned=aligned)
        assert plan.vector_elements == vector_width(dim, dtype, aligned)
        assert plan.threads == 256
        assert plan.blocks * plan.threads * plan.vector_elements >= 100 * dim
        assert plan.step_blocks * plan.steps_per_block >= 20
    huge = shim.plan_interpolate(2**40, 2**30, 4096, "float32")
    assert (huge.blocks, huge.step_blocks) == (MAX_GRID_X, MAX_GRID_Y)


def test_every_accumulation_plan_is_legal(shim: Shim) -> None:  # noqa: F811
    for dim, dtype, aligned in sizes():
        rows, steps = 1 + dim % 300, dim % 40
        plan = shim.plan_accumulate(rows, steps, dim, dtype, aligned=aligned)
        row_threads, rest = divmod(plan.threads, plan.rows_per_block)
        assert rest == 0
        assert plan.threads % 32 == 0
        assert 32 <= plan.threads <= 512
        assert row_threads & (row_threads - 1) == 0
        assert row_threads <= 32 or plan.rows_per_block == 1
        assert row_threads % plan.column_threads == 0
        assert plan.vector_elements == vector_width(dim, dtype, aligned)
        assert plan.blocks * plan.rows_per_block >= rows
    few, many = (shim.plan_accumulate(rows, 20, 4096, "bfloat16") for rows in (8, 4096))
    assert few.threads > many.threads  # with few rows each gets more of a multiprocessor


def test_the_plan_of_the_python_module_is_the_one_of_the_kernels(shim: Shim) -> None:  # noqa: F811
    for dim in (1, 31, 512, 4096, 16384):
        for dtype in DTYPES:
            plan = shim.plan(77, dim, dtype)
            names = [name for name, *_ in plan._fields_]
            expected = {name: getattr(plan, name) for name in names}
            assert _C.launch_plan(77, dim, dtype, 90) == expected
