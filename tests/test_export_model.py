"""Torch models exported with their steering, against the hooked torch model."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
)
from typer.testing import CliRunner

from grains_ext import cli, export
from grains_ext.export.folder import replacing_folder
from grains_ext.export.generate import OnnxDecoder
from grains_ext.steering.vectors import SteeringVectors
from tests.exports import exported_llama, random_vectors, share_trace
from tests.models import tiny_model, tiny_tokenizer


def quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def test_the_export_agrees_with_the_hooked_model() -> None:
    parity = exported_llama().parity
    assert parity.steps == 32
    assert parity.library is not None
    assert parity.max_absolute_error < 1e-4
    assert parity.max_relative_error < 1e-4
    assert parity.fused_nodes == {"SkipSteerRmsNorm": 4}


def test_verify_sees_a_wrong_strength() -> None:
    exported = exported_llama()
    parity = export.verify(
        exported.model, exported.vectors, exported.folder / "model.onnx", strength=1.6, steps=2
    )
    assert parity.stock.prefill > 1e-3
    assert parity.stock.decode > 1e-3


def test_the_unsteered_graph_is_kept_and_shares_its_weights() -> None:
    exported = exported_llama()
    unsteered = exported.folder / "model_unsteered.onnx"
    parity = export.verify(exported.model, exported.vectors, unsteered, strength=0.0, steps=4)
    assert parity.max_absolute_error < 1e-4
    assert parity.fused_nodes == {}
    data = exported.folder / "model.onnx.data"
    assert data.stat().st_size > 4 * 128 * 32
    assert unsteered.stat().st_size + data.stat().st_size < 2 * data.stat().st_size + 10**6


def test_the_folder_is_complete() -> None:
    exported = exported_llama()
    folder = exported.folder
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the sky is blue").input_ids == exported.tokenizer("the sky is blue").input_ids
    vectors = SteeringVectors.from_pretrained(folder)
    assert vectors.strength == exported.vectors.strength
    assert torch.equal(vectors.directions[3], exported.vectors.directions[3])
    assert (folder / "libgrains_ort.so").read_bytes() == Path(
        export.ort_library_path()
    ).read_bytes()
    assert (folder / "genai_config.json").is_file()
    record = json.loads((folder / "grains_export.json").read_text())
    assert (record["dtype"], record["quantize"]) == ("float32", None)
    assert record["model_type"] == "llama"
    assert record["versions"].keys() == {
        "grains_ext", "torch", "transformers", "onnx", "onnxscript",
    }  # fmt: skip
    assert [entry["block"] for entry in record["steered"]] == [0, 1, 2, 3]
    assert record["parity"]["library"]["decode"] < 1e-4
    # Nothing is left of the work, and the folder is not private to its maker.
    assert [path.name for path in folder.parent.iterdir()] == ["steered"]
    assert all(path.stat().st_mode & stat.S_IRGRP for path in (folder, *folder.iterdir()))


def test_the_readmes_lines_run() -> None:
    exported = exported_llama()
    text = (exported.folder / "README.md").read_text()
    assert "blocks\n0, 1, 2, 3, strength 1.5" in text
    [ort, genai] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    # In a process of its own: a library that is loaded already would be found under any path.
    result = subprocess.run(
        [sys.executable, "-c", ort], cwd=exported.folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    tokens = [int(line) for line in result.stdout.split()]
    with exported.vectors.applied(exported.model):
        expected = exported.model.generate(
            input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=20, eos_token_id=None
        )
    assert tokens == expected[0, 3:].tolist()
    compile(genai, "README.md", "exec")
    assert "tokens = [1, *tokens]" in genai


def test_the_graph_names_its_inputs_as_other_runtimes_expect() -> None:
    graph = onnx.load(str(exported_llama().folder / "model.onnx"), load_external_data=False).graph
    kinds = [f"{i}.{kind}" for i in range(4) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_key_values.{kind}" for kind in kinds]
    assert [value.name for value in graph.input][: len(names)] == names
    assert [value.name for value in graph.output] == ["logits", *(f"present.{k}" for k in kinds)]
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert dims["input_ids"] == ["batch_size", "sequence_length"]
    assert dims["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]


@pytest.mark.parametrize("library", [False, True])
def test_generation_equals_the_hooked_model(library: bool) -> None:
    exported = exported_llama()
    session = export.session(
        exported.folder / "model.onnx", library=library, session_options=quiet()
    )
    exported.tokenizer.padding_side = "left"
    texts = ["the sky is", "grandma says the rose is", "q"]
    batch = exported.tokenizer(texts, return_tensors="pt", padding=True)
    with exported.vectors.applied(exported.model):
        expected = exported.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=None,
            pad_token_id=3,
        )
    width = batch.input_ids.shape[1]
    tokens = OnnxDecoder(session).generate(
        batch.input_ids.numpy(), batch.attention_mask.numpy(), max_new_tokens=12
    )
    np.testing.assert_array_equal(tokens, expected[:, width:].numpy())


def test_overrides_switch_the_steering_off() -> None:
    exported = exported_llama()
    session = export.session(exported.folder / "model.onnx", session_options=quiet())
    ids = np.array([[1, 20, 40, 60]])
    steered = OnnxDecoder(session)
    unsteered = OnnxDecoder(session, overrides={"grains.strength": np.zeros(1, np.float32)})
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(ids)).logits.numpy()
    mask = np.ones_like(ids)
    np.testing.assert_allclose(unsteered.step(ids, mask)[0], expected, atol=1e-4)
    assert np.abs(steered.step(ids, mask)[0] - expected).max() > 0.1


def test_generation_stops_where_all_rows_have_ended() -> None:
    session = export.session(exported_llama().folder / "model.onnx", session_options=quiet())
    decoder = OnnxDecoder(session)
    ids = np.array([[1, 20, 40], [1, 30, 50]])
    free = decoder.generate(ids, max_new_tokens=8)
    end = int(free[0, 0])
    rows = decoder.generate(ids, max_new_tokens=8, eos_token_id=end)
    assert (rows[0] == end).all()
    until = list(free[1]).index(end) + 1 if end in free[1] else 8
    assert rows.shape == (2, until)
    np.testing.assert_array_equal(rows[1], free[1, :until])
    assert decoder.generate(ids, max_new_tokens=0).shape == (2, 0)


def test_a_graph_with_other_inputs_is_refused_by_the_decoder(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [output])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=opsets)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with pytest.raises(ValueError, match="expected input_ids"):
        OnnxDecoder(session)


def test_models_without_a_plain_cache_are_refused_by_family(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(export.ExportError, match=r"type 'mamba'.*inject\(\)"):
        export.export_graph(MambaForCausalLM(config), tmp_path / "model.onnx")


@pytest.fixture
def shared_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    share_trace(monkeypatch)


def exported_to(folder: Path, model: Any = None, **options: Any) -> Path:
    model = tiny_model("llama") if model is None else model
    export.export_model(
        model, tiny_tokenizer(), random_vectors(), folder, verify=False, external_data=True,
        **options,
    )  # fmt: skip
    return folder


@pytest.mark.usefixtures("shared_trace")
def test_what_a_checkpoint_says_of_generation_comes_along(tmp_path: Path) -> None:
    """A temperature beside greedy decoding too, which transformers' save_pretrained refuses."""
    model = tiny_model("llama")
    model.generation_config.temperature = 0.9
    folder = exported_to(tmp_path / "out", model)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9
    assert saved["eos_token_id"] == 2


