"""Graphs of other tools, fused and quantised: steered, against the hooked torch model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from grains_ext import export, reference
from grains_ext.export.inject import inject, remove_steering
from grains_ext.steering.vectors import SteeringVectors
from tests import sources
from tests.exports import exported_llama, random_vectors
from tests.sources import HIDDEN, PROMPT, onnx_logits, torch_logits

VECTORS = random_vectors(range(3), size=HIDDEN, strength=0.8)
OTHER = random_vectors([1], size=HIDDEN, strength=-1.1)
OFF = {"grains.strength": np.zeros(1, np.float32)}
LOGITS = {"float32": 1e-5, "float16": 5e-3}
"""Largest accepted error of the logits, relative to their largest value."""


def error(actual: NDArray, expected: NDArray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def steered(source: sources.Source, **options: Any) -> Path:
    # Beside the source's graph: its weights are shared.
    path = source.graph.with_name("steered.onnx")
    inject(source.graph, options.pop("vectors", VECTORS), path, **options)
    return path


def content(path: Path) -> bytes:
    return onnx.load(str(path), load_external_data=False).SerializeToString(deterministic=True)


def genai(family: str, precision: str = "fp32") -> sources.Source:
    pytest.importorskip("onnxruntime_genai", reason="pip install 'grains_ext[genai]'")
    return sources.genai(family, precision)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_graphs_of_genais_builder(family: str, fuse: bool) -> None:
    source = genai(family)
    path = steered(source, fuse=fuse)
    expected = torch_logits(source.model, VECTORS)
    assert error(expected, torch_logits(source.model)) > 0.1
    for library in (True, False):
        assert error(onnx_logits(path, library=library), expected) < LOGITS["float32"]
    counts = export.count_nodes(path)
    assert counts["grains.SkipSteerRmsNorm" if fuse else "grains.Steer"] == 3
    assert counts["Gather"] == export.count_nodes(source.graph)["Gather"]


def test_a_layer_norm_model_of_genais_builder() -> None:
    """Phi's blocks are parallel; its activation is approximate in the builder's own graph."""
    source = genai("phi")
    own = error(onnx_logits(source.graph), torch_logits(source.model))
    for fuse in (True, False):
        path = steered(source, fuse=fuse)
        expected = torch_logits(source.model, VECTORS)
        assert error(onnx_logits(path), expected) < max(2 * own, 1e-5)
        unsteered = onnx_logits(path, feeds=OFF)
        assert error(unsteered, onnx_logits(source.graph)) < LOGITS["float32"]
    inject(source.graph, VECTORS, path)
    assert export.count_nodes(path)["grains.SkipSteerLayerNorm"] == 3


@pytest.mark.parametrize("fuse", [True, False])
def test_half_precision_of_genais_builder(fuse: bool) -> None:
    source = genai("llama", "fp16")
    path = steered(source, fuse=fuse)
    for library in (True, False):
        logits = onnx_logits(path, library=library)
        assert error(logits, torch_logits(source.model, VECTORS)) < LOGITS["float16"]


@pytest.mark.parametrize("fuse", [True, False])
def test_int4_of_genais_builder(fuse: bool) -> None:
    """Quantised weights are not touched: without steering, it is the unsteered int4 model."""
    source = genai("llama", "int4")
    weights = source.graph.with_name("model.onnx.data")
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    path = steered(source, fuse=fuse)
    assert export.count_nodes(path)["com.microsoft.MatMulNBits"] > 3 * 4
    for library in (True, False):
        logits = onnx_logits(path, library=library, feeds=OFF)
        unsteered = onnx_logits(source.graph)
        if fuse:
            assert (logits == unsteered).all()
        # Apart from its addition, onnxruntime's norm is another kernel, with other sums.
        assert error(logits, unsteered) < 2e-6
        assert (logits.argmax(-1) == unsteered.argmax(-1)).all()
        assert error(onnx_logits(path, library=library), unsteered) > 0.1
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before


@pytest.mark.parametrize("fuse", [True, False])
def test_graphs_of_genais_builder_are_restored(fuse: bool) -> None:
    source = genai("llama", "int4")
    path = steered(source, fuse=fuse)
    restored = path.with_name("restored.onnx")
    remove_steering(path, restored)
    assert content(restored) == content(source.graph)


def test_shapes_of_new_tensors_are_known() -> None:
    """Tools that plan memory read them, and nothing infers through onnxruntime's own operators."""
    source = genai("llama")
    graph = onnx.load(str(steered(source, fuse=False)), load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    made = {name for node in graph.node for name in node.output if name.startswith("grains.")}
    assert made
    for name in made:
        assert shapes[name] == ["batch_size", "sequence_length", HIDDEN], name


@pytest.mark.slow
@pytest.mark.skipif(
    not sources.OPTIMUM.is_dir() and os.environ.get("GRAINS_REQUIRE_ORT_VERSIONS") != "1",
    reason="make build/optimum/.installed",
)
@pytest.mark.parametrize(
    ("family", "op_type"),
    [("llama", "grains.SkipSteerRmsNorm"), ("gpt2", "grains.SkipSteerLayerNorm")],
)
def test_graphs_of_optimum(family: str, op_type: str) -> None:
    source = sources.optimum(family)
    expected = torch_logits(source.model, VECTORS)
    for fuse in (True, False):
        path = steered(source, fuse=fuse)
        for library in (True, False):
            assert error(onnx_logits(path, library=library), expected) < LOGITS["float32"]
        assert export.count_nodes(path)[op_type if fuse else "grains.Steer"] == 3
        remove_steering(path, path.with_name("restored.onnx"))
        assert content(path.with_name("restored.onnx")) == content(source.graph)


_ORT_MODEL = """
import json, sys
import onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
torch.set_num_threads(1)
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
options.register_custom_ops_library(sys.argv[2])
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], session_options=options)
ids = torch.tensor(json.loads(sys.argv[3]))
logits = model(ids, attention_mask=torch.ones_like(ids)).logits
continued = model.generate(ids, max_new_tokens=6, do_sample=False)
print(json.dumps([logits.tolist(), continued.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sources.OPTIMUM.is_dir() and os.environ.get("GRAINS_REQUIRE_ORT_VERSIONS") != "1",
    reason="make build/optimum/.installed",
)
@pytest.mark.parametrize("exporter", ["optimum", "ours"])
def test_optimums_model_runs_a_steered_folder(exporter: str, tmp_path: Path) -> None:
    """ORTModelForCausalLM, with the op library in its session options."""
    folder = tmp_path / "model"
    if exporter == "optimum":
        source = sources.optimum("llama")
        model, vectors = source.model, VECTORS
        shutil.copytree(source.graph.parent, folder)
        inject(folder / "model.onnx", vectors, folder / "model.onnx")
    else:
        exported = exported_llama()
        model, vectors = exported.model, exported.vectors
        shutil.copytree(exported.folder, folder)
        (folder / "model.unsteered.onnx").unlink(missing_ok=True)
    prompt = [[1, 9, 30, 77, 5]]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ORT_MODEL, folder, export.ort_library_path(),
         json.dumps(prompt)],
        env={**os.environ, "PYTHONPATH": str(sources.OPTIMUM)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    logits, continued = json.loads(result.stdout)
    with torch.no_grad(), vectors.applied(model):
        ids = torch.tensor(prompt)
        assert error(np.array(logits), model(ids).logits.numpy()) < LOGITS["float32"]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
    assert continued == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fusions"), [("llama", None), ("llama", "cpu"), ("mixtral", None)]
)
def test_graphs_of_transformers_exporter(family: str, fusions: str | None) -> None:
    source = sources.transformers_exporter(family, fusions)
    vectors = random_vectors(range(2), size=HIDDEN, strength=0.8)
    expected = torch_logits(source.model, vectors)
    for fuse in (True, False):
        path = steered(source, vectors=vectors, fuse=fuse)
        for library in (True, False):
            assert error(onnx_logits(path, library=library), expected) < LOGITS["float32"]
        op_type = "grains.SkipSteerRmsNorm" if fuse else "grains.Steer"
        assert export.count_nodes(path)[op_type] == 2
        remove_steering(path, path.with_name("restored.onnx"))
        assert content(path.with_name("restored.onnx")) == content(source.graph)


@pytest.mark.slow
def test_every_graph_of_a_vision_language_model(tmp_path: Path) -> None:
    """Prefill reads merged embeddings of text and image, decoding reads ids: both are steered."""
    source = sources.transformers_exporter_of_llava()
    vectors = random_vectors([0], size=HIDDEN, strength=0.8)
    injected = inject(source.folder, vectors, tmp_path / "steered")
    assert {entry.graph for entry in injected} == {"language_model.onnx", "decode.onnx"}
    stack, head = source.model.model.language_model, source.model.lm_head
    tokens = source.embeddings.shape[1]
    next_ids = torch.tensor([[44, 12]])
    with torch.no_grad(), _hooked(stack, vectors):
        cache = DynamicCache()
        prefill = stack(inputs_embeds=source.embeddings, past_key_values=cache).last_hidden_state
        decoded = head(stack(input_ids=next_ids, past_key_values=cache).last_hidden_state)

    session = sources.open_session(tmp_path / "steered" / "language_model.onnx")
    positions = np.arange(tokens)[None]
    feeds = {"inputs_embeds": source.embeddings.numpy(), "position_ids": positions}
    states, *present = session.run(None, feeds)
    assert error(states, prefill.numpy()) < LOGITS["float32"]
    session = sources.open_session(tmp_path / "steered" / "decode.onnx")
    names = [value.name for value in session.get_inputs() if len(value.shape) == 4]
    positions = np.arange(tokens, tokens + next_ids.shape[1])[None]
    feeds = {"input_ids": next_ids.numpy(), "position_ids": positions}
    logits = session.run(["logits"], feeds | dict(zip(names, present, strict=True)))[0]
    assert error(logits, decoded.numpy()) < LOGITS["float32"]


@contextlib.contextmanager
def _hooked(stack: torch.nn.Module, vectors: SteeringVectors) -> Iterator[None]:
    """The stack alone, without the model around it, with its blocks steered."""

    def steer(block: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            strength = torch.tensor(vectors.strength)
            return reference.steer_add_normalize(output, vectors.directions[block], strength)

        return hook

    hooks = [layer.register_forward_hook(steer(i)) for i, layer in enumerate(stack.layers)]
    yield
    for hook in hooks:
        hook.remove()


# --- in onnxruntime-genai itself ------------------------------------------------------------------


def genai_folder(source: sources.Source, graph: Path, folder: Path, *, library: bool) -> Path:
    """A folder as a user would serve it, the steered graph in the place of the other."""
    shutil.copytree(source.graph.parent, folder)
    shutil.copy(graph, folder / "model.onnx")
    if library:
        # genai loads a library from inside the model's folder only.
        shutil.copy(export.ort_library_path(), folder)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        name = Path(export.ort_library_path()).name
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = name
        path.write_text(json.dumps(config))
    return folder


def generated(
    model: Any, *, adapters: Any = None, active: str = "", inputs: dict[str, NDArray] | None = None
) -> tuple[NDArray, list[int]]:
    """The first row's prompt logits [tokens, vocabulary], and its greedy continuation."""
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=PROMPT.shape[1] + 6, do_sample=False)
    generator = og.Generator(model, parameters)
    for name, value in (inputs or {}).items():
        generator.set_model_input(name, value)
    if active:
        generator.set_active_adapter(adapters, active)
    generator.append_tokens(PROMPT[:1].astype(np.int32))
    logits = generator.get_output("logits")[0].astype(np.float32)
    while not generator.is_done():
        generator.generate_next_token()
    return logits, generator.get_sequence(0)[PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("library", [True, False])
def test_adapters_switch_steering_in_genai(library: bool, tmp_path: Path) -> None:
    source = genai("llama")
    og = pytest.importorskip("onnxruntime_genai")
    path = steered(source)
    folder = genai_folder(source, path, tmp_path / "served", library=library)
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name, vectors, strength in (("off", VECTORS, 0.0), ("other", OTHER, -1.1)):
        file = tmp_path / f"{name}.onnx_adapter"
        export.write_adapter(vectors, file, model_path=path, strength=strength)
        adapters.load(str(file), name)
    tokens = PROMPT.shape[1]
    for active, vectors in (("", VECTORS), ("off", None), ("other", OTHER), ("", VECTORS)):
        logits, continuation = generated(model, adapters=adapters, active=active)
        expected = torch_logits(source.model, vectors)[0, :tokens]
        assert error(logits, expected) < LOGITS["float32"]
        assert continuation[0] == expected[-1].argmax()


def test_a_bank_is_chosen_from_in_genai(tmp_path: Path) -> None:
    """genai feeds no input that has a default: the index is a required one."""
    source = genai("llama")
    og = pytest.importorskip("onnxruntime_genai")
    path = steered(source, vectors=[VECTORS, OTHER], default_index=None)
    folder = genai_folder(source, path, tmp_path / "served", library=True)
    model = og.Model(str(folder))
    for member, vectors in ((0, VECTORS), (1, OTHER), (-1, None)):
        index = np.array([member], np.int32)
        logits, _ = generated(model, inputs={"grains.index": index})
        expected = torch_logits(source.model, vectors)[0, : PROMPT.shape[1]]
        assert error(logits, expected) < LOGITS["float32"]


def test_adapters_and_banks_in_onnxruntime_on_a_real_graph(tmp_path: Path) -> None:
    source = genai("llama")
    path = steered(source, vectors=[VECTORS, OTHER])
    index = np.array([1, -1], np.int32)
    logits = onnx_logits(path, feeds={"grains.index": index})
    assert error(logits[0], torch_logits(source.model, OTHER)[0]) < LOGITS["float32"]
    assert error(logits[1], torch_logits(source.model)[1]) < LOGITS["float32"]
    export.write_adapter([OTHER, OTHER], tmp_path / "x.onnx_adapter", model_path=path)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(tmp_path / "x.onnx_adapter"))
    options.add_active_adapter(adapter)
    logits = onnx_logits(path, run_options=options)
    assert error(logits, torch_logits(source.model, OTHER)) < LOGITS["float32"]


def test_gemma2_in_genai(tmp_path: Path) -> None:
    """Its windowed cache is genai's own affair: run there, not by hand."""
    source = genai("gemma2")
    og = pytest.importorskip("onnxruntime_genai")
    folder = genai_folder(source, steered(source), tmp_path / "served", library=True)
    logits, _ = generated(og.Model(str(folder)))
    expected = torch_logits(source.model, VECTORS)[0, : PROMPT.shape[1]]
    assert error(logits, expected) < LOGITS["float32"]
