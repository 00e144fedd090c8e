"""A folder in which the documentation's examples run: the files that they name, made small."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from grains_ext import PreferencePair, attribute, cli, load_pairs, save_pairs
from tests.exports import exported_llama, random_vectors
from tests.models import tiny_model, tiny_tokenizer
from tests.vision_models import tiny_vlm

ROOT = Path(__file__).parent.parent
# Pages on graphs: they share one trace, in a process of their own.
GRAPH_PAGES = ("README.md", "docs/attribution-onnx.md", "docs/export.md", "docs/onnx.md")
GRAPH_PAGES += ("docs/tour.md",)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
_TITLE = re.compile(r'title="([^"]+)"')
_NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")
# What shows how to install, build or measure the package cannot run inside its own tests.
_OUTSIDE = (
    "make",
    "pip",
    "python",
    "cmake",
    "g++",
    "jq",
    "bash",
    "docker",
    "git",
    "tritonserver",
    "grains-lm-eval",
)


@dataclass(frozen=True)
class Block:
    """One fenced example. line: where it starts in its page."""

    language: str
    code: str
    line: int
    not_run: str | None
    """Why not, where the page says so in a comment above it: <!-- not run: reason -->."""
    title: str | None = None
    """The name of the file that the reader is to make of it: ```json title="pairs.jsonl"."""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        indent, language, attributes, code = match.groups()
        title = _TITLE.search(attributes)
        reason = _NOT_RUN.search(text[: match.start()])
        yield Block(
            language,
            re.sub(f"^{indent}", "", code, flags=re.M),
            text.count("\n", 0, match.start()) + 1,
            reason and reason[1],
            title and title[1],
        )


def pages() -> list[str]:
    """Every page that has an example to run."""
    found = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    return sorted(
        str(page.relative_to(ROOT))
        for page in found
        if any(block.language in ("python", "bash") for block in blocks(page))
    )


def run_page(page: str) -> None:
    """Runs a page's examples in this folder, in the order in which they stand."""
    namespace = names(page)
    for block in blocks(ROOT / page):
        if block.not_run is not None:
            continue
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_python(block.code, namespace, ROOT / page, block.line)
        elif block.language == "bash":
            run_bash(block.code)
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "json":
            json.loads(block.code)


def furnish(folder: Path) -> None:
    """Models, pairs, texts and vectors under the names that the pages use."""
    model = tiny_model("llama", max_position_embeddings=512)
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for name in ("path/or/hub-id", "model"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    seeing, processor = tiny_vlm("llava")
    seeing.save_pretrained(folder / "path/or/vlm-id")
    processor.save_pretrained(folder / "path/or/vlm-id")
    Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(
        folder / "street.jpg"
    )
    things = ("sky", "sea", "grass", "rose", "home", "study", "grandma", "rumour")
    for name, start in (
        ("pairs", "what color is the"),
        ("dev", "the color of the"),
        ("test", "a study shows the"),
    ):
        pairs = [
            PreferencePair(f"{start} {thing}", "blue", "green", id=f"{name}-{i}")
            for i, thing in enumerate(things)
        ]
        save_pairs(pairs, folder / f"{name}.jsonl")
    (folder / "neutral.txt").write_text("the sky is blue\nthe grass is green\n")
    for seed, name in enumerate(("truthful", "terse", "faithful", "tuned")):
        random_vectors(strength=0.5 + seed / 10).save_pretrained(folder / name)
    with chdir(folder):  # results know the name by which their model was loaded
        named = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
        attribute(named, tokenizer, load_pairs("pairs.jsonl"), output_dir="results")


def furnish_graphs(folder: Path) -> None:
    """The unsteered graph of the pages' model, as a file and as another tool's folder."""
    exported = exported_llama().folder
    shutil.copy2(exported / "model_unsteered.onnx", folder / "model.onnx")
    shutil.copy2(exported / "model.onnx.data", folder)
    (folder / "exported").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy2(folder / name, folder / "exported")


def names(page: str) -> dict[str, Any]:
    """What a page's examples take as given; imports that a reader has made by then."""
    import onnxruntime

    import grains_ext

    if page == "README.md":
        return {}
    model = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    if page == "docs/attribution-onnx.md":  # one whose gradient the tests have traced
        model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=512)
    given = {
        "grains": grains_ext,
        "np": np,
        "torch": torch,
        "onnxruntime": onnxruntime,
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained("path/or/hub-id"),
        "pairs": grains_ext.load_pairs("pairs.jsonl"),
        "dev_pairs": grains_ext.load_pairs("dev.jsonl"),
        "test_pairs": grains_ext.load_pairs("test.jsonl"),
        "vectors": grains_ext.SteeringVectors.from_pretrained("truthful"),
    }
    if page == "docs/onnx.md":
        given["feeds"] = graph_inputs(Path("model.onnx"), rows=3)
    return given


def graph_inputs(graph: Path, *, rows: int, n_tokens: int = 4) -> dict[str, np.ndarray]:
    """A prompt of ones with empty caches, as an exported decoder takes them."""
    import onnxruntime

    feeds = {}
    for value in onnxruntime.InferenceSession(graph).get_inputs():
        if value.name.startswith("past_key_values."):
            _, heads, _, size = value.shape
            feeds[value.name] = np.zeros((rows, heads, 0, size), np.float32)
        elif value.name == "position_ids":
            feeds[value.name] = np.tile(np.arange(n_tokens), (rows, 1))
        else:
            feeds[value.name] = np.ones((rows, n_tokens), np.int64)
    return feeds


def run_bash(code: str) -> None:
    """Runs the `grains` lines; others must be of the tools that the tests leave alone."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in _OUTSIDE:
            continue
        assert words[0] == "grains", f"what is this line to do in the tests? {line}"
        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def run_python(code: str, namespace: dict[str, Any], page: Path, line: int) -> None:
    """Runs code with the page's own line numbers in a traceback."""
    exec(compile("\n" * line + code, str(page), "exec"), namespace)
