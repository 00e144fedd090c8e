"""Neutral text: what steering should leave alone, and how far it moves the model there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from grains_ext.batching import token_divergences, token_logprobs
from grains_ext.decoder import DecoderView, prompt_lengths, unwrap
from grains_ext.pair_batches import PromptBatch, encode_batches, iter_prompt_batches
from grains_ext.pairs import PreferencePair
from grains_ext.steering.positions import Positions, reads_as_generated

# Unsteered logits that are kept between calls, in elements; beyond, they are computed again.
_KEPT_ELEMENTS = 1 << 26

# A text, or a pair: its chosen answer after its prompt and images.
Neutral = str | PreferencePair
_Text = TypeVar("_Text", bound=Neutral)


def several_texts(neutral_texts: Iterable[_Text] | None) -> list[_Text] | None:
    """Raises ValueError for one text, which is also a sequence: of its characters."""
    if isinstance(neutral_texts, str):
        raise ValueError("neutral_texts must be several texts, got one: put it in a list")
    return None if neutral_texts is None else list(neutral_texts)


@dataclass(frozen=True)
class Drift:
    """Of the model as it is steered now, against itself unsteered, over the neutral texts."""

    perplexity_ratio: float
    """Steered over unsteered perplexity; nan or inf where it is not finite."""
    kl: float | None
    """KL(unsteered || steered) of the next token, mean per token in nats; None if not asked for."""


@dataclass(frozen=True)
class _Batch:
    """Model inputs, which tokens are scored ([B, T - 1], of all but the first column), and where
    generation begins for steering that asks, in columns; None: it is all prompt."""

    batch: PromptBatch
    scored: Tensor
    prompt_lengths: list[int] | None


class NeutralTexts:
    """Neutral texts in batches, with the unsteered model's answers to them.

    Of a text every token but the first is scored, of a pair those of its chosen answer. Without
    texts it is ``pairs``' prompts: there text tokens are scored, and the place where the answer
    would begin is not looked at. Make it, and call it, inside `attribution.shortcuts.alone_with`.

    positions: of the steering. To that of generated tokens a text is one that the model writes,
        from its start; to all other, and to gates, a prompt.

    Raises ValueError where there is nothing to score, or the unsteered perplexity is not finite.
    """

    def __init__(
        self,
        view: DecoderView,
        processor: Any,
        texts: Sequence[Neutral] | None,
        pairs: Sequence[PreferencePair],
        *,
        separator: str | None,
        max_batch_tokens: int,
        positions: Positions = "all",
    ) -> None:
        self._view = view
        if texts is None:
            prompts: list[Any] = [(pair.prompt, pair.images) for pair in pairs]
        else:
            prompts = [(text, None) for text in texts if isinstance(text, str) and text.strip()]
        answered = [pair for pair in texts or () if not isinstance(pair, str)]
        batches = [
            *_prompt_batches(
                view, processor, prompts, max_batch_tokens, reads_as_generated(positions)
            ),
            *_answer_batches(processor, answered, separator, max_batch_tokens),
        ]
        self._batches = [batch for batch in batches if batch.scored.any()]
        if not self._batches:
            raise ValueError("neutral texts: there must be one of at least two tokens")
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT_ELEMENTS
        self._unsteered: float | None = None

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def n_tokens(self, number: int) -> int:
        """Scored tokens of a batch."""
        return int(self._batches[number].scored.sum())

    def n_read(self, number: int) -> int:
        """Tokens of a batch that the model reads, padding included."""
        return int(self._batches[number].batch.inputs["input_ids"].numel())

    def prepare(self) -> None:
        """Measures the unsteered model. Call it before anything steers."""
        with torch.no_grad():
            total = sum(
                float(self._nll(number, self.reference(number))) for number in range(len(self))
            )
        self._unsteered = total / sum(self.n_tokens(number) for number in range(len(self)))
        if not math.isfinite(self._unsteered):
            raise ValueError(
                "the unsteered model's perplexity of the neutral texts is not finite: give other "
                "texts, or load the model in float32 or bfloat16"
            )

    def reference(self, number: int) -> Tensor:
        """Unsteered logits [n tokens, V] of a batch's scored positions; nothing may steer now."""
        kept = self._kept.get(number)
        if kept is None:
            with torch.no_grad():
                kept = self._logits(number)
            if kept.numel() <= self._room:
                self._room -= kept.numel()
                self._kept[number] = kept
        return kept

    def divergence(self, number: int, reference: Tensor) -> Tensor:
        """KL(unsteered || as it is steered now), summed over a batch's scored tokens; for autograd.

        reference: of that batch.
        """
        return token_divergences(reference, self._logits(number)).sum()

    @torch.no_grad()
    def drift(self, steered: Any, *, with_kl: bool) -> Drift:
        """steered: makes the context in which the model is steered; nothing may steer outside it.

        Raises RuntimeError before `prepare`.
        """
        if self._unsteered is None:
            raise RuntimeError("call prepare() first: the unsteered model was not measured")
        nll, kl = 0.0, 0.0
        for number in range(len(self)):
            reference = self.reference(number) if with_kl else None
            with steered():
                logits = self._logits(number)
            nll += float(self._nll(number, logits))
            if reference is not None:
                kl += float(token_divergences(reference, logits).double().sum())
        n = sum(self.n_tokens(number) for number in range(len(self)))
        try:
            ratio = math.exp(nll / n - self._unsteered)
        except OverflowError:
            ratio = math.inf
        return Drift(ratio, kl / n if with_kl else None)

    def _logits(self, number: int) -> Tensor:
        held, model = self._batches[number], self._view.model
        arguments = held.batch.forward_arguments(model)
        told = held.prompt_lengths
        with nullcontext() if told is None else prompt_lengths(model, told):
            logits: Tensor = model(**arguments).logits
        return logits[:, :-1][held.scored.to(logits.device)]

    def _nll(self, number: int, logits: Tensor) -> Tensor:
        held = self._batches[number]
        targets = held.batch.inputs["input_ids"][:, 1:][held.scored].to(logits.device)
        return -token_logprobs(logits, targets).double().sum()


def _prompt_batches(
    view: DecoderView,
    processor: Any,
    prompts: Iterable[Any],
    max_batch_tokens: int,
    generated: bool,
) -> Iterator[_Batch]:
    """prompts: (text or messages, images or None)."""
    image_id = getattr(getattr(unwrap(view.model), "config", None), "image_token_id", None)
    for batch in iter_prompt_batches(
        processor, prompts, max_new_tokens=0, max_batch_tokens=max_batch_tokens
    ):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        scored = mask[:, 1:] & mask[:, :-1]
        if image_id is not None:
            scored &= ids[:, 1:] != image_id
        yield _Batch(batch, scored, (1 + (~mask).sum(1)).tolist() if generated else None)


def _answer_batches(
    processor: Any,
    pairs: Sequence[PreferencePair],
    separator: str | None,
    max_batch_tokens: int,
) -> Iterator[_Batch]:
    # A pair is two rows there, of which one is read here.
    for batch in encode_batches(
        processor, pairs, separator=separator, max_batch_tokens=2 * max_batch_tokens
    ):
        n = len(batch.indices)
        # Every input lists the chosen rows first, as many of them as rejected ones.
        inputs = {
            name: value[: value.shape[0] // 2]
            for name, value in batch.inputs.items()
            if name != "position_ids"
        }
        scored = batch.continuation_mask()[:n]
        ends = (scored.shape[1] - scored.sum(1)).tolist()
        yield _Batch(PromptBatch(batch.indices, inputs), scored[:, 1:], ends)
