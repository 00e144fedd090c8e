"""Are the CPU kernels still as fast as they were? `make bench-check`.

    python -m benchmarks.check             # against the committed reference; exit code 1: slower
    python -m benchmarks.check --update    # measure the reference anew

Two things are compared. *Instructions* of one call, for every instruction set that this processor
has: they do not depend on what else the machine does, but on the compiler, so they are judged only
where it is the reference's. They are counted by stepping through the call (ptrace), not by
valgrind, which does not know AVX-512. *Time over memcpy* of as much memory traffic, for the best
set: judged only on the reference's processor, with its spread as the margin, and measured again
before it is called slower.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cpu_driver import DECODER_OPS, DTYPES, OPS, Driver, MissingToolError, native
from grains_ext.timing import Spread, processor

REFERENCE = Path(__file__).resolve().parent / "results" / "kernels-check.json"
COUNTED = (1, 512)
TIMED = ((64, 4096), (2048, 4096))
COUNTED_ATTENTION = (8, 64)
"""Tokens, and the width of all heads, of 64 each; a tile of queries and part of the next one."""
TIMED_ATTENTION = ((64, 512), (512, 512))
ROUNDS = 9
ATTEMPTS = 3
MORE_INSTRUCTIONS = 1.02
"""Counts repeat to a few instructions (the loader's alignment); the smallest case has 400."""
MORE_TIME = 1.25
"""Over the reference's upper quartile. Quiet runs agree to 5 %, runs beside other work to 20."""


@dataclass(frozen=True)
class Reference:
    compiler: str
    processor: str
    instructions: dict[str, int]
    ratios: dict[str, Spread]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Reference":
        found: dict[str, Any] = json.loads(path.read_text())
        found["ratios"] = {name: Spread(**spread) for name, spread in found["ratios"].items()}
        return cls(**found)


@dataclass(frozen=True)
class Finding:
    case: str
    unit: str
    before: float
    now: float
    slower: bool


def kernels() -> Iterator[tuple[str, str]]:
    for op in (*OPS, *DECODER_OPS):
        for dtype in DTYPES:
            yield op, dtype


def count(driver: Driver) -> dict[str, int]:
    """Case -> instructions, over all instruction sets."""
    counted: dict[str, int] = {}
    for isa in driver.isas():
        for op, dtype in kernels():
            rows, dim = COUNTED_ATTENTION if op.startswith("attention") else COUNTED
            counted[f"{isa} {op} {dtype}"] = driver.count(isa, op, dtype, rows, dim)
    return counted


def time(driver: Driver, op: str, dtype: str, rows: int, dim: int) -> Spread:
    isa = driver.isas()[-1]
    times = driver.times(isa, op, dtype, rows, dim, ROUNDS)
    return Spread.of([of_op / of_copy for of_op, of_copy in times])


def timed_cases() -> dict[str, tuple[str, str, int, int]]:
    return {
        f"{op} {dtype} {rows}x{dim}": (op, dtype, rows, dim)
        for op, dtype in kernels()
        for rows, dim in (TIMED_ATTENTION if op.startswith("attention") else TIMED)
    }


def compare_counts(now: dict[str, int], before: dict[str, int]) -> list[Finding]:
    return [
        Finding(
            case, "instructions", before[case], counted, counted > MORE_INSTRUCTIONS * before[case]
        )
        for case, counted in now.items()
        if case in before
    ]


def compare_times(driver: Driver, before: dict[str, Spread]) -> list[Finding]:
    findings = []
    for case, kernel in timed_cases().items():
        if case not in before:
            continue
        bound = MORE_TIME * before[case].high
        now = time(driver, *kernel)
        for _ in range(ATTEMPTS - 1):
            if now.low <= bound:
                break
            now = time(driver, *kernel)  # noise does not last, a slower kernel does
        slower = now.low > bound
        findings.append(Finding(case, "time / memcpy", before[case].median, now.median, slower))
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help="write the reference")
    parser.add_argument("--no-times", action="store_true", help="count instructions only")
    options = parser.parse_args()
    console = Console(width=120)
    try:
        driver = native()
    except MissingToolError as missing:
        sys.exit(f"bench-check: {missing}")
    if options.update:
        ratios = {case: time(driver, *kernel) for case, kernel in timed_cases().items()}
        Reference(driver.compiler(), processor(), count(driver), ratios).save(REFERENCE)
        console.print(f"Written: {REFERENCE}")
        return

    before = Reference.load(REFERENCE)
    findings: list[Finding] = []
    if driver.compiler() != before.compiler:
        console.print(f"instructions: not judged, {driver.compiler()} is not {before.compiler}")
    else:
        try:
            findings += compare_counts(count(driver), before.instructions)
        except RuntimeError as error:  # no ptrace, in some containers
            console.print(f"instructions: not counted, {error}")
    if options.no_times:
        console.print("times: not asked for")
    elif processor() != before.processor:
        console.print(f"times: not judged, {processor()} is not {before.processor}")
    else:
        findings += compare_times(driver, before.ratios)
    report(console, findings)
    if any(finding.slower for finding in findings):
        sys.exit("bench-check: slower than the reference; if that is meant: --update")


def report(console: Console, findings: list[Finding]) -> None:
    """What got slower, or faster by a tenth, and how many did not."""
    table = Table("case", "unit", "reference", "now", "")
    for finding in findings:
        if finding.slower or finding.now < 0.9 * finding.before:
            verdict = "slower" if finding.slower else "faster"
            numbers = (f"{finding.before:.5g}", f"{finding.now:.5g}")
            table.add_row(finding.case, finding.unit, *numbers, verdict)
    if table.row_count:
        console.print(table)
    console.print(f"bench-check: {len(findings)} figures compared")


if __name__ == "__main__":
    main()
