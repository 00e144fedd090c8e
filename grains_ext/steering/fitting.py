"""fit: preference pairs to one steering direction per decoder block (GrAInS, arXiv 2507.18043)."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

import grains_ext
from grains_ext.attribution import Attribution, attribute
from grains_ext.attribution.path import Baseline
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.encoding import TokenIds, encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.steering.extract import Masked, last_token_states
from grains_ext.steering.select import Selection, top_tokens
from grains_ext.steering.vectors import SteeringVectors

Blocks = Literal["all"] | Iterable[int]
Aggregate = Literal["mean", "pca"]
Signs = Literal["both", "positive", "negative"]
_SIGNS: dict[Signs, tuple[int, ...]] = {"both": (1, -1), "positive": (1,), "negative": (-1,)}


def fit(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    k: int = 10,
    blocks: Blocks = "all",
    method: Aggregate = "mean",
    signs: Signs = "both",
    attributions: Sequence[Attribution] | None = None,
    baseline: str | Tensor = "bos",
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    progress: bool = True,
    decoder: DecoderView | None = None,
) -> SteeringVectors:
    """Fits steering vectors that turn the model from the rejected toward the chosen answers.

    Of each prompt the k tokens that push hardest toward the chosen answer are masked, and in a
    second run the k that push hardest toward the rejected one. With h the clean hidden state at the
    last prompt token and h+, h- the masked ones, block by block,

        v+ = aggregate(h - h+),  v- = aggregate(h - h-),  v = v+ / ‖v+‖ - v- / ‖v-‖

    over the pairs that have such tokens (GrAInS, section 3.3), and v is scaled to the mean length
    of h, so that a strength means the same in every block and for every method.

    Args:
        model: a transformers causal LM; left as it was.
        tokenizer: its tokenizer.
        pairs: a few dozen pairs.
        k: tokens masked per sign and prompt. Special tokens are never masked.
        blocks: "all" or 0-based block numbers.
        method: the aggregate: "mean", or "pca", the first uncentred principal component with the
            mean's sign. The mean did better on every held-out set that we tried.
        signs: "both", or "positive" (v+ alone) or "negative" (-v- alone). Which is best depends on
            the data: compare them on dev pairs.
        attributions: of the same pairs in the same order, where they are there already.
        baseline: whose embedding a masked token gets, and the attribution's; see `attribute`.
        max_batch_tokens: tokens per model call, padding included.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        progress: show a progress bar.
        decoder: the view of ``model``, where its parts must be named by hand.

    Returns SteeringVectors of strength 1 / (number of blocks): a moderate push, to be tuned.
    metadata["hidden_norms"] and ["shift_norms"] hold each block's mean length of h, and the length
    of v before it was scaled. Raises ValueError for no pairs, an unknown method or block, or
    attributions that do not belong to the pairs.

        vectors = fit(model, tokenizer, pairs, k=5)
    """
    pairs = list(pairs)
    if attributions is None:
        attributions = attribute(
            model,
            tokenizer,
            pairs,
            baseline=baseline,
            max_batch_tokens=max_batch_tokens,
            separator=separator,
            progress=progress,
            decoder=decoder,
        )
    prompts = encoded_prompts(tokenizer, pairs, separator)
    if [tuple(a.token_ids) for a in attributions] != prompts:
        raise ValueError(
            f"the {len(attributions)} attributions do not belong to these {len(pairs)} pairs: "
            "their prompts' tokens differ. Give those of the same pairs in the same order"
        )
    special = special_ids(tokenizer)
    selections = [top_tokens(a.token_ids, a.scores, k, exclude_ids=special) for a in attributions]
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
        metadata={"method": "grains", "k": k},
    )


def fit_selections(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    selections: Sequence[Selection],
    *,
    blocks: Blocks,
    method: Aggregate,
    signs: Signs,
    baseline: str | Tensor,
    max_batch_tokens: int,
    decoder: DecoderView | None,
    metadata: dict[str, Any],
) -> SteeringVectors:
    """The second half of `fit`: from the tokens to mask, one Selection per prompt, to vectors."""
    if method not in ("mean", "pca"):
        raise ValueError(f'method must be "mean" or "pca", got {method!r}')
    if signs not in _SIGNS:
        raise ValueError(f"signs must be one of {', '.join(_SIGNS)}, got {signs!r}")
    view = decoder or DecoderView.of(model)
    numbers = block_numbers(view, blocks)
    start = Baseline(view, getattr(tokenizer, "tokenizer", tokenizer), baseline)
    sequences = [Masked(prompt) for prompt in prompts]
    pushes: list[tuple[int, list[int]]] = []  # (sign, the pairs that have such tokens)
    for sign in _SIGNS[signs]:
        chosen = [s.positive if sign > 0 else s.negative for s in selections]
        with_tokens = [i for i, positions in enumerate(chosen) if positions]
        sequences += [Masked(prompts[i], chosen[i]) for i in with_tokens]
        pushes.append((sign, with_tokens))
    if len(sequences) == len(prompts):
        raise ValueError(
            "no prompt has a token to mask: no attribution score of the sign, special tokens aside"
        )
    states = last_token_states(
        view, sequences, numbers, baseline=start, max_batch_tokens=max_batch_tokens
    )
    n = len(prompts)
    directions = {}
    for block in numbers:
        direction = torch.zeros(view.hidden_size)
        masked = states[block][n:].split([len(members) for _, members in pushes])
        for (sign, members), hidden in zip(pushes, masked, strict=True):
            if members:
                shift = _aggregate(states[block][members] - hidden, method)
                # Unit lengths give both signs the same say. Masking a word of the question moves
                # the state much further than masking a cue: a raw difference follows that alone,
                # and answered fewer dev pairs at every k and baseline that we tried.
                direction += sign * torch.nn.functional.normalize(shift, dim=0)
        directions[block] = direction
    return assemble(
        model,
        directions,
        {block: states[block][:n] for block in numbers},
        {**metadata, "aggregate": method, "signs": signs, "baseline": start.name, "n_pairs": n},
    )


def assemble(
    model: Any,
    directions: Mapping[int, Tensor],
    hidden: Mapping[int, Tensor],
    metadata: dict[str, Any],
) -> SteeringVectors:
    """SteeringVectors from raw directions {block: [D]}, as long as the hidden states [N, D] there.

    A zero direction stays zero. Adds the norms, the model and the versions to the metadata.
    """
    hidden_norms = {block: float(h.norm(dim=-1).mean()) for block, h in hidden.items()}
    shift_norms = {block: float(v.norm()) for block, v in directions.items()}
    config = getattr(unwrap(model), "config", None)
    return SteeringVectors(
        {
            block: direction * (hidden_norms[block] / (shift_norms[block] or 1.0))
            for block, direction in directions.items()
        },
        strength=1.0 / len(directions),
        metadata={
            **metadata,
            # JSON's keys are strings.
            "hidden_norms": {str(block): norm for block, norm in hidden_norms.items()},
            "shift_norms": {str(block): norm for block, norm in shift_norms.items()},
            "base_model": getattr(config, "name_or_path", None) or None,
            "base_model_revision": getattr(config, "_commit_hash", None),
            "model_type": getattr(config, "model_type", None),
            "versions": {
                "python": platform.python_version(),
                "grains_ext": grains_ext.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        },
    )


def encoded_prompts(
    tokenizer: Any, pairs: Sequence[PreferencePair], separator: str | None
) -> list[TokenIds]:
    """Each pair's prompt ids. Raises ValueError for no pairs, or for images."""
    if not pairs:
        raise ValueError("no preference pairs to fit on")
    if any(pair.images for pair in pairs):
        raise ValueError("fitting takes text prompts, some of these pairs have images")
    return [encode_pair(tokenizer, pair, separator=separator).prompt_ids for pair in pairs]


def block_numbers(view: DecoderView, blocks: Blocks) -> list[int]:
    if isinstance(blocks, str):
        if blocks != "all":
            raise ValueError(f'blocks must be "all" or block numbers, got {blocks!r}')
        return list(range(view.n_blocks))
    numbers = view.check_blocks(blocks)
    if not numbers:
        raise ValueError("no blocks to fit")
    return numbers


def special_ids(tokenizer: Any) -> set[int]:
    return set(getattr(tokenizer, "tokenizer", tokenizer).all_special_ids)


def _aggregate(shifts: Tensor, method: Aggregate) -> Tensor:
    """One vector [D] for the shifts [N, D], of any length."""
    mean = shifts.mean(0)
    if method == "mean":
        return mean
    # Uncentred: centring removes the common shift, which is the very thing that is sought.
    component = torch.linalg.svd(shifts.double(), full_matrices=False).Vh[0].to(mean)
    return component * (component @ mean)
