"""A transformers decoder and its steering as a folder that runs: graph, tokenizer, op library."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

import grains_ext
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.export.bank import Bank
from grains_ext.export.errors import ExportError, GraphError
from grains_ext.export.folder import (
    EMBEDDING_NAME,
    GRAPH_NAME,
    LIBRARY_NAME,
    README_NAME,
    RECORD_NAME,
    UNSTEERED_NAME,
    VISION_NAME,
    replacing_folder,
    require_free,
)
from grains_ext.export.genai import (
    genai_family,
    generate_with_genai,
    require_genai,
    tokenizer_difference,
    write_genai_config,
)
from grains_ext.export.generate import OnnxDecoder, embedding_beside
from grains_ext.export.inject import inject
from grains_ext.export.quantize import BITS, in_float_arithmetic, quantize_graph
from grains_ext.export.readme import readme
from grains_ext.export.runtime import ort_library_path, require_onnxruntime, session
from grains_ext.export.surgery import Injected
from grains_ext.export.trace import DEFAULT_OPSET, export_graph
from grains_ext.export.verify import Parity, verify_quantized
from grains_ext.export.verify import verify as verify_graph
from grains_ext.export.vision_families import family_of
from grains_ext.export.vision_runtime import ImageReader, Prompt
from grains_ext.export.vision_trace import export_embedding, export_vision
from grains_ext.steering.apply import SteeringHandle
from grains_ext.vision.encoding import encode_image_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from grains_ext.steering.vectors import SteeringVectors

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Largest accepted error of the steered logits, relative to their largest value or 1."""

_EXTERNAL_ABOVE_BYTES = 2**30
"""Protobuf files end at 2 GiB; half of it leaves room for the graph."""

_EXPORTABLE_ATTENTION = {"eager", "sdpa"}
_GENAI_TOKENS = 16


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    vectors: SteeringVectors,
    folder: str | Path,
    *,
    strength: float | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    runtime: Literal["ort", "genai"] = "ort",
    opset: int = DEFAULT_OPSET,
    fuse: bool = True,
    baked: bool = False,
    external_data: bool | None = None,
    keep_unsteered: bool = False,
    overwrite: bool = False,
    verify: bool = True,
) -> Parity | None:
    """Exports `model` with its steering to a folder that onnxruntime and onnxruntime-genai run.

    `model.onnx` takes input_ids, attention_mask, position_ids and past_key_values.{i}.key/value
    (past length 0 at the first call) and gives logits and present.{i}.key/value: the names that
    optimum and onnxruntime-genai use. Beside it lie the model's configuration, its tokenizer,
    the vectors, genai_config.json, the op library, a README.md with the lines that run it, and
    `grains_export.json`: versions, steered sites, measured parity.

    Of a vision-language model, `tokenizer` is the processor, and there are three graphs, as in
    onnxruntime-genai's folders: `vision.onnx` makes image_features of what the processor gives,
    `embedding.onnx` inputs_embeds of input_ids and image_features, and `model.onnx` takes
    inputs_embeds in the place of input_ids. Where the family needs them it takes position_ids
    [axes, batch, tokens], or token_type_ids [batch, past + tokens], 1 at image tokens. The steering
    is in the decoder; `quantize` leaves the other two in float.

    strength: the default strength in the graph; `vectors.strength` if None.
    dtype: the graph's float type, "float32" or "float16"; the model's own if None. onnxruntime's
        CPU provider computes these two; "bfloat16" needs verify=False there.
    quantize: "int8" or "int4" weights, in blocks of 32, by onnxruntime's quantiser; embeddings,
        norms and the steering, which is injected afterwards, stay float.
    runtime: "genai" also runs the folder in onnxruntime-genai, which must be installed, and raises
        where it does not give onnxruntime's tokens; it warns where genai reads the tokenizer
        otherwise.
    opset: 18 or more. From 23 on, norms and attention are single operators.
    fuse, baked: as for `inject`.
    external_data: weights in `model.onnx.data`; None: where they exceed 1 GiB, or where
        keep_unsteered lets two graphs share them.
    keep_unsteered: also writes `model_unsteered.onnx`.
    overwrite: replaces `folder`, with all that it holds, if it is not empty.
    verify: compares the graph with the steered torch model, and raises ExportError where the
        logits differ by more than TOLERANCE. A quantised graph is held to that tolerance before it
        is quantised, and after that, at strength 0, against the unsteered quantised graph; its
        distance from the torch model is measured and returned.

    The folder appears complete or not at all. Returns the parity measured, None if not verified.
    """
    folder = Path(folder)
    require_free(folder, overwrite=overwrite)
    model = _bare(model)
    _require_source_stays(model, folder)
    if quantize is not None and quantize not in BITS:
        raise ValueError(f"quantize is {quantize!r}; expected one of {[*BITS]} or None")
    if runtime not in ("ort", "genai"):
        raise ValueError(f"runtime is {runtime!r}; expected 'ort' or 'genai'")
    if verify or quantize:
        require_onnxruntime()
    if runtime == "genai":
        require_genai()
        _genai_family(model)
    wanted = _dtype(model, dtype)
    if verify:
        _require_computed(wanted)
    family = family_of(model)
    processor = None if family is None else _processor(model, tokenizer)
    vectors = vectors.with_strength(vectors.strength if strength is None else strength)
    # Raises here, not after the export, where the vectors do not fit the model or a graph.
    vectors.apply(model).remove()
    Bank(vectors)
    with replacing_folder(folder, overwrite=overwrite) as work:
        model = _prepared(model, wanted)
        _write_companions(model, tokenizer, vectors, work)
        build = _Build(
            model, vectors, work, processor,
            opset=opset, fuse=fuse, baked=baked,
            external_data=external_data, keep_unsteered=keep_unsteered,
        )  # fmt: skip
        parity = build.float_graph(verified=verify)
        if quantize is not None:
            parity = build.quantized_graph(quantize, parity)
        build.finish()
        genai = _write_genai(model, work, required=runtime == "genai")
        first_token = _first_token(tokenizer)
        text = readme(
            name=Path(model.config.name_or_path).name or folder.name,
            model_type=model.config.model_type,
            dtype=_name(model.dtype),
            quantize=quantize,
            blocks=sorted(vectors.directions),
            strength=vectors.strength,
            baked=baked,
            opset=opset,
            first_token=first_token,
            genai=genai,
            family=family,
            chat=getattr(tokenizer, "chat_template", None) is not None,
            image_token=(
                None if processor is None else (model.config.image_token_id, processor.image_token)
            ),
        )
        (work / README_NAME).write_text(text, encoding="utf-8")
        if runtime == "genai":
            _check_genai(work, tokenizer, processor)
        _write_record(work / RECORD_NAME, model, vectors, build.injected, opset, quantize, parity)
    return parity


