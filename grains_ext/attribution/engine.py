"""Contrastive Integrated Gradients, batched over steps, pairs and both continuations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from grains_ext import ops
from grains_ext.attribution.objective import Batch, Branch
from grains_ext.attribution.path import Baseline, max_positions, quadrature
from grains_ext.attribution.result import Attribution
from grains_ext.decoder import DecoderView
from grains_ext.encoding import EncodedPair, encode_pairs, pair_name
from grains_ext.pairs import PreferencePair
from grains_ext.progress import progress_bar
from grains_ext.scoring import batches, frozen

# n_steps="auto": most pairs converge at the first count; at the last one a pair is given up.
AUTO_STEPS = (16, 32, 64, 128)


def attribute(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    baseline: str | Tensor = "bos",
    method: str = "gausslegendre",
    n_steps: int | str = "auto",
    tolerance: float = 0.05,
    max_batch_tokens: int = 4096,
    separator: str | None = None,
    progress: bool = True,
    decoder: DecoderView | None = None,
) -> list[Attribution]:
    """Which prompt tokens push the model toward the chosen, and which toward the rejected answer.

    Integrated Gradients of f = log p(chosen | prompt) - log p(rejected | prompt), summed over each
    continuation's tokens, with respect to the prompt's input embeddings, along the straight line
    from the baseline. The continuations' embeddings keep their real values along the whole path,
    so f_baseline is f of a baseline prompt followed by the real answers. (Sundararajan, Taly, Yan
    2017, equation 1; the contrastive objective is GrAInS's, arXiv 2507.18043.)

    Args:
        model: a transformers causal LM in float32, bfloat16 or float16; its weights get no
            gradients, and its training mode is restored. In the half precisions scores carry an
            error of 1-2 %, so that a tolerance below 0.02 means nothing there.
        tokenizer: its tokenizer.
        pairs: what to attribute. Results come in the same order.
        baseline: "bos", "mean", "pad", "unk", "mask", "zero" or a tensor [D] or [T, D]; see
            `grains_ext.attribution.path.Baseline`.
        method: "gausslegendre" or "riemann_middle".
        n_steps: points per path; "auto" doubles from 16 to 128 until a pair has converged.
        tolerance: a pair has converged where |residual| <= tolerance * max(1, |f_input -
            f_baseline|): a share of the change of f, and an error in nats where f changes by less
            than one.
        max_batch_tokens: tokens per model call, padding included; one sequence that is longer goes
            alone. It bounds the memory. Where memory runs out, a call is split.
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        progress: show a progress bar.
        decoder: the view of ``model``, where its parts must be named by hand.

    Returns one Attribution per pair; pairs that did not converge are flagged and counted in a
    warning. Raises ValueError for wrong arguments, and, naming the pair, for one that cannot be
    attributed: images, an empty prompt or continuation, equal continuations, more tokens than the
    model has positions.
    """
    step_counts = _step_counts(n_steps)
    quadrature(method, step_counts[0])  # an unknown method is an error with no pairs as well
    if max_batch_tokens < 1 or not tolerance > 0:
        raise ValueError(
            "max_batch_tokens and tolerance must be positive, got "
            f"{max_batch_tokens} and {tolerance}"
        )
    pairs = list(pairs)
    decoder = decoder or DecoderView.of(model)
    text_tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    start = Baseline(decoder, text_tokenizer, baseline)
    encoded = encode_pairs(tokenizer, pairs, separator=separator)
    for index, ids in enumerate(encoded):
        try:
            _check(decoder, start, ids)
        except ValueError as error:
            raise ValueError(f"{pair_name(index, pairs[index])}: {error}") from error
    with frozen(decoder.model), progress_bar(progress) as bar:
        engine = _Engine(decoder, start, encoded, max_batch_tokens, bar)
        paths = engine.run(method, step_counts, tolerance)

    failed = [
        pair_name(index, pairs[index]) for index, path in enumerate(paths) if not path.converged
    ]
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(pairs)} pairs did not converge to tolerance {tolerance} with "
            f"{step_counts[-1]} steps ({', '.join(failed[:5])}{', ...' if failed[5:] else ''}): "
            "see residual; take more steps or another baseline",
            stacklevel=2,
        )
    return [
        Attribution(
            tokens=tuple(text_tokenizer.decode([token]) for token in ids.prompt_ids),
            token_ids=ids.prompt_ids,
            modality=("text",) * len(ids.prompt_ids),
            scores=path.scores.astype(np.float32),
            f_input=path.f_input,
            f_baseline=path.f_baseline,
            residual=path.residual,
            evaluations=path.evaluations,
            n_steps=path.n_steps,
            converged=path.converged,
            method=method,
            baseline=start.name,
            prompt=text_tokenizer.decode(ids.prompt_ids),
            chosen=pair.chosen,
            rejected=pair.rejected,
            pair_id=pair.id,
        )
        for pair, ids, path in zip(pairs, encoded, paths, strict=True)
    ]


def _step_counts(n_steps: int | str) -> Sequence[int]:
    if n_steps == "auto":
        return AUTO_STEPS
    if isinstance(n_steps, int) and n_steps >= 1:
        return (n_steps,)
    raise ValueError(f'n_steps must be "auto" or an integer of at least 1, got {n_steps!r}')


def _check(decoder: DecoderView, start: Baseline, ids: EncodedPair) -> None:
    start.check_length(len(ids.prompt_ids))
    if ids.chosen_ids == ids.rejected_ids:
        raise ValueError("chosen and rejected have the same tokens, their difference is always 0")
    n_tokens = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
    limit = max_positions(decoder)
    # The last token of a continuation is predicted, never read.
    if limit is not None and n_tokens - 1 > limit:
        raise ValueError(
            f"prompt and continuation have {n_tokens} tokens, the model has {limit} positions; "
            "shorten the prompt"
        )


@dataclass
class _Path:
    """What is known of one pair's path."""

    scores: npt.NDArray[np.float64]
    f_input: float = 0.0
    f_baseline: float = 0.0
    n_steps: int = 0
    evaluations: int = 0
    converged: bool = False

    @property
    def change(self) -> float:
        return self.f_input - self.f_baseline

    @property
    def residual(self) -> float:
        return float(self.scores.sum()) - self.change


@dataclass(frozen=True)
class _Tile:
    """One model call: some branches at some points of the path."""

    branches: Sequence[Branch]
    points: range

    @property
    def size(self) -> int:
        return len(self.branches) * len(self.points)

    def halves(self) -> tuple[_Tile, _Tile]:
        if len(self.points) > 1:
            middle = len(self.points) // 2
            parts = self.points[:middle], self.points[middle:]
            return _Tile(self.branches, parts[0]), _Tile(self.branches, parts[1])
        middle = len(self.branches) // 2
        rows = self.branches[:middle], self.branches[middle:]
        return _Tile(rows[0], self.points), _Tile(rows[1], self.points)


def _tiles(branches: Sequence[Branch], n_points: int, max_batch_tokens: int) -> Iterator[_Tile]:
    """All points of as many branches of like length as fit a call, or equal shares of one's."""
    lengths = [len(branch) for branch in branches]
    for group in batches(lengths, max(1, max_batch_tokens // n_points)):
        here = [branches[index] for index in group]
        points_per_call = max(1, max_batch_tokens // (len(here) * len(here[0])))
        n_calls = math.ceil(n_points / points_per_call)
        for call in range(n_calls):
            yield _Tile(here, range(call * n_points // n_calls, (call + 1) * n_points // n_calls))


class _Engine:
    def __init__(
        self,
        decoder: DecoderView,
        baseline: Baseline,
        encoded: Sequence[EncodedPair],
        max_batch_tokens: int,
        progress: Progress,
    ) -> None:
        self._decoder = decoder
        self._baseline = baseline
        self._max_batch_tokens = max_batch_tokens
        self._progress = progress
        self._branches = [
            branch for index, ids in enumerate(encoded) for branch in Branch.of_pair(index, ids)
        ]
        self._paths = [_Path(np.zeros(len(ids.prompt_ids))) for ids in encoded]

    def run(self, method: str, step_counts: Sequence[int], tolerance: float) -> list[_Path]:
        self._for_each_tile("ends of the path", self._branches, 2, self._add_ends)
        for path in self._paths:
            path.evaluations = 2
        for n_steps in step_counts:
            self._integrate(
                [branch for branch in self._branches if not self._paths[branch.pair].converged],
                method,
                n_steps,
            )
            for path in self._paths:
                path.converged = abs(path.residual) <= tolerance * max(1.0, abs(path.change))
        return self._paths

    def _integrate(self, branches: Sequence[Branch], method: str, n_steps: int) -> None:
        for pair in {branch.pair for branch in branches}:
            path = self._paths[pair]
            path.scores[:] = 0.0
            path.n_steps = n_steps
            path.evaluations += n_steps
        nodes, weights = (
            torch.tensor(values, dtype=torch.float32) for values in quadrature(method, n_steps)
        )

        def add(batch: Batch, points: range) -> None:
            here = slice(points.start, points.stop)
            self._add_scores(batch, nodes[here], weights[here])

        self._for_each_tile(f"{n_steps} steps", branches, n_steps, add)

    def _for_each_tile(
        self,
        description: str,
        branches: Sequence[Branch],
        n_points: int,
        work: Callable[[Batch, range], None],
    ) -> None:
        if not branches:
            return
        task = self._progress.add_task(description, total=len(branches) * n_points)
        for whole in _tiles(branches, n_points, self._max_batch_tokens):
            queue = [whole]
            while queue:
                tile = queue.pop()
                try:
                    work(Batch.of(self._decoder, tile.branches, self._baseline), tile.points)
                except torch.OutOfMemoryError:
                    if tile.size == 1:
                        raise
                    queue.extend(tile.halves())
                else:
                    self._progress.advance(task, tile.size)

    @torch.no_grad()
    def _add_ends(self, batch: Batch, points: range) -> None:
        """Point 0 is the baseline, point 1 the input."""
        ends = torch.stack([(batch.baseline, batch.input)[point] for point in points])
        values = batch.objective(self._decoder, ends).tolist()
        for point, row_values in zip(points, values, strict=True):
            for branch, value in zip(batch.branches, row_values, strict=True):
                if point == 0:
                    self._paths[branch.pair].f_baseline += value
                else:
                    self._paths[branch.pair].f_input += value

    def _add_scores(self, batch: Batch, nodes: Tensor, weights: Tensor) -> None:
        device = batch.input.device
        points = ops.ig_interpolate(batch.input, batch.baseline, nodes.to(device))
        points.requires_grad_()
        with torch.enable_grad():
            # Rows do not see each other: the gradient of the sum holds every row's own gradient.
            total = batch.objective(self._decoder, points).sum()
            (grads,) = torch.autograd.grad(total, points)
        scores = ops.ig_accumulate(grads, batch.input, batch.baseline, weights.to(device))
        for branch, prompt, row in zip(batch.branches, batch.prompts, scores.cpu(), strict=True):
            self._paths[branch.pair].scores += row[prompt].double().numpy()
