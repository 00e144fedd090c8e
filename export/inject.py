"""Puts steering into a finished ONNX graph, whoever exported, fused or quantised it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from grains_ext.export.bank import Bank
from grains_ext.export.components import edit_components
from grains_ext.export.errors import GraphError
from grains_ext.export.index import GraphIndex
from grains_ext.export.locate import Site, has_cache, locate, site_of
from grains_ext.export.reading import blocks_in_config, load_graph
from grains_ext.export.saving import save_graph
from grains_ext.export.surgery import Injected, Surgery
from grains_ext.export.undo import is_steered, restore

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors


def inject(
    model_path: str | Path,
    vectors: SteeringVectors | Sequence[SteeringVectors],
    output_path: str | Path | None = None,
    *,
    blocks: Sequence[int] | None = None,
    tensors: Mapping[int, str] | None = None,
    strength: float | Sequence[float] | None = None,
    fuse: bool = True,
    baked: bool = False,
    default_index: int | None = 0,
    dry_run: bool = False,
) -> list[Injected]:
    """Writes a copy of an ONNX decoder whose blocks' outputs are steered.

    model_path: a decoder with logits and key/value cache outputs, float32, float16 or bfloat16
        activations. Weights may be quantised or in external files: those are not read; they are
        copied where the output lies in another folder. A config.json or genai_config.json beside
        the graph is checked for the number of blocks. A graph that is steered already is steered
        anew: what it was steered with is taken out. Or a folder of graphs, as exports of
        vision-language models are: every graph in it with a cache is steered, all or none.
    vectors: the directions, each [hidden size]; or a sequence of N, a bank: then the input
        `grains.index`, int32 [batch], says which of them steers each row of a batch, -1 for none.
    output_path: may be model_path itself. The file appears complete or not at all. For a folder of
        graphs: a new folder, with all its other files, or the same.
    blocks: which of the vectors' blocks to steer; all of them if None.
    tensors: {block: name}: the tensor that is the output of a block, or the node that makes it, in
        the place of what is found.
    strength: one number, or one for each of a bank's vectors; the vectors' own if None.
    fuse: replaces residual addition, steering and the norm after it by one operator where the
        graph has exactly that; else the addition is kept and followed by a `grains.Steer`.
    baked: keeps directions and strength as constants. Otherwise they are graph inputs with a
        default too, `grains.layers.{i}.direction` and `grains.strength` (float32 [1], or [N] for a
        bank): feed them to override.
    default_index: the `grains.index` of every row where none is fed; None makes it a required
        input. Only for a bank.
    dry_run: writes nothing; returns what would be injected.

    The operators' bodies travel with the file: it runs on an onnxruntime without the op library.
    So does what the graph was before, for `remove_steering`.

    Returns what was injected, by block. Raises GraphError where the graph is not a decoder that
    can be steered, ValueError where vectors and graph do not fit.
    """
    model_path = Path(model_path)
    if output_path is None and not dry_run:
        raise ValueError("`output_path` is missing; give the file to write, or dry_run=True")
    bank = Bank(vectors, strength)
    if not bank.stacked and default_index != 0:
        raise ValueError("default_index is for a bank: give a list of vectors")
    if default_index is not None and not -1 <= default_index < len(bank.members):
        raise ValueError(
            f"default_index is {default_index}; expected -1 (no vector) to {len(bank.members) - 1}"
        )
    output = None if output_path is None or dry_run else Path(output_path)

    def steer(source: Path, target: Path | None) -> list[Injected]:
        model = load_graph(source)
        if is_steered(model):
            restore(model)
        sites = _sites(model, _chosen_blocks(bank, blocks), tensors or {}, source.parent)
        surgery = Surgery(model, bank, fuse)
        injected = [surgery.steer(site) for site in sites]
        if target is not None:
            surgery.apply(baked=baked, default_index=default_index)
            save_graph(model, source, target)
        return injected

    if not model_path.is_dir():
        return steer(model_path, output)
    if tensors:
        raise ValueError(f"`tensors` are of one graph, and '{model_path}' is a folder of graphs")
    found = edit_components(
        model_path, output, wanted=has_cache, kind="holds decoder blocks with a cache", edit=steer
    )
    return [replace(entry, graph=name) for name, entries in found.items() for entry in entries]


def remove_steering(model_path: str | Path, output_path: str | Path) -> None:
    """Writes a steered graph as it was before `inject`.

    Where nothing but the steering was changed since, it is equal to the original in every field.
    output_path may be model_path itself; both may be folders, as for `inject`.

    Raises GraphError where the graph is not steered, or where a tool that rewrote it dropped the
    record of what it was.
    """
    model_path, output = Path(model_path), Path(output_path)

    def unsteer(source: Path, target: Path | None) -> None:
        model = load_graph(source)
        restore(model)
        if target is not None:
            save_graph(model, source, target)

    if model_path.is_dir():
        edit_components(model_path, output, wanted=is_steered, kind="is steered", edit=unsteer)
    else:
        unsteer(model_path, output)


def _chosen_blocks(bank: Bank, blocks: Sequence[int] | None) -> list[int]:
    chosen = bank.blocks if blocks is None else sorted(set(blocks))
    if not chosen:
        raise ValueError("no block to steer: `blocks` is empty")
    lacking = [block for block in chosen if block not in bank.blocks]
    if lacking:
        raise ValueError(
            f"`blocks` names {lacking}, for which there is no direction; the vectors hold "
            f"blocks {bank.blocks}"
        )
    return chosen


def _sites(
    model: onnx.ModelProto, blocks: list[int], tensors: Mapping[int, str], folder: Path
) -> list[Site]:
    """The places to steer at, in the graph's order. Named tensors are taken at their word."""
    if unknown := sorted(set(tensors) - set(blocks)):
        raise ValueError(f"`tensors` names blocks {unknown}, but the blocks to steer are {blocks}")
    index = GraphIndex(model.graph)
    sites = {block: site_of(index, block, tensor) for block, tensor in tensors.items()}
    if set(blocks) - set(tensors):
        found = locate(model, n_blocks=blocks_in_config(folder))
        outside = [block for block in blocks if block not in tensors and block >= len(found)]
        if outside:
            raise ValueError(
                f"the vectors steer blocks {outside}, but the graph has blocks 0 to "
                f"{len(found) - 1}: they belong to another model, or pass `blocks`"
            )
        sites = {block: found[block] for block in blocks} | sites
    positions = [site.node for site in sites.values()]
    if twice := {p for p in positions if positions.count(p) > 1}:
        same = sorted(block for block, site in sites.items() if site.node in twice)
        raise GraphError(f"blocks {same} would be steered at one node: name another tensor")
    return [sites[block] for block in blocks]