class _Build:
    """The graphs of a folder, written one after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        vectors: SteeringVectors,
        work: Path,
        processor: ProcessorMixin | None,
        *,
        opset: int,
        fuse: bool,
        baked: bool,
        external_data: bool | None,
        keep_unsteered: bool,
    ) -> None:
        if external_data is None:
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            external_data = keep_unsteered or size > _EXTERNAL_ABOVE_BYTES
        self.model, self.vectors, self.work, self.processor = model, vectors, work, processor
        self.opset, self.fuse, self.baked = opset, fuse, baked
        self.external_data, self.keep_unsteered = external_data, keep_unsteered
        self.steered, self.unsteered = work / GRAPH_NAME, work / UNSTEERED_NAME
        self.injected: list[Injected] = []

    def float_graph(self, *, verified: bool) -> Parity | None:
        # Written under the steered graph's name, so that the weights' file is named after that one.
        export_graph(self.model, self.steered, opset=self.opset, external_data=self.external_data)
        os.replace(self.steered, self.unsteered)
        self.injected = self._inject(self.unsteered, self.steered, baked=self.baked)
        if self.processor is not None:
            self._vision_graphs(self.processor)
        if not verified:
            return None
        parity = verify_graph(self.model, self.vectors, self.steered, processor=self.processor)
        self._require(parity.max_relative_error, "the steered logits differ from torch's", parity)
        return parity

    def _vision_graphs(self, processor: ProcessorMixin) -> None:
        family = family_of(self.model)
        assert family is not None
        how: Any = {"opset": self.opset, "external_data": self.external_data}
        export_vision(self.model, processor, family, self.work / VISION_NAME, **how)
        export_embedding(self.model, self.work / EMBEDDING_NAME, **how)

    def quantized_graph(self, scheme: str, parity: Parity | None) -> Parity | None:
        """Replaces both graphs by quantised ones. Measures where the float graph was measured."""
        source = self.work / "float"
        source.mkdir()
        data = self.work / f"{GRAPH_NAME}.data"
        for path in (self.unsteered, data):
            if path.exists():
                os.replace(path, source / path.name)
        quantize_graph(
            source / UNSTEERED_NAME, self.steered, scheme, external_data=self.external_data
        )
        shutil.rmtree(source)
        os.replace(self.steered, self.unsteered)
        self.injected = self._inject(self.unsteered, self.steered, baked=self.baked)
        return None if parity is None else self._verified_quantized(parity)

    def finish(self) -> None:
        if not self.keep_unsteered:
            self.unsteered.unlink()

    def _inject(self, source: Path, target: Path, *, baked: bool) -> list[Injected]:
        return inject(source, self.vectors, target, fuse=self.fuse, baked=baked)

    def _verified_quantized(self, parity: Parity) -> Parity:
        exact_unsteered = self.work / "exact_unsteered.onnx"
        exact_steered = self.work / "exact.onnx"
        in_float_arithmetic(self.unsteered, exact_unsteered)
        self._inject(exact_unsteered, exact_steered, baked=False)
        parity = verify_quantized(
            self.model,
            self.vectors,
            parity,
            processor=self.processor,
            steered=self.steered,
            unsteered=self.unsteered,
            exact_steered=exact_steered,
            exact_unsteered=exact_unsteered,
        )
        exact_steered.unlink()
        exact_unsteered.unlink()
        quantized = parity.quantization
        assert quantized is not None
        off = "at strength 0 the logits differ from the unsteered quantised graph's"
        self._require(quantized.strength_zero.relative, off, parity)
        kernels = "the op library's logits differ from those without it"
        self._require(quantized.runtimes.relative, kernels, parity)
        return parity

    def _require(self, error: float, what: str, parity: Parity) -> None:
        tolerance = TOLERANCE[self.model.dtype]
        if not error <= tolerance:  # NaN fails too
            raise ExportError(
                f"the exported graph is wrong: {what} by {error:.2e} of their largest value (at "
                f"most {tolerance:.0e} is accepted): {parity}. Nothing was written"
            )


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside peft's and torch.compile's wrappers.

    Raises ExportError where a wrapper, or a hook, does what the model inside does not.
    """
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise ExportError(
                f"a peft adapter of type {type(adapter).__name__} puts tokens in front of every "
                "prompt; an exported graph has no place for them"
            )
    bare = unwrap(model)
    steering = SteeringHandle.__module__
    for number, block in enumerate(DecoderView.of(bare).blocks):
        if any(hook.__module__ == steering for hook in block._forward_hooks.values()):
            raise ExportError(
                f"block {number} of the model is being steered, and would be twice: call remove() "
                "on the handle that apply() gave, or leave its `with` block, before the export"
            )
    return cast("PreTrainedModel", bare)


