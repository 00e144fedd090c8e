"""DecoderView: the parts of a language model's decoder, found by its structure."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Where the model sits inside peft, torch.compile and DistributedDataParallel wrappers.
_WRAPPED_AT = ("base_model.model", "_orig_mod", "module")
_FINAL_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")


@dataclass(frozen=True)
class DecoderView:
    """The decoder of a model: where directions are captured from and added to.

    Block i is the i-th decoder block, 0-based; its output is the residual stream after it, before
    any final norm.

    stack: the module that holds the blocks. It takes input embeddings as ``inputs_embeds``; in a
        vision-language model they are those of text and images, merged.
    """

    model: nn.Module
    blocks: list[nn.Module]
    embedding: nn.Module
    head: nn.Module
    stack: nn.Module
    final_norm: nn.Module | None
    hidden_size: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        blocks: str | None = None,
        embedding: str | None = None,
        head: str | None = None,
        final_norm: str | None = None,
    ) -> "DecoderView":
        """Finds the parts of any Hugging Face decoder-only model, or of a wrapped one.

        The decoder is the module that holds both the input embedding and, beside it, the list of
        config.num_hidden_layers blocks: a vision tower never does. For a model built differently,
        name the parts by dotted paths: blocks="backbone.stages", embedding="backbone.tokens",
        head="output", final_norm="backbone.norm".

        Raises ValueError with what was found and how to name the parts.
        """
        inner = unwrap(model)
        embedding_module = _part(inner, "embedding", embedding) or _call(
            inner, "get_input_embeddings"
        )
        head_module = _part(inner, "head", head) or _call(inner, "get_output_embeddings")
        if embedding_module is None or head_module is None:
            lacking = "embedding" if embedding_module is None else "head"
            raise ValueError(f"{type(inner).__name__} shows no {lacking}: {_how_to_name(inner)}")
        stack, block_list = _find_blocks(inner, embedding_module, blocks)
        norm = _part(inner, "final_norm", final_norm)
        if norm is None:
            norms = (getattr(stack, name, None) for name in _FINAL_NORM_NAMES)
            norm = next((n for n in norms if isinstance(n, nn.Module)), None)
        return cls(
            model=model,
            blocks=list(block_list),
            embedding=embedding_module,
            head=head_module,
            stack=stack,
            final_norm=norm,
            hidden_size=_hidden_size(inner, embedding_module),
        )

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device, or the CPU where accelerate moves both."""
        return ids_device(self.embedding)

    def check_blocks(self, blocks: Iterable[int]) -> list[int]:
        """The block numbers, sorted. Raises ValueError where one is not in [0, n_blocks)."""
        numbers = sorted(set(blocks))
        bad = [b for b in numbers if not 0 <= b < self.n_blocks]
        if bad:
            raise ValueError(
                f"blocks {bad} do not exist: the model has {self.n_blocks} blocks, numbered from 0"
            )
        return numbers

    def embed(self, input_ids: Tensor) -> Tensor:
        """inputs_embeds [B, T, D] for input_ids int64 [B, T], as the model's forward takes them."""
        embeds: Tensor = self.embedding(input_ids)
        return embeds

    @contextmanager
    def capture(
        self, blocks: Iterable[int] | None = None, positions: int | Tensor | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Collects block outputs of every forward inside the context; a later one replaces them.

        blocks: which ones (all by default). positions: None keeps [B, T, D]; an int (from the end
        where negative) or an int64 tensor [B] keeps one position of each row, [B, D].
        """
        captured: dict[int, Tensor] = {}

        def keep(block: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                hidden = hidden_states_of(output)
                if positions is not None:
                    rows = torch.arange(hidden.shape[0], device=hidden.device)
                    hidden = hidden[rows, positions]
                captured[block] = hidden

            return hook

        numbers = range(self.n_blocks) if blocks is None else self.check_blocks(blocks)
        hooks = [self.blocks[b].register_forward_hook(keep(b)) for b in numbers]
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()


def view_of(model: Any, decoder: DecoderView | None) -> DecoderView:
    """The model as it was before torch.compile: hooks and its graphs do not go together."""
    if decoder is not None:
        return replace(decoder, model=getattr(decoder.model, "_orig_mod", decoder.model))
    return DecoderView.of(getattr(model, "_orig_mod", model))


def ids_device(module: nn.Module) -> torch.device:
    """Where an embedding, or a model, takes its ids: where its first weight is, or on the CPU where
    accelerate moves both."""
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in a block's output: itself (transformers 5) or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        got = f"shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(output).__name__
        raise TypeError(
            "a decoder block must return hidden states [batch, tokens, hidden], alone or first in "
            f"a tuple; got {got}"
        )
    return hidden


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence the model was made for, where its configuration says so."""
    return getattr(_text_config(unwrap(model)), "max_position_embeddings", None)


def check_length(model: nn.Module, n_tokens: int, name: str) -> None:
    """Raises ValueError, with the name, where a sequence is longer than the model was made for.

    Its positions would be read past their table, or be of a kind that training had none of.
    """
    limit = max_positions(model)
    if limit is not None and n_tokens > limit:
        raise ValueError(
            f"{name} has {n_tokens} tokens, the model has {limit} positions; shorten the prompt"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside peft, torch.compile and data-parallel wrappers."""
    return wrappers(model)[-1]


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The model as given, what it wraps, and so on to the Hugging Face model."""
    found = [model]
    while not hasattr(type(found[-1]), "get_input_embeddings"):
        inside = (_at(found[-1], path) for path in _WRAPPED_AT)
        inner = next((module for module in inside if module is not None), None)
        if inner is None:
            break
        found.append(inner)
    return found


@contextmanager
def prompt_lengths(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Says where each row's prompt ends in the forwards inside, for steering that asks for it.

    A forward over prompts and continuations, as scoring makes them, does not show it. lengths: in
    columns of the batch, padding on the left included; one for each row.

        with prompt_lengths(model, [width - len(ids) for ids in continuations]):
            logits = model(input_ids, attention_mask=mask).logits
    """
    inner: Any = unwrap(model)
    before = told_prompt_lengths(model)
    inner._grains_prompt_lengths = torch.tensor(lengths, dtype=torch.int64)
    try:
        yield
    finally:
        inner._grains_prompt_lengths = before
        if before is None:
            del inner._grains_prompt_lengths


def told_prompt_lengths(model: nn.Module) -> Tensor | None:
    """What `prompt_lengths` says now: int64 [rows], on the CPU."""
    return getattr(unwrap(model), "_grains_prompt_lengths", None)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _part(model: nn.Module, role: str, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    module = _at(model, path)
    if module is None:
        children = [name for name, _ in model.named_children()]
        raise ValueError(f"{role}={path!r}: no such module; the model's parts are {children}")
    return module


def _call(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _find_blocks(
    model: nn.Module, embedding: nn.Module, path: str | None
) -> tuple[nn.Module, Iterable[nn.Module]]:
    """(the module that holds the blocks, the blocks)."""
    if path is not None:
        named = _part(model, "blocks", path)
        if not isinstance(named, nn.ModuleList | nn.Sequential) or len(named) == 0:
            raise ValueError(f"blocks={path!r} must name a non-empty ModuleList, got {type(named)}")
        return model.get_submodule(path.rpartition(".")[0]), named
    n_blocks = getattr(_text_config(model), "num_hidden_layers", None)
    found = [
        (stack, child)
        for stack in model.modules()
        if any(child is embedding for child in stack.children())
        for child in stack.children()
        if isinstance(child, nn.ModuleList) and len(child) == n_blocks
    ]
    if len(found) != 1:
        raise ValueError(
            f"found {len(found)} candidates for the decoder blocks of {type(model).__name__} "
            f"(a list of {n_blocks} blocks beside the input embedding): {_how_to_name(model)}"
        )
    return found[0]


def _how_to_name(model: nn.Module) -> str:
    lists = [
        f"{name} ({len(module)})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    embeddings = [
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    ]
    return (
        "name the parts, as in DecoderView.of(model, blocks='path.to.blocks', "
        "embedding='path.to.embedding', head='path.to.head', final_norm='path.to.norm'). "
        f"Module lists here: {', '.join(lists) or 'none'}; embeddings: "
        f"{', '.join(embeddings) or 'none'}"
    )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(model: nn.Module, embedding: nn.Module) -> int:
    size = getattr(_text_config(model), "hidden_size", None)
    if size is None:
        size = next(embedding.parameters()).shape[-1]
    return int(size)
