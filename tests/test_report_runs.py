"""What a report finds in the folders that commands write, and what it says of others."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from grains_ext import PreferencePair, cli, save_pairs
from grains_ext.report import Parts, report
from grains_ext.report.runs import read_runs
from grains_ext.report.sections import glance
from tests.report_runs import (
    N_BLOCKS,
    pairs,
    write_attributions,
    write_evaluation,
    write_everything,
    write_export,
    write_seen,
    write_vectors,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def found(run: Path) -> Parts:
    return read_runs([run])


def test_a_folder_of_runs_is_read_by_what_lies_in_it(found: Parts) -> None:
    assert found.counts() == {
        "evaluations": 1,
        "answers": 30,
        "attributions": 31,
        "vectors": 1,
        "tunings": 1,
        "graphs": 1,
    }
    assert [part.title for part in found.attributed] == ["attributions", "seen"]
    assert [name for name, _ in found.commands] == [
        "grains evaluate --config evaluation.json.yaml",
        "grains fit --config fitted/fit.yaml",
        "grains tune --config tuned/tune.yaml",
    ]


def test_figures_of_an_evaluation_keep_their_intervals(found: Parts) -> None:
    figures = {figure.name: figure for figure in found.held_out[0].figures}
    assert set(figures) == {"accuracy", "accuracy_per_token", "exact_match", "mean_margin"}
    unsteered, ours, caa = figures["accuracy"].measured
    assert (unsteered.value, ours.value, caa.value) == (1 / 30, 0.5, 0.0)
    assert figures["accuracy"].is_share
    assert not figures["mean_margin"].is_share
    assert ours.interval is not None
    assert ours.interval[0] < 0.5 < ours.interval[1]
    assert ours.change is not None
    assert (ours.change.gained, ours.change.lost) == (15, 1)
    assert unsteered.change is None


def test_answers_stand_beside_what_was_asked(found: Parts) -> None:
    [answers] = found.answers
    assert answers.conditions == ("unsteered", "ours", "caa")
    first = answers.asked[1]
    assert (first.prompt, first.name) == (pairs(2)[1].prompt, "pair-1")
    assert [said.says_chosen for said in first.said] == [False, True, False]
    assert first.said[1].text == f"{first.chosen} , they say"


def test_chat_prompts_are_shown_with_their_roles(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "evaluation.json", 1)
    content = json.loads(path.read_text())
    content["pairs"][0]["prompt"] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Any cats?"}]}
    ]
    path.write_text(json.dumps(content))
    assert read_runs([path]).answers[0].asked[0].prompt == "user: [image] Any cats?"


def test_directions_that_tuning_kept_are_shown_once(found: Parts, run: Path) -> None:
    [directions] = found.directions
    assert (directions.title, len(directions.blocks)) == ("fitted", N_BLOCKS)
    third = directions.blocks[2]
    assert (third.hidden_norm, third.split_half) == (7.0, 0.6)
    alone = read_runs([run / "tuned"]).directions
    assert [[each.block for each in part.blocks] for part in alone] == [[2]]


def test_limit_leaves_the_figures_whole(run: Path) -> None:
    parts = read_runs([run], limit=4)
    attributed = parts.attributed[0]
    assert (len(attributed.attributions), attributed.n_pairs) == (4, 30)
    assert (len(parts.answers[0].asked), parts.answers[0].n_asked) == (4, 30)
    assert parts.held_out[0].n_pairs == 30


def test_yaml_of_others_is_not_shown(tmp_path: Path) -> None:
    write_vectors(tmp_path)
    (tmp_path / "compose.yaml").write_text("command: serve\npassword: hidden\n")
    [(name, _)] = read_runs([tmp_path]).commands
    assert name == "grains fit --config fit.yaml"


def test_runs_are_named_by_their_folders_where_there_are_several(run: Path) -> None:
    parts = read_runs([run / "fitted", run / "evaluation.json", run / "attributions"])
    assert parts.directions[0].title == "fitted"
    assert parts.held_out[0].title == "evaluation.json"
    assert parts.attributed[0].title == "attributions"


# --- what is no run -------------------------------------------------------------------------------


def stopped_tuning(folder: Path) -> None:
    (folder / "trials.jsonl").write_text('{"format": "grains.tuning"}\n')


def lone_parts(folder: Path) -> None:
    write_attributions(folder / "a", 2)
    (folder / "a" / "attributions.json").unlink()


def lone_weights(folder: Path) -> None:
    write_vectors(folder / "v")
    (folder / "v" / "steering_config.json").unlink()


def lone_config(folder: Path) -> None:
    write_vectors(folder / "v")
    (folder / "v" / "steering.safetensors").unlink()


def changed(folder: Path, **changes: Any) -> None:
    path = write_evaluation(folder / "evaluation.json", 2)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unknown_vectors(folder: Path) -> None:
    path = write_vectors(folder) / "steering_config.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))


def cut_short(folder: Path) -> None:
    path = write_evaluation(folder / "evaluation.json", 2)
    path.write_text(path.read_text()[:-40])


def nested(folder: Path) -> None:
    (folder / "e.json").write_text('{"format": "grains.evaluation", "x": ' + "[" * 100_000)


def half_a_trial(folder: Path) -> None:
    path = write_vectors(folder / "v", tuned=True) / "steering_config.json"
    content = json.loads(path.read_text())
    del content["metadata"]["tuning"]["trials"][3]["accuracy"]
    path.write_text(json.dumps(content))


def no_time_at_all(folder: Path) -> None:
    times = {"median": 0.0, "low": 0.0, "high": 0.0}
    part = {"title": "t", "per_second": {"a": 1}, "unit": "tokens/s", "baseline": "a"}
    part["measured"] = [{"name": "a", "seconds": times, "ratio": times}]
    content = {"format": "grains.bench", "version": 1, "parts": [part]}
    (folder / "bench.json").write_text(json.dumps(content))


def another_record(folder: Path) -> None:
    (write_export(folder / "x") / "grains_export.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds no run: 'grains attribute', 'fit'"),
        (lambda folder: (folder / "notes.json").write_text('{"a": 1}'), "holds no run"),
        (stopped_tuning, "'grains tune' that was stopped: run the same command again"),
        (lone_parts, "no attributions.json, which says what was asked"),
        (lone_weights, "no steering_config.json, which belongs to it"),
        (lone_config, "no steering.safetensors"),
        (lambda folder: changed(folder, version=2), "its version is 2, .* reads 1: update"),
        (lambda folder: changed(folder, conditions={"unsteered": {}}), "not as grains_ext writes"),
        (lambda folder: changed(folder, pairs=[]), "evaluation.json: zip"),
        (unknown_vectors, "format_version is 3"),
        (cut_short, "evaluation.json: "),
        (nested, "nested too deeply|e.json"),
        (another_record, "grains_export.json is not as grains_ext writes it"),
        (half_a_trial, "steering_config.json is not as grains_ext writes it"),
        (no_time_at_all, "bench.json is not as grains_ext writes it"),
    ],
)
def test_what_is_no_whole_run_says_what_is_wrong(
    prepare: Any, message: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "run").mkdir()
    prepare(tmp_path / "run")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        report(tmp_path / "run", page)
    assert page.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no-such-folder", None, "no run at"),
        ("notes.txt", "hello", "is no file of a run"),
        ("model.json", '{"a": 1}', "is no file of a run"),
        ("new.json", '{"format": "grains.future", "version": 1}', "format 'grains.future', which"),
        ("part.safetensors", "xx", "part.safetensors"),
    ],
)
def test_a_file_that_is_no_run(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        report([tmp_path / name], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_links_are_not_followed_in_circles(tmp_path: Path) -> None:
    write_vectors(tmp_path / "run")
    os.symlink(tmp_path / "run", tmp_path / "run" / "again")
    assert read_runs([tmp_path / "run"]).counts() == {"vectors": 1}


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_come_from_the_pairs_and_from_nowhere_else(tmp_path: Path) -> None:
    write_seen(tmp_path / "seen")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "seen" / "picture.png")
    pair = PreferencePair("what digit ?", "seven", "two", (tmp_path / "seen/picture.png",))
    page = tmp_path / "page.html"
    report(tmp_path / "seen", page)
    assert "data:image" not in page.read_text()
    report(tmp_path / "seen", page, pairs=[pair])
    assert page.read_text().count("data:image/png;base64,") == 1
    with pytest.raises(ValueError, match="pair 0 is not the one that was attributed"):
        report(tmp_path / "seen", page, pairs=pairs(1))


# --- the command ----------------------------------------------------------------------------------


def grains(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_writes_the_page_and_says_what_it_shows(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    result = grains("report", run, "-o", page, "--title", "Colours", "--limit", 5, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["shows"]["attributions"] == 6
    assert said["bytes"] == page.stat().st_size
    assert "<title>Colours</title>" in page.read_text()
    config = page.with_name("page.html.yaml")
    again = grains("report", "--config", config, "-o", tmp_path / "again.html")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_text() == page.read_text()
    assert "give the file of pairs with --pairs" in " ".join(again.output.split())
    assert grains("report", run, "-o", page, "--quiet").output == ""


def test_the_command_takes_pairs_for_their_pictures(tmp_path: Path) -> None:
    write_seen(tmp_path / "seen")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    save_pairs(
        [PreferencePair("what digit ?", "seven", "two", (tmp_path / "red.png",))],
        tmp_path / "pairs.jsonl",
    )
    page = tmp_path / "page.html"
    result = grains("report", tmp_path / "seen", "--pairs", tmp_path / "pairs.jsonl", "-o", page)
    assert result.exit_code == 0, result.output
    assert "--pairs" not in result.output
    assert "data:image/png" in page.read_text()


def test_wrong_use_of_the_command(run: Path, tmp_path: Path) -> None:
    assert grains("report").exit_code == 2
    assert grains("report", run, "--limit", 0).exit_code == 2
    assert grains("report", tmp_path / "none", "-o", tmp_path / "x.html").exit_code == 2
    assert grains("report", tmp_path, "-o", tmp_path / "x.html").exit_code == 1


def test_without_jinja_the_message_is_the_pip_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grains_ext.report import rendering

    rendering._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'grains_ext\[report\]'"):
        report(run, tmp_path / "page.html")
    rendering._environment.cache_clear()


def test_the_same_runs_make_the_same_page(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    report(run, tmp_path / "a.html")
    report(copy, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_bench_measured_is_shown_as_speed(tmp_path: Path) -> None:
    """A time of half the baseline's is twice its speed, and its long quartile the slow one."""
    times = {"median": 0.5, "low": 0.4, "high": 0.8}
    part = {
        "name": "onnx",
        "title": "decoding",
        "baseline": "unsteered",
        "measured": [{"name": "steered", "seconds": times, "ratio": times}],
        "per_second": {"steered": 10.0},
        "unit": "tokens/s",
    }
    silent = {**part, "name": "op", "per_second": {}}
    content = {"format": "grains.bench", "version": 1, "model": {"name": "m"}}
    (tmp_path / "bench.json").write_text(json.dumps({**content, "parts": [part, silent]}))
    [shown] = read_runs([tmp_path / "bench.json"]).exported
    assert shown.baseline == "unsteered"
    [row] = shown.rates
    assert (row.rate, row.rate_spread) == (10.0, (6.25, 12.5))
    assert (row.ratio, row.ratio_spread) == (2.0, (1.25, 2.5))
    report(tmp_path, tmp_path / "page.html")
    assert "× 2.000" in (tmp_path / "page.html").read_text()


