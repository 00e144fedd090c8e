"""f at many points of many pairs in one model call, with the work that f does not need left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from grains_ext import ops
from grains_ext.attribution.first_block import Ends, Reader, Stretch, products_from_ends
from grains_ext.attribution.fused import NOTHING_FUSED, Fused
from grains_ext.attribution.objective import ScoredLogits, WeightedLogprobs
from grains_ext.attribution.sequences import Packed
from grains_ext.attribution.shortcuts import head_over, last_block_at, prefix_cache
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.scoring import forward_logits
from grains_ext.vision import additive_mask, replaying

LayerStates = list[tuple[Tensor, Tensor]]
"""Every layer's keys and values, [1, heads, P, width]."""


@dataclass(frozen=True)
class Shortcuts:
    """What is left out of a call. All of it needs a model that honours a 4-D attention mask."""

    tree: bool = True
    """Both answers in one row."""
    trim: bool = True
    """The last block at the scored columns only."""
    prefix: bool = True
    """What stands before the first attributed token comes from a cache."""
    fused: bool = True
    """Recognised modules run by ops of our own, on a CPU."""
    ends: bool = True
    """The first block's products from those at the path's ends, in float32."""
    padded: bool = True
    """Rows of several lengths in one call. Some recurrent models read the padding as tokens."""

    @property
    def own_mask(self) -> bool:
        return self.tree or self.trim or self.prefix


NO_SHORTCUTS = Shortcuts(tree=False, trim=False, prefix=False, fused=False, ends=False)


@dataclass(frozen=True)
class Row:
    """One sequence of a pair: what the decoder reads where the prompt is the real one."""

    packed: Packed
    embeddings: Tensor
    """[L, D]."""
    position_ids: Tensor
    """int64 [L], or [axes, L] for models with several position axes."""
    n_prompt: int
    """The first T columns, which lie on the path."""
    allowed: Tensor | dict[str, Tensor]
    """bool [L, L]: which columns each may attend; by layer type where the model keeps several."""
    replayed: dict[str, Any] | None = None
    """Arguments of the decoder stack to be forced; None for a model of text alone."""
    prefix: LayerStates | None = None
    """The cached states of the first P columns."""
    ends: Ends | None = None
    """What the first block makes of the path's ends, where it is known."""

    @property
    def n_prefix(self) -> int:
        return 0 if self.prefix is None else self.prefix[0][0].shape[-2]

    @property
    def n_read(self) -> int:
        """Columns that go through the model."""
        return len(self.packed) - self.n_prefix


@dataclass(frozen=True)
class Unit:
    """n points on the path of one pair, and the rows that f of that pair is read from."""

    rows: Sequence[Row]
    points: Tensor
    """[n, T, D]: embeddings of the prompt."""
    alphas: Tensor | None = None
    """float32 [n]: how far along the path they are, where they lie on it."""
    way: tuple[Tensor, Tensor] | None = None
    """Two ends, [T, D] each: a token's score at a point is f's derivative from one to the other."""
    scored: Callable[[ScoredLogits], Tensor] | None = None
    """The user's objective; None: the weighted log-probabilities of the rows' targets."""

    @property
    def n_points(self) -> int:
        return len(self.points)


