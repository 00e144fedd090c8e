"""A transformers decoder as an unsteered ONNX graph: prefill and cached decoding in one."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from grains_ext.decoder import DecoderView
from grains_ext.export.errors import ExportError
from grains_ext.export.generate import DEEPSTACK_EMBEDS
from grains_ext.export.vision_families import VisionFamily, deepstack_levels, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_OPSET = 20
"""The newest that onnxruntime 1.20, the oldest that the op library serves, runs in full."""

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")


def export_graph(
    model: PreTrainedModel,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    external_data: bool = False,
) -> None:
    """Exports an unsteered decoder to ONNX: the graph that `export_model` steers.

    Of a vision-language model, the decoder alone, over inputs_embeds.

    Raises ExportError, naming the model's family, where it has no plain key/value cache or
    torch.onnx.export refuses it.
    """
    family = family_of(model)
    model_type = model.config.model_type
    unknown = [n for n in _ARGUMENTS if n not in inspect.signature(model.forward).parameters]
    if unknown:
        raise ExportError(
            f"models of type '{model_type}' cannot be exported: their forward takes no "
            f"{', '.join(unknown)}. Export with another tool and steer the file with inject()"
        )
    with evaluating(model):
        arguments = _example(model, family)
        export_module(
            _CachedDecoder(model),
            arguments,
            path,
            what=f"this model of type '{model_type}'",
            dynamic_shapes=_dynamic_shapes(arguments),
            input_names=[*arguments["inputs"], *_cache_names("past_key_values", arguments)],
            output_names=["logits", *_cache_names("present", arguments)],
            opset=opset,
            external_data=external_data,
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, knowing of no prompt before, and as it was afterwards."""
    training = model.training
    # Qwen's vision-language models count positions on from the last prompt's images.
    counting: list[Any] = [m for m in model.modules() if hasattr(m, "rope_deltas")]
    before = [module.rope_deltas for module in counting]
    model.eval()
    for module in counting:
        module.rope_deltas = None
    try:
        yield
    finally:
        model.train(training)
        for module, deltas in zip(counting, before, strict=True):
            module.rope_deltas = deltas


def export_module(
    module: nn.Module,
    arguments: dict[str, Any],
    path: str | Path,
    *,
    what: str,
    dynamic_shapes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    opset: int,
    external_data: bool,
) -> None:
    """Writes the graph of a module called with keyword arguments.

    what: the module's name in the error. Raises ExportError where torch.onnx.export refuses it.
    """
    if opset < 18:
        raise ValueError(f"opset is {opset}; steered graphs need 18 or more")
    try:
        # A third faster: torch traces no graph of gradients that would be dropped again.
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (),
                kwargs=arguments,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export does not carry {what}: {error}. Export it with another tool and "
            "steer the file with inject()"
        ) from error
    assert program is not None
    _divide_by_roots(program.model.graph)
    program.save(str(path), external_data=external_data)


def _divide_by_roots(graph: Any) -> None:
    """Writes x * (1 / sqrt(y)), the exporter's form of x * rsqrt(y), as x / sqrt(y).

    onnxruntime knows a norm by the quotient; in the exporter's form it runs the parts one by one.
    """
    for node in list(graph):
        if node.op_type != "Reciprocal" or node.inputs[0].producer().op_type != "Sqrt":
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != "Mul":
            continue
        product = readers[0]
        dividend = next(value for value in product.inputs if value is not node.outputs[0])
        product.op_type = "Div"
        product.replace_input_with(0, dividend)
        product.replace_input_with(1, node.inputs[0])
        graph.remove(node, safe=True)


