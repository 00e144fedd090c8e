"""Preference pairs, text or with images, as padded model inputs with their log-probabilities."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from grains_ext.batching import batches, pad_batch, pad_id_of, position_ids_of, token_logprobs
from grains_ext.decoder import check_length, ids_device, unwrap
from grains_ext.encoding import EncodedPair, TokenIds, encode_pair, pair_name
from grains_ext.pairs import Message, PreferencePair

# One value per token of the prompt; a continuation is text, type 0.
_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class PairBatch:
    """Some pairs as one model call of 2 n rows.

    Row i < n is the prompt and chosen continuation of pair ``indices[i]``, row n + i its prompt and
    rejected continuation. Rows are padded on the left, so that all of them end in the last column.

    inputs: the model's keyword arguments, on the CPU: input_ids and attention_mask int64 [2 n, T];
        position_ids for text alone (with images the model makes its own); pixels, their sizes and
        token types with images. ``arguments`` fits them to a model.
    chosen_ids, rejected_ids: the continuations, one per pair.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]
    chosen_ids: tuple[TokenIds, ...]
    rejected_ids: tuple[TokenIds, ...]

    @property
    def n_scored(self) -> int:
        """How many of the last columns hold the logits that ``logprobs`` reads."""
        return 1 + max(map(len, self._continuations))

    @property
    def _continuations(self) -> tuple[TokenIds, ...]:
        return self.chosen_ids + self.rejected_ids

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The inputs on the model's device, pixels in its dtype, as its forward takes them.

        With logits_to_keep where the model knows it: the head runs at the scored positions only.
        """
        return _forward_arguments(self, model, self.n_scored)

    def logprobs(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the chosen and of the rejected continuations, summed over their tokens.

        logits: [2 n, T, V] for ``inputs``, or their last columns, at least ``n_scored`` of them.

        Returns two float32 [n], in nats and in the order of ``indices``; differentiable. Raises
        ValueError for logits of another shape.

            chosen, rejected = batch.logprobs(model(**batch.arguments(model)).logits)
        """
        n, continuations = len(self.indices), self._continuations
        if logits.ndim != 3 or logits.shape[0] != 2 * n or logits.shape[1] < self.n_scored:
            raise ValueError(
                f"logits must be [{2 * n}, >= {self.n_scored}, vocabulary] for {n} pairs, got "
                f"{list(logits.shape)}"
            )
        # Each token is scored at the column before it, and the last token is in the last column.
        places = [
            (row, place - len(ids) - 1, token)
            for row, ids in enumerate(continuations)
            for place, token in enumerate(ids)
        ]
        row, column, token = torch.tensor(places, device=logits.device).unbind(-1)
        scores = token_logprobs(logits[row, column], token)
        totals = scores.new_zeros(2 * n).index_add(0, row, scores)
        return totals[:n], totals[n:]

    def n_tokens(self) -> tuple[Tensor, Tensor]:
        """The continuations' numbers of tokens, two int64 [n]: chosen and rejected."""
        lengths = torch.tensor([len(ids) for ids in self._continuations])
        n = len(self.indices)
        return lengths[:n], lengths[n:]

    def prompt_lengths(self) -> list[int]:
        """The column at which each row's prompt ends, for `decoder.prompt_lengths`."""
        width = self.inputs["input_ids"].shape[1]
        return [width - len(ids) for ids in self._continuations]

    def continuation_mask(self) -> Tensor:
        """Which of the rows' tokens belong to the continuation: bool [2 n, T]."""
        mask = torch.zeros_like(self.inputs["attention_mask"], dtype=torch.bool)
        for row, ids in enumerate(self._continuations):
            mask[row, -len(ids) :] = True
        return mask


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts as the inputs of one ``model.generate``, a row each, padded on the left.

    inputs: as of a PairBatch, with no position_ids: generation makes them.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The inputs on the model's device, pixels in its dtype."""
        return _fitted(self, model)

    def forward_arguments(self, model: nn.Module, *, last: int | None = None) -> dict[str, Any]:
        """The same for one forward, which generates nothing: positions, and no cache.

        last: logits of so many last columns only, where the model's forward takes logits_to_keep.
        """
        arguments = self.arguments(model) | {"use_cache": False}
        accepted = inspect.signature(unwrap(model).forward).parameters
        # With images a model makes positions of its own.
        if "position_ids" in accepted and set(self.inputs) <= {"input_ids", "attention_mask"}:
            arguments["position_ids"] = position_ids_of(arguments["attention_mask"])
        if last is not None and "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = last
        return arguments


