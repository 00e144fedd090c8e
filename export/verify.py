"""Does the steered graph compute what the steered torch model computes?"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from grains_ext.encoding import encode_prompt
from grains_ext.export.bank import STRENGTH_NAME
from grains_ext.export.folder import VISION_NAME
from grains_ext.export.functions import DOMAIN
from grains_ext.export.generate import OnnxDecoder, PromptImages, embedding_beside
from grains_ext.export.runtime import Provider, require_onnxruntime, session
from grains_ext.export.trace import evaluating
from grains_ext.export.vision_runtime import ImageReader, Prompt
from grains_ext.vision.encoding import encode_image_prompt

if TYPE_CHECKING:
    from onnxruntime import SessionOptions
    from transformers import PreTrainedModel, ProcessorMixin

    from grains_ext.steering.vectors import SteeringVectors

# Rows of unlike length, so that the batch has left padding; one row is full.
_PROMPT_LENGTHS = (11, 4, 7)

# For models that read images, with a picture of another shape for each {}.
_IMAGE_PROMPTS = ("The sky {} is over {} the", "{} What is this?", "One plus two are three.")
_IMAGE_SIZES = ((120, 80), (64, 96), (150, 150))


@dataclass(frozen=True)
class RuntimeParity:
    """Largest differences between one runtime's logits and the torch model's.

    prefill, decode: absolute, over the prompts' tokens and over the cached steps.
    relative: the larger of both, divided by the largest torch logit (by 1 where that is smaller).
    """

    prefill: float
    decode: float
    relative: float


@dataclass(frozen=True)
class QuantizationParity:
    """What quantisation changes, and what steering changes beside it.

    weights: the unsteered quantised graph against the unsteered torch model: the price of
        quantising, with or without steering.
    steered: the steered quantised graph against the hooked torch model.
    strength_zero: the steered graph at strength 0 against the unsteered quantised one, both in
        float arithmetic: what the steering's presence changes.
    runtimes: the steered graph with the op library against without it, in float arithmetic.
    """

    weights: RuntimeParity
    steered: RuntimeParity
    strength_zero: RuntimeParity
    runtimes: RuntimeParity


@dataclass(frozen=True)
class Parity:
    """Agreement of a steered graph with the hooked torch model.

    stock: onnxruntime without the op library. library: with it; None if it was not tried.
    steps: cached decoding steps compared. fused_nodes: `grains` operators by type that remain
    after onnxruntime's own optimisation, where the library is loaded. quantization: for an export
    with quantised weights; `stock` and `library` then tell of the graph before it was quantised.
    """

    stock: RuntimeParity
    library: RuntimeParity | None
    steps: int
    fused_nodes: dict[str, int]
    quantization: QuantizationParity | None = None

    @property
    def max_absolute_error(self) -> float:
        return float(np.max([error for r in self._runtimes for error in (r.prefill, r.decode)]))

    @property
    def max_relative_error(self) -> float:
        return float(np.max([r.relative for r in self._runtimes]))

    @property
    def _runtimes(self) -> list[RuntimeParity]:
        return [r for r in (self.stock, self.library) if r is not None]


def verify(
    model: PreTrainedModel,
    vectors: SteeringVectors,
    onnx_path: str | Path,
    *,
    processor: ProcessorMixin | None = None,
    strength: float | None = None,
    steps: int = 32,
    seed: int = 0,
    library: bool = True,
    providers: Sequence[Provider] | None = None,
) -> Parity:
    """Compares the logits of a steered graph with those of the hooked torch model.

    Three random prompts of unlike length, padded on the left, are run through prefill and `steps`
    cached steps. The tokens are the torch model's greedy choice, so that both see the same text.

    processor: for a vision-language model, whose vision.onnx and embedding.onnx lie beside the
        graph: two of the prompts then have images, one and two of them, and the torch model reads
        each prompt by itself, from the processor's own output.
    strength: the one that the graph was made with; `vectors.strength` if None.
    library: also compares onnxruntime with the op library.
    """
    onnx_path = Path(onnx_path)
    strength = vectors.strength if strength is None else strength
    text = _text(model, processor, onnx_path, steps, seed)
    reference = text.hooked(vectors, strength)
    runtimes = [
        reference.compare(_run(onnx_path, reference, library=with_library, providers=providers))
        for with_library in ([False, True] if library else [False])
    ]
    return Parity(
        stock=runtimes[0],
        library=runtimes[1] if library else None,
        steps=steps,
        fused_nodes=_grains_nodes(onnx_path, providers) if library else {},
    )


def verify_quantized(
    model: PreTrainedModel,
    vectors: SteeringVectors,
    parity: Parity,
    *,
    processor: ProcessorMixin | None = None,
    steered: Path,
    unsteered: Path,
    exact_steered: Path,
    exact_unsteered: Path,
    steps: int = 8,
    seed: int = 0,
) -> Parity:
    """`parity`, of the float graph, with what quantising it changed.

    steered, unsteered: the quantised graphs. exact_*: the same in float arithmetic (see
        quantize.in_float_arithmetic), the steered one injected without `baked`.
    """
    text = _text(model, processor, steered, steps, seed)
    plain, hooked = text.hooked(vectors, 0.0), text.hooked(vectors, vectors.strength)
    stock = hooked.of(_run(exact_steered, hooked, library=False))
    quantized = plain.of(_run(exact_unsteered, plain, library=False))
    off = {STRENGTH_NAME: np.zeros(1, np.float32)}
    return replace(
        parity,
        fused_nodes=_grains_nodes(steered),
        quantization=QuantizationParity(
            weights=plain.compare(_run(unsteered, plain, library=False)),
            steered=hooked.compare(_run(steered, hooked, library=True)),
            strength_zero=quantized.compare(
                _run(exact_steered, plain, library=True, overrides=off)
            ),
            runtimes=stock.compare(_run(exact_steered, hooked, library=True)),
        ),
    )


def _grains_nodes(onnx_path: Path, providers: Sequence[Provider] | None = None) -> dict[str, int]:
    counts = sorted(count_nodes(onnx_path, providers=providers).items())
    prefix = f"{DOMAIN}."
    return {op.removeprefix(prefix): n for op, n in counts if op.startswith(prefix)}


def count_nodes(
    onnx_path: str | Path, *, library: bool = True, providers: Sequence[Provider] | None = None
) -> Counter[str]:
    """Operators that onnxruntime runs after its own optimisation, by "domain.op_type".

    Operators of the standard domain go by their type alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = _quiet_options()
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        session(onnx_path, library=library, session_options=options, providers=providers)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in optimized.graph.node
    )


