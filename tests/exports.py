"""Tiny models exported once for all tests that read them: an export takes many seconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from grains_ext.export import Parity, export_model
from grains_ext.steering.vectors import SteeringVectors
from tests.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from tests.vision_models import tiny_vlm


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
    root = _root()
    model, tokenizer, vectors = tiny_model("llama"), tiny_tokenizer(), random_vectors()
    folder = root / "steered"
    parity = export_model(model, tokenizer, vectors, folder, keep_unsteered=True)
    assert parity is not None
    return Exported(model, tokenizer, vectors, folder, parity)


@functools.cache
def exported_vlm(family: str) -> ExportedVlm:
    """With one decoder block: each takes seconds. Gemma's have two kinds, and Qwen3-VL's two levels
    of features."""
    model, processor = tiny_vlm(family, n_blocks=2 if family in ("gemma3", "qwen3_vl") else 1)
    vectors = random_vectors(range(model.config.get_text_config().num_hidden_layers))
    folder = _root() / "steered"
    parity = export_model(model, processor, vectors, folder)
    assert parity is not None
    return ExportedVlm(model, processor, vectors, folder, parity)


def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="grains-test-export-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
