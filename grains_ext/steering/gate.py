"""A gate: a fitted condition on one block's output that says whether a prompt is steered at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grains_ext.attribution.shortcuts import alone_with
from grains_ext.decoder import DecoderView, view_of
from grains_ext.pair_batches import iter_prompt_batches
from grains_ext.pairs import Message, PreferencePair
from grains_ext.steering.probe import fit_logistic

Text = str | list[Message]
# With images: a pair, of which the answers play no part, or a prompt and its images.
Prompt = Text | tuple[Text, Sequence[Any]] | PreferencePair
KINDS = ("cosine", "probe")
WHEN = ("prompt", "any", "token")


@dataclass(frozen=True, eq=False)
class Gate:
    """Steer where score(h) > threshold, h being the output of an early block.

    kind "cosine": score = <h - center, direction> / (‖h - center‖ ‖direction‖), in [-1, 1]
        (conditional activation steering, Lee et al. 2024, arXiv 2409.05907, on centred states).
    kind "probe": score = <h - center, direction>, a linear probe; its bias is in the threshold.

    block: whose output is read, 0-based; no block before it can be steered.
    direction, center: float32 [D], finite; center is zeros by default.
    threshold: finite.
    when: "prompt" decides once per row, at the last token of the prompt, and holds for all that is
        generated from it; "any" likewise, and opens where any token of the prompt but the first
        passes; "token" decides for each token from its own state.
    metadata: JSON values that say how it was made.

    Raises ValueError where any of this does not hold.
    """

    block: int
    direction: Tensor
    threshold: float
    kind: str = "cosine"
    center: Tensor | None = None
    when: str = "prompt"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 0:
            raise ValueError(f"a gate's block is a whole number from 0, got {self.block!r}")
        for name, value, known in (("kind", self.kind, KINDS), ("when", self.when, WHEN)):
            if value not in known:
                raise ValueError(f"a gate's `{name}` must be one of {known}, got {value!r}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"a gate's threshold must be finite, got {self.threshold}")
        direction = checked_direction(self.direction, "the gate's direction")
        center = torch.zeros_like(direction) if self.center is None else self.center
        center = checked_direction(center, "the gate's center")
        if center.shape != direction.shape:
            raise ValueError(
                f"the gate's center has {len(center)} values, its direction {len(direction)}"
            )
        if not direction.any():
            raise ValueError("the gate's direction is zero: every state would score the same")
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "center", center)

    @property
    def hidden_size(self) -> int:
        return self.direction.shape[0]


def checked_direction(direction: Any, name: str) -> Tensor:
    """float32 [D] on the CPU. Raises ValueError, with the name, for anything else."""
    if not isinstance(direction, Tensor) or direction.ndim != 1 or direction.shape[0] == 0:
        shape = list(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(f"{name} must be a tensor [D], got {shape}")
    if not direction.is_floating_point():
        raise ValueError(f"{name} must be float32, got {direction.dtype}")
    # A copy: the caller may change its own, and safetensors wants no two that share memory.
    copied: Tensor = direction.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not torch.isfinite(copied).all():
        raise ValueError(f"{name} has values that are not finite")
    return copied


def score(hidden: Tensor, direction: Tensor, center: Tensor, kind: str) -> Tensor:
    """float32 [...] of hidden [..., D]."""
    shifted = hidden.float() - center
    # Not a matrix product: autocast would run that in half precision.
    along: Tensor = (shifted * direction).sum(-1)
    if kind == "probe":
        return along
    norms: Tensor = shifted.norm(dim=-1) * direction.norm()
    return along / norms.clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def fit_gate(
    model: nn.Module,
    processor: Any,
    inside_prompts: Sequence[Prompt],
    outside_prompts: Sequence[Prompt],
    *,
    block: int,
    kind: str = "cosine",
    when: str = "prompt",
    false_positive_rate: float = 0.05,
    seed: int = 0,
    max_batch_tokens: int = 4096,
    decoder: DecoderView | None = None,
) -> Gate:
    """A gate that opens for prompts like inside_prompts and stays shut for the others.

    processor: the model's tokenizer, or its processor, which prompts with images need.
    inside_prompts, outside_prompts: strings, chat messages, (prompt, images), or preference pairs,
        of which prompt and images count; with images and without may be mixed. Half of each, drawn
        by seed, is fitted on; the other half of outside_prompts sets the threshold, that of
        inside_prompts tells how many are let in.
    block: whose output is read: the first that is steered, or an earlier one. Middle blocks tell
        topics apart best.
    kind: "cosine": with the difference of the two means, from the outside mean. "probe": logistic
        regression; needs more prompts, finds what a difference of means does not.
    when: see Gate. "any" and "token" are fitted on all tokens of the prompts, those of images too,
        but the first, whose state is like no other's.
    false_positive_rate: of prompts drawn like outside_prompts at most this share opens the gate,
        with "any" and "token" at any of its tokens but the first, on average over draws of the half
        that sets the threshold: the split-conformal quantile (Vovk et al. 2005; Angelopoulos &
        Bates 2021, arXiv 2107.07511) of each prompt's largest score, since the tokens of one prompt
        are not exchangeable. Needs at least 1 / rate - 1 prompts in that half. Of tokens that are
        generated later it says nothing.

    The metadata holds the counts, the share of held-out inside prompts that open the gate, with
    "any" and "token" at any token, and the share of the held-out outside prompts that do.

    max_batch_tokens: bounds rows x padded length of a forward, image tokens included.

    Raises ValueError for too few prompts, where the two sets look the same to this block, and
    naming the prompt that does not encode: an image that does not open, images for a tokenizer.
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be in (0, 1), got {false_positive_rate}")
    for name, value, known in (("kind", kind, KINDS), ("when", when, WHEN)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}")
    view = view_of(model, decoder)
    [block] = view.check_blocks([block])
    sets = {"inside_prompts": inside_prompts, "outside_prompts": outside_prompts}
    if wrong := [name for name, prompts in sets.items() if isinstance(prompts, str)]:
        raise ValueError(f"{wrong[0]} must be several prompts, got one: put it in a list")
    needed = math.ceil(1 / false_positive_rate - 1)
    n_inside, n_outside = map(len, sets.values())
    if min(n_inside, n_outside) < 4 or n_outside - n_outside // 2 < needed:
        raise ValueError(
            f"a gate needs 4 prompts inside and {max(4, 2 * needed)} outside for a "
            f"false_positive_rate of {false_positive_rate:g} (half of them are held out), got "
            f"{n_inside} and {n_outside}"
        )
    halves = []
    for name, prompts in sets.items():
        rows = _states(view, processor, name, prompts, block, when, max_batch_tokens)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [rows[i] for i in order]
        halves += [shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]]
    inside_rows, more_inside, outside_rows, more_outside = halves
    inside, outside = torch.cat(inside_rows), torch.cat(outside_rows)
    center = outside.mean(0)
    direction = inside.mean(0) - center
    if direction.norm() <= 1e-5 * outside.norm(dim=-1).mean():
        raise ValueError(
            f"prompts inside and outside give the same states at block {block}: take a later block"
        )
    if kind == "probe":
        n = min(len(inside), len(outside))  # drawn at random already
        probe = fit_logistic(inside[:n], outside[:n])
        center, direction = probe.centre, probe.normal
    # A probe's scale means nothing; at length 1 its scores are lengths along it.
    direction = torch.nn.functional.normalize(direction, dim=0)

    def largest_scores(prompts: list[Tensor]) -> Tensor:
        return torch.stack([score(row, direction, center, kind).max() for row in prompts])

    scores = largest_scores(more_outside).sort().values
    rank = math.ceil((len(scores) + 1) * (1 - false_positive_rate))
    threshold = float(scores[min(rank, len(scores)) - 1])
    metadata = {
        "false_positive_rate": false_positive_rate,
        "held_out_inside_open": _share_above(largest_scores(more_inside), threshold),
        "held_out_outside_open": _share_above(scores, threshold),
        "n_inside": n_inside,
        "n_outside": n_outside,
        "seed": seed,
    }
    return Gate(block, direction, threshold, kind, center, when, metadata)


