"""Vision-language models exported with their steering, against the hooked torch model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from grains_ext import cli, export
from grains_ext.export import ImageReader, Prompt
from grains_ext.export.generate import OnnxDecoder, PromptImages, embedding_beside
from grains_ext.export.vision_families import _attention_by_segment, family_of
from grains_ext.export.vision_runtime import grid_positions
from grains_ext.export.vision_trace import export_vision
from grains_ext.vision import encode_image_prompt, load_processor
from tests.exports import ExportedVlm, exported_llama, exported_vlm, random_vectors
from tests.vision_models import tiny_vlm

# An export takes seconds: one family runs always, and with it what families have in common; then
# those whose decoders are fed something of their own.
EXPORTED = [
    "llava",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_vl", "gemma3")),
]
# What these have of their own ends at vision.onnx; for the last two, no more than that is traced.
OTHERS = ["llava_next", "qwen2_5_vl", "idefics3", "internvl", "mistral3"]
VISION_ALONE = ["qwen2_vl", "pixtral"]
N_TOKENS = 6


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = (noise(40, 24), noise(16, 30, 1))


def text_of(processor: Any, n_images: int) -> str:
    return f"the sky {' is '.join([processor.image_token] * n_images)} what color is"


def prompt_of(exported: ExportedVlm, n_images: int) -> Prompt:
    processor = exported.processor
    if n_images == 0:
        return Prompt(processor.tokenizer("the sky is").input_ids)
    text = text_of(processor, n_images)
    return Prompt(*encode_image_prompt(processor, text, PICTURES[:n_images]))


def expected_tokens(exported: ExportedVlm, prompt: Prompt, strength: float) -> list[int]:
    """transformers' own generation with hooks."""
    ids = torch.tensor([prompt.ids])
    with exported.vectors.applied(exported.model, strength=strength):
        output = exported.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **prompt.pixels,
            max_new_tokens=N_TOKENS,
            eos_token_id=None,
            pad_token_id=3,
        )
    return output[0, ids.shape[1] :].tolist()


def decoder_of(folder: Path, strength: float | None = None) -> OnnxDecoder:
    graph = folder / "model.onnx"
    overrides = {} if strength is None else {"grains.strength": np.full(1, strength, np.float32)}
    return OnnxDecoder(
        export.session(graph), embedding=embedding_beside(graph), overrides=overrides
    )


def generated(decoder: OnnxDecoder, folder: Path, prompts: Sequence[Prompt]) -> list[list[int]]:
    batch = ImageReader(folder).batch(prompts)
    tokens = decoder.generate(
        batch.input_ids, batch.attention_mask, images=batch.images, max_new_tokens=N_TOKENS
    )
    return tokens.tolist()


@pytest.mark.parametrize(
    "family", EXPORTED + [pytest.param(family, marks=pytest.mark.slow) for family in OTHERS]
)
def test_the_export_agrees_with_the_hooked_model(family: str) -> None:
    """Prompts with one image, two and none in one batch; 32 cached steps; with and without the
    op library."""
    exported = exported_vlm(family)
    parity = exported.parity
    assert parity.steps == 32
    assert parity.library is not None
    assert parity.max_relative_error < 1e-5
    assert sum(parity.fused_nodes.values()) == len(exported.vectors.directions)


