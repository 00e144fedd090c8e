"""Steering a live model: forward hooks on its decoder blocks, and the handle that controls them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grains_ext import ops
from grains_ext.decoder import (
    DecoderView,
    hidden_states_of,
    told_prompt_lengths,
    unwrap,
    wrappers,
)
from grains_ext.steering.compiled import CompiledInPlace, Reached, hooked
from grains_ext.steering.held_gate import HeldGate
from grains_ext.steering.mirrored import Home, Mirrored
from grains_ext.steering.positions import (
    Forward,
    Positions,
    check_positions,
    image_token_ids,
    steered_tokens,
)

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors


class SteeringHandle:
    """Steering that is switched on. Made by SteeringVectors.apply and SteeringBank.apply.

    The output h of each steered block becomes (h + a v) ‖h‖ / ‖h + a v‖, or h + a v, at the chosen
    positions of every forward: with and without KV cache, in generate(), under autograd. Several
    handles on one model act one after the other, in the order in which they were made.

    Under torch.compile make the handle, and call rows() if you will, before the first call of the
    compiled model: torch ignores hooks that come later. A handle raises where a call finds a graph
    without it, if it was made from what torch.compile returned, or after model.compile(), of the
    model or of its blocks. Changes of strength, rows and prompt length are then seen without a
    recompile, and by CUDA graphs. With positions or a gate one forward may run at a time. As a
    context manager it removes itself at the end.
    """

    # A tensor made in inference mode could not be updated, nor steer a training step, outside it.
    @torch.inference_mode(False)
    def __init__(
        self,
        decoder: DecoderView,
        members: Sequence["SteeringVectors"],
        strengths: Sequence[float],
        positions: Positions = "all",
    ) -> None:
        """members: what rows() chooses from; of one eps and one normalize. strengths: of each."""
        members = [member.effective() for member in members]
        for member in members:
            check_fits(member, decoder)
        self._normalize, self._eps = members[0].normalize, members[0].eps
        self._n_members = len(members)
        steered = {block for member in members for block, v in member.directions.items() if v.any()}
        homes = {block: _home(decoder.blocks[block], decoder.model) for block in steered}
        self._homes = list(dict.fromkeys(home for home in homes.values() if home is not None))
        self._tables, self._steers = {}, {}
        nothing = torch.zeros(decoder.hidden_size)
        for block in sorted(steered):
            rows = [member.directions.get(block, nothing) for member in members]
            steers = torch.stack([row.any() for row in rows])
            self._tables[block] = Mirrored(torch.stack(rows), [homes[block]])
            # None: all do. A row whose member does not steer this block is not touched in it.
            self._steers[block] = None if steers.all() else self._mirrored(steers)
        self._strengths = self._mirrored(torch.zeros(self._n_members))
        self._rows: Mirrored | None = None
        self._slots: _Slots | None = None
        self._prompt_length: Mirrored | None = None

        self._image_ids = image_token_ids(getattr(unwrap(decoder.model), "config", None))
        check_positions(positions, self._image_ids)
        self._positions = positions
        self._mask = None
        if isinstance(positions, Tensor):
            self._mask = self._mirrored(positions.detach().reshape(-1, positions.shape[-1]))
        self._gates = {
            number: HeldGate(member.gate, _home(decoder.blocks[member.gate.block], decoder.model))
            for number, member in enumerate(members)
            if member.gate is not None
        }
        # Of the forward that runs now; only kept where positions or gates ask for it.
        self._forward: Forward | None = None
        self._index: Tensor | None = None
        self._per_forward = bool(self._gates) or not (
            self._mask is None
            and (positions == "all" or (positions == "text" and not self._image_ids))
        )
        self._reached = dict.fromkeys(self._tables, False)
        self.strengths = strengths
        self._hooks = self._install(decoder)

    def _install(self, decoder: DecoderView) -> list[Any]:
        hooks: list[Any] = []
        if self._tables:
            hooks += self._watch_graphs(decoder)
        if self._per_forward:
            for module in wrappers(decoder.model):
                if not hasattr(module, "_orig_mod"):  # torch.compile's wrapper calls what it wraps
                    begin = self._begin(module)
                    hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                    hooks.append(module.register_forward_hook(self._end, always_call=True))
        # A gate before the steering of its own block.
        for number, held in self._gates.items():
            block = decoder.blocks[held.gate.block]
            hooks.append(block.register_forward_hook(self._decide(number, held)))
        for number in self._tables:
            hooks.append(decoder.blocks[number].register_forward_hook(self._steer(number)))
        return hooks

    def _watch_graphs(self, decoder: DecoderView) -> Iterator[Any]:
        """Checks after each call of what is compiled, as a whole or in place, and holds blocks that
        are steered here."""
        for module in wrappers(decoder.model):
            if hasattr(module, "_orig_mod"):
                yield from hooked(module, Reached(self._reached, list(self._tables)))
        for module in decoder.model.modules():
            if module._compiled_call_impl is not None:
                inside = set(module.modules())
                steered = [n for n in self._tables if decoder.blocks[n] in inside]
                if steered:
                    yield CompiledInPlace.watch(module, Reached(self._reached, steered))

    # --- what a user sets -------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """The factor a. Setting it, from any thread, takes effect at the next block that runs; 0
        changes no bit. For a bank: setting sets all, reading raises where they differ."""
        if len(set(self._strength_values)) > 1:
            raise ValueError(f"a bank of several strengths, {self.strengths}: read `strengths`")
        return self._strength_values[0]

    @strength.setter
    def strength(self, value: float) -> None:
        self.strengths = [value] * self._n_members

    @property
    def strengths(self) -> list[float]:
        """The factor of each member."""
        return list(self._strength_values)

    @strengths.setter
    def strengths(self, values: Sequence[float]) -> None:
        values = [float(value) for value in values]
        if len(values) != self._n_members:
            raise ValueError(f"{len(values)} strengths for {self._n_members} vectors: one for each")
        _check_finite(values)
        self._strength_values = values
        self._strengths.set(torch.tensor(values, dtype=torch.float32))

    def rows(
        self,
        rows: Sequence[int] | None,
        *,
        strengths: Sequence[float] | None = None,
        repeats: int = 1,
    ) -> None:
        """Chooses what steers each row of the batch: the number of a member, -1 for nothing.

        One entry per row; a handle of SteeringVectors has the one member 0. The next forwards must
        have as many rows; others raise there. None steers all rows again (not for a bank).
        strengths: one per row, in the place of the members' own, until the next call.
        repeats: generate() repeats each row num_beams, or num_return_sequences, times, one copy
            after the other; give that number here. Reordering beams never mixes rows.
        """
        if rows is None:
            self._rows = self._slots = None
            return
        if bad := [row for row in rows if row not in range(-1, self._n_members)]:
            steer = "0 (steer)" if self._n_members == 1 else f"0 to {self._n_members - 1}"
            raise ValueError(f"rows takes {steer} or -1 (leave alone) per batch row, got {bad}")
        if strengths is not None and len(strengths) != len(rows):
            raise ValueError(f"{len(strengths)} strengths for {len(rows)} rows: give one for each")
        _check_finite(strengths or ())
        chosen = torch.tensor(rows, dtype=torch.int32).repeat_interleave(repeats)
        self._rows = self._updated(self._rows, chosen)
        if strengths is None:
            self._slots = None
            return
        values = torch.tensor(strengths, dtype=torch.float32).repeat_interleave(repeats)
        places = chosen.clamp(min=0).long()
        old = self._slots
        if old is None or old.strengths.shape != values.shape:
            self._slots = _Slots(self._tables, places, self._mirrored(values))
        else:
            old.strengths.set(values)
            for block, table in old.tables.items():
                table.set(self._tables[block].value[places])

    @property
    def prompt_length(self) -> int | list[int] | None:
        """How many columns of the text, padding included, are the prompt: one number, or one for
        each row. None: read from the cache (see grains_ext.steering.positions).

        Needed where the cache does not show it: speculative decoding, generate(use_cache=False),
        scoring prompt and continuation in one forward.
        """
        if self._prompt_length is None:
            return None
        lengths = self._prompt_length.value.tolist()
        return lengths[0] if len(lengths) == 1 else lengths

    @prompt_length.setter
    def prompt_length(self, value: int | Sequence[int] | Tensor | None) -> None:
        if value is None:
            self._prompt_length = None
            return
        lengths = torch.as_tensor(value).cpu()
        if lengths.is_floating_point() or lengths.ndim > 1 or not (lengths >= 0).all():
            raise ValueError(f"prompt_length takes whole numbers from 0, got {value}")
        lengths = lengths.reshape(-1).to(torch.int64)
        self._prompt_length = self._updated(self._prompt_length, lengths)

    @property
    def positions(self) -> Positions:
        """As they were given to `apply`."""
        return self._positions

    @property
    def decisions(self) -> dict[int, Tensor]:
        """What the gates that hold their decision have decided: {member: bool [rows]}, True where
        the prompt is steered."""
        return {n: held.decisions() for n, held in self._gates.items() if held.rows}

    def remove(self) -> None:
        """Takes the hooks off; the model is as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> "SteeringHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # --- what a forward runs ----------------------------------------------------------------------

    def _begin(self, module: nn.Module) -> Callable[..., None]:
        names = list(inspect.signature(module.forward).parameters)
        if "input_ids" not in names:  # a wrapper that hands on what it is given
            names = list(inspect.signature(unwrap(module).forward).parameters)

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            told = self._prompt_length
            forward = Forward.of(arguments, told_prompt_lengths(module) if told is None else told)
            self._forward = forward
            positions = self._positions
            if self._mask is not None:
                positions = self._mask.on(forward.device)
            index = self._members_of_rows(forward)
            tokens = steered_tokens(forward, positions, self._image_ids)
            if tokens is not None:
                index = torch.where(tokens, index, -1)
            self._index = index.expand(forward.rows, forward.length)

        return begin

    def _members_of_rows(self, forward: Forward) -> Tensor:
        """int32 [B, 1] or [1, 1]."""
        if self._rows is None:
            self._check_rows_known()
            return torch.zeros(1, 1, dtype=torch.int32, device=forward.device)
        rows = self._rows.on(forward.device)
        _check_batch(rows, forward.rows)
        return rows[:, None]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forward = self._index = None

    def _decide(self, number: int, held: HeldGate) -> Callable[..., None]:
        def decide(module: nn.Module, args: Any, output: Any) -> None:
            index = self._running_index()
            assert self._forward is not None
            is_open = held.opened(hidden_states_of(output), self._forward).to(index.device)
            self._index = torch.where((index == number) & ~is_open, -1, index)

        return decide

    def _running_index(self) -> Tensor:
        if self._index is None:
            raise RuntimeError(
                "this steering acts at some positions or behind a gate, and a decoder block was "
                "called without its model: call the model itself, or steer positions='all'"
            )
        return self._index

    def _steer(self, block: int) -> Callable[..., Any]:
        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            self._reached[block] = True
            hidden = hidden_states_of(output)
            index = self._index_at(block, hidden)
            table, strengths = self._tables[block], self._strengths
            if self._slots is not None and index is not None:
                table, strengths = self._slots.tables[block], self._slots.strengths
                index = _slot_of(index)
            # The op wants directions in the states' dtype: theirs under autocast may be another.
            vectors = table.on(hidden.device, hidden.dtype)
            steered = (ops.steer_add_normalize if self._normalize else _add)(
                hidden, vectors, strengths.on(hidden.device), index, self._eps
            )
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        return steer

    def _index_at(self, block: int, hidden: Tensor) -> Tensor | None:
        """int32 [B] or [B, T]: the member that steers each row or token, -1; None: 0 for all."""
        if self._per_forward:
            index = self._running_index().to(hidden.device)
            if index.shape != hidden.shape[:2]:
                raise ValueError(
                    f"block {block} gives states {list(hidden.shape)}, the model was called with "
                    f"{list(index.shape)} tokens: positions cannot be told; steer 'all'"
                )
        elif self._rows is not None:
            index = self._rows.on(hidden.device)
            _check_batch(index, hidden.shape[0])
        else:
            self._check_rows_known()
            return None
        steers = self._steers[block]
        if steers is not None:
            member = index.clamp(min=0).long()
            index = torch.where(steers.on(hidden.device)[member], index, -1)
        return index

    def _check_rows_known(self) -> None:
        if self._n_members > 1:
            raise ValueError(
                f"a bank of {self._n_members} vectors does not know which of them steers which "
                "row: call handle.rows([...]) first"
            )

    def _mirrored(self, value: Tensor) -> Mirrored:
        # Copies where the blocks compute, before a compiler sees them.
        return Mirrored(value, [(device, value.dtype) for device, _ in self._homes])

    def _updated(self, old: Mirrored | None, value: Tensor) -> Mirrored:
        """Written into what graphs hold already, where the shape allows."""
        if old is None or old.shape != value.shape:
            return self._mirrored(value)
        old.set(value)
        return old


