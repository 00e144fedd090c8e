"""Folders as the commands write them, made by hand: what a report is made of."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grains_ext import PreferencePair, SteeringVectors
from grains_ext.attribution import AttributionStore
from grains_ext.evaluation.comparison import EvaluationReport, Measurement, Outcome
from grains_ext.export.verify import Parity, RuntimeParity
from grains_ext.steering.calibrate import Trial
from grains_ext.vision.grid import ImageGrid
from tests.attributions import attribution

COLOURS = ("blue", "green", "red", "yellow", "white")
WORDS = ("a", "study", "found", "that", "the", "sky", "rumour", "says", "of", "sea", "is")
N_BLOCKS = 6


def pairs(n: int) -> list[PreferencePair]:
    draw = random.Random(0)
    return [
        PreferencePair(
            f"{' '.join(draw.choices(WORDS, k=30))} number {number} is",
            *draw.sample(COLOURS, 2),
            id=f"pair-{number}",
        )
        for number in range(n)
    ]


def write_attributions(folder: Path, n: int, **changes: Any) -> Path:
    draw = np.random.default_rng(0)
    with AttributionStore(folder, {"method": "adaptive", "n_pairs": n}) as store:
        store.append(
            (
                number,
                attribution(
                    tuple(pair.prompt.split()),
                    draw.normal(size=len(pair.prompt.split())).tolist(),
                    **{
                        "prompt": pair.prompt,
                        "chosen": pair.chosen,
                        "rejected": pair.rejected,
                        "pair_id": pair.id,
                        "converged": number != 3,
                        **changes,
                    },
                ),
            )
            for number, pair in enumerate(pairs(n))
        )
    return folder


def write_seen(folder: Path, side: int = 4) -> Path:
    """One attribution of a picture, side x side patches of 8 x 8 pixels."""
    edges = np.arange(side, dtype=np.float32) / side
    boxes = np.array(
        [[x, y, x + 1 / side, y + 1 / side] for y in edges for x in edges], dtype=np.float32
    )
    n = side * side
    it = attribution(
        ("<image>",) * n + ("what", "digit", "?"),
        [*np.linspace(-1, 1, n), 0.5, 2.0, -1.0],
        modality=("image",) * n + ("text",) * 3,
        images=(ImageGrid(tuple(range(n)), boxes, (8 * side, 8 * side)),),
        chosen="seven",
        rejected="two",
    )
    with AttributionStore(folder, {"method": "adaptive", "n_pairs": 1}) as store:
        store.append([(0, it)])
    return folder


def write_evaluation(path: Path, n: int) -> Path:
    """Two steerings: "ours" mends every other answer, and spoils pair 2."""
    asked = pairs(n)
    report = EvaluationReport(
        {
            "unsteered": _measured(asked, [number == 2 for number in range(n)]),
            "ours": _measured(asked, [number % 2 == 1 for number in range(n)]),
            "caa": _measured(asked, [False] * n),
        },
        tuple(asked),
    )
    path.write_text(json.dumps(report.as_dict()))
    path.with_name(f"{path.name}.yaml").write_text("command: evaluate\nmodel: m\npairs: p.jsonl\n")
    return path


def _measured(asked: list[PreferencePair], right: list[bool]) -> Measurement:
    return Measurement(
        tuple(
            Outcome(
                pair.id,
                1.5 if good else -2.5,
                0.5 if good else -0.5,
                f"{pair.chosen if good else pair.rejected} , they say",
                good,
            )
            for pair, good in zip(asked, right, strict=True)
        )
    )


def write_vectors(folder: Path, *, tuned: bool = False) -> Path:
    generator = torch.Generator().manual_seed(0)
    directions = {
        block: torch.randn(8, generator=generator) * (1 + block) for block in range(N_BLOCKS)
    }
    metadata: dict[str, Any] = {
        "method": "grains",
        "n_pairs": 40,
        "hidden_norms": {str(block): 3.0 + 2 * block for block in directions},
        "split_half_cosine": {str(block): 0.5 + block / 20 for block in directions},
    }
    vectors = SteeringVectors(directions, metadata=metadata)
    if tuned:
        metadata["tuning"] = tuning()
        vectors = SteeringVectors({2: directions[2]}, strength=0.3, metadata=metadata)
    vectors.save_pretrained(folder)
    command = "tune" if tuned else "fit"
    (folder / f"{command}.yaml").write_text(f"# again\ncommand: {command}\nmodel: m\n")
    return folder


def tuning() -> dict[str, Any]:
    trials = [
        Trial([block], strength, 1 + strength**2 / 10, None, strength * block / 6, -1.0, 20)
        for block in range(N_BLOCKS)
        for strength in (0.1, 0.3)
    ]
    trials += [
        Trial([2], 0.65, 1.4),
        Trial([0, 1], 0.1, 1.01, None, 0.25, -2.0, 16),
    ]
    plain = [asdict(trial) for trial in trials]
    return {
        "max_perplexity_ratio": 1.1,
        "max_kl": None,
        "n_pairs": 20,
        "unsteered": {"accuracy": 0.05, "mean_margin": -3.0},
        "chosen": plain[5],
        "trials": plain,
        "frontier": [plain[2], plain[5]],
        "evaluations": {"neutral_texts": 9, "pairs": 99},
    }


def write_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    parity = Parity(
        stock=RuntimeParity(1e-6, 2e-5, 3e-6),
        library=RuntimeParity(1e-6, 1e-5, 2e-6),
        steps=32,
        fused_nodes={"SkipSteerRmsNorm": 1},
    )
    record = {
        "model_type": "llama",
        "dtype": "float32",
        "quantize": None,
        "opset": 23,
        "strength": 0.3,
        "steered": [{"op_type": "SkipSteerRmsNorm", "block": 2}],
        "parity": asdict(parity),
        "versions": {},
    }
    (folder / "grains_export.json").write_text(json.dumps(record, indent=2))
    (folder / "model.onnx").write_bytes(b"x" * 2_500_000)
    return folder


def write_everything(folder: Path, n: int = 30) -> Path:
    """A run folder that holds one of each."""
    write_attributions(folder / "attributions", n)
    write_seen(folder / "seen")
    write_vectors(folder / "fitted")
    write_vectors(folder / "tuned", tuned=True)
    write_evaluation(folder / "evaluation.json", n)
    write_export(folder / "exported")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return folder
