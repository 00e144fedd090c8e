"""Greedy generation in batches, and whether what was generated is the wanted answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from grains_ext.batching import batches, pad_batch, pad_id_of
from grains_ext.decoder import ids_device, unwrap
from grains_ext.encoding import TokenIds
from grains_ext.pair_batches import iter_prompt_batches
from grains_ext.pairs import Message
from grains_ext.scoring import frozen


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    pad_id: int,
    max_batch_tokens: int = 4096,
) -> list[str]:
    """What the model says after each prompt: greedy, up to EOS, special tokens left out.

    The model's own generation settings are set aside, but for its end tokens. ``prompts`` are token
    ids; those of like length share a batch, padded on the left, of at most ``max_batch_tokens``
    tokens with the ones to be generated. Results come in the order of prompts.
    """
    texts = [""] * len(prompts)
    device = ids_device(model)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with _greedy(model, tokenizer, max_new_tokens, pad_id) as said:
        for group in batches(lengths, max_batch_tokens):
            input_ids, attention_mask = pad_batch([prompts[index] for index in group], pad_id)
            inputs = {
                "input_ids": input_ids.to(device),
                "attention_mask": attention_mask.to(device),
            }
            for index, text in zip(group, said(inputs), strict=True):
                texts[index] = text
    return texts


def generate_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[tuple[str | list[Message], Sequence[Any] | None]],
    *,
    max_new_tokens: int,
    max_batch_tokens: int = 4096,
) -> list[str]:
    """`generate` for prompts that are not encoded yet, each with its images or None.

    processor: the model's tokenizer, or its processor, which prompts with images need.

    Raises ValueError naming the prompt that does not encode.
    """
    texts = [""] * len(prompts)
    tokenizer = getattr(processor, "tokenizer", processor)
    stream = iter_prompt_batches(
        processor, prompts, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
    )
    with _greedy(model, tokenizer, max_new_tokens, pad_id_of(processor)) as said:
        for batch in stream:
            for index, text in zip(batch.indices, said(batch.arguments(model)), strict=True):
                texts[index] = text
    return texts


@contextmanager
def _greedy(
    model: Any, tokenizer: Any, max_new_tokens: int, pad_id: int
) -> Iterator[Callable[[dict[str, Tensor]], list[str]]]:
    """A function from generation's inputs to what the model says after them, a text per row."""
    inner: Any = unwrap(model)
    end_ids = _end_ids(inner, tokenizer)
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
    )

    def said(inputs: dict[str, Tensor]) -> list[str]:
        output = model.generate(**inputs)
        texts = []
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
            texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
        return texts

    with frozen(model), _generation_config(inner, plain):
        yield said


def says(generated: str, answer: str) -> bool:
    """Whether the generated text is the answer, or begins with it and a word ends there.

    Runs of white space count as one space, those at either end as none; case counts. "blue." and
    "blue or so" say "blue"; "blueish", "Blue" and "it is blue" do not.
    """
    generated, answer = " ".join(generated.split()), " ".join(answer.split())
    if not generated.startswith(answer):
        return False
    after = generated[len(answer) : len(answer) + 1]
    return not (after.isalnum() and answer[-1:].isalnum())


def mentions(generated: str, answer: str) -> bool:
    """Whether the answer's words stand in the generated text, as whole words in their order.

    Case, punctuation, articles and white space do not count.
    """
    words = _bare(answer)
    return bool(words) and f" {words} " in f" {_bare(generated)} "


def holds(generated: str, answer: str) -> bool:
    """`mentions`, also within words: "it conflicts" holds "conflict"."""
    words = _bare(answer)
    return bool(words) and words in _bare(generated)


def _bare(text: str) -> str:
    words = re.sub(r"[\W_]+", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Takes the place of the model's own, whose settings would fill whatever a call leaves open:
    penalties and n-gram bans that make greedy decoding something else."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}