@pytest.mark.parametrize("family", EXPORTED)
def test_generation_is_that_of_the_hooked_model(family: str) -> None:
    """Steered, and at strength 0 the unsteered model's: each prompt alone, and all in a batch."""
    exported = exported_vlm(family)
    prompts = [prompt_of(exported, n_images) for n_images in (1, 2, 0)]
    by_strength = []
    for strength in (None, 0.0):
        used = exported.vectors.strength if strength is None else strength
        expected = [expected_tokens(exported, prompt, used) for prompt in prompts]
        decoder = decoder_of(exported.folder, strength)
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert generated(decoder, exported.folder, [prompt]) == [tokens]
        assert generated(decoder, exported.folder, prompts) == expected
        by_strength.append(expected)
    assert by_strength[0] != by_strength[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", *OTHERS, *VISION_ALONE])
def test_images_of_any_number_and_shape(family: str, tmp_path: Path) -> None:
    if family in VISION_ALONE:
        model, processor = tiny_vlm(family)
        path = tmp_path / "vision.onnx"
        rule = family_of(model)
        assert rule is not None
        export_vision(model, processor, rule, path, opset=20, external_data=False)
    else:
        exported = exported_vlm(family)
        model, processor = exported.model, exported.processor
        path = exported.folder / "vision.onnx"
    session = export.session(path, library=False)
    for sides in ([(40, 24)], [(9, 4)], [(61, 7), (33, 33), (20, 90)]):
        pictures = [noise(width, height) for width, height in sides]
        ids, inputs = encode_image_prompt(processor, text_of(processor, len(sides)), pictures)
        pixels = {value.name: inputs[value.name] for value in session.get_inputs()}
        with torch.no_grad():
            output = model.model.get_image_features(**pixels)
        expected = [torch.cat([features.flatten(0, -2) for features in output.pooler_output])]
        if family == "qwen3_vl":
            levels = [torch.cat(list(level)) for level in output.deepstack_features]
            expected.append(torch.stack(levels))
        found = session.run(None, {name: value.numpy() for name, value in pixels.items()})
        assert ids.count(model.config.image_token_id) == len(found[0])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_features_for_decoder_blocks_go_where_their_image_is() -> None:
    """Qwen3-VL: those of an image move what its own prompt goes on with, and no other."""
    exported = exported_vlm("qwen3_vl")
    reader = ImageReader(exported.folder)
    batch = reader.batch([prompt_of(exported, n_images) for n_images in (1, 0, 2)])
    assert batch.images is not None
    assert batch.images.deepstack is not None
    assert batch.images.deepstack.shape == (2, *batch.images.features.shape)
    decoder = decoder_of(exported.folder)
    ids, mask = batch.input_ids, batch.attention_mask
    whole, _ = decoder.step(ids, mask, images=batch.images)
    none = replace(batch.images, deepstack=np.zeros_like(batch.images.deepstack))
    without, _ = decoder.step(ids, mask, images=none)
    moved = np.abs(whole - without)[:, -1].max(axis=-1)
    assert moved[1] == 0
    assert min(moved[0], moved[2]) > 1e-2


@pytest.mark.parametrize("family", EXPORTED)
def test_prompts_longer_than_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = exported_vlm(family)
    prompts = [prompt_of(exported, 1), prompt_of(exported, 2)]
    decoder = decoder_of(exported.folder)
    expected = generated(decoder, exported.folder, prompts)
    monkeypatch.setattr("grains_ext.export.generate.PREFILL_TOKENS", 5)
    assert generated(decoder, exported.folder, prompts) == expected


@pytest.mark.parametrize("family", EXPORTED)
def test_a_prompt_may_be_fed_in_steps(family: str) -> None:
    exported = exported_vlm(family)
    batch = ImageReader(exported.folder).batch([prompt_of(exported, 1), prompt_of(exported, 2)])
    assert batch.images is not None
    decoder = decoder_of(exported.folder)
    whole, _ = decoder.step(batch.input_ids, batch.attention_mask, images=batch.images)
    ends = np.array([9, 25])
    if family == "gemma3":  # image tokens attend to later ones: an image goes in one step
        inside = batch.images.is_image.any(axis=0)
        ends = np.flatnonzero(~(inside[:-1] & inside[1:]))[::3] + 1
    cache, parts = None, []
    for start, end in itertools.pairwise((0, *ends, batch.input_ids.shape[1])):
        ids, mask = batch.input_ids[:, start:end], batch.attention_mask[:, :end]
        logits, cache = decoder.step(ids, mask, cache, batch.images)
        parts.append(logits)
    real = batch.attention_mask == 1
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[real], whole[real], atol=1e-5)


