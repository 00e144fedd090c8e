"""Steering vectors as files: steering.safetensors and steering_config.json, and a model card."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grains_ext.steering.gate import Gate

if TYPE_CHECKING:
    from grains_ext.steering.vectors import SteeringVectors

WEIGHTS_NAME = "steering.safetensors"
CONFIG_NAME = "steering_config.json"
CARD_NAME = "README.md"
FORMAT_VERSION = 2
"""1 had no block_strengths, normalize and gate."""

_KEY = re.compile(r"layers\.(0|[1-9]\d{0,5})\.direction")
_BLOCK = re.compile(r"0|[1-9]\d{0,5}")
_GATE_TENSORS = ("gate.direction", "gate.center")
_Kinds = dict[str, type | tuple[type, ...]]
_FIELDS: _Kinds = {
    "blocks": list,
    "hidden_size": int,
    "strength": (int, float),
    "eps": (int, float),
    "metadata": dict,
}
_FIELDS_2: _Kinds = {
    "block_strengths": (dict, type(None)),
    "normalize": bool,
    "gate": (dict, type(None)),
}
_GATE_FIELDS: _Kinds = {
    "block": int,
    "threshold": (int, float),
    "kind": str,
    "when": str,
    "metadata": dict,
}


def save(vectors: "SteeringVectors", folder: Path) -> None:
    """Writes both files, each in one step (a rename).

    Raises TypeError or ValueError where the metadata holds something that JSON cannot.
    """
    gate = vectors.gate
    strengths = vectors.block_strengths
    config = {
        "format_version": FORMAT_VERSION,
        "blocks": vectors.blocks,
        "hidden_size": vectors.hidden_size,
        "strength": vectors.strength,
        "eps": vectors.eps,
        # JSON's keys are strings.
        "block_strengths": None
        if strengths is None
        else {str(block): a for block, a in strengths.items()},
        "normalize": vectors.normalize,
        "gate": gate and {name: getattr(gate, name) for name in _GATE_FIELDS},
        "metadata": vectors.metadata,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    tensors = {f"layers.{block}.direction": v for block, v in vectors.directions.items()}
    if gate is not None:
        assert gate.center is not None  # filled in by Gate itself
        tensors |= dict(zip(_GATE_TENSORS, (gate.direction, gate.center), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch, WEIGHTS_NAME), metadata={"format": "pt"})
        Path(scratch, CONFIG_NAME).write_text(text, encoding="utf-8")
        # safetensors makes files for their owner alone, and vectors are there to be served.
        shutil.copymode(Path(scratch, CONFIG_NAME), Path(scratch, WEIGHTS_NAME))
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(scratch, name), folder / name)


def load(source: str | Path, revision: str | None) -> dict[str, Any]:
    """The arguments of SteeringVectors, from a folder or, where there is none, a hub id.

    Raises FileNotFoundError where the files are not there, ValueError where they are not right.
    """
    folder = _local_folder(source, revision)
    config = _read_config(folder / CONFIG_NAME)
    directions, gate_tensors = _read_tensors(folder / WEIGHTS_NAME)
    if sorted(directions) != sorted(config["blocks"]):
        raise ValueError(
            f"{folder}: {CONFIG_NAME} lists blocks {config['blocks']}, {WEIGHTS_NAME} holds "
            f"{sorted(directions)}"
        )
    sizes = {len(v) for v in (*directions.values(), *gate_tensors.values()) if v.ndim == 1}
    if sizes != {config["hidden_size"]}:
        raise ValueError(
            f"{folder}: {CONFIG_NAME} says hidden_size {config['hidden_size']}, the tensors of "
            f"{WEIGHTS_NAME} have {sorted(sizes)} values"
        )
    return {
        "directions": directions,
        "strength": config["strength"],
        "eps": config["eps"],
        "metadata": config["metadata"],
        "block_strengths": _block_strengths(config.get("block_strengths"), folder),
        "normalize": config.get("normalize", True),
        "gate": _gate(config.get("gate"), gate_tensors, folder),
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {path.parent}: not a folder of vectors")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"{path}: format_version is {version!r}, this version of grains_ext reads 1 to "
            f"{FORMAT_VERSION}: update grains_ext or save the vectors again"
        )
    expected = _FIELDS | (_FIELDS_2 if version == FORMAT_VERSION else {})
    _check_fields(config, {"format_version": int} | expected, str(path))
    if not all(type(block) is int for block in config["blocks"]):
        raise ValueError(f"{path}: `blocks` must be whole numbers, got {config['blocks']}")
    return dict(config)


def _check_fields(config: dict[str, Any], expected: _Kinds, where: str) -> None:
    if unknown := sorted(set(config) - set(expected)):
        # One that is not understood might turn the steering off, or around.
        raise ValueError(f"{where}: unknown entries {unknown}; expected {list(expected)}")
    for name, kind in expected.items():
        value = config.get(name)
        boolean = isinstance(value, bool) and kind is not bool
        if name not in config or not isinstance(value, kind) or boolean:
            raise ValueError(f"{where}: `{name}` is missing or wrong, got {value!r}")


def _block_strengths(given: dict[str, Any] | None, folder: Path) -> dict[int, float] | None:
    if given is None:
        return None
    if bad := [name for name in given if not _BLOCK.fullmatch(name)]:
        raise ValueError(f"{folder}: `block_strengths` has keys that are no block: {bad}")
    return {int(name): strength for name, strength in given.items()}


def _gate(config: dict[str, Any] | None, tensors: dict[str, Tensor], folder: Path) -> Gate | None:
    if sorted(tensors) != (sorted(_GATE_TENSORS) if config is not None else []):
        raise ValueError(
            f"{folder}: {CONFIG_NAME} {'has a' if config is not None else 'has no'} gate, "
            f"{WEIGHTS_NAME} holds {sorted(tensors) or 'no tensor of one'}"
        )
    if config is None:
        return None
    _check_fields(config, _GATE_FIELDS, f"{folder / CONFIG_NAME}, gate")
    direction, center = (tensors[name] for name in _GATE_TENSORS)
    try:
        return Gate(direction=direction, center=center, **config)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_tensors(path: Path) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """(the directions by block, the gate's tensors by name)."""
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path.parent}: not a folder of vectors")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    directions, gate = {}, {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if (match is None and key not in _GATE_TENSORS) or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path}: expected float32 tensors named layers.<block>.direction (and "
                f"{', '.join(_GATE_TENSORS)}), got {key!r} of {tensor.dtype}"
            )
        if match is None:
            gate[key] = tensor
        else:
            directions[int(match[1])] = tensor
    return directions, gate


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


