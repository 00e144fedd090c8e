"""What users run today in place of grains_ext.attribute, each as an expert would, and ours.

All get the same pairs, the same frozen weights and the BOS baseline, and return per pair the scores
of the prompt's tokens, float64 [T]. At equal nodes they agree with each other and with
grains_ext.attribute (tests/test_benchmark_attribution.py); inseq does so for one-token answers from
its own baseline only, see `inseq_contrastive`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.shapes import BOS_ID
from grains_ext.attribution import attribute
from grains_ext.attribution.rules import quadrature
from grains_ext.encoding import EncodedPair, encode_pair
from grains_ext.pairs import PreferencePair

Scores = list[npt.NDArray[np.float64]]
Rival = Callable[..., Scores]
"""(model, tokenizer, pairs, *, method, n_steps, max_batch_tokens) -> scores"""


def loop(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    method: str,
    n_steps: int,
    max_batch_tokens: int = 0,
) -> Scores:
    """Plain PyTorch as it is first written: one step and one answer at a time, all logits."""
    embed = model.get_input_embeddings()
    nodes, weights = quadrature(method, n_steps)
    results = []
    for ids in _encode(tokenizer, pairs):
        prompt, start = _path(model, ids)
        total = torch.zeros_like(prompt)
        for node, weight in zip(nodes, weights, strict=True):
            for sign, answer in ((1, ids.chosen_ids), (-1, ids.rejected_ids)):
                point = (start + node * (prompt - start)).requires_grad_()
                answer_ids = torch.tensor(answer, device=prompt.device)
                embeds = torch.cat([point, embed(answer_ids)])[None]
                logits = model(inputs_embeds=embeds).logits[0]
                logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
                f = sign * logp.gather(-1, answer_ids[:, None]).sum()
                total += weight * torch.autograd.grad(f, point)[0]
        results.append(_scores(total * (prompt - start)))
    return results


def captum_expert(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    method: str,
    n_steps: int,
    max_batch_tokens: int = 1280,
    with_error: bool = False,
) -> Scores:
    """captum's IntegratedGradients on inputs_embeds, f in one forward function, steps in batches.

    LayerIntegratedGradients on the embedding layer does the same work and two forwards more.
    with_error: f at both ends as well, whose difference from the sum of scores is the error.
    """
    from captum.attr import IntegratedGradients

    results = []
    for ids in _encode(tokenizer, pairs):
        prompt, start = _path(model, ids)
        longest = len(prompt) + max(len(ids.chosen_ids), len(ids.rejected_ids)) - 1
        n_rows = 1 if ids.chosen_ids[:-1] == ids.rejected_ids[:-1] else 2
        attributed = IntegratedGradients(_contrast(model, ids)).attribute(
            prompt[None],
            baselines=start[None],
            n_steps=n_steps,
            method=method,
            internal_batch_size=max(1, max_batch_tokens // (n_rows * longest)),
            return_convergence_delta=with_error,
        )
        results.append(_scores((attributed[0] if with_error else attributed)[0]))
    return results


def captum_llm(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    method: str,
    n_steps: int,
    max_batch_tokens: int = 1280,
) -> Scores:
    """captum's LLMGradientAttribution: one Integrated Gradients for every token of both answers."""
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    attributor = LLMGradientAttribution(layer, tokenizer)
    results = []
    for pair, ids in zip(pairs, _encode(tokenizer, pairs), strict=True):
        # BOS is skipped: it stays what it is, and has no score in the result.
        text = TextTokenInput(pair.prompt, tokenizer, baselines=BOS_ID, skip_tokens=[BOS_ID])
        longest = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids)) - 1
        by_answer = [
            attributor.attribute(
                text,
                target=torch.tensor(answer),
                n_steps=n_steps,
                method=method,
                internal_batch_size=max(1, max_batch_tokens // longest),
            ).seq_attr.double()
            for answer in (ids.chosen_ids, ids.rejected_ids)
        ]
        scores = (by_answer[0] - by_answer[1]).cpu().numpy()
        results.append(np.concatenate([[0.0], scores]))
    return results


def inseq_contrastive(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    method: str,
    n_steps: int,
    max_batch_tokens: int = 0,
) -> Scores:
    """inseq's Integrated Gradients of the contrastive step function.

    Its step function takes one point at a time (internal_batch_size=1) and answers of equal length;
    its baseline is <unk> for every token, BOS as well; the answer's earlier tokens move along the
    path with the prompt. Its scores are therefore those of the others for one-token answers only,
    from a baseline of <unk>. It knows no midpoint rule: ``method`` must be "gausslegendre".
    """
    import inseq

    if method != "gausslegendre":
        raise ValueError(f"inseq's rule is gausslegendre, got {method!r}")
    attributor = inseq.load_model(model, "integrated_gradients", tokenizer=tokenizer)
    results = []
    for pair, ids in zip(pairs, _encode(tokenizer, pairs), strict=True):
        out = attributor.attribute(
            input_texts=pair.prompt,
            generated_texts=f"{pair.prompt} {pair.chosen}",
            contrast_targets=f"{pair.prompt} {pair.rejected}",
            attributed_fn="contrast_prob_diff",
            logprob=True,
            n_steps=n_steps,
            internal_batch_size=1,
            show_progress=False,
            device=str(model.device),
        )
        by_step = out[0].target_attributions[: len(ids.prompt_ids)].double()
        results.append(by_step.sum(-1).sum(-1).numpy())
    return results


def ours(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    *,
    method: str,
    n_steps: int,
    max_batch_tokens: int | str = "auto",
    baseline: str | Tensor = "bos",
) -> Scores:
    """grains_ext.attribute in the shape of its rivals."""
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # a few steps do not converge
        results = attribute(
            model,
            tokenizer,
            pairs,
            method=method,
            n_steps=n_steps,
            max_batch_tokens=max_batch_tokens,
            baseline=baseline,
            progress=False,
        )
    return [result.scores.astype(np.float64) for result in results]


def available() -> dict[str, Rival]:
    """The rivals whose packages are installed, by the name that tables show."""
    rivals: dict[str, Rival] = {"loop": loop}
    if find_spec("captum"):
        rivals |= {
            "captum expert": captum_expert,
            "captum expert, error": partial(captum_expert, with_error=True),
            "captum LLM": captum_llm,
        }
    if find_spec("inseq"):
        rivals |= {"inseq": inseq_contrastive}
    return rivals


def _contrast(model: Any, ids: EncodedPair) -> Callable[[Tensor], Tensor]:
    """f [n] of prompt embeddings [n, T, D]: both answers in one batch, logits where scored.

    Answers that are scored on the same input (one-token ones) share it.
    """
    embed = model.get_input_embeddings()
    answers = [ids.chosen_ids, ids.rejected_ids]
    n_scored = max(map(len, answers))
    if ids.chosen_ids[:-1] == ids.rejected_ids[:-1]:
        inputs = [ids.chosen_ids[:-1]]
    else:
        # Padding on the right: no real token attends it.
        inputs = [(answer[:-1] + (0,) * n_scored)[: n_scored - 1] for answer in answers]
    tails = embed(torch.tensor(inputs, dtype=torch.int64, device=model.device))

    def f(prompts: Tensor) -> Tensor:
        n = len(prompts)
        rows = torch.cat([prompts.repeat(len(tails), 1, 1), tails.repeat_interleave(n, 0)], dim=1)
        logits = model(inputs_embeds=rows, logits_to_keep=n_scored, use_cache=False).logits
        logp = logits.float().log_softmax(-1).view(len(tails), n, n_scored, -1)
        values = []
        for row, answer in ((logp[0], answers[0]), (logp[-1], answers[1])):
            places = torch.arange(len(answer), device=row.device)
            values.append(row[:, places, torch.tensor(answer, device=row.device)].sum(-1))
        return values[0] - values[1]

    return f


def _encode(tokenizer: Any, pairs: Sequence[PreferencePair]) -> list[EncodedPair]:
    return [encode_pair(tokenizer, pair) for pair in pairs]


@torch.no_grad()
def _path(model: Any, ids: EncodedPair) -> tuple[Tensor, Tensor]:
    """The prompt's embeddings [T, D], and BOS's at every token."""
    embed = model.get_input_embeddings()
    prompt = embed(torch.tensor(ids.prompt_ids, device=model.device))
    return prompt, embed(torch.tensor([BOS_ID], device=model.device)).expand_as(prompt)


def _scores(attributed: Tensor) -> npt.NDArray[np.float64]:
    """[T, D] -> [T]"""
    return attributed.detach().double().sum(-1).cpu().numpy()
