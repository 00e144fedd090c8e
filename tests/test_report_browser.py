"""The report in headless Chromium: what a person sees, types, points at and prints."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grains_ext import PreferencePair
from grains_ext.report import Generation, report, write_report
from grains_ext.report.explorer import FIRST
from tests.browser import Browser, browser
from tests.report_runs import write_attributions, write_evaluation, write_everything, write_seen

# Where a person finds the pictures that the tests take.
SCREENSHOTS = Path(__file__).parent.parent / "build" / "screenshots"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_everything(folder / "run", 70)
    path = folder / "report.html"
    report(folder / "run", path, title="Evidence against belief")
    return path


@pytest.fixture
def opened(chromium: Browser, page: Path) -> Browser:
    chromium.open(page)
    return chromium


def choose(it: Browser, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(it.find(f"select[name='{name}']")).select_by_value(value)


def test_it_opens_without_a_word_on_the_console(opened: Browser) -> None:
    assert opened.driver.title == "Evidence against belief"
    assert opened.errors() == []
    headings = opened.shown("h2")
    assert headings == [
        "Held-out results",
        "Before and after",
        "What pushes which way",
        "Directions",
        "Strength and blocks",
        "Exported graph and speed",
        "How it was made",
    ]
    links = [link.get_attribute("hash").removeprefix("#") for link in opened.all("nav a")]
    assert len(links) == len(headings)
    assert all(len(opened.all(f"section[id='{name}']")) == 1 for name in links)


def test_answers_are_filtered(opened: Browser) -> None:
    def counts() -> dict[str, int]:
        texts = opened.shown("#answers fieldset span")
        return {text.rstrip("0123456789").strip(): int(text.split()[-1]) for text in texts}

    assert counts() == {
        "All": 70,
        "Became right": 35,
        "Became wrong": 1,
        "Stayed wrong": 34,
        "Stayed right": 0,
        "Answer changed": 36,
    }
    assert opened.shown("#answers .status") == [f"{FIRST} of 70 shown"]
    opened.find("#answers input[value=lost] + span").click()
    assert opened.shown("#answers .status") == ["1 of 1 shown"]
    [row] = opened.all("#answers tbody tr")
    assert "pair-2" in row.text
    before, after = (
        cell for cell in row.find_elements("css selector", "td") if cell.is_displayed()
    )
    assert "✓ right" in before.text
    assert "✗ wrong" in after.text
    choose(opened, "answers1-after", "2")
    assert counts()["Became right"] == 0
    assert opened.shown("#answers thead th") == ["Prompt", "unsteered", "caa"]


def test_answers_are_searched_and_sorted(opened: Browser) -> None:
    field = opened.find("#answers input[type=search]")
    field.send_keys("NUMBER  42")
    assert opened.shown("#answers .status") == ["1 of 1 shown"]
    assert "pair-42" in opened.find("#answers tbody tr").text
    assert opened.run("return CSS.highlights.get('found').size") == 3  # and in its name
    field.send_keys(" and no such words")
    assert opened.shown("#answers .status") == ["Nothing matches."]
    assert opened.shown("#answers .more button") == []
    field.send_keys("\ue009a", "\ue017")  # control and a, delete
    choose(opened, "answers1-order", "loss")
    assert "pair-2 " in opened.find("#answers tbody tr").text.replace("\n", " ")


def test_more_rows_come_when_asked_for(opened: Browser) -> None:
    opened.all("#tokens .more button")[0].click()
    assert opened.shown("#tokens .status")[0] == f"{2 * FIRST} of 70 shown"
    # The focus is on the first of the new rows, for those who do not see the list grow.
    assert "pair-20." in opened.focused().text
    opened.all("#tokens .more button")[1].click()
    assert len(opened.all("#tokens .explorer:first-of-type > ol > li")) >= 70
    assert opened.errors() == []


def test_rows_that_the_script_draws_are_like_those_on_the_page(opened: Browser) -> None:
    opened.all("#tokens .more button")[0].click()
    first, drawn = (
        opened.run(
            "const row = document.querySelectorAll('#tokens ol > li')[arguments[0]];"
            "return row.querySelector('figure').outerHTML",
            number,
        )
        for number in (FIRST - 1, FIRST)
    )

    def shape(html: str) -> str:
        """Without what differs from pair to pair."""
        html = re.sub(r' (class="neg"|class=""|tabindex="0")', "", html)
        return re.sub(r"--a: [-.\d]+;?|>[^<]*<|\s+", "", html)

    assert shape(first) == shape(drawn)


def test_a_value_shows_on_hover_and_on_focus(opened: Browser) -> None:
    token = opened.find("#tokens .tokens li:nth-child(3)")
    value = token.find_element("css selector", ".value")
    expected = value.get_attribute("textContent").strip()
    assert re.fullmatch(r"[+-]\d\.\d{3}", expected)
    assert value.size["width"] <= 1
    opened.hover(token)
    assert value.size["width"] > 20
    assert value.text == expected
    opened.hover(opened.find("h1"))
    assert value.size["width"] <= 1
    opened.run("document.querySelector('#tokens .tokens li').focus()")
    opened.press("\ue014", "\ue014")  # right, right
    assert opened.focused() == token
    assert value.size["width"] > 20
    opened.press("\ue00c")  # escape
    assert value.size["width"] <= 1


def test_patches_are_read_by_pointer_and_arrows(chromium: Browser, tmp_path: Path) -> None:
    write_seen(tmp_path / "seen")
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "picture.png")
    pair = PreferencePair("what digit ?", "seven", "two", (tmp_path / "picture.png",))
    report(tmp_path / "seen", tmp_path / "page.html", pairs=[pair])
    chromium.open(tmp_path / "page.html")
    layer = chromium.find(".under")
    chromium.run("arguments[0].focus()", layer)
    assert chromium.shown("output.readout") == ["token 0: -1.000"]
    chromium.press("\ue014", "\ue015")  # right, down
    assert chromium.shown("output.readout") == ["token 5: -0.333"]
    chromium.hover(chromium.find(".patch:nth-child(16)"))
    assert chromium.shown("output.readout") == ["token 15: +1.000"]
    assert chromium.errors() == []
    chromium.screenshot(SCREENSHOTS / "report-picture.png")


def test_the_tab_key_walks_through_the_page(opened: Browser) -> None:
    part_of = "return arguments[0].closest('section, header')?.id || arguments[0].tagName"
    seen = []
    for _ in range(40):
        opened.press("\ue004")
        seen.append(opened.run(part_of, opened.focused()))
    order = [name for place, name in enumerate(seen) if name not in seen[:place]]
    assert order[0] == "A"  # past all of what repeats
    assert order[1:4] == ["HEADER", "held-out", "answers"] or order[1:3] == ["held-out", "answers"]
    # A list of tokens is one stop, however long it is.
    stops = opened.run("return document.querySelectorAll('#tokens li[tabindex=\"0\"]').length")
    assert stops == len(opened.all("#tokens .tokens"))
    outline = opened.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_over_the_edge(opened: Browser, width: int) -> None:
    opened.look(width=width)
    assert opened.run("return document.documentElement.scrollWidth") <= width


def test_dark_light_and_print(opened: Browser) -> None:
    def ink() -> tuple[str, str]:
        return tuple(  # type: ignore[return-value]
            opened.run(
                "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
            )
        )

    assert ink() == ("rgb(26, 28, 31)", "rgb(255, 255, 255)")
    opened.look(dark=True)
    assert ink() == ("rgb(230, 231, 233)", "rgb(22, 24, 27)")
    opened.look(dark=True, printed=True)
    assert ink() == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
    assert opened.shown(".controls, nav") == []
    values = opened.all("#tokens figure:first-of-type .value")
    assert all(value.is_displayed() for value in values[:5])
    printed = opened.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 50_000


@pytest.mark.parametrize("name", ["light", "dark", "narrow", "print"])
def test_pictures_for_people_to_look_at(opened: Browser, name: str) -> None:
    """They lie in build/screenshots."""
    opened.look(
        width={"narrow": 390, "print": 794}.get(name, 1280),
        dark=name == "dark",
        printed=name == "print",
    )
    path = SCREENSHOTS / f"report-{name}.png"
    opened.screenshot(path)
    with Image.open(path) as picture:
        assert picture.height > 2000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10


def test_2000_pairs_open_at_once(chromium: Browser, tmp_path: Path) -> None:
    """Few nodes at first, whatever there is to show, and seconds of the processor with a margin."""
    write_attributions(tmp_path / "run" / "attributions", 2000)
    write_evaluation(tmp_path / "run" / "evaluation.json", 2000)
    page = tmp_path / "page.html"
    report(tmp_path / "run", page)
    assert page.stat().st_size < 12e6
    with chromium.processor_seconds() as spent:
        chromium.open(page)
        assert chromium.run("return document.querySelectorAll('*').length") < 6000
        chromium.find("#answers input[type=search]").send_keys("number 1999")
        assert chromium.shown("#answers .status") == ["1 of 1 shown"]
    assert 0 < sum(spent) < 2.5


def test_continuations_that_nobody_judged(chromium: Browser, tmp_path: Path) -> None:
    texts = [Generation("q", "red", "blue", answer) for answer in ("red", "blue")]
    write_report(tmp_path / "page.html", title="t", generations=texts)
    chromium.open(tmp_path / "page.html")
    assert chromium.shown("#answers fieldset span") == ["All 2", "Answer changed 1"]
    assert chromium.errors() == []


def test_one_condition_has_nothing_to_compare(chromium: Browser, tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "evaluation.json", 3)
    content = json.loads(path.read_text())
    content["conditions"] = {"unsteered": content["conditions"]["unsteered"]}
    path.write_text(json.dumps(content | {"changes": {}}))
    report(path, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    assert chromium.shown("#answers fieldset") == []
    assert chromium.shown("#answers .status") == ["3 of 3 shown"]
    assert chromium.errors() == []


def test_hostile_texts_do_nothing(chromium: Browser, tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "evaluation.json", FIRST + 2)
    attack = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>\u202e\u0000"
    content = json.loads(path.read_text())
    for pair in content["pairs"]:
        pair["prompt"] = pair["id"] = attack
    path.write_text(json.dumps(content))
    write_attributions(
        tmp_path / "attributions", FIRST + 2, prompt=attack, pair_id=attack, chosen=attack
    )
    report(tmp_path, tmp_path / "page.html", title=attack)
    chromium.open(tmp_path / "page.html")
    for button in chromium.all(".more button"):
        if button.is_displayed():
            button.click()
    assert chromium.run("return window.hit") is None
    assert chromium.all("img") == []
    assert chromium.errors() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.skipif("GRAINS_AXE" not in os.environ, reason="GRAINS_AXE names no axe.min.js")
def test_axe_finds_nothing(opened: Browser, dark: bool) -> None:
    opened.look(dark=dark)
    source = Path(os.environ["GRAINS_AXE"]).read_text(encoding="utf-8")
    opened.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
    found: dict[str, Any] = opened.driver.execute_async_script(
        "axe.run().then(arguments[arguments.length - 1])"
    )
    problems = {
        each["id"]: [node["target"] for node in each["nodes"]][:3] for each in found["violations"]
    }
    assert problems == {}