# --- the hub --------------------------------------------------------------------------------------

_CARD = """---
library_name: grains_ext
tags:
- steering-vectors
- activation-steering
{base_model}---

# {title}

{count} for {model}, to be added to the outputs of its decoder blocks at inference. No
weight is changed. Made with [grains_ext](https://arxiv.org/abs/2507.18043).

```python
import grains_ext as grains

vectors = grains.SteeringVectors.from_pretrained("{repo_id}")
with vectors.applied(model):
    model.generate(**inputs)
```

| | |
| --- | --- |
{rows}

## How they were made

```json
{metadata}
```
"""


def push(
    vectors: "SteeringVectors",
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Uploads both files and a model card; returns the address of the commit."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(vectors, folder)
        (folder / CARD_NAME).write_text(model_card(vectors, repo_id), encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def model_card(vectors: "SteeringVectors", repo_id: str) -> str:
    """README.md of a repository with these vectors, in Markdown with the hub's YAML header."""
    base = vectors.metadata.get("base_model")
    # A model that was trained here has a path for its name: it means nothing to others.
    base = base if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    gate = vectors.gate
    rows = {
        "blocks": ", ".join(map(str, vectors.blocks)),
        "hidden size": str(vectors.hidden_size),
        "strength": f"{vectors.strength:g}",
        "block strengths": ", ".join(
            f"{block}: {a:g}" for block, a in (vectors.block_strengths or {}).items()
        ),
        "token norms": "restored" if vectors.normalize else "not restored (plain addition)",
        "gate": "" if gate is None else f"{gate.kind} at block {gate.block}, per {gate.when}",
    }
    metadata = json.dumps(vectors.metadata, indent=2, ensure_ascii=False, allow_nan=False)
    return _CARD.format(
        base_model=f"base_model: {base}\n" if base else "",
        title=repo_id.rpartition("/")[2],
        count=f"{len(vectors.blocks)} steering vectors"
        if len(vectors.blocks) > 1
        else "A steering vector",
        model=f"[{base}](https://huggingface.co/{base})" if base else "a language model",
        repo_id=repo_id,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
        # A fence inside a note must not end ours.
        metadata=metadata.replace("```", "'''"),
    )
