"""SteeringVectors: one direction per decoder block, how strong, and how they were made."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grains_ext.decoder import DecoderView
from grains_ext.steering import saving
from grains_ext.steering.apply import SteeringHandle
from grains_ext.steering.fold import fold
from grains_ext.steering.gate import Gate, checked_direction
from grains_ext.steering.positions import Positions
from grains_ext.steering.saving import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "WEIGHTS_NAME", "SteeringVectors"]


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """Directions to add to the outputs of decoder blocks.

    directions: {block: float32 [D]}, 0-based blocks, all of one length D, finite.
    strength: the factor a in h' = (h + a v) ‖h‖ / ‖h + a v‖. Directions that this package fits are
        as long as the block's typical hidden state, so that 1 turns an orthogonal state by 45
        degrees; useful values are 0.05 to 3 for one block, and smaller for many.
    eps: where ‖h + a v‖ <= eps ‖h‖ the state is left alone.
    metadata: JSON values that say how they were made.
    block_strengths: {block: factor}: the strength at a block is strength * factor; 1 where a block
        is not named.
    normalize: False leaves ‖h‖ / ‖h + a v‖ out: plain addition, h' = h + a v.
    gate: steers only prompts, or tokens, that fulfil a condition on an earlier block's output.

    Raises ValueError where any of this does not hold.
    """

    directions: dict[int, Tensor]
    strength: float = 1.0
    eps: float = 1e-6
    metadata: dict[str, Any] = field(default_factory=dict)
    block_strengths: dict[int, float] | None = None
    normalize: bool = True
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("steering vectors need a direction for at least one block")
        checked = {}
        for block in sorted(self.directions):
            check_block_number(block)
            checked[block] = checked_direction(
                self.directions[block], f"the direction of block {block}"
            )
        sizes = {direction.shape[0] for direction in checked.values()}
        if len(sizes) > 1:
            raise ValueError(f"directions must have one length, got {sorted(sizes)}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize must be True or False, got {self.normalize!r}")
        object.__setattr__(self, "directions", checked)
        object.__setattr__(self, "block_strengths", self._checked_strengths())
        self._check_gate()

    def _checked_strengths(self) -> dict[int, float] | None:
        if self.block_strengths is None:
            return None
        given = dict(self.block_strengths)
        if unknown := [block for block in given if block not in self.directions]:
            raise ValueError(
                f"block_strengths names {unknown}, for which there is no direction; there are "
                f"{self.blocks}"
            )
        for block, factor in given.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not number or not math.isfinite(factor):
                raise ValueError(f"the strength of block {block} must be finite, got {factor!r}")
        return {block: float(given[block]) for block in sorted(given)}

    def _check_gate(self) -> None:
        if self.gate is None:
            return
        if self.gate.hidden_size != self.hidden_size:
            raise ValueError(
                f"the gate reads {self.gate.hidden_size} values, the directions have "
                f"{self.hidden_size}: they belong to different models"
            )
        if self.gate.block > self.blocks[0]:
            raise ValueError(
                f"the gate reads block {self.gate.block}, after block {self.blocks[0]}, which is "
                "steered: fit it at that block or an earlier one, or take a subset() of the blocks"
            )

    @property
    def blocks(self) -> list[int]:
        return list(self.directions)

    @property
    def hidden_size(self) -> int:
        return next(iter(self.directions.values())).shape[0]

    def with_strength(self, strength: float) -> "SteeringVectors":
        """The same directions at another strength."""
        return replace(self, strength=float(strength))

    def with_gate(self, gate: Gate | None) -> "SteeringVectors":
        """The same directions behind a gate, or behind none."""
        return replace(self, gate=gate)

    def factor(self, block: int) -> float:
        """What the strength is multiplied by at a block."""
        return (self.block_strengths or {}).get(block, 1.0)

    def effective(self) -> "SteeringVectors":
        """The same steering with no block_strengths: each is multiplied into its direction."""
        if self.block_strengths is None:
            return self
        scaled = {block: self.factor(block) * v for block, v in self.directions.items()}
        return replace(self, directions=scaled, block_strengths=None)

    def subset(self, blocks: Iterable[int]) -> "SteeringVectors":
        """The directions of some blocks. Raises ValueError where one has none."""
        wanted = sorted(set(blocks))
        missing = [block for block in wanted if block not in self.directions]
        if missing:
            raise ValueError(f"no direction for blocks {missing}; there are {self.blocks}")
        return replace(
            self,
            directions={block: self.directions[block] for block in wanted},
            block_strengths=self.block_strengths
            and {block: self.factor(block) for block in wanted},
        )

    def apply(
        self,
        model: nn.Module,
        strength: float | None = None,
        *,
        positions: Positions = "all",
        decoder: DecoderView | None = None,
    ) -> SteeringHandle:
        """Steers the model until the handle's remove() is called; the weights are not touched.

        strength: the vectors' own by default.
        positions: the tokens to steer. "prompt"; "generated"; "last", the prompt's last token and
            all generated ones; "text" or "image", by what a token stands for; or a mask, bool
            [batch, columns] or [columns], of the columns of the text, padding included, False
            after its end. grains_ext.steering.positions says how the prompt's end is found.
        decoder: where the model's parts must be named.

        Raises ValueError where the model has no such block or another hidden size.
        """
        view = decoder if decoder is not None else DecoderView.of(model)
        chosen = self.strength if strength is None else strength
        return SteeringHandle(view, [self], [chosen], positions)

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        strength: float | None = None,
        *,
        positions: Positions = "all",
        decoder: DecoderView | None = None,
    ) -> Iterator[SteeringHandle]:
        """`apply` for the length of a with block; steering ends with it, whatever happens inside.

        with vectors.applied(model, strength=0.5):
            model.generate(**inputs)
        """
        with self.apply(model, strength, positions=positions, decoder=decoder) as handle:
            yield handle

    @contextmanager
    def folded(
        self,
        model: nn.Module,
        strength: float | None = None,
        *,
        decoder: DecoderView | None = None,
    ) -> Iterator[nn.Module]:
        """`fold` for the length of a with block: steering in biases, with no hook and at no cost.

        Only for plain addition (normalize=False) at all positions; see grains_ext.steering.fold.
        Yields the model.
        """
        folded = fold(model, self, strength, decoder=decoder)
        try:
            yield model
        finally:
            folded.undo()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes steering.safetensors and steering_config.json, each in one step (a rename).

        Raises TypeError where the metadata holds something that JSON cannot.
        """
        saving.save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None
    ) -> "SteeringVectors":
        """Reads what save_pretrained wrote, from a folder or, where there is none, a hub id.

        Only these two files are read, only as JSON and safetensors; nothing in them is executed.
        Raises FileNotFoundError where they are not there, ValueError where they are not right.
        """
        arguments = saving.load(source, revision)
        try:
            return cls(**arguments)
        except (ValueError, OverflowError) as error:  # a whole number beyond all floats
            raise ValueError(f"{source}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload steering vectors",
        create_pr: bool = False,
    ) -> str:
        """Uploads the two files and a model card to the Hugging Face hub, in one commit.

        The repository is made where there is none. The arguments are huggingface_hub's; so are the
        errors. Returns the address of the commit. `from_pretrained(repo_id)` reads it back.
        """
        return saving.push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def _repr_html_(self) -> str:
        from grains_ext.report.vectors import vectors_fragment

        return vectors_fragment(self)


def check_block_number(block: Any) -> None:
    """Raises ValueError for anything but a whole number from 0."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise ValueError(f"blocks are whole numbers from 0, got {block!r}")
