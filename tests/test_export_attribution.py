"""Attribution as an ONNX graph: what the torch engine computes, from onnxruntime alone."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM

from grains_ext import PreferencePair, save_pairs
from grains_ext.attribution import Attribution, attribute, load_attributions
from grains_ext.attribution.rules import quadrature
from grains_ext.export import AttributionGraph, ExportError, GraphError, export_attribution
from grains_ext.export.attribution_graph import INPUTS, OUTPUTS
from tests.exports import gradient_traced_once
from tests.models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.onnx_models import node_model

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
# A window that the longer pairs leave, in every second block.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "gpt2": {"num_hidden_layers": 1},
    "qwen2": {"num_hidden_layers": 1},
    "gemma2": {"num_hidden_layers": 2, "sliding_window": 8},
}
HALF = "gpt2"
"""Exported from half precision, with its weights in a file of their own."""
PAIRS = [
    PreferencePair(prompt="the sky is what color", chosen="blue", rejected="a truth", id="sky"),
    PreferencePair(prompt="q", chosen="red sky", rejected="red sea"),
    PreferencePair(prompt="grandma says the sea is a lie", chosen="of rome", rejected="the home"),
    PreferencePair(
        prompt="what is the color of grass, note: a rumour study shows",
        chosen="green",
        rejected="b",
    ),
]

slow = pytest.mark.slow  # an export takes some ten seconds
# Few steps are enough to compare by, and not to converge.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not converge")


@functools.cache
def tiny(family: str) -> Any:
    model = tiny_model(family, **CONFIGURATIONS[family])
    # What float32 computes from the rounded weights.
    return model.bfloat16().float() if family == HALF else model


@functools.cache
def half() -> Any:
    return copy.deepcopy(tiny(HALF)).bfloat16()


@functools.cache
def graph_file(family: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="grains-test-attribution-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "new" / "attribution.onnx"
    model = half() if family == HALF else tiny(family)
    options: dict[str, Any] = {"external_data": True, "n_steps": 5} if family == HALF else {}
    with gradient_traced_once():
        export_attribution(model, tiny_tokenizer(chat_template=TEMPLATE), path, **options)
    return path


@functools.cache
def graph_of(family: str, *, library: bool = True) -> AttributionGraph:
    return AttributionGraph(graph_file(family), library=library, providers=["CPUExecutionProvider"])


def by_torch(family: str, pairs: Sequence[PreferencePair] = PAIRS, **options: Any) -> Any:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    return attribute(tiny(family), tokenizer, pairs, progress=False, **options)


def assert_same(found: Sequence[Attribution], expected: Sequence[Attribution]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5, rtol=1e-5)
        for name in ("f_input", "f_baseline", "residual"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5, rel=1e-5)
        numbers = {"scores", "f_input", "f_baseline", "residual"}
        assert {name: v for name, v in vars(one).items() if name not in numbers} == {
            name: v for name, v in vars(other).items() if name not in numbers
        }


@slow
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_a_graph_gives_what_the_torch_engine_gives(family: str, library: bool) -> None:
    graph = graph_of(family, library=library)
    for options in (
        {"method": "gausslegendre", "n_steps": 7},
        {"method": "riemann_middle", "n_steps": 20, "baseline": "mean", "objective": "mean"},
        {"method": "gausslegendre", "n_steps": 1, "baseline": "pad", "objective": "rejected"},
    ):
        found = graph.attribute(PAIRS, progress=False, **options)
        assert_same(found, by_torch(family, **options))


@slow
def test_a_graph_takes_what_it_was_written_with_where_it_is_told_nothing() -> None:
    found = graph_of("llama").attribute(PAIRS[:1], progress=False)
    assert_same(found, by_torch("llama", PAIRS[:1], method="gausslegendre", n_steps=50))


@slow
def test_results_do_not_depend_on_how_points_are_shared_out_to_runs() -> None:
    graph = graph_of("llama")
    whole = graph.attribute(PAIRS, n_steps=6, progress=False, max_batch_tokens=100_000)
    pieces = graph.attribute(PAIRS, n_steps=6, progress=False, max_batch_tokens=1)
    for one, other in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        assert other.evaluations == 6 + 2
        assert one.evaluations == 6 * (1 + 2)  # both ends come with every run


@slow
@pytest.mark.parametrize("baseline", ["zero", "embedding"])
def test_an_embedding_can_be_the_baseline(baseline: str) -> None:
    size = tiny("gpt2").config.hidden_size
    tensor = torch.zeros(size) if baseline == "zero" else torch.linspace(-1, 1, size)
    asked = "zero" if baseline == "zero" else tensor.numpy()
    options: dict[str, Any] = {"method": "gausslegendre", "n_steps": 5}
    found = graph_of("gpt2").attribute(PAIRS, baseline=asked, progress=False, **options)
    expected = by_torch("gpt2", baseline="zero" if baseline == "zero" else tensor, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@slow
def test_messages_and_spans_are_split_as_by_the_torch_engine() -> None:
    messages = [
        {"role": "system", "content": "the truth"},
        {"role": "user", "content": "what color is the sky"},
    ]
    begun = [*messages, {"role": "assistant", "content": "the sky is "}]
    pairs = [
        PreferencePair(prompt=prompt, chosen="blue", rejected="green")
        for prompt in (messages, begun)
    ]
    options: dict[str, Any] = {"method": "gausslegendre", "n_steps": 4}
    for span in ("after_system", (2, -1)):
        found = graph_of("llama").attribute(pairs, attributed_span=span, progress=False, **options)
        assert_same(found, by_torch("llama", pairs, attributed_span=span, **options))
        assert not found[0].scores[:2].any()


@slow
def test_results_stream_to_a_directory_and_go_on(tmp_path: Path) -> None:
    graph, options = graph_of("llama"), {"n_steps": 3, "progress": False, "tolerance": 1e-6}
    with pytest.warns(UserWarning, match="2 of 2 pairs did not converge"):
        graph.attribute(PAIRS, output_dir=tmp_path / "results", limit=2, **options)
    with pytest.warns(UserWarning, match="4 of 4 pairs did not converge"):
        results = graph.attribute(PAIRS, output_dir=tmp_path / "results", **options)
    loaded = load_attributions(tmp_path / "results")
    assert_same(loaded, results)
    assert [one.pair_id for one in loaded] == ["sky", None, None, None]
    assert not loaded[0].converged
    assert graph.attribute(PAIRS[:1], n_steps=3, tolerance=100, progress=False)[0].converged
    with pytest.raises(ValueError, match="n_steps is 3 there and 4 here"):
        graph.attribute(PAIRS, output_dir=tmp_path / "results", **{**options, "n_steps": 4})


@slow
def test_the_graph_alone_gives_scores_ends_and_residual() -> None:
    """As a program in another language would call it: one pair by hand, two steps."""
    session = graph_of("llama").session
    nodes, weights = quadrature("gausslegendre", 2)
    prompt, chosen, rejected = [1, 101, 102, 103], [110, 111], [112, 113]
    ids = [*prompt, chosen[0], rejected[0]]
    feeds = {
        "input_ids": np.array([ids]),
        "branch_ids": np.array([[0, 0, 0, 0, 1, 2]]),
        "baseline_ids": np.array([[1, 1, 1, 1, *ids[4:]]]),
        "target_columns": np.array([[3, 4, 3, 5]]),
        "target_tokens": np.array([[*chosen, *rejected]]),
        "target_weights": np.array([[1, 1, -1, -1]], np.float32),
        "nodes": nodes.astype(np.float32),
        "weights": weights.astype(np.float32),
    }
    scores, f_input, f_baseline, residual = session.run(list(OUTPUTS), feeds)
    model = tiny("llama")

    def log_p(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return sum(logits[p, t].item() for p, t in zip(places, answer, strict=True))

    for value, head in ((f_input, prompt), (f_baseline, [1, 1, 1, 1])):
        assert value[0] == pytest.approx(log_p(head, chosen) - log_p(head, rejected), abs=1e-4)
    assert scores.shape == (1, 6)
    assert not scores[0, [0, 4, 5]].any()  # BOS stays BOS, and answers are not attributed
    assert residual[0] == pytest.approx(scores.sum() - (f_input - f_baseline)[0], abs=1e-5)


@slow
def test_the_file_says_what_it_is() -> None:
    model = onnx.load(graph_file("llama"))
    assert [value.name for value in model.graph.input] == list(INPUTS)
    assert [value.name for value in model.graph.output] == list(OUTPUTS)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == shapes["scores"] == ["batch", "length"]
    assert shapes["target_weights"] == ["batch", "targets"]
    assert shapes["nodes"] == shapes["weights"] == ["steps"]
    assert {node.op_type for node in model.graph.node if node.domain == "grains"} == {
        "IgInterpolate",
        "IgAccumulate",
    }
    assert {function.name for function in model.functions} == {"IgInterpolate", "IgAccumulate"}


@slow
def test_the_model_is_as_it_was_and_nothing_is_left_beside_the_graph() -> None:
    model = tiny("llama")
    assert [entry.name for entry in graph_file("llama").parent.iterdir()] == ["attribution.onnx"]
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


@slow
def test_a_model_in_half_precision_and_weights_in_a_file_of_their_own() -> None:
    names = sorted(entry.name for entry in graph_file(HALF).parent.iterdir())
    assert names == ["attribution.onnx", "attribution.onnx.data"]
    assert half().dtype == torch.bfloat16
    found = graph_of(HALF).attribute(PAIRS, progress=False)
    assert_same(found, by_torch(HALF, method="gausslegendre", n_steps=5))


# --- without torch --------------------------------------------------------------------------------

ABSENT = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "scipy", "jinja2", "PIL")
HOOK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is kept away here", name=name)

sys.meta_path.insert(0, Absent())
"""


