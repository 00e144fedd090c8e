"""Contrastive attribution of many pairs: what `grains_ext.attribute` does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grains_ext.attribution.evaluator import Evaluator
from grains_ext.attribution.methods import method_of
from grains_ext.attribution.objective import Objective
from grains_ext.attribution.path import Baseline
from grains_ext.attribution.points import Outcome
from grains_ext.attribution.prepare import Prepared, Preparer
from grains_ext.attribution.result import Attribution
from grains_ext.attribution.runs import Finished, carry_out, check_share, hash_of_pairs, naming
from grains_ext.attribution.settings import Settings
from grains_ext.attribution.shortcuts import alone_with
from grains_ext.attribution.span import Span
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.encoding import EncodedPair, encode_pair
from grains_ext.pairs import PreferencePair
from grains_ext.vision import open_image

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A guess, for grouping alone: it takes the processor to tell.
_TOKENS_WITH_IMAGES = 256


def attribute(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[PreferencePair],
    *,
    method: str = "adaptive",
    baseline: str | Tensor = "bos",
    objective: Objective = "sum",
    n_steps: int | Literal["auto"] = "auto",
    tolerance: float = 0.05,
    top_k: int | None = None,
    attributed_span: Span = None,
    modalities: Sequence[str] = ("text", "image"),
    image_baseline: str = "mean",
    max_batch_tokens: int | Literal["auto"] = "auto",
    seed: int = 0,
    separator: str | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
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
        model: a transformers causal LM or vision-language model in float32, bfloat16 or float16.
            Its weights get no gradients, and its training mode is restored. In the half precisions
            scores carry an error of 1-2 %, so that a tolerance below 0.02 means nothing there.
        tokenizer: its tokenizer, or the processor of a vision-language model.
        pairs: what to attribute. Results come in the same order.
        method: "adaptive" refines the path where its error is large; "gausslegendre" and
            "riemann_middle" take n_steps points; "gradient_x_input", "smoothgrad" (n_steps noisy
            copies) and "occlusion" are other methods on the same engine, to compare with. These
            three promise no completeness: see ``residual``.
        baseline: "bos", "mean", "pad", "unk", "mask", "zero" or a tensor [D] or [T, D]; see
            `grains_ext.attribution.path.Baseline`. What text tokens start from.
        objective: what f is: "sum", "mean" (per token), "first" (the first token in which the
            answers differ), "chosen" or "rejected" (one answer alone), or a callable that takes
            `grains_ext.attribution.objective.ScoredLogits` and returns a tensor [n].
        n_steps: points per path. "auto" is a limit of 128 for "adaptive", 50 points for the others.
        tolerance: a pair has converged where |residual| <= tolerance * max(1, |f_input -
            f_baseline|): a share of the change of f, and an error in nats where f changes by less
            than one. "adaptive" stops when the error estimates of all panels add up to no more, and
            its last refinement moved the scores by no more.
        top_k: for "adaptive", only the k strongest tokens of each sign must stand still, in place
            of all scores: enough to choose tokens by.
        attributed_span: the tokens that move along the path, (start, end) as in a slice,
            "after_system", or all. The others keep their embedding and score 0. What stands before
            them is read once, not at every point.
        modalities: "text", "image" or both; tokens of the other kind keep their embedding.
        image_baseline: what image tokens start from: "mean" (of the image's tokens), "blur" (the
            features of the blurred image) or "zero".
        max_batch_tokens: tokens per model call, padding included; one sequence that is longer goes
            alone. "auto" predicts from the model's sizes what fits. Where memory runs out, it is
            halved.
        seed: of the noise of "smoothgrad".
        separator: joins prompt and continuation; None is the rule of `encode_pair`.
        output_dir: a directory that results stream to; the same call goes on where an interrupted
            one stopped, and gives the same bits. See `grains_ext.attribution.store`.
        limit: only the first so many pairs.
        shard: (i, n): only the i-th of n shares, 1 <= i <= n.
        progress: show a progress bar.
        decoder: the view of ``model``, where its parts must be named by hand.

    Returns one Attribution per pair (of this limit and shard); pairs that did not converge are
    flagged and counted in a warning. Raises ValueError for wrong arguments, and, naming the pair,
    for one that cannot be attributed: an empty prompt or continuation, equal continuations, more
    tokens than the model has positions, an image that does not open.
    """
    settings = Settings(
        method=method,
        baseline=baseline,
        objective=objective,
        n_steps=n_steps,
        tolerance=tolerance,
        top_k=top_k,
        attributed_span=attributed_span,
        modalities=tuple(modalities),
        image_baseline=image_baseline,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
        separator=separator,
    )
    check_share(limit, shard)
    with torch.inference_mode(False):  # a caller's would leave nothing to differentiate
        run = _Run(model, tokenizer, list(pairs), settings, decoder)
        return carry_out(run, output_dir=output_dir, limit=limit, shard=shard, progress=progress)