class _Slots:
    """A table of directions with a place for each row of the batch, for strengths by row."""

    def __init__(self, tables: dict[int, Mirrored], places: Tensor, strengths: Mirrored) -> None:
        self.strengths = strengths
        self.tables = {
            block: Mirrored(table.value[places], table.homes) for block, table in tables.items()
        }


def _slot_of(index: Tensor) -> Tensor:
    slots = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return torch.where(index < 0, -1, slots.reshape(-1, *(1,) * (index.ndim - 1)))


def _add(
    hidden: Tensor, vectors: Tensor, strength: Tensor, index: Tensor | None, eps: float
) -> Tensor:
    """h + a v, with the op's arguments; eps is the norm's, and there is none."""
    scaled = (strength[:, None] * vectors).to(hidden.dtype)
    if index is None:
        return hidden + scaled[0]
    added, alone = scaled[index.clamp(min=0).long()], index < 0
    if index.ndim == 1:
        added, alone = added[:, None], alone[:, None]
    return torch.where(alone[..., None], hidden, hidden + added)


def check_fits(vectors: "SteeringVectors", decoder: DecoderView) -> None:
    """Raises ValueError where the model has another hidden size, or no such block."""
    if vectors.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"the direction of block {vectors.blocks[0]} has {vectors.hidden_size} values, the "
            f"model's hidden size is {decoder.hidden_size}: these vectors were made for another "
            "model"
        )
    decoder.check_blocks(vectors.blocks)


def _check_batch(rows: Tensor, batch: int) -> None:
    if rows.shape[0] != batch:
        raise ValueError(
            f"rows() was given {rows.shape[0]} entries (its index), the batch has {batch} rows: "
            "give one for each; where generate() makes several of each row, pass repeats="
        )


def _check_finite(strengths: Iterable[float]) -> None:
    largest = torch.finfo(torch.float32).max
    if bad := [value for value in strengths if not abs(value) <= largest]:
        raise ValueError(f"strengths must be finite in float32, got {bad}")


def _home(block: nn.Module, model: nn.Module) -> Home | None:
    """Where a block computes, and the dtype its output most likely has; None if not to be known
    before it runs (accelerate keeps the weights elsewhere)."""
    parameter = next(block.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return None
    dtype = parameter.dtype if parameter.is_floating_point() else getattr(model, "dtype", None)
    return parameter.device, dtype or torch.float32