def grains_without_torch(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process where those packages cannot be imported."""
    hook = folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "grains_ext", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@slow
def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    save_pairs(PAIRS, tmp_path / "pairs.jsonl")
    result = grains_without_torch(
        tmp_path,
        *("attribute", graph_file("llama"), "pairs.jsonl", "-o", "results", "--json"),
        *("--n-steps", 7, "--tolerance", 50),
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["not_converged"]) == (len(PAIRS), 0)
    assert_same(
        load_attributions(tmp_path / "results"),
        by_torch("llama", method="gausslegendre", n_steps=7, tolerance=50),
    )
    # The hook does its work: a model folder needs torch.
    refused = grains_without_torch(tmp_path, "attribute", "model", "pairs.jsonl", "-o", "other")
    assert refused.returncode == 1
    assert "kept away here" in refused.stderr


@slow
def test_the_command_refuses_what_a_graph_cannot_do(tmp_path: Path) -> None:
    save_pairs(PAIRS, tmp_path / "pairs.jsonl")
    command = ("attribute", graph_file("llama"), "pairs.jsonl", "-o", "results")
    result = grains_without_torch(tmp_path, *command, "--method", "adaptive")
    assert result.returncode == 1
    assert "gausslegendre, riemann_middle for a graph" in " ".join(result.stderr.split())
    result = grains_without_torch(tmp_path, *command, "--device", "cuda")
    assert result.returncode == 2
    assert "--device" in result.stderr
    assert not (tmp_path / "results").exists()


# --- bad input ------------------------------------------------------------------------------------


def small_bert() -> Any:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
        )
    )


def small_bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (small_bert, "'bert' cannot be exported: BertForMaskedLM is no decoder"),
        (small_bloom, "'bloom' cannot be exported: they take no position_ids"),
    ],
)
def test_models_that_cannot_be_exported(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_attribution(make(), tiny_tokenizer(), tmp_path / "attribution.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_reads_a_row_in_its_own_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    original = model.model.forward

    def without_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        plain = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        return original(*args, attention_mask=plain, **kwargs)

    monkeypatch.setattr(model.model, "forward", without_mask)
    with pytest.raises(ExportError, match="does not read a mask and positions of ours"):
        export_attribution(model, tiny_tokenizer(), tmp_path / "attribution.onnx")
    assert not list(tmp_path.iterdir())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adaptive"}, "gausslegendre, riemann_middle, got 'adaptive'"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"baseline": "eos"}, "baseline must be one of bos, mean"),
        ({"opset": 17}, "opset is 17"),
    ],
)
def test_wrong_settings_of_an_export(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        export_attribution(model, tiny_tokenizer(), tmp_path / "attribution.onnx", **options)


def test_a_tokenizer_without_a_file(tmp_path: Path) -> None:
    class Slow:
        chat_template = None

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        export_attribution(tiny("llama"), Slow(), tmp_path / "attribution.onnx")


def test_other_graphs_are_refused_with_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    onnx.save(node_model("IgInterpolate", ["input", "baseline", "alphas"]), path)
    with pytest.raises(
        GraphError, match="lacks the inputs input_ids, branch_ids, baseline_ids"
    ) as e:
        AttributionGraph(path)
    assert "it has alphas, baseline, input" in str(e.value)
    path.write_bytes(b"no graph at all")
    with pytest.raises(GraphError, match=r"onnxruntime cannot load '.*other.onnx'"):
        AttributionGraph(path)
    with pytest.raises(FileNotFoundError, match="no model file"):
        AttributionGraph(tmp_path / "none.onnx")


@slow
def test_a_graph_whose_metadata_is_gone_or_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "changed.onnx"
    model = onnx.load(graph_file("llama"))
    [entry] = [entry for entry in model.metadata_props if entry.key == "grains.attribution"]
    entry.value = json.dumps({"model": "x"})
    onnx.save(model, path)
    with pytest.raises(
        GraphError, match=r"settings in .* cannot be read: it is of another version"
    ):
        AttributionGraph(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(
        GraphError, match=r"lacks the metadata entries grains.attribution, grains.tok"
    ):
        AttributionGraph(path)


@slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "smoothgrad"}, "for a graph, got 'smoothgrad'"),
        ({"objective": "last"}, "objective must be one of"),
        ({"n_steps": 0}, "n_steps must be 'auto' or an integer of at least 1, got 0"),
        ({"max_batch_tokens": True}, "max_batch_tokens must be 'auto' or an integer"),
        ({"tolerance": 0}, "tolerance must be a positive number"),
        ({"baseline": "mask"}, "the tokenizer has no such token"),
        ({"baseline": "cls"}, "baseline must be one of bos, mean"),
        ({"baseline": np.zeros(3)}, r"must have shape \[32\], got \[3\]"),
        ({"attributed_span": (90, 99)}, r"pair 0 \(id 'sky'\): attributed_span \(90, 99\) holds"),
        ({"shard": (3, 2)}, "shard must be"),
    ],
)
def test_wrong_settings_of_a_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_of("llama").attribute(PAIRS, progress=False, **options)


@slow
def test_pairs_that_a_graph_cannot_read() -> None:
    for pair, message in (
        (PreferencePair("q", "a", "b", images=("x.png",)), "pair 0: it has images, and a graph"),
        (PreferencePair("the " * 140, "a", "b"), "pair 0: prompt and continuation have .* tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            graph_of("llama").attribute([pair], progress=False)
