"""Which tokens of a forward are steered: read from what the model is called with.

The text of a row is counted in columns, padding included. A forward holds the columns after those
that are in the key/value cache. Where the prompt ends:

- told (``SteeringHandle.prompt_length``, ``decoder.prompt_lengths``): columns before it are the
  prompt, all others generated; right for every way of generating;
- else: a forward on an empty cache is the prompt; on a filled one, a single column is generated,
  and several are more of the prompt (a chunk of it, or the next turn of a chat) where only the last
  column's logits are asked for (logits_to_keep=1) or the cache is static. Otherwise they may as
  well be speculative decoding's guesses: that raises.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grains_ext.steering.mirrored import Mirrored

Named = Literal["all", "prompt", "generated", "last", "text", "image"]
Positions = Named | Tensor


@dataclass(frozen=True)
class Forward:
    """One call of the model: shape [B, T] of its tokens, and what the cache holds before them.

    past: columns in the cache; an int64 tensor [] for static caches, whose length no graph may
        depend on.
    prompt_length: int64 [1] or [B], in columns; None where it was not told.
    """

    rows: int
    length: int
    device: torch.device
    past: int | Tensor
    input_ids: Tensor | None
    attention_mask: Tensor | None
    logits_to_keep: int | None
    prompt_length: Tensor | None
    pairs_mask: Tensor | None = None
    """Which columns each token may look at, [B, heads, T, columns], where that was given: bool, or
    what is added to the scores."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], prompt_length: Mirrored | Tensor | None) -> "Forward":
        """arguments: by their names, as the model's forward takes them.

        Raises ValueError where there are no tokens, other numbers of rows than prompt lengths, or a
        cache that does not count its columns.
        """
        input_ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        if tokens is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds")
        rows, length = tokens.shape[:2]
        if arguments.get("cache_params") is not None:  # Mamba, xLSTM
            raise ValueError(
                "this model keeps a recurrent state, which does not tell how many tokens it has "
                "read: steer positions='all', with no gate, or generate with use_cache=False and "
                "handle.prompt_length"
            )
        if isinstance(prompt_length, Mirrored):
            prompt_length = prompt_length.on(tokens.device)
        elif prompt_length is not None:
            prompt_length = prompt_length.to(tokens.device)
        if prompt_length is not None and prompt_length.shape[0] not in (1, rows):
            raise ValueError(
                f"prompt lengths were told for {prompt_length.shape[0]} rows, the batch has {rows}"
            )
        mask = arguments.get("attention_mask")
        keep = arguments.get("logits_to_keep")
        return cls(
            rows=rows,
            length=length,
            device=tokens.device,
            past=_past_length(arguments.get("past_key_values")),
            input_ids=input_ids,
            # Four dimensions are for static caches, in generate(): prompts end in the last column.
            attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            logits_to_keep=keep if isinstance(keep, int) else None,
            prompt_length=prompt_length,
            pairs_mask=_pairs_mask(mask),
        )

    def columns(self) -> Tensor:
        """int64 [T]: which columns of the text these are."""
        return torch.arange(self.length, device=self.device) + self.past

    def last_token(self) -> Tensor:
        """int64 [1] or [B]: where in this forward the prompt's last token is.

        Only for a forward that holds it; of others, the nearest place.
        """
        if self.prompt_length is not None:
            return (self.prompt_length - 1 - self.past).clamp(0, self.length - 1)
        end = torch.full((1,), self.length - 1, device=self.device)
        if self.attention_mask is None:
            return end
        places = torch.arange(self.length, device=self.device)
        real = self.attention_mask[:, -self.length :] != 0
        return torch.where(real.any(-1), torch.where(real, places, -1).amax(-1), end)

    def but_first(self) -> Tensor:
        """bool [1 or B, T]: all tokens but padding and each row's first one."""
        if self.attention_mask is not None:
            real = self.attention_mask != 0
            return (real & (real.cumsum(-1) > 1))[:, -self.length :]
        if self.pairs_mask is None:
            return (self.columns() > 0)[None]
        mask = self.pairs_mask[:, 0]
        seen = mask if mask.dtype == torch.bool else mask == 0
        tokens = torch.arange(self.length, device=self.device)
        # Padding is what does not see itself; a first token sees nothing else.
        return seen[:, tokens, self.columns()] & (seen.sum(-1) > 1)

    def ends_prompt(self) -> bool | Tensor:
        """Whether the prompt's last token is in here.

        A bool tensor [], [1] or [B] where only the device knows.
        """
        if self.prompt_length is not None:
            place = self.prompt_length - 1 - self.past
            return (place >= 0) & (place < self.length)
        return self._is_prompt()

    def begins(self) -> bool | Tensor:
        """Whether the cache is empty; a bool tensor [] for static ones."""
        return self.past == 0

    def prompt(self) -> Tensor:
        """bool [1 or B, T]: the tokens of the prompt."""
        if self.prompt_length is not None:
            return self.columns() < self.prompt_length[:, None]
        return self._all(self._is_prompt())

    def last(self) -> Tensor:
        """bool [1 or B, T]: the prompt's last token and all generated ones.

        These are the tokens at whose places the model chooses what it generates.
        """
        if self.prompt_length is not None:
            return self.columns() >= self.prompt_length[:, None] - 1
        places = torch.arange(self.length, device=self.device)
        return ~self._all(self._is_prompt()) | (places == self.last_token()[:, None])

    def image(self, image_ids: tuple[int, ...]) -> Tensor:
        """bool [B, T]: the tokens that stand for images."""
        if self.input_ids is None:
            raise ValueError(
                "positions 'text' and 'image' are told apart by input_ids, and the model was "
                "called with inputs_embeds: give a mask as `positions`"
            )
        found = self.input_ids == image_ids[0]
        for token in image_ids[1:]:
            found = found | (self.input_ids == token)
        return found

    def masked(self, mask: Tensor) -> Tensor:
        """bool [1 or B, T]: mask, bool [1 or B, L], at these columns; False after its end."""
        if mask.shape[0] not in (1, self.rows):
            raise ValueError(
                f"the mask of positions has {mask.shape[0]} rows, the batch {self.rows}: "
                "generate() repeats each row num_beams or num_return_sequences times, one after "
                "the other; so must the mask (repeat_interleave)"
            )
        columns = self.columns()
        inside = columns.clamp(max=mask.shape[1] - 1)
        return mask[:, inside] & (columns < mask.shape[1])

    def _all(self, value: bool | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.reshape(1, 1).expand(1, self.length)
        return torch.full((1, self.length), value, device=self.device)

    def _is_prompt(self) -> bool | Tensor:
        if isinstance(self.past, Tensor):
            return True if self.length > 1 else self.past == 0
        if self.past == 0:
            return True
        if self.length == 1:
            return False
        if self.logits_to_keep == 1:
            return True
        raise ValueError(
            f"{self.length} tokens follow {self.past} in the cache: are they more of the prompt, "
            "or guesses of speculative decoding? Say where the prompt ends, in columns with "
            "padding: handle.prompt_length = inputs.input_ids.shape[1]"
        )


def check_positions(positions: Positions, image_ids: tuple[int, ...]) -> None:
    """Raises ValueError for what no forward could fulfil."""
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2) or not positions.numel():
            raise ValueError(
                "a mask of positions must be a bool tensor [batch, columns] or [columns], got "
                f"{positions.dtype} {list(positions.shape)}"
            )
    elif positions not in get_args(Named):
        raise ValueError(
            f"positions must be a bool mask or one of {', '.join(get_args(Named))}; got "
            f"{positions!r}"
        )
    elif positions == "image" and not image_ids:
        raise ValueError(
            "positions='image', but the model's configuration names no image token "
            "(image_token_id): it takes text only"
        )


