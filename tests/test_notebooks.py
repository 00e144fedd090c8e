"""The tutorials under examples/ run, and what is committed of them is what they show."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

from tools.notebooks import EXAMPLES, executed  # noqa: E402

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_BYTES = 300_000


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[str, list[str]]]:
    """What each output is and in which forms it can be shown, in order."""
    return [
        (output.output_type, sorted(output.get("data", ())))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    committed = nbformat.read(path, as_version=4)
    # Its figures are held to what the text says of them by assertions in its cells.
    assert outputs(executed(path)) == outputs(committed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_was_run_from_top_to_bottom(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


def test_there_is_one_for_text_and_one_for_pictures() -> None:
    assert len(NOTEBOOKS) >= 2
