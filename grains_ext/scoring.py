"""Log-probabilities of continuations and perplexity, in length-sorted batches."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from grains_ext.decoder import unwrap
from grains_ext.encoding import TokenIds

# Float32 logits that token_logprobs makes at a time (64 MiB).
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class ContinuationScore:
    """log p of a continuation: the sum over its tokens (natural log), and how many there are."""

    total: float
    n_tokens: int

    @property
    def mean(self) -> float:
        """Per token: the length-normalised score."""
        return self.total / self.n_tokens


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no weight gradients; every module and weight as before afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def pad_batch(
    sequences: Sequence[TokenIds], pad_id: int = 0, side: Literal["left", "right"] = "left"
) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], of sequences padded to the longest."""
    width = max(len(s) for s in sequences)
    ids, mask = [], []
    for sequence in sequences:
        filler, real = [pad_id] * (width - len(sequence)), list(sequence)
        ids.append(filler + real if side == "left" else real + filler)
        blank, ones = [0] * len(filler), [1] * len(real)
        mask.append(blank + ones if side == "left" else ones + blank)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Positions that count only real tokens, int64 [B, T]; 0 at padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length so that rows x longest <= max_batch_tokens.

    A sequence longer than the budget is a batch of its own.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be >= 1, got {max_batch_tokens}")
    groups: list[list[int]] = []
    # Longest first: what would run out of memory does so at once.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def forward_logits(
    model: nn.Module,
    attention_mask: Tensor | None,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    last: int | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
) -> Tensor:
    """Logits [B, T, V], or [B, last, V] for the last positions only, of one forward.

    Positions follow a 2-D attention mask, so left padding changes nothing; with any other mask give
    them. The head runs only at `last` positions where the model's forward takes logits_to_keep.
    past_key_values: what the columns before are read from; it grows by this call.
    """
    accepted = inspect.signature(unwrap(model).forward).parameters
    kwargs: dict[str, object] = {"attention_mask": attention_mask, "use_cache": False}
    if past_key_values is not None:
        kwargs |= {"past_key_values": past_key_values, "use_cache": True}
    if "position_ids" in accepted:
        if position_ids is None and attention_mask is not None:
            position_ids = position_ids_of(attention_mask)
        kwargs["position_ids"] = position_ids
    if last is not None and "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = last
    if inputs_embeds is not None:
        kwargs["inputs_embeds"] = inputs_embeds
    else:
        kwargs["input_ids"] = input_ids
    logits = model(**kwargs).logits
    return logits if last is None else logits[:, -last:]


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] in float32: logits [..., V], targets int64 [...] -> [...]."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    flat, flat_targets = logits.flatten(0, -2), targets.flatten()
    parts = [
        part.float().gather(-1, target[:, None])[:, 0] - part.float().logsumexp(-1)
        for part, target in zip(flat.split(rows), flat_targets.split(rows), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


@torch.no_grad()
def continuation_logprobs(
    model: nn.Module,
    items: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_batch_tokens: int = 4096,
    pad_id: int = 0,
) -> list[ContinuationScore]:
    """log p(continuation | prompt) for each (prompt_ids, continuation_ids), in the items' order.

    Every token is scored at the position before it. max_batch_tokens bounds rows x padded length
    of a forward. Items with the same input (one-token continuations of one prompt) share it.

    Raises ValueError where a prompt or continuation has no token.
    """
    by_input: dict[TokenIds, list[int]] = {}
    for i, (prompt_ids, continuation_ids) in enumerate(items):
        if not prompt_ids or not continuation_ids:
            raise ValueError(f"item {i}: prompt and continuation need at least one token each")
        # The last token is a target only.
        by_input.setdefault((*prompt_ids, *continuation_ids[:-1]), []).append(i)
    inputs = list(by_input)
    device = next(model.parameters()).device
    scores: dict[int, ContinuationScore] = {}
    with frozen(model):
        for group in batches([len(s) for s in inputs], max_batch_tokens):
            input_ids, attention_mask = pad_batch([inputs[g] for g in group], pad_id)
            members = [(row, i) for row, g in enumerate(group) for i in by_input[inputs[g]]]
            longest = max(len(items[i][1]) for _, i in members)
            logits = forward_logits(
                model, attention_mask.to(device), input_ids=input_ids.to(device), last=longest
            )
            targets, mask = pad_batch([items[i][1] for _, i in members])
            rows = torch.tensor([row for row, _ in members], device=device)
            logprobs = token_logprobs(logits[rows], targets.to(device))
            logprobs = logprobs.masked_fill(mask.to(device) == 0, 0.0)
            for (_, i), total in zip(members, logprobs.double().sum(-1).tolist(), strict=True):
                scores[i] = ContinuationScore(total, len(items[i][1]))
    return [scores[i] for i in range(len(items))]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    sequences: Sequence[TokenIds],
    *,
    max_batch_tokens: int = 4096,
    pad_id: int = 0,
) -> float:
    """exp of the mean negative log p per token, over all tokens of all sequences but each first.

    Raises ValueError where no sequence has two tokens.
    """
    scored = [s for s in sequences if len(s) > 1]
    if not scored:
        raise ValueError("perplexity needs a sequence of at least two tokens")
    device = next(model.parameters()).device
    total = 0.0
    with frozen(model):
        for group in batches([len(s) - 1 for s in scored], max_batch_tokens):
            input_ids, mask = pad_batch([scored[g][:-1] for g in group], pad_id)
            targets, _ = pad_batch([scored[g][1:] for g in group], pad_id)
            logits = forward_logits(model, mask.to(device), input_ids=input_ids.to(device))
            logprobs = token_logprobs(logits, targets.to(device))
            total += float(logprobs[mask.to(device) == 1].double().sum())
    return math.exp(-total / sum(len(s) - 1 for s in scored))