def test_the_folder_is_complete() -> None:
    exported = exported_vlm("llava")
    folder = exported.folder
    for name in ("vision.onnx", "embedding.onnx", "model.onnx", "genai_config.json", "README.md"):
        assert (folder / name).is_file()
    processor = load_processor(str(folder))
    text = text_of(processor, 1)
    ours, theirs = (
        encode_image_prompt(some, text, PICTURES[:1]) for some in (processor, exported.processor)
    )
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1]["pixel_values"], theirs[1]["pixel_values"])
    record = json.loads((folder / "grains_export.json").read_text())
    assert (record["model_type"], len(record["steered"])) == ("llava", 1)


def test_the_readmes_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = exported_vlm("llava")
    for path in exported.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    Image.fromarray(PICTURES[0]).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    text = (exported.folder / "README.md").read_text()
    [ours, raw, genai] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(ours, "README.md", "exec"), {})
    capsys.readouterr()
    exec(compile(raw, "README.md", "exec"), {})
    tokens = [int(line) for line in capsys.readouterr().out.split()]
    prompt = Prompt(*encode_image_prompt(exported.processor, "<image> your prompt", PICTURES[:1]))
    assert tokens[:N_TOKENS] == expected_tokens(exported, prompt, exported.vectors.strength)
    compile(genai, "README.md", "exec")


def grains(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)])


def test_the_command_reads_pictures(tmp_path: Path) -> None:
    exported = exported_vlm("llava")
    picture = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(picture)
    options = ("--image", picture, "--max-new-tokens", N_TOKENS, "--json")
    text = text_of(exported.processor, 1)
    result = grains(exported.folder, text, *options, "--strength", 0.4)
    assert result.exit_code == 0, result.output
    expected = expected_tokens(exported, prompt_of(exported, 1), 0.4)
    tokens = json.loads(result.stdout)["tokens"]
    assert tokens == expected[: len(tokens)]
    # A prompt that does not say where its picture stands goes through the chat template.
    asked = json.loads(grains(exported.folder, "what color is", *options).stdout)["tokens"]
    messages = [{"role": "user", "content": "what color is"}]
    prompt = Prompt(*encode_image_prompt(exported.processor, messages, PICTURES[:1]))
    expected = expected_tokens(exported, prompt, exported.vectors.strength)
    assert asked == expected[: len(asked)]
    # And one without a picture is text.
    alone = grains(exported.folder, "the sky is", "--max-new-tokens", N_TOKENS, "--json")
    expected = expected_tokens(exported, prompt_of(exported, 0), exported.vectors.strength)
    tokens = json.loads(alone.stdout)["tokens"]
    assert tokens == expected[: len(tokens)]


def test_the_folder_can_be_steered_anew(tmp_path: Path) -> None:
    exported = exported_vlm("llava")
    others = random_vectors([0], strength=-0.8)
    found = export.inject(exported.folder, others, tmp_path / "other")
    assert [entry.graph for entry in found] == ["model.onnx"]
    prompt = prompt_of(exported, 1)
    expected = expected_tokens(replace(exported, vectors=others), prompt, -0.8)
    folder = tmp_path / "other"
    assert generated(decoder_of(folder), folder, [prompt]) == [expected]
    export.remove_steering(folder, folder)
    expected = expected_tokens(exported, prompt, 0.0)
    assert generated(decoder_of(folder), folder, [prompt]) == [expected]


def test_images_and_places_that_do_not_match() -> None:
    exported = exported_vlm("llava")
    generator = export.TextGenerator(exported.folder)
    with pytest.raises(ValueError, match=r"1 image placeholders .* for 2 images"):
        generator.encode("<image> sky", PICTURES)
    with pytest.raises(ValueError, match="has a place for an image, and no image is given"):
        generator.encode("<image> sky")
    with pytest.raises(ValueError, match=r"'/nowhere\.png' does not open"):
        generator.encode("sky", ["/nowhere.png"])
    with pytest.raises(ValueError, match=r"has no vision\.onnx: it holds a model of text"):
        export.TextGenerator(exported_llama().folder).encode("sky", PICTURES)
    with pytest.raises(ValueError, match="2 image tokens, and the images 3 features"):
        PromptImages(np.zeros((3, 32), np.float32), np.array([[True, True, False]]))
    prompt = prompt_of(exported, 1)
    with pytest.raises(ValueError, match="image tokens, and its images have 16 features"):
        ImageReader(exported.folder).batch([Prompt(prompt.ids[:9], prompt.pixels)])
    # In a batch, the next prompt's picture would stand in its place.
    with pytest.raises(ValueError, match="has a place for an image, and no image is given"):
        ImageReader(exported.folder).batch([Prompt(prompt.ids), prompt])


