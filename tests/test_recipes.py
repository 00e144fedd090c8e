"""The recipes: each in small from files to table, what is taken up again, what is refused."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grains_ext import EvaluationReport, PreferencePair, SteeringVectors
from grains_ext.encoding import encode_pair
from grains_ext.scoring import pair_margins
from recipes import cost, judging
from recipes.__main__ import main
from recipes.data import Asked, check_disjoint, load, subject_of
from recipes.lora import tuned_lora
from recipes.methods import Workshop
from recipes.recipe import Method, Recipe, read_recipe, recipe_named, recipes
from recipes.run import Sources, run
from recipes.smoke import judge, small_model, write_data

pytestmark = pytest.mark.filterwarnings("ignore:.* did not converge")

NO_PEFT = [] if importlib.util.find_spec("peft") else ["lora"]
SHORT = ["grains", "grains-refined", "prompt"]
TEXT, PICTURES = "toxigen-llama-3.1-8b", "spa-vl-qwen2.5-vl-7b"
# Methods know nothing of benchmarks: all of them run once for each model class.
EVERY_METHOD = (
    "truthfulqa-llama-3.1-8b",
    "faitheval-qwen2.5-7b",
    "mmhal-gemma-3-12b",
    "spa-vl-llava-1.6-7b",
    PICTURES,
)
FIGURES = {
    "truthfulqa": {"mc1/accuracy", "mc2/true_mass", "generation/truthful"},
    "toxigen": {"toxigen/accuracy"},
    "faitheval": {"faitheval/accuracy"},
    "mmhal": {"mmhal/rating", "mmhal/hallucination_rate", "accuracy"},
    "spa-vl": {"spa-vl/win_rate", "accuracy"},
}


def small(name: str, methods: list[str] | None = None) -> Recipe:
    recipe = recipe_named(name).smoke()
    return recipe.without(NO_PEFT) if methods is None else recipe.only(methods)


def sources_of(recipe: Recipe, folder: Path, **options: Any) -> Sources:
    data = write_data(recipe, folder)
    return Sources(lambda: small_model(recipe), "small", data, **options)


def run_small(recipe: Recipe, folder: Path, **options: Any) -> EvaluationReport:
    return run(recipe, sources_of(recipe, folder / "data", **options), folder, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_runs_from_its_files_to_its_table(name: str, tmp_path: Path) -> None:
    recipe = small(name, None if name in EVERY_METHOD else SHORT)
    report = run_small(recipe, tmp_path, judge=judge, judge_name="smoke")
    results = json.loads((tmp_path / "results.json").read_text())
    table = (tmp_path / "table.md").read_text()

    rows, missed = list(report.conditions), results["nothing_within_the_limit"]
    assert rows[0] == "unsteered"
    assert sorted([*rows[1:], *missed]) == sorted(recipe.methods())
    assert all(f"| {row} |" in table for row in (*rows, *missed))
    assert all(difference in table for difference in recipe.benchmark["differs"])
    figures = set(report.conditions["prompt"].statistics())
    assert FIGURES[recipe.benchmark["name"]] | {f"{recipe.kept['name']}/accuracy"} <= figures
    for row, method in recipe.methods().items():
        if row not in missed and not method.prompt:
            assert {"perplexity", "kl_per_token"} <= set(report.conditions[row].statistics())
    for name_of_change in report.changes("prompt"):
        assert "low" in results["changes"]["prompt"][name_of_change]


# --- what is written, and taken up again ----------------------------------------------------------


def test_a_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    recipe = small(TEXT, SHORT)
    first = run_small(recipe, tmp_path)
    shutil.rmtree(tmp_path / "tuned" / "grains-refined")
    (tmp_path / "measured" / "prompt.json").unlink()
    kept = {
        path: path.stat().st_mtime_ns
        for part in ("fitted", "measured", "attributions")
        for path in (tmp_path / part).rglob("*.*")
        if path.is_file() and ".lock" not in path.name
    }
    again = run_small(read_recipe(tmp_path / "config.yaml"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again.as_dict() == first.as_dict()
    vectors = SteeringVectors.from_pretrained(tmp_path / "tuned" / "grains-refined")
    assert vectors.metadata["refine"]["settings"]["steps"] == 2

    def no_model() -> Any:
        raise AssertionError("a finished run needs no model")

    finished = Sources(no_model, "small", tmp_path / "data", judge, "smoke")
    assert run(recipe, finished, tmp_path, progress=False).as_dict() == first.as_dict()

    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        run_small(recipe.with_seed(1), tmp_path)
    with pytest.raises(ValueError, match=r"another dtype \(None\)"):
        run(recipe, replace(finished, dtype="bfloat16"), tmp_path, progress=False)
    (tmp_path / "data" / "neutral.txt").write_text("another text it is\nand one more of them\n")
    other = Sources(lambda: small_model(recipe), "small", tmp_path / "data")
    with pytest.raises(ValueError, match="another data"):
        run(recipe, other, tmp_path, progress=False)


def test_nothing_within_the_limit_is_a_row_of_its_own(tmp_path: Path) -> None:
    recipe = small(TEXT, ["caa"])
    tuning = {**recipe.settings["tune"], "max_perplexity_ratio": 1e-6}
    recipe = replace(recipe, settings={**recipe.settings, "tune": tuning})
    report = run_small(recipe, tmp_path)
    assert list(report.conditions) == ["unsteered"]
    assert "| caa | no setting within the limit |" in (tmp_path / "table.md").read_text()
    # Nothing that was asked for reads attributions.
    assert not (tmp_path / "attributions").exists()
    assert cost.cost_of(recipe).tokens["attribute"] == 0


@pytest.mark.skipif(bool(NO_PEFT), reason="peft is not installed")
def test_an_adapter_learns_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    recipe = small(TEXT, ["lora"])
    settings = {"refine": {"steps": 10}, "tune": {"max_perplexity_ratio": 1e9}}
    recipe = replace(recipe, settings=recipe.settings | settings)
    model, tokenizer = small_model(recipe)
    model.to(torch.bfloat16).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = load(recipe, write_data(recipe, tmp_path / "data"))
    shop = Workshop(recipe, model, tokenizer, data, tmp_path, progress=False)

    def margin() -> float:
        return fmean(each.total for each in pair_margins(model, tokenizer, data.fit))

    unsteered = margin()
    options = {"rank": 4, "learning_rates": [1e-2], "scales": [0.5, 1.0]}
    with tuned_lora(shop, options, tmp_path / "lora")(model):
        assert margin() > unsteered + 1
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert margin() == unsteered


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main([TEXT, "--smoke", "--only", "random-direction", "-o", out]) == 0
    assert "| random-direction |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in recipes())
    assert main([TEXT, "--data", str(tmp_path), "--only", "caa", "-o", str(tmp_path / "x")]) == 1
    assert "has none of annotated_train.csv" in capsys.readouterr().err
    assert main(["unknown", "--smoke", "-o", out]) == 1
    assert "no recipe 'unknown': there are truthfulqa-" in capsys.readouterr().err
    assert main([TEXT, "--smoke", "--only", "icv", "-o", out, "--judge", "json"]) == 1
    assert "--judge is module:function" in capsys.readouterr().err


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TEXT, "truthfulqa-qwen2.5-7b", PICTURES, "mmhal-llava-1.6-7b"])
def test_no_subject_is_in_two_parts(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    folder = write_data(recipe, tmp_path)
    data = load(recipe, folder)
    fit, dev = ({subject_of(pair) for pair in part} for part in (data.fit, data.dev))
    judged = {subject_of(i) for part in data.choices.values() for i in part}
    judged |= {subject_of(pair) for pair in data.test_pairs}
    judged |= {subject_of(q) for asked in data.asked.values() for q in asked.questions}
    assert (len(fit), len(dev)) == (4, 4)
    assert not fit & dev
    assert not (fit | dev) & judged
    assert load(recipe, folder).describe() == data.describe()
    other = load(recipe.with_seed(1), folder).describe()
    assert other["sha256"] != data.describe()["sha256"]
    mended = [replace(data.dev[0], chosen="a better answer"), *data.dev[1:]]
    for changed in (replace(data, dev=mended), replace(data, neutral_test=["other words"])):
        assert changed.describe()["sha256"] != data.describe()["sha256"]
    with pytest.raises(ValueError, match="subjects are in fit and in dev"):
        check_disjoint(replace(data, dev=data.fit[:1]))
    with pytest.raises(ValueError, match=r"4 to fit, 40 to tune"):
        load(replace(recipe, settings={**recipe.settings, "n_dev": 40}), folder)


def test_a_subject_is_the_picture_where_there_is_one(tmp_path: Path) -> None:
    one, other = b"a picture", {"bytes": b"another"}
    pair = PreferencePair("what is it <image>", "a", "b", images=({"bytes": one},))
    assert subject_of(pair) == subject_of(replace(pair, prompt="who <image>"))
    assert subject_of(pair) != subject_of(replace(pair, images=(other,)))
    (tmp_path / "1.png").write_bytes(one)
    assert subject_of(replace(pair, images=(str(tmp_path / "1.png"),))) == subject_of(pair)


def test_answers_are_rated(tmp_path: Path) -> None:
    recipe = small("truthfulqa-llama-3.1-8b")
    asked = load(recipe, write_data(recipe, tmp_path)).asked["generation"]
    said = ["blue"] * len(asked.questions)
    found = judging.rated(asked, said, None, lambda prompt: "Fine.\n**Rating:** 1")
    assert found is not None
    assert found.statistics["truthful"].value == 1
    for reply in ("no idea", "Rating: 7"):
        assert judging.rated(asked, said, None, lambda p, r=reply: r).outcomes[0].score == 0  # type: ignore[misc,union-attr]
    compared = Asked(asked.questions, "comparison")
    assert judging.rated(compared, said, None, judge) is None
    better = judging.rated(
        compared, said, ["red"] * len(said), lambda p: f"**Better:** {'AB'['A: blue' not in p]}."
    )
    assert better is not None
    assert better.statistics["win_rate"].value == 1


@pytest.mark.parametrize(
    ("plain", "message"),
    [({"fit": "caa", "k": 3}, "unknown settings"), ({"draws": 2}, "give one of fit, refine")],
)
def test_a_wrong_method_is_named(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"method odd: {message}"):
        Method.of("odd", plain)
    with pytest.raises(ValueError, match="unknown methods"):
        recipe_named(TEXT).only(["odd"])


# --- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "gemma-3-12b", "llava-1.6-7b"])
def test_sizes_are_those_of_the_models(name: str) -> None:
    [recipe] = [r for r in recipes().values() if r.model["name"] == name][:1]
    config = dict(recipe.model["config"])
    model_class = CONFIG_MAPPING[config.pop("model_type")]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_class(**config))
    # A vision tower is some 3 to 5 % of the whole.
    share = model.num_parameters() / recipe.model["parameters"]
    assert 0.95 < share < 1.002


def test_the_predicted_tokens_are_those_that_a_small_model_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(TEXT, ["grains", "grains-refined", "caa"])
    tuning = {**recipe.settings["tune"], "shortest_run": 0.25}
    recipe = replace(recipe, settings={**recipe.settings, "tune": tuning})
    run_small(recipe, tmp_path)
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    counted = sum(s["tokens"] for name, s in stages.items() if name.startswith("fit and tune"))

    model, tokenizer = small_model(recipe)
    data = load(recipe, tmp_path / "data")
    ids = [encode_pair(tokenizer, pair) for pair in data.fit]
    lengths = {
        "prompt": fmean(len(each.prompt_ids) for each in ids),
        "answer": fmean(len(each.chosen_ids) for each in ids),
        "answers": 1,
        "items": 4,
    }
    monkeypatch.setattr(cost, "TEMPLATE_TOKENS", 0)
    neutral = fmean(len(tokenizer(text).input_ids) for text in data.neutral_dev)
    monkeypatch.setattr(cost, "NEUTRAL_TOKENS", neutral)
    config = {**recipe.model["config"], "num_hidden_layers": model.config.num_hidden_layers}
    found = cost.cost_of(
        replace(
            recipe,
            model={**recipe.model, "config": config},
            benchmark={**recipe.benchmark, "tokens": lengths},
        )
    )
    predicted = found.tokens["fit"] + found.tokens["refine"] + found.tokens["tune"]
    assert 0.8 < counted / predicted < 1.25


def test_the_page_tells_the_costs_that_are_worked_out() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    by_benchmark: dict[str, list[cost.Cost]] = {}
    for recipe in recipes().values():
        expected = cost.cost_of(recipe)
        assert 2e-9 * recipe.model["parameters"] < expected.memory_gb < 80
        by_benchmark.setdefault(recipe.benchmark["name"], []).append(expected)
    for name, costs in by_benchmark.items():
        memory = ", ".join(f"{each.memory_gb:.0f}" for each in costs)
        hours = ", ".join(f"{each.hours:.1f}" for each in costs)
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}-`")]
        assert row.endswith(f"| {memory} GB | {hours} |")
