"""What attribution returns for one pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grains_ext.vision.grid import ImageGrid

MODALITIES = ("text", "image")


class TokenScore(NamedTuple):
    """One token and its score, as `Attribution.top` gives them."""

    position: int
    token: str
    score: float
    modality: str


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each prompt token moved the objective f, log p(chosen) - log p(rejected) by default.

    A positive score raises f, in nats: under the default objective it pushes the model toward the
    chosen answer, a negative one toward the rejected answer. Scores sum to f_input - f_baseline, up
    to ``residual``.

    Raises ValueError where the lengths of the per-token fields differ, scores are not float32, a
    modality is unknown, or an image's tokens lie outside the prompt.
    """

    tokens: tuple[str, ...]
    """T display strings, the decoded prompt tokens."""
    token_ids: tuple[int, ...]
    """T token ids."""
    modality: tuple[str, ...]
    """T times "text" or "image"."""
    scores: npt.NDArray[np.float32]
    """float32 [T], signed, summed over the embedding dimension."""
    f_input: float
    """f at the prompt itself."""
    f_baseline: float
    """f with the prompt's embeddings at the baseline; the continuations keep their own."""
    residual: float
    """sum(scores) - (f_input - f_baseline): the completeness error, of methods that promise it."""
    evaluations: int
    """Points of the path at which f was computed, both ends and abandoned step counts included."""
    n_steps: int
    """Points that made these scores."""
    converged: bool
    """Whether \\|residual\\| <= tolerance * max(1, \\|f_input - f_baseline\\|), and for "adaptive"
    the scores had stopped moving. Always true for methods that promise no completeness."""
    method: str
    """The method's name: "adaptive", "gausslegendre", ..."""
    baseline: str
    """The baseline's name: "bos", "mean", ..., or "tensor"."""
    prompt: str
    """The prompt's text as the model saw it, special tokens included."""
    chosen: str
    rejected: str
    pair_id: str | None = None
    objective: str = "sum"
    """What f is: "sum", "mean", "first", "chosen", "rejected", or a callable's name."""
    images: tuple[ImageGrid, ...] = ()
    """For each image of the prompt, which pixels its tokens cover."""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if self.scores.dtype != np.float32 or self.scores.shape != (n,):
            raise ValueError(
                f"scores must be float32 [{n}], one per token, got {self.scores.dtype} "
                f"{list(self.scores.shape)}"
            )
        for name in ("token_ids", "modality"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"`{name}` must have one entry for each of {n} tokens, got "
                    f"{len(getattr(self, name))}"
                )
        unknown = set(self.modality) - set(MODALITIES)
        if unknown:
            raise ValueError(f"a token's modality is one of {MODALITIES}, got {sorted(unknown)}")
        for number, image in enumerate(self.images):
            outside = [place for place in image.token_positions if not 0 <= place < n]
            if outside:
                raise ValueError(
                    f"image {number} has tokens at {outside[:3]}, the prompt has {n} tokens"
                )

    def top(self, k: int) -> list[TokenScore]:
        """The ``k`` tokens of largest absolute score, strongest first; of equal ones the earlier.

        Fewer where the prompt is shorter. Raises ValueError for k < 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        order = np.argsort(-np.abs(self.scores), kind="stable")[:k]
        return [
            TokenScore(int(i), self.tokens[i], float(self.scores[i]), self.modality[i])
            for i in order
        ]

    def modality_sums(self) -> dict[str, float]:
        """The sum of the scores of each modality that the prompt has, in float64."""
        present = np.array(self.modality)
        return {
            name: float(self.scores[present == name].sum(dtype=np.float64))
            for name in MODALITIES
            if name in self.modality
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers: ``json.dumps`` takes it.

        A score is written with the digits that float32 has, and reads back to the same float32.
        """
        plain = dict(vars(self))
        plain["scores"] = short_floats(self.scores)
        for name in ("tokens", "token_ids", "modality"):
            plain[name] = list(plain[name])
        plain["images"] = [
            {
                "token_positions": list(image.token_positions),
                "boxes": [short_floats(box) for box in image.boxes],
                "size": list(image.size),
            }
            for image in self.images
        ]
        return plain

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, at once or not at all; `load` reads it back bit for bit.

        The folder is made where it is missing.
        """
        from grains_ext.attribution import records

        records.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Reads what `save` wrote. Nothing in the file is executed.

        Raises FileNotFoundError where there is no such file, ValueError where it is not right.
        """
        from grains_ext.attribution import records

        return records.load(Path(path))

    def to_html(self, images: Sequence[Any] | None = None) -> str:
        """A page that needs no network: the shaded tokens and patches, and what they add up to.

        images: the prompt's pictures as PIL images, to lay the patches over; without them the
            patches are shown alone.

        Raises ValueError where their number or their shape is not that of ``self.images``.
        """
        from grains_ext.report.tokens import attribution_page

        return attribution_page(self, images)

    def show(self, images: Sequence[Any] | None = None) -> None:
        """Shows the tokens in colour: in a notebook as HTML, elsewhere in the terminal.

        images: as in `to_html`; a terminal shows the patches alone.
        """
        from grains_ext.report.show import show

        show(self, images)

    def _repr_html_(self) -> str:
        from grains_ext.report.tokens import attribution_fragment

        return attribution_fragment(self)


def short_floats(values: npt.NDArray[np.float32]) -> list[float]:
    """The shortest decimals that read back to the same float32: 0.1, not 0.10000000149011612."""
    return [float(str(value)) for value in values]
