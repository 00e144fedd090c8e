import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedModel

from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair, encode_prompt
from grains_ext.evaluation import measure
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.scoring import (
    continuation_logprobs,
    pair_margins,
    perplexity,
    text_divergences,
)
from grains_ext.steering import STRENGTHS, Gate, SteeringVectors, tune
from grains_ext.steering.calibrate import _search, neighbour_sets
from grains_ext.steering.positions import Named
from grains_ext.steering.trials import TrialLog
from tests.models import HIDDEN_SIZE, N_BLOCKS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NEUTRAL = ["a rose is a rose", "the sea and the sky"]
PAIRS = [
    PreferencePair(f"what color is the {thing}", color, "red")
    for thing in ("sky", "sea", "grass", "rose")
    for color in ("blue", "green")
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def vectors() -> SteeringVectors:
    generator = torch.Generator().manual_seed(3)
    return SteeringVectors(
        {block: 6 * torch.randn(HIDDEN_SIZE, generator=generator) for block in range(N_BLOCKS)},
        metadata={"method": "grains"},
    )


def measured(model: PreTrainedModel) -> tuple[float, float, float]:
    encoded = [encode_pair(TOKENIZER, pair) for pair in PAIRS]
    items = [(e.prompt_ids, ids) for e in encoded for ids in (e.chosen_ids, e.rejected_ids)]
    scores = continuation_logprobs(model, items)
    margins = [c.total - r.total for c, r in zip(scores[::2], scores[1::2], strict=True)]
    return (
        sum(margin > 0 for margin in margins) / len(margins),
        sum(margins) / len(margins),
        perplexity(model, [encode_prompt(TOKENIZER, text) for text in NEUTRAL]),
    )


def test_every_trial_is_what_it_says(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    best = tune(
        model,
        TOKENIZER,
        PAIRS,
        vectors,
        neutral_texts=NEUTRAL,
        blocks=[[0], [1, 3]],
        strengths=[0.2, 0.05],
        max_perplexity_ratio=10.0,
        max_kl=10.0,
        progress=False,
    )
    tuning = best.metadata["tuning"]
    trials = tuning["trials"]
    assert [(t["blocks"], t["strength"]) for t in trials] == [
        ([0], 0.05),
        ([0], 0.2),
        ([1, 3], 0.05),
        ([1, 3], 0.2),
    ]
    accuracy, margin, reference = measured(model)
    assert tuning["unsteered"] == {
        "accuracy": accuracy,
        "mean_margin": pytest.approx(margin, abs=1e-5),
    }
    ids = [encode_prompt(TOKENIZER, text) for text in NEUTRAL]
    for trial in trials:
        steered_by = vectors.subset(trial["blocks"]).with_strength(trial["strength"])
        with steered_by.applied(model):
            accuracy, margin, steered = measured(model)
        assert trial["n_pairs"] == len(PAIRS)
        assert trial["accuracy"] == accuracy
        assert trial["mean_margin"] == pytest.approx(margin, abs=1e-5)
        if trial["perplexity_ratio"] is not None:
            assert trial["perplexity_ratio"] == pytest.approx(steered / reference, rel=1e-5)
            kl = sum(text_divergences(model, ids, partial(steered_by.applied, model)))
            kl /= sum(len(sequence) - 1 for sequence in ids)
            assert trial["kl"] == pytest.approx(kl, rel=1e-4)
    chosen = max(trials, key=lambda t: (t["accuracy"], t["mean_margin"]))
    assert tuning["chosen"] == chosen
    assert chosen["perplexity_ratio"] is not None
    assert (best.blocks, best.strength) == (chosen["blocks"], chosen["strength"])
    assert best.metadata["method"] == "grains"
    assert torch.equal(best.directions[best.blocks[0]], vectors.directions[best.blocks[0]])


@pytest.mark.parametrize("limit", [{"max_perplexity_ratio": 1.05}, {"max_kl": 0.05}])
def test_limit(model: PreTrainedModel, vectors: SteeringVectors, limit: dict[str, float]) -> None:
    def over(trial: dict[str, Any]) -> bool:
        ratio = trial["perplexity_ratio"] > limit.get("max_perplexity_ratio", 1.1)
        return bool(ratio or (trial["kl"] or 0.0) > limit.get("max_kl", 1.0))

    best = tune(model, TOKENIZER, PAIRS, vectors, neutral_texts=NEUTRAL, progress=False, **limit)
    tuning = best.metadata["tuning"]
    assert not over(tuning["chosen"])
    for trial in tuning["trials"]:
        if trial["perplexity_ratio"] is not None and over(trial):
            assert trial["accuracy"] is None
    # Every block set is tried, up to where it leaves the limit.
    tried = {tuple(t["blocks"]) for t in tuning["trials"]}
    assert tried == {tuple(blocks) for blocks in neighbour_sets(range(N_BLOCKS))}
    for trial in tuning["frontier"]:
        for other in tuning["trials"]:
            if other["n_pairs"] == len(PAIRS) and other["perplexity_ratio"] is not None:
                better = other["accuracy"] > trial["accuracy"]
                assert not (better and other["perplexity_ratio"] <= trial["perplexity_ratio"])


def test_no_setting_within_the_limit(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    with pytest.raises(ValueError, match="no setting keeps the perplexity within 0"):
        tune(
            model,
            TOKENIZER,
            PAIRS,
            vectors,
            strengths=[3.0],
            max_perplexity_ratio=0,
            progress=False,
        )


def many_pairs() -> list[PreferencePair]:
    things = ("sky", "sea", "grass", "rose", "home", "truth")
    return [
        PreferencePair(f"{start} {thing} is", color, "red")
        for start in ("the", "a", "what", "q")
        for thing in things
        for color in ("blue", "green")
    ]


def test_settings_behind_are_left_early(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    """Fewer pairs are scored than settings x pairs, and the winner is as good as any."""
    pairs = many_pairs()
    best = tune(
        model, TOKENIZER, pairs, vectors, strengths=STRENGTHS[1:8], max_perplexity_ratio=3.0,
        neutral_texts=NEUTRAL,
        progress=False,
    )  # fmt: skip
    tuning = best.metadata["tuning"]
    scored = [t for t in tuning["trials"] if t["n_pairs"]]
    left = [t for t in scored if t["n_pairs"] < len(pairs)]
    assert len(left) > len(scored) / 2
    assert tuning["evaluations"]["pairs"] < 0.6 * len(scored) * len(pairs)
    for trial in left[:: len(left) // 3]:
        with vectors.subset(trial["blocks"]).applied(model, trial["strength"]):
            margins = pair_margins(model, TOKENIZER, pairs)
        accuracy = sum(margin.total > 0 for margin in margins) / len(margins)
        assert accuracy <= tuning["chosen"]["accuracy"] + 0.05


def test_same_seed_same_result(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    options = {"blocks": [[0], [1], [3]], "max_perplexity_ratio": 2.0, "progress": False}
    first, second = (
        tune(
            model, TOKENIZER, many_pairs(), vectors, strengths=[0.1, 0.3], neutral_texts=NEUTRAL,
            seed=3, **options,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.metadata == second.metadata


def test_own_strengths_are_refined(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    best = tune(
        model, TOKENIZER, PAIRS, vectors.subset([1, 2]), max_perplexity_ratio=1.3, progress=False
    )
    tuning = best.metadata["tuning"]
    assert any(trial["strength"] not in STRENGTHS for trial in tuning["trials"])
    on_grid = [t for t in tuning["trials"] if t["strength"] in STRENGTHS and t["accuracy"]]
    chosen = tuning["chosen"]
    best_on_grid = max((t["accuracy"], t["mean_margin"]) for t in on_grid if t["perplexity_ratio"])
    assert (chosen["accuracy"], chosen["mean_margin"]) >= best_on_grid
    assert chosen["perplexity_ratio"] <= 1.3


class Stopped(Exception):
    pass


def test_resumes_from_its_trials(
    model: PreTrainedModel,
    vectors: SteeringVectors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = partial(
        tune, model, TOKENIZER, many_pairs(), vectors, neutral_texts=NEUTRAL, progress=False,
        strengths=[0.1, 0.3], max_perplexity_ratio=2.0,
    )  # fmt: skip
    whole = run().metadata["tuning"]
    path = tmp_path / "runs" / "trials.jsonl"
    put, lines = TrialLog.put, 0

    def stop(self: TrialLog, value: Any, **measured: Any) -> None:
        nonlocal lines
        lines += 1
        if lines > 20:
            raise Stopped
        put(self, value, **measured)

    with monkeypatch.context() as patch:
        patch.setattr(TrialLog, "put", stop)
        with pytest.raises(Stopped):
            run(trials=path)
    # As a machine that lost power leaves it.
    with path.open("a") as file:
        file.write('{"blocks": [0], "stren')
    resumed = run(trials=path).metadata["tuning"]
    done = resumed.pop("evaluations")
    total = whole.pop("evaluations")
    assert resumed == whole
    assert 0 < done["pairs"] < total["pairs"]
    assert run(trials=path).metadata["tuning"]["evaluations"] == {"neutral_texts": 0, "pairs": 0}
    # Other limits and strengths measure what is missing only.
    more = run(trials=path, strengths=[0.1, 0.2, 0.3], max_perplexity_ratio=1.5)
    assert more.metadata["tuning"]["evaluations"]["pairs"] < total["pairs"]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_trials_of_another_run(
    model: PreTrainedModel, vectors: SteeringVectors, tmp_path: Path
) -> None:
    path = tmp_path / "trials.jsonl"
    run = partial(
        tune, model, TOKENIZER, PAIRS, vectors, blocks=[[0]], strengths=[0.1],
        max_perplexity_ratio=9, trials=path, progress=False,
    )  # fmt: skip
    run()
    with pytest.raises(ValueError, match=r"trials of another run: seed was 0, is 1\. Give another"):
        run(seed=1)
    with pytest.raises(ValueError, match="another run: neutral_texts was None"):
        run(neutral_texts=NEUTRAL)
    with pytest.raises(ValueError, match="another run: vectors was"):
        tune(model, TOKENIZER, PAIRS, vectors.subset([0]), trials=path, progress=False)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        run()
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="not a file of tuning trials"):
        run()


def test_positions(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    """What is tuned is what will be steered: scoring knows where the prompt ends."""
    tuned = {}
    for positions in ("all", "generated"):
        best = tune(
            model, TOKENIZER, PAIRS, vectors, neutral_texts=NEUTRAL, blocks=[[1]],
            strengths=[0.3], max_perplexity_ratio=9.0, positions=positions, progress=False,
        )  # fmt: skip
        tuned[positions] = best.metadata["tuning"]["chosen"]["mean_margin"]
    # One-token answers are read off the prompt's last token, which is not a generated one.
    margins = pair_margins(model, TOKENIZER, PAIRS)
    assert tuned["all"] != pytest.approx(tuned["generated"])
    assert tuned["generated"] == pytest.approx(fmean(m.total for m in margins), abs=1e-5)


@pytest.mark.parametrize("positions", get_args(Named)[:4])
def test_texts_cost_what_evaluate_says(
    model: PreTrainedModel, vectors: SteeringVectors, positions: Named
) -> None:
    """Texts are generated to steering of generated tokens; to gates and all else a prompt."""
    for gate in (
        None,
        Gate(0, torch.ones(HIDDEN_SIZE), -1.0),
        Gate(0, torch.ones(HIDDEN_SIZE), 1.0),
    ):
        steering = vectors.subset([1]).with_gate(gate)
        best = tune(
            model, TOKENIZER, PAIRS[:1], steering, neutral_texts=NEUTRAL, blocks=[[1]],
            strengths=[0.3], max_perplexity_ratio=9, max_kl=9, positions=positions, progress=False,
        )  # fmt: skip
        tuned = best.metadata["tuning"]["chosen"]

        def steered(model: Any, best: SteeringVectors = best) -> Any:
            return best.applied(model, positions=positions)

        unsteered = measure(model, TOKENIZER, neutral_texts=NEUTRAL).perplexity
        found = measure(model, TOKENIZER, neutral_texts=NEUTRAL, vectors=steered)
        assert found.perplexity is not None
        assert unsteered is not None
        assert found.perplexity / unsteered == pytest.approx(tuned["perplexity_ratio"], rel=1e-5)
        assert found.kl_per_token == pytest.approx(tuned["kl"], abs=1e-6)
        shut = gate is not None and gate.threshold == 1.0
        assert (tuned["kl"] == 0) == shut


def test_a_gate_reads_a_text_to_its_end(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    """Its first token says nothing: all texts begin alike."""
    states = []
    for text in NEUTRAL:
        ids = torch.tensor([encode_prompt(TOKENIZER, text)])
        with DecoderView.of(model).capture([0]) as captured, torch.no_grad():
            model(ids)
        states.append(captured[0][0])
    first, last = states[0][0], states[0][-1]
    # Open at the first text's end alone.
    normal = last - first
    scores = [float(row @ normal) for row in (last, states[1][-1], first)]
    gate = Gate(0, normal, (scores[0] + max(scores[1:])) / 2, "probe")
    best = tune(
        model, TOKENIZER, PAIRS[:1], vectors.subset([1]).with_gate(gate), neutral_texts=NEUTRAL,
        blocks=[[1]], strengths=[0.3], max_perplexity_ratio=9, max_kl=9, progress=False,
    )  # fmt: skip
    divergences = text_divergences(
        model, [encode_prompt(TOKENIZER, NEUTRAL[0])], lambda: best.with_gate(None).applied(model)
    )
    n_tokens = sum(len(encode_prompt(TOKENIZER, text)) - 1 for text in NEUTRAL)
    kl = best.metadata["tuning"]["chosen"]["kl"]
    assert kl == pytest.approx(sum(divergences) / n_tokens, rel=1e-4)


def test_images(vectors: SteeringVectors) -> None:
    pytest.importorskip("PIL")
    from tests.test_refine import image_pairs
    from tests.vision_models import tiny_vlm

    model, processor = tiny_vlm("llava")
    some = vectors.subset([0, 1, 2])
    best = tune(
        model, processor, image_pairs(processor), some, strengths=[0.1, 0.3],
        max_perplexity_ratio=5.0, progress=False,
    )  # fmt: skip
    chosen = best.metadata["tuning"]["chosen"]
    with best.applied(model):
        margins = pair_margins(model, processor, image_pairs(processor))
    assert chosen["mean_margin"] == pytest.approx(fmean(m.total for m in margins), abs=1e-4)


def test_blank_texts_are_left_out(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    drifts = []
    for texts in (NEUTRAL, [*NEUTRAL, "", "\n"]):
        best = tune(
            model, TOKENIZER, PAIRS[:1], vectors, neutral_texts=texts, blocks=[[1]],
            strengths=[0.3], max_perplexity_ratio=9, progress=False,
        )  # fmt: skip
        drifts.append(best.metadata["tuning"]["chosen"]["perplexity_ratio"])
    assert drifts[0] == drifts[1]


def test_gentler_settings_that_cost_more_are_no_choice() -> None:
    class Meter:
        rounds = SimpleNamespace(ends=[16, 32, 64])

        def within(self, setting: Any) -> bool:
            return setting.strength in (0.45, 1.0)

        def margins(self, setting: Any, number: int) -> None: ...

        def rank(self, setting: Any) -> tuple[float, float]:
            return -setting.strength, 0.0

    grid = [0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.7, 1.0, 2.0]
    with progress_bar(False) as bar:
        best = _search(Meter(), [(0,), (1,), (2,)], grid, bar)  # type: ignore[arg-type]
    assert best.strength == 1.0


def test_prints_the_frontier(
    model: PreTrainedModel, vectors: SteeringVectors, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(model, TOKENIZER, PAIRS, vectors, blocks=[[0], [1]], max_perplexity_ratio=5.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "none" in captured.err
    assert "x 1" in captured.err
    assert "accuracy" in captured.err


def test_finds_a_planted_direction(model: PreTrainedModel) -> None:
    """A direction that raises " blue" and " green" in the logits must be found and win."""
    head = model.lm_head.weight.detach()
    good = [TOKENIZER(f" {color}").input_ids[-1] for color in ("blue", "green")]
    bad = TOKENIZER(" red").input_ids[-1]
    planted = head[good].mean(0) - head[bad]
    planted = 8 * planted / planted.norm()
    noise = torch.randn(2, HIDDEN_SIZE)
    vectors = SteeringVectors({0: noise[0], 1: noise[1], 3: planted})
    best = tune(model, TOKENIZER, PAIRS, vectors, max_perplexity_ratio=3.0, progress=False)
    assert 3 in best.blocks
    assert best.metadata["tuning"]["chosen"]["accuracy"] == 1.0
    assert best.metadata["tuning"]["unsteered"]["accuracy"] < 1.0


def test_model_is_left_as_it_was(vectors: SteeringVectors) -> None:
    model = tiny_model("llama").train()
    tune(
        model,
        TOKENIZER,
        PAIRS[:1],
        vectors,
        blocks=[[0]],
        strengths=[0.1],
        max_perplexity_ratio=9,
        progress=False,
    )
    assert model.training
    assert not any(block._forward_hooks for block in model.model.layers)


def test_model_compiled_in_place(vectors: SteeringVectors) -> None:
    """Graphs made before do not know of the steering, and are not used."""
    options = {"neutral_texts": NEUTRAL, "blocks": [[1]], "strengths": [0.1, 0.2]}
    options |= {"max_perplexity_ratio": 1e9, "progress": False}
    model = tiny_model("llama", num_hidden_layers=2)
    vectors = vectors.subset([0, 1])
    expected = tune(model, TOKENIZER, PAIRS, vectors, **options)
    torch._dynamo.reset()
    model.compile(backend="eager")
    pair_margins(model, TOKENIZER, PAIRS)
    tuned = tune(model, TOKENIZER, PAIRS, vectors, **options)
    assert tuned.metadata["tuning"]["trials"] == expected.metadata["tuning"]["trials"]
    assert model._compiled_call_impl is not None


def test_neighbour_sets() -> None:
    assert neighbour_sets([5]) == [[5]]
    assert neighbour_sets(range(4)) == [
        [0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    for n in (2, 3, 7, 32):
        sets = neighbour_sets(range(n))
        assert sets[-1] == list(range(n))
        assert len({tuple(chosen) for chosen in sets}) == len(sets) <= 3 * n


def test_wrong_arguments(model: PreTrainedModel, vectors: SteeringVectors) -> None:
    for pairs, options, reason in (
        ([], {}, "no dev pairs"),
        (PAIRS, {"strengths": [0.0]}, "strengths must be positive"),
        (PAIRS, {"strengths": []}, "strengths must be positive"),
        (PAIRS, {"blocks": []}, "no block set"),
        (PAIRS, {"positions": torch.ones(3, dtype=torch.bool)}, "positions by name"),
        (PAIRS, {"neutral_texts": "the sky is blue"}, "several texts, got one"),
        (PAIRS, {"max_kl": 0.0}, "max_kl must be more than 0"),
        (PAIRS, {"neutral_texts": []}, "neutral texts"),
        (PAIRS, {"blocks": [[9]]}, r"no direction for blocks \[9\]"),
        ([replace(PAIRS[0], prompt=[{"role": "user", "content": "x"}])], {}, "chat template"),
    ):
        with pytest.raises(ValueError, match=reason):
            tune(model, TOKENIZER, pairs, vectors, progress=False, **options)
