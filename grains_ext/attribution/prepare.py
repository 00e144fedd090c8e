"""From a preference pair to what the decoder reads for it: its path's two ends and its rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grains_ext.attribution.forward import LayerStates, Row, Shortcuts, read_prefix
from grains_ext.attribution.objective import answers_of
from grains_ext.attribution.path import Baseline, max_positions
from grains_ext.attribution.points import Path
from grains_ext.attribution.rules import check_length
from grains_ext.attribution.sequences import Packed, pack
from grains_ext.attribution.settings import Settings
from grains_ext.attribution.span import span_of
from grains_ext.decoder import DecoderView, unwrap
from grains_ext.encoding import EncodedPair, TokenIds
from grains_ext.pairs import PreferencePair
from grains_ext.vision import CapturedPrompt, ImageGrid, capture_prompt, image_baseline_embeddings

# Where a configuration says that some blocks attend the last so many tokens only.
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
)
# Below this a cached prefix saves less than it costs to read.
_LEAST_PREFIX = 8


@dataclass(frozen=True)
class Prepared:
    """One pair, ready to be attributed."""

    ids: EncodedPair
    path: Path
    modality: tuple[str, ...]
    images: tuple[ImageGrid, ...]
    embeddings: Tensor
    """[T + C, D]: the prompt's, and those of the longer continuation where there are images."""
    position_ids: Tensor | None
    mask: Tensor | dict[str, Tensor] | None
    replayed: dict[str, Any] | None

    @property
    def n_fixed(self) -> int:
        """Tokens before the first one that is attributed."""
        return int(self.path.attributed.nonzero()[0])


