"""Long runs: streamed to a directory, taken up again, split over shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grains_ext.attribution import Attribution, attribute, load_attributions, runs
from grains_ext.attribution.engine import _Run
from grains_ext.attribution.runs import hash_of_pairs
from grains_ext.pairs import PreferencePair
from tests.models import WORDS, tiny_model, tiny_tokenizer

MODEL = tiny_model("llama")
TOKENIZER = tiny_tokenizer()
PAIRS = [
    PreferencePair(" ".join(WORDS[i : i + 3 + i % 7]), WORDS[i % 5], f"{WORDS[i]} {WORDS[-i]}")
    for i in range(6, 20)
]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_GROUP_TOKENS", {"cpu": 20})


def run(pairs: list[PreferencePair] = PAIRS, **options: Any) -> list[Attribution]:
    return attribute(MODEL, TOKENIZER, pairs, progress=False, **options)


def same(first: list[Attribution], second: list[Attribution]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        assert a.to_dict() == b.to_dict()


def interrupted_after(monkeypatch: pytest.MonkeyPatch, n_groups: int) -> list[list[int]]:
    """The groups that are worked on from here on; after some, the run is interrupted."""
    groups: list[list[int]] = []
    original = _Run.attribute_group

    def spied(self: _Run, group: Any, finished: Any) -> dict[int, Attribution]:
        if len(groups) == n_groups:
            raise KeyboardInterrupt
        groups.append(list(group))
        return original(self, group, finished)

    monkeypatch.setattr(_Run, "attribute_group", spied)
    return groups


def test_a_run_that_is_taken_up_again_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(output_dir=tmp_path / "whole")
    same(whole, run())
    with monkeypatch.context() as patch:
        first = interrupted_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(output_dir=tmp_path / "parts")
    assert len(load_attributions(tmp_path / "parts", partial=True)) == sum(map(len, first))
    with monkeypatch.context() as patch:
        rest = interrupted_after(patch, 10**6)
        same(run(output_dir=tmp_path / "parts"), whole)
    assert sorted(index for group in first + rest for index in group) == list(range(len(PAIRS)))
    same(load_attributions(tmp_path / "parts"), whole)


def test_shards_together_are_the_whole(tmp_path: Path) -> None:
    whole = run()
    sizes = [len(run(output_dir=tmp_path, shard=(i, 3))) for i in (1, 2, 3)]
    assert all(sizes)
    assert sum(sizes) == len(PAIRS)
    same(load_attributions(tmp_path), whole)


def test_a_limit_can_be_raised(tmp_path: Path) -> None:
    first = run(output_dir=tmp_path, limit=5)
    assert [result.prompt for result in first] == [f"<bos>{pair.prompt}" for pair in PAIRS[:5]]
    after = run(output_dir=tmp_path)
    same(after[:5], first)
    assert len(after) == len(PAIRS)


@pytest.mark.parametrize(
    ("options", "pairs", "message"),
    [
        ({"baseline": "mean"}, PAIRS, "baseline"),
        ({"tolerance": 0.01}, PAIRS, "tolerance"),
        ({}, PAIRS[1:], "pairs"),
    ],
)
def test_another_run_is_kept_out(
    tmp_path: Path, options: dict[str, Any], pairs: list[PreferencePair], message: str
) -> None:
    run(output_dir=tmp_path, limit=1)
    with pytest.raises(ValueError, match=f"another run.*{message}"):
        run(pairs, output_dir=tmp_path, **options)


def test_another_model_of_the_same_name_is_kept_out(tmp_path: Path) -> None:
    run(output_dir=tmp_path, limit=1)
    with pytest.raises(ValueError, match=r"another run.*weights"):
        attribute(tiny_model("llama", seed=1), TOKENIZER, PAIRS, output_dir=tmp_path)


def test_other_pictures_are_other_pairs(tmp_path: Path) -> None:
    """However they are given: in memory, as a record, or in a file of the same name."""
    path = tmp_path / "sky.png"
    seen = set()
    for shade in (0, 1):
        pixels = np.full((4, 4, 3), shade, np.uint8)
        picture = Image.fromarray(pixels)
        picture.save(path)
        record = {"bytes": path.read_bytes(), "path": None}
        for image in (pixels, picture, record, str(path)):
            pair = PreferencePair("the sky", "blue", "red", images=(image,))
            seen.add(hash_of_pairs([pair], [None]))
    assert len(seen) == 6  # a record and a file of the same bytes are the same


def test_an_edited_objective_is_another_run(tmp_path: Path) -> None:
    def margin(scored: Any) -> Any:
        return scored.chosen_logits[:, 0, 5]

    def run_with(objective: Any) -> Any:
        return run(PAIRS[:1], output_dir=tmp_path, objective=objective)

    same(run_with(margin), run_with(margin))
    margin.__code__ = (lambda scored: scored.chosen_logits[:, 0, 6]).__code__
    with pytest.raises(ValueError, match=r"another run.*objective_code"):
        run_with(margin)
