"""The guard of the kernels' speed: what it calls slower."""

from pathlib import Path

from benchmarks.check import REFERENCE, Reference, compare_counts, kernels, timed_cases
from grains_ext.timing import Spread


def test_more_instructions_are_slower_and_a_few_are_not() -> None:
    before = {"avx2 a": 1000, "avx2 b": 1000, "avx2 c": 1000}
    now = {"avx2 a": 1000, "avx2 b": 1015, "avx2 c": 1030, "avx2 new": 5}
    found = {finding.case: finding.slower for finding in compare_counts(now, before)}
    assert found == {"avx2 a": False, "avx2 b": False, "avx2 c": True}


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    reference = Reference("12.2.0", "a processor", {"a": 1}, {"b": Spread(1.0, 0.9, 1.1)})
    reference.save(tmp_path / "reference.json")
    assert Reference.load(tmp_path / "reference.json") == reference


def test_the_committed_reference_covers_every_kernel() -> None:
    reference = Reference.load(REFERENCE)
    assert reference.ratios.keys() == timed_cases().keys()
    for isa in ("generic", "avx2", "avx512"):
        assert sum(case.startswith(f"{isa} ") for case in reference.instructions) == len(
            list(kernels())
        )
