"""Gated rows of the steering benchmark score what a gated handle steers, and are read rightly."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import steering_gated, steering_quality, steering_tables
from benchmarks.steering_elsewhere import N_ELSEWHERE, elsewhere
from benchmarks.steering_gated import GATED, GatedBench, Usual, gated, gated_summary
from benchmarks.steering_methods import Run
from benchmarks.steering_worlds import WORLDS, WorldName
from grains_ext.encoding import encode_prompt
from grains_ext.scoring import pair_margins, perplexity
from grains_ext.steering.gate import score
from tests.test_benchmark_steering import directions, small_bench


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering_gated, "FALSE_POSITIVE_RATE", 0.3)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("name", WORLDS)
def test_a_gated_replay_scores_what_a_gated_handle_steers(name: WorldName) -> None:
    bench, block = GatedBench(small_bench(name), "prompts", {}), 1
    trained, gate, replay = bench.trained, bench.gates[block], bench.dev.replay
    assert gate.center is not None
    scores = score(replay.outputs[block], gate.direction, gate.center, gate.kind)
    first = replay.inputs["attention_mask"].cumsum(1) <= 1
    largest = scores.masked_fill(first, -torch.inf).amax(1)
    # One that half of the pairs open.
    gate = bench.gates[block] = replace(gate, threshold=float(largest.median()))
    assert 0.3 < replay.share_open(block) < 0.7
    vectors = directions(name).subset([block])
    with vectors.with_gate(gate).applied(trained.model, 0.4):
        margins = pair_margins(trained.model, trained.processor, bench.data.dev)
        if name == "text":
            ids = [encode_prompt(trained.processor, text) for text in bench.data.neutral_dev]
            nll = math.log(perplexity(trained.model, ids))
    found = bench.dev.margins(vectors.directions, 0.4)
    expected = torch.tensor([margin.total for margin in margins])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    moved = (found - bench.dev.margins()).abs() > 1e-3
    assert torch.equal(moved, replay.opened(block).any(1)[replay.rows])
    if name == "text":
        mean = float(bench.neutral_dev.nlls(vectors.directions, 0.4).mean())
        assert mean == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize("name", WORLDS)
def test_prompts_that_are_not_to_be_steered(name: WorldName) -> None:
    """They share nothing with those of fit but the form, and what agrees says what is right."""
    fit, test = (elsewhere(name, split, 20) for split in ("fit", "test"))
    assert list(fit) == list(test)
    for pair in test["agrees"]:
        assert f" is {pair.chosen} ." in str(pair.prompt)
        assert f" is {pair.rejected} ." not in str(pair.prompt)
    assert not {str(p.prompt) for p in fit["agrees"]} & {str(p.prompt) for p in test["agrees"]}


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(("name", "together"), [("text", False), ("text", True), ("vision", False)])
def test_a_row(name: WorldName, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.steering_search.TRIALS_PER_BLOCK", 2)
    run = Run(small_bench(name))
    usual = Usual.of(run.bench, directions(name), together=together)
    [result] = gated(lambda _: usual, "texts")(run)
    assert result.choice is not None
    assert len(result.choice.blocks) == (run.bench.view.n_blocks if together else 1)
    assert result.trials == 2 * run.bench.view.n_blocks
    assert result.details["gate"]["block"] == result.choice.blocks[0]
    assert all(0 <= share <= 1 for share in result.details["open"].values())
    for changed in result.details["elsewhere"].values():
        assert [len(bits) for bits in changed.values()] == [N_ELSEWHERE] * 3


def test_strengths_around_the_usual_one() -> None:
    bench = GatedBench.__new__(GatedBench)
    bench.largest = {1: 0.5}
    steered = {1: torch.ones(2)}
    bench.largest_strength = lambda _: 4.0  # type: ignore[method-assign]
    assert bench.strengths(steered, 3) == pytest.approx([3.0, math.sqrt(0.75), 0.25])
    bench.largest_strength = lambda _: 0.1  # type: ignore[method-assign]
    assert bench.strengths(steered, 2) == pytest.approx([0.1, 0.1])


def test_the_tables_of_gates() -> None:
    def kept(right: str, **details: Any) -> dict[str, Any]:
        return {"draws": [{"right": right, "perplexity_ratio": 1.01, **details}]}

    changed = {"know": {"right": "11", "with": "01", "without": "00"}}
    details = {
        "gate": {},
        "open": {"test": 0.9, "neutral": 0.05},
        "answered": {"with": "0110", "without": "0000"},
        "elsewhere": changed,
    }
    rows = {name: kept("1110", details=details) for name in list(GATED)[:2]}
    results = {seed: {"GrAInS": kept("1000"), **rows} for seed in (1, 2)}
    [texts, prompts] = gated_summary(results)
    assert (texts["method"], prompts["method"]) == tuple(rows)
    assert texts["gain"]["mean"] == 0.5
    report = {"worlds": {"text": {"gated": [texts, prompts]}}}
    [_, _, row, _] = steering_tables.gated(report, "text").splitlines()
    assert row.startswith("| GrAInS, gated | 25.0 | 75.0")
    assert row.endswith("| 0.0 | 50.0 | 1.010 | 90.0 | 5.0 |")
    table = steering_tables.changed_elsewhere(report, "text").splitlines()
    assert [line.split(" | ")[1].strip(" |") for line in table[2:]] == ["0.0", "50.0", "50.0"]


def test_what_rows_without_a_gate_change_elsewhere() -> None:
    def kept(**bits: str) -> dict[str, Any]:
        details = {"elsewhere": {"know": {"right": "11", **bits}}} if bits else {}
        return {"draws": [{"right": "10", "perplexity_ratio": 1.0, "details": details}]}

    results = {
        1: {"LoRA": kept(without="01"), "prompt only": kept(without="11")},
        2: {"LoRA": kept(without="11"), "prompt only": kept()},
    }
    found = steering_quality.elsewhere_summary(results)
    assert list(found) == ["LoRA"]
    assert found["LoRA"]["know"]["without"]["mean"] == 0.75
    texts = {"method": "GrAInS, gated", "elsewhere": {"know": dict.fromkeys(("without", "with"))}}
    for column in texts["elsewhere"]["know"]:
        texts["elsewhere"]["know"][column] = {"mean": 0.1}
    prompts = texts | {"method": "GrAInS, gated by prompts"}
    report = {"worlds": {"text": {"gated": [texts, prompts], "elsewhere": found}}}
    assert "| LoRA | 75.0 |\n" in steering_tables.changed_elsewhere(report, "text")