@dataclass(frozen=True)
class NextTokenBatch:
    """Pairs whose answers are one token each: a row per prompt is enough for all that share it.

    rows: which row of the inputs each of ``indices`` reads. chosen_ids, rejected_ids: int64 [n].
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]
    rows: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """As of a PairBatch."""
        return _forward_arguments(self, model, 1)

    def logprobs(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As of a PairBatch, from logits [rows, >= 1, V]."""
        last = logits[:, -1][self.rows.to(logits.device)]
        chosen, rejected = (
            token_logprobs(last, ids.to(last.device))
            for ids in (self.chosen_ids, self.rejected_ids)
        )
        return chosen, rejected

    def n_tokens(self) -> tuple[Tensor, Tensor]:
        return torch.ones_like(self.chosen_ids), torch.ones_like(self.rejected_ids)

    def prompt_lengths(self) -> list[int]:
        """As of a PairBatch: the rows are prompts and no more."""
        rows, width = self.inputs["input_ids"].shape
        return [width] * rows


@dataclass(frozen=True)
class EncodedInputs:
    """A pair's token ids, and what the model takes for its images beside them."""

    ids: EncodedPair
    images: dict[str, Tensor]

    @property
    def answers_are_tokens(self) -> bool:
        """Whether both answers are one token long."""
        return len(self.ids.chosen_ids) == len(self.ids.rejected_ids) == 1

    def __len__(self) -> int:
        return len(self.ids.prompt_ids) + max(len(self.ids.chosen_ids), len(self.ids.rejected_ids))


def encode_batches(
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
) -> list[PairBatch]:
    """All pairs in batches of like length, the longest first.

    processor: the model's tokenizer, or its processor, which pairs with images need.
    separator: joins prompt and continuation; None is the rule of `encode_pair`.
    max_batch_tokens: bounds rows x padded length of a batch, image tokens included; a pair that is
        longer is a batch of its own. Pairs with images never share a batch with others.

    The pixels of all pairs are in memory at once; ``iter_batches`` holds a few pairs' at a time.

    Raises ValueError naming the pair that does not encode.
    """
    pairs = list(pairs)
    return list(
        iter_batches(
            processor,
            pairs,
            separator=separator,
            max_batch_tokens=max_batch_tokens,
            window=max(1, len(pairs)),
        )
    )


def iter_batches(
    processor: Any,
    pairs: Iterable[PreferencePair] | Mapping[int, PreferencePair],
    *,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
    window: int = 64,
) -> Iterator[PairBatch]:
    """`encode_batches` for one pass over any number of pairs: ``window`` are encoded at a time.

    pairs: where it is a mapping, its keys are the batches' indices.
    """
    for members in _windows(encode_each(processor, pairs, separator=separator), window):
        for group in _groups(members, max_batch_tokens, rows=2):
            yield _pair_batch(group, pad_id_of(processor))


