"""What steering must beat: other directions, in the same units and steered by the same op.

Every function takes the model, its tokenizer or processor and pairs, as `fit` does, and returns
SteeringVectors as long as the hidden states of their block (`assemble`). h(x) is a block's output
at the last token of x, q a prompt, c and r its chosen and rejected answers. ``options`` are those
of `Options`. All but `fit_probe` read streams of any length in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Protocol, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from grains_ext.attribution.shortcuts import alone_with
from grains_ext.decoder import DecoderView, hidden_states_of, view_of
from grains_ext.encoding import pair_name
from grains_ext.pair_batches import PairBatch, iter_batches
from grains_ext.pairs import PreferencePair
from grains_ext.steering.contrast import Contrast, Reading, answers_contrast
from grains_ext.steering.direction import Moments
from grains_ext.steering.extract import StateReader
from grains_ext.steering.fit_settings import Blocks
from grains_ext.steering.fitting import (
    assemble,
    block_numbers,
    by_name,
    fit,
    fitting_bar,
)
from grains_ext.steering.probe import fit_logistic
from grains_ext.steering.prompts import Numbered, Prompt, chunks, prompt_groups
from grains_ext.steering.shifts import Shifts
from grains_ext.steering.vectors import SteeringVectors

_SKETCH_SIZE = 128
# Pairs whose gradients of all blocks are in memory at a time: 33 MB at 32 blocks of 4096.
_GRADIENTS_HELD = 64


class Options(TypedDict, total=False):
    """Of every baseline; the meaning and the defaults are those of `fit`."""

    blocks: Blocks
    max_batch_tokens: int
    separator: str | None
    progress: bool
    decoder: DecoderView | None


def fit_caa(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    method: str = "mean",
    pooled: bool = False,
    **options: Unpack[Options],
) -> SteeringVectors:
    """Contrastive Activation Addition: v = mean over pairs of h(q + c) - h(q + r).

    Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", 2024, equation 1. It is
    the mass-mean shift of Li et al. 2023 too.

    method: other aggregates of the differences, as in `fit`; "whitened" is the mass-mean probe with
        its covariance (Marks and Tegmark 2023, section 5).
    pooled: h is the mean over the answer's tokens, not the state at its last one.
    """
    run = _Run(model, processor, options, sketch=method != "mean")
    for group in run.groups(pairs):
        run.gather(group, lambda prompt: answers_contrast(prompt, pooled=pooled))
    return run.vectors(method, {"method": "caa", "aggregate": method, "pooled": pooled})


def fit_icv(
    model: Any, processor: Any, pairs: Iterable[PreferencePair], **options: Unpack[Options]
) -> SteeringVectors:
    """In-Context Vectors: the first principal component of h(q + c) - h(q + r), all blocks jointly.

    v maximises the sum over pairs of (v . d)², d being the differences of all blocks in one vector;
    its sign is the mean's. Liu, Ye, Xing, Zou, "In-context Vectors", 2023, section 3.2. (Their code
    adds the mean to a centred component; about 0 it is in the component already.)
    """
    run = _Run(model, processor, options, sketch=True, joint=True)
    for group in run.groups(pairs):
        run.gather(group, answers_contrast)
    return run.vectors("pca", {"method": "icv"})


def fit_lat(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    seed: int = 0,
    **options: Unpack[Options],
) -> SteeringVectors:
    """Linear Artificial Tomography (RepE): the first principal component of unordered differences.

    Each h(q + c) - h(q + r) gets a random sign, the signed ones are centred, and v is their first
    component; only then the labels give it its sign, so that chosen answers project higher on
    average. Zou et al., "Representation Engineering", 2023, section 3.1. Their prompt template
    around the answer is the pairs' own affair.

    seed: of the signs.
    """
    run = _Run(model, processor, options)
    generator = torch.Generator().manual_seed(seed)
    signed = Moments(_SKETCH_SIZE)
    for group in run.groups(pairs):
        flips = torch.randint(0, 2, (len(group),), generator=generator) * 2 - 1
        for place, states in run.states(group, answers_contrast):
            clean, chosen, rejected = states
            run.shifts.add(group[place].number, clean, {1: chosen - rejected})
            signed.add((flips[place] * (chosen - rejected))[None])
    means = torch.stack([*run.shifts.directions("mean").values()])
    components = signed.spectrum(centred=True).vectors[:, 0].float()
    along = (components * means).sum(-1, keepdim=True)
    components = components * torch.where(along < 0, -1.0, 1.0)
    directions = dict(zip(run.blocks, components, strict=True))
    return run.assembled(directions, {"method": "lat", "seed": seed})


def fit_probe(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    penalty: float = 1.0,
    max_pairs: int = 4096,
    **options: Unpack[Options],
) -> SteeringVectors:
    """ITI's probe direction: the normal w of a logistic regression of chosen against rejected.

    p(chosen | h) = sigmoid(w . (h - b)) on h(q + c) and h(q + r), one probe for each block, with
    ``penalty`` * ‖w‖² / 2 on states scaled to unit variance. Li et al., "Inference-Time
    Intervention", 2023, sections 3 and 4, on block outputs where they probe attention heads. (Their
    mass-mean shift is `fit_caa`.) ITI steers where probes are right: metadata["probe_accuracy"]
    holds each block's accuracy on odd pairs of a probe on even ones, for `vectors.subset`.

    max_pairs: all states are in memory, 8 D bytes for each pair and block: only the first so many
        pairs are read.
    """
    run = _Run(model, processor, options)
    answered: dict[int, Tensor] = {}
    for group in run.groups(islice(pairs, max_pairs)):
        for place, states in run.states(group, answers_contrast):
            clean, own_chosen, own_rejected = states
            run.shifts.add(group[place].number, clean, {1: own_chosen - own_rejected})
            answered[group[place].number] = states[1:].clone()  # not the batch behind a view
    # [2, n, blocks, D]. States come in the order of their lengths: pairs back into their own.
    sides = torch.stack([answered.pop(number) for number in sorted(answered)], dim=1)
    directions, accuracies = {}, {}
    for place, block in enumerate(run.blocks):
        directions[block] = fit_logistic(*sides[:, :, place], penalty=penalty).normal
        if sides.shape[1] > 1:
            probe = fit_logistic(*sides[:, ::2, place], penalty=penalty)
            accuracies[block] = probe.accuracy(*sides[:, 1::2, place])
    metadata = {"method": "probe", "penalty": penalty, "probe_accuracy": by_name(accuracies)}
    return run.assembled(directions, metadata)


def fit_vti(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    n_masks: int = 10,
    mask_share: float = 0.99,
    seed: int = 0,
    **options: Unpack[Options],
) -> SteeringVectors:
    """Visual and Textual Intervention, on the decoder: v = v_image / ‖v_image‖ + v_text / ‖v_text‖.

    v_image is the first principal component of h(q, mean image features) - h(q): the features are
    averaged over ``n_masks`` copies of the images in which a random ``mask_share`` of 24 x 24 cells
    has the mean colour. v_text is that of h(q + c) - h(q + r). Liu, Ye, Zou, "Reducing
    Hallucinations in Vision-Language Models via Latent Space Steering", 2024, section 4. They shift
    the features inside the vision tower; here, where towers are never touched, what that does to
    the decoder's states. They average over 50 copies.

    seed: of the masks. Raises ValueError for a pair without images.
    """
    run = _Run(model, processor, options, sketch=True)
    texts = Shifts(run.blocks, sketch_size=_SKETCH_SIZE)
    generator = np.random.default_rng(seed)
    for group in run.groups(pairs):
        [prompt] = _with_images(group)
        averaged = _averaged(run, prompt, n_masks, mask_share, generator)
        [(_, [shifted])] = run.reader.read([(averaged, [Reading()])])
        [(_, [clean, chosen, rejected])] = run.states([prompt], answers_contrast)
        run.shifts.add(prompt.number, clean, {1: shifted - clean})
        texts.add(prompt.number, clean, {1: chosen - rejected})
    parts = (run.shifts.directions("pca"), texts.directions("pca"))
    directions = {
        block: sum((normalize(part[block], dim=0) for part in parts), torch.zeros(()))
        for block in run.blocks
    }
    metadata = {"method": "vti", "n_masks": n_masks, "mask_share": mask_share, "seed": seed}
    return run.assembled(directions, metadata)


def fit_gradient(
    model: Any, processor: Any, pairs: Iterable[PreferencePair], **options: Unpack[Options]
) -> SteeringVectors:
    """v = mean over pairs of the gradient of log p(c | q) - log p(r | q) by a shift of the block.

    The shift is one vector added to the block's output at every token, at 0: what steering adds. It
    is the first step of a direction that is optimised from 0, and the steepest one.
    """
    run = _Run(model, processor, options)
    for chunk in chunks(pairs, _GRADIENTS_HELD):
        gradients: dict[int, Tensor] = {}
        for batch in iter_batches(
            processor,
            [pair for _, pair in chunk],
            separator=options.get("separator"),
            max_batch_tokens=run.max_batch_tokens,
        ):
            rows = _gradients(run.view, run.blocks, batch)
            gradients |= dict(zip(batch.indices, rows, strict=True))
        for group in run.groups_of(chunk):
            for place, (clean,) in run.states(group, _clean):
                number = group[place].number
                shift = gradients[number - chunk[0][0]]
                if not torch.isfinite(shift).all():
                    raise ValueError(
                        f"{pair_name(number, group[place].pair)}: the gradients are not finite: "
                        "load the model in bfloat16 or float32"
                    )
                run.shifts.add(number, clean, {1: shift})
    return run.vectors("mean", {"method": "gradient"})


def fit_random_tokens(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> SteeringVectors:
    """`fit` with a standard normal draw for each token's attribution score (its ablation).

    seed: of the draws. options: those of `fit`.
    """
    vectors = fit(model, processor, pairs, select="random", seed=seed, progress=progress, **options)
    return replace(vectors, metadata={**vectors.metadata, "method": "random_tokens", "seed": seed})


def fit_random_direction(
    model: Any,
    processor: Any,
    pairs: Iterable[PreferencePair],
    *,
    seed: int = 0,
    **options: Unpack[Options],
) -> SteeringVectors:
    """A uniformly random direction per block, as long as `fit`'s: what any push at all does.

    The pairs give the length alone. seed: of the draw; one block's direction does not depend on
    which others are asked for.
    """
    run = _Run(model, processor, options)
    for group in run.groups(pairs):
        run.gather(group, _clean)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(run.view.n_blocks, run.view.hidden_size, generator=generator)
    directions = {block: drawn[block] for block in run.blocks}
    return run.assembled(directions, {"method": "random_direction", "seed": seed})


class Prompted(Protocol):
    """A dataclass with a prompt: a PreferencePair, a MultipleChoice item, a Question."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def prompt(self) -> Any: ...


