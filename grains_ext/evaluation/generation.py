"""Greedy generation in batches, and whether what was generated is the wanted answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from grains_ext.decoder import unwrap
from grains_ext.encoding import TokenIds
from grains_ext.scoring import batches, frozen, pad_batch


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
    device = next(model.parameters()).device
    inner: Any = unwrap(model)
    end_ids = _end_ids(inner, tokenizer)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
    )
    with frozen(model), _generation_config(inner, plain):
        for group in batches(lengths, max_batch_tokens):
            input_ids, attention_mask = pad_batch([prompts[index] for index in group], pad_id)
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
            )
            for index, ids in zip(group, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
                texts[index] = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return texts


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