def iter_scored_batches(
    processor: Any,
    pairs: Mapping[int, PreferencePair],
    *,
    separator: str | None = None,
    max_batch_tokens: int = 4096,
    window: int = 64,
) -> Iterator[PairBatch | NextTokenBatch]:
    """`iter_batches` for scoring alone: answers of one token cost a row per prompt, not two a pair.

    Pairs share a row where they have the same prompt and the same tuple of images.
    """
    pad_id = pad_id_of(processor)
    for members in _windows(encode_each(processor, pairs, separator=separator), window):
        longer = [member for member in members if not member[1].answers_are_tokens]
        for group in _groups(longer, max_batch_tokens, rows=2):
            yield _pair_batch(group, pad_id)
        sharing: dict[tuple[TokenIds, int], list[Member]] = {}
        for index, encoded in members:
            if encoded.answers_are_tokens:
                key = (encoded.ids.prompt_ids, id(pairs[index].images))
                sharing.setdefault(key, []).append((index, encoded))
        firsts = {same[0][0]: same for same in sharing.values()}
        for group in _groups([same[0] for same in firsts.values()], max_batch_tokens):
            yield _next_token_batch([firsts[index] for index, _ in group], pad_id)


def iter_prompt_batches(
    processor: Any,
    prompts: Iterable[tuple[str | list[Message], Sequence[Any] | None]],
    *,
    max_new_tokens: int,
    max_batch_tokens: int = 4096,
    window: int = 64,
) -> Iterator[PromptBatch]:
    """Prompts, each with its images or None, for generation; ``window`` are encoded at a time.

    max_batch_tokens: bounds rows x (padded length + max_new_tokens) of a batch.
    Raises ValueError naming the prompt that does not encode, as "pair" and its place.
    """
    bare = (
        (index, EncodedInputs(EncodedPair(encoded.ids.prompt_ids, (), ()), encoded.images))
        for index, encoded in encode_each(processor, _as_pairs(prompts))
    )
    for members in _windows(bare, window):
        for group in _groups(members, max_batch_tokens, extra=max_new_tokens):
            encoded = [each for _, each in group]
            rows = [each.ids.prompt_ids for each in encoded]
            inputs = _inputs(encoded, rows, pad_id_of(processor))
            yield PromptBatch(tuple(index for index, _ in group), inputs)


def _as_pairs(
    prompts: Iterable[tuple[str | list[Message], Sequence[Any] | None]],
) -> Iterator[PreferencePair]:
    """The answers of these pairs play no part; a pair is what every encoder takes."""
    for index, (prompt, images) in enumerate(prompts):
        try:
            yield PreferencePair(prompt, "a", "b", tuple(images or ()))
        except ValueError as error:
            raise ValueError(f"pair {index}: {error}") from error


def encode_each(
    processor: Any,
    pairs: Iterable[PreferencePair] | Mapping[int, PreferencePair],
    *,
    separator: str | None = None,
) -> Iterator[tuple[int, EncodedInputs]]:
    """Each pair encoded, with its place or key. Raises ValueError naming the one that is not."""
    for index, pair in pairs.items() if isinstance(pairs, Mapping) else enumerate(pairs):
        try:
            yield index, _encode(processor, pair, separator)
        except ValueError as error:
            raise ValueError(f"{pair_name(index, pair)}: {error}") from error


def _encode(processor: Any, pair: PreferencePair, separator: str | None) -> EncodedInputs:
    if not pair.images:
        return EncodedInputs(encode_pair(processor, pair, separator=separator), {})
    from grains_ext.vision.encoding import encode_image_pair  # it needs Pillow, text does not

    encoded = encode_image_pair(processor, pair, separator=separator)
    return EncodedInputs(encoded.pair, encoded.inputs)


Member = tuple[int, EncodedInputs]


def _windows(members: Iterable[Member], size: int) -> Iterator[list[Member]]:
    if size < 1:
        raise ValueError(f"window must be >= 1, got {size}")
    stream = iter(members)
    while window := list(islice(stream, size)):
        yield window


def _groups(
    members: Sequence[Member], max_batch_tokens: int, *, rows: int = 1, extra: int = 0
) -> Iterator[list[Member]]:
    """Members that go into one call. Each takes ``rows`` rows of its length and ``extra``."""
    # A model gets pixels for every row of a call or for none, and the same kinds of them.
    kinds: dict[frozenset[str], list[Member]] = {}
    for member in members:
        kinds.setdefault(frozenset(member[1].images), []).append(member)
    for kind in kinds.values():
        lengths = [rows * (len(encoded) + extra) for _, encoded in kind]
        for group in batches(lengths, max_batch_tokens):
            yield [kind[place] for place in group]


