"""The HTML report: well-formed, self-contained, escaped, and with every value that it is given."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from grains_ext.attribution import Attribution
from grains_ext.report import Generation, MethodRow, write_report
from grains_ext.report.explorer import FIRST
from grains_ext.report.tokens import attribution_fragment
from grains_ext.report.view import shades
from grains_ext.vision.grid import ImageGrid
from tests.attributions import attribution
from tests.test_attribution_result import image_grid

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Token(NamedTuple):
    text: str
    score: str
    attributes: dict[str, str | None]


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes, texts and the tags themselves."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[tuple[int, str]] = []
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
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
            self.inside.append((len(self.tags) - 1, data))

    @property
    def tokens(self) -> list[Token]:
        """Each list item that has a value in it, but for the pattern that the script copies."""
        of_tag: dict[int, str] = {}
        for place, data in self.inside:
            of_tag.setdefault(place, data)
        found = [
            Token(of_tag[place - 1], of_tag.get(place, "").strip(), self.tags[place - 1][1])
            for place, (_, attributes) in enumerate(self.tags)
            if attributes.get("class") == "value" and self.tags[place - 1][0] == "li"
        ]
        return [token for token in found if token.score]


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_needs_no_network(text: str) -> None:
    assert not re.search(r"https?:|[\"'(]//|url\((?!data:)|@import", text)


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
    assert_needs_no_network(text)
    assert not tags & {"link", "img", "iframe", "object"}
    assert "color-scheme: light dark" in text
    assert "@media print" in text
    captions = sum(tag == "caption" for tag, _ in page.tags)
    assert captions == sum(tag == "table" for tag, _ in page.tags) == 2


def test_tokens_carry_their_signed_value(tmp_path: Path) -> None:
    _, page = full_report(tmp_path / "report.html")
    assert page.tokens[:3] == [
        ("study", "+2.000", {"style": "--a: 0.75"}),
        ("legend", "-1.000", {"style": "--a: -0.375", "class": "neg"}),
        ("colour", "+0.000", {"style": "--a: 0.0"}),
    ]


def test_text_is_escaped(tmp_path: Path) -> None:
    text, page = full_report(tmp_path / "report.html")
    assert "<script>alert" not in text
    assert page.tokens[4].text == "<script>alert(1)</script>"
    assert page.tokens[5].text == 'a"b'
    assert {"q <b>?", "a & b", "What <steering> did"} <= set(page.texts)


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    text, page = full_report(tmp_path / "report.html")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policy is not None
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy


HOSTILE = "</script><!--<script>\u202etxt.exe\x00\ud800\u2028\U000e0041"


def test_what_hides_or_turns_text_is_spelled_out(tmp_path: Path) -> None:
    it = attribution((HOSTILE,), [1.0], pair_id=HOSTILE, chosen=HOSTILE)
    texts = [Generation(HOSTILE, HOSTILE, HOSTILE, "")]
    write_report(
        tmp_path / "report.html",
        title=HOSTILE,
        attributions=[it] * (FIRST + 1),
        generations=texts * (FIRST + 1),
        rows=[MethodRow(HOSTILE, 0.5, (0.4, 0.6), 3, 1.0, HOSTILE)],
        metadata={HOSTILE: {HOSTILE: HOSTILE}},
    )
    text, page = read(tmp_path / "report.html")
    assert text.count("<script>") == 1  # and two with data
    assert text.count("</script>") == 3
    assert "<!--" not in text
    assert not re.search("[\x00\u202e\ud800\u2028\U000e0041]", text)
    assert page.tokens[0].text.endswith("[U+202E]txt.exe[U+0000][U+D800][U+2028][U+E0041]")
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text):
        assert "</script><!--<script>[U+202E]" in json.loads(data)["rows"][-1]["text"]


def test_every_value_is_on_the_page(tmp_path: Path) -> None:
    _, page = full_report(tmp_path / "report.html")
    body = " ".join(" ".join(page.texts).split())
    for value in (
        "1.2 %",
        "0.4 to 3.1 %",
        "45.6 %",
        "× 1.034",
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
    assert "do not trust" not in body


def test_unconverged_attribution_says_so(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    wrong = attribution(("a",), [1.0], converged=False)
    write_report(path, title="t", attributions=[attribution(("a",), [1.0]), wrong])
    text, page = read(path)
    assert text.count('class="failed"') == 1
    for words in (
        "converged: the scores add up within the tolerance",
        "not converged: do not trust the values",
        "1 of them not converged",
    ):
        assert words in page.texts


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "report.html", title="nothing"))[1]
    assert "nothing" in page.texts
    assert not page.tokens
    assert not [tag for tag, _ in page.tags if tag in ("section", "h2", "nav")]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="old")
    with pytest.raises(ValueError, match="0 images, 1 pictures were given"):
        write_report(
            path,
            title="new",
            attributions=[attribution(("a",), [1.0])],
            images=[[Image.new("RGB", (4, 4))]],
        )
    assert "old" in read(path)[1].texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_shades_keep_sign_and_order() -> None:
    assert shades([2.0, -4.0, 0.0]) == [0.5, -1.0, 0.0]
    assert shades([0.0, 0.0]) == [0.0, 0.0]
    assert shades([]) == []


def test_shades_of_what_is_no_number() -> None:
    assert shades([float("nan"), -1.0, float("inf")]) == [0.0, pytest.approx(0.0), 1.0]
    assert shades([float("nan")]) == [0.0]


# --- one attribution, with images -----------------------------------------------------------------


def seen() -> Attribution:
    """Two texts around an image of 40 x 20 pixels in two patches."""
    return attribution(
        ("what", "<image>", "<image>", "?"),
        [1.0, 2.0, -0.5, -0.25],
        modality=("text", "image", "image", "text"),
        images=(image_grid(),),
    )


def patches(page: Page) -> list[dict[str, str | None]]:
    return [attrs for _, attrs in page.tags if (attrs.get("class") or "").startswith("patch")]


def test_a_page_of_its_own_and_a_fragment_are_well_formed_and_alone() -> None:
    for text in (seen().to_html(), seen()._repr_html_()):
        Page(text)
        assert_needs_no_network(text)
    assert seen().to_html().startswith("<!DOCTYPE html>")
    # A fragment must not touch the page that it stands in: every rule is about .grains alone.
    style = re.search(r"<style>(.*)</style>", seen()._repr_html_(), re.DOTALL)
    assert style is not None
    for selectors in re.findall(r"([^{}]+)\{", re.sub(r"/\*.*?\*/|@media \w+ \{", "", style[1])):
        assert all(".grains" in selector for selector in selectors.split(","))


def test_an_image_stands_among_the_tokens_with_its_sum() -> None:
    page = Page(seen().to_html())
    assert [token[:2] for token in page.tokens] == [
        ("what", "+1.000"),
        ("[image 1: 2 tokens]", "+1.500"),
        ("?", "-0.250"),
    ]
    assert page.tokens[1].attributes["style"] == "--a: 0.75"
    body = " ".join(" ".join(page.texts).split())
    assert "Text tokens sum to +0.750, image tokens to +1.500" in body


def test_patches_lie_where_their_pixels_are() -> None:
    page = Page(seen().to_html())
    left, right = patches(page)
    assert left["title"] == "token 1: +2.000"
    assert left["class"] == "patch strong"
    assert left["style"] == "left: 0%; top: 0%; width: 50%; height: 100%; --a: 0.75"
    assert right["title"] == "token 2: -0.500"
    assert right["class"] == "patch neg"
    assert right["style"] == "left: 50%; top: 0%; width: 50%; height: 100%; --a: -0.188"
    [label] = {
        attrs["aria-label"] for _, attrs in page.tags if "under" in (attrs.get("class") or "")
    }
    assert label == (
        "Image 1, 40 × 20 pixels, 2 tokens that sum to +1.500; strongest patch +2.000, "
        "25 % from the left and 50 % from the top"
    )


def test_a_picture_is_embedded_once_and_drawn_under_the_patches() -> None:
    text = seen().to_html(images=[Image.new("RGB", (400, 200), "red")])
    page = Page(text)
    assert_needs_no_network(text)
    assert text.count("data:image/jpeg;base64,") == 1
    small = seen().to_html(images=[Image.new("RGB", (40, 20), "red")])
    assert small.count("data:image/png;base64,") == 1  # no pixel of it is changed
    assert sum("picture" in (attrs.get("class") or "").split() for _, attrs in page.tags) == 2
    assert "data:image" not in seen().to_html()


def test_pictures_that_are_not_the_attributed_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images, 0 pictures"):
        seen().to_html(images=[])
    with pytest.raises(ValueError, match="20 x 20 pixels was given for an image of 40 x 20"):
        seen().to_html(images=[Image.new("RGB", (20, 20))])


def test_a_whole_image_and_its_tiles_are_layers_side_by_side() -> None:
    whole, line_end = [0, 0, 1, 1], [0, 0, 0, 0]
    tiles = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    boxes = np.array([whole, *tiles, line_end], dtype=np.float32)
    it = attribution(
        ("<image>",) * 4,
        [1.0, 0.5, 0.25, -0.5],
        modality=("image",) * 4,
        images=(ImageGrid((0, 1, 2, 3), boxes, (40, 20)),),
    )
    text = it.to_html()
    page = Page(text)
    assert sum("picture" in (attrs.get("class") or "").split() for _, attrs in page.tags) == 2
    assert len(patches(page)) == 3
    assert "tokens that stand for no pixels: -0.500" in text


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("sum", "toward the rejected one"),
        ("rejected", "toward the rejected answer"),
        ("my_objective", "The objective my_objective is"),
    ],
)
def test_the_words_are_those_of_the_objective(objective: str, words: str) -> None:
    assert words in attribution(("a",), [1.0], objective=objective).to_html()


def test_methods_without_completeness_promise_none() -> None:
    text = attribution(("a",), [1.0], method="occlusion").to_html()
    assert "scores of occlusion need not add up" in text
    assert "do not trust" not in text


def test_white_space_is_visible() -> None:
    page = Page(attribution(("\n", " ", "", "a\n"), [1.0] * 4).to_html())
    assert [token.text for token in page.tokens] == ["⏎", "␣", "∅", "a⏎"]


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("colour", ["blue", "orange"])
def test_text_on_the_strongest_token_is_readable(scheme: int, colour: str) -> None:
    """WCAG 2 asks for a contrast of 4.5 between text and what is under it."""
    text = attribution_fragment(seen())

    def value(name: str) -> list[float]:
        match = re.search(rf"--{name}: light-dark\(#(\w+), #(\w+)\)", text)
        assert match is not None
        code = match[scheme + 1]
        return [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]

    alpha = 0.75
    pairs = zip(value(colour), value("page"), strict=True)
    under = luminance([alpha * over + (1 - alpha) * page for over, page in pairs])
    letters = luminance(value("text"))
    low, high = sorted((under, letters))
    assert (high + 0.05) / (low + 0.05) >= 4.5