def _require_source_stays(model: PreTrainedModel, folder: Path) -> None:
    """Raises ValueError where the export would replace the folder that the model came from."""
    source = Path(model.config.name_or_path or os.devnull).resolve()
    if source.is_dir() and source.is_relative_to(folder.resolve()):
        raise ValueError(
            f"'{folder}' holds the model that is exported, '{source}': give another folder"
        )


def _require_computed(dtype: torch.dtype) -> None:
    """Raises ValueError for a type that onnxruntime cannot compute in here, to verify the graph."""
    on_cuda = "CUDAExecutionProvider" in require_onnxruntime().get_available_providers()
    if dtype == torch.bfloat16 and not on_cuda:
        raise ValueError(
            "the graph would be in bfloat16, in which onnxruntime does not compute on a CPU: pass "
            "dtype='float32' or 'float16', or verify=False"
        )


def _processor(
    model: PreTrainedModel, given: PreTrainedTokenizerBase | ProcessorMixin | None
) -> ProcessorMixin:
    """The processor of a model that reads images. Raises where what was given is none."""
    model_type = model.config.model_type
    if not hasattr(given, "image_processor") or not hasattr(given, "tokenizer"):
        found = "nothing" if given is None else type(given).__name__
        raise ValueError(
            f"models of type '{model_type}' read images: pass the processor "
            f"(grains_ext.vision.load_processor), not {found}"
        )
    return given


