"""What onnxruntime-genai needs beside the graph, and a look at whether it then runs."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from grains_ext.export.errors import GraphError
from grains_ext.export.folder import GENAI_CONFIG_NAME, GRAPH_NAME, LIBRARY_NAME

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# genai's name for a decoder that takes and gives what the names below say, of whatever family.
_MODEL_TYPE = "decoder"

_SAMPLE_TEXTS = ("The sky is blue.", "Größe: 12 €\n\n\tif x <= 3:")


def require_genai() -> ModuleType:
    """The onnxruntime_genai module. Raises ImportError where it is not installed."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise ImportError(
            "onnxruntime-genai is not installed: pip install 'grains_ext[genai]' (it needs "
            "onnxruntime 1.31 or newer), or export for runtime='ort'"
        )
    return importlib.import_module("onnxruntime_genai")


def write_genai_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes genai_config.json for the graph in `folder`, with the op library beside it.

    Raises GraphError where the graph's caches differ in shape: genai knows one shape for all.
    """
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
    record = {
        "model": {
            **{name: value for name, value in ids.items() if value is not None},
            "type": _MODEL_TYPE,
            "context_length": context,
            "vocab_size": vocabulary,
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
                    "input_ids": "input_ids",
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


def generate_with_genai(folder: Path, input_ids: Sequence[int], n_tokens: int) -> list[int]:
    """The greedy continuation of one prompt by onnxruntime-genai: at most n_tokens ids."""
    genai = require_genai()
    model = genai.Model(os.fspath(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(input_ids) + n_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([list(input_ids)])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(input_ids) :]


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
