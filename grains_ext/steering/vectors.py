"""SteeringVectors: one direction per decoder block, how strong, and how they were made."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grains_ext.decoder import DecoderView
from grains_ext.steering.apply import SteeringHandle

WEIGHTS_NAME = "steering.safetensors"
CONFIG_NAME = "steering_config.json"
FORMAT_VERSION = 1
_KEY = re.compile(r"layers\.(0|[1-9]\d*)\.direction")


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """Directions to add to the outputs of decoder blocks.

    directions: {block: float32 [D]}, 0-based blocks, all of one length D, finite.
    strength: the factor a in h' = (h + a v) ‖h‖ / ‖h + a v‖. Directions that this package fits are
        as long as the block's typical hidden state, so that 1 turns an orthogonal state by 45
        degrees; useful values are 0.05 to 3 for one block, and smaller for many.
    eps: where ‖h + a v‖ <= eps ‖h‖ the state is left alone.
    metadata: JSON values that say how they were made.

    Raises ValueError where any of this does not hold.
    """

    directions: dict[int, Tensor]
    strength: float = 1.0
    eps: float = 1e-6
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("steering vectors need a direction for at least one block")
        checked = {}
        for block in sorted(self.directions):
            checked[block] = _checked_direction(block, self.directions[block])
        sizes = {direction.shape[0] for direction in checked.values()}
        if len(sizes) > 1:
            raise ValueError(f"directions must have one length, got {sorted(sizes)}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
        object.__setattr__(self, "directions", checked)

    @property
    def blocks(self) -> list[int]:
        return list(self.directions)

    @property
    def hidden_size(self) -> int:
        return next(iter(self.directions.values())).shape[0]

    def with_strength(self, strength: float) -> "SteeringVectors":
        """The same directions at another strength."""
        return replace(self, strength=float(strength))

    def subset(self, blocks: Iterable[int]) -> "SteeringVectors":
        """The directions of some blocks. Raises ValueError where one has none."""
        wanted = sorted(set(blocks))
        missing = [block for block in wanted if block not in self.directions]
        if missing:
            raise ValueError(f"no direction for blocks {missing}; there are {self.blocks}")
        return replace(self, directions={block: self.directions[block] for block in wanted})

    def apply(
        self,
        model: nn.Module,
        strength: float | None = None,
        *,
        decoder: DecoderView | None = None,
    ) -> SteeringHandle:
        """Steers the model until the handle's remove() is called; the weights are not touched.

        strength: the vectors' own by default. decoder: where the model's parts must be named.
        Raises ValueError where the model has no such block or another hidden size.
        """
        view = decoder if decoder is not None else DecoderView.of(model)
        chosen = self.strength if strength is None else strength
        return SteeringHandle(view, self.directions, chosen, self.eps)

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        strength: float | None = None,
        *,
        decoder: DecoderView | None = None,
    ) -> Iterator[SteeringHandle]:
        """`apply` for the length of a with block; steering ends with it, whatever happens inside.

        with vectors.applied(model, strength=0.5):
            model.generate(**inputs)
        """
        handle = self.apply(model, strength, decoder=decoder)
        try:
            yield handle
        finally:
            handle.remove()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes steering.safetensors and steering_config.json, each in one step (a rename).

        Raises TypeError where the metadata holds something that JSON cannot.
        """
        folder = Path(folder)
        config = {
            "format_version": FORMAT_VERSION,
            "blocks": self.blocks,
            "hidden_size": self.hidden_size,
            "strength": self.strength,
            "eps": self.eps,
            "metadata": self.metadata,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        tensors = {f"layers.{block}.direction": v for block, v in self.directions.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(tensors, Path(scratch, WEIGHTS_NAME), metadata={"format": "pt"})
            Path(scratch, CONFIG_NAME).write_text(text, encoding="utf-8")
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(Path(scratch, name), folder / name)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None
    ) -> "SteeringVectors":
        """Reads what save_pretrained wrote, from a folder or, where there is none, a hub id.

        Only these two files are read, only as JSON and safetensors; nothing in them is executed.
        Raises FileNotFoundError where they are not there, ValueError where they are not right.
        """
        folder = _local_folder(source, revision)
        config = _read_config(folder / CONFIG_NAME)
        directions = _read_directions(folder / WEIGHTS_NAME)
        if sorted(directions) != sorted(config["blocks"]):
            raise ValueError(
                f"{folder}: {CONFIG_NAME} lists blocks {config['blocks']}, {WEIGHTS_NAME} holds "
                f"{sorted(directions)}"
            )
        try:
            vectors = cls(directions, config["strength"], config["eps"], config["metadata"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if vectors.hidden_size != config["hidden_size"]:
            raise ValueError(
                f"{folder}: {CONFIG_NAME} says hidden_size {config['hidden_size']}, the directions "
                f"have {vectors.hidden_size} values"
            )
        return vectors


def _checked_direction(block: Any, direction: Any) -> Tensor:
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise ValueError(f"blocks are whole numbers from 0, got {block!r}")
    if not isinstance(direction, Tensor) or direction.ndim != 1 or direction.shape[0] == 0:
        shape = list(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(f"the direction of block {block} must be a tensor [D], got {shape}")
    if not direction.is_floating_point():
        raise ValueError(f"the direction of block {block} must be float32, got {direction.dtype}")
    direction = direction.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(direction).all():
        raise ValueError(f"the direction of block {block} has values that are not finite")
    return direction


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {path.parent}: not a folder of vectors")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {version!r}, this version of grains_ext reads "
            f"{FORMAT_VERSION}: update grains_ext or save the vectors again"
        )
    expected: dict[str, type | tuple[type, ...]] = {
        "blocks": list,
        "hidden_size": int,
        "strength": (int, float),
        "eps": (int, float),
        "metadata": dict,
    }
    for name, kind in expected.items():
        if not isinstance(config.get(name), kind) or isinstance(config.get(name), bool):
            raise ValueError(f"{path}: `{name}` is missing or wrong, got {config.get(name)!r}")
    if not all(isinstance(block, int) for block in config["blocks"]):
        raise ValueError(f"{path}: `blocks` must be whole numbers, got {config['blocks']}")
    return config


def _read_directions(path: Path) -> dict[int, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path.parent}: not a folder of vectors")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    directions = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path}: expected float32 tensors named layers.<block>.direction, got {key!r} of "
                f"{tensor.dtype}"
            )
        directions[int(match[1])] = tensor
    return directions


def _local_folder(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source} is no folder, and no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(source), revision=revision, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME]
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and could not be had from the hub: {error}"
        ) from error
