"""The ``grains`` command on a small model: each step's output is the next one's input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from grains_ext import PreferencePair, SteeringVectors, bench, cli, save_pairs
from grains_ext.attribution import AttributionStore, attribute, load_attributions, settings
from grains_ext.cli import bench as bench_command
from grains_ext.cli.attribute import attribute as attribute_command
from tests.attributions import attribution
from tests.models import HIDDEN_SIZE, N_BLOCKS, tiny_model, tiny_tokenizer
from tests.vision_models import tiny_vlm

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


def test_attribute_streams_to_a_folder_and_goes_on(folder: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "results", tmp_path / "page.html"
    command = ("attribute", folder / "model", folder / "pairs.jsonl", "-o", output, "--json")

    result = grains(*command, "--baseline", "mean", "--limit", 3)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"] == 3

    result = grains(*command, "--baseline", "mean", "--html", page)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["output"] == str(output)
    assert summary["pairs"] == len(PAIRS)
    assert summary["share_not_converged"] == 0
    assert page.read_text(encoding="utf-8").count("<figure>") == len(PAIRS)

    for it in load_attributions(output):
        change = it.f_input - it.f_baseline
        assert it.scores.sum() == pytest.approx(change + it.residual, abs=1e-4)
    lines = [
        json.loads(line)
        for path in sorted(output.glob("part-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(line["index"] for line in lines) == list(range(len(PAIRS)))
    assert all(len(line["scores"]) == len(line["tokens"]) for line in lines)

    result = grains(*command, "--baseline", "bos")
    assert result.exit_code == 1
    assert "holds another run" in str(result.exception)


class Recorded:
    """Stands in for `attribute`: notes what it was called with, and stores a result or stops."""

    def __init__(self, *, interrupted: bool = False) -> None:
        self.interrupted = interrupted
        self.settings: dict[str, Any] = {}

    def __call__(self, model: Any, processor: Any, pairs: Any, **settings: Any) -> None:
        self.settings = settings
        with AttributionStore(settings["output_dir"], {"method": settings["method"]}) as store:
            store.append([(0, attribution(("a", "b"), [1.0, -1.0], converged=False))])
        if self.interrupted:
            raise KeyboardInterrupt


def recorded(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Recorded:
    record = Recorded(**kwargs)
    monkeypatch.setattr("grains_ext.attribution.attribute", record)
    return record


def test_every_setting_of_attribute_is_handed_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorded(monkeypatch)
    options = (
        "--method occlusion --baseline pad --objective first --n-steps 7 --tolerance 0.1 --top-k 3 "
        "--attributed-span -8:-1 --modalities image --image-baseline blur --max-batch-tokens 512 "
        "--seed 5 --limit 2 --shard 1/3"
    )
    command = ("attribute", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "results")
    result = grains(*command, *options.split())
    assert result.exit_code == 0, result.output
    assert "1 pairs, 1 not converged, 18.0 evaluations each" in " ".join(result.output.split())
    assert record.settings == {
        "method": "occlusion",
        "baseline": "pad",
        "objective": "first",
        "n_steps": 7,
        "tolerance": 0.1,
        "top_k": 3,
        "attributed_span": (-8, -1),
        "modalities": ("image",),
        "image_baseline": "blur",
        "max_batch_tokens": 512,
        "seed": 5,
        "output_dir": tmp_path / "results",
        "limit": 2,
        "shard": (1, 3),
        "progress": True,
    }


def test_attribute_leaves_the_defaults_to_the_function(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorded(monkeypatch)
    parameters = signature(attribute).parameters
    assert record.settings == {}
    grains("attribute", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "results")
    for name, value in record.settings.items():
        assert name == "output_dir" or value == parameters[name].default, name


def test_the_choices_of_attribute_are_those_of_the_function() -> None:
    options = get_type_hints(attribute_command)
    for name, choices in {
        "method": settings.METHODS,
        "baseline": settings.BASELINES,
        "objective": settings.OBJECTIVES,
        "image_baseline": settings.IMAGE_BASELINES,
    }.items():
        assert set(get_args(options[name])) == set(choices), name


def test_an_interrupted_attribute_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, interrupted=True)
    output = tmp_path / "results"
    result = grains("attribute", folder / "model", folder / "pairs.jsonl", "-o", output)
    assert result.exit_code == 130
    message = " ".join(result.output.split())
    assert "run the same command again to go on" in message
    assert len(load_attributions(output)) == 1


def test_attribute_reads_pairs_with_images(tmp_path: Path) -> None:
    model, processor = tiny_vlm("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    pairs = [
        PreferencePair(f"{processor.image_token} what color", "red", "blue", images=("red.png",)),
        PreferencePair("what color is the sky", "blue", "green"),
    ]
    # As written by hand: a path beside the file.
    rows = [{**vars(pair), "images": list(pair.images or ())} for pair in pairs]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    result = grains(
        *("attribute", tmp_path / "model", tmp_path / "pairs.json", "-o", tmp_path / "results"),
        *("--html", tmp_path / "page.html"),
    )
    assert result.exit_code == 0, result.output
    with_image, without = load_attributions(tmp_path / "results")
    [grid] = with_image.images
    assert {with_image.modality[place] for place in grid.token_positions} == {"image"}
    assert without.images == ()
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert page.count('<span class="patch') == len(grid.token_positions)


def test_fit_tune_and_evaluate_hand_their_results_on(folder: Path) -> None:
    model, pairs, neutral = folder / "model", folder / "pairs.jsonl", folder / "neutral.txt"
    fitted, tuned = folder / "fitted", folder / "tuned"

    result = grains("fit", model, pairs, "-o", fitted, "--k", 2)
    assert result.exit_code == 0, result.output
    assert SteeringVectors.from_pretrained(fitted).blocks == list(range(N_BLOCKS))

    refined = folder / "refined"
    result = grains("refine", model, pairs, fitted, "-o", refined, "--dev", pairs, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert SteeringVectors.from_pretrained(refined).metadata["refine"]

    result = grains("tune", model, pairs, refined, "-o", tuned, "--neutral", neutral)
    assert result.exit_code == 0, result.output
    assert set(SteeringVectors.from_pretrained(tuned).blocks) <= set(range(N_BLOCKS))

    assert (tuned / "trials.jsonl").is_file()

    both = ("--vectors", f"tuned={tuned}", "--vectors", f"fitted={fitted}")
    result = grains("evaluate", model, pairs, *both, "--neutral", neutral, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["n_pairs"] == len(PAIRS)
    assert set(report["conditions"]) == {"unsteered", "tuned", "fitted"}


def test_gate_keeps_vectors_from_other_prompts(folder: Path, tmp_path: Path) -> None:
    model, pairs, vectors = folder / "model", tmp_path / "pairs.jsonl", tmp_path / "vectors"
    places = [f"{a} {b}" for a in ("the", "what", "home", "note") for b in ("sky", "sea", "rose")]
    inside = [PreferencePair(f"grandma says {place} is", "blue", "green") for place in places]
    save_pairs(inside, pairs)
    outside = tmp_path / "other.txt"
    outside.write_text("\n".join(f"{place} is {c}" for place in places for c in ("blue", "red")))
    made = SteeringVectors({block: torch.ones(HIDDEN_SIZE) for block in (1, 2)})
    made.save_pretrained(vectors)
    asked = ("gate", model, pairs, vectors, "--false-positive-rate", 0.2, "--json")
    result = grains(*asked, "--outside", outside, "--outside", pairs, "-o", tmp_path / "gated")
    assert result.exit_code == 0, result.output
    gated = SteeringVectors.from_pretrained(tmp_path / "gated")
    assert gated.gate is not None
    told = json.loads(result.stdout)
    assert (told["block"], told["kind"], told["when"]) == (1, "cosine", "prompt")
    assert (told["n_inside"], told["n_outside"]) == (12, 36)
    assert told["held_out_outside_open"] == gated.gate.metadata["held_out_outside_open"] <= 0.2
    assert all(torch.equal(gated.directions[block], made.directions[block]) for block in (1, 2))
    late = grains(*asked, "--outside", outside, "--block", 2, "-o", tmp_path / "late")
    assert late.exit_code == 2
    assert "is after block 1" in late.output
    assert not (tmp_path / "late").exists()


def test_wrong_use_exits_with_2(folder: Path) -> None:
    model, pairs = folder / "model", folder / "pairs.jsonl"
    assert grains("fit", model).exit_code == 2
    assert grains("fit", model, pairs, "-o", folder / "x", "--k", 0).exit_code == 2
    assert grains("evaluate", model, pairs, "--strength", 2).exit_code == 2
    for wrong in (
        ("--n-steps", "many"),
        ("--n-steps", 0),
        ("--max-batch-tokens", "-1"),
        ("--attributed-span", "3"),
        ("--shard", "3/2"),
        ("--shard", "0/2"),
        ("--modalities", "text,sound"),
        ("--method", "integrated"),
        ("--top-k", 0),
    ):
        command = ("attribute", model, pairs, "-o", folder / "x", *wrong)
        assert grains(*command).exit_code == 2, wrong
    assert not (folder / "x").exists()


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


def test_a_run_writes_the_config_that_repeats_it(folder: Path, tmp_path: Path) -> None:
    model, pairs = folder / "model", folder / "pairs.jsonl"
    result = grains("fit", model, pairs, "-o", tmp_path / "first", "--k", 3, "--baseline", "mean")
    assert result.exit_code == 0, result.output

    config = tmp_path / "first" / "fit.yaml"
    again = grains("fit", "--config", config, "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    first, second = (
        SteeringVectors.from_pretrained(tmp_path / name) for name in ("first", "again")
    )
    assert second.metadata == first.metadata
    assert second.metadata["k"] == 3
    for block, direction in first.directions.items():
        assert direction.equal(second.directions[block])


def test_a_config_goes_through_values_that_are_parsed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorded(monkeypatch)
    options = ["--attributed-span", "-8:-1", "--modalities", "image", "--shard", "1/3"]
    command = ("attribute", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "results")
    assert grains(*command, *options, "--n-steps", 7).exit_code == 0
    first = record.settings
    config, again = tmp_path / "results" / "attribute.yaml", tmp_path / "again"
    result = grains("attribute", "--config", config, "-o", again)
    assert result.exit_code == 0, result.output
    assert record.settings == first | {"output_dir": again}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kk: 3", "did you mean k?"),
        ("- k", "no `name: value` lines"),
        ("k: [", "cannot be read"),
        ("command: tune", "a run of 'grains tune'"),
        ("k: zero", "'zero' is neither a number from 1"),
    ],
)
def test_a_wrong_config_is_wrong_use(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = grains(
        *("fit", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "out"),
        *("--config", tmp_path / "run.yaml"),
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_quiet_prints_nothing(folder: Path, tmp_path: Path) -> None:
    model, pairs = folder / "model", folder / "pairs.jsonl"
    result = grains("fit", model, pairs, "-o", tmp_path / "fitted", "--k", 2, "--quiet")
    assert result.exit_code == 0
    assert result.output == ""
    assert "directions" in grains("fit", model, pairs, "-o", tmp_path / "fitted", "--k", 2).output


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["grains", "fit", "./no-model", str(folder / "pairs.jsonl"), "-o", "x"]
    monkeypatch.setattr("sys.argv", [*arguments, "--debug"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_help_is_in_the_order_of_use() -> None:
    names = ["demo", "info", "attribute", "fit", "tune", "evaluate", "export", "generate"]
    lines = grains("--help").output.splitlines()
    found = [words[1] for line in lines if len(words := line.split()) > 2 and words[0] == "│"]
    assert [name for name in found if name in names] == names


def test_convert_goes_there_and_back(tmp_path: Path) -> None:
    made = SteeringVectors(
        {1: torch.arange(4.0), 2: torch.ones(4)}, strength=2.0, metadata={"model_type": "llama"}
    )
    made.save_pretrained(tmp_path / "ours")
    there = grains("convert", tmp_path / "ours", tmp_path / "v.gguf")
    assert there.exit_code == 0, there.output
    assert "do not restore each token's norm" in " ".join(there.output.split())
    back = grains("convert", tmp_path / "v.gguf", tmp_path / "back", "--layer-shift", -1)
    assert back.exit_code == 0, back.output
    read = SteeringVectors.from_pretrained(tmp_path / "back")
    assert read.blocks == [0, 1]
    assert read.directions[0].equal(2 * made.directions[1])
    # Block 0 of what a fit gives by default has no place in the format.
    some = grains("convert", tmp_path / "back", tmp_path / "some.gguf", "--blocks", "1")
    assert some.exit_code == 0, some.output


def test_a_range_of_blocks_that_runs_backwards_is_refused(folder: Path, tmp_path: Path) -> None:
    command = ("fit", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "vectors")
    result = grains(*command, "--blocks", "5-2")
    assert result.exit_code == 2
    assert "'5-2'" in result.output


def test_a_mistyped_model_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    result = grains("fit", "modle", folder / "pairs.jsonl", "-o", folder / "never")
    assert isinstance(result.exception, FileNotFoundError)
    assert "no model folder 'modle' here" in str(result.exception)


def test_a_missing_text_file_is_said_before_a_model_is_loaded(folder: Path) -> None:
    pairs, missing = folder / "pairs.jsonl", folder / "nosuch.txt"
    result = grains(
        *("tune", "no-such-model", pairs, folder / "fitted", "-o", folder / "never"),
        *("--neutral", missing),
    )
    assert result.exit_code == 2
    assert "nosuch.txt" in result.output


def one_message(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of the command as a shell runs it, on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["grains", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message
    assert isinstance(stop.value.code, int)
    return stop.value.code, message


def test_what_is_no_model_is_said_with_what_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, bare = tmp_path / "damaged", tmp_path / "bare"
    shutil.copytree(folder / "model", damaged)
    (damaged / "model.safetensors").write_bytes(b"1234")
    bare.mkdir()
    (bare / "notes.txt").write_text("")
    for model, said in {
        damaged: "are damaged or cut short",
        bare: "has a config.json, this one holds notes.txt",
        folder / "pairs.jsonl": "is a file; a model is a folder",
        "./nosuch": "no model folder './nosuch'",
        "a/b/c": "as a hub id it would be owner/name",
    }.items():
        code, message = one_message(
            capsys, "fit", model, folder / "pairs.jsonl", "-o", tmp_path / "out"
        )
        assert (code, said in message) == (1, True), message
    (damaged / "tokenizer.json").unlink()
    _, message = one_message(capsys, "fit", damaged, folder / "pairs.jsonl", "-o", tmp_path / "out")
    assert "has no tokenizer that can be loaded" in message
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_said_before_loading(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("fit", folder / "model", folder / "pairs.jsonl", "-o", tmp_path / "out", "--device")
    assert "'gpu' is no device" in one_message(capsys, *command, "gpu")[1]
    n_devices = torch.cuda.device_count()
    code, message = one_message(capsys, *command, f"cuda:{n_devices}")
    assert code == 1
    assert f"sees {n_devices} GPUs" in message


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "vectors"):
        code, message = one_message(
            capsys, "fit", "no-such-model", folder / "pairs.jsonl", "-o", output
        )
        assert code == 2
        assert "file" in message


def test_failures_of_all_kinds_are_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Exception):
        """As the runtimes' own exceptions are: of no common base."""

    for error, said in (
        (FileNotFoundError(2, "No such file", "a.txt"), "error: a.txt: No such file"),
        (KeyError("no block 3"), "error: no block 3"),
        (Refused("bad graph"), "error: bad graph"),
        (MemoryError(), "error: MemoryError"),
    ):
        monkeypatch.setattr("grains_ext.info.collect", raising(error))
        assert one_message(capsys, "info") == (1, said)
    monkeypatch.setattr("grains_ext.info.collect", raising(AttributeError("a defect")))
    monkeypatch.setattr("sys.argv", ["grains", "info"])
    with pytest.raises(AttributeError):
        cli.main()


