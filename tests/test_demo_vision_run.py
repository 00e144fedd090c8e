"""The demo with pictures from end to end, in its quick form, and the parts that it is made of."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from grains_ext.attribution import Attribution, attribute
from grains_ext.decoder import DecoderView
from grains_ext.demo import vision_run
from grains_ext.demo import vision_world as world
from grains_ext.demo.vision_train import answer_logits, answers
from grains_ext.vision import ImageGrid


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo") / "output"
    folder.mkdir()
    (folder / "kept").touch()
    text = io.StringIO()
    console = Console(file=text, width=140)
    result = vision_run.run_vision_demo(folder, quick=True, console=console)
    return folder, result, text.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> vision_run._VisionDemo:
    folder = tmp_path_factory.mktemp("demo")
    return vision_run._VisionDemo(folder, 0, vision_run.QUICK, Console(file=io.StringIO()))


@pytest.mark.slow
def test_demo_writes_its_files_and_nothing_else(quick: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, printed = quick
    assert {entry.name for entry in folder.iterdir()} == {*vision_run.OUTPUTS, "kept"}
    assert json.loads((folder / "vision.json").read_text()) == json.loads(json.dumps(result))
    page = (folder / "vision.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for words in (*vision_run.KINDS.values(), vision_run.OURS, vision_run.RANDOM_WORDS):
        assert words in printed
        assert words in page


@pytest.mark.slow
def test_demo_shows_that_the_model_repeats_what_it_is_told(
    quick: tuple[Path, dict[str, Any], str],
) -> None:
    _, result, _ = quick
    shares = result["answers"]
    assert shares["mix"]["right"]["share"] <= 0.2
    assert shares["look"]["right"]["share"] >= 0.9
    assert shares["caption"]["chosen"]["share"] >= 0.9
    assert result["asked_quarter_strongest"]["share"] >= 0.5
    n = vision_run.QUICK.masked_pairs
    assert result["masked"][vision_run.OURS]["n"] == n
    assert result["masked"][vision_run.RANDOM_TOKENS]["n"] == n * vision_run.QUICK.random_draws


@pytest.mark.slow
def test_demo_attributions_add_up(quick: tuple[Path, dict[str, Any], str]) -> None:
    _, result, printed = quick
    assert result["converged"] == vision_run.QUICK.masked_pairs
    for attribution in result["attributions"]:
        change = attribution["f_input"] - attribution["f_baseline"]
        assert sum(attribution["scores"]) == pytest.approx(change, abs=0.05 * max(1, abs(change)))
        assert attribution["modality"].count("image") == 16
        assert f"f(x) {attribution['f_input']:+.2f}" in printed


def test_attribution_blames_what_was_told() -> None:
    model, processor = vision_run.load_vision_model()
    pairs = world.vision_pairs("test", 4, 0)
    for pair, attribution in zip(
        pairs, attribute(model, processor, pairs, progress=False), strict=True
    ):
        assert isinstance(pair.prompt, str)
        words = pair.prompt.split()
        told = {pair.rejected} | {word for word in words if word in world.CUES["told"]}
        lowest = np.argsort(attribution.scores)[:2]
        assert told & {attribution.tokens[i] for i in lowest}


def test_masking_nothing_changes_nothing(demo: vision_run._VisionDemo) -> None:
    decoder = DecoderView.of(demo.model)
    for kind in ("mix", "look"):
        pairs = world.vision_pairs("test", 4, 1, kind)  # type: ignore[arg-type]
        expected = answers(answer_logits(demo.model, demo.processor, pairs), demo.processor, pairs)[
            "chosen"
        ]
        got = [demo._flipped(decoder, pair, [[], []]) for pair in pairs]
        assert got == [[answer, answer] for answer in expected]


def test_masking_the_asked_quarter_takes_the_answer_away(demo: vision_run._VisionDemo) -> None:
    decoder = DecoderView.of(demo.model)
    quarters = {
        place: [1 + 4 * y + x for y in (2 * row, 2 * row + 1) for x in (2 * col, 2 * col + 1)]
        for place, (row, col) in world.PLACES.items()
    }
    seen, unseen = [], []
    for pair in world.vision_pairs("test", 12, 0, "caption"):
        asked = world.place_asked(pair)
        other = next(place for place in quarters if place != asked)
        without, with_it = demo._flipped(decoder, pair, [quarters[asked], quarters[other]])
        unseen.append(without)
        seen.append(with_it)
    assert sum(seen) >= 10
    assert sum(unseen) <= 4


def test_choices_are_the_lowest_scores_and_seeded_draws(demo: vision_run._VisionDemo) -> None:
    scores = np.array([-9, 1, -2, 3, -4], dtype=np.float32)
    attribution = Attribution(
        tokens=("<bos>", "<image>", "<image>", "tim", "3"),
        token_ids=(1, 4, 4, 5, 6),
        modality=("text", "image", "image", "text", "text"),
        scores=scores,
        f_input=0.0,
        f_baseline=0.0,
        residual=0.0,
        evaluations=2,
        n_steps=1,
        converged=True,
        method="adaptive",
        baseline="bos",
        prompt="",
        chosen="2",
        rejected="3",
        pair_id="x",
    )
    other = replace(attribution, scores=-scores)
    choices = demo._choices(attribution, other)
    assert choices == demo._choices(attribution, other)
    assert choices[vision_run.OURS] == [[4, 2]]
    assert choices[vision_run.GRADIENT] == [[3, 1]]
    assert len(choices[vision_run.RANDOM_TOKENS]) == vision_run.QUICK.random_draws
    assert all(0 not in places for of in choices.values() for places in of)
    assert all(set(places) == {3, 4} for places in choices[vision_run.RANDOM_WORDS])


def test_strongest_place_is_read_from_the_patches() -> None:
    scores = np.zeros(17, dtype=np.float32)
    scores[1] = 2.0  # nw
    scores[[11, 16]] = 1.5  # se
    corners = [(x / 4, y / 4) for y in range(4) for x in range(4)]
    boxes = np.array([(x, y, x + 0.25, y + 0.25) for x, y in corners], dtype=np.float32)
    attribution = SimpleNamespace(
        scores=scores, images=(ImageGrid(tuple(range(1, 17)), boxes, (16, 16)),)
    )
    assert vision_run._strongest_place(attribution) == "se"  # type: ignore[arg-type]


def test_picture_is_drawn_in_half_blocks() -> None:
    pixels = np.array([[0, 255], [10, 20]], dtype=np.uint8)
    drawn = vision_run._drawn(pixels)
    assert drawn.plain == "▀▀\n"
    assert [str(span.style) for span in drawn.spans] == [
        "rgb(0,0,0) on rgb(10,10,10)",
        "rgb(255,255,255) on rgb(20,20,20)",
    ]


def test_a_run_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_: Any) -> None:
            pass

        def run(self) -> dict[str, Any]:
            raise RuntimeError("stopped")

    monkeypatch.setattr(vision_run, "_VisionDemo", Failing)
    (tmp_path / "vision.json").write_text("of an earlier run")
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stopped"):
        vision_run.run_vision_demo(tmp_path, console=Console(file=io.StringIO()))
    assert torch.get_num_threads() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["vision.json"]