def reads_as_generated(positions: Positions) -> bool:
    """Whether a text that stands alone is generated, all but its first token, to such steering.

    To steering of all else, and to gates, it is a prompt.
    """
    return isinstance(positions, str) and positions in ("generated", "last")


def image_token_ids(config: Any) -> tuple[int, ...]:
    """The ids of the tokens that stand for pixels, by a model's configuration; none for text."""
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in found if isinstance(token, int))


def steered_tokens(
    forward: Forward, positions: Positions, image_ids: tuple[int, ...]
) -> Tensor | None:
    """bool [1 or B, T]: the tokens at these positions; None for all.

    A mask must be bool [1 or B, L] on the forward's device.
    """
    if isinstance(positions, Tensor):
        return forward.masked(positions)
    if positions == "prompt":
        return forward.prompt()
    if positions == "generated":
        return ~forward.prompt()
    if positions == "last":
        return forward.last()
    if positions == "image":
        return forward.image(image_ids)
    if positions == "text" and image_ids:
        return ~forward.image(image_ids)
    return None


def _pairs_mask(mask: Any) -> Tensor | None:
    """Of four dimensions: itself, or one of those for several kinds of attention."""
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    return next((m for m in masks if isinstance(m, Tensor) and m.ndim == 4), None)


def _past_length(cache: Any) -> int | Tensor:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        length: int | Tensor = cache.get_seq_length()
        # A static cache counts on in this very tensor, before the first block is done.
        return length.clone() if isinstance(length, Tensor) else length
    # Before there were cache objects: ((keys [B, heads, T, size], values), ...) by block.
    return int(cache[0][0].shape[-2])