def _dtype(model: PreTrainedModel, dtype: torch.dtype | str | None) -> torch.dtype:
    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype or model.dtype
    if wanted not in TOLERANCE:
        names = ", ".join(_name(known) for known in TOLERANCE)
        raise ValueError(f"dtype is {dtype}; expected one of {names}, or a torch.dtype of these")
    return wanted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prepared(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the wanted dtype, with an attention that can be traced; a copy if it differs."""
    attention = model.config._attn_implementation
    if dtype == model.dtype and attention in _EXPORTABLE_ATTENTION:
        return model
    model = copy.deepcopy(model).to(dtype)
    if attention not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")
    return model


def _write_companions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    vectors: SteeringVectors,
    work: Path,
) -> None:
    model.config.save_pretrained(work)
    if model.generation_config is not None:
        # save_pretrained refuses what many checkpoints have: a temperature that is not used.
        model.generation_config.to_json_file(work / "generation_config.json")
    vectors.save_pretrained(work)
    shutil.copy2(ort_library_path(), work / LIBRARY_NAME)
    if tokenizer is None:
        return
    tokenizer.save_pretrained(work)
    path = work / "tokenizer_config.json"
    if path.is_file():
        # onnxruntime-genai refuses a tokenizer with "chat_template": null.
        settings = json.loads(path.read_text(encoding="utf-8"))
        given = {name: value for name, value in settings.items() if value is not None}
        text = json.dumps(given, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def _write_genai(model: PreTrainedModel, work: Path, *, required: bool) -> bool:
    """Whether the graph is one that onnxruntime-genai can run."""
    try:
        write_genai_config(model, work)
    except GraphError as error:
        if required:
            raise ExportError(str(error)) from error
        return False
    return True


def _genai_family(model: PreTrainedModel) -> None:
    """Raises ExportError where onnxruntime-genai runs no model of this family."""
    try:
        genai_family(model)
    except GraphError as error:
        raise ExportError(str(error)) from error


def _check_genai(
    work: Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    processor: ProcessorMixin | None,
) -> None:
    """Raises ExportError where onnxruntime-genai gives other tokens than onnxruntime."""
    graph = work / GRAPH_NAME
    decoder = OnnxDecoder(session(graph), embedding=embedding_beside(graph))
    prompt = Prompt([1, 5, 3, 2, 4]) if processor is None else _pictured(processor)
    images = None if processor is None else ImageReader(work).batch([prompt]).images
    ids = list(prompt.ids)
    steps = decoder.generate(np.array([ids]), images=images, max_new_tokens=_GENAI_TOKENS)
    expected = steps[0].tolist()
    found = generate_with_genai(work, prompt, _GENAI_TOKENS, images)
    # It ends a text at its end token.
    if not found or found != expected[: len(found)]:
        raise ExportError(
            f"onnxruntime-genai continues {ids} with {found}, onnxruntime with {expected}. "
            "Nothing was written; export with runtime='ort'"
        )
    if processor is not None:
        # Prompts come from the processor: genai's own tokenizer has no part in it.
        return
    difference = None if tokenizer is None else tokenizer_difference(work, tokenizer)
    if difference is not None:
        warnings.warn(
            "onnxruntime-genai runs the exported graph, but its own tokenizer is another one: "
            f"{difference}. Give it token ids from the `tokenizers` package",
            stacklevel=3,
        )


def _pictured(processor: ProcessorMixin) -> Prompt:
    """A prompt with a picture, written by the chat template where there is one."""
    picture = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    question = "What is this?"
    prompt: Any = [{"role": "user", "content": question}]
    if getattr(processor, "chat_template", None) is None:
        prompt = f"{processor.image_token} {question}"
    return Prompt(*encode_image_prompt(processor, prompt, [picture]))


def _first_token(tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None) -> int | None:
    """What the tokenizer begins every text with."""
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = {tuple(tokenizer(text).input_ids[:1]) for text in ("a", "1", "?")}
    first = ids.pop() if len(ids) == 1 else ()
    return first[0] if first and first[0] in tokenizer.all_special_ids else None


def _write_record(
    path: Path,
    model: PreTrainedModel,
    vectors: SteeringVectors,
    injected: list[Injected],
    opset: int,
    quantize: str | None,
    parity: Parity | None,
) -> None:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {
        "model_type": model.config.model_type,
        "dtype": _name(model.dtype),
        "quantize": quantize,
        "opset": opset,
        "strength": vectors.strength,
        "steered": [asdict(entry) for entry in injected],
        "parity": None if parity is None else asdict(parity),
        "versions": {"grains_ext": grains_ext.__version__} | versions,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