def test_a_decoder_over_embeddings_asks_for_its_embedding() -> None:
    session = export.session(exported_vlm("llava").folder / "model.onnx")
    with pytest.raises(ValueError, match=r"expected input_ids.*session of its embedding\.onnx"):
        OnnxDecoder(session)


def test_what_cannot_be_exported_is_refused_before_the_export(tmp_path: Path) -> None:
    vectors = random_vectors([0])
    model, processor = tiny_vlm("llava")
    for wrong in (None, processor.tokenizer):
        with pytest.raises(ValueError, match=r"type 'llava' read images: pass the processor"):
            export.export_model(model, wrong, vectors, tmp_path / "out")
    model.config.model_type = "vipllava"
    with pytest.raises(export.ExportError, match=r"'vipllava' .* known are llava, .*inject\(\)"):
        export.export_model(model, processor, vectors, tmp_path / "out")
    pytest.importorskip("onnxruntime_genai")
    for family, why in (("gemma3", "attend to later ones"), ("qwen3_vl", "add features of images")):
        model, processor = tiny_vlm(family)
        with pytest.raises(export.ExportError, match=f"'{family}' .*{why}"):
            export.export_model(model, processor, vectors, tmp_path / "out", runtime="genai")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_vlm("llava")

    def written(model: Any, path: Path, **_: Any) -> None:
        (path.parent / "half.onnx").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grains_ext.export.model.export_graph", written)
    with pytest.raises(OSError, match="No space left"):
        export.export_model(model, processor, random_vectors([0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_positions_are_those_of_qwen(family: str) -> None:
    model, processor = tiny_vlm(family)
    for n_images, separator in itertools.product((1, 2, 3), (" is ", " sky over the ")):
        text = "the sky" + separator + separator.join([processor.image_token] * n_images) + " ?"
        pictures = [noise(40, 24), noise(16, 30), noise(32, 32)][:n_images]
        ids, inputs = encode_image_prompt(processor, text, pictures)
        grid = inputs["image_grid_thw"]
        expected, _ = model.model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grid
        )
        found = grid_positions(ids, model.config.image_token_id, grid, 2)
        np.testing.assert_array_equal(found, expected[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_onnxruntime_genai_runs_the_folder(family: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    from grains_ext.export.genai import generate_with_genai

    exported = exported_vlm(family)
    messages = [{"role": "user", "content": "what color is the sky"}]
    prompt = Prompt(*encode_image_prompt(exported.processor, messages, PICTURES[:1]))
    images = ImageReader(exported.folder).batch([prompt]).images
    expected = expected_tokens(exported, prompt, exported.vectors.strength)
    found = generate_with_genai(exported.folder, prompt, N_TOKENS, images)
    assert found
    assert found == expected[: len(found)]


@pytest.mark.slow
def test_half_precision_and_quantised_weights(tmp_path: Path) -> None:
    model, processor = tiny_vlm("smolvlm", n_blocks=1)
    parity = export.export_model(
        model, processor, random_vectors([0]), tmp_path / "half",
        dtype="float16", quantize="int4",
    )  # fmt: skip
    assert parity is not None
    assert parity.max_relative_error < 2e-2
    assert parity.quantization is not None
    assert parity.quantization.strength_zero.relative < 1e-2


def test_an_export_leaves_the_towers_hooks() -> None:
    """accelerate and others put their own forward in the place of a module's."""
    model, _ = tiny_vlm("qwen2_vl")
    hooked, plain = (block.attn for block in model.model.visual.blocks)

    def hook(*args: object, **kwargs: object) -> None:
        pass

    hooked.forward = hook
    with _attention_by_segment(model.model.visual):
        assert hooked.forward is not hook
    assert hooked.forward is hook
    assert "forward" not in vars(plain)
