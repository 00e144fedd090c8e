"""Attribution by a graph that `export_attribution` wrote: onnxruntime and tokenizers, no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from grains_ext.attribution.objective import OBJECTIVES, answers_of
from grains_ext.attribution.result import Attribution
from grains_ext.attribution.rules import (
    BASELINES,
    RULES,
    check_length,
    quadrature,
    special_token,
    warn_of_zero,
    within,
)
from grains_ext.attribution.runs import Finished, carry_out, check_share, hash_of_pairs, naming
from grains_ext.attribution.sequences import Packed, pack
from grains_ext.attribution.span import Span, check_span, span_of
from grains_ext.encoding import EncodedPair, encode_pair
from grains_ext.export.errors import GraphError
from grains_ext.export.runtime import Provider, require_onnxruntime, session
from grains_ext.export.tokenizing import FileTokenizer, TokenizerSettings
from grains_ext.pairs import PreferencePair

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

INPUTS = (
    "input_ids",
    "branch_ids",
    "baseline_ids",
    "baseline_embedding",
    "target_columns",
    "target_tokens",
    "target_weights",
    "nodes",
    "weights",
)
OUTPUTS = ("scores", "f_input", "f_baseline", "residual")
SETTINGS_KEY = "grains.attribution"
TOKENIZER_KEY = "grains.tokenizer"

# Tokens of one run of the graph: enough to keep a processor's cores busy. Memory goes with it.
_MAX_BATCH_TOKENS = 2048
_PADDING = -1

Array = npt.NDArray[Any]
BaselineRow = Sequence[int]
"""For each token of a prompt what its path starts from: a token id, or -1 for the embedding."""


@dataclass(frozen=True)
class GraphSettings:
    """What lies in a graph's metadata; plain JSON values."""

    model: str
    weights: str
    dtype: str
    baseline: str
    method: str
    n_steps: int
    max_positions: int | None
    adds_position_embeddings: bool
    tokenizer: TokenizerSettings
    versions: dict[str, str]

    @classmethod
    def from_json(cls, text: str) -> GraphSettings:
        """Raises ValueError where the text is not of this kind."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        try:
            tokenizer = TokenizerSettings(**values.pop("tokenizer"))
            return cls(tokenizer=tokenizer, **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is of another version: {error}") from error


class AttributionGraph:
    """A graph that attributes pairs with onnxruntime, wherever that runs.

        graph = AttributionGraph("attribution.onnx")
        results = graph.attribute(load_pairs("pairs.jsonl"))

    Everything that a run needs lies in the file: weights, tokenizer, chat template, settings.
    library, session_options, providers: as for `grains_ext.export.session`.

    Raises FileNotFoundError, ImportError without onnxruntime or tokenizers, and GraphError where
    the file is not such a graph.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        library: bool = True,
        session_options: SessionOptions | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        self.path = Path(path)
        require_onnxruntime()
        try:
            self.session = session(
                self.path, library=library, session_options=session_options, providers=providers
            )
        except FileNotFoundError:
            raise
        except Exception as error:  # onnxruntime's own kinds share no base class
            raise GraphError(f"onnxruntime cannot load '{path}': {error}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        self._check_form(set(metadata))
        try:
            self.settings = GraphSettings.from_json(metadata[SETTINGS_KEY])
        except ValueError as error:
            raise GraphError(
                f"the settings in '{path}' cannot be read: {error}. Export it again"
            ) from error
        self.tokenizer = FileTokenizer(metadata[TOKENIZER_KEY], self.settings.tokenizer)

    def attribute(
        self,
        pairs: Iterable[PreferencePair],
        *,
        method: str | None = None,
        baseline: str | npt.ArrayLike | None = None,
        objective: str = "sum",
        n_steps: int | Literal["auto"] = "auto",
        tolerance: float = 0.05,
        attributed_span: Span = None,
        max_batch_tokens: int | Literal["auto"] = "auto",
        separator: str | None = None,
        output_dir: str | Path | None = None,
        limit: int | None = None,
        shard: tuple[int, int] | None = None,
        progress: bool = True,
    ) -> list[Attribution]:
        """What `grains_ext.attribute` gives with the same method and number of steps.

        method: "gausslegendre" or "riemann_middle"; None is the one that the graph was written
            with, as it is for ``baseline``, and for ``n_steps`` "auto".
        baseline: a name, or an embedding [D] in the scale in which the model takes its
            ``inputs_embeds``.
        objective: "sum", "mean", "first", "chosen" or "rejected".
        max_batch_tokens: tokens of one run of the graph. A pair whose points are more takes several
            runs.
        The other arguments are those of `grains_ext.attribute`, and so are the results, the
        directory that they stream to, and the errors.
        """
        run = _Run(
            graph=self,
            pairs=list(pairs),
            method=self.settings.method if method is None else method,
            baseline=self.settings.baseline if baseline is None else baseline,
            objective=objective,
            n_steps=self.settings.n_steps if n_steps == "auto" else n_steps,
            tolerance=tolerance,
            span=attributed_span,
            budget=_MAX_BATCH_TOKENS if max_batch_tokens == "auto" else max_batch_tokens,
            separator=separator,
        )
        check_share(limit, shard)
        run.encode()
        return carry_out(run, output_dir=output_dir, limit=limit, shard=shard, progress=progress)

    def _check_form(self, metadata: set[str]) -> None:
        inputs = {value.name for value in self.session.get_inputs()}
        # An input with a default is none of these.
        inputs |= {value.name for value in self.session.get_overridable_initializers()}
        outputs = {value.name for value in self.session.get_outputs()}
        for kind, wanted, found in (
            ("inputs", INPUTS, inputs),
            ("outputs", OUTPUTS, outputs),
            ("metadata entries", (SETTINGS_KEY, TOKENIZER_KEY), metadata),
        ):
            missing = [name for name in wanted if name not in found]
            if missing:
                raise GraphError(
                    f"'{self.path}' is not an attribution graph: it lacks the {kind} "
                    f"{', '.join(missing)} (it has {', '.join(sorted(found)) or 'none'}). Write "
                    "one with grains_ext.export.export_attribution"
                )


def packed_feeds(
    rows: Sequence[tuple[Packed, BaselineRow]],
    nodes: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> dict[str, Array]:
    """The graph's inputs, but for the baseline embedding, padded on the right."""
    width = max(len(row) for row, _ in rows)
    n_targets = max(len(row.targets) for row, _ in rows)

    def padded(lists: Iterable[Sequence[Any]], length: int, filler: Any, dtype: Any) -> Array:
        array = np.full((len(rows), length), filler, dtype)
        for number, values in enumerate(lists):
            array[number, : len(values)] = values
        return array

    columns = [[target.column for target in row.targets] for row, _ in rows]
    tokens = [[target.token for target in row.targets] for row, _ in rows]
    signs = [[target.weight for target in row.targets] for row, _ in rows]
    return {
        "input_ids": padded((row.token_ids for row, _ in rows), width, 0, np.int64),
        "branch_ids": padded((row.branches for row, _ in rows), width, _PADDING, np.int64),
        "baseline_ids": padded(
            ([*start, *row.token_ids[len(start) :]] for row, start in rows), width, 0, np.int64
        ),
        "target_columns": padded(columns, n_targets, 0, np.int64),
        "target_tokens": padded(tokens, n_targets, 0, np.int64),
        "target_weights": padded(signs, n_targets, 0, np.float32),
        "nodes": nodes.astype(np.float32),
        "weights": weights.astype(np.float32),
    }


@dataclass
class _Found:
    """What the runs of the graph have said of one pair."""

    scores: npt.NDArray[np.float64]
    f_input: float = 0.0
    f_baseline: float = 0.0
    evaluations: int = 0


@dataclass
class _Run:
    """One call of `AttributionGraph.attribute`. Raises ValueError for wrong settings."""

    graph: AttributionGraph
    pairs: Sequence[PreferencePair]
    method: str
    baseline: str | npt.ArrayLike
    objective: str
    n_steps: int
    tolerance: float
    span: Span
    budget: int
    separator: str | None

    def __post_init__(self) -> None:
        if self.method not in RULES:
            raise ValueError(
                f"method must be one of {', '.join(RULES)} for a graph, got {self.method!r}; "
                "grains_ext.attribute has the others"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        for name, count in (("n_steps", self.n_steps), ("max_batch_tokens", self.budget)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(
                    f"{name} must be 'auto' or an integer of at least 1, got {count!r}"
                )
        if not (isinstance(self.tolerance, int | float) and self.tolerance > 0):
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}")
        check_span(self.span)
        self._nodes, self._weights = quadrature(self.method, self.n_steps)
        self._set_baseline()

    @property
    def device(self) -> str:
        """ "cuda" where onnxruntime was given such a provider."""
        return "cuda" if "CUDAExecutionProvider" in self.graph.session.get_providers() else "cpu"

    def encode(self) -> None:
        """Splits all pairs into tokens. Raises ValueError naming the pair that is wrong."""
        self._encoded: list[EncodedPair] = []
        for number, pair in enumerate(self.pairs):
            with naming(number, pair):
                if pair.images:
                    raise ValueError(
                        "it has images, and a graph reads text only: attribute it with "
                        "grains_ext.attribute"
                    )
                ids = encode_pair(self.graph.tokenizer, pair, separator=self.separator)
                answers_of(ids, self.objective)
                self._attributed(pair, ids)
                check_length(ids, self.graph.settings.max_positions)
                self._encoded.append(ids)

    def length(self, number: int) -> int:
        return len(self._encoded[number].prompt_ids)

    def attribute_group(self, group: Sequence[int], finished: Finished) -> dict[int, Attribution]:
        """The results of one group, by the number of the pair."""
        rows = {number: self._row(number) for number in group}
        waiting = sorted(group, key=lambda number: -len(rows[number][0]))
        results = {}
        while waiting:
            width = len(rows[waiting[0]][0])
            # The ends of the path are points as well.
            n_pairs = max(1, self.budget // (width * (self.n_steps + 2)))
            batch, waiting = waiting[:n_pairs], waiting[n_pairs:]
            room = max(1, self.budget // width - 2)
            n_runs = 1 if n_pairs > 1 else math.ceil(self.n_steps / room)
            n_nodes = math.ceil(self.n_steps / n_runs)
            found = self._found([rows[number] for number in batch], n_nodes)
            for number, one in zip(batch, found, strict=True):
                results[number] = self._result(number, one)
                finished(one.evaluations, results[number].converged)
        return results

    def describe(self) -> dict[str, Any]:
        """What decides the results, for the directory that holds them."""
        baseline = self.baseline
        settings = self.graph.settings
        return {
            "engine": "onnx",
            "method": self.method,
            "baseline": baseline if isinstance(baseline, str) else self._embedding_name(),
            "objective": self.objective,
            "n_steps": self.n_steps,
            "tolerance": self.tolerance,
            "attributed_span": list(self.span) if isinstance(self.span, tuple) else self.span,
            "max_batch_tokens": self.budget,
            "separator": self.separator,
            "model": settings.model,
            "weights": settings.weights,
            "dtype": settings.dtype,
            "onnxruntime": require_onnxruntime().__version__,
            "pairs": hash_of_pairs(self.pairs, self._encoded),
            "n_pairs": len(self.pairs),
        }

    def _set_baseline(self) -> None:
        """What every token starts from: an id, or -1 and an embedding (None: that of the file)."""
        self._start = _PADDING
        self._embedding: Array | None = None
        size = next(
            value.shape[0]
            for value in self.graph.session.get_overridable_initializers()
            if value.name == "baseline_embedding"
        )
        if not isinstance(self.baseline, str):
            self._name = "tensor"
            self._embedding = np.asarray(self.baseline, np.float32)
            if self._embedding.shape != (size,):
                raise ValueError(
                    f"a baseline embedding must have shape [{size}], got "
                    f"{list(self._embedding.shape)}"
                )
        elif self.baseline not in BASELINES:
            raise ValueError(
                f"baseline must be one of {', '.join(BASELINES)} or an embedding, got "
                f"{self.baseline!r}"
            )
        elif self.baseline in ("mean", "zero"):
            self._name = self.baseline
            if self.baseline == "zero":
                self._embedding = np.zeros(size, np.float32)
                if not self.graph.settings.adds_position_embeddings:
                    warn_of_zero()
        else:
            self._name, self._start = special_token(self.graph.tokenizer, self.baseline)

    def _embedding_name(self) -> str:
        assert self._embedding is not None
        return f"embedding {hashlib.sha256(self._embedding.tobytes()).hexdigest()[:16]}"

    def _attributed(self, pair: PreferencePair, ids: EncodedPair) -> range:
        return span_of(self.graph.tokenizer, pair, ids.prompt_ids, self.span)

    def _row(self, number: int) -> tuple[Packed, BaselineRow]:
        ids = self._encoded[number]
        start = list(ids.prompt_ids)
        for place in self._attributed(self.pairs[number], ids):
            start[place] = self._start
        # BOS keeps its place, as in the torch engine.
        if ids.prompt_ids[0] == self.graph.tokenizer.bos_token_id:
            start[0] = ids.prompt_ids[0]
        [row] = pack(ids.prompt_ids, answers_of(ids, self.objective), tree=True)
        return row, start

    def _found(self, rows: Sequence[tuple[Packed, BaselineRow]], n_nodes: int) -> list[_Found]:
        """Runs the graph over all nodes, ``n_nodes`` at a time: scores add up."""
        found = [_Found(np.zeros(len(start))) for _, start in rows]
        for first in range(0, self.n_steps, n_nodes):
            part = slice(first, first + n_nodes)
            feeds = packed_feeds(rows, self._nodes[part], self._weights[part])
            if self._embedding is not None:
                feeds["baseline_embedding"] = self._embedding
            scores, f_input, f_baseline, _ = self.graph.session.run(list(OUTPUTS), feeds)
            for number, one in enumerate(found):
                one.scores += scores[number, : len(one.scores)]
                one.f_input = float(f_input[number])
                one.f_baseline = float(f_baseline[number])
                one.evaluations += len(feeds["nodes"]) + 2
        return found

    def _result(self, number: int, found: _Found) -> Attribution:
        pair, ids = self.pairs[number], self._encoded[number].prompt_ids
        tokenizer = self.graph.tokenizer
        change = found.f_input - found.f_baseline
        residual = float(found.scores.sum()) - change
        return Attribution(
            tokens=tuple(tokenizer.decode([token]) for token in ids),
            token_ids=ids,
            modality=("text",) * len(ids),
            scores=found.scores.astype(np.float32),
            f_input=found.f_input,
            f_baseline=found.f_baseline,
            residual=residual,
            evaluations=found.evaluations,
            n_steps=self.n_steps,
            converged=within(residual, change, self.tolerance),
            method=self.method,
            baseline=self._name,
            prompt=tokenizer.decode(ids),
            chosen=pair.chosen,
            rejected=pair.rejected,
            pair_id=pair.id,
            objective=self.objective,
        )
