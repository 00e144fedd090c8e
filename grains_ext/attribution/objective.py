"""The objective f = log p(chosen | prompt) - log p(rejected | prompt), from input embeddings.

f is a difference of two terms. Answers that differ share no sequence, so a pair is two branches,
attributed apart and summed: Integrated Gradients is linear in its objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grains_ext.attribution.path import Baseline
from grains_ext.decoder import DecoderView
from grains_ext.encoding import EncodedPair, TokenIds
from grains_ext.scoring import forward_logits, pad_batch, token_logprobs


@dataclass(frozen=True)
class Branch:
    """What the model reads for an answer of a pair, and the answers that are scored on it."""

    pair: int
    prompt_ids: TokenIds
    answers: tuple[tuple[int, TokenIds], ...]
    """(sign, token ids): +1 for the chosen answer, -1 for the rejected one."""

    @classmethod
    def of_pair(cls, index: int, ids: EncodedPair) -> list[Branch]:
        """Two branches; one where the answers differ in the last token only (all one-token ones).

        An answer's last token is predicted, never read.
        """
        answers = ((1, ids.chosen_ids), (-1, ids.rejected_ids))
        if ids.chosen_ids[:-1] == ids.rejected_ids[:-1]:
            return [cls(index, ids.prompt_ids, answers)]
        return [cls(index, ids.prompt_ids, (answer,)) for answer in answers]

    @property
    def input_ids(self) -> TokenIds:
        return (*self.prompt_ids, *self.answers[0][1][:-1])

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """B branches, padded on the left to T tokens so that the scored positions come last.

    ``input`` and ``baseline`` [B, T, D] are the two ends of the path. They are equal at answers and
    padding, which therefore stay put and get no score.
    """

    branches: Sequence[Branch]
    prompts: Sequence[slice]
    """Where along T each branch's prompt lies."""
    input: Tensor
    baseline: Tensor
    attention_mask: Tensor
    rows: Tensor
    """int64 [A]: the branch of each of A answers."""
    targets: Tensor
    """int64 [A, C]: the answers' tokens, padded on the left to C."""
    target_signs: Tensor
    """[A, C]: each target's sign in f, 0 at padding."""

    @classmethod
    def of(cls, decoder: DecoderView, branches: Sequence[Branch], baseline: Baseline) -> Batch:
        device = next(decoder.embedding.parameters()).device
        input_ids, attention_mask = pad_batch([branch.input_ids for branch in branches])
        with torch.no_grad():
            inputs_embeds = decoder.embed(input_ids.to(device))
        length = inputs_embeds.shape[1]
        starts = inputs_embeds.clone()
        prompts = []
        for row, branch in enumerate(branches):
            first = length - len(branch)
            prompts.append(slice(first, first + len(branch.prompt_ids)))
            starts[row, prompts[row]] = baseline.embeddings(
                branch.prompt_ids, inputs_embeds[row, prompts[row]]
            )
        answers = [
            (row, sign, ids) for row, branch in enumerate(branches) for sign, ids in branch.answers
        ]
        targets, mask = pad_batch([ids for _, _, ids in answers])
        signs = torch.tensor([sign for _, sign, _ in answers])
        return cls(
            branches=branches,
            prompts=prompts,
            input=inputs_embeds,
            baseline=starts,
            attention_mask=attention_mask.to(device),
            rows=torch.tensor([row for row, _, _ in answers], device=device),
            targets=targets.to(device),
            target_signs=(mask * signs[:, None]).to(device),
        )

    def objective(self, decoder: DecoderView, points: Tensor) -> Tensor:
        """Each branch's share of f, in float32, [S, B], at points [S, B, T, D] of the path.

        Summed over the answers' tokens; logits are computed at their positions only.
        """
        n_points, n_branches, _, _ = points.shape
        n_answers, n_scored = self.targets.shape
        logits = forward_logits(
            decoder.model,
            self.attention_mask.repeat(n_points, 1),
            inputs_embeds=points.flatten(0, 1),
            last=n_scored,
        )
        logprobs = token_logprobs(
            logits.unflatten(0, (n_points, n_branches))[:, self.rows],
            self.targets.expand(n_points, n_answers, n_scored),
        )
        by_answer = (logprobs * self.target_signs).sum(-1)
        zeros = by_answer.new_zeros(n_points, n_branches)
        return zeros.index_add(1, self.rows, by_answer)
