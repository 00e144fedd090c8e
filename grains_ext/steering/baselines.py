"""What steering must beat: other directions, in the same units and steered by the same op."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.steering.extract import Masked, last_token_states
from grains_ext.steering.fitting import (
    Aggregate,
    Blocks,
    Signs,
    assemble,
    block_numbers,
    encoded_prompts,
    fit_selections,
    special_ids,
)
from grains_ext.steering.select import top_tokens
from grains_ext.steering.vectors import SteeringVectors


def fit_caa(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    blocks: Blocks = "all",
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """Contrastive Activation Addition: v = mean over pairs of h(chosen) - h(rejected).

    h is the hidden state at the last token of prompt and answer. Rimsky et al., "Steering Llama 2
    via Contrastive Activation Addition", 2024, equation 1. Arguments and result as in `fit`.
    """
    pairs = list(pairs)
    prompts = encoded_prompts(tokenizer, pairs, separator)
    view = decoder or DecoderView.of(model)
    encoded = [encode_pair(tokenizer, pair, separator=separator) for pair in pairs]
    sequences = [
        *(Masked(prompt) for prompt in prompts),
        *(Masked(ids.prompt_ids + ids.chosen_ids) for ids in encoded),
        *(Masked(ids.prompt_ids + ids.rejected_ids) for ids in encoded),
    ]
    states = last_token_states(
        view, sequences, block_numbers(view, blocks), max_batch_tokens=max_batch_tokens
    )
    directions, hidden = {}, {}
    for block, values in states.items():
        hidden[block], chosen, rejected = values.chunk(3)
        directions[block] = (chosen - rejected).mean(0)
    return assemble(model, directions, hidden, {"method": "caa", "n_pairs": len(pairs)})


def fit_random_tokens(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    k: int = 10,
    seed: int = 0,
    blocks: Blocks = "all",
    method: Aggregate = "mean",
    signs: Signs = "both",
    baseline: str | Tensor = "bos",
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """`fit` with a standard normal draw for each token's attribution score (its ablation).

    seed: of the draws. Other arguments and result as in `fit`.
    """
    prompts = encoded_prompts(tokenizer, list(pairs), separator)
    generator = torch.Generator().manual_seed(seed)
    special = special_ids(tokenizer)
    selections = [
        top_tokens(
            prompt,
            torch.randn(len(prompt), generator=generator).numpy(),
            k,
            exclude_ids=special,
        )
        for prompt in prompts
    ]
    return fit_selections(
        model,
        tokenizer,
        prompts,
        selections,
        blocks=blocks,
        method=method,
        signs=signs,
        baseline=baseline,
        max_batch_tokens=max_batch_tokens,
        decoder=decoder,
        metadata={"method": "random_tokens", "k": k, "seed": seed},
    )


def fit_random_direction(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    seed: int = 0,
    blocks: Blocks = "all",
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """A uniformly random direction per block, as long as `fit`'s: what any push at all does.

    The pairs give the length alone. seed: of the draw; one block's direction does not depend on
    which others are asked for. Other arguments and result as in `fit`.
    """
    prompts = encoded_prompts(tokenizer, list(pairs), separator)
    view = decoder or DecoderView.of(model)
    hidden = last_token_states(
        view,
        [Masked(prompt) for prompt in prompts],
        block_numbers(view, blocks),
        max_batch_tokens=max_batch_tokens,
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(view.n_blocks, view.hidden_size, generator=generator)
    return assemble(
        model,
        {block: drawn[block] for block in hidden},
        hidden,
        {"method": "random_direction", "seed": seed, "n_pairs": len(prompts)},
    )
