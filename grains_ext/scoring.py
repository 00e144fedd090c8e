"""Log-probabilities of continuations, margins of pairs and perplexity, in sorted batches."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from grains_ext.batching import (
    batches,
    pad_batch,
    pad_id_of,
    position_ids_of,
    token_divergences,
    token_logprobs,
)
from grains_ext.decoder import check_length, ids_device, prompt_lengths, unwrap
from grains_ext.encoding import TokenIds, pair_name
from grains_ext.pair_batches import encode_each, iter_scored_batches
from grains_ext.pairs import PreferencePair


@dataclass(frozen=True)
class ContinuationScore:
    """log p of a continuation: the sum over its tokens (natural log), and how many there are."""

    total: float
    n_tokens: int

    @property
    def mean(self) -> float:
        """Per token: the length-normalised score."""
        return self.total / self.n_tokens


@dataclass(frozen=True)
class Margins:
    """Of one pair, in nats: positive where the model prefers the chosen answer."""

    total: float
    """log p(chosen | prompt) - log p(rejected | prompt), each summed over its tokens."""
    per_token: float
    """The same with each log-probability divided by its number of tokens, so that a short answer
    has no head start."""

    @classmethod
    def between(cls, chosen: ContinuationScore, rejected: ContinuationScore) -> "Margins":
        return cls(chosen.total - rejected.total, chosen.mean - rejected.mean)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no weight gradients; every module and weight as before afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


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
    logits: Tensor = model(**kwargs).logits
    # A slice of all of them would still cost its gradient a copy.
    return logits if last in (None, logits.shape[1]) else logits[:, -last:]


@torch.no_grad()
def continuation_logprobs(
    model: nn.Module,
    items: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_batch_tokens: int = 4096,
    pad_id: int = 0,
    tell_prompts: bool = True,
) -> list[ContinuationScore]:
    """log p(continuation | prompt) for each (prompt_ids, continuation_ids), in the items' order.

    Every token is scored at the position before it. max_batch_tokens bounds rows x padded length
    of a forward. Items with the same input (one-token continuations of one prompt) share it.
    tell_prompts: steering that depends on where a prompt ends is told where each does.

    Raises ValueError where a prompt or continuation has no token, or both are longer than the model
    has positions.
    """
    by_input: dict[tuple[TokenIds, int], list[int]] = {}
    for i, (prompt_ids, continuation_ids) in enumerate(items):
        if not prompt_ids or not continuation_ids:
            raise ValueError(f"item {i}: prompt and continuation need at least one token each")
        # The last token is a target only.
        key = ((*prompt_ids, *continuation_ids[:-1]), len(prompt_ids))
        by_input.setdefault(key, []).append(i)
    inputs = list(by_input)
    if inputs:
        widest = max(inputs, key=lambda key: len(key[0]))
        check_length(model, len(widest[0]), f"item {by_input[widest][0]}")
    device = ids_device(model)
    scores: dict[int, ContinuationScore] = {}
    with frozen(model):
        for group in batches([len(ids) for ids, _ in inputs], max_batch_tokens):
            input_ids, attention_mask = pad_batch([inputs[g][0] for g in group], pad_id)
            width = input_ids.shape[1]
            ends = [width - len(ids) + length for ids, length in (inputs[g] for g in group)]
            members = [(row, i) for row, g in enumerate(group) for i in by_input[inputs[g]]]
            longest = max(len(items[i][1]) for _, i in members)
            with prompt_lengths(model, ends) if tell_prompts else nullcontext():
                logits = forward_logits(
                    model, attention_mask.to(device), input_ids=input_ids.to(device), last=longest
                )
            targets, mask = pad_batch([items[i][1] for _, i in members])
            if len(members) > len(group):  # or the copy would be all there is once more
                logits = logits[torch.tensor([row for row, _ in members], device=device)]
            logprobs = token_logprobs(logits, targets.to(device))
            logprobs = logprobs.masked_fill(mask.to(device) == 0, 0.0)
            for (_, i), total in zip(members, logprobs.double().sum(-1).tolist(), strict=True):
                scores[i] = ContinuationScore(total, len(items[i][1]))
    return [scores[i] for i in range(len(items))]


def pair_logprobs(
    model: nn.Module,
    processor: Any,
    pairs: Sequence[PreferencePair],
    *,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
) -> list[tuple[ContinuationScore, ContinuationScore]]:
    """log p of each pair's chosen and rejected answer, in order; text and images.

    processor: the model's tokenizer, or its processor, which pairs with images need.
    separator: joins prompt and continuation; None is the rule of `encode_pair`.
    max_batch_tokens: bounds rows x padded length of a forward, image tokens included.

    Raises ValueError naming the pair that does not encode, or is longer than the model has
    positions.
    """
    scores: dict[int, tuple[ContinuationScore, ContinuationScore]] = {}
    texts = {index: pair for index, pair in enumerate(pairs) if not pair.images}
    encoded = dict(encode_each(processor, texts, separator=separator))
    for index, each in encoded.items():
        # The last token of a continuation is predicted, never read.
        check_length(model, len(each) - 1, pair_name(index, pairs[index]))
    sides = continuation_logprobs(
        model,
        [
            (each.ids.prompt_ids, continuation)
            for each in encoded.values()
            for continuation in (each.ids.chosen_ids, each.ids.rejected_ids)
        ],
        max_batch_tokens=max_batch_tokens,
        pad_id=pad_id_of(processor),
    )
    scores |= zip(encoded, zip(sides[::2], sides[1::2], strict=True), strict=True)
    with_images = {index: pair for index, pair in enumerate(pairs) if pair.images}
    with frozen(model), torch.no_grad():
        for batch in iter_scored_batches(
            processor, with_images, separator=separator, max_batch_tokens=max_batch_tokens
        ):
            with prompt_lengths(model, batch.prompt_lengths()):
                logprobs = batch.logprobs(model(**batch.arguments(model)).logits)
            chosen, rejected = (
                map(ContinuationScore, totals.tolist(), counts.tolist())
                for totals, counts in zip(logprobs, batch.n_tokens(), strict=True)
            )
            scores |= zip(batch.indices, zip(chosen, rejected, strict=True), strict=True)
    return [scores[index] for index in range(len(pairs))]


def pair_margins(
    model: nn.Module,
    processor: Any,
    pairs: Sequence[PreferencePair],
    *,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
) -> list[Margins]:
    """Each pair's margins, in order. A model is right on a pair where its margin is > 0.

    Arguments and errors as in `pair_logprobs`.
    """
    scores = pair_logprobs(
        model, processor, pairs, separator=separator, max_batch_tokens=max_batch_tokens
    )
    return [Margins.between(chosen, rejected) for chosen, rejected in scores]


def text_logprobs(
    model: nn.Module,
    sequences: Sequence[TokenIds],
    *,
    max_batch_tokens: int = 4096,
    pad_id: int = 0,
    as_generated: bool = False,
) -> list[ContinuationScore]:
    """log p of each sequence of at least two tokens, given its first token.

    as_generated: to steering by position the tokens after the first are generated, not a prompt.
    """
    return continuation_logprobs(
        model,
        [(sequence[:1], sequence[1:]) for sequence in sequences],
        max_batch_tokens=max_batch_tokens,
        pad_id=pad_id,
        tell_prompts=as_generated,
    )


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
    scores = text_logprobs(model, scored, max_batch_tokens=max_batch_tokens, pad_id=pad_id)
    total = math.fsum(score.total for score in scores)
    return math.exp(-total / sum(score.n_tokens for score in scores))


@torch.no_grad()
def text_divergences(
    model: nn.Module,
    sequences: Sequence[TokenIds],
    steered: Callable[[], AbstractContextManager[Any]],
    *,
    max_batch_tokens: int = 4096,
    pad_id: int = 0,
    as_generated: bool = False,
) -> list[float]:
    """KL(unsteered || steered) of the next token, summed over each sequence's tokens but the last.

    steered: makes the context in which the model is steered, as ``lambda: vectors.applied(model)``;
        it is entered once per batch. KL(p || q) = sum_i p_i (log p_i - log q_i) over the
        vocabulary, in nats; 0 where steering changes nothing. Over `len(sequence) - 1` tokens it is
        a mean per token.
    as_generated: as of `text_logprobs`.
    """
    device = ids_device(model)
    divergences: dict[int, float] = {}
    with frozen(model):
        for group in batches([len(s) - 1 for s in sequences], max_batch_tokens):
            input_ids, mask = pad_batch([sequences[g][:-1] for g in group], pad_id)
            input_ids, mask = input_ids.to(device), mask.to(device)
            before = forward_logits(model, mask, input_ids=input_ids)
            ends = (1 + (mask == 0).sum(-1)).tolist()
            with steered(), prompt_lengths(model, ends) if as_generated else nullcontext():
                after = forward_logits(model, mask, input_ids=input_ids)
            real = mask == 1
            sums = torch.zeros(real.shape, dtype=torch.float64, device=device)
            sums[real] = token_divergences(before[real], after[real]).double()
            divergences |= zip(group, sums.sum(-1).tolist(), strict=True)
    return [divergences[index] for index in range(len(sequences))]