def test_pairs_per_second_are_not_said_to_be_beside_the_unsteered_model(tmp_path: Path) -> None:
    times = {"median": 0.5, "low": 0.4, "high": 0.8}
    floor = "the model's own 8 passes"
    part = {
        "title": "attributing 4 pairs",
        "baseline": floor,
        "measured": [{"name": floor, "seconds": times, "ratio": times}],
        "per_second": {floor: 8.0},
        "unit": "pairs/s",
    }
    content = {"format": "grains.bench", "version": 1, "parts": [part]}
    (tmp_path / "bench.json").write_text(json.dumps(content))
    page = tmp_path / "page.html"
    report(tmp_path / "bench.json", page)
    assert "of the model&#39;s own 8 passes</th>" in page.read_text()
    assert "unsteered" not in page.read_text()


def test_a_quantised_graph_is_not_as_exact_as_it_was_before(tmp_path: Path) -> None:
    path = write_export(tmp_path / "small") / "grains_export.json"
    record = json.loads(path.read_text())
    far = {"prefill": 0.25, "decode": 0.5, "relative": 0.1}
    names = ("weights", "steered", "strength_zero", "runtimes")
    record["parity"]["quantization"] = dict.fromkeys(names, far)
    path.write_text(json.dumps(record))
    parts = read_runs([tmp_path / "small"])
    [shown] = glance(parts)
    assert (shown["label"], shown["value"]) == ("Exported graph", "5.0e-01")
    assert parts.exported[0].parity[0].name.startswith("before quantising, ")


def test_what_the_demo_wrote_is_shown(tmp_path: Path) -> None:
    rate = {"median": 2.0, "low": 1.0, "high": 3.0}
    content = {
        "format": "grains.demo",
        "version": 1,
        "rows": [
            {
                "name": "ours",
                "accuracy": 0.5,
                "interval": [0.4, 0.6],
                "n": 9,
                "perplexity_ratio": 1.1,
                "settings": "block 1",
            }
        ],
        "generations": [{"prompt": "q", "chosen": "a", "before": "b", "after": "a"}],
        "export": {
            "rates": {"steered": {"tokens_per_second": rate, "relative_to_unsteered": rate}}
        },
    }
    (tmp_path / "demo.json").write_text(json.dumps(content))
    found = read_runs([tmp_path])
    assert found.counts() == {"evaluations": 1, "answers": 1, "graphs": 1}
    assert found.held_out[0].figures[0].measured[0].note == "block 1"
