"""Tiny random models of every family the package promises, and a tokenizer for them."""

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 128
HIDDEN_SIZE = 32
N_BLOCKS = 4
N_HEADS = 4
SPECIAL_TOKENS = ("<unk>", "<bos>", "<eos>", "<pad>")
WORDS: tuple[str, ...]
WORDS = ("the", "is", "of", "a", "what", "color", "home", "q", "note", "sky", "sea", "grass")
WORDS += ("rose", "blue", "green", "red", "white", "grandma", "says", "study", "shows", "rumour")
WORDS += ("truth", "lie", "paris", "rome")

# What a family's configuration needs beside the sizes that all of them share.
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": HIDDEN_SIZE, "ffn_dim": 64, "dropout": 0.0},
    "olmo": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
}
FAMILIES = tuple(_EXTRA)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> PreTrainedModel:
    """A random causal LM of the family: 4 blocks, hidden 32, 4 heads, vocabulary 128, eval mode.

    Weights are drawn so that attention, blocks and logits differ clearly between tokens (the
    libraries' own initial values of 0.02 give nearly constant outputs at this size).
    """
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    config_class = CONFIG_MAPPING["gemma3_text" if family == "gemma3" else family]
    config = config_class(**(sizes | _EXTRA[family] | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        scale_weights(model)
    # Generation in tests runs for a fixed number of tokens, greedily.
    model.generation_config.do_sample = False
    return model.to(dtype).eval()


def tiny_tokenizer(
    *, add_bos: bool = True, chat_template: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerFast:
    """128 tokens: 4 special ones, all printable ASCII, and " word" for each of WORDS.

    A space belongs to the word after it, as in GPT-2 and Llama tokenizers. Any ASCII text encodes
    and decodes to itself; other characters become <unk>. Offsets are exact.
    """
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, "\n", "▁"]
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(character, -10.0) for character in characters]
    vocabulary += [(f"▁{word}", -1.0) for word in WORDS]
    vocabulary += [(f"<extra_{i}>", -100.0) for i in range(VOCAB_SIZE - len(vocabulary))]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
        **kwargs,
    )


def scale_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:  # a norm's weight, 0 or 1 at start by the family's convention
            parameter.data += 0.1 * torch.randn_like(parameter)
