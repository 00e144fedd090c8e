"""A transformers decoder as a steered ONNX folder: one graph for prefill and cached decoding."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import inspect
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import grains_ext
from grains_ext.export.inject import Injected, inject
from grains_ext.export.runtime import require_onnxruntime
from grains_ext.export.verify import Parity, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grains_ext.steering.vectors import SteeringVectors

GRAPH_NAME = "model.onnx"
UNSTEERED_NAME = "model_unsteered.onnx"
RECORD_NAME = "grains_export.json"

DEFAULT_OPSET = 20
"""The newest that onnxruntime 1.20, the oldest that the op library serves, runs in full."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Largest accepted error of the steered logits, relative to their largest value or 1."""

_EXTERNAL_ABOVE_BYTES = 2**30
"""Protobuf files end at 2 GiB; half of it leaves room for the graph."""

_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
_EXPORTABLE_ATTENTION = {"eager", "sdpa"}


class ExportError(RuntimeError):
    """The model does not export, or the exported graph does not compute what the model does."""


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: SteeringVectors,
    folder: str | Path,
    *,
    strength: float | None = None,
    opset: int = DEFAULT_OPSET,
    dtype: torch.dtype | None = None,
    fuse: bool = True,
    baked: bool = False,
    external_data: bool | None = None,
    keep_unsteered: bool = False,
    overwrite: bool = False,
    verify: bool = True,
) -> Parity | None:
    """Exports `model` with its steering to `folder/model.onnx`, ready for onnxruntime.

    The graph takes input_ids, attention_mask, position_ids and past_key_values.{i}.key/value
    (past length 0 at the first call) and gives logits and present.{i}.key/value: the names that
    optimum and onnxruntime-genai use. Beside it lie the model's configuration, its tokenizer,
    the vectors, and `grains_export.json`: versions, steered sites, measured parity.

    strength: the default strength in the graph; `vectors.strength` if None.
    opset: 18 or more. From 23 on, norms and attention are single operators.
    dtype: the graph's float type; the model's own if None. onnxruntime's CPU provider computes
        float32 and float16; for bfloat16 pass verify=False.
    fuse, baked: as for `inject`.
    external_data: weights in `model.onnx.data`; None: where they exceed 1 GiB, or where
        keep_unsteered lets two graphs share them.
    keep_unsteered: also writes `model_unsteered.onnx`.
    overwrite: replaces `folder` if it holds files.
    verify: compares the graph with the steered torch model, and raises ExportError where the
        logits differ by more than TOLERANCE.

    The folder appears complete or not at all. Returns the parity measured, None if not verified.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is a file; give a folder to export to")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"'{folder}' is not empty; pass overwrite=True to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if verify:
        require_onnxruntime()
    strength = vectors.strength if strength is None else strength
    vectors = vectors.with_strength(strength)
    # Raises here, not after the export, where the vectors do not fit the model.
    vectors.apply(model).remove()
    # Not tempfile's: that would make a private folder.
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    work.mkdir()
    try:
        model = _prepared(model, dtype)
        model.config.save_pretrained(work)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        vectors.save_pretrained(work)
        injected = _write_graphs(
            model, vectors, work,
            opset=opset, fuse=fuse, baked=baked,
            external_data=external_data, keep_unsteered=keep_unsteered,
        )  # fmt: skip
        parity = _verified(model, vectors, work / GRAPH_NAME) if verify else None
        _write_record(work / RECORD_NAME, model, vectors, injected, opset, parity)
        _move_into_place(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return parity


def export_graph(
    model: PreTrainedModel,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    external_data: bool = False,
) -> None:
    """Exports an unsteered decoder to ONNX: the graph that `export_model` steers.

    Raises ExportError, naming the model's family, where it has no plain key/value cache or
    torch.onnx.export refuses it.
    """
    family = model.config.model_type
    if opset < 18:
        raise ValueError(f"opset is {opset}; steered graphs need 18 or more")
    unknown = [n for n in _INPUTS if n not in inspect.signature(model.forward).parameters]
    if unknown:
        raise ExportError(
            f"models of type '{family}' cannot be exported: their forward takes no "
            f"{', '.join(unknown)}. Export with another tool and steer the file with inject()"
        )
    training = model.training
    model.eval()
    try:
        arguments = _example(model)
        with _quiet():
            program = torch.onnx.export(
                _CachedDecoder(model),
                (),
                kwargs=arguments,
                dynamic_shapes=_dynamic_shapes(len(arguments["past"])),
                input_names=[*_INPUTS[:3], *_cache_names("past_key_values", arguments)],
                output_names=["logits", *_cache_names("present", arguments)],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export does not carry this model of type '{family}': {error}. Export "
            "it with another tool and steer the file with inject()"
        ) from error
    finally:
        model.train(training)
    assert program is not None
    _divide_by_roots(program.model.graph)
    program.save(str(path), external_data=external_data)


def _divide_by_roots(graph: Any) -> None:
    """Writes x * (1 / sqrt(y)), the exporter's form of x * rsqrt(y), as x / sqrt(y).

    onnxruntime knows a norm by the quotient; in the exporter's form it runs the parts one by one.
    """
    for node in list(graph):
        if node.op_type != "Reciprocal" or node.inputs[0].producer().op_type != "Sqrt":
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != "Mul":
            continue
        product = readers[0]
        dividend = next(value for value in product.inputs if value is not node.outputs[0])
        product.op_type = "Div"
        product.replace_input_with(0, dividend)
        product.replace_input_with(1, node.inputs[0])
        graph.remove(node, safe=True)


class _PastLayer(DynamicLayer):
    """One layer's cache made from given keys and values, whose length stays symbolic."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def get_seq_length(self) -> int:
        # The base class first asks whether the cache is empty: a branch on a traced length.
        return self.keys.shape[-2]


