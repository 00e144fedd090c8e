"""Plain additive steering without hooks: folded into the bias of each block's last linear layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grains_ext.decoder import DecoderView, hidden_states_of, unwrap
from grains_ext.scoring import frozen
from grains_ext.steering.apply import check_fits

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors

# Rounding of a block's output when its last layer's bias changes, in units of its dtype's eps and
# its largest value: one addition becomes another, a few roundings each.
_ROUNDING = 16


class Folded:
    """Biases that were changed, and what they were."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, nn.Parameter | None]] = []

    def add(self, layer: Any, direction: Tensor) -> None:
        """bias + direction, in float32, then in the layer's dtype. No bias counts as zeros."""
        bias, weight = layer.bias, layer.weight
        self._before.append((layer, bias))
        dtype = weight.dtype if bias is None else bias.dtype
        added = direction.to(weight.device) + (0.0 if bias is None else bias.detach().float())
        layer.bias = nn.Parameter(added.to(dtype), requires_grad=False)

    def undo(self) -> None:
        """Puts the biases back, the very same parameters. A second call does nothing."""
        while self._before:
            layer, bias = self._before.pop()
            layer.bias = bias


@torch.no_grad()
def fold(
    model: nn.Module,
    vectors: "SteeringVectors",
    strength: float | None = None,
    *,
    decoder: DecoderView | None = None,
) -> Folded:
    """Adds a v to every token of each steered block's output, by a bias; `undo()` takes it out.

    It costs nothing at inference, and travels with the weights: with torch.export, to any runtime.
    In the model's own dtype it is as exact as hooks are. The layer is found by running the block:
    the last linear layer whose bias moves the block's output by exactly itself.

    Raises ValueError for vectors that renormalise or have a gate, and where no layer of a block
    does that: norms or scales after the last layer (Gemma 2, OLMo 2, Granite), mixtures of
    experts, layers that blocks share, weights that accelerate keeps elsewhere.
    """
    if vectors.normalize or vectors.gate is not None:
        what = "have a gate" if vectors.gate is not None else "restore each token's norm"
        raise ValueError(
            f"a bias is added to every token alike, and these vectors {what}: use apply(), or "
            "dataclasses.replace(vectors, normalize=False, gate=None)"
        )
    view = decoder if decoder is not None else DecoderView.of(model)
    a = vectors.strength if strength is None else strength
    directions = vectors.effective().directions
    check_fits(vectors, view)
    folded = Folded()
    try:
        with frozen(view.model):
            calls = _calls(view, list(directions))
            layers = {block: _last_layer(view, block, *calls[block]) for block in directions}
        for block, layer in layers.items():
            folded.add(layer, a * directions[block])
    except BaseException:
        folded.undo()
        raise
    return folded


@torch.no_grad()
def _calls(view: DecoderView, blocks: list[int]) -> dict[int, tuple[Any, Any]]:
    """What the blocks are called with for a text of four tokens."""
    calls: dict[int, tuple[Any, Any]] = {}

    def keep(block: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[block] = (args, kwargs)

        return hook

    hooks = [view.blocks[b].register_forward_pre_hook(keep(b), with_kwargs=True) for b in blocks]
    try:
        unwrap(view.model)(input_ids=torch.arange(4, device=view.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def _last_layer(view: DecoderView, block: int, args: Any, kwargs: Any) -> nn.Module:
    module = view.blocks[block]
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        raise ValueError(
            f"block {block} has weights on the meta device (accelerate keeps them elsewhere and "
            "would lose a bias): use apply()"
        )
    with _ran(module) as ran:
        plain = hidden_states_of(module(*args, **kwargs)).float()
    linear: list[Any] = [
        m for name, m in ran if _has_bias(m, view.hidden_size) and "lora_" not in name
    ]
    for layer in reversed(list(dict.fromkeys(linear))):
        # As long as the states, whatever the vectors are: rounding must not hide a difference.
        probe = torch.linspace(-1, 1, view.hidden_size, device=plain.device)
        probe = (probe * plain.abs().mean()).to(layer.weight.dtype).float()
        trial = Folded()
        try:
            trial.add(layer, probe)
            moved = hidden_states_of(module(*args, **kwargs)).float()
        finally:
            trial.undo()
        size = torch.maximum(plain.abs().max(), moved.abs().max())
        eps = torch.finfo(hidden_states_of(module(*args, **kwargs)).dtype).eps
        if (moved - plain - probe).abs().max() <= _ROUNDING * eps * size:
            _check_alone(view, block, layer)
            chosen: nn.Module = layer
            return chosen
    names = [name for name, m in ran if _has_bias(m, view.hidden_size)]
    raise ValueError(
        f"block {block} ({type(module).__name__}) has no linear layer whose bias is simply added "
        f"to its output; tried {names}: something comes after it (a norm, a scale), or it does not "
        "see every token (experts). Use apply()"
    )


def _has_bias(module: nn.Module, size: int) -> bool:
    if isinstance(module, Conv1D):
        return bool(module.nf == size)
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear)
        and module.out_features == size
        # Packed integers: a bias of theirs would be, too.
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
    )


def _check_alone(view: DecoderView, block: int, layer: nn.Module) -> None:
    """A bias that two layers share would steer in two places."""
    bias: Any = layer.bias
    others = [
        name
        for name, module in unwrap(view.model).named_modules(remove_duplicate=False)
        if module is layer or (bias is not None and getattr(module, "bias", None) is bias)
    ]
    if len(others) > 1:
        raise ValueError(
            f"the last layer of block {block} is shared, {others}: its bias would steer in all of "
            "these places. Use apply()"
        )


@contextmanager
def _ran(block: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules of a block, named, in the order in which they ended."""
    ran: list[tuple[str, nn.Module]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: ran.append((name, module))

    hooks = [module.register_forward_hook(note(name)) for name, module in block.named_modules()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
