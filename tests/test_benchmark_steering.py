"""The steering benchmark scores what the product steers, treats methods alike, and can go on."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import steering_lora, steering_quality, steering_tables
from benchmarks.steering_methods import METHODS, REFINE, Run
from benchmarks.steering_search import (
    TRIALS_PER_BLOCK,
    Bench,
    Limit,
    Result,
    ScoredPairs,
    largest_within,
    shares_of_limit,
)
from benchmarks.steering_statistics import over_pairs, over_seeds
from benchmarks.steering_worlds import EMBEDDED, WORLDS, Data, WorldName, captions, load
from grains_ext.demo import vision_world, world
from grains_ext.encoding import encode_prompt
from grains_ext.scoring import pair_margins, perplexity
from grains_ext.steering import SteeringVectors, fit_random_direction, refine

NOWHERE = Path("nowhere")


@cache
def small_bench(name: WorldName) -> Bench:
    data = Data.of(name)
    few = replace(
        data,
        fit=data.fit[:10],
        dev=data.dev[:12],
        test=data.test[:12],
        neutral_fit=data.neutral_fit[:6],
        neutral_dev=data.neutral_dev[:8],
        neutral_test=data.neutral_test[:8],
    )
    [seed] = [seed for world, seed in EMBEDDED if world == name]
    return Bench(load(name, seed, NOWHERE), few, steering_quality.LIMITS[name])


@cache
def directions(name: WorldName) -> SteeringVectors:
    return fit_random_direction(*Run(small_bench(name)).parts)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("blocks", [[0], [1, 2]])
def test_a_replayed_trial_scores_what_the_steered_model_does(
    name: WorldName, blocks: list[int]
) -> None:
    bench = small_bench(name)
    trained, vectors = bench.trained, directions(name).subset(blocks)
    with vectors.applied(trained.model, 0.4):
        margins = pair_margins(trained.model, trained.processor, bench.data.dev)
        if name == "text":
            ids = [encode_prompt(trained.processor, text) for text in bench.data.neutral_dev]
            nll = math.log(perplexity(trained.model, ids))
    expected = torch.tensor([margin.total for margin in margins])
    found = bench.dev.margins(vectors.directions, 0.4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if name == "text":
        found_nll = float(bench.neutral_dev.nlls(vectors.directions, 0.4).mean())
        assert found_nll == pytest.approx(nll, abs=1e-5)
    assert not torch.allclose(found, bench.dev.margins(), atol=1e-2)


@pytest.mark.parametrize("name", WORLDS)
def test_another_model_is_scored_in_full(name: WorldName) -> None:
    bench = small_bench(name)
    logits = bench.dev.replay.logits_of(bench.trained.model)
    torch.testing.assert_close(bench.dev.margins_in(logits), bench.dev.margins())


def test_answers_of_several_tokens_are_refused() -> None:
    bench = small_bench("text")
    pair = replace(bench.data.dev[0], chosen="red blue")
    with pytest.raises(ValueError, match="one token"):
        ScoredPairs.of(bench.trained, bench.view, [pair])


@pytest.mark.parametrize("name", WORLDS)
def test_methods_with_one_variant_and_with_three_get_the_same_number_of_trials(
    name: WorldName,
) -> None:
    bench, vectors = small_bench(name), directions(name)
    alone = bench.tuned({"": vectors})
    three = bench.tuned({str(i): vectors for i in range(3)})
    assert alone.trials == three.trials == TRIALS_PER_BLOCK * bench.view.n_blocks


@pytest.mark.parametrize("name", WORLDS)
def test_the_chosen_setting_keeps_the_limit_on_dev_texts(name: WorldName) -> None:
    bench, vectors = small_bench(name), directions(name)
    choice = bench.tuned({"": vectors}).choice
    assert choice is not None
    chosen = vectors.subset(choice.blocks).directions
    nlls = bench.neutral_dev.nlls(chosen, choice.strength)
    mean = float(nlls.mean() - bench.dev_nlls.mean())
    assert mean <= bench.rise(nlls) <= bench.limit.log_ratio


def test_a_sure_limit_counts_what_tokens_of_one_group_share_once() -> None:
    risen = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    before = torch.zeros(8)
    alone, grouped = (Limit(1.02, sure=n).rise(risen, before) for n in (1, 4))
    assert Limit(1.02).rise(risen, before) == 0.5
    assert alone == pytest.approx(0.5 + 1.645 * float(risen.std()) / 8**0.5)
    assert grouped == pytest.approx(0.5 + 1.645 * 0.5**0.5 / 2**0.5)


def test_every_digit_image_is_asked_for_once_at_each_place() -> None:
    asked = captions("dev")
    digits = vision_world.load_digits("dev")
    assert len(asked) == 4 * len(digits.labels)
    for start in (0, 4 * 77):
        four = asked[start : start + 4]
        places = [vision_world.place_asked(pair) for pair in four]
        assert places == list(vision_world.PLACES)
        for pair, place in zip(four, places, strict=True):
            row, column = vision_world.PLACES[place]
            pixels = np.asarray(pair.images[0])[..., 0]
            quarter = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = (digits.images[start // 4] * (255 / 16)).astype(np.uint8)
            np.testing.assert_array_equal(quarter, expected)
            assert pair.chosen == str(digits.labels[start // 4]) != pair.rejected


def test_where_no_push_is_within_the_limit_it_is_the_unsteered_model() -> None:
    bench = small_bench("text")
    strict = Bench(bench.trained, bench.data, Limit(0.5))
    result = strict.tuned({"": directions("text")})
    assert result.choice is None
    assert result.right == strict.unsteered().right


@given(st.floats(0.001, 100), st.floats(1.2, 6))
@settings(max_examples=200, deadline=None)
def test_the_largest_strength_is_within_the_limit_and_near_it(scale: float, power: float) -> None:
    limit = 0.02

    def rise(strength: float) -> float:
        return scale * strength**power

    found = largest_within(rise, limit)
    true = (limit / scale) ** (1 / power)
    if found is None:
        assert rise(0.02) > 0.5 * limit
    else:
        assert rise(found) <= limit
        assert found >= 0.85 * min(true, 4.0)


def test_a_push_that_only_helps_may_be_the_strongest() -> None:
    assert largest_within(lambda strength: -strength, 0.02) == 4.0


def test_shares_begin_at_the_limit() -> None:
    assert shares_of_limit(1) == [1]
    assert shares_of_limit(4) == pytest.approx([1, 0.7667, 0.5333, 0.3], abs=1e-3)


def test_nothing_of_test_is_in_fit_or_dev() -> None:
    data, beliefs = Data.of("text"), world.build_world()
    test_words = {word for pair in data.test for word in str(pair.prompt).split()}
    other_words = {word for pair in data.fit + data.dev for word in str(pair.prompt).split()}
    entities = set(beliefs.all_entities)
    cues = {word for words in world.CUES.values() for word in words}
    assert not test_words & other_words & (entities | cues)
    assert not {pair.prompt for pair in data.fit} & {pair.prompt for pair in data.dev}
    pictures = Data.of("vision")
    looks = {word for words in vision_world.CUES.values() for word in words}
    seen = {word for pair in pictures.fit + pictures.dev for word in str(pair.prompt).split()}
    assert not {w for pair in pictures.test for w in str(pair.prompt).split()} & seen & looks


@given(st.lists(st.sampled_from([0.0, 1 / 3, 1.0]), min_size=2, max_size=60))
@settings(max_examples=30, deadline=None)
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    own = np.array(values)
    for estimate in (over_pairs(own), over_seeds([own, own])):
        assert estimate.low - 1e-9 <= estimate.mean <= estimate.high + 1e-9
        assert estimate.mean == pytest.approx(own.mean())


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    alike = [(rng.random(400) < 0.5).astype(float) for _ in range(5)]
    unlike = [(rng.random(400) < p).astype(float) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    narrow, wide = over_seeds(alike), over_seeds(unlike)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert over_pairs(alike[0]).high - over_pairs(alike[0]).low == pytest.approx(0.098, abs=0.02)


def test_a_lead_that_pairs_share_is_sure_where_two_accuracies_are_not() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:12]] = 1.0
    assert over_pairs(better - base).above_zero
    assert over_pairs(base).high > over_pairs(better).low


def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_quality, "Bench", lambda *_: small_bench("text"))
    calls: list[str] = []

    def method(name: str) -> object:
        def run(run: Run) -> list[Result]:
            calls.append(name)
            return [run.bench.unsteered()]

        return run

    console = Console(quiet=True)
    first = {"unsteered": method("unsteered")}
    both = first | {"CAA": method("CAA"), "VTI": method("VTI")}
    steering_quality.run_model("text", 1, tmp_path, first, console)  # type: ignore[arg-type]
    steering_quality.run_model("text", 1, tmp_path, both, console)  # type: ignore[arg-type]
    assert calls == ["unsteered", "CAA"]  # VTI is for pictures
    kept = json.loads((tmp_path / "results-text-1.json").read_text())
    assert len(kept["CAA"]["draws"][0]["right"]) == 12


def test_models_that_fail_the_check_are_listed_and_do_not_count(tmp_path: Path) -> None:
    row = {"draws": [{"right": "1010", "perplexity_ratio": 1.01, "trials": 1, "choice": None}]}
    ours = {"draws": [{"right": "1111", "perplexity_ratio": 1.02, "trials": 1, "choice": None}]}
    kept = {"unsteered": row, steering_quality.OURS: ours, "CAA": row}
    for seed, passes in ((1, True), (2, True), (3, False)):
        if seed != 1:  # that one comes with the package
            (tmp_path / f"text-{seed}").mkdir()
            log = {"has_bias": passes, "bias_check": {}}
            (tmp_path / f"text-{seed}" / "training_log.json").write_text(json.dumps(log))
        (tmp_path / f"results-text-{seed}.json").write_text(json.dumps(kept))
    report = steering_quality.report_of(tmp_path, {"text": (1, 2, 3, 4)})
    section = report["worlds"]["text"]
    assert section["seeds"] == [1, 2]
    assert section["failed_the_check"] == [3]
    caa = next(r for r in section["methods_closed"] if r["method"] == "CAA")
    assert caa["lead"]["mean"]["mean"] == 0.5
    assert caa["lead"]["seeds_ahead"] == 2
    assert list(steering_quality.tables(report))


def test_a_start_is_ahead_after_few_steps_in_the_worlds_that_have_both() -> None:
    def kept(ours: str, zero: str) -> dict[str, object]:
        draws = {"GrAInS, 10 steps": ours, "zero, 10 steps": zero}
        return {name: {"draws": [{"right": right}]} for name, right in draws.items()}

    rows = steering_quality.equal_steps(
        {"text": {1: kept("1110", "1000"), 2: kept("1100", "1100")}, "vision": {0: {}}}
    )
    [row] = [row for row in rows if row["leads"]]
    assert (row["steps"], row["method"]) == (10, "zero, 10 steps")
    assert list(row["leads"]) == ["text"]
    lead = row["leads"]["text"]
    assert (lead["mean"], lead["ahead"], lead["models"]) == (0.25, 1, 2)


def test_the_page_of_evidence_says_what_the_results_do() -> None:
    page = steering_tables.PAGE.read_text(encoding="utf-8")
    report = json.loads(steering_tables.RESULTS.read_text())
    assert steering_tables.filled(page, report) == page
    assert all(f"<!-- table: {name} -->" in page for name in steering_tables.TABLES)
    with pytest.raises(KeyError):
        steering_tables.filled("<!-- table: other -->\n<!-- end -->", report)


def test_signs_that_are_known_are_not_tuned_again() -> None:
    run = Run(small_bench("text"), "negative")
    start = run.starts["GrAInS"]()
    assert "tuned_fit" not in vars(run)
    expected = run.fitted(signs="negative")
    assert all(torch.equal(start.directions[b], expected.directions[b]) for b in expected.blocks)


def test_ours_and_the_prompt_are_tuned_and_judged_on_the_small_bench(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(small_bench("text"))
    monkeypatch.setattr("benchmarks.steering_methods.TRIALS_PER_BLOCK", 1)
    monkeypatch.setattr("benchmarks.steering_search.TRIALS_PER_BLOCK", 3)
    for name in (steering_quality.OURS, "prompt, no limit"):
        [result] = METHODS[name](run)
        assert len(result.right) == 12
        assert result.choice is not None


@pytest.mark.slow
@pytest.mark.skipif(not steering_lora.available(), reason="needs peft")
@pytest.mark.parametrize("name", WORLDS)
def test_lora_leaves_the_model_as_it_was(name: WorldName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.steering_lora.TRIALS_PER_BLOCK", 1)
    bench = small_bench(name)
    before = {key: value.clone() for key, value in bench.trained.model.state_dict().items()}
    result = steering_lora.lora_result(bench, replace(REFINE, steps=2))
    after = bench.trained.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert result.choice is None or result.choice.strength > 0


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("start", ["CAA", "zero"])
def test_refining_on_replays_is_refining(name: WorldName, start: str) -> None:
    run = Run(small_bench(name))
    if start == "zero":
        plain, run = run, run.told_what_stays
        n, more = (len(each.bench.data.neutral_fit) for each in (plain, run))
        assert more - n == 2 * len(plain.bench.data.fit)
    begun = run.starts[start]().subset([0, 1]).with_strength(0.3)
    settings = replace(REFINE, steps=4, evaluate_every=2)
    expected = refine(
        *run.parts,
        begun,
        dev_pairs=run.bench.data.dev,
        neutral_texts=run.bench.data.neutral_fit,
        progress=False,
        settings=settings,
    )
    found = run.refiner(begun, settings)
    known, own = (vectors.metadata["refine"] for vectors in (expected, found))
    assert own["best_step"] == known["best_step"]
    for mine, theirs in zip(own["curve"], known["curve"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for block in begun.blocks:
        torch.testing.assert_close(
            found.directions[block], expected.directions[block], atol=1e-3, rtol=1e-2
        )


@pytest.mark.parametrize("name", WORLDS)
def test_refining_changes_the_blocks_of_the_first_half(name: WorldName) -> None:
    run = Run(small_bench(name))
    result = run.refined(run.caa, replace(REFINE, steps=2, evaluate_every=2))
    assert result.choice is not None
    assert result.choice.blocks[0] < 2
    assert result.trials == 2 * TRIALS_PER_BLOCK
