"""Integrated Gradients of a decoder as one ONNX graph, which onnxruntime runs without torch.

The graph reads packed rows: the prompt and both answers in one sequence, a tree, as the torch
engine does (`grains_ext.attribution.sequences`). Forward and backward pass are traced together
(docs/decisions/030); the two ops at the ends are nodes of domain `grains` with bodies in standard
operators, so that any onnxruntime runs the file.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

import grains_ext
from grains_ext import ops
from grains_ext.attribution.engine import hash_of_weights
from grains_ext.attribution.path import Baseline, adds_position_embeddings, max_positions
from grains_ext.attribution.rules import BASELINES, DEFAULT_STEPS, quadrature
from grains_ext.attribution.sequences import Answer, pack
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.export.attribution_graph import (
    INPUTS,
    OUTPUTS,
    SETTINGS_KEY,
    TOKENIZER_KEY,
    GraphSettings,
    packed_feeds,
)
from grains_ext.export.errors import ExportError
from grains_ext.export.functions import DOMAIN, OPSET_VERSION, SIGNATURES, add_functions
from grains_ext.export.runtime import session
from grains_ext.export.tokenizing import TokenizerSettings
from grains_ext.export.trace import DEFAULT_OPSET, quiet
from grains_ext.scoring import continuation_logprobs, frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of scores and f, as a share of the largest of them or of 1: what another order of sums costs.
_TOLERANCE = 1e-4
_EXTERNAL_ABOVE_BYTES = 2**30
# torch.onnx.export has no translation of what these decompose to.
_KEPT_WHOLE = ("empty_like", "new_empty", "full_like", "ones_like", "zeros_like")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PER_TOKEN = {0: "batch", 1: "length"}
_PER_TARGET = {0: "batch", 1: "targets"}
_PER_STEP = {0: "steps"}
_AXES: dict[str, dict[int, str] | None] = {
    "input_ids": _PER_TOKEN,
    "branch_ids": _PER_TOKEN,
    "baseline_ids": _PER_TOKEN,
    "baseline_embedding": None,
    "target_columns": _PER_TARGET,
    "target_tokens": _PER_TARGET,
    "target_weights": _PER_TARGET,
    "nodes": _PER_STEP,
    "weights": _PER_STEP,
}


def export_attribution(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | Path,
    *,
    baseline: str = "bos",
    method: str = "gausslegendre",
    n_steps: int = DEFAULT_STEPS,
    opset: int = DEFAULT_OPSET,
    external_data: bool | None = None,
    verify: bool = True,
) -> None:
    """Writes the contrastive attribution of a causal language model as one ONNX file.

        export_attribution(model, tokenizer, "attribution.onnx")
        AttributionGraph("attribution.onnx").attribute(pairs)        # no torch from here on

    The graph gives each token's score under Integrated Gradients, f at both ends of the path, and
    the residual, for any number of rows, tokens and steps; docs/attribution-onnx.md describes its
    inputs. The tokenizer and the settings below lie in its metadata.

    model: it is traced with eager attention; its own is restored. The graph computes in float32:
        a model of another type is copied.
    tokenizer: a fast one of transformers, or the processor that holds it.
    path: the .onnx file; weights above 1 GiB lie beside it in path + ".data".
    baseline, method, n_steps: what a run of the graph takes where it is told nothing else. The
        method is a fixed rule: "gausslegendre" or "riemann_middle".
    opset: 18 or more.
    external_data: weights in a file of their own; None: above 1 GiB.
    verify: compares f with the model's own log-probabilities, and the graph's outputs with torch.

    The file appears complete or not at all. Raises ValueError for wrong settings, and ExportError
    where the model is no decoder, cannot be traced, does not read a mask and positions of our own
    as its own, or where the graph computes something else.
    """
    path = Path(path)
    if opset < 18:
        raise ValueError(f"opset is {opset}; attribution graphs need 18 or more")
    quadrature(method, n_steps)  # raises for what is no rule
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the .onnx file to write")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's own
    tokenizer_settings = TokenizerSettings.of(tokenizer)
    decoder = _decoder(model)
    if model.dtype != torch.float32:
        decoder = DecoderView.of(copy.deepcopy(model).to(torch.float32))
    settings = GraphSettings(
        model=getattr(model.config, "name_or_path", "") or type(model).__name__,
        weights=hash_of_weights(model),
        dtype="float32",
        baseline=baseline,
        method=method,
        n_steps=n_steps,
        max_positions=max_positions(decoder),
        adds_position_embeddings=adds_position_embeddings(decoder),
        tokenizer=tokenizer_settings,
        versions={
            "grains_ext": grains_ext.__version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
    )
    with frozen(decoder.model), _eager_attention(decoder.model):
        graph = _IntegratedGradients(decoder)
        if verify:
            _check_reading(graph, decoder)
        mean = _mean_embedding(decoder, tokenizer)
        program = _traced(graph, decoder, opset)
        if external_data is None:
            size = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
            external_data = size > _EXTERNAL_ABOVE_BYTES
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        work.mkdir()
        try:
            # Under its final name, after which the weights' file is named.
            program.save(str(work / path.name), external_data=external_data)
            _complete(work / path.name, mean, settings, tokenizer)
            if verify:
                _check_graph(graph, decoder, mean, work / path.name)
            # The weights first: the graph is never there without them.
            for file in sorted(work.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _IntegratedGradients(nn.Module):
    """What the graph computes; the argument's names and shapes are the graph's inputs."""

    def __init__(self, decoder: DecoderView) -> None:
        super().__init__()
        self._decoder = decoder  # a plain dataclass: its modules are not submodules of this one
        config = _text_config(decoder)
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if unknown := kinds - _LAYER_TYPES:
            raise ExportError(
                f"models of type '{config.model_type}' cannot be exported: their blocks are of the "
                f"types {sorted(unknown)}, and only full and sliding attention is supported"
            )
        # Without types, a window is that of every block.
        self._kinds = kinds or {"full_attention" if window is None else "sliding_attention"}
        self._window = window

    def forward(
        self,
        input_ids: Tensor,
        branch_ids: Tensor,
        baseline_ids: Tensor,
        baseline_embedding: Tensor,
        target_columns: Tensor,
        target_tokens: Tensor,
        target_weights: Tensor,
        nodes: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decoder = self._decoder
        x = decoder.embed(input_ids)
        named = decoder.embed(baseline_ids.clamp(min=0))
        start = torch.where((baseline_ids < 0)[..., None], baseline_embedding, named)
        # Both ends go along: f at them costs no pass of its own.
        alphas = torch.cat([nodes.new_zeros(1), nodes, nodes.new_ones(1)])
        points = ops.ig_interpolate(x, start, alphas)
        n_points, batch, length, size = points.shape

        def each(per_row: Tensor) -> Tensor:
            """[B, ...] as [S * B, ...], the same for every point."""
            expanded = per_row.expand(n_points, *per_row.shape)
            return expanded.reshape(n_points * batch, *per_row.shape[1:])

        allowed, depths = self._tree(branch_ids)
        masks = {kind: each(mask) for kind, mask in self._masks(allowed, depths, x).items()}
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        positions = each(torch.where(branch_ids < 0, 0, depths))
        order = torch.arange(length, device=x.device)
        selection = each((target_columns[..., None] == order).to(x.dtype))

        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            with self._head_at(selection):
                logits = decoder.model(
                    inputs_embeds=points.reshape(n_points * batch, length, size),
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                ).logits.float()
            picked = logits.gather(-1, each(target_tokens)[..., None])[..., 0]
            terms = (picked - logits.logsumexp(-1)) * each(target_weights)
            values = terms.sum(-1).reshape(n_points, batch)
            # Rows do not see each other: the gradient of the sum holds every row's own.
            return values.sum(), values

        gradients, values = torch.func.grad(objective, has_aux=True)(points)
        scores = ops.ig_accumulate(gradients[1:-1], x, start, weights)
        f_baseline, f_input = values[0], values[-1]
        return scores, f_input, f_baseline, scores.sum(-1) - (f_input - f_baseline)

    def _tree(self, branch_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which columns each column may attend, bool [B, L, L], and each one's depth [B, L]."""
        order = torch.arange(branch_ids.shape[1], device=branch_ids.device)
        readers, read = branch_ids[:, :, None], branch_ids[:, None, :]
        allowed = (order[:, None] >= order) & ((read == 0) | (read == readers))
        return allowed, allowed.sum(-1) - 1

    def _masks(self, allowed: Tensor, depths: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Additive [B, 1, L, L] for each type of block."""
        masks = {}
        for kind in sorted(self._kinds):
            seen = allowed
            if kind == "sliding_attention" and self._window is not None:
                seen = seen & (depths[:, :, None] - depths[:, None, :] < self._window)
            hidden = torch.finfo(like.dtype).min
            masks[kind] = torch.where(seen, 0.0, hidden).to(like.dtype)[:, None]
        return masks

    @contextmanager
    def _head_at(self, selection: Tensor) -> Iterator[None]:
        """The head computes the logits of some columns only: [S * B, K, L], 1 where K stands in L.

        A product, and no gather, whose gradient scatters: that is slow, and not there in float16.
        """

        def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (selection @ args[0], *args[1:])

        hook = self._decoder.head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()


def _decoder(model: PreTrainedModel) -> DecoderView:
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    refused = f"models of type '{family}' cannot be exported: "
    inner: Any = unwrap(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", True) or not inner.can_generate():
        raise ExportError(
            f"{refused}{type(inner).__name__} is no decoder that predicts the next token. Load a "
            "causal language model with AutoModelForCausalLM"
        )
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ExportError(
            f"{refused}they take no position_ids, so that both answers cannot be read in one row. "
            "Attribute with grains_ext.attribute in place of a graph"
        )
    try:
        return DecoderView.of(model)
    except ValueError as error:
        raise ExportError(f"{refused}{error}") from error


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Fused attention has a backward pass that does not export."""
    model = unwrap(model)
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)