class _CachedDecoder(nn.Module):
    """The model with a flat cache: tensors in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model
        self.training = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        cache = Cache(layers=[_PastLayer(keys, values) for keys, values in past])
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        return (output.logits, *present)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Traced arguments. No size is 0 or 1: the tracer would take those for constants."""
    batch, tokens, past_tokens = 2, 3, 5
    device = model.device
    ids = torch.arange(batch * past_tokens, device=device).reshape(batch, past_tokens)
    ids = ids % model.config.get_text_config(decoder=True).vocab_size
    with torch.no_grad():
        # A cache of our own: the model's would drop what lies outside a sliding window.
        output = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    cache = output.past_key_values
    layers = getattr(cache, "layers", [])
    past = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not past or not all(
        isinstance(t, Tensor) and t.ndim == 4 and t.shape[2] == past_tokens
        for kv in past
        for t in kv
    ):
        raise ExportError(
            f"models of type '{model.config.model_type}' cannot be exported: their cache is not "
            "one key and one value tensor [batch, heads, tokens, size] per decoder block"
        )
    positions = torch.arange(past_tokens, past_tokens + tokens, device=device)
    return {
        "input_ids": ids[:, :tokens].contiguous(),
        "attention_mask": torch.ones(batch, past_tokens + tokens, dtype=torch.long, device=device),
        "position_ids": positions.repeat(batch, 1),
        "past": past,
    }


def _dynamic_shapes(n_blocks: int) -> dict[str, Any]:
    past = {0: "batch_size", 2: "past_sequence_length"}
    return {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "past": [(past, past)] * n_blocks,
    }


def _cache_names(prefix: str, arguments: dict[str, Any]) -> list[str]:
    return [
        f"{prefix}.{i}.{kind}" for i in range(len(arguments["past"])) for kind in ("key", "value")
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's notes on axis names and on absent torchvision operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _prepared(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in the wanted dtype, with an attention that can be traced; a copy if it differs."""
    dtype = model.dtype if dtype is None else dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype is {dtype}; expected torch.float32, float16 or bfloat16")
    attention = model.config._attn_implementation
    if dtype == model.dtype and attention in _EXPORTABLE_ATTENTION:
        return model
    model = copy.deepcopy(model).to(dtype)
    if attention not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")
    return model


def _write_graphs(
    model: PreTrainedModel,
    vectors: SteeringVectors,
    work: Path,
    *,
    opset: int,
    fuse: bool,
    baked: bool,
    external_data: bool | None,
    keep_unsteered: bool,
) -> list[Injected]:
    if external_data is None:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        external_data = keep_unsteered or size > _EXTERNAL_ABOVE_BYTES
    # Written under the steered graph's name, so that the weights' file is named after that one.
    export_graph(model, work / GRAPH_NAME, opset=opset, external_data=external_data)
    unsteered = work / UNSTEERED_NAME
    os.replace(work / GRAPH_NAME, unsteered)
    steered = work / GRAPH_NAME
    injected = inject(unsteered, vectors, steered, fuse=fuse, baked=baked)
    if not keep_unsteered:
        unsteered.unlink()
    return injected


def _verified(model: PreTrainedModel, vectors: SteeringVectors, path: Path) -> Parity:
    parity = verify(model, vectors, path)
    tolerance = TOLERANCE[model.dtype]
    if not parity.max_relative_error <= tolerance:  # NaN fails too
        raise ExportError(
            f"the exported graph's steered logits differ from the torch model's by "
            f"{parity.max_relative_error:.2e} of their largest value (at most {tolerance:.0e} is "
            f"accepted): {parity}. Nothing was written"
        )
    return parity


def _write_record(
    path: Path,
    model: PreTrainedModel,
    vectors: SteeringVectors,
    injected: list[Injected],
    opset: int,
    parity: Parity | None,
) -> None:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "opset": opset,
        "strength": vectors.strength,
        "steered": [asdict(entry) for entry in injected],
        "parity": None if parity is None else asdict(parity),
        "versions": {"grains_ext": grains_ext.__version__} | versions,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _move_into_place(work: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(work, folder)
        return
    # A folder cannot replace one that holds files: the old one steps aside first.
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.replace(folder, old)
    os.replace(work, folder)
    shutil.rmtree(old)
