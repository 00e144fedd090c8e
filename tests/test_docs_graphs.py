"""Every example in the README and on the pages about ONNX graphs runs."""

import shutil
from pathlib import Path

import pytest

from tests.docs_sandbox import GRAPH_PAGES, furnish, furnish_graphs, pages, run_page
from tests.exports import gradient_traced_once, share_trace


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    furnish(folder)
    furnish_graphs(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if page in GRAPH_PAGES])
def test_the_examples_of_a_page_run(
    page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(furnished, tmp_path / "page"))
    share_trace(monkeypatch)
    with gradient_traced_once():
        run_page(page)
