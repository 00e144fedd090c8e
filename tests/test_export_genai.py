"""Exported folders in onnxruntime-genai: its tokens are those of the hooked model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grains_ext import export
from grains_ext.export.errors import GraphError
from grains_ext.export.genai import (
    generate_with_genai,
    tokenizer_difference,
    write_genai_config,
)
from grains_ext.export.vision_runtime import Prompt
from tests.exports import exported_llama, random_vectors, share_trace
from tests.models import VOCAB_SIZE, tiny_model, tiny_tokenizer

PROMPT = [1, 20, 40, 60, 77]

genai = pytest.importorskip("onnxruntime_genai", reason="pip install 'grains_ext[genai]'")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, of the kind that most models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template="{{ 1 }}"
    )


def expected_tokens(model: Any, vectors: Any, n_tokens: int) -> list[int]:
    with vectors.applied(model):
        output = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=n_tokens, pad_token_id=3
        )
    return output[0, len(PROMPT) :].tolist()


def test_the_tokens_are_those_of_the_hooked_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = exported_llama()
    # Not the working directory: the op library is found from the folder.
    monkeypatch.chdir(tmp_path)
    expected = expected_tokens(exported.model, exported.vectors, 24)
    assert expected != expected_tokens(exported.model, exported.vectors.with_strength(0.0), 24)
    assert generate_with_genai(exported.folder, Prompt(PROMPT), 24) == expected


def test_the_op_library_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama().folder, folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    options = config["model"]["decoder"]["session_options"]
    assert (folder / options["custom_ops_library"]).is_file()
    options["enable_profiling"] = str(tmp_path / "profile")
    path.write_text(json.dumps(config))
    generate_with_genai(folder, Prompt(PROMPT), 2)
    [profile] = tmp_path.glob("profile*.json")
    ops = {event.get("args", {}).get("op_name") for event in json.loads(profile.read_text())}
    assert "SkipSteerRmsNorm" in ops


def test_an_adapter_switches_the_steering(tmp_path: Path) -> None:
    exported = exported_llama()
    other = random_vectors(strength=0.4)
    export.write_adapter(
        other, tmp_path / "x.onnx_adapter", model_path=exported.folder / "model.onnx"
    )
    model = genai.Model(str(exported.folder))
    adapters = genai.Adapters(model)
    adapters.load(str(tmp_path / "x.onnx_adapter"), "x")
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 12)
    generator = genai.Generator(model, parameters)
    generator.set_active_adapter(adapters, "x")
    generator.append_tokens([PROMPT])
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]
    assert tokens == expected_tokens(exported.model, other, 12)


def test_the_configuration_says_what_the_model_says() -> None:
    folder = exported_llama().folder
    config = json.loads((folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 3)
    assert (model["vocab_size"], model["context_length"]) == (VOCAB_SIZE, 128)
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 8)
    assert config["search"]["past_present_share_buffer"] is False


def test_genais_tokenizer_is_compared(tmp_path: Path) -> None:
    exported, tokenizer = exported_llama(), byte_tokenizer()
    folder = tmp_path / "copy"
    shutil.copytree(exported.folder, folder)
    tokenizer.save_pretrained(folder)
    # genai leaves out the first token, for which the README has a line.
    assert tokenizer_difference(folder, tokenizer) is None
    difference = tokenizer_difference(folder, tiny_tokenizer())
    assert difference is not None
    assert "in transformers" in difference


def test_caches_of_unlike_shape_are_refused(tmp_path: Path) -> None:
    import onnx

    exported = exported_llama()
    graph = onnx.load(str(exported.folder / "model.onnx"), load_external_data=False)
    past = next(v for v in graph.graph.input if v.name == "past_key_values.2.key")
    past.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(graph, str(tmp_path / "model.onnx"))
    with pytest.raises(GraphError, match="one shape for all blocks"):
        write_genai_config(exported.model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_an_export_for_genai_runs_it(family: str, tmp_path: Path) -> None:
    n_blocks = 2 if family == "gemma2" else 1  # Gemma's are of two kinds
    model = tiny_model(family, num_hidden_layers=n_blocks)
    vectors = random_vectors(range(n_blocks), strength=0.7)
    with pytest.warns(UserWarning, match="token ids"):
        export.export_model(model, tiny_tokenizer(), vectors, tmp_path / "out", runtime="genai")
    expected = expected_tokens(model, vectors, 16)
    assert generate_with_genai(tmp_path / "out", Prompt(PROMPT), 16) == expected


def test_a_folder_that_genai_runs_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grains_ext.export.model.generate_with_genai", lambda *_: [1, 2, 3])
    share_trace(monkeypatch)
    model = tiny_model("llama")
    with pytest.raises(export.ExportError, match=r"onnxruntime-genai continues .* \[1, 2, 3\]"):
        export.export_model(
            model, None, random_vectors([0]), tmp_path / "out", runtime="genai", verify=False
        )
    assert list(tmp_path.iterdir()) == []