@dataclass
class Batch:
    """Units side by side, each point's rows together, padded on the left."""

    units: Sequence[Unit]
    shortcuts: Shortcuts
    padding: int = 0
    """Columns more than the longest row needs, to try whether a model looks at them."""
    fused: Fused = NOTHING_FUSED
    """The modules that ``shortcuts.fused`` is about."""
    readers: Sequence[Reader] = ()
    """What ``shortcuts.ends`` is about, where the units' points lie on their paths."""
    embeddings: Tensor = field(init=False)
    """[N, W, D]"""

    def __post_init__(self) -> None:
        # For each row of the model's input, in order: its unit, its row there, its point.
        self._places = [
            (unit, row, point)
            for unit in self.units
            for point in range(unit.n_points)
            for row in unit.rows
        ]
        width = max(row.n_read for _, row, _ in self._places) + self.padding
        first = self.units[0].points
        self.embeddings = first.new_zeros(len(self._places), width, first.shape[-1])
        for number, (unit, row, point) in enumerate(self._places):
            if self.padding:  # zeros alone, as usual, might pass a model unnoticed
                self.embeddings[number, 1 : width - row.n_read] = row.embeddings[-1]
            columns = self.embeddings[number, width - row.n_read :]
            n_prompt = row.n_prompt - row.n_prefix
            columns[:n_prompt] = unit.points[point, row.n_prefix :]
            columns[n_prompt:] = row.embeddings[row.n_prompt :]

    def scores(self, decoder: DecoderView) -> tuple[list[Tensor], list[Tensor]]:
        """f of every unit's points, float32 [n] each, and every token's score there, [n, T].

        A score is the derivative with respect to how far that token alone goes on its way.
        """
        steps = [
            unit.points.new_zeros(unit.points.shape[:2], dtype=torch.float32, requires_grad=True)
            for unit in self.units
        ]
        with torch.enable_grad():
            values = self.objective(decoder, steps)
            if not values[0].requires_grad:
                raise ValueError(
                    f"{type(unwrap(decoder.model)).__name__} has no gradient with respect to its "
                    "input embeddings, as models whose activations are quantised have none: use "
                    "one with floating activations, or method='occlusion'"
                )
            # Points do not see each other: the gradient of the sum holds every point's own.
            at_tokens = torch.autograd.grad(torch.cat(values).sum(), steps)
        return [value.detach() for value in values], list(at_tokens)

    def _stretches(self, steps: Sequence[Tensor] | None) -> list[Stretch]:
        """What the first block's products are made of; nothing where they are not."""
        if not self.readers or not self.shortcuts.ends:
            return []
        made = []
        for number, (unit, rows) in enumerate(zip(self.units, _rows_of(self.units), strict=True)):
            for row, places in zip(unit.rows, rows, strict=True):
                if unit.alphas is None or row.ends is None:
                    return []
                alphas = unit.alphas.to(self.embeddings.device)[:, None].expand(-1, row.n_read)
                if steps is not None:
                    prompt = steps[number][:, row.n_prefix :]
                    after = row.n_read - prompt.shape[1]
                    alphas = alphas + torch.nn.functional.pad(prompt, (0, after)) * row.ends.moving
                made.append(Stretch(row.ends, places, alphas))
        return made

    def objective(
        self, decoder: DecoderView, steps: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """f of every unit's points, float32 [n] each.

        steps: zeros [n, T] for each unit, with respect to which f is then differentiable: how far
            each token goes on its way from where it is.
        """
        if steps is not None:
            self.embeddings = _OnTheirWays.apply(self.units, self.embeddings, *steps)  # type: ignore[no-untyped-call]
        rows = [row for _, row, _ in self._places]
        device = self.embeddings.device
        weighted = WeightedLogprobs.of([row.packed for row in rows], device)
        custom = any(unit.scored is not None for unit in self.units)
        if custom:
            n_scored = max(row.n_read - row.n_prompt + row.n_prefix + 1 for row in rows)
        else:
            n_scored = max(row.packed.n_scored for row in rows)
        with ExitStack() as stack:
            if self.shortcuts.fused:
                stack.enter_context(self.fused.running())
            if stretches := self._stretches(steps):
                shape = self.embeddings.shape[0], self.embeddings.shape[1]
                stack.enter_context(products_from_ends(self.readers, stretches, shape))
            if self.shortcuts.trim:
                stack.enter_context(last_block_at(decoder, n_scored))
            some = None if custom else weighted.vocabulary
            sliced = stack.enter_context(head_over(decoder, some))
            logits = self._logits(decoder, rows, n_scored, stack)
        if not sliced and some is not None:
            logits = logits[..., some]
        per_unit = [unit.n_points * len(unit.rows) for unit in self.units]
        if custom:
            return [
                _custom(unit, part)
                for unit, part in zip(self.units, logits.split(per_unit), strict=True)
            ]
        values = weighted(logits).split(per_unit)
        return [
            part.view(unit.n_points, len(unit.rows)).sum(-1)
            for unit, part in zip(self.units, values, strict=True)
        ]

    def read(self, decoder: DecoderView) -> None:
        """One call of the model, for hooks that look at what it does with the rows."""
        with ExitStack() as stack:
            self._logits(decoder, [row for _, row, _ in self._places], 1, stack)

    def _logits(
        self, decoder: DecoderView, rows: list[Row], n_scored: int, stack: ExitStack
    ) -> Tensor:
        """[N, n_scored, V or as many as the head computes], of the last columns."""
        if self.shortcuts.padded:
            return self._one_call(decoder, rows, self.embeddings, n_scored, stack)
        lengths = [row.n_read for row in rows]
        found = torch.empty(0)
        for length in dict.fromkeys(lengths):
            alike = [number for number, other in enumerate(lengths) if other == length]
            logits = self._one_call(
                decoder,
                [rows[number] for number in alike],
                self.embeddings[alike, -length:],
                min(n_scored, length),
                stack,
            )
            if not found.numel():
                found = logits.new_zeros(len(rows), n_scored, logits.shape[-1])
            found[alike, -logits.shape[1] :] = logits
        return found

    def _one_call(
        self,
        decoder: DecoderView,
        rows: list[Row],
        embeddings: Tensor,
        n_scored: int,
        stack: ExitStack,
    ) -> Tensor:
        """`_logits` of rows that stand at the right of embeddings [N, W, D]."""
        device, width = embeddings.device, embeddings.shape[1]
        mask: Any
        if not self.shortcuts.own_mask and rows[0].replayed is None:
            mask = torch.zeros(embeddings.shape[:2], dtype=torch.int64)
            for number, row in enumerate(rows):
                mask[number, width - row.n_read :] = 1
            return forward_logits(
                decoder.model, mask.to(device), inputs_embeds=embeddings, last=n_scored
            )
        cache = None
        if any(row.prefix is not None for row in rows):
            cache = prefix_cache([row.prefix or [] for row in rows], [1] * len(rows))
        mask = _attention_mask(rows, embeddings)
        positions = _position_ids(rows, width).to(device)
        if rows[0].replayed is not None:
            forced = _replayed(rows, width)
            forced |= {"attention_mask": mask, "position_ids": positions}
            stack.enter_context(replaying(decoder, forced))
            mask = None
        return forward_logits(
            decoder.model,
            mask,
            inputs_embeds=embeddings,
            last=n_scored,
            position_ids=positions,
            past_key_values=cache,
        )


def _rows_of(units: Sequence[Unit]) -> Iterator[list[slice]]:
    """For each unit, and each row of it, where a batch of these units has its points."""
    start = 0
    for unit in units:
        stop, step = start + unit.n_points * len(unit.rows), len(unit.rows)
        yield [slice(start + number, stop, step) for number in range(step)]
        start = stop


class _OnTheirWays(torch.autograd.Function):
    """A batch's embeddings plus steps of length 0 along every token's way."""

    @staticmethod
    def forward(ctx: Any, units: Sequence[Unit], embeddings: Tensor, *steps: Tensor) -> Tensor:
        ctx.units = units
        ctx.mark_dirty(embeddings)
        return embeddings

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        one = torch.ones(1, device=grad.device)
        along = []
        for unit, places in zip(ctx.units, _rows_of(ctx.units), strict=True):
            total = grad.new_zeros(unit.points.shape[:2], dtype=torch.float32)
            for row, part in zip(unit.rows, places, strict=True):
                start, end = (side[row.n_prefix :] for side in unit.way)
                first = grad.shape[1] - row.n_read
                of_prompt = grad[None, part, first : first + len(end)]
                total[:, row.n_prefix :] += ops.ig_accumulate(
                    of_prompt, end.expand_as(of_prompt[0]), start, one
                )
            along.append(total)
        return None, None, *along


@torch.no_grad()
def read_prefix(decoder: DecoderView, row: Row, n_columns: int) -> LayerStates:
    """The states of the first ``n_columns`` columns of a row, which no later one may change."""
    embeddings = row.embeddings[None, :n_columns]
    cache = DynamicCache()
    allowed = (
        {name: part[:n_columns, :n_columns] for name, part in row.allowed.items()}
        if isinstance(row.allowed, dict)
        else row.allowed[:n_columns, :n_columns]
    )
    mask: Any = additive_mask(allowed, embeddings)
    positions = row.position_ids[..., None, :n_columns].to(embeddings.device)
    with ExitStack() as stack:
        if row.replayed is not None:
            forced = row.replayed | {"attention_mask": mask, "position_ids": positions}
            stack.enter_context(replaying(decoder, forced))
            mask = None
        forward_logits(
            decoder.model,
            mask,
            inputs_embeds=embeddings,
            last=1,
            position_ids=positions,
            past_key_values=cache,
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _custom(unit: Unit, logits: Tensor) -> Tensor:
    """The user's objective of one unit; logits [n * rows, R, V]."""
    assert unit.scored is not None
    n_rows = len(unit.rows)
    answers = []
    for number, row in enumerate(unit.rows):
        for columns, ids in zip(row.packed.columns, row.packed.answers, strict=True):
            places = torch.tensor(columns, device=logits.device) - len(row.packed)
            answers.append(
                (logits[number::n_rows, places].float(), torch.tensor(ids, device=logits.device))
            )
    (chosen, chosen_ids), (rejected, rejected_ids) = answers
    values = unit.scored(ScoredLogits(chosen, chosen_ids, rejected, rejected_ids))
    if not isinstance(values, Tensor) or values.shape != (unit.n_points,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the objective must return one value for each of the {unit.n_points} points, a tensor "
            f"[{unit.n_points}], got {got}"
        )
    if logits.requires_grad and not values.requires_grad:
        raise ValueError(
            "the objective's values have no gradient with respect to the logits: compute them with "
            "differentiable operations, without detach, item or argmax"
        )
    return values.float()


def _replayed(rows: list[Row], width: int) -> dict[str, Any]:
    """The rows' own arguments of the stack as those of one batch, padded on the left."""

    def joined(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, list | tuple):
            return type(first)(map(joined, zip(*values, strict=True)))
        if not isinstance(first, Tensor):
            return first
        return torch.cat([_widened(value, row) for value, row in zip(values, rows, strict=True)])

    def _widened(value: Tensor, row: Row) -> Tensor:
        if value.shape[:2] != (1, row.n_read):
            return value  # no entry per column, but one per image token, or none
        padding = value.new_zeros(value.shape[0], width - row.n_read, *value.shape[2:])
        return torch.cat([padding, value], dim=1)

    per_row = [row.replayed or {} for row in rows]
    return {name: joined([arguments[name] for arguments in per_row]) for name in per_row[0]}


def _attention_mask(rows: list[Row], embeddings: Tensor) -> Tensor | dict[str, Tensor]:
    """Additive [N, 1, W, P + W] in the dtype of the embeddings, by layer type where rows are."""
    width = embeddings.shape[1]
    longest = max(row.n_prefix for row in rows)
    # The points of a pair share their rows: one mask is made for each, and repeated on the device.
    distinct = {id(row): row for row in rows}
    number_of = {key: number for number, key in enumerate(distinct)}
    order = torch.tensor([number_of[id(row)] for row in rows], device=embeddings.device)
    rows = list(distinct.values())

    def whole(masks: list[Tensor]) -> Tensor:
        # Padding attends itself alone: a row without any column has no softmax.
        seen = torch.zeros(len(rows), width, longest + width, dtype=torch.bool)
        seen[:, :, longest:] = torch.eye(width, dtype=torch.bool)
        for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            first, cut = width - row.n_read, row.n_prefix
            seen[number, first:, longest + first :] = mask[cut:, cut:]
            seen[number, first:, longest - cut : longest] = mask[cut:, :cut]
        return seen

    masks = [row.allowed for row in rows]
    by_type = [mask for mask in masks if isinstance(mask, dict)]
    if by_type:
        parts = {name: whole([mask[name] for mask in by_type]) for name in by_type[0]}
        return {name: additive_mask(part, embeddings)[order] for name, part in parts.items()}
    alike = whole([mask for mask in masks if isinstance(mask, Tensor)])
    together: Tensor = additive_mask(alike, embeddings)[order]
    return together


def _position_ids(rows: list[Row], width: int) -> Tensor:
    """int64 [N, W] or [axes, N, W], 0 at padding."""
    padded = [
        torch.nn.functional.pad(row.position_ids[..., row.n_prefix :], (width - row.n_read, 0))
        for row in rows
    ]
    return torch.stack(padded, dim=-2)
