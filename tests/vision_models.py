"""Tiny random vision-language models of every supported family, with their real processors."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from grains_ext.decoder import DecoderView
from grains_ext.vision.processors import without_video
from tests.models import HIDDEN_SIZE, N_HEADS, scale_weights, tiny_tokenizer

N_BLOCKS = 3
VOCAB_SIZE = 192  # the tokenizer's 128 tokens, and room for the families' own
PATCH = 4
TILE = 16  # a tower's square picture, 4 x 4 patches

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    **{f"tile_{r}_{c}_token": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)},
}


def _chat_template(image: str) -> str:
    """One line per turn; image parts become the family's placeholder, as in the real templates."""
    return (
        "{% for m in messages %}{{ m.role }}:"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def _build(
    family: str,
    *,
    tokens: dict[str, str],
    image_processor: Any,
    text: dict[str, Any],
    vision: dict[str, Any],
    placeholder: str,
    model_options: dict[str, Any] | None = None,
    processor_options: dict[str, Any] | None = None,
    token_ids: dict[str, str] | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """token_ids: the configuration's names of token ids, with the tokens they are of."""
    names = _CLASSES[family]
    tokenizer = tiny_tokenizer(extra_special_tokens=tokens)
    assert len(tokenizer) <= VOCAB_SIZE
    ids = {
        name: tokenizer.convert_tokens_to_ids(tokens[token])
        for name, token in (token_ids or {"image_token_id": "image_token"}).items()
    }
    config = getattr(transformers, f"{names}Config")(
        text_config=_TEXT | text, vision_config=_VISION | vision, **ids, **(model_options or {})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{names}ForConditionalGeneration")(config)
        scale_weights(model)
    if vision.get("model_type") == "pixtral":
        full_class = _pixtral_processor()
    else:
        full_class = getattr(transformers, f"{names}Processor")
    processor_class = without_video(full_class)
    no_video = {} if processor_class is full_class else {"video_processor": None}
    processor = processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=_chat_template(placeholder),
        **no_video,
        **(processor_options or {}),
    )
    return model.eval(), processor


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        "llava",
        tokens={"image_token": "<image>"},
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
        ),
        text={"model_type": "llama"},
        vision={"model_type": "clip_vision_model"},
        placeholder="<image>",
        processor_options={
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )


def _llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    return _build(
        "llava_next",
        tokens={"image_token": "<image>"},
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=pinpoints,
        ),
        text={"model_type": "mistral", "sliding_window": None},
        vision={"model_type": "clip_vision_model"},
        placeholder="<image>",
        model_options={"image_grid_pinpoints": pinpoints},
        processor_options={
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )


def _qwen(
    family: str, text: dict[str, Any], vision: dict[str, Any]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        family,
        tokens=_QWEN_TOKENS,
        image_processor=transformers.Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32},
        ),
        text=text,
        vision={"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | vision,
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        token_ids={
            "image_token_id": "image_token",
            "video_token_id": "video_token",
            "vision_start_token_id": "vision_start_token",
            "vision_end_token_id": "vision_end_token",
        },
    )


def _qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return _qwen("qwen2_vl", {"rope_parameters": rope}, {"embed_dim": 32, "mlp_ratio": 2})


def _qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"out_hidden_size": HIDDEN_SIZE, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("qwen2_5_vl", {"rope_parameters": rope}, vision)


def _qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        "out_hidden_size": HIDDEN_SIZE,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen("qwen3_vl", {"rope_parameters": rope, "head_dim": 8}, vision)


def _gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        "gemma3",
        tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}),
        text={
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision={"model_type": "siglip_vision_model"},
        placeholder="<start_of_image>",
        model_options={"mm_tokens_per_image": 4},
        processor_options={"image_seq_length": 4},
        token_ids={
            "image_token_index": "image_token",
            "boi_token_index": "boi_token",
            "eoi_token_index": "eoi_token",
        },
    )


def _idefics(family: str, image_processor: type) -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        family,
        tokens=_IDEFICS_TOKENS,
        image_processor=image_processor(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
        ),
        text={"model_type": "llama"},
        vision={},
        placeholder="<image>",
        model_options={"scale_factor": 2},
        processor_options={"image_seq_len": 4},
    )


def _idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _idefics("idefics3", transformers.Idefics3ImageProcessorPil)


def _smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _idefics("smolvlm", transformers.SmolVLMImageProcessorPil)


def _internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        "internvl",
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=6
        ),
        text={"model_type": "qwen2"},
        vision={"use_mean_pooling": True},
        placeholder="<IMG_CONTEXT>\n",
        model_options={"image_seq_length": 4, "downsample_ratio": 0.5},
        processor_options={"image_seq_length": 4},
        token_ids={"image_token_id": "context_image_token"},
    )


def _pixtral_tower(
    family: str, *, merge: int, **model_options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    return _build(
        family,
        tokens={
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        image_processor=transformers.PixtralImageProcessorPil(
            size={"longest_edge": 2 * TILE}, patch_size={"height": PATCH, "width": PATCH}
        ),
        text={"model_type": "mistral", "sliding_window": None},
        vision={"model_type": "pixtral", "image_size": 2 * TILE},
        placeholder="[IMG]",
        model_options=model_options,
        processor_options={"patch_size": PATCH, "spatial_merge_size": merge},
    )


def _pixtral() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _pixtral_tower(
        "pixtral", merge=1, vision_feature_select_strategy="full", vision_feature_layer=-1
    )


def _mistral3() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _pixtral_tower("mistral3", merge=2, spatial_merge_size=2)


def _pixtral_processor() -> Any:
    """transformers' class: its module imports the processing with torchvision, for one function
    that the one with Pillow has too."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    if importlib.util.find_spec("torchvision") is None:
        sys.modules.setdefault(
            name, importlib.import_module(name.replace("_pixtral", "_pil_pixtral"))
        )
    return importlib.import_module(
        "transformers.models.pixtral.processing_pixtral"
    ).PixtralProcessor


_CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "gemma3": "Gemma3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "pixtral": "Llava",
    "mistral3": "Mistral3",
}
_BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
}
VISION_FAMILIES = tuple(family for family in _BUILDERS if family not in ("pixtral", "mistral3"))
"""Those whose processors need no torchvision."""


def tiny_vlm(
    family: str, *, dtype: torch.dtype = torch.float32, n_blocks: int = N_BLOCKS
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """(model, processor): 3 text blocks of width 32, a tower of 2, weights drawn as in models.py.

    The towers see squares of 16 x 16 pixels (Qwen: any size, in units of 8) in patches of 4.
    n_blocks: less text blocks, the first ones.
    """
    model, processor = _BUILDERS[family]()
    if n_blocks < N_BLOCKS:
        view = DecoderView.of(model)
        view.stack.layers = nn.ModuleList(view.blocks[:n_blocks])
        config = model.config.get_text_config()
        config.num_hidden_layers = n_blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:n_blocks]
    return model.to(dtype), processor
