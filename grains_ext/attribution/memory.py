"""How many tokens a model call may hold, predicted from the model's sizes."""

from __future__ import annotations

import os
from typing import Any

import torch

from grains_ext.decoder import DecoderView, unwrap

# On a CPU, what one call may keep by the prediction. The process grows by a tenth less to a tenth
# more (docs/benchmarks.md).
_CPU_BYTES = 560 << 20
# On a GPU: the share of the free memory.
_GPU_SHARE = 0.6
_LEAST, _MOST = 64, 1 << 17


def activation_bytes(decoder: DecoderView, *, fused: bool = False) -> int:
    """Bytes that a forward with its backward to the embeddings keeps for each token, predicted.

    Frozen linear layers keep no input. Attention keeps its queries, keys, values and output (eager
    attention also its weights, here for sequences of 512 tokens). ``fused`` modules keep the rest
    but once: two inputs of norms and, of a gated MLP, the gate and what it lets through. Otherwise
    norms also keep what they have scaled, in float32, and MLPs three intermediate rows.
    """
    config: Any = getattr(unwrap(decoder.model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = decoder.hidden_size
    inner = _size(config, ("intermediate_size", "n_inner", "ffn_dim"), 4 * hidden)
    heads = _size(config, ("num_attention_heads", "n_head"), max(1, hidden // 64))
    item = next(decoder.embedding.parameters()).element_size()
    if fused:
        block = item * (6 * hidden + 2 * inner)
    else:
        block = item * (8 * hidden + 3 * inner) + 4 * 2 * hidden
    if not fused and getattr(config, "_attn_implementation", None) == "eager":
        block += heads * 512 * (item + 4)
    # Gradients flow through one block at a time, beside what all of them keep.
    return decoder.n_blocks * block + 2 * block


def automatic_budget(decoder: DecoderView, *, fused: bool = False) -> tuple[int, float]:
    """Tokens per model call that fit the device, and the tokens that one row of logits is worth.

    The same on every run on a machine's CPU, so that a run that is taken up again makes the same
    batches; on a GPU it follows the free memory.
    """
    weight = next(decoder.embedding.parameters())
    if decoder.device.type == "cuda":
        available = _GPU_SHARE * torch.cuda.mem_get_info(decoder.device)[0]
    else:
        available = min(_CPU_BYTES, _physical_bytes() // 4)
    per_token = activation_bytes(decoder, fused=fused)
    # The logits, their float32 copy and its gradient.
    logits = weight.shape[0] * (2 * weight.element_size() + 8)
    return int(min(_MOST, max(_LEAST, available // per_token))), logits / per_token


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    found = next((value for name in names if (value := getattr(config, name, None))), otherwise)
    return int(max(found) if isinstance(found, list | tuple) else found)  # one for each block