def _pair_batch(members: Sequence[Member], pad_id: int) -> PairBatch:
    encoded = [each for _, each in members]
    chosen = tuple(each.ids.chosen_ids for each in encoded)
    rejected = tuple(each.ids.rejected_ids for each in encoded)
    prompts = [each.ids.prompt_ids for each in encoded]
    rows = [p + c for p, c in zip(prompts * 2, chosen + rejected, strict=True)]
    inputs = _inputs(encoded, rows, pad_id)
    if not encoded[0].images:
        inputs["position_ids"] = position_ids_of(inputs["attention_mask"])
    return PairBatch(tuple(index for index, _ in members), inputs, chosen, rejected)


def _next_token_batch(sharing: Sequence[Sequence[Member]], pad_id: int) -> NextTokenBatch:
    """sharing: for each row the members that read it."""
    encoded = [members[0][1] for members in sharing]
    members = [(row, *member) for row, of_row in enumerate(sharing) for member in of_row]
    return NextTokenBatch(
        tuple(index for _, index, _ in members),
        _inputs(encoded, [each.ids.prompt_ids for each in encoded], pad_id),
        torch.tensor([row for row, _, _ in members]),
        torch.tensor([each.ids.chosen_ids[0] for _, _, each in members]),
        torch.tensor([each.ids.rejected_ids[0] for _, _, each in members]),
    )


def _inputs(
    encoded: Sequence[EncodedInputs], rows: Sequence[TokenIds], pad_id: int
) -> dict[str, Tensor]:
    """Model inputs of rows that begin with the prompts, all of them in order once or repeatedly."""
    copies = len(rows) // len(encoded)
    input_ids, attention_mask = pad_batch(rows, pad_id)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name in encoded[0].images:
        parts = [each.images[name] for each in encoded]
        if name in _PER_TOKEN:
            n_prompts = [len(each.ids.prompt_ids) for each in encoded] * copies
            types = [
                (*part[0, :n].tolist(), *[0] * (len(row) - n))
                for part, n, row in zip(parts * copies, n_prompts, rows, strict=True)
            ]
            inputs[name] = pad_batch(types)[0]
        else:
            # Whether a family lists pixels by row, by image or by patch, it does so in rows' order.
            inputs[name] = torch.cat([_concatenated(parts)] * copies)
    return inputs


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension, the others padded with zeros at their ends to the largest.

    Zeros are what the families' processors pad with: a patch or a picture of zeros is none.
    """
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0)
    padded = []
    for part in parts:
        missing = (shape - torch.tensor(part.shape[1:])).tolist()
        # pad takes (before, after) from the last dimension to the first.
        amounts = [amount for after in reversed(missing) for amount in (0, int(after))]
        padded.append(nn.functional.pad(part, amounts))
    return torch.cat(padded)


_Batch = PairBatch | NextTokenBatch | PromptBatch


def _forward_arguments(batch: _Batch, model: nn.Module, n_scored: int) -> dict[str, Any]:
    accepted = inspect.signature(unwrap(model).forward).parameters
    arguments: dict[str, Any] = _fitted(batch, model) | {"use_cache": False}
    if "position_ids" not in accepted:
        arguments.pop("position_ids", None)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = n_scored
    return arguments


def _fitted(batch: _Batch, model: nn.Module) -> dict[str, Any]:
    # The first is the longest.
    check_length(model, batch.inputs["input_ids"].shape[1], f"pair {batch.indices[0]}")
    inner: Any = unwrap(model)
    embedding = inner.get_input_embeddings()
    device, dtype = ids_device(embedding), next(embedding.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.inputs.items()
    }
