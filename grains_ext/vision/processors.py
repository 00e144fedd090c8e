"""Processors of vision-language models, also where torchvision is not installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import SimpleNamespace
from typing import Any


def load_processor(model: str, **kwargs: Any) -> Any:
    """The processor of a model folder or hub id, as AutoProcessor.from_pretrained gives it.

    transformers' video processors need torchvision, and the processors of Qwen-VL, SmolVLM and
    InternVL do not load without theirs. Where torchvision is missing, they are loaded for images
    and text alone; images go through transformers' Pillow-backed image processors.

    kwargs: as AutoProcessor.from_pretrained takes them. Raises what that raises.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if importlib.util.find_spec("torchvision") is None:
        model_type = transformers.AutoConfig.from_pretrained(model, **kwargs).model_type
        known = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, ""), None)
        if known is not None and (reduced := without_video(known)) is not known:
            return reduced.from_pretrained(model, **kwargs)
    return transformers.AutoProcessor.from_pretrained(model, **kwargs)


@cache
def without_video(processor_class: Any) -> Any:
    """A processor class of transformers less its video part; itself where it has none.

    Its instances save and load under the original class's name.
    """
    parts = processor_class.get_attributes()
    images_and_text = [part for part in parts if "video" not in part]
    if parts == images_and_text:
        return processor_class

    def from_args_and_dict(
        cls: type[Any], args: list[Any], saved: dict[str, Any], /, **kwargs: Any
    ) -> Any:
        given = iter(args)
        filled = [next(given) if part in images_and_text else None for part in parts]
        saved = {name: value for name, value in saved.items() if name not in parts}
        return super(reduced, cls).from_args_and_dict(filled, saved, **kwargs)

    reduced: Any = type(
        processor_class.__name__,
        (processor_class,),
        {
            "__module__": processor_class.__module__,
            "__doc__": processor_class.__doc__,
            "get_attributes": classmethod(lambda cls: list(images_and_text)),
            "from_args_and_dict": classmethod(from_args_and_dict),
            # SmolVLM's chat template reads these of it, for images too.
            "video_processor": SimpleNamespace(num_frames=None, fps=None),
        },
    )
    return reduced