def raising(error: BaseException) -> Callable[..., None]:
    def called(*arguments: object, **settings: object) -> None:
        raise error

    return called


def test_a_terminated_run_ends_as_by_ctrl_c(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a scheduler ends it: what the run had begun is taken away, exit code 143."""
    SteeringVectors({0: torch.ones(32)}).save_pretrained(tmp_path / "vectors")
    output = tmp_path / "out" / "exported"
    output.parent.mkdir()

    def terminated(*arguments: object, **settings: object) -> None:
        assert any(output.parent.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("grains_ext.export.model.export_graph", terminated)
    argv = ["grains", "export", folder / "model", tmp_path / "vectors", "-o", output]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert "nothing was written" in " ".join(capsys.readouterr().err.split())
    assert not list(output.parent.iterdir())


def test_a_fit_that_is_stopped_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("fit", folder / "model", folder / "pairs.jsonl", "--k", 2, "-o")
    with monkeypatch.context() as patch:
        patch.setattr("grains_ext.attribution.attribute", raising(KeyboardInterrupt()))
        result = grains(*command, tmp_path / "vectors")
    assert result.exit_code == 130
    assert "run the same command again to go on" in " ".join(result.output.split())

    started = (
        *("attribute", folder / "model", folder / "pairs.jsonl", "--max-batch-tokens", 4096),
        *("--limit", 2, "-o", tmp_path / "again" / ".attributions"),
    )
    assert grains(*started).exit_code == 0
    # A person's own, which cost hours, are left alone.
    shutil.copytree(tmp_path / "again" / ".attributions", tmp_path / "again" / "attributions")
    assert grains(*command, tmp_path / "again").exit_code == 0
    assert not (tmp_path / "again" / ".attributions").exists()
    assert (tmp_path / "again" / "attributions" / "attributions.json").is_file()
    assert grains(*command, tmp_path / "whole").exit_code == 0
    one, other = (SteeringVectors.from_pretrained(tmp_path / n) for n in ("again", "whole"))
    assert one.directions[0].equal(other.directions[0])


def test_bench_times_what_it_is_asked(folder: Path, tmp_path: Path) -> None:
    assert set(bench_command._PARTS) == set(bench.PARTS)
    result = grains(
        *("bench", folder / "model", "--pairs", folder / "pairs.jsonl", "--rounds", 2),
        *("--parts", "op,decode,attribution", "--json", "-o", tmp_path / "new" / "bench.json"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == found
    assert [part["name"] for part in found["parts"]] == ["op", "op", "decode", "attribution"]
    assert found["model"]["steered_blocks"] == list(range(N_BLOCKS))
    for part in found["parts"]:
        by_name = {each["name"]: each for each in part["measured"]}
        assert by_name[part["baseline"]]["ratio"]["median"] == 1
        assert all(each["seconds"]["median"] > 0 for each in part["measured"])
    assert grains("bench", "--parts", "decode,gpu").exit_code == 2
    half = grains("bench", "--dtype", "float16", "--parts", "op", "--rounds", 2, "--json")
    assert json.loads(half.stdout)["model"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no pairs"),
        ([PreferencePair("<image> is", "a", "b", ("a.png",))], "give pairs without images"),
    ],
)
def test_bench_refuses_what_it_could_not_compare(pairs: list[PreferencePair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.bench(tiny_model("llama"), tiny_tokenizer(), pairs=pairs)


def test_bench_says_before_the_work_what_onnxruntime_does_not_run() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match="leave out the part onnx"):
        bench.bench(model, tiny_tokenizer())


def test_an_export_is_of_steering_or_of_attribution(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def export_attribution(model: Any, tokenizer: Any, path: Path, **settings: Any) -> None:
        called.update(settings, path=path)

    monkeypatch.setattr("grains_ext.export.export_attribution", export_attribution)
    model, graph = folder / "model", tmp_path / "attribution.onnx"
    result = grains("export", model, "--attribution", "-o", graph, "--n-steps", 7, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": str(graph), "verified": True}
    assert called == {
        "path": graph,
        "baseline": "bos",
        "method": "gausslegendre",
        "n_steps": 7,
        "verify": True,
    }
    for wrong in (
        ("export", model, "-o", tmp_path / "x"),
        ("export", model, "vectors", "-o", tmp_path / "x", "--n-steps", 7),
        ("export", model, "vectors", "-o", graph, "--attribution"),
        ("export", model, "-o", graph, "--attribution", "--quantize", "int8"),
        ("export", model, "-o", tmp_path, "--attribution"),
    ):
        assert grains(*wrong).exit_code == 2, wrong


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))  # type: ignore[attr-defined]
def test_every_help_has_an_example_and_the_shared_options(name: str) -> None:
    result = grains(name, "--help")
    assert result.exit_code == 0
    assert f"Example: grains {name} " in " ".join(result.output.split())
    assert "--debug" in result.output


def in_a_new_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_loads_nothing_that_takes_time() -> None:
    code = (
        "import sys, contextlib, io\n"
        "sys.argv = ['grains', sys.argv[1], '--help']\n"
        "from grains_ext.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'scipy', 'yaml',"
        " 'jinja2', 'PIL', 'safetensors', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = in_a_new_process("-c", code, "fit")
    assert result.stdout.strip() == "[]", result.stderr


def test_shells_complete_commands_and_choices() -> None:
    def completed(words: str, count: int) -> list[str]:
        result = in_a_new_process(
            "-c",
            "import sys; sys.argv = ['grains']; from grains_ext.cli import app; "
            "app(prog_name='grains')",
            _GRAINS_COMPLETE="complete_bash",
            COMP_WORDS=words,
            COMP_CWORD=str(count),
        )
        return result.stdout.split()

    assert completed("grains ev", 1) == ["evaluate"]
    assert completed("grains fit --sel", 2) == ["--select"]
    assert "stable" in completed("grains fit --select ", 3)
