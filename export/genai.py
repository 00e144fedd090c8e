"""What onnxruntime-genai needs beside the graph, and a look at whether it then runs."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from grains_ext.export.errors import GraphError
from grains_ext.export.folder import (
    EMBEDDING_NAME,
    GENAI_CONFIG_NAME,
    GRAPH_NAME,
    LIBRARY_NAME,
    VISION_NAME,
)
from grains_ext.export.generate import PromptImages
from grains_ext.export.vision_families import VisionFamily, family_of
from grains_ext.export.vision_runtime import Prompt

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# genai's name for a decoder that takes and gives what the names below say, of whatever family.
_MODEL_TYPE = "decoder"

# Inputs of a vision graph that genai lets a configuration name; others go by the graph's own names.
_GENAI_PIXELS = ("pixel_values", "image_sizes", "image_grid_thw")

_SAMPLE_TEXTS = ("The sky is blue.", "Größe: 12 €\n\n\tif x <= 3:")


def require_genai() -> ModuleType:
    """The onnxruntime_genai module. Raises ImportError where it is not installed."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise ImportError(
            "onnxruntime-genai is not installed: pip install 'grains_ext[genai]' (it needs "
            "onnxruntime 1.31 or newer), or export for runtime='ort'"
        )
    return importlib.import_module("onnxruntime_genai")


def genai_family(model: PreTrainedModel) -> VisionFamily | None:
    """The family of a model that reads images; None for a model of text.

    Raises GraphError where the decoder takes something of the images that genai does not give it.
    """
    family = family_of(model)
    if family is not None and family.not_in_genai is not None:
        raise GraphError(
            f"models of type '{model.config.model_type}' {family.not_in_genai}: export with "
            "runtime='ort', and run the folder with `grains generate`"
        )
    return family


def write_genai_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes genai_config.json for the graph in `folder`, with the op library beside it.

    Raises GraphError where the graph's caches differ in shape: genai knows one shape for all; and
    as `genai_family` does.
    """
    family = genai_family(model)
    config = model.config.get_text_config(decoder=True)
    generation = model.generation_config
    caches, vocabulary = _shapes(folder / GRAPH_NAME)
    if len(set(caches)) != 1:
        raise GraphError(
            f"the graph's caches have heads and sizes {sorted(set(caches))}; onnxruntime-genai "
            "takes one shape for all blocks: export with runtime='ort'"
        )
    heads, head_size = caches[0]
    context = getattr(config, "max_position_embeddings", None) or 4096
    bos, eos, pad = (
        _token(getattr(generation, name, None), getattr(config, name, None))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    first_eos = eos[0] if isinstance(eos, list) else eos
    ids = {
        "bos_token_id": bos[0] if isinstance(bos, list) else bos,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
    }
    tokens = "input_ids" if family is None else "inputs_embeds"
    record = {
        "model": {
            **{name: value for name, value in ids.items() if value is not None},
            "type": _MODEL_TYPE if family is None else family.genai_type,
            "context_length": context,
            "vocab_size": vocabulary,
            **({} if family is None else _vision_sections(model, family)),
            "decoder": {
                "filename": GRAPH_NAME,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "custom_ops_library": LIBRARY_NAME,
                    "provider_options": [],
                },
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(caches),
                "inputs": {
                    tokens: tokens,
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(getattr(generation, "do_sample", False)),
            "temperature": _or(getattr(generation, "temperature", None), 1.0),
            "top_k": _or(getattr(generation, "top_k", None), 50),
            "top_p": _or(getattr(generation, "top_p", None), 1.0),
            "repetition_penalty": _or(getattr(generation, "repetition_penalty", None), 1.0),
            "min_length": 0,
            "max_length": context,
            "num_beams": 1,
            "num_return_sequences": 1,
            # The graph grows its caches; it does not write into a buffer of full length.
            "past_present_share_buffer": False,
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    (folder / GENAI_CONFIG_NAME).write_text(text, encoding="utf-8")


def _vision_sections(model: PreTrainedModel, family: VisionFamily) -> dict[str, Any]:
    config = model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id")
    ids = {name: getattr(config, name, None) for name in names}
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    return {
        **{name: value for name, value in ids.items() if value is not None},
        "vision": {
            "filename": VISION_NAME,
            **({} if merge is None else {"spatial_merge_size": merge}),
            "inputs": {name: name for name in family.pixels if name in _GENAI_PIXELS},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": EMBEDDING_NAME,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
    }


def generate_with_genai(
    folder: Path, prompt: Prompt, n_tokens: int, images: PromptImages | None = None
) -> list[int]:
    """The greedy continuation of one prompt by onnxruntime-genai: at most n_tokens ids."""
    genai = require_genai()
    model = genai.Model(os.fspath(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt.ids) + n_tokens)
    generator = genai.Generator(model, parameters)
    if images is None:
        generator.append_tokens([list(prompt.ids)])
    else:
        generator.set_inputs(_named_tensors(prompt, len(images.features)))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt.ids) :]


def _named_tensors(prompt: Prompt, n_image_tokens: int) -> Any:
    """The prompt as genai's own processors would give it."""
    tensors = require_genai().NamedTensors()
    tensors["input_ids"] = np.array([prompt.ids], np.int32)
    tensors["num_image_tokens"] = np.array([n_image_tokens], np.int64)
    for name, value in prompt.pixels.items():
        tensors[name] = np.ascontiguousarray(value)
    return tensors


def tokenizer_difference(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How genai's own tokenizer of the folder differs from `tokenizer`; None where it does not.

    A first token that the tokenizer adds and genai does not is left out of the comparison: the
    folder's README prepends it.
    """
    genai = require_genai()
    try:
        theirs = genai.Tokenizer(genai.Model(os.fspath(folder)))
        for text in _SAMPLE_TEXTS:
            expected = list(tokenizer(text).input_ids)
            found = [int(token) for token in theirs.encode(text)]
            if found not in (expected, expected[1:]):
                return f"{text!r} is {found} there and {expected} in transformers"
    except RuntimeError as error:
        return f"it cannot be loaded there: {error}"
    return None


def _shapes(graph_path: Path) -> tuple[list[tuple[int, int]], int]:
    """Heads and head size of each block's cache; the vocabulary."""
    graph = onnx.load(str(graph_path), load_external_data=False).graph
    dims = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    pasts = [shape for name, shape in dims.items() if name.startswith("past_key_values.")]
    return [(shape[1], shape[3]) for shape in pasts[::2]], dims["logits"][-1]


def _token(*choices: int | list[int] | None) -> int | list[int] | None:
    return next((choice for choice in choices if choice is not None), None)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
