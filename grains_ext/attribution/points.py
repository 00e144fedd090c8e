"""What a method asks about one pair and what it learns: f at sets of points around a prompt.

Points are made only when a model call has room for them. A method knows nothing of models and
batches; it is a generator that the engine answers, many pairs at once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grains_ext import ops


@dataclass(frozen=True)
class Path:
    """The two ends of one prompt's path, [T, D] each, equal at tokens that are not attributed."""

    pair: int
    """The pair's number, which seeds what is drawn for it."""
    input: Tensor
    baseline: Tensor
    attributed: Tensor
    """bool [T]. Such a token may lie at its baseline even so, as a BOS token does."""

    @property
    def moving(self) -> list[int]:
        """The tokens at which the ends differ."""
        return (self.input != self.baseline).any(-1).nonzero().flatten().tolist()


class Points(Protocol):
    """A number of points, and whether gradients are wanted there."""

    @property
    def count(self) -> int: ...

    @property
    def gradients(self) -> bool: ...

    def build(self, path: Path, part: range) -> Tensor:
        """[len(part), T, D] in the dtype of the path's ends."""

    def origin(self, path: Path) -> Tensor:
        """[T, D]: a token's score is its gradient times (input - origin)."""

    def alphas_of(self, part: range) -> Tensor | None:
        """float32 [len(part)], how far along the path points are; None for others."""


@dataclass(frozen=True)
class OnPath:
    """baseline + alpha (input - baseline)."""

    alphas: npt.NDArray[np.float64]
    gradients: bool

    @property
    def count(self) -> int:
        return len(self.alphas)

    def build(self, path: Path, part: range) -> Tensor:
        alphas = self.alphas_of(part).to(path.input.device)
        return ops.ig_interpolate(path.input[None], path.baseline[None], alphas)[:, 0]

    def alphas_of(self, part: range) -> Tensor:
        return torch.tensor(self.alphas[part.start : part.stop], dtype=torch.float32)

    def origin(self, path: Path) -> Tensor:
        return path.baseline


@dataclass(frozen=True)
class Noisy:
    """The input with Gaussian noise on its attributed tokens; the same draws in any batch."""

    count: int
    noise: float
    """The standard deviation, as a share of the embeddings' range."""
    seed: int
    gradients: bool = True

    def build(self, path: Path, part: range) -> Tensor:
        deviation = self.noise * (path.input.max() - path.input.min()).float()
        deviations = deviation * path.attributed[:, None]
        return torch.stack([path.input + self._draw(path, i) * deviations for i in part]).to(
            path.input.dtype
        )

    def _draw(self, path: Path, sample: int) -> Tensor:
        seed = np.random.SeedSequence((self.seed, path.pair, sample)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0] >> 1))
        return torch.randn(path.input.shape, generator=generator).to(path.input.device)

    def origin(self, path: Path) -> Tensor:
        return path.input.masked_fill(path.attributed[:, None], 0.0)

    def alphas_of(self, part: range) -> None:
        return None


@dataclass(frozen=True)
class Occluded:
    """The input with one token after the other at its baseline."""

    tokens: Sequence[int]
    gradients: bool = False

    @property
    def count(self) -> int:
        return len(self.tokens)

    def build(self, path: Path, part: range) -> Tensor:
        points = path.input.repeat(len(part), 1, 1)
        for point, place in zip(points, part, strict=True):
            token = self.tokens[place]
            point[token] = path.baseline[token]
        return points

    def origin(self, path: Path) -> Tensor:
        return path.baseline

    def alphas_of(self, part: range) -> None:
        return None


@dataclass(frozen=True)
class Evaluated:
    """What was found at n points."""

    values: npt.NDArray[np.float64]
    """f, [n]."""
    at_tokens: npt.NDArray[np.float64]
    """Each token's gradient times (input - origin), [n, T]; [n, 0] where none was asked for."""


@dataclass(frozen=True)
class Outcome:
    """What a method returns for one pair."""

    scores: npt.NDArray[np.float64]
    """[T]."""
    f_input: float
    f_baseline: float
    n_steps: int
    """Points that made the scores."""
    evaluations: int
    """All points at which f was computed."""
    converged: bool


Dialogue = Generator[Points, Evaluated, Outcome]
"""One method at work on one pair: asks for f at points, is sent what was found, ends."""
