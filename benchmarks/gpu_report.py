"""Writes what benchmarks/gpu.sh found: benchmarks/results/<device>-<date>.json.

Needs nothing but Python 3.9, so that there is a file also where the package could not be built.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any


def read_steps(path: Path) -> list[dict[str, str]]:
    """Lines of name, state, seconds and detail, between tabs."""
    with path.open(newline="") as file:
        names = ["step", "state", "seconds", "detail"]
        return list(csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE))


def result_name(device: str, date: datetime.date) -> str:
    """Such as nvidia-h200-2026-11-21.json."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-{date.isoformat()}.json"


def read_kernels(path: Path) -> dict[str, Any]:
    """What benchmarks.kernels wrote; nothing where it did not get to write, or not all of it."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, required=True, help="may not exist")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--fact", action="append", default=[], help="NAME=VALUE, of the machine")
    options = parser.parse_args()
    kernels = read_kernels(options.kernels)
    machine = {"python": platform.python_version(), "cores": os.cpu_count()}
    document = {
        "benchmark": "gpu",
        "device": options.device,
        "machine": machine | dict(fact.split("=", 1) for fact in options.fact),
        "environment": kernels.get("environment"),
        "steps": read_steps(options.steps),
        "kernels": kernels.get("rows"),
    }
    path = options.folder / result_name(options.device, datetime.date.today())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)  # whole, should this be the moment at which everything is stopped
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
