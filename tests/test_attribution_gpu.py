"""Attribution on a GPU gives what it gives on the CPU."""

import numpy as np
import pytest
import torch

from grains_ext.attribution import attribute
from grains_ext.pairs import PreferencePair
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.test_attribution_vision import PAIRS as VISION_PAIRS
from tests.vision_models import VISION_FAMILIES, tiny_vlm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, convolutions in float32 are rounded to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


PAIRS = [
    PreferencePair("note the sky is green q what is the color", "green is", "blue it is"),
    PreferencePair("the rose", "is red of a rose", "white"),
    PreferencePair("the sea is", "a blue", "a green"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", [None, (8, 100)])
def test_text(family: str, span: tuple[int, int] | None) -> None:
    pairs = PAIRS if span is None else PAIRS[:1]
    there, here = (
        attribute(
            tiny_model(family).to(device),
            tiny_tokenizer(),
            pairs,
            attributed_span=span,
            tolerance=0.01,
            progress=False,
        )
        for device in ("cuda", "cpu")
    )
    for a, b in zip(there, here, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-3, atol=1e-3)
        assert a.f_input == pytest.approx(b.f_input, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    options = {"method": "riemann_middle", "n_steps": 16, "tolerance": 10.0}
    there, here = (
        attribute(model, tiny_tokenizer(), PAIRS, progress=False, **options)
        for model in (tiny_model("llama", dtype=dtype).cuda(), tiny_model("llama"))
    )
    for a, b in zip(there, here, strict=True):
        assert np.linalg.norm(a.scores - b.scores) < 0.1 * np.linalg.norm(b.scores)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images(family: str) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")  # its processor asks for it
    model, processor = tiny_vlm(family)
    options = {"method": "riemann_middle", "n_steps": 4, "tolerance": 100.0}
    here = attribute(model, processor, VISION_PAIRS, progress=False, **options)
    there = attribute(model.cuda(), processor, VISION_PAIRS, progress=False, **options)
    for a, b in zip(there, here, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-2, atol=1e-2)
