"""Prompts that are scored often: steered at a block, a model is run from that block on only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grains_ext import ops
from grains_ext.decoder import DecoderView, hidden_states_of


@dataclass(frozen=True, eq=False)
class Replay:
    """One batch, with what each decoder block gave and got for it unsteered.

    Steering at block b changes nothing before it, so that a trial costs the blocks after b alone.
    The result is that of the model with the vectors applied, up to rounding.
    """

    view: DecoderView
    inputs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    """Of each block, [N, T, D]."""
    arguments: tuple[dict[str, Any], ...]
    """What each block takes beside the hidden states."""
    rows: Tensor
    columns: Tensor
    """int64 [S]: the positions whose logits are wanted."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, view: DecoderView, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor
    ) -> Replay:
        """Runs the model once. inputs: its keyword arguments for N rows."""
        arguments: list[dict[str, Any]] = [{} for _ in view.blocks]

        def keep(number: int) -> Any:
            def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                arguments[number] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

            return hook

        hooks = [
            block.register_forward_pre_hook(keep(number), with_kwargs=True)
            for number, block in enumerate(view.blocks)
        ]
        try:
            with view.capture() as captured:
                view.model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = tuple(captured[block] for block in range(view.n_blocks))
        return cls(view, inputs, outputs, tuple(arguments), rows, columns)

    def logits(
        self,
        directions: Mapping[int, Tensor] | None = None,
        strength: float = 0.0,
        index: Tensor | None = None,
    ) -> Tensor:
        """float32 [S, V] with these directions added, differentiably in them, or unsteered.

        index: int32 [N, T], 0 where a token is steered and -1 where not; None steers all.
        """
        steered = directions or {}
        first = min(steered, default=self.view.n_blocks - 1)
        hidden = self.outputs[first]
        factor = torch.tensor(float(strength))
        for block in range(first, self.view.n_blocks):
            if block > first:
                output = self.view.blocks[block](hidden, **self.arguments[block])
                hidden = hidden_states_of(output)
            if block in steered:
                hidden = ops.steer_add_normalize(hidden, steered[block].to(hidden), factor, index)
        scored = hidden[self.rows, self.columns]
        if self.view.final_norm is not None:
            scored = self.view.final_norm(scored)
        return self.view.head(scored).float()

    @torch.no_grad()
    def logits_of(self, model: Any) -> Tensor:
        """float32 [S, V] of another model, all of it: one with its weights changed."""
        return model(**self.inputs, use_cache=False).logits[self.rows, self.columns].float()
