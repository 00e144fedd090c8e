"""Steering vectors in other tools' files: round trips, and files that those tools wrote."""

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grains_ext import SteeringVectors
from grains_ext.steering.formats import FORMATS, read_vectors, write_vectors
from grains_ext.steering.gate import Gate
from tests.models import N_BLOCKS, tiny_model

FOREIGN = Path(__file__).parent.parent / "build" / "formats"
SUFFIX = {"gguf": ".gguf", "svec": ".svec", "lm-eval": ".pt"}


def vectors(blocks: tuple[int, ...] = (1, 3), size: int = 8, **settings: Any) -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    return SteeringVectors(
        {block: torch.randn(size, generator=generator) for block in blocks},
        **{"normalize": False, "metadata": {"model_type": "llama"}, **settings},
    )


def foreign(tmp_path: Path, code: str) -> str:
    """Runs code with the other tools on the path, in the folder; returns what it printed."""
    if not (FOREIGN / "repeng").is_dir():
        pytest.skip("build/formats is not there: make test installs it")
    # repeng 0.4 asks for a numpy that still had float_.
    start = f"import sys, numpy; numpy.float_ = numpy.float64; sys.path.append({str(FOREIGN)!r})\n"
    script = start + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@given(
    st.dictionaries(st.integers(1, 40), st.floats(-4, 4, width=32), min_size=1, max_size=4),
    st.floats(-3, 3),
    st.sampled_from(sorted(SUFFIX)),
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_steers_the_same_when_read(
    tmp_path_factory: pytest.TempPathFactory,
    strengths: dict[int, float],
    strength: float,
    name: str,
) -> None:
    made = vectors(tuple(strengths), strength=strength, block_strengths=strengths)
    path = tmp_path_factory.mktemp("formats") / f"vectors{SUFFIX[name]}"
    write_vectors(made, path, name)
    read = read_vectors(path)
    assert read.normalize is False
    assert read.blocks == made.blocks
    for block in made.blocks:
        torch.testing.assert_close(
            read.strength * read.effective().directions[block],
            made.strength * made.effective().directions[block],
        )


def test_our_own_folder_is_the_format_of_names_without_a_suffix(tmp_path: Path) -> None:
    made = vectors(strength=2.0, normalize=True)
    write_vectors(made, tmp_path / "truthful")
    read = read_vectors(tmp_path / "truthful")
    assert (read.strength, read.normalize, read.blocks) == (2.0, True, made.blocks)


@pytest.mark.parametrize("name", sorted(SUFFIX))
def test_what_a_format_cannot_hold_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"vectors{SUFFIX[name]}"
    with pytest.warns(UserWarning, match="do not restore each token's norm"):
        write_vectors(vectors(normalize=True), path, name)
    gate = Gate(block=0, direction=torch.ones(8), threshold=0.0)
    with pytest.raises(ValueError, match="no gate"):
        write_vectors(vectors(gate=gate), path, name)


def test_gguf_refuses_block_0_and_shifts_layers(tmp_path: Path) -> None:
    made = vectors(blocks=(0, 1, 2))
    with pytest.raises(ValueError, match=r"block 0 cannot be written.*subset\(\[1, 2\]\)"):
        write_vectors(made, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []
    write_vectors(made, tmp_path / "v.gguf", layer_shift=-1)
    assert read_vectors(tmp_path / "v.gguf").blocks == [1, 2, 3]
    assert read_vectors(tmp_path / "v.gguf", layer_shift=-1).blocks == [0, 1, 2]
    with pytest.raises(ValueError, match=r"layer_shift=-2 makes block -1"):
        read_vectors(tmp_path / "v.gguf", layer_shift=-2)


def test_gguf_needs_a_model_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give model_type="):
        write_vectors(vectors(metadata={}), tmp_path / "v.gguf")
    write_vectors(vectors(metadata={}), tmp_path / "v.gguf", model_type="qwen3")
    assert read_vectors(tmp_path / "v.gguf").metadata["model_type"] == "qwen3"


def easysteer_file(path: Path, component: str | None) -> None:
    """The layout of EasySteer's StatisticalControlVector.export_gguf."""
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_string("controlvector.method", "diffmean")
    writer.add_uint32("controlvector.layer_count", 1)
    native = {"version": 1, "component": component, "metadata": None}
    writer.add_string("controlvector.easysteer", json.dumps(native))
    writer.add_tensor("direction.2", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_easysteer_says_what_its_directions_belong_to(tmp_path: Path) -> None:
    easysteer_file(tmp_path / "hidden.gguf", "hidden_states")
    read = read_vectors(tmp_path / "hidden.gguf")
    assert read.directions[2].tolist() == [0, 1, 2, 3]
    assert read.metadata["gguf"]["method"] == "diffmean"
    easysteer_file(tmp_path / "heads.gguf", "attention_heads")
    with pytest.raises(ValueError, match="belong to 'attention_heads'"):
        read_vectors(tmp_path / "heads.gguf")


def test_repeng_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    made = vectors(strength=0.5)
    write_vectors(made, tmp_path / "ours.gguf")
    foreign(
        tmp_path,
        """
        import numpy as np
        from repeng import ControlVector

        ours = ControlVector.import_gguf("ours.gguf")
        assert ours.model_type == "llama"
        ControlVector("mistral", {k: np.float32(2) * v for k, v in ours.directions.items()}) \\
            .export_gguf("theirs.gguf")
        """,
    )
    theirs = read_vectors(tmp_path / "theirs.gguf")
    assert theirs.metadata["model_type"] == "mistral"
    for block, direction in made.directions.items():
        torch.testing.assert_close(theirs.directions[block], direction)


def test_steering_vectors_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    made = vectors(blocks=(0, 2))
    made.save_pretrained(tmp_path / "ours")
    foreign(
        tmp_path,
        """
        import torch
        from steering_vectors import SteeringVector
        from grains_ext.steering.formats import read_vectors, write_vectors

        write_vectors(read_vectors("ours"), "ours.pt", "steering-vectors")
        ours = torch.load("ours.pt", weights_only=False)
        assert type(ours) is SteeringVector, ours
        doubled = {layer: 2 * v for layer, v in ours.layer_activations.items()}
        torch.save(SteeringVector(doubled), "theirs.pt")
        torch.save(SteeringVector(doubled, layer_type="mlp"), "mlp.pt")
        """,
    )
    # Without their package: a process that never saw it.
    theirs = read_vectors(tmp_path / "theirs.pt")
    for block, direction in made.directions.items():
        torch.testing.assert_close(theirs.directions[block], 2 * direction)
    with pytest.raises(ValueError, match="layer_type 'mlp'"):
        read_vectors(tmp_path / "mlp.pt")


def test_repeng_steers_a_model_as_ours_does(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    size = model.config.hidden_size
    made = vectors(blocks=tuple(range(1, N_BLOCKS)), size=size, strength=0.7)
    write_vectors(made, tmp_path / "v.gguf")
    foreign(
        tmp_path,
        """
        import torch
        from repeng import ControlModel, ControlVector
        from transformers import AutoModelForCausalLM

        vector = ControlVector.import_gguf("v.gguf")
        model = AutoModelForCausalLM.from_pretrained("model", attn_implementation="eager")
        model = ControlModel(model, sorted(vector.directions))
        model.set_control(vector, 1.0)
        logits = model(torch.tensor([[1, 2, 3, 4]])).logits
        torch.save(logits.detach(), "logits.pt")
        """,
    )
    with torch.no_grad():
        unsteered = model(torch.tensor([[1, 2, 3, 4]])).logits
        with made.applied(model):
            ours = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert (ours - unsteered).abs().max() > 1e-2
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def svec(tmp_path: Path, **changes: Any) -> Path:
    """The layout of SteeringVector.save in IBM's activation-steering."""
    data = {
        "model_type": "llama",
        "directions": {"0": [1.0, 2.0], "5": [[3.0, 4.0]]},
        "explained_variances": {"0": 0.5, "5": 0.25},
        **changes,
    }
    path = tmp_path / "refusal.svec"
    path.write_text(json.dumps(data))
    return path


def test_svec_directions_are_those_of_the_blocks(tmp_path: Path) -> None:
    read = read_vectors(svec(tmp_path))
    assert {block: v.tolist() for block, v in read.directions.items()} == {0: [1, 2], 5: [3, 4]}
    write_vectors(read, tmp_path / "again.svec")
    again = json.loads((tmp_path / "again.svec").read_text())
    assert again["explained_variances"] == {"0": 0.5, "5": 0.25}
    assert again["model_type"] == "llama"


def hostile_pickle(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (path.with_name("owned"),))

    torch.save({"layers.1": {"steering_vector": Evil()}}, path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    hostile_pickle(tmp_path / "evil.pt")
    for name in (None, "lm-eval", "steering-vectors"):
        with pytest.raises(ValueError, match="weights_only"):
            read_vectors(tmp_path / "evil.pt", name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "clamp"}, "action='clamp'"),
        ({"head_index": 3}, "head_index=3"),
        ({"steering_vector": [1.0]}, "no tensor"),
        ({"steering_vector": torch.ones(2, 4)}, r"'layers.1': a direction is \[2, 4\]"),
        ({"steering_vector": torch.ones(4).to_sparse()}, "sparse_coo"),
        # Four bytes in the file, 40 GB in memory.
        ({"steering_vector": torch.ones(1).expand(10**10)}, r"a direction is \[10000000000\]"),
        ({"steering_vector": torch.ones(4, dtype=torch.int64)}, r"v\.pt: the direction of block 1"),
        ({"steering_coefficient": None}, "'layers.1': float"),
    ],
)
def test_lm_eval_steering_that_is_no_addition_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    entry = {"steering_vector": torch.ones(4), "steering_coefficient": 2.0, "action": "add"}
    torch.save({"layers.1": {**entry, **change}}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "v.pt", "lm-eval")
    torch.save({"layers.1.mlp": entry}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"'layers.1.mlp' is no decoder block"):
        read_vectors(tmp_path / "v.pt")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_lm_eval_hookpoints_are_modules_of_the_base_model(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    made = vectors(
        blocks=(0, 1),
        size=model.config.hidden_size,
        metadata={"model_type": model.config.model_type},
    )
    write_vectors(made, tmp_path / "v.pt", "lm-eval")
    names = dict(model.base_model.named_modules())
    assert set(torch.load(tmp_path / "v.pt", weights_only=True)) <= set(names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.gguf", b"GGUF", "not a valid GGUF"),
        ("v.svec", b"{}", "not a .svec"),
        ("v.svec", b'{"model_type": "x", "directions": {"a": [1]}}', "not a .svec"),
        ("v.svec", b'{"model_type": "x", "directions": {"03": [1]}}', "'03' is no layer"),
        (
            "v.svec",
            b'{"model_type": "x", "directions": {"3": [NaN]}}',
            r"v\.svec: the direction of",
        ),
        ("v.svec", b'{"directions": {"3": [1' + b"0" * 400 + b"]}}", "not a .svec"),
        ("v.svec", b"[" * 100_000, "not a .svec"),
        ("v.pt", b"no", "weights_only"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / name)


def test_gguf_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    """The package would count to a million million, and keep a part for each."""
    pytest.importorskip("gguf")
    of_integers = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")
    array = of_integers + (4).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    (tmp_path / "v.gguf").write_bytes(header + array)
    with pytest.raises(ValueError, match="not a valid GGUF file: it ends before byte"):
        read_vectors(tmp_path / "v.gguf")


def test_svec_variances_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    text = '{"model_type": "x", "directions": {"1": [1]}, "explained_variances": {"1": NaN}}'
    (tmp_path / "v.svec").write_text(text)
    found = read_vectors(tmp_path / "v.svec")
    found.save_pretrained(tmp_path / "ours")
    assert found.metadata["explained_variances"] == {}


def test_what_is_not_there_or_not_clear_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*v\.gguf"):
        read_vectors(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match="say which format"):
        write_vectors(vectors(), tmp_path / "v.pt")
    with pytest.raises(ValueError, match="format must be one of grains, "):
        write_vectors(vectors(), tmp_path / "v.pt", "onnx")
    with pytest.raises(ValueError, match="takes no layer_shift"):
        write_vectors(vectors(), tmp_path / "folder", layer_shift=1)
    with pytest.raises(ValueError, match="svec takes no layer_shift"):
        write_vectors(vectors(), tmp_path / "v.svec", layer_shift=1)


def test_no_warning_where_nothing_is_lost(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, suffix in SUFFIX.items():
            write_vectors(vectors(), tmp_path / f"v{suffix}", name)
    assert set(SUFFIX) < set(FORMATS)
