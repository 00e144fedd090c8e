"""What steering and attribution cost on this machine: what ``grains bench`` prints.

Every part times its candidates in turns beside a floor that could not be beaten or, where there is
none, beside the same thing a second time: what that differs by is the noise of the measurement.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grains_ext.attribution import attribute
from grains_ext.decoder import DecoderView
from grains_ext.encoding import encode_prompt
from grains_ext.ops import steer_add_normalize
from grains_ext.pairs import PreferencePair
from grains_ext.steering.vectors import SteeringVectors
from grains_ext.timing import Measurement, environment, relative_to, take_turns

PARTS = ("op", "decode", "attribution", "onnx")
N_TOKENS = 16
"""Decoded per turn, after the prompt."""
N_STEPS = 8
"""Points on the attribution's path, so that the floor has as many."""
PAIRS = (
    PreferencePair("The sky on a clear day in summer is", "blue", "green"),
    PreferencePair("Water that is cooled far enough turns into", "ice", "steam"),
    PreferencePair("The largest planet that goes around our sun is", "Jupiter", "Mars"),
    PreferencePair("After Monday and before Wednesday comes", "Tuesday", "Friday"),
)


@dataclass(frozen=True)
class Part:
    """One comparison. ratio of each measurement: its time over the baseline's, round by round."""

    name: str
    title: str
    baseline: str
    measured: tuple[Measurement, ...]
    per_second: dict[str, float] = field(default_factory=dict)
    """What a person counts, tokens or pairs, by candidate; empty where that is nothing."""
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """rounds: turns of each candidate, >= 2. seconds: after which a slow candidate sits out."""

    rounds: int = 9
    seconds: float = 6.0

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs 2 or more")