@pytest.mark.usefixtures("shared_trace")
def test_wrapped_models_are_exported_bare(tmp_path: Path) -> None:
    folder = exported_to(tmp_path / "out", torch.compile(tiny_model("llama")))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_adapters_that_lengthen_prompts_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(export.ExportError, match="puts tokens in front of every prompt"):
        exported_to(tmp_path / "out", model)


def test_a_model_that_is_steered_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with (
        random_vectors([2]).applied(model),
        pytest.raises(export.ExportError, match=r"block 2 .* being steered.*remove\(\)"),
    ):
        exported_to(tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_does_not_compute_is_refused_before_the_export(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("bfloat16 is computed on CUDA")
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*dtype='float32'"):
        export.export_model(model, tiny_tokenizer(), random_vectors(), tmp_path / "out")


def test_the_model_that_is_exported_is_not_replaced(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "models" / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "llama")
    for folder in (tmp_path / "models" / "llama", tmp_path / "models"):
        with pytest.raises(ValueError, match="holds the model that is exported"):
            exported_to(folder, model, overwrite=True)
    assert (tmp_path / "models" / "llama" / "config.json").is_file()


@pytest.mark.usefixtures("shared_trace")
def test_the_longest_name_that_a_folder_may_have(tmp_path: Path) -> None:
    assert (exported_to(tmp_path / ("x" * 255)) / "model.onnx").is_file()


def test_what_another_process_exported_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def both() -> None:
        with replacing_folder(folder, overwrite=False) as work:
            (work / "model.onnx").write_text("mine")
            with replacing_folder(folder, overwrite=False) as other:
                (other / "model.onnx").write_text("theirs")

    with pytest.raises(FileExistsError, match="overwrite=True"):
        both()
    assert (folder / "model.onnx").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_genai_must_be_there_to_export_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grains_ext.export.genai.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"grains_ext\[genai\]"):
        export.export_model(
            tiny_model("llama"), None, random_vectors(), tmp_path / "out",
            runtime="genai", verify=False,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused_before_the_export(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    vectors = random_vectors()
    with pytest.raises(ValueError, match="hidden size"):
        export.export_model(model, tokenizer, random_vectors(size=5), tmp_path / "out")
    with pytest.raises(ValueError, match="block"):
        export.export_model(model, tokenizer, random_vectors([9]), tmp_path / "out")
    with pytest.raises(ValueError, match="opset is 12"):
        export.export_model(model, tokenizer, vectors, tmp_path / "out", opset=12)
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        export.export_model(model, tokenizer, vectors, tmp_path / "out", dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype is int8; expected one of float32"):
        export.export_model(model, tokenizer, vectors, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        export.export_model(model, tokenizer, vectors, tmp_path / "out", quantize="int3")
    with pytest.raises(ValueError, match="runtime is 'tensorrt'"):
        export.export_model(model, tokenizer, vectors, tmp_path / "out", runtime="tensorrt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.export_model(model, tokenizer, vectors, tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        export.export_model(model, tokenizer, vectors, tmp_path / "notes.txt")


def test_a_folder_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    replacing = replacing_folder(folder, overwrite=True)
    with pytest.raises(FileNotFoundError), replacing as work:
        Path(work, "missing", "model.onnx").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "notes.txt").read_text() == "mine"
    with replacing_folder(folder, overwrite=True) as work:
        (work / "model.onnx").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]

    (tmp_path / "link").symlink_to(folder)
    with replacing_folder(tmp_path / "link", overwrite=True) as work:
        (work / "model.onnx").write_text("linked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert (tmp_path / "link").is_symlink()
    assert (folder / "model.onnx").read_text() == "linked"


@pytest.mark.usefixtures("shared_trace")
def test_the_command_exports(tmp_path: Path) -> None:
    model, tokenizer, vectors = tiny_model("llama"), tiny_tokenizer(), random_vectors()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    vectors.save_pretrained(tmp_path / "vectors")
    arguments = ["export", tmp_path / "model", tmp_path / "vectors", "-o", tmp_path / "out"]
    arguments += [
        "--strength",
        0.6,
        "--quantize",
        "int4",
        "--triton",
        tmp_path / "models",
        "--json",
    ]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["parity"]["library"]["relative"] < 1e-4
    assert facts["parity"]["quantization"]["strength_zero"]["relative"] < 1e-5
    assert Path(facts["triton"], "config.pbtxt").is_file()
    record = json.loads((tmp_path / "out" / "grains_export.json").read_text())
    assert (record["quantize"], record["strength"]) == ("int4", 0.6)


# Families that differ in structure, each with one of the ways to export: exports are slow.
FAMILY_EXPORTS: dict[str, dict[str, Any]] = {
    "qwen2": {"dtype": torch.float16},
    "qwen3": {},
    "mistral": {"fuse": False},
    "gemma2": {},
    "gemma3": {},
    "phi": {"opset": 18},
    "phi3": {"opset": 23},
    "gpt2": {"baked": True},
    "gpt_neox": {},
    "opt": {},
    "olmo": {},
    "olmo2": {"opset": 23},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_EXPORTS)
def test_families_export(family: str, tmp_path: Path) -> None:
    # A window shorter than the prompts of `verify`, so that the mask of the exported graph counts.
    sliding = {"sliding_window": 6} if family in {"mistral", "gemma2"} else {}
    # Seconds for each block: two only where they differ.
    n_blocks = 2 if family == "gemma2" else 1
    model = tiny_model(family, num_hidden_layers=n_blocks, **sliding)
    options = FAMILY_EXPORTS[family]
    parity = export.export_model(
        model, tiny_tokenizer(), random_vectors(range(n_blocks)), tmp_path / "out", **options
    )
    assert parity is not None
    assert parity.max_relative_error < (1e-4 if "dtype" not in options else 2e-2)
    assert sum(parity.fused_nodes.values()) == n_blocks
