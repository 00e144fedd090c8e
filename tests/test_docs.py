"""Every example in the documentation runs; those on ONNX graphs are test_docs_graphs'."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from tests.docs_sandbox import GRAPH_PAGES, ROOT, furnish, pages, run_page


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    furnish(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if page not in GRAPH_PAGES])
def test_the_examples_of_a_page_run(
    page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(furnished, tmp_path / "page"))
    run_page(page)


def messages() -> str:
    """Every string in the package; what is filled in is left out, each part on a line."""
    lines = []
    for path in (*ROOT.glob("grains_ext/**/*.py"), *ROOT.glob("export/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_the_page_of_errors_quotes_the_messages_that_there_are() -> None:
    known = messages()
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    for message, *_ in rows:
        for quoted in re.findall(r"`([^`]+)`", message):
            if not quoted.endswith("Error"):  # the exception's class
                for part in quoted.split("..."):
                    assert part.strip(" (),'") in known, quoted