def bench(
    model: Any,
    processor: Any,
    *,
    vectors: SteeringVectors | None = None,
    pairs: Sequence[PreferencePair] = PAIRS,
    parts: Sequence[str] = PARTS,
    budget: Budget | None = None,
    on_part: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Times the parts: {"format", "version", "environment", "model", "parts": [Part.as_dict()]}.

    model, processor: as for `attribute`; the model is left as it was.
    vectors: what to steer with; all blocks along random directions by default: only how many
        blocks are steered changes the time.
    pairs: what is attributed, text alone; the first one's prompt is decoded.
    parts: of PARTS. "onnx" exports the model to a temporary folder, which takes minutes for
        billions of parameters, and needs onnxruntime.
    on_part: told the name of each part before it is timed.

    Raises ValueError for unknown parts, no pairs, pairs with images, and for "onnx" of a bfloat16
    model; ImportError for "onnx" without onnxruntime.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"no parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if not pairs:
        raise ValueError("there are no pairs to attribute, and no prompt to decode")
    if any(pair.images for pair in pairs):
        # The floor's passes are over text: they would be compared with other work.
        raise ValueError("a pair has images, and what is timed is text: give pairs without images")
    if "onnx" in parts and model.dtype == torch.bfloat16:
        raise ValueError(
            "onnxruntime computes in float32 or float16 on CPUs, and the model is bfloat16: load "
            "it in one of these, or leave out the part onnx"
        )
    budget = budget or Budget()
    view = DecoderView.of(model)
    if vectors is None:
        draw = torch.Generator().manual_seed(0)
        vectors = SteeringVectors(
            {i: torch.randn(view.hidden_size, generator=draw) for i in range(view.n_blocks)}
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt_ids = list(encode_prompt(tokenizer, pairs[0].prompt))
    found: list[Part] = []
    for name in parts:
        if on_part:
            on_part(name)
        if name == "op":
            found += [_op(model, view.hidden_size, rows, budget) for rows in (1, 512)]
        elif name == "decode":
            found.append(_decode(model, vectors, prompt_ids, budget))
        elif name == "attribution":
            found.append(_attribution(model, processor, pairs, budget))
        else:
            found.append(_onnx(model, processor, vectors, prompt_ids, budget))
    parameter = next(model.parameters())
    return {
        "format": "grains.bench",
        "version": 1,
        "environment": environment(),
        "model": {
            "name": getattr(model.config, "name_or_path", "") or type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "blocks": view.n_blocks,
            "steered_blocks": vectors.blocks,
            "hidden_size": view.hidden_size,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "threads": torch.get_num_threads(),
        },
        "parts": [part.as_dict() for part in found],
    }


def installed_parts() -> tuple[str, ...]:
    """The parts that can be timed with what is installed."""
    return PARTS if importlib.util.find_spec("onnxruntime") else PARTS[:-1]


def _measured(
    candidates: dict[str, Callable[[], object]], baseline: str, budget: Budget, device: torch.device
) -> tuple[Measurement, ...]:
    seconds = take_turns(
        candidates,
        rounds=budget.rounds,
        slow_seconds=budget.seconds / len(candidates),
        synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
    )
    return tuple(relative_to(baseline, seconds).values())


def _op(model: Any, size: int, rows: int, budget: Budget) -> Part:
    like = next(model.parameters())
    hidden = torch.randn(rows, size, device=like.device).to(like.dtype)
    out, vector = torch.empty_like(hidden), torch.randn(size, device=like.device).to(like.dtype)
    strength = torch.ones((), device=like.device)

    def formula() -> Tensor:
        moved: Tensor = hidden.float() + strength * vector.float()
        kept: Tensor = hidden.float().norm(dim=-1, keepdim=True)
        kept = kept / moved.norm(dim=-1, keepdim=True)
        return (moved * kept).to(hidden.dtype)

    candidates: dict[str, Callable[[], object]] = {
        "copy (floor)": lambda: out.copy_(hidden),
        "steer_add_normalize": lambda: steer_add_normalize(hidden, vector, strength),
        "the formula in PyTorch": formula,
    }
    with torch.inference_mode():
        measured = _measured(candidates, "copy (floor)", budget, like.device)
    return Part("op", f"steering op, {rows} x {size} {_name(like.dtype)}", "copy (floor)", measured)


def _decode(model: Any, vectors: SteeringVectors, prompt_ids: list[int], budget: Budget) -> Part:
    device = next(model.parameters()).device
    prompt = torch.tensor([prompt_ids], device=device)

    def run(steered: bool) -> None:
        with vectors.applied(model) if steered else nullcontext():
            _greedy(model, prompt)

    candidates: dict[str, Callable[[], object]] = {
        "unsteered": lambda: run(False),
        "unsteered again (noise)": lambda: run(False),
        "steered by hooks": lambda: run(True),
    }
    with torch.inference_mode():
        measured = _measured(candidates, "unsteered", budget, device)
    title = f"decoding {N_TOKENS} tokens, {len(vectors.blocks)} blocks steered"
    return Part("decode", title, "unsteered", measured, _rates(measured, N_TOKENS), unit="tokens/s")


def _greedy(model: Any, prompt: Tensor) -> None:
    """Prefill, then one token at a time from the cache."""
    ids, cache = prompt, None
    for _ in range(N_TOKENS):
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = outputs.logits[:, -1:].argmax(-1), outputs.past_key_values


def _attribution(
    model: Any, processor: Any, pairs: Sequence[PreferencePair], budget: Budget
) -> Part:
    device = next(model.parameters()).device
    tokenizer = getattr(processor, "tokenizer", processor)
    embedding = DecoderView.of(model).embed
    rows = []
    for pair in pairs:
        answers = [
            tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            for text in (pair.chosen, pair.rejected)
        ]
        rows.append(torch.tensor([*encode_prompt(tokenizer, pair.prompt), *chain(*answers)]))

    def passes() -> None:
        for row in rows:
            embeds = embedding(row.to(device)).detach().expand(N_STEPS, -1, -1).clone()
            logits = model(inputs_embeds=embeds.requires_grad_(), use_cache=False).logits
            torch.autograd.grad(logits[:, -1].float().sum(), embeds)

    def scores(**settings: Any) -> None:
        with warnings.catch_warnings():
            # So few steps need not converge.
            warnings.filterwarnings("ignore", message=".* did not converge")
            attribute(model, processor, pairs, progress=False, **settings)

    floor = f"the model's own {N_STEPS} passes"
    candidates: dict[str, Callable[[], object]] = {
        floor: passes,
        f"attribute, {N_STEPS} steps": lambda: scores(method="gausslegendre", n_steps=N_STEPS),
        "attribute, as by default": scores,
    }
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        measured = _measured(candidates, floor, budget, device)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    rates = _rates(measured, len(pairs))
    return Part(
        "attribution", f"attributing {len(pairs)} pairs", floor, measured, rates, unit="pairs/s"
    )


def _onnx(
    model: Any, processor: Any, vectors: SteeringVectors, prompt_ids: list[int], budget: Budget
) -> Part:
    from grains_ext import export
    from grains_ext.export.folder import GRAPH_NAME, UNSTEERED_NAME
    from grains_ext.export.generate import embedding_beside
    from grains_ext.export.runtime import require_onnxruntime

    onnxruntime = require_onnxruntime()
    input_ids = np.array([prompt_ids], dtype=np.int64)
    with TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        export.export_model(model, processor, vectors, folder, keep_unsteered=True, verify=False)

        def decoder(file: str, library: bool) -> Callable[[], object]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3  # it warns of inputs with defaults
            session = export.session(folder / file, library=library, session_options=options)
            embedding = embedding_beside(folder / file, session_options=options)
            decodes = export.OnnxDecoder(session, embedding=embedding)
            return lambda: decodes.generate(input_ids, max_new_tokens=N_TOKENS)

        unsteered = decoder(UNSTEERED_NAME, False)
        measured = _measured(
            {
                "unsteered": unsteered,
                "unsteered again (noise)": unsteered,
                "steered, op library": decoder(GRAPH_NAME, True),
                "steered, stock onnxruntime": decoder(GRAPH_NAME, False),
            },
            "unsteered",
            budget,
            torch.device("cpu"),
        )
    title = f"onnxruntime, decoding {N_TOKENS} tokens, {len(vectors.blocks)} blocks steered"
    return Part("onnx", title, "unsteered", measured, _rates(measured, N_TOKENS), unit="tokens/s")


def _rates(measured: Sequence[Measurement], count: int) -> dict[str, float]:
    return {each.name: count / each.seconds.median for each in measured}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