class Preparer:
    """Prepares the pairs of one run. Raises ValueError, without a pair's name, for unfit ones."""

    def __init__(
        self, decoder: DecoderView, processor: Any, baseline: Baseline, settings: Settings
    ) -> None:
        self._decoder = decoder
        self._processor = processor
        self._baseline = baseline
        self._settings = settings
        self._prefix: tuple[TokenIds, LayerStates] | None = None

    def check(self, pair: PreferencePair, ids: EncodedPair) -> None:
        """What can be said of a pair before anything is computed."""
        self._baseline.check_length(len(ids.prompt_ids))
        answers_of(ids, self._settings.objective)
        span_of(self._processor, pair, ids.prompt_ids, self._settings.attributed_span)
        check_length(ids, max_positions(self._decoder))

    @torch.no_grad()
    def prepare(self, number: int, pair: PreferencePair, ids: EncodedPair | None) -> Prepared:
        """ids: the pair's encoding where it has no images."""
        captured = None
        if ids is None:
            captured = capture_prompt(
                self._decoder, self._processor, pair, separator=self._settings.separator
            )
            ids = captured.pair
            self.check(pair, ids)
        embeddings = (
            self._decoder.embed(torch.tensor([ids.prompt_ids], device=self._decoder.device))[0]
            if captured is None
            else captured.embeddings
        ).detach()  # models prepared for training adapters make embeddings require gradients
        modality = captured.modality if captured else ("text",) * len(ids.prompt_ids)
        return Prepared(
            ids=ids,
            path=self._path(number, pair, ids, embeddings, modality, captured),
            modality=modality,
            images=captured.images if captured else (),
            embeddings=embeddings,
            position_ids=captured.position_ids if captured else None,
            mask=captured.mask if captured else None,
            replayed=captured.stack_kwargs if captured else None,
        )

    @torch.no_grad()
    def rows(self, prepared: Prepared, shortcuts: Shortcuts) -> list[Row]:
        """The sequences that f is read from."""
        answers = answers_of(prepared.ids, self._settings.objective)
        packed = pack(prepared.ids.prompt_ids, answers, tree=shortcuts.tree)
        rows = [self._row(prepared, one) for one in packed]
        n_prefix = self.prefix_length(prepared, rows) if shortcuts.prefix else 0
        return [self._with_prefix(prepared, row, n_prefix) for row in rows] if n_prefix else rows

    def may_shorten(self, prepared: Prepared) -> bool:
        """Whether a mask and positions of our own can say what the model's own would.

        Not where the model takes no positions, or attends a window only that the sequence leaves: a
        mask passed from outside replaces the window's.
        """
        if prepared.mask is not None:
            return True
        model = unwrap(self._decoder.model)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return False
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        ids = prepared.ids
        n_tokens = len(ids.prompt_ids) + len(ids.chosen_ids) + len(ids.rejected_ids)
        windows = [getattr(config, name, None) for name in _WINDOWS]
        return all(window is None or n_tokens <= window for window in windows)

    def _path(
        self,
        number: int,
        pair: PreferencePair,
        ids: EncodedPair,
        embeddings: Tensor,
        modality: Sequence[str],
        captured: CapturedPrompt | None,
    ) -> Path:
        n_prompt = len(ids.prompt_ids)
        prompt = embeddings[:n_prompt]
        start = self._baseline.embeddings(ids.prompt_ids, prompt)
        is_image = torch.tensor([kind == "image" for kind in modality], device=prompt.device)
        if captured is not None and not self._baseline.per_token:
            start[is_image] = image_baseline_embeddings(
                self._decoder, self._processor, pair, captured, self._settings.image_baseline
            ).to(start)
        span = span_of(self._processor, pair, ids.prompt_ids, self._settings.attributed_span)
        attributed = torch.zeros(n_prompt, dtype=torch.bool, device=prompt.device)
        attributed[span.start : span.stop : span.step] = True
        for kind, members in (("image", is_image), ("text", ~is_image)):
            if kind not in self._settings.modalities:
                attributed &= ~members
        if not attributed.any():
            raise ValueError(
                f"no token is attributed: the prompt has none of {self._settings.modalities} "
                "in the attributed span"
            )
        return Path(number, prompt, torch.where(attributed[:, None], start, prompt), attributed)

    def _row(self, prepared: Prepared, packed: Packed) -> Row:
        n_prompt = len(prepared.ids.prompt_ids)
        answers = torch.tensor([packed.token_ids[n_prompt:]], dtype=torch.int64)
        depths = torch.tensor(packed.depths)
        read = prepared.path.input
        if answers.numel():
            read = torch.cat([read, self._decoder.embed(answers.to(self._decoder.device))[0]])
        positions = (
            depths if prepared.position_ids is None else prepared.position_ids.cpu()[..., depths]
        )
        mask = prepared.mask
        replayed = prepared.replayed
        if replayed is not None:
            replayed = _along(replayed, depths, len(prepared.embeddings))
        return Row(
            packed=packed,
            embeddings=read,
            position_ids=positions,
            n_prompt=n_prompt,
            allowed=(
                {name: packed.allowed(part) for name, part in mask.items()}
                if isinstance(mask, dict)
                else packed.allowed(mask)
            ),
            replayed=replayed,
        )

    def prefix_length(self, prepared: Prepared, rows: Sequence[Row]) -> int:
        """Columns worth a cache: before the first that moves, if none of them sees a later one."""
        # One column at least is left to be read.
        length = min(prepared.n_fixed, len(prepared.ids.prompt_ids) - 1)
        allowed = rows[0].allowed
        for mask in allowed.values() if isinstance(allowed, dict) else [allowed]:
            last_seen = torch.where(mask, torch.arange(mask.shape[1]), -1).amax(-1)
            reach = last_seen[:length].cummax(0).values
            closed = (reach == torch.arange(length)).nonzero()
            length = int(closed[-1]) + 1 if len(closed) else 0
        # Features that later blocks add to image tokens cannot be shared out to prefix and rest.
        if prepared.replayed and "image" in prepared.modality[length:]:
            return 0
        return length if length >= _LEAST_PREFIX else 0

    def _with_prefix(self, prepared: Prepared, row: Row, n_prefix: int) -> Row:
        if row.replayed is not None:
            before = _along(row.replayed, torch.arange(n_prefix), len(row.packed))
            states = read_prefix(self._decoder, replace(row, replayed=before), n_prefix)
            return replace(row, prefix=states, replayed=dict.fromkeys(row.replayed))
        ids = row.packed.token_ids[:n_prefix]
        if self._prefix is None or self._prefix[0] != ids:
            # Kept for the next pairs, which may share a system prompt.
            self._prefix = (ids, read_prefix(self._decoder, row, n_prefix))
        return replace(row, prefix=self._prefix[1])


def _along(arguments: dict[str, Any], depths: Tensor, length: int) -> dict[str, Any]:
    """The stack's arguments with one entry per column, laid out like a packed row."""

    def gather(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] == (1, length):
            return value[:, depths.to(value.device)]
        return value

    return {name: gather(value) for name, value in arguments.items()}