@dataclass
class _Run:
    """One call of `attribute`: its pairs, checked and encoded, and the engine for them."""

    model: Any
    processor: Any
    pairs: Sequence[PreferencePair]
    settings: Settings
    decoder: DecoderView | None

    def __post_init__(self) -> None:
        # Hooks and the graphs of torch.compile do not go together: the model as it was before.
        model = getattr(self.model, "_orig_mod", self.model)
        inner = unwrap(model)
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{type(inner).__name__} has an encoder: only decoders are attributed")
        self._view = self.decoder or DecoderView.of(model)
        dtype = next(self._view.embedding.parameters()).dtype
        if dtype not in _DTYPES:
            raise ValueError(
                f"the model is in {dtype}; expected float32, bfloat16 or float16: convert it with "
                "model.float()"
            )
        self._text_tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self._baseline = Baseline(self._view, self._text_tokenizer, self.settings.baseline)
        self._preparer = Preparer(self._view, self.processor, self._baseline, self.settings)
        self._evaluator = Evaluator(self._view, self._preparer, self.settings)
        self._encoded: list[EncodedPair | None] = []
        for number, pair in enumerate(self.pairs):
            with naming(number, pair):
                self._encoded.append(self._encode(pair))

    def attribute_group(self, group: Sequence[int], finished: Finished) -> dict[int, Attribution]:
        """The results of one group, by the number of the pair."""
        with alone_with(self._view.model):
            prepared = []
            for number in group:
                pair = self.pairs[number]
                with naming(number, pair):
                    prepared.append(self._preparer.prepare(number, pair, self._encoded[number]))
            outcomes = self._evaluator.run(prepared, method_of(self.settings), finished)
        return {
            number: self._result(self.pairs[number], one, outcome)
            for number, one, outcome in zip(group, prepared, outcomes, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """What decides the results, for the directory that holds them."""
        model = unwrap(self._view.model)
        config = getattr(model, "config", None)
        return {
            **self.settings.describe(),
            "model": getattr(config, "name_or_path", "") or type(model).__name__,
            "weights": hash_of_weights(model),
            "dtype": str(next(self._view.embedding.parameters()).dtype),
            "pairs": hash_of_pairs(self.pairs, self._encoded),
            "n_pairs": len(self.pairs),
        }

    def _encode(self, pair: PreferencePair) -> EncodedPair | None:
        """None for a pair with images, which takes its turn with its group."""
        if pair.images:
            for image in pair.images:
                open_image(image)  # better now than after hours
            return None
        ids = encode_pair(self.processor, pair, separator=self.settings.separator)
        self._preparer.check(pair, ids)
        return ids

    def length(self, number: int) -> int:
        ids = self._encoded[number]
        return _TOKENS_WITH_IMAGES if ids is None else len(ids.prompt_ids)

    @property
    def device(self) -> str:
        return self._view.device.type

    def _result(self, pair: PreferencePair, prepared: Prepared, outcome: Outcome) -> Attribution:
        ids = prepared.ids.prompt_ids
        scores = outcome.scores.astype(np.float32)
        return Attribution(
            tokens=tuple(self._text_tokenizer.decode([token]) for token in ids),
            token_ids=ids,
            modality=prepared.modality,
            scores=scores,
            f_input=outcome.f_input,
            f_baseline=outcome.f_baseline,
            residual=float(outcome.scores.sum()) - (outcome.f_input - outcome.f_baseline),
            evaluations=outcome.evaluations,
            n_steps=outcome.n_steps,
            converged=outcome.converged,
            method=self.settings.method,
            baseline=self._baseline.name,
            prompt=self._text_tokenizer.decode(ids),
            chosen=pair.chosen,
            rejected=pair.rejected,
            pair_id=pair.id,
            objective=self.settings.objective_name,
            images=prepared.images,
        )


def hash_of_weights(model: nn.Module) -> str:
    """Of the first values of every weight: tells models apart that share a name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        weight = _offloaded(model, name) if parameter.is_meta else parameter
        if type(weight).dequantize is not Tensor.dequantize:  # torchao's tensors have no flatten
            weight = weight.dequantize()
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere between calls."""
    owner, _, own_name = name.rpartition(".")
    hook: Any = model.get_submodule(owner)._hf_hook
    keeper = next(one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "weights_map"))
    weight: Tensor = keeper.weights_map[own_name]
    return weight