def _mean_embedding(decoder: DecoderView, tokenizer: Any) -> Tensor:
    """[D], what the baseline "mean" starts from."""
    like = decoder.embed(torch.zeros(1, 1, dtype=torch.int64, device=_device(decoder)))[0]
    return Baseline(decoder, tokenizer, "mean").embeddings((-1,), like)[0]


def _text_config(decoder: DecoderView) -> Any:
    model: Any = unwrap(decoder.model)
    return model.config.get_text_config()


def _device(decoder: DecoderView) -> torch.device:
    return next(decoder.embedding.parameters()).device


# --- tracing --------------------------------------------------------------------------------------


def _traced(graph: _IntegratedGradients, decoder: DecoderView, opset: int) -> Any:
    """The program of torch.onnx.export."""
    arguments = _example(decoder)
    decompositions = {
        op: function
        for op, function in core_aten_decompositions().items()
        if op._schema.name.partition("::")[2] not in _KEPT_WHOLE
    }
    try:
        with quiet(), _bias_apart(decoder.model):
            # torch.export cannot trace a gradient: it is given a graph that holds it already.
            module = make_fx(
                graph,
                tracing_mode="symbolic",
                decomposition_table=decompositions,
                _allow_non_fake_inputs=True,
            )(*arguments)
            module.eval()
            program = torch.onnx.export(
                module,
                arguments,
                dynamic_shapes=tuple(_AXES[name] for name in INPUTS),
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                opset_version=opset,
                dynamo=True,
                # onnxruntime does the same work when it loads the graph, in a tenth of the time.
                optimize=False,
                verbose=False,
                # Tracing meets the overload that is called where no input needs a gradient.
                custom_translation_table={
                    getattr(op, overload): _onnx_op(name)
                    for op, name in (
                        (torch.ops.grains.ig_interpolate, "IgInterpolate"),
                        (torch.ops.grains.ig_accumulate, "IgAccumulate"),
                    )
                    for overload in op.overloads()
                },
            )
    except Exception as error:
        family = _text_config(decoder).model_type
        # The exporter's own messages are pages long, and begin with advice to its developers.
        cause = error.__cause__ or error
        raise ExportError(
            f"the gradient of this model of type '{family}' does not export: "
            f"{type(cause).__name__}: {str(cause).strip()[:500]}. Attribute with "
            "grains_ext.attribute in place of a graph"
        ) from error
    assert program is not None
    return program


