import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from grains_ext.vision import load_processor
from grains_ext.vision.processors import without_video
from tests.vision_models import VISION_FAMILIES, tiny_vlm

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_saved_processors_load_without_torchvision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *a: None if name == "torchvision" else real(name, *a),
    )
    model, processor = tiny_vlm(family)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = tmp_path / "processor_config.json"
    config = json.loads(saved.read_text())
    if type(processor) is not getattr(transformers, config["processor_class"]):
        # As written where torchvision is there.
        config["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor"}
        saved.write_text(json.dumps(config))
    loaded = load_processor(str(tmp_path))
    assert type(loaded) is type(processor)
    inputs = [p(text=[f"a {p.image_token} sky"], images=[IMAGE]) for p in (processor, loaded)]
    assert inputs[0]["input_ids"] == inputs[1]["input_ids"]
    for one, other in zip(inputs[0]["pixel_values"], inputs[1]["pixel_values"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_processors_without_a_video_part_stay_as_they_are() -> None:
    assert without_video(transformers.LlavaProcessor) is transformers.LlavaProcessor
    reduced = without_video(transformers.Qwen2VLProcessor)
    assert issubclass(reduced, transformers.Qwen2VLProcessor)
    assert reduced.get_attributes() == ["image_processor", "tokenizer"]
    assert reduced is without_video(transformers.Qwen2VLProcessor)
