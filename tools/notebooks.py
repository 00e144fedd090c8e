"""Runs the notebooks under examples/ and writes them with their outputs.

python -m tools.notebooks
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMEOUT_S = 600


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook after a run in a new process, in its own folder. Raises where a cell does.

    Only what a reader is to see is kept: no times, no warnings with this machine's paths, no plain
    text of what is there as HTML, and of the kernel nothing but its name.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    with tempfile.TemporaryDirectory() as sockets:  # of its own, not ports of the machine
        manager = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=str(Path(sockets) / "kernel")
        )
        NotebookClient(
            notebook,
            km=manager,
            timeout=TIMEOUT_S,
            startup_timeout=TIMEOUT_S,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _seen(cell.outputs)
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop("text/plain", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _seen(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without warnings and blank lines; what is printed in one go, which arrives in any number of
    pieces, in one."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        is_text = output.output_type == "stream"
        if is_text and (output.name == "stderr" or not output.text.strip()):
            continue
        if is_text and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main() -> None:
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(EXAMPLES.glob("*.ipynb")):
        nbformat.write(executed(path), path)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