AnyPrompted = TypeVar("AnyPrompted", bound=Prompted)


def with_instruction(items: Iterable[AnyPrompted], instruction: str) -> list[AnyPrompted]:
    """The pairs, choices or questions with an instruction in front of their prompts: prompting in
    the place of steering.

    Before a string and an empty line; for messages in front of what the system message says, or as
    a system message. Raises ValueError for a blank instruction.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty")

    def told(prompt: Any) -> Any:
        if isinstance(prompt, str):
            return f"{instruction}\n\n{prompt}"
        first, *others = prompt
        if first["role"] != "system":
            return [{"role": "system", "content": instruction}, *prompt]
        content = first["content"]
        if isinstance(content, str):
            content = f"{instruction}\n\n{content}"
        else:
            content = [{"type": "text", "text": f"{instruction}\n\n"}, *content]
        return [{**first, "content": content}, *others]

    return [replace(item, prompt=told(item.prompt)) for item in items]


# --- what they share ------------------------------------------------------------------------------


class _Run:
    """One baseline's pass over the pairs."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: Options,
        *,
        sketch: bool = False,
        joint: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.view = view_of(model, options.get("decoder"))
        self.blocks = block_numbers(self.view, options.get("blocks", "all"))
        self.max_batch_tokens = options.get("max_batch_tokens", 4096)
        self.reader = StateReader(self.view, self.blocks, max_batch_tokens=self.max_batch_tokens)
        self.shifts = Shifts(self.blocks, sketch_size=_SKETCH_SIZE if sketch else 0, joint=joint)
        self._separator = options.get("separator")
        self._progress = options.get("progress", False)

    def groups(self, pairs: Iterable[PreferencePair]) -> Iterator[list[Prompt]]:
        for chunk in chunks(pairs):
            yield from self.groups_of(chunk)

    def groups_of(self, chunk: Sequence[Numbered]) -> Iterator[list[Prompt]]:
        with fitting_bar(self._progress, len(chunk)) as advance:
            for group in prompt_groups(self.view, self.processor, chunk, self._separator):
                yield group
                advance(len(group))

    def gather(self, group: Sequence[Prompt], contrast: Callable[[Prompt], Contrast]) -> None:
        self.shifts.gather(self.reader, [(prompt, contrast(prompt)) for prompt in group])

    def states(
        self, group: Sequence[Prompt], contrast: Callable[[Prompt], Contrast]
    ) -> Iterator[tuple[int, Tensor]]:
        """(place in the group, states [readings, blocks, D])."""
        return self.reader.read([(prompt, contrast(prompt).readings) for prompt in group])

    def vectors(self, method: str, metadata: dict[str, Any]) -> SteeringVectors:
        """Of the shifts that were gathered."""
        split_half = by_name(self.shifts.split_half(method))
        return self.assembled(
            self.shifts.directions(method), {**metadata, "split_half_cosine": split_half}
        )

    def assembled(self, directions: dict[int, Tensor], metadata: dict[str, Any]) -> SteeringVectors:
        return assemble(
            self.model,
            directions,
            self.shifts.hidden_norms(),
            {**metadata, "n_pairs": self.shifts.n_pairs},
        )