@contextmanager
def _bias_apart(model: nn.Module) -> Iterator[None]:
    """Linear layers add their bias in a step of its own.

    Given one, the linear function of torch.func takes the traced sizes for constants.
    """

    def apart(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda input: nn.functional.linear(input, linear.weight) + linear.bias

    changed = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and module.bias is not None
    ]
    for module in changed:
        # An instance attribute shadows the method for the time of the trace.
        vars(module)["forward"] = apart(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _onnx_op(name: str) -> Op:
    signature = SIGNATURES[name]
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    # Alphas and weights are float32 beside rows of any type, and so are the scores.
    plain = ("alphas", "weights", "attributions")

    def parameters(names: tuple[str, ...]) -> list[OpSchema.FormalParameter]:
        return [OpSchema.FormalParameter(n, "tensor(float)" if n in plain else "T") for n in names]

    schema = OpSchema(
        name,
        DOMAIN,
        OPSET_VERSION,
        inputs=parameters(signature.inputs),
        outputs=parameters(signature.outputs),
        type_constraints=[("T", types, "The rows' type.")],
    )
    return Op(Opset(DOMAIN, OPSET_VERSION), name, schema)


def _example(decoder: DecoderView) -> tuple[Tensor, ...]:
    """Traced arguments. All sizes differ, and none is 0 or 1: the tracer takes equals for one."""
    batch, length, targets, steps = 2, 11, 5, 3
    device = _device(decoder)
    example = decoder.embed(torch.zeros(1, 1, dtype=torch.int64, device=device))
    ids = torch.arange(1, 1 + batch * length, device=device).reshape(batch, length) % _vocabulary(
        decoder
    )
    branches = torch.tensor([0] * 7 + [1, 1, 2, 2], device=device).repeat(batch, 1)
    per_target = torch.arange(targets, device=device).repeat(batch, 1)
    per_step = torch.arange(1, 1 + steps, device=device) / (steps + 1)
    values = {
        "input_ids": ids,
        "branch_ids": branches,
        "baseline_ids": torch.where(branches == 0, 1, ids),
        "baseline_embedding": torch.zeros_like(example[0, 0]),
        "target_columns": per_target + length - targets,
        "target_tokens": per_target,
        "target_weights": per_target.float() - 2,
        "nodes": per_step,
        "weights": torch.full_like(per_step, 1 / steps),
    }
    return tuple(values[name] for name in INPUTS)


def _vocabulary(decoder: DecoderView) -> int:
    return int(next(decoder.embedding.parameters()).shape[0])


def _complete(path: Path, mean: Tensor, settings: GraphSettings, tokenizer: Any) -> None:
    """Adds what torch does not export: the ops' bodies, the default baseline, the metadata."""
    model = onnx.load(str(path), load_external_data=False)
    add_functions(model)
    for node in model.graph.node:
        # Where each node was traced, at length and with the paths of this machine.
        del node.metadata_props[:]
    # An input with an initializer of its name is a default that callers may overrule.
    default = numpy_helper.from_array(mean.cpu().numpy(), "baseline_embedding")
    model.graph.initializer.append(default)
    helper.set_model_props(
        model,
        {
            SETTINGS_KEY: json.dumps(asdict(settings), ensure_ascii=False),
            TOKENIZER_KEY: tokenizer.backend_tokenizer.to_str(),
        },
    )
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))