def _quiet_options() -> SessionOptions:
    options = require_onnxruntime().SessionOptions()
    # Errors only: onnxruntime warns of each default that can be overridden, which is their purpose.
    options.log_severity_level = 3
    return options


def _prompts(model: PreTrainedModel, seed: int) -> tuple[Tensor, Tensor]:
    """Random prompts [rows, tokens] and their mask, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(_PROMPT_LENGTHS)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (len(_PROMPT_LENGTHS), width), generator=generator)
    lengths = torch.tensor(_PROMPT_LENGTHS)[:, None]
    mask = (torch.arange(width) >= width - lengths).long()
    return ids * mask, mask


@dataclass(frozen=True)
class _Reference:
    """Prompts [rows, tokens] with their mask, the tokens that follow them, and logits.

    tokens: of each cached step, [rows, 1]. logits: of the prompts, then of each step. images: of
    the prompts, as onnxruntime reads them.
    """

    prompts: NDArray[np.int64]
    mask: NDArray[np.int64]
    tokens: list[NDArray[np.int64]]
    logits: list[NDArray[np.float32]]
    images: PromptImages | None = None

    def of(self, logits: list[NDArray[np.float32]]) -> _Reference:
        """The same text with the logits of something else."""
        return replace(self, logits=logits)

    def compare(self, logits: list[NDArray[np.float32]]) -> RuntimeParity:
        real = self.mask.astype(bool)
        prefill = float(np.abs(logits[0][real] - self.logits[0][real]).max())
        errors = [np.abs(a - b).max() for a, b in zip(logits[1:], self.logits[1:], strict=True)]
        # np.max, unlike max, lets NaN through.
        decode = float(np.max(errors, initial=0.0))
        largest = float(np.max([np.abs(e).max() for e in (self.logits[0][real], *self.logits[1:])]))
        return RuntimeParity(
            prefill, decode, float(np.maximum(prefill, decode)) / max(1.0, largest)
        )


@dataclass(frozen=True)
class _RandomText:
    """Prompts of random tokens, in one batch."""

    model: PreTrainedModel
    steps: int
    seed: int

    @torch.no_grad()
    def hooked(self, vectors: SteeringVectors, strength: float) -> _Reference:
        """The greedy tokens and the logits of the hooked model."""
        prompts, mask = _prompts(self.model, self.seed)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": prompts, "attention_mask": mask, "position_ids": positions}
        with evaluating(self.model), vectors.applied(self.model, strength=strength):
            tokens, logits = _continued(self.model, inputs, self.steps)
        return _Reference(prompts.numpy(), mask.numpy(), tokens, logits)


@dataclass(frozen=True)
class _PicturedText:
    """Prompts with pictures of noise, each by itself in torch and all in one batch elsewhere.

    folder: where vision.onnx lies.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    folder: Path
    steps: int
    seed: int

    @torch.no_grad()
    def hooked(self, vectors: SteeringVectors, strength: float) -> _Reference:
        """The greedy tokens and the logits of the hooked model."""
        prompts = self._prompts()
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt.ids])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.pixels}
            with evaluating(self.model), vectors.applied(self.model, strength=strength):
                rows.append(_continued(self.model, inputs, self.steps))
        batch = ImageReader(self.folder).batch(prompts)
        width = batch.input_ids.shape[1]
        for _, logits in rows:
            logits[0] = np.pad(logits[0], ((0, 0), (width - logits[0].shape[1], 0), (0, 0)))
        tokens, logits = (
            [np.concatenate(step) for step in zip(*steps, strict=True)]
            for steps in zip(*rows, strict=True)
        )
        return _Reference(
            batch.input_ids, batch.attention_mask, tokens, logits, images=batch.images
        )

    def _prompts(self) -> list[Prompt]:
        random = np.random.default_rng(self.seed)
        pictures = (
            random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            for width, height in _IMAGE_SIZES
        )
        prompts = []
        for text in _IMAGE_PROMPTS:
            chosen = [next(pictures) for _ in range(text.count("{}"))]
            text = text.replace("{}", self.processor.image_token)
            if chosen:
                prompts.append(Prompt(*encode_image_prompt(self.processor, text, chosen)))
            else:
                prompts.append(Prompt(encode_prompt(self.processor, text)))
        return prompts


