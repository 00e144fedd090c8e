"""Hidden states at the last token of many sequences, clean or with some tokens masked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grains_ext.attribution.path import Baseline
from grains_ext.decoder import DecoderView
from grains_ext.encoding import TokenIds
from grains_ext.scoring import batches, forward_logits, frozen, pad_batch


@dataclass(frozen=True)
class Masked:
    """A sequence whose tokens at some positions have the baseline's embedding for their own."""

    token_ids: TokenIds
    positions: tuple[int, ...] = ()


@torch.no_grad()
def last_token_states(
    decoder: DecoderView,
    sequences: Sequence[Masked],
    blocks: Iterable[int],
    *,
    baseline: Baseline | None = None,
    max_batch_tokens: int = 4096,
) -> dict[int, Tensor]:
    """Each block's output at the last token of each sequence, float32 [N, D] on the CPU.

    baseline: what masked tokens become; needed where any sequence masks one.
    """
    blocks = list(blocks)
    device = next(decoder.embedding.parameters()).device
    states = {block: torch.empty(len(sequences), decoder.hidden_size) for block in blocks}
    with frozen(decoder.model):
        for group in batches([len(s.token_ids) for s in sequences], max_batch_tokens):
            input_ids, attention_mask = pad_batch([sequences[i].token_ids for i in group])
            embeds = decoder.embed(input_ids.to(device))
            for row, i in zip(embeds, group, strict=True):
                _mask(row, sequences[i], baseline)
            # Left padding puts every last token in the last column.
            with decoder.capture(blocks, positions=-1) as captured:
                forward_logits(
                    decoder.model, attention_mask.to(device), inputs_embeds=embeds, last=1
                )
            for block in blocks:
                states[block][group] = captured[block].float().cpu()
    return states


def _mask(row: Tensor, sequence: Masked, baseline: Baseline | None) -> None:
    """Overwrites the masked tokens' embeddings in a left-padded row [T, D]."""
    if not sequence.positions:
        return
    if baseline is None:
        raise ValueError("masked tokens need a baseline to become")
    real = row[-len(sequence.token_ids) :]
    positions = list(sequence.positions)
    real[positions] = baseline.embeddings(sequence.token_ids, real)[positions]
