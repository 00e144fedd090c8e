"""Answers the methods of many pairs at once: model calls filled up to a budget of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from grains_ext.attribution.first_block import BETWEEN, Reader, ends_of, readers_of
from grains_ext.attribution.forward import (
    NO_SHORTCUTS,
    Batch,
    Row,
    Shortcuts,
    Unit,
)
from grains_ext.attribution.fused import Fused, fused_modules
from grains_ext.attribution.memory import automatic_budget, is_out_of_memory
from grains_ext.attribution.points import Dialogue, Evaluated, OnPath, Outcome, Path, Points
from grains_ext.attribution.prepare import Prepared, Preparer
from grains_ext.attribution.settings import Settings
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.scoring import forward_logits

# Rows with a tree in them or not, with a prefix or not, with so many matrices that read the first
# block's input; None for those that are read with no shortcut.
_Like = tuple[bool, bool, int] | None
# What each model was found to honour, as it stood then.
_HONOURED: WeakKeyDictionary[nn.Module, dict[str, dict[_Like, Shortcuts]]] = WeakKeyDictionary()

_log = logging.getLogger(__name__)

# A row shorter than this share of the longest waits for another call: it would be mostly padding.
_LEAST_FILL = 0.8
# What a token in a cached prefix holds in memory, of what one that is read does: every row has its
# own keys and values, in the cache and again joined with those of the row.
_CACHED_TOKEN = 0.25
# Columns of padding that a model must not see when it is tried.
_PADDING = 3
# What every model allows.
_APART = replace(NO_SHORTCUTS, padded=False)
# From the fastest on.
_TRIED = tuple(
    Shortcuts(trim=trim, prefix=prefix, fused=fused, ends=ends)
    for fused, ends in ((True, True), (True, False), (False, False))
    for trim, prefix in ((True, True), (True, False), (False, True), (False, False))
)


@dataclass
class _Task:
    """One pair at work: its dialogue, what it asks for, and what was found so far."""

    path: Path
    rows: Sequence[Row]
    shortcuts: Shortcuts
    dialogue: Dialogue
    asked: Points
    values: list[float] = field(default_factory=list)
    at_tokens: list[Tensor] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def todo(self) -> int:
        return self.asked.count - len(self.values)

    @property
    def columns(self) -> int:
        """Of its longest row."""
        return max(row.n_read for row in self.rows)

    @property
    def kind(self) -> tuple[object, ...]:
        """Tasks of one kind may share a call."""
        row = self.rows[0]
        return (
            self.asked.gradients,
            self.shortcuts,
            row.prefix is None,
            row.replayed is None,
            row.ends is None,
            isinstance(row.allowed, dict),
        )

    def advance(self) -> None:
        """Hands over what was found, as long as nothing more is asked for."""
        while self.outcome is None and self.todo == 0:
            none = np.zeros((len(self.values), 0))
            at_tokens = torch.cat(self.at_tokens).double().numpy() if self.at_tokens else none
            found = Evaluated(np.array(self.values), at_tokens)
            self.values, self.at_tokens = [], []
            try:
                self.asked = self.dialogue.send(found)
            except StopIteration as end:
                self.outcome = end.value


class Evaluator:
    """Runs the dialogues of one attribution run on one model."""

    def __init__(self, decoder: DecoderView, preparer: Preparer, settings: Settings) -> None:
        self._decoder = decoder
        self._preparer = preparer
        self._is_automatic = settings.max_batch_tokens == "auto"
        # None: as many as `_automatic` says.
        self._most_tokens = None if self._is_automatic else int(settings.max_batch_tokens)
        self._objective = settings.objective if callable(settings.objective) else None
        model = unwrap(decoder.model)
        backend = getattr(getattr(model, "config", None), "_attn_implementation", None)
        last = decoder.blocks[-1]
        hooks = [*last._forward_pre_hooks, *last._forward_hooks]
        standing = f"{backend} {next(decoder.embedding.parameters()).dtype} {hooks}"
        # What reads the first block's input, once a run of the model has shown it.
        self._readers: Sequence[Reader] | None = None
        self._known = _HONOURED.setdefault(model, {}).setdefault(standing, {})

    @cached_property
    def _fused(self) -> Fused:
        # Not before the model is ours alone: another run may be at work on it.
        return fused_modules(self._decoder)

    @cached_property
    def _automatic(self) -> tuple[int, float]:
        """Tokens per call, and how many of them a row of logits is worth."""
        return automatic_budget(self._decoder, fused=bool(self._fused))

    @property
    def _budget(self) -> int:
        return self._automatic[0] if self._most_tokens is None else self._most_tokens

    @property
    def _tokens_per_logits(self) -> float:
        return self._automatic[1] if self._is_automatic else 0.0

    def run(
        self,
        pairs: Sequence[Prepared],
        begin: Callable[[Path], Dialogue],
        finished: Callable[[int, bool], None],
    ) -> list[Outcome]:
        """One outcome per pair; ``finished`` hears of each as it comes: evaluations, converged.

        Pairs that are done leave the calls, and what the others ask next enters them.
        """
        tasks = []
        for prepared in pairs:
            rows, shortcuts = self._rows(prepared)
            dialogue = begin(prepared.path)
            tasks.append(_Task(prepared.path, rows, shortcuts, dialogue, next(dialogue)))
        waiting = sorted(tasks, key=lambda task: -task.columns)
        while waiting:
            if all(task.todo for task in waiting):
                self._call(waiting)
            for task in waiting:
                task.advance()
                if task.outcome is not None:
                    finished(task.outcome.evaluations, task.outcome.converged)
            waiting = [task for task in waiting if task.outcome is None]
        return [task.outcome for task in tasks if task.outcome is not None]

    def _call(self, waiting: Sequence[_Task]) -> None:
        """One model call: as many points of the first task and of its like as fit."""
        first = waiting[0]
        like = [
            task
            for task in waiting
            if task.kind == first.kind and task.columns >= _LEAST_FILL * first.columns
        ]
        while True:
            shares = self._shares(like)
            try:
                self._answer(shares)
                return
            except (RuntimeError, MemoryError) as error:
                n_points = sum(map(len, (part for _, part in shares)))
                if n_points == 1 or not is_out_of_memory(error):
                    raise
            # Outside the handler, which keeps the failed call's memory alive.
            self._most_tokens = min(self._budget, self._cost(like) * n_points) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _shares(self, like: Sequence[_Task]) -> list[tuple[_Task, range]]:
        """Points in order until the budget is full; one at least."""
        room = max(1, self._budget // self._cost(like))
        # As even as can be: a small last call would be slow for its size.
        todo = sum(task.todo for task in like)
        room = -(-todo // -(-todo // room))
        shares = []
        for task in like:
            start = len(task.values)
            part = range(start, min(task.asked.count, start + room))
            if part:
                shares.append((task, part))
            room -= len(part)
        return shares

    def _cost(self, like: Sequence[_Task]) -> int:
        """What a point takes of the budget, in tokens."""
        width = max(task.columns for task in like)
        scored = max(row.packed.n_normalised for task in like for row in task.rows)
        rows = max(len(task.rows) for task in like)
        cached = max(row.n_prefix for task in like for row in task.rows)
        return rows * (
            width + round(cached * _CACHED_TOKEN) + round(scored * self._tokens_per_logits)
        )

    def _answer(self, shares: Sequence[tuple[_Task, range]]) -> None:
        """Evaluates points of several tasks in one call, and files what was found."""
        first, _ = shares[0]
        units = [
            Unit(
                task.rows,
                task.asked.build(task.path, part),
                task.asked.alphas_of(part),
                (task.asked.origin(task.path), task.path.input),
                self._objective,
            )
            for task, part in shares
        ]
        batch = Batch(units, first.shortcuts, fused=self._fused, readers=self._readers or ())
        if first.asked.gradients:
            values, scores = batch.scores(self._decoder)
        else:
            with torch.no_grad():
                values, scores = batch.objective(self._decoder), []
        at_tokens = [part.cpu() for part in scores]
        # Nothing is filed before everything was computed: a call that fails is made again.
        for number, (task, _) in enumerate(shares):
            task.values += values[number].tolist()
            task.at_tokens += at_tokens[number : number + 1]

    def _rows(self, prepared: Prepared) -> tuple[Sequence[Row], Shortcuts]:
        """The rows of one pair, with the shortcuts that the model honours on its like."""
        if not self._known:
            self._check_embeddings(prepared)
        if not self._preparer.may_shorten(prepared):
            return self._preparer.rows(prepared, NO_SHORTCUTS), self._without(prepared)
        rows = self._preparer.rows(prepared, Shortcuts(prefix=False))
        is_tree = any(row.packed.is_tree for row in rows)
        if self._readers is None:
            self._readers = self._find_readers(prepared)
        n_matrices = sum(len(reader.matrices) for reader in self._readers)
        like = (is_tree, self._preparer.prefix_length(prepared, rows) > 0, n_matrices)
        shortcuts = self._known.get(like)
        if shortcuts is None:
            shortcuts = self._known[like] = self._honoured(prepared)
        return self._with_ends(prepared, shortcuts), shortcuts

    @torch.no_grad()
    def _check_embeddings(self, prepared: Prepared) -> None:
        """Raises ValueError for a model that reads token ids beside their embeddings.

        Gemma 3n does, for inputs of its later blocks: f of embeddings would not be f of the prompt.
        """
        if prepared.replayed is not None:  # captured from the model on ids and pixels
            return
        ids = torch.tensor([prepared.ids.prompt_ids], device=prepared.embeddings.device)
        model, mask = self._decoder.model, torch.ones_like(ids)
        expected = forward_logits(model, mask, input_ids=ids, last=1)
        found = forward_logits(model, mask, inputs_embeds=prepared.embeddings[None], last=1)
        error = float((found - expected).abs().max())
        if error > 0.01 * float(expected.abs().max()):
            raise ValueError(
                f"{type(unwrap(model)).__name__} computes other logits from a prompt's embeddings "
                f"than from its token ids (by {error:.2g}): it reads ids in another place as well, "
                "so its tokens cannot be attributed through their embeddings"
            )

    def _find_readers(self, prepared: Prepared) -> Sequence[Reader]:
        """None in half precisions, where the ends' products would be rounded before they are used,
        and with one block alone, which is also the last: that one may be cut short."""
        path = prepared.path
        if path.input.dtype != torch.float32 or self._decoder.n_blocks < 2:
            return ()
        rows = self._preparer.rows(prepared, NO_SHORTCUTS)
        batch = Batch([Unit(rows, path.input[None])], NO_SHORTCUTS)
        return readers_of(self._decoder, partial(batch.read, self._decoder))

    def _with_ends(self, prepared: Prepared, shortcuts: Shortcuts) -> Sequence[Row]:
        """The rows of one pair with what the first block makes of their path's ends."""
        rows = self._preparer.rows(prepared, shortcuts)
        if not shortcuts.ends or not self._readers:
            return rows
        points = OnPath(np.array([0.0, 1.0, BETWEEN]), gradients=False)
        built = points.build(prepared.path, range(3))
        found = []
        for row in rows:
            batch = Batch([Unit([row], built)], shortcuts)
            run = partial(batch.read, self._decoder)
            found.append(replace(row, ends=ends_of(self._decoder, self._readers, run)))
        return found

    @torch.no_grad()
    def _honoured(self, prepared: Prepared) -> Shortcuts:
        """The most shortcuts that leave f as it is."""
        plain = self._half_way(prepared, _APART)
        for shortcuts in _TRIED:
            if self._leaves(plain, prepared, shortcuts):
                return shortcuts
        return self._without(prepared)

    @torch.no_grad()
    def _without(self, prepared: Prepared) -> Shortcuts:
        """No shortcuts, and rows of several lengths together only where that leaves f as it is."""
        if None not in self._known:
            plain = self._half_way(prepared, _APART)
            alike = self._leaves(plain, prepared, NO_SHORTCUTS)
            self._known[None] = NO_SHORTCUTS if alike else _APART
        return self._known[None]

    def _leaves(self, plain: Tensor, prepared: Prepared, shortcuts: Shortcuts) -> bool:
        """Whether f half-way along the path is that of the plain way, with padding and without.

        Padded as rows of several lengths are: recurrent blocks take it for tokens where no mask
        [batch, tokens] tells them, and some where one does.
        """
        try:
            found = [self._half_way(prepared, shortcuts, padding) for padding in (0, _PADDING)]
        except Exception as error:  # whatever a model makes of arguments unknown to it
            if is_out_of_memory(error):
                raise
            _log.debug("%s: %s", shortcuts, error)
            return False
        n_terms = len(prepared.ids.chosen_ids) + len(prepared.ids.rejected_ids)
        rounding = 16 * torch.finfo(prepared.path.input.dtype).eps * n_terms**0.5
        tolerance = 1e-3 * plain.abs().clamp(min=1) + rounding
        return bool(((torch.cat(found) - plain).abs() <= tolerance).all())

    def _half_way(self, prepared: Prepared, shortcuts: Shortcuts, padding: int = 0) -> Tensor:
        """f in the middle of the path, [1]."""
        middle = OnPath(np.array([0.5]), gradients=False)
        unit = Unit(
            self._with_ends(prepared, shortcuts),
            middle.build(prepared.path, range(1)),
            middle.alphas_of(range(1)),
        )
        batch = Batch([unit], shortcuts, padding, self._fused, self._readers or ())
        return batch.objective(self._decoder)[0]
