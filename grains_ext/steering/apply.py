"""Steering a live model: forward hooks on its decoder blocks, and the handle that controls them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grains_ext import ops
from grains_ext.decoder import DecoderView, hidden_states_of


class SteeringHandle:
    """Steering that is switched on. Made by SteeringVectors.apply.

    Each block's output h becomes (h + a v) ‖h‖ / ‖h + a v‖ at every position, in every forward:
    with and without KV cache, in generate(), under autograd. Several handles on one model act one
    after the other, in the order in which they were made. Under torch.compile make the handle
    before the first call of the compiled model (later hooks are ignored); a change of the strength
    is seen without a recompile.
    """

    # A tensor made in inference mode could not be updated, nor steer a training step, outside it.
    @torch.inference_mode(False)
    def __init__(
        self, decoder: DecoderView, directions: Mapping[int, Tensor], strength: float, eps: float
    ) -> None:
        for block, direction in directions.items():
            if direction.shape[-1] != decoder.hidden_size:
                raise ValueError(
                    f"the direction of block {block} has {direction.shape[-1]} values, the model's "
                    f"hidden size is {decoder.hidden_size}: these vectors were made for another "
                    "model"
                )
        blocks = decoder.check_blocks(directions)
        homes = {block: _home(decoder.blocks[block], decoder.model) for block in blocks}
        # One strength tensor per device; updated in place, so that graphs that hold it see it.
        self._strengths = {
            device: torch.zeros((), dtype=torch.float32, device=device)
            for device, _ in homes.values()
        }
        self._index: Tensor | None = None
        self._eps = eps
        self._hooks = [
            decoder.blocks[block].register_forward_hook(
                self._hook(
                    directions[block].to(*homes[block], copy=True), self._strengths[homes[block][0]]
                )
            )
            for block in blocks
        ]
        self.strength = strength

    @property
    def strength(self) -> float:
        """The factor a. Setting it takes effect at the next forward; 0 changes no bit."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = float(value)
        for tensor in self._strengths.values():
            tensor.fill_(self._strength)

    def rows(self, rows: Sequence[int] | None) -> None:
        """Chooses the batch rows to steer: one entry per row, 0 to steer it, -1 to leave it alone.

        None steers all again. The next forwards must have as many rows; other counts raise there.
        """
        if rows is None:
            self._index = None
            return
        bad = [row for row in rows if row not in (-1, 0)]
        if bad:
            raise ValueError(f"rows takes 0 (steer) or -1 (leave alone) per batch row, got {bad}")
        self._index = torch.tensor(list(rows), dtype=torch.int32)

    def remove(self) -> None:
        """Takes the hooks off; the model is as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, direction: Tensor, strength: Tensor) -> Callable[..., Any]:
        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_states_of(output)
            index = self._index
            steered = ops.steer_add_normalize(
                hidden,
                # No copy unless the output's dtype is not the weights' (autocast, quantised ones).
                direction.to(hidden.dtype),
                strength,
                index=None if index is None else index.to(hidden.device),
                eps=self._eps,
            )
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        return steer


def _home(block: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block computes, and the dtype its output most likely has."""
    parameter = next(block.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else getattr(model, "dtype", None)
    return parameter.device, dtype or torch.float32
