"""A gate at work in a model: where its tensors are, and what it has decided."""

import torch
from torch import Tensor

from grains_ext.steering.gate import Gate, score
from grains_ext.steering.mirrored import Home, Mirrored
from grains_ext.steering.positions import Forward

# Rows that a gate has room for at once; a larger batch makes it ask for more.
_CAPACITY = 1024


class HeldGate:
    """A gate at work: its tensors where the block computes, and what it decided for each row."""

    def __init__(self, gate: Gate, home: Home | None) -> None:
        assert gate.center is not None  # filled in by Gate itself
        self.gate = gate
        #: Rows of the last prompt that was decided on.
        self.rows = 0
        device = [(home[0], torch.float32)] if home is not None else []
        self._direction = Mirrored(gate.direction, device)
        self._center = Mirrored(gate.center, device)
        self._held = _unheld(home[0] if home is not None else torch.device("cpu"), _CAPACITY)

    def opened(self, hidden: Tensor, forward: Forward) -> Tensor:
        """bool [B, T] for when="token", else [B, 1], of block outputs [B, T, D]."""
        if self.gate.when == "token":
            return self._passes(hidden)
        rows = hidden.shape[0]
        if rows > len(self._held) or self._held.device != hidden.device:
            self._held = _unheld(hidden.device, max(rows, len(self._held)))
        held = self._held[:rows]
        ends = forward.ends_prompt()
        if ends is False:
            if rows != self.rows:
                raise ValueError(
                    f"the gate decided on a prompt of {self.rows} rows, and {rows} rows continue "
                    "it: repeat rows before the prompt is read, as generate() does"
                )
            return held[:, None]
        self.rows = rows
        if self.gate.when == "any":
            counted = (forward.prompt() & forward.but_first()).to(hidden.device)
            passes = (self._passes(hidden) & counted).any(-1) | _kept(held, forward)
        else:
            places = forward.last_token().to(hidden.device).expand(rows)
            passes = self._passes(hidden[torch.arange(rows, device=hidden.device), places])
            if isinstance(ends, Tensor):
                passes = torch.where(ends.to(hidden.device), passes, _kept(held, forward))
        # In place: what a CUDA graph of a decoding step reads is what the prompt's forward wrote.
        held.copy_(passes)
        return passes[:, None]

    def decisions(self) -> Tensor:
        return self._held[: self.rows].cpu()

    def _passes(self, hidden: Tensor) -> Tensor:
        direction = self._direction.on(hidden.device)
        center = self._center.on(hidden.device)
        return score(hidden, direction, center, self.gate.kind) > self.gate.threshold


def _kept(held: Tensor, forward: Forward) -> Tensor:
    """What earlier chunks of the prompt have decided; nothing where this is its first."""
    begins = forward.begins()
    if isinstance(begins, Tensor):
        return held & ~begins.to(held.device)
    return torch.zeros_like(held) if begins else held


def _unheld(device: torch.device, rows: int) -> Tensor:
    with torch.inference_mode(False):
        held = torch.zeros(rows, dtype=torch.bool, device=device)
    if not torch.compiler.is_compiling():
        # One that graphs may write to, and find what they wrote in their next run.
        torch._dynamo.mark_static_address(held)
    return held
