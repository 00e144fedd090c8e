"""Vision-language models: prompts with images, what the decoder reads of them, and their pixels."""

from grains_ext.vision.baselines import IMAGE_BASELINES, image_baseline_embeddings
from grains_ext.vision.capture import (
    CapturedPrompt,
    additive_mask,
    capture_prompt,
    repeat_rows,
    replaying,
)
from grains_ext.vision.encoding import EncodedImagePair, encode_image_pair, encode_image_prompt
from grains_ext.vision.grid import ImageGrid
from grains_ext.vision.images import blurred, open_image
from grains_ext.vision.processors import load_processor

__all__ = [
    "IMAGE_BASELINES",
    "CapturedPrompt",
    "EncodedImagePair",
    "ImageGrid",
    "additive_mask",
    "blurred",
    "capture_prompt",
    "encode_image_pair",
    "encode_image_prompt",
    "image_baseline_embeddings",
    "load_processor",
    "open_image",
    "repeat_rows",
    "replaying",
]
