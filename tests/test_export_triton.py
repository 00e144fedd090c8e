"""The model that is written for Triton, read with the part of Triton's own schema that it uses."""

from __future__ import annotations

import filecmp
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from grains_ext import export
from tests.exports import exported_llama, exported_vlm

Field = descriptor_pb2.FieldDescriptorProto


def _config_class() -> Any:
    """model_config.proto of triton-inference-server/common, as far as it is used."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(
        ("TYPE_INVALID", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_BOOL")
    ):
        types.value.add(name=name, number=number)
    tensor = file.message_type.add(name="Tensor")
    tensor.field.add(name="name", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL)
    tensor.field.add(
        name="data_type", number=2, type=Field.TYPE_ENUM, label=Field.LABEL_OPTIONAL,
        type_name=".inference.DataType",
    )  # fmt: skip
    tensor.field.add(name="dims", number=4, type=Field.TYPE_INT64, label=Field.LABEL_REPEATED)
    operations = file.message_type.add(name="ModelOperations")
    operations.field.add(
        name="op_library_filename", number=1, type=Field.TYPE_STRING, label=Field.LABEL_REPEATED
    )
    config = file.message_type.add(name="ModelConfig")
    for number, name, kind in ((1, "name", "STRING"), (17, "backend", "STRING"),
                               (4, "max_batch_size", "INT32")):  # fmt: skip
        config.field.add(
            name=name, number=number, type=getattr(Field, f"TYPE_{kind}"),
            label=Field.LABEL_OPTIONAL,
        )  # fmt: skip
    for number, name, kind in ((5, "input", "Tensor"), (6, "output", "Tensor"),
                               (18, "model_operations", "ModelOperations")):  # fmt: skip
        label = Field.LABEL_OPTIONAL if kind == "ModelOperations" else Field.LABEL_REPEATED
        config.field.add(
            name=name, number=number, type=Field.TYPE_MESSAGE, label=label,
            type_name=f".inference.{kind}",
        )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), _config_class()())


def test_the_configuration_names_library_and_tensors(tmp_path: Path) -> None:
    exported = exported_llama()
    folder = export.write_triton(exported.folder, tmp_path / "models", name="truthful-1.0")
    assert folder == tmp_path / "models" / "truthful-1.0"
    config = read_config(folder)
    assert (config.name, config.backend, config.max_batch_size) == (
        "truthful-1.0",
        "onnxruntime",
        0,
    )
    [library] = config.model_operations.op_library_filename
    assert library == str(folder / "1" / "libgrains_ort.so")
    served(folder)


def served(folder: Path) -> onnxruntime.InferenceSession:
    """What Triton's backend does with a model: the session, its tensors by name, type and rank."""
    config = read_config(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for library in config.model_operations.op_library_filename:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options)
    types = {"tensor(int64)": 1, "tensor(float16)": 2, "tensor(float)": 3, "tensor(bool)": 4}
    for given, found in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [(t.name, t.data_type, list(t.dims)) for t in given] == [
            (v.name, types[v.type], [d if isinstance(d, int) else -1 for d in v.shape])
            for v in found
        ]
    return session


def test_a_model_that_reads_images_is_three_models(tmp_path: Path) -> None:
    exported = exported_vlm("llava")
    folder = export.write_triton(exported.folder, tmp_path, name="vlm")
    names = ("vlm", "vlm_embedding", "vlm_vision")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names)
    decoder, embedding, vision = (served(tmp_path / name) for name in names)
    assert [read_config(tmp_path / name).name for name in names] == list(names)
    assert not read_config(tmp_path / "vlm_vision").HasField("model_operations")

    # Outputs go on by their names, as the folder's README says.
    readme = (folder / "README.md").read_text()
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    fed = {"pixel_values": pixels, "input_ids": np.array([[1, 20, 30]])}
    fed["attention_mask"], fed["position_ids"] = np.ones((1, 3), np.int64), np.arange(3)[None]
    for value in decoder.get_inputs():
        if value.name.startswith("past_key_values."):
            fed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    for session in (vision, embedding, decoder):
        inputs = {value.name: fed[value.name] for value in session.get_inputs()}
        names_out = [value.name for value in session.get_outputs()]
        fed |= dict(zip(names_out, session.run(names_out, inputs), strict=True))
        for name in (*inputs, *names_out):
            assert f"`{re.sub('[.].*', '.*', name)}`" in readme
    assert fed["logits"].shape[:2] == (1, 3)


def test_three_models_appear_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported_vlm("llava").folder
    (tmp_path / "vlm_vision").mkdir()
    (tmp_path / "vlm_vision" / "other").touch()
    with pytest.raises(FileExistsError, match="vlm_vision"):
        export.write_triton(folder, tmp_path, name="vlm")
    assert [path.name for path in tmp_path.iterdir()] == ["vlm_vision"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grains_ext.export.triton._config", full)
    with pytest.raises(OSError, match="Nothing was left behind"):
        export.write_triton(folder, tmp_path, name="vlm", overwrite=True)
    assert [path.name for path in (tmp_path / "vlm_vision").iterdir()] == ["other"]


def test_tritons_own_schema_reads_the_configuration(tmp_path: Path) -> None:
    """The schema as the client package carries it; the package itself wants gRPC to be imported."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps tritonclient")
    path = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    export.write_triton(exported_llama().folder, tmp_path, name="truthful")
    export.write_triton(exported_vlm("llava").folder, tmp_path, name="faithful")
    first = {
        "truthful": (schema.TYPE_INT64, 1),
        "faithful": (schema.TYPE_FP32, 1),
        "faithful_embedding": (schema.TYPE_INT64, 0),
        "faithful_vision": (schema.TYPE_FP32, 0),
    }
    assert {folder.name for folder in tmp_path.iterdir()} == set(first)
    for name, (data_type, n_libraries) in first.items():
        text = (tmp_path / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, schema.ModelConfig())
        assert (config.name, config.backend) == (name, "onnxruntime")
        assert config.input[0].data_type == data_type
        assert len(config.model_operations.op_library_filename) == n_libraries


def test_external_weights_come_along(tmp_path: Path) -> None:
    exported = exported_llama()
    folder = export.write_triton(exported.folder, tmp_path, library="/models/x/1/ops.so")
    assert folder.name == exported.folder.name
    assert filecmp.cmp(folder / "1" / "model.onnx.data", exported.folder / "model.onnx.data")
    assert list(read_config(folder).model_operations.op_library_filename) == ["/models/x/1/ops.so"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_a_masked_position_is_as_good_as_an_empty_cache() -> None:
    """For clients that cannot send an empty tensor."""
    session = export.session(exported_llama().folder / "model.onnx")
    decoder = export.OnnxDecoder(session)
    ids = np.array([[1, 20, 40, 60]])
    expected, _ = decoder.step(ids, np.ones_like(ids))
    zeros = [
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, 1, 8), np.float32))
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    ]
    logits, _ = decoder.step(ids, np.array([[0, 1, 1, 1, 1]]), zeros)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_wrong_names_and_folders_are_refused(tmp_path: Path) -> None:
    folder = exported_llama().folder
    for name in ("..", "a/b", 'a"b', ""):
        with pytest.raises(ValueError, match="expected letters"):
            export.write_triton(folder, tmp_path, name=name)
    with pytest.raises(FileNotFoundError, match=r"model\.onnx"):
        export.write_triton(tmp_path, tmp_path / "models")
    export.write_triton(folder, tmp_path, name="m")
    with pytest.raises(FileExistsError, match="not empty"):
        export.write_triton(folder, tmp_path, name="m")
    export.write_triton(folder, tmp_path, name="m", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
