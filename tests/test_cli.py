"""The ``grains`` command on a small model: each step's output is the next one's input."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grains_ext import PreferencePair, SteeringVectors, cli, save_pairs
from tests.models import N_BLOCKS, tiny_model, tiny_tokenizer

PAIRS = [
    PreferencePair(prompt=f"what color is the {thing}", chosen="blue", rejected="green")
    for thing in ("sky", "sea", "grass", "rose")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, pairs and neutral texts, as a user would have them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_pairs(PAIRS, folder / "pairs.jsonl")
    (folder / "neutral.txt").write_text("the sky is blue\nthe grass is green\n")
    return folder


def grains(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_info_as_json_names_versions_and_instruction_sets() -> None:
    result = grains("info", "--json")
    facts = json.loads(result.stdout)
    assert facts["packages"]["torch"]
    assert facts["cpu"]["instruction_set"] in facts["cpu"]["supported"]


def test_attribute_writes_a_line_for_each_pair(folder: Path) -> None:
    output = folder / "attributions.jsonl"
    arguments = ("attribute", folder / "model", folder / "pairs.jsonl", "-o", output)
    result = grains(*arguments, "--baseline", "mean", "--n-steps", 32)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == len(PAIRS)
    for line in lines:
        assert len(line["scores"]) == len(line["tokens"])
        change = line["f_input"] - line["f_baseline"]
        assert sum(line["scores"]) == pytest.approx(change + line["residual"], abs=1e-4)


def test_fit_tune_and_evaluate_hand_their_results_on(folder: Path) -> None:
    model, pairs, neutral = folder / "model", folder / "pairs.jsonl", folder / "neutral.txt"
    fitted, tuned = folder / "fitted", folder / "tuned"

    result = grains("fit", model, pairs, "-o", fitted, "--k", 2)
    assert result.exit_code == 0, result.output
    assert SteeringVectors.from_pretrained(fitted).blocks == list(range(N_BLOCKS))

    result = grains("tune", model, pairs, fitted, "-o", tuned, "--neutral", neutral)
    assert result.exit_code == 0, result.output
    assert set(SteeringVectors.from_pretrained(tuned).blocks) <= set(range(N_BLOCKS))

    result = grains("evaluate", model, pairs, "--vectors", tuned, "--neutral", neutral, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["n_pairs"] == len(PAIRS)


def test_wrong_use_exits_with_2(folder: Path) -> None:
    model, pairs = folder / "model", folder / "pairs.jsonl"
    assert grains("fit", model).exit_code == 2
    assert grains("fit", model, pairs, "-o", folder / "x", "--k", 0).exit_code == 2
    assert grains("evaluate", model, pairs, "--strength", 2).exit_code == 2


def test_a_failure_is_one_message_and_exit_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "the sky is", "chosen": "blue", "rejected": "blue"}\n')
    output = folder / "never"
    arguments = ["grains", "fit", str(folder / "model"), str(bad), "-o", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "bad.jsonl" in message
    assert "Traceback" not in message
    assert not output.exists()
