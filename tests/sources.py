"""Decoders as other tools export them, and what they compute over prefill and cached steps."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from grains_ext import export
from grains_ext.steering.vectors import SteeringVectors
from tests.models import tiny_model, tiny_tokenizer

HIDDEN, HEAD = 64, 16
OPTIMUM = Path(__file__).resolve().parent.parent / "build" / "optimum"
PROMPT = np.array([[1, 9, 30, 77, 5, 44], [4, 8, 90, 100, 3, 61]])
STEPS = np.array([[7, 12, 3, 88], [55, 2, 71, 19]])

# onnxruntime's attention kernels want a head size that 16 divides. The builder takes every linear
# layer with as many outputs as the vocabulary for the language-model head: none may have 128.
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3}
_EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": HEAD},
    "gemma2": {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 8},
    "phi": {"partial_rotary_factor": 1.0},
    "phi3": {"num_key_value_heads": 4, "original_max_position_embeddings": 128},
}


@dataclass(frozen=True)
class Source:
    """A model and the graph that another tool made of it, in a folder of its own."""

    model: PreTrainedModel
    graph: Path


@dataclass(frozen=True)
class VisionSource:
    """A vision-language model, its folder of graphs, and the merged embeddings of one prompt."""

    model: LlavaForConditionalGeneration
    folder: Path
    embeddings: Tensor


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="grains-test-source-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _model(family: str, **overrides: Any) -> PreTrainedModel:
    if family == "mixtral":
        return _mixtral(**overrides)
    return tiny_model(family, **(_SIZES | _EXTRA.get(family, {}) | overrides))


def _mixtral(**overrides: Any) -> PreTrainedModel:
    """Mixture of experts: no other exporter here carries it."""
    sizes = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes |= overrides
    config = MixtralConfig(vocab_size=128, max_position_embeddings=128, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    return model.eval()


@functools.cache
def genai(family: str, precision: str) -> Source:
    """By onnxruntime-genai's model builder: fp32, fp16 or int4.

    int4 weights are multiplied in float32: by default the activations are rounded to int8, and the
    last bit of a sum can decide where to.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    # The builder's half-precision graph declares wrong shapes where heads share keys and values.
    overrides = {"num_key_value_heads": 4} if precision == "fp16" else {}
    folder, model = _folder(), _model(family, **overrides)
    source, output, cache = (str(folder / name) for name in ("source", "model", "cache"))
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    options = ["accuracy_level=1"] if precision == "int4" else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arguments = (None, source, output, precision, "cpu", cache)
        create_model(*arguments, **parse_extra_options(*arguments, options))
    return Source(model, folder / "model" / "model.onnx")


@functools.cache
def optimum(family: str) -> Source:
    """By optimum-onnx 0.1, in a process of its own: it wants an older transformers.

    Raises FileNotFoundError where its folder, which the Makefile makes, is not there.
    """
    if not OPTIMUM.is_dir():
        raise FileNotFoundError(f"{OPTIMUM} is not there: make build/optimum/.installed")
    folder, model = _folder(), _model(family)
    model.save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from optimum.exporters.onnx import main_export\n"
        "main_export(sys.argv[1], output=sys.argv[2], task='text-generation-with-past',"
        " do_validation=False)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, folder / "source", folder / "model"],
        env={**os.environ, "PYTHONPATH": str(OPTIMUM)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return Source(model, folder / "model" / "model.onnx")


@functools.cache
def transformers_exporter(family: str, fusions: str | None) -> Source:
    """By transformers' own exporter, plain or with onnxruntime's fusions: of its graphs of a
    generation the one with caches, with two blocks, as each takes seconds."""
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    folder, model = _folder(), _model(family, num_hidden_layers=2)
    ids = torch.from_numpy(PROMPT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=True, ort_fusions=fusions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stages = decompose_for_generation(model, inputs, multi_token_decode=True)
        exported = OnnxExporter().export(*stages["decode"], config)
        exported.save_pretrained(str(folder))
    return Source(model, folder / "model.onnx")


@functools.cache
def transformers_exporter_of_llava() -> VisionSource:
    """By transformers' own exporter: a prefill graph over embeddings, a head, a decode graph."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    image_token = 100
    text = LlamaConfig(
        vocab_size=128, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        **(_SIZES | {"num_hidden_layers": 1}),
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=image_token, vision_feature_layer=-1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[1, *[image_token] * 4, 9, 30, 77, 5]])
    folder = _folder()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export_for_generation(
            model, inputs, OnnxConfig(dynamic=True), multi_token_decode=True
        )
        exported.save_pretrained(str(folder))
    seen: list[Tensor] = []
    stack = model.model.language_model
    hook = stack.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return VisionSource(model, folder, seen[0])


@torch.no_grad()
def torch_logits(model: PreTrainedModel, vectors: SteeringVectors | None = None) -> NDArray:
    """[rows, tokens, vocabulary] over PROMPT and, one by one, STEPS."""
    cache, logits = DynamicCache(), []
    context = contextlib.nullcontext() if vectors is None else vectors.applied(model)
    with context:
        for ids in _passes():
            output = model(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=True)
            logits.append(output.logits.float().numpy())
    return np.concatenate(logits, axis=1)


def open_session(path: Path, *, library: bool = True) -> onnxruntime.InferenceSession:
    """A quiet session on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return export.session(path, library=library, session_options=options)


def onnx_logits(
    path: Path,
    *,
    library: bool = True,
    feeds: dict[str, NDArray] | None = None,
    run_options: onnxruntime.RunOptions | None = None,
) -> NDArray:
    """The same from a graph of any exporter: its caches are paired by their order."""
    session = open_session(path, library=library)
    inputs = session.get_inputs()
    outputs = [output.name for output in session.get_outputs()]
    caches = [value for value in inputs if len(value.shape) == 4]
    past = {
        value.name: np.zeros(
            (len(PROMPT), int(value.shape[1]), 0, HEAD),
            np.float16 if "16" in value.type else np.float32,
        )
        for value in caches
    }
    names = {value.name for value in inputs}
    logits, seen = [], 0
    for ids in _passes():
        total = seen + ids.shape[1]
        positions = np.arange(seen, total)[None].repeat(len(ids), axis=0)
        mask = np.ones((len(ids), total), np.int64)
        known = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        values = {name: value for name, value in known.items() if name in names} | past
        results = session.run(None, values | (feeds or {}), run_options)
        logits.append(results[outputs.index("logits")].astype(np.float32))
        present = [r for name, r in zip(outputs, results, strict=True) if name != "logits"]
        past = {value.name: array for value, array in zip(caches, present, strict=True)}
        seen = total
    return np.concatenate(logits, axis=1)


def _passes() -> list[NDArray]:
    return [PROMPT, *(STEPS[:, i : i + 1] for i in range(STEPS.shape[1]))]
