"""The HTML report: well-formed, self-contained, escaped, and with every value that it is given."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from grains_ext.attribution import Attribution
from grains_ext.report import Generation, MethodRow, write_report
from grains_ext.report.html import shades

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes, texts and the tags themselves."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def tokens(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "span" and attrs.get("role") == "img"]


def attribution(tokens: tuple[str, ...], scores: list[float], **changes: object) -> Attribution:
    values: dict[str, object] = {
        "tokens": tokens,
        "token_ids": tuple(range(len(tokens))),
        "modality": ("text",) * len(tokens),
        "scores": np.array(scores, dtype=np.float32),
        "f_input": 1.25,
        "f_baseline": -0.5,
        "residual": 0.0125,
        "evaluations": 18,
        "n_steps": 16,
        "converged": True,
        "method": "gausslegendre",
        "baseline": "bos",
        "prompt": " ".join(tokens),
        "chosen": "red",
        "rejected": "blue",
        "pair_id": "p-0",
    }
    return Attribution(**{**values, **changes})  # type: ignore[arg-type]


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def full_report(path: Path) -> tuple[str, Page]:
    write_report(
        path,
        title="What <steering> did",
        attributions=[
            attribution(("study", "legend", "colour"), [2.0, -1.0, 0.0]),
            attribution(("<bos>", "<script>alert(1)</script>", 'a"b'), [0.0, 0.5, -0.25]),
        ],
        rows=[
            MethodRow("unsteered", 0.0123, (0.004, 0.031), 330, 1.0),
            MethodRow("ours", 0.456, (0.402, 0.51), 330, 1.034, "block 2, strength 4"),
        ],
        generations=[Generation("q <b>?", "red", "blue . or so they say", "red .")],
        metadata={"Export": {"largest error": 3e-6, "note": "a & b"}},
    )
    return read(path)


def test_report_is_well_formed_and_needs_no_network(tmp_path: Path) -> None:
    text, page = full_report(tmp_path / "new" / "report.html")
    tags = {tag for tag, _ in page.tags}
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"(https?:)?//\w|url\(|@import", text)
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    captions = sum(tag == "caption" for tag, _ in page.tags)
    assert captions == sum(tag == "table" for tag, _ in page.tags) == 3


def test_tokens_carry_their_signed_value(tmp_path: Path) -> None:
    _, page = full_report(tmp_path / "report.html")
    study, legend, colour = page.tokens[:3]
    assert study["title"] == study["aria-label"] == "study: +2.000"
    assert study["class"] == "token pos"
    assert study["style"] == "--a: 0.750"
    assert legend["aria-label"] == "legend: -1.000"
    assert legend["class"] == "token neg"
    assert legend["style"] == "--a: 0.375"
    assert colour["class"] == "token pos weak"


def test_text_is_escaped(tmp_path: Path) -> None:
    text, page = full_report(tmp_path / "report.html")
    assert "<script>" not in text
    assert page.tokens[4]["title"] == "<script>alert(1)</script>: +0.500"
    assert page.tokens[5]["title"] == 'a"b: -0.250'
    assert {"q <b>?", "a & b", "What <steering> did"} <= set(page.texts)


def test_every_value_is_on_the_page(tmp_path: Path) -> None:
    _, page = full_report(tmp_path / "report.html")
    body = " ".join(" ".join(page.texts).split())
    for value in (
        "1.2 %",
        "0.4 % to 3.1 %",
        "45.6 %",
        "1.034×",
        "330",
        "block 2, strength 4",
        "blue . or so they say",
        "3e-06",
        "+1.250",
        "-0.500",
        "+0.0125",
        "p-0",
    ):
        assert value in body
    assert "beyond the tolerance" not in body


def test_unconverged_attribution_says_so(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="t", attributions=[attribution(("a",), [1.0], converged=False)])
    assert "beyond the tolerance" in " ".join(read(path)[1].texts)


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "report.html", title="nothing"))[1]
    assert "nothing" in page.texts
    assert not page.tokens


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="old")
    with pytest.raises(ValueError, match="zip"):
        write_report(path, title="new", attributions=[attribution(("a", "b"), [1.0])])
    assert "old" in read(path)[1].texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_shades_keep_sign_and_order() -> None:
    assert shades([2.0, -4.0, 0.0]) == [0.5, -1.0, 0.0]
    assert shades([0.0, 0.0]) == [0.0, 0.0]
    assert shades([]) == []