def _clean(prompt: Prompt) -> Contrast:
    return Contrast((Reading(),), {})


def _with_images(group: Sequence[Prompt]) -> Sequence[Prompt]:
    for prompt in group:
        if prompt.captured is None:
            raise ValueError(
                f"{pair_name(prompt.number, prompt.pair)}: it has no images, and VTI is for "
                "vision-language models: use fit_icv"
            )
    return group


def _gradients(view: DecoderView, blocks: Sequence[int], batch: PairBatch) -> Tensor:
    """Of each pair of a batch, float32 [n, blocks, D] on the CPU."""
    n_rows = len(batch.inputs["input_ids"])
    shifts: dict[int, Tensor] = {}

    def shifted(block: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = hidden_states_of(output)
            shifts[block] = torch.zeros_like(hidden[:, :1], dtype=torch.float32).requires_grad_()
            moved = hidden + shifts[block].to(hidden.dtype)
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return hook

    with torch.inference_mode(False), torch.enable_grad(), alone_with(view.model):
        hooks = [view.blocks[block].register_forward_hook(shifted(block)) for block in blocks]
        try:
            logits = view.model(**batch.arguments(view.model)).logits
        finally:
            for handle in hooks:
                handle.remove()
        chosen, rejected = batch.logprobs(logits)
        found = torch.autograd.grad((chosen - rejected).sum(), [shifts[b] for b in blocks])
    rows = torch.stack([gradient[:, 0].cpu() for gradient in found], dim=1)
    return rows[: n_rows // 2] + rows[n_rows // 2 :]


@torch.no_grad()
def _averaged(
    run: _Run, prompt: Prompt, n_masks: int, mask_share: float, generator: np.random.Generator
) -> Prompt:
    """The prompt with its image features averaged over masked copies of its images."""
    from grains_ext.vision import capture_prompt, open_image

    captured = prompt.captured
    assert captured is not None
    images = [np.asarray(open_image(image).convert("RGB")) for image in prompt.pair.images or ()]
    copies = []
    for _ in range(n_masks):
        masked = tuple(_masked(image, mask_share, generator) for image in images)
        pair = replace(prompt.pair, images=masked)
        copies.append(capture_prompt(run.view, run.processor, pair, separator=captured.separator))
    mean = _mean_of([copy.embeddings for copy in copies])
    extra = {
        name: _mean_of([copy.stack_kwargs[name] for copy in copies])
        for name in captured.stack_kwargs
    }
    return replace(prompt, captured=replace(captured, embeddings=mean, stack_kwargs=extra))


def _mean_of(values: Sequence[Any]) -> Any:
    """Of tensors of features, or lists of them; what is no feature is the same in every copy."""
    first = values[0]
    if isinstance(first, list | tuple):
        return type(first)(_mean_of(items) for items in zip(*values, strict=True))
    if isinstance(first, Tensor) and first.is_floating_point():
        return torch.stack([value.float() for value in values]).mean(0).to(first)
    return first


def _masked(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3] with a share of 24 x 24 cells at its mean colour."""
    cells = generator.permutation(24 * 24).reshape(24, 24) < share * 24 * 24
    rows = np.arange(image.shape[0]) * 24 // image.shape[0]
    columns = np.arange(image.shape[1]) * 24 // image.shape[1]
    colour = image.mean(axis=(0, 1)).round().astype(image.dtype)
    return np.where(cells[rows][:, columns, None], colour, image)
