"""Tiny models exported once for all tests that read them: an export takes many seconds."""

from __future__ import annotations

import copy
import functools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from grains_ext.attribution.engine import hash_of_weights
from grains_ext.export import Parity, attribution, export_model, trace
from grains_ext.steering.vectors import SteeringVectors
from tests.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from tests.vision_models import tiny_vlm

# torch.onnx.export parses the translations of all operators anew: a tenth of an export's time.
_parsed = functools.cache(ONNXRegistry.from_torchlib)


def _from_torchlib(opset_version: int) -> ONNXRegistry:
    registry = copy.copy(_parsed(opset_version=opset_version))
    registry.functions = {op: [*found] for op, found in registry.functions.items()}
    return registry


ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)


@dataclass(frozen=True)
class Exported:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vectors: SteeringVectors
    folder: Path
    parity: Parity


@dataclass(frozen=True)
class ExportedVlm:
    model: PreTrainedModel
    processor: ProcessorMixin
    vectors: SteeringVectors
    folder: Path
    parity: Parity


def random_vectors(
    blocks: Iterable[int] = range(4), *, size: int = HIDDEN_SIZE, strength: float = 1.5
) -> SteeringVectors:
    generator = torch.Generator().manual_seed(7)
    directions = {block: torch.randn(size, generator=generator) for block in blocks}
    return SteeringVectors(directions, strength=strength)


@functools.cache
def exported_llama() -> Exported:
    """With both graphs, which share their weights in an external file."""
    model, tokenizer, vectors = tiny_model("llama"), tiny_tokenizer(), random_vectors()
    folder, parity = _once(
        "llama",
        lambda folder: export_model(model, tokenizer, vectors, folder, keep_unsteered=True),
    )
    return Exported(model, tokenizer, vectors, folder, parity)


@functools.cache
def exported_vlm(family: str) -> ExportedVlm:
    """With one decoder block: each takes seconds. Gemma's have two kinds, and Qwen3-VL's two levels
    of features."""
    model, processor = tiny_vlm(family, n_blocks=2 if family in ("gemma3", "qwen3_vl") else 1)
    vectors = random_vectors(range(model.config.get_text_config().num_hidden_layers))
    folder, parity = _once(family, lambda folder: export_model(model, processor, vectors, folder))
    return ExportedVlm(model, processor, vectors, folder, parity)


def _once(name: str, export: Callable[[Path], Parity | None]) -> tuple[Path, Parity]:
    """The folder and the parity of an export that the first of the tests' processes makes."""
    folder, record = _shared() / name / "steered", _shared() / f"{name}.parity"
    with FileLock(_shared() / f"{name}.lock"):
        if not record.exists():
            record.write_bytes(pickle.dumps(export(folder)))
        parity = pickle.loads(record.read_bytes())
    assert parity is not None
    return folder, parity


def _shared() -> Path:
    """A folder of all processes of this run of the tests, which conftest.py makes."""
    return Path(os.environ["GRAINS_TESTS_SHARED"])


def _save(source: Path, target: str | Path, *, external_data: bool) -> None:
    name = f"{Path(target).name}.data"
    onnx.save(onnx.load(source), target, save_as_external_data=external_data, location=name)


@contextmanager
def gradient_traced_once() -> Iterator[None]:
    """Inside, `export_attribution` takes the trace of a model with the same weights, where a test
    in any process has made one: most of the time.

    Settings, checks and the file are the export's own.
    """
    original = attribution._traced

    def traced(graph: Any, decoder: Any, opset: int) -> Any:
        known = _shared() / f"gradient-{hash_of_weights(decoder.model)}-{opset}.onnx"
        with FileLock(f"{known}.lock"):
            if not known.exists():
                original(graph, decoder, opset).save(str(known), external_data=False)
        return SimpleNamespace(save=functools.partial(_save, known))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "_traced", traced)
        yield


def share_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of the model of `exported_llama` takes its trace: most of the time.

    Steering, verification, quantisation and all files are the export's own.
    """

    def export_graph(
        model: PreTrainedModel,
        path: str | Path,
        *,
        opset: int = trace.DEFAULT_OPSET,
        external_data: bool = False,
    ) -> None:
        known = exported_llama()
        if opset != trace.DEFAULT_OPSET or not _same_weights(model, known.model):
            trace.export_graph(model, path, opset=opset, external_data=external_data)
            return
        _save(known.folder / "model_unsteered.onnx", path, external_data=external_data)

    monkeypatch.setattr("grains_ext.export.model.export_graph", export_graph)


def _same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in mine.items()
    )
