"""The demo from end to end, in its quick form, and the parts that it is made of."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from grains_ext.demo import compare
from grains_ext.demo.run import OUTPUTS, load_model, run_demo
from grains_ext.demo.speed import Spread
from grains_ext.evaluation import Proportion
from grains_ext.export import OnnxDecoder, session
from grains_ext.steering import SteeringVectors


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo") / "output"
    (folder / "vectors").mkdir(parents=True)
    (folder / "vectors" / "of_an_earlier_run").touch()
    (folder / "kept").touch()
    text = io.StringIO()
    result = run_demo(folder, quick=True, console=Console(file=text, width=120))
    return folder, result, text.getvalue()


@pytest.mark.slow
def test_demo_writes_its_files_and_nothing_else(quick: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, printed = quick
    assert {entry.name for entry in folder.iterdir()} == {*OUTPUTS, "kept"}
    assert not (folder / "vectors" / "of_an_earlier_run").exists()
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(result))
    page = (folder / "report.html").read_text()
    for method in result["methods"]:
        assert method["name"] in printed
        assert method["name"] in page


@pytest.mark.slow
def test_demo_compares_all_methods_by_the_same_rules(
    quick: tuple[Path, dict[str, Any], str],
) -> None:
    _, result, _ = quick
    unsteered, *methods = result["methods"]
    assert unsteered["draws"][0]["accuracy"] <= 0.1
    assert [method["name"] for method in methods] == [
        compare.OURS,
        compare.REFINED,
        "CAA",
        "random tokens",
        "random direction",
    ]
    for method, n_variants in zip(methods, (3, 1, 1, 3, 1), strict=True):
        for draw in method["draws"]:
            assert len(draw["tuning"]) == n_variants
            for tuning in draw["tuning"]:
                assert tuning["n_pairs"] == compare.QUICK.dev_pairs
                assert tuning["chosen"]["perplexity_ratio"] <= compare.MAX_PERPLEXITY_RATIO
                assert len(tuning["chosen"]["blocks"]) == 1
            assert draw["n"] == compare.QUICK.test_pairs
            low, high = draw["interval"]
            assert low <= draw["accuracy"] <= high


@pytest.mark.slow
def test_demo_vectors_steer_the_exported_graph(quick: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = quick
    model, tokenizer = load_model()
    vectors = SteeringVectors.from_pretrained(folder / "vectors")
    assert result["export"]["parity"]["max_absolute_error"] <= 1e-4
    assert sum(result["export"]["parity"]["fused_nodes"].values()) == len(vectors.blocks)
    decoder = OnnxDecoder(session(folder / "onnx" / "model.onnx"))
    for generation in result["generations"]:
        ids = tokenizer(generation["prompt"], return_tensors="np").input_ids
        new = decoder.generate(ids, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
        assert tokenizer.decode(new[0], skip_special_tokens=True) == generation["after"]
        with vectors.applied(model):
            out = model.generate(
                **tokenizer(generation["prompt"], return_tensors="pt"),
                max_new_tokens=8,
                do_sample=False,
            )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == generation["after"]


def test_data_of_the_parts_is_disjoint() -> None:
    data = compare.Data.of(0, compare.QUICK)
    parts = (data.fit_pairs, data.dev_pairs, data.test_pairs)
    entities = [{pair.prompt.split()[-3] for pair in part} for part in parts]
    assert not entities[0] & entities[1]
    assert not (entities[0] | entities[1]) & entities[2]
    assert not set(data.dev_stories) & set(data.test_stories)


def test_rows_pool_their_draws() -> None:
    draws = [
        compare.Draw(None, Proportion.of([True] * right + [False] * (10 - right)), perplexity)
        for right, perplexity in ((2, 3.0), (6, 4.0))
    ]
    row = compare.MethodResult("random", draws).row(2.0)
    assert (row.accuracy, row.n, row.perplexity_ratio) == (0.4, 20, 1.75)
    assert row.interval[0] < 0.4 < row.interval[1]
    assert row.settings == "2 draws: 20, 60 %"


def test_tuning_takes_the_variant_that_is_best_on_dev() -> None:
    model, tokenizer = load_model()
    data = compare.Data.of(0, compare.QUICK)
    generator = torch.Generator().manual_seed(0)
    variants = [
        SteeringVectors(
            {1: torch.randn(model.config.hidden_size, generator=generator)},
            metadata={"signs": signs},
        )
        for signs in compare.SIGNS
    ]
    tuned = compare.tuned(model, tokenizer, data, variants, strengths=(1.0, 5.0))
    chosen = [vectors.metadata["tuning"]["chosen"] for vectors in tuned.variants]
    best = max(chosen, key=lambda trial: (trial["accuracy"], trial["mean_margin"]))
    assert tuned.best.metadata["tuning"]["chosen"] == best
    assert list(tuned.dev_accuracies) == ["v+ and v-", "v+ alone", "v- alone"]
    assert tuned.settings.startswith(f"block 1, strength {best['strength']:g}, v")


def test_spread_is_median_and_tenths() -> None:
    assert Spread.of(list(range(101))) == Spread(50, 10, 90)
