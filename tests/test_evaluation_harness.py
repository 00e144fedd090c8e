"""The lm-evaluation-harness on the embedded model, with a task file made here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grains_ext.demo import world
from grains_ext.demo.run import load_model
from grains_ext.demo.train import MODEL_DIR
from grains_ext.evaluation import MultipleChoice, evaluate
from grains_ext.steering import SteeringVectors

for module in ("lm_eval", "accelerate", "peft"):
    pytest.importorskip(module)

PAIRS = world.test_pairs(0, 30) + world.pairs("careful", "test", seed=0, n=10)
TASK = """\
task: held_out
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": pair.prompt, "choices": [pair.rejected, pair.chosen], "label": 1}
        for pair in PAIRS
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.yaml").write_text(TASK.format(data=folder / "test.jsonl"))
    return folder


def shift(model: Any) -> SteeringVectors:
    """From told to checked evidence: how the two kinds of prompt differ at one block."""
    _, tokenizer = load_model()
    means = []
    for kind in ("careful", "folk"):
        states = []
        for pair in world.pairs(kind, "fit", seed=0, n=30):
            ids = tokenizer(pair.prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[2][0, -1])
        means.append(torch.stack(states).mean(0))
    return SteeringVectors({1: means[0] - means[1]}, strength=1.5)


def accuracy(results: dict[str, Any]) -> float:
    return results["results"]["held_out"]["acc,none"]


def test_the_harness_measures_what_evaluate_does(task_folder: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import grains_ext.evaluation.harness as harness

    model, tokenizer = load_model()
    vectors = shift(model)
    items = [
        MultipleChoice(pair.prompt, (pair.rejected, pair.chosen), (False, True)) for pair in PAIRS
    ]
    report = evaluate(model, tokenizer, vectors=vectors, tasks={"held_out": items}, progress=False)
    expected = {
        name: condition.statistics()["held_out/accuracy"].value
        for name, condition in report.conditions.items()
    }
    assert expected["unsteered"] != expected["steered"]

    vectors.save_pretrained(tmp_path / "vectors")
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    options = {"tasks": ["held_out"], "task_manager": manager, "bootstrap_iters": 0}

    with vectors.applied(model):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8)
        assert accuracy(lm_eval.simple_evaluate(lm, **options)) == expected["steered"]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8)
    assert accuracy(lm_eval.simple_evaluate(lm, **options)) == expected["unsteered"]

    arguments = {"pretrained": str(MODEL_DIR), "vectors": str(tmp_path / "vectors")}
    arguments |= {"device": "cpu", "dtype": "float32"}
    results = lm_eval.simple_evaluate("grains", model_args=arguments, batch_size=8, **options)
    assert accuracy(results) == expected["steered"]
    unsteered = harness.SteeredLM(**arguments, strength=0.0)
    assert accuracy(lm_eval.simple_evaluate(unsteered, **options)) == expected["unsteered"]
    # Rows there are padded on the right, with no mask: "generated" would steer nothing at all.
    by_position = harness.SteeredLM(**arguments, positions="generated")
    with pytest.raises(ValueError, match="log-likelihood tasks of the harness do not show"):
        lm_eval.simple_evaluate(by_position, **options)


@pytest.mark.slow
def test_on_the_command_line(task_folder: Path, tmp_path: Path) -> None:
    model, _ = load_model()
    shift(model).save_pretrained(tmp_path / "vectors")
    command = [sys.executable, "-m", "grains_ext.evaluation.harness", "run", "--model", "grains"]
    command += ["--model_args", f"pretrained={MODEL_DIR},vectors={tmp_path / 'vectors'},strength=1"]
    command += ["--tasks", "held_out", "--include_path", str(task_folder), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(file.read_text())["results"]["held_out"]["acc,none"] <= 1
