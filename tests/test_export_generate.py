"""Text from an exported folder, against transformers' own generation with hooks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from grains_ext import bench, cli, export
from grains_ext.export.generate import Sampler
from grains_ext.export.text import TextGenerator, _TextStream, load_tokenizer
from grains_ext.export.tokenizing import FileTokenizer, TokenizerSettings
from tests.exports import Exported, exported_llama, exported_vlm
from tests.models import tiny_tokenizer

PROMPT = "the sky is"
MESSAGES = [{"role": "user", "content": "what color is the sea"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}note {% endif %}"
)


def expected_ids(
    exported: Exported, ids: list[int], *, strength: float, n_tokens: int = 12
) -> list[int]:
    with exported.vectors.applied(exported.model, strength=strength):
        output = exported.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=n_tokens, pad_token_id=3
        )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("strength", [None, 0.0, 0.4])
def test_tokens_and_text_are_those_of_the_hooked_model(strength: float | None) -> None:
    exported = exported_llama()
    generator = TextGenerator(exported.folder, strength=strength)
    pieces = list(generator.stream(PROMPT, max_new_tokens=12))
    ids = exported.tokenizer(PROMPT).input_ids
    used = exported.vectors.strength if strength is None else strength
    expected = expected_ids(exported, ids, strength=used)
    assert [token for token, _ in pieces] == expected
    whole = exported.tokenizer.decode([*ids, *expected], skip_special_tokens=True)
    assert PROMPT + "".join(text for _, text in pieces) == whole


def test_prompts_longer_than_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = exported_llama()
    decoder = export.OnnxDecoder(export.session(exported.folder / "model.onnx"))
    prompts = np.random.default_rng(0).integers(4, 128, (2, 11))
    mask = np.ones_like(prompts)
    mask[1, :6] = 0
    expected = decoder.generate(prompts, mask, max_new_tokens=6)
    monkeypatch.setattr("grains_ext.export.generate.PREFILL_TOKENS", 4)
    np.testing.assert_array_equal(decoder.generate(prompts, mask, max_new_tokens=6), expected)


def test_generation_ends_with_the_context() -> None:
    generator = TextGenerator(exported_llama().folder)
    long = "sky" + " sky" * 120
    n_prompt = len(generator.encode(long))
    assert 120 < n_prompt < 128
    pieces = list(generator.stream(long, max_new_tokens=500))
    assert len(pieces) == 128 - n_prompt
    with pytest.raises(ValueError, match="context ends at 128"):
        generator.encode(2 * long)


def test_sampling_is_reproducible_and_cut_at_top_p() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    draws = Sampler(temperature=1.0, seed=1)(logits)
    np.testing.assert_allclose(
        np.bincount(draws, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03
    )
    np.testing.assert_array_equal(Sampler(temperature=1.0, seed=1)(logits), draws)
    nucleus = np.bincount(Sampler(temperature=1.0, top_p=0.6)(logits), minlength=4) / 4000
    np.testing.assert_allclose(nucleus, [0.625, 0.375, 0, 0], atol=0.03)
    assert (Sampler(temperature=1.0, top_p=1e-9)(logits) == 0).all()
    assert (Sampler(temperature=1e-3)(logits) == 0).all()
    assert (Sampler()(logits.astype(np.float16)) == 0).all()
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="expected a number"):
            Sampler(**wrong)


def test_the_tokenizer_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.eos_token_id == tokenizer.eos_token_id
    text = ours.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, continue_final_message=False
    )
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == expected
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="fast tokenizer"):
        load_tokenizer(tmp_path)


def test_characters_of_several_tokens_are_not_cut() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = FileTokenizer(backend.to_str(), TokenizerSettings())
    text = "Größe: 12 € ☃ 漢字 🙂 ok"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for n_prompt in (0, 3, 8):  # 3: between the two bytes of ö
        stream = _TextStream(tokenizer, ids[:n_prompt])
        pieces = [stream.add(i, last=False) for i in ids[n_prompt:]]
        assert "\ufffd" not in "".join(pieces)
        if n_prompt != 3:
            assert tokenizer.decode(ids[:n_prompt]) + "".join(pieces) == text
        assert pieces[-3:] == [" ", "o", "k"]
    stream = _TextStream(tokenizer, [])
    assert stream.add(ids[2], last=True) == "\ufffd"


def test_wrong_folders_and_strengths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        TextGenerator(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TextGenerator(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.onnx.data"):
        (tmp_path / name).symlink_to(exported_llama().folder / name)
    with pytest.raises(FileNotFoundError, match="no model file"):
        TextGenerator(tmp_path)


def test_genais_configuration_serves_where_there_is_no_other(tmp_path: Path) -> None:
    exported = exported_llama()
    kept = ("model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json")
    for name in (*kept, "genai_config.json"):
        (tmp_path / name).write_bytes((exported.folder / name).read_bytes())
    generator = TextGenerator(tmp_path)
    assert generator.ends(2)
    assert not generator.ends(1)
    with pytest.raises(ValueError, match="context ends at 128"):
        generator.encode("sky " * 200)


def test_a_baked_graph_takes_no_strength(tmp_path: Path) -> None:
    exported = exported_llama()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((exported.folder / name).read_bytes())
    unsteered = exported.folder / "model_unsteered.onnx"
    export.inject(unsteered, exported.vectors, tmp_path / "model.onnx", baked=True)
    assert list(TextGenerator(tmp_path).stream(PROMPT, max_new_tokens=2))
    with pytest.raises(ValueError, match="takes no strength"):
        TextGenerator(tmp_path, strength=1.0)


def grains(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)])


def test_the_command_streams_text() -> None:
    exported = exported_llama()
    result = grains(exported.folder, PROMPT, "--strength", 0.4, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    ids = exported.tokenizer(PROMPT).input_ids
    expected = expected_ids(exported, ids, strength=0.4, n_tokens=8)
    whole = exported.tokenizer.decode([*ids, *expected], skip_special_tokens=True)
    assert result.stdout == whole.removeprefix(PROMPT) + "\n"
    drawn = (exported.folder, PROMPT, "--temperature", 2, "--seed", 3, "--json")
    facts = json.loads(grains(*drawn, "--max-new-tokens", 8).stdout)
    assert facts["prompt"] == PROMPT
    assert facts["strength"] is None
    assert 1 <= len(facts["tokens"]) <= 8
    assert facts["finish"] in {"length", "stop"}
    assert facts == json.loads(grains(*drawn, "--max-new-tokens", 8).stdout) | {
        "seconds": facts["seconds"]
    }
    assert grains(exported.folder, PROMPT, "--top-p", 2).exit_code == 2


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    exported = exported_llama()
    for path in exported.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    question = MESSAGES[0]["content"]
    result = grains(tmp_path, question, "--chat", "--json", "--max-new-tokens", 4)
    text = f"<bos>user: {question}\nnote "
    ids = exported.tokenizer(text, add_special_tokens=False).input_ids
    expected = expected_ids(exported, ids, strength=exported.vectors.strength, n_tokens=4)
    assert json.loads(result.stdout)["tokens"] == expected
    result = grains(exported.folder, question, "--chat")
    assert result.exit_code == 1 or "chat template" in str(result.exception)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys\n"
        "from grains_ext import cli\n"
        f"sys.argv = ['grains', 'generate', {str(exported_llama().folder)!r}, 'the sky', "
        "'--max-new-tokens', '3', '--strength', '0.5']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_bench_times_the_steered_graph_beside_the_unsteered(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = exported_llama() if family == "llama" else exported_vlm(family)
    processor = made.tokenizer if family == "llama" else made.processor

    def export_model(model: Any, given: Any, vectors: Any, folder: Path, **_: Any) -> None:
        assert given is processor
        shutil.copytree(made.folder, folder)
        if family == "llava":  # the test's own has one graph
            shutil.copy(folder / "model.onnx", folder / "model_unsteered.onnx")

    monkeypatch.setattr("grains_ext.export.export_model", export_model)
    result = bench.bench(
        made.model, processor, vectors=made.vectors, parts=["onnx"], budget=bench.Budget(2)
    )
    [part] = result["parts"]
    assert {each["name"] for each in part["measured"]} == {
        "unsteered",
        "unsteered again (noise)",
        "steered, op library",
        "steered, stock onnxruntime",
    }