def _share_above(scores: Tensor, threshold: float) -> float:
    return float((scores > threshold).double().mean())


def _states(
    view: DecoderView,
    processor: Any,
    name: str,
    prompts: Sequence[Prompt],
    block: int,
    when: str,
    max_batch_tokens: int,
) -> list[Tensor]:
    """float32 [n, D] on the CPU of each prompt: the states that the gate will read."""
    states: dict[int, Tensor] = {}
    try:
        with alone_with(view.model):
            for batch in iter_prompt_batches(
                processor,
                [_with_images(prompt) for prompt in prompts],
                max_new_tokens=0,
                max_batch_tokens=max_batch_tokens,
            ):
                with view.capture([block]) as captured:
                    view.model(**batch.forward_arguments(view.model, last=1))
                lengths = batch.inputs["attention_mask"].sum(1).tolist()
                hidden = captured[block].float().cpu()
                for index, length, row in zip(batch.indices, lengths, hidden, strict=True):
                    # Rows end in the last column. The first token's state is like no other's.
                    n_read = 1 if when == "prompt" else max(1, length - 1)
                    states[index] = row[-n_read:].clone()  # not the whole batch behind a view
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return [states[index] for index in range(len(prompts))]


def _with_images(prompt: Prompt) -> tuple[Text, Sequence[Any] | None]:
    if isinstance(prompt, PreferencePair):
        return prompt.prompt, prompt.images
    if not isinstance(prompt, tuple):
        return prompt, None
    if len(prompt) != 2 or not isinstance(prompt[1], list | tuple):
        raise ValueError(f"a prompt with images is (prompt, [image, ...]), got {prompt!r:.80}")
    return prompt
