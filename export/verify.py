"""Does the steered graph compute what the steered torch model computes?"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from grains_ext.export.functions import DOMAIN
from grains_ext.export.generate import OnnxDecoder
from grains_ext.export.runtime import Provider, require_onnxruntime, session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions
    from transformers import PreTrainedModel

    from grains_ext.steering.vectors import SteeringVectors

# Rows of unlike length, so that the batch has left padding; one row is full.
_PROMPT_LENGTHS = (11, 4, 7)


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
class Parity:
    """Agreement of a steered graph with the hooked torch model.

    stock: onnxruntime without the op library. library: with it; None if it was not tried.
    steps: cached decoding steps compared. fused_nodes: `grains` operators by type that remain
    after onnxruntime's own optimisation, where the library is loaded.
    """

    stock: RuntimeParity
    library: RuntimeParity | None
    steps: int
    fused_nodes: dict[str, int]

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
    strength: float | None = None,
    steps: int = 32,
    seed: int = 0,
    library: bool = True,
    providers: Sequence[Provider] | None = None,
) -> Parity:
    """Compares the logits of a steered graph with those of the hooked torch model.

    Three random prompts of unlike length, padded on the left, are run through prefill and `steps`
    cached steps. The tokens are the torch model's greedy choice, so that both see the same text.

    strength: the one that the graph was made with; `vectors.strength` if None.
    library: also compares onnxruntime with the op library.
    """
    onnx_path = Path(onnx_path)
    strength = vectors.strength if strength is None else strength
    prompts, mask = _prompts(model, seed)
    tokens, expected = _torch_logits(model, vectors, strength, prompts, mask, steps)
    runtimes = [
        _compare(
            session(
                onnx_path,
                library=with_library,
                session_options=_quiet_options(),
                providers=providers,
            ),
            prompts.numpy(),
            mask.numpy(),
            tokens,
            expected,
        )
        for with_library in ([False, True] if library else [False])
    ]
    counts = count_nodes(onnx_path, providers=providers) if library else Counter()
    return Parity(
        stock=runtimes[0],
        library=runtimes[1] if library else None,
        steps=steps,
        fused_nodes={
            op.removeprefix(f"{DOMAIN}."): n
            for op, n in sorted(counts.items())
            if op.startswith(f"{DOMAIN}.")
        },
    )


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


@torch.no_grad()
def _torch_logits(
    model: PreTrainedModel,
    vectors: SteeringVectors,
    strength: float,
    prompts: Tensor,
    mask: Tensor,
    steps: int,
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """The greedy tokens of each step, [rows, 1], and the logits of prefill and of each step."""
    training = model.training
    model.eval()
    tokens, logits = [], []
    ids, cache = prompts, None
    try:
        with vectors.applied(model, strength=strength):
            for _ in range(steps + 1):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    position_ids=positions.to(model.device),
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                logits.append(output.logits.float().cpu().numpy())
                ids = output.logits[:, -1:].argmax(-1).cpu()
                tokens.append(ids.numpy())
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    finally:
        model.train(training)
    return tokens[:-1], logits


def _compare(
    runtime: InferenceSession,
    prompts: NDArray[np.int64],
    mask: NDArray[np.int64],
    tokens: list[NDArray[np.int64]],
    expected: list[NDArray[np.float32]],
) -> RuntimeParity:
    decoder = OnnxDecoder(runtime)
    logits, cache = decoder.step(prompts, mask)
    real = mask.astype(bool)
    prefill = float(np.abs(logits[real] - expected[0][real]).max())
    decode = 0.0
    for ids, reference in zip(tokens, expected[1:], strict=True):
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        logits, cache = decoder.step(ids, mask, cache)
        # np.maximum, unlike max, lets NaN through.
        decode = float(np.maximum(decode, np.abs(logits - reference).max()))
    largest = max(1.0, *(float(np.abs(e).max()) for e in (expected[0][real], *expected[1:])))
    return RuntimeParity(prefill, decode, float(np.maximum(prefill, decode)) / largest)