def _text(
    model: PreTrainedModel, processor: ProcessorMixin | None, graph: Path, steps: int, seed: int
) -> _RandomText | _PicturedText:
    if not graph.with_name(VISION_NAME).is_file():
        return _RandomText(model, steps, seed)
    if processor is None:
        raise ValueError(f"'{graph.parent}' holds a model that reads images: pass its processor")
    return _PicturedText(model, processor, graph.parent, steps, seed)


def _continued(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """The model's greedy tokens after its inputs, [rows, 1] each, and the logits on the way.

    Positions count on from the prompt's tokens, shifted by what the model says of its images.
    """
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    mask = inputs["attention_mask"]
    tokens, logits, cache = [], [], None
    for _ in range(steps + 1):
        output = model(**inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits.float().cpu().numpy())
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(ids.cpu().numpy())
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        shifts = [m.rope_deltas for m in model.modules() if hasattr(m, "rope_deltas")]
        shift = next((deltas for deltas in shifts if deltas is not None), 0)
        positions = mask.sum(1, keepdim=True) - 1 + shift
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return tokens[:-1], logits


def _run(
    onnx_path: Path,
    text: _Reference,
    *,
    library: bool,
    providers: Sequence[Provider] | None = None,
    overrides: Mapping[str, NDArray[Any]] | None = None,
) -> list[NDArray[np.float32]]:
    """The logits of a graph on the reference's text."""
    runtime = session(
        onnx_path, library=library, session_options=_quiet_options(), providers=providers
    )
    embedding = embedding_beside(onnx_path, providers=providers)
    decoder = OnnxDecoder(runtime, embedding=embedding, overrides=overrides)
    mask = text.mask
    logits, cache = decoder.step(text.prompts, mask, images=text.images)
    all_logits = [logits.astype(np.float32)]
    for ids in text.tokens:
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        logits, cache = decoder.step(ids, mask, cache, text.images)
        all_logits.append(logits.astype(np.float32))
    return all_logits
