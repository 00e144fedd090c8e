"""SteeringVectors in a notebook."""

import re
from html.parser import HTMLParser

import pytest
import torch

from grains_ext.report.vectors import block_rows, how_made, vectors_fragment
from grains_ext.steering.gate import Gate
from grains_ext.steering.vectors import SteeringVectors

FITTED = {
    "method": "grains",
    "k": {"any": 4},
    "aggregate": "mean",
    "signs": "both",
    "base_model": "me/model",
    "n_pairs": 50,
    "hidden_norms": {"0": 10.0, "2": 5.0},
    "split_half_cosine": {"0": 0.5, "2": None},
    "refine": {"n_pairs": 50, "best_step": 35, "cosine_with_start": {"0": 0.25, "2": 1.0}},
    "tuning": {
        "n_pairs": 20,
        "unsteered": {"accuracy": 0.05},
        "chosen": {"accuracy": 0.9, "perplexity_ratio": 1.018},
    },
    "versions": {"torch": "2.13.0"},
}


def vectors(**changes: object) -> SteeringVectors:
    directions = {0: torch.tensor([3.0, 4.0]), 2: torch.tensor([0.0, 10.0])}
    arguments = {"strength": 0.5, "block_strengths": {2: 0.2}, "metadata": FITTED} | changes
    return SteeringVectors(directions, **arguments)  # type: ignore[arg-type]


def text(html: str) -> str:
    """What is on the page, without tags and style."""
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.S))
    return " ".join(" ".join(parts).split())


def test_a_row_for_each_block() -> None:
    first, second = block_rows(vectors())
    assert (first.block, first.norm, first.share, first.of_hidden) == (0, "5", 0.5, "0.50")
    assert (first.strength, first.stability, first.turned) == ("0.5", "+0.50", "+0.25")
    assert (second.block, second.norm, second.share, second.of_hidden) == (2, "10", 1.0, "2.00")
    assert (second.strength, second.stability, second.turned) == ("0.1", "", "+1.00")


def test_how_they_were_made() -> None:
    made = how_made(vectors())
    assert made["method"] == "grains, mean, k = {'any': 4}, signs both"
    assert made["refined"] == "50 pairs, step 35 was best"
    assert made["tuned"] == "5.0 % → 90.0 % of 20 dev pairs, perplexity 1.018x"
    assert made["made with"] == "torch 2.13.0"


def test_a_model_is_named_without_the_folders_it_lies_in() -> None:
    local = FITTED | {"base_model": "/home/me/models/tiny"}
    assert how_made(vectors(metadata=local))["model"] == "tiny"
    assert how_made(vectors())["model"] == "me/model"


def test_a_notebook_shows_all_of_it() -> None:
    shown = text(vectors()._repr_html_())
    assert "2 blocks × 2, strength 0.5, token norms restored" in shown
    for expected in ("stability", "with its start", "me/model", "+0.25", "5.0 % → 90.0 %"):
        assert expected in shown


def test_a_gate_and_plain_addition_are_said() -> None:
    gate = Gate(0, torch.ones(2), threshold=0.5)
    assert how_made(vectors(gate=gate))["gate"] == "cosine at block 0, decided for each prompt"
    assert "plain addition" in text(vectors_fragment(vectors(normalize=False)))


def test_bare_vectors_show_what_there_is() -> None:
    bare = SteeringVectors({3: torch.zeros(4)})
    shown = text(vectors_fragment(bare))
    assert shown.startswith("Steering vectors: one block × 4, strength 1")
    assert "stability" not in shown
    assert "<dl>" not in vectors_fragment(bare)


@pytest.mark.parametrize(
    "metadata",
    [
        {"split_half_cosine": 3, "refine": [], "tuning": "no", "versions": None, "k": "x"},
        {
            "hidden_norms": {"0": "long"},
            "split_half_cosine": {"0": float("nan")},
            "refine": {"a": 1},
        },
        {"hidden_norms": {"0": 10**400}, "tuning": {"chosen": {"accuracy": True}}},
    ],
)
def test_metadata_of_other_kinds_is_left_out(metadata: dict[str, object]) -> None:
    assert "one block" in vectors_fragment(SteeringVectors({0: torch.ones(2)}, metadata=metadata))


def test_metadata_is_escaped() -> None:
    hostile = {"base_model": "</div><script>alert(1)</script>", "versions": {"<b>": "<i>"}}
    page = vectors_fragment(SteeringVectors({0: torch.ones(2)}, metadata=hostile))
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_the_page_asks_for_nothing() -> None:
    page = vectors()._repr_html_()
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page)