# --- verification ---------------------------------------------------------------------------------


def _probe(decoder: DecoderView) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Prompts with two answers each, of random tokens; one prompt is longer than a short window."""
    window = getattr(_text_config(decoder), "sliding_window", None) or 0
    rng = np.random.default_rng(0)
    longest = max(9, window + 3 if window < 64 else 0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, _vocabulary(decoder), n).tolist())

    return [(ids(longest), ids(3), ids(2)), (ids(6), ids(1), ids(1))]


def _probe_feeds(decoder: DecoderView) -> dict[str, np.ndarray[Any, Any]]:
    rows = []
    for prompt, chosen, rejected in _probe(decoder):
        answers = [
            Answer(ids, (sign,) * len(ids)) for ids, sign in ((chosen, 1.0), (rejected, -1.0))
        ]
        [row] = pack(prompt, answers, tree=True)
        rows.append((row, [-1] * len(prompt)))
    nodes, weights = quadrature("gausslegendre", 3)
    return packed_feeds(rows, nodes, weights)


def _in_torch(
    graph: _IntegratedGradients, decoder: DecoderView, embedding: Tensor
) -> list[np.ndarray[Any, Any]]:
    feeds = {name: torch.from_numpy(array) for name, array in _probe_feeds(decoder).items()}
    feeds["baseline_embedding"] = embedding
    arguments = [feeds[name].to(_device(decoder)) for name in INPUTS]
    return [output.detach().float().cpu().numpy() for output in graph(*arguments)]


def _check_reading(graph: _IntegratedGradients, decoder: DecoderView) -> None:
    """f of packed rows against the model's own reading of each answer by itself."""
    start = torch.zeros_like(
        decoder.embed(torch.zeros(1, dtype=torch.int64, device=_device(decoder)))[0]
    )
    try:
        found = _in_torch(graph, decoder, start)[1]
    except Exception as error:  # whatever a model makes of arguments it does not know
        raise ExportError(
            f"this model of type '{_text_config(decoder).model_type}' does not take a mask and "
            f"positions of ours: {type(error).__name__}: {error}. Attribute with "
            "grains_ext.attribute in place of a graph"
        ) from error
    probe = _probe(decoder)
    logprobs = continuation_logprobs(
        decoder.model, [(prompt, answer) for prompt, *answers in probe for answer in answers]
    )
    totals = np.array([score.total for score in logprobs]).reshape(-1, 2)
    expected = totals[:, 0] - totals[:, 1]
    _check_error(
        "does not read a mask and positions of ours as its own",
        decoder,
        np.abs(found - expected).max(),
        np.abs(totals).max(),
    )


def _check_graph(
    graph: _IntegratedGradients, decoder: DecoderView, mean: Tensor, path: Path
) -> None:
    """The graph on onnxruntime alone against the module it was traced from."""
    expected = _in_torch(graph, decoder, mean)
    feeds = _probe_feeds(decoder)
    outputs = session(path, library=False).run(list(OUTPUTS), feeds)
    size = max(np.abs(values).max() for values in expected)
    for got, wanted in zip(outputs, expected, strict=True):
        _check_error(
            "computes another attribution in ONNX", decoder, np.abs(got - wanted).max(), size
        )


def _check_error(what: str, decoder: DecoderView, error: float, size: float) -> None:
    tolerance = _TOLERANCE * max(1.0, float(size))
    if not error <= tolerance:  # NaN fails too
        family = _text_config(decoder).model_type
        raise ExportError(
            f"this model of type '{family}' {what}: f differs by {error:.2e}, and at most "
            f"{tolerance:.0e} is accepted. Nothing was written; attribute with grains_ext.attribute"
        )
