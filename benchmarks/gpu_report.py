"""Writes what benchmarks/gpu.sh found: benchmarks/results/<device>-<date>.json."""

import argparse
import csv
import datetime
import json
import re
from pathlib import Path
from typing import Any

from grains_ext.timing import environment


def read_steps(path: Path) -> list[dict[str, str]]:
    """Lines of name, state, seconds and detail, between tabs."""
    with path.open(newline="") as file:
        names = ["step", "state", "seconds", "detail"]
        return list(csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE))


def result_name(device: str, date: datetime.date) -> str:
    """Such as nvidia-h200-2026-11-21.json."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-{date.isoformat()}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, required=True, help="may not exist")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    kernels: list[dict[str, Any]] | None = None
    if options.kernels.exists():
        kernels = json.loads(options.kernels.read_text())["rows"]
    document = {
        "benchmark": "gpu",
        "device": options.device,
        "environment": environment(),
        "steps": read_steps(options.steps),
        "kernels": kernels,
    }
    path = options.folder / result_name(options.device, datetime.date.today())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