class _PastLayer(DynamicLayer):
    """One layer's cache made from given keys and values, whose length stays symbolic."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def get_seq_length(self) -> int:
        # The base class first asks whether the cache is empty: a branch on a traced length.
        return self.keys.shape[-2]


class _CachedDecoder(nn.Module):
    """The model with a flat cache: tensors in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model
        self.training = False

    def forward(
        self,
        inputs: dict[str, Tensor],
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        cache = Cache(layers=[_PastLayer(keys, values) for keys, values in past])
        inputs = dict(inputs)
        with _added_to_blocks(self.decoder, inputs.pop(DEEPSTACK_EMBEDS, ())):
            output = self.decoder(**inputs, past_key_values=cache, use_cache=True)
        present = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        return (output.logits, *present)


@contextlib.contextmanager
def _added_to_blocks(model: nn.Module, features: Iterable[Tensor]) -> Iterator[None]:
    """Inside, features[i] is added to the output of block i, everywhere.

    The model adds its own at the image tokens alone, at as many places as it finds there; a graph
    adds zeros at the others.
    """

    def adding(level: Tensor) -> Callable[..., Tensor]:
        return lambda block, arguments, hidden: hidden + level

    blocks = DecoderView.of(model).blocks
    hooks = [
        block.register_forward_hook(adding(level))
        for block, level in zip(blocks, features, strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _example(model: PreTrainedModel, family: VisionFamily | None) -> dict[str, Any]:
    """Traced arguments. No size is 0 or 1: the tracer would take those for constants."""
    batch, tokens, past_tokens = 2, 3, 5
    device = model.device
    ids = torch.arange(batch * past_tokens, device=device).reshape(batch, past_tokens)
    ids = ids % model.config.get_text_config(decoder=True).vocab_size
    with torch.no_grad():
        # A cache of our own: the model's would drop what lies outside a sliding window.
        output = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        embeddings = model.get_input_embeddings()(ids)
    cache = output.past_key_values
    layers = getattr(cache, "layers", [])
    past = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not past or not all(
        isinstance(t, Tensor) and t.ndim == 4 and t.shape[2] == past_tokens
        for kv in past
        for t in kv
    ):
        raise ExportError(
            f"models of type '{model.config.model_type}' cannot be exported: their cache is not "
            "one key and one value tensor [batch, heads, tokens, size] per decoder block"
        )
    positions = torch.arange(past_tokens, past_tokens + tokens, device=device).repeat(batch, 1)
    mask = torch.ones(batch, past_tokens + tokens, dtype=torch.long, device=device)
    inputs = {"input_ids": ids} if family is None else {"inputs_embeds": embeddings}
    inputs = {name: value[:, :tokens].contiguous() for name, value in inputs.items()}
    inputs |= {"attention_mask": mask, "position_ids": positions}
    if family is not None and family.position_axes is not None:
        inputs["position_ids"] = positions.repeat(family.position_axes, 1, 1)
    if family is not None and family.bidirectional:
        inputs["token_type_ids"] = torch.zeros_like(mask)
    if family is not None and (levels := deepstack_levels(model)) > 0:
        inputs[DEEPSTACK_EMBEDS] = inputs["inputs_embeds"].repeat(levels, 1, 1, 1)
    return {"inputs": inputs, "past": past}


_BATCH, _TOKENS, _TOTAL = "batch_size", "sequence_length", "total_sequence_length"


def _dynamic_shapes(arguments: dict[str, Any]) -> dict[str, Any]:
    past = {0: _BATCH, 2: "past_sequence_length"}
    inputs = {}
    for name, value in arguments["inputs"].items():
        first = {"position_ids": value.ndim - 2, DEEPSTACK_EMBEDS: 1}.get(name, 0)
        whole = name in ("attention_mask", "token_type_ids")
        inputs[name] = {first: _BATCH, first + 1: _TOTAL if whole else _TOKENS}
    return {"inputs": inputs, "past": [(past, past)] * len(arguments["past"])}


def _cache_names(prefix: str, arguments: dict[str, Any]) -> list[str]:
    return [
        f"{prefix}.{i}.{kind}" for i in range(len(arguments["past"])) for kind in ("key", "value")
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides torch.onnx's notes on axis names, signatures and absent torchvision operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
