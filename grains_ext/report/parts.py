"""What a page can show, as plain data. Every part may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grains_ext.attribution.result import Attribution

Interval = tuple[float, float]


@dataclass(frozen=True)
class MethodRow:
    """One line of the comparison on held-out pairs."""

    name: str
    accuracy: float
    """Share of pairs answered with the chosen continuation, in [0, 1]."""
    interval: Interval
    """The 95 % interval of the accuracy."""
    n: int
    """How many pairs it was measured on."""
    perplexity_ratio: float
    """Perplexity on neutral text, steered over unsteered."""
    settings: str = ""
    """What tuning chose, such as ``block 2, strength 4``."""


@dataclass(frozen=True)
class Generation:
    """One prompt continued before and after steering."""

    prompt: str
    chosen: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """How a figure differs from the unsteered one on the same items.

    gained, lost, p_value: of a share; see `grains_ext.evaluation.PairedChange`.
    """

    difference: float
    interval: Interval | None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Measured:
    """One figure of one condition. None stands for what could not be computed."""

    condition: str
    value: float | None
    interval: Interval | None = None
    """At 95 %."""
    n: int | None = None
    note: str = ""
    change: Change | None = None


@dataclass(frozen=True)
class Figure:
    """One figure of every condition."""

    name: str
    """As evaluations name it: "accuracy", "perplexity", "task/f1"."""
    is_share: bool
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class HeldOut:
    """The figures of one evaluation."""

    title: str
    figures: tuple[Figure, ...]
    n_pairs: int


@dataclass(frozen=True)
class Said:
    """What one condition did with one prompt; None where it was not measured."""

    text: str | None = None
    says_chosen: bool | None = None
    margin: float | None = None
    """log p(chosen) - log p(rejected), in nats."""


@dataclass(frozen=True)
class Asked:
    """One prompt and what every condition said to it."""

    prompt: str
    chosen: str
    said: tuple[Said, ...]
    rejected: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Answers:
    """The same prompts under several conditions, the unsteered one first.

    n_asked: how many there were, where fewer are shown.
    """

    title: str
    conditions: tuple[str, ...]
    asked: tuple[Asked, ...]
    n_asked: int | None = None


@dataclass(frozen=True)
class BlockDirection:
    """The direction of one decoder block. Lengths are Euclidean.

    hidden_norm: mean length of the hidden states there. shift_norm: length of the mean shift by
    masking that the direction was made of. split_half: cosine of the directions of even and of odd
    pairs. start_cosine: with the direction that refining began from.
    """

    block: int
    norm: float
    hidden_norm: float | None = None
    shift_norm: float | None = None
    split_half: float | None = None
    start_cosine: float | None = None


@dataclass(frozen=True)
class Directions:
    """The directions of one set of steering vectors."""

    title: str
    blocks: tuple[BlockDirection, ...]
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What tune tried.

    trials: as in ``metadata["tuning"]`` of tuned vectors, see `steering.calibrate.Trial`.
    chosen, frontier: some of them. unsteered: the accuracy on the dev pairs.
    """

    title: str
    n_pairs: int
    max_perplexity_ratio: float
    unsteered: float
    trials: tuple[Mapping[str, Any], ...]
    frontier: tuple[Mapping[str, Any], ...]
    chosen: Mapping[str, Any]


@dataclass(frozen=True)
class ParityRow:
    """Largest differences of the logits between two graphs, or a graph and the torch model.

    is_error: of the graph in the folder, as it is run, from the steered torch model.
    """

    name: str
    prefill: float
    decode: float
    relative: float
    is_error: bool = False


@dataclass(frozen=True)
class RateRow:
    """How fast one candidate is: medians, each with its spread."""

    name: str
    rate: float
    rate_spread: Interval
    ratio: float
    """To the baseline's rate."""
    ratio_spread: Interval


@dataclass(frozen=True)
class Exported:
    """A steered graph, or what steering costs in time.

    unit, spread: of the rates. baseline: what their ratios are to.
    """

    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    parity: tuple[ParityRow, ...] = ()
    rates: tuple[RateRow, ...] = ()
    unit: str = "tokens/s"
    spread: str = "10th to 90th percentile"
    baseline: str = "unsteered"


@dataclass(frozen=True)
class Attributed:
    """Attributions of one run.

    images: for each its pictures, as anything that `grains_ext.vision.open_image` opens, or None.
    n_pairs: how many the run has, where fewer are shown.
    """

    title: str
    attributions: tuple[Attribution, ...]
    images: tuple[Sequence[Any] | None, ...] | None = None
    n_pairs: int | None = None
    n_not_converged: int = 0


@dataclass(frozen=True)
class Parts:
    """Everything that a page shows, in lists by kind.

    metadata: heading -> {name: value}, as small tables. commands: name -> the configuration that
    repeats it.
    """

    held_out: tuple[HeldOut, ...] = ()
    answers: tuple[Answers, ...] = ()
    attributed: tuple[Attributed, ...] = ()
    directions: tuple[Directions, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    exported: tuple[Exported, ...] = ()
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    commands: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            self.held_out + other.held_out,
            self.answers + other.answers,
            self.attributed + other.attributed,
            self.directions + other.directions,
            self.tunings + other.tunings,
            self.exported + other.exported,
            {**self.metadata, **other.metadata},
            self.commands + other.commands,
        )

    def __bool__(self) -> bool:
        """Whether there is anything but how it was made."""
        return any(
            (
                self.held_out,
                self.answers,
                self.attributed,
                self.directions,
                self.tunings,
                self.exported,
                self.metadata,
            )
        )

    def counts(self) -> dict[str, int]:
        """How many there are of each kind that there is."""
        found = {
            "evaluations": len(self.held_out),
            "answers": sum(len(part.asked) for part in self.answers),
            "attributions": sum(len(part.attributions) for part in self.attributed),
            "vectors": len(self.directions),
            "tunings": len(self.tunings),
            "graphs": len(self.exported),
        }
        return {name: count for name, count in found.items() if count}


def comparison(rows: Sequence[MethodRow], title: str = "") -> HeldOut:
    """A comparison of methods as the figures of an evaluation."""
    return HeldOut(
        title,
        (
            Figure(
                "accuracy",
                True,
                tuple(
                    Measured(row.name, row.accuracy, row.interval, row.n, row.settings)
                    for row in rows
                ),
            ),
            Figure(
                "perplexity_ratio",
                False,
                tuple(Measured(row.name, row.perplexity_ratio) for row in rows),
            ),
        ),
        max((row.n for row in rows), default=0),
    )


def continued(texts: Sequence[Generation], title: str = "") -> Answers:
    """Continuations as the answers of an evaluation."""
    return Answers(
        title,
        ("unsteered", "steered"),
        tuple(
            Asked(text.prompt, text.chosen, (Said(text.before), Said(text.after))) for text in texts
        ),
    )
