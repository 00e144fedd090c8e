"""The README.md of an exported folder: the lines that run it."""

from __future__ import annotations

from grains_ext.export.folder import (
    EMBEDDING_NAME,
    GENAI_CONFIG_NAME,
    GRAPH_NAME,
    LIBRARY_NAME,
    RECORD_NAME,
    VISION_NAME,
)
from grains_ext.export.trace import DEFAULT_OPSET
from grains_ext.export.vision_families import VisionFamily

_HEAD = """\
# {name}, steered

A decoder of type `{model_type}` ({dtype}{quantized}) whose hidden states are steered at blocks
{blocks}, strength {strength:g}. `{graph}` holds prefill and cached decoding in one graph;
`steering.safetensors` the directions; `{record}` how all of it was made and how far it is
from the PyTorch model.

It runs on {oldest} and newer: with `{library}` registered, the steering runs as
native fused operators; without it, as the standard operators that the graph carries along.

"""

_TEXT = """\
## From the shell

    grains generate . "your prompt"{option} --max-new-tokens 64

## onnxruntime

```python
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library("./{library}")
session = onnxruntime.InferenceSession("{graph}", options)

past = {{
    value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.{numpy})
    for value in session.get_inputs()
    if value.name.startswith("past_key_values.")
}}
ids = np.array([{ids}], np.int64)  # from tokenizer.json
for _ in range(20):
    n_past = next(iter(past.values())).shape[2]
    n_seen = n_past + ids.shape[1]
    feeds = {{
        "input_ids": ids,
        "attention_mask": np.ones((1, n_seen), np.int64),
        "position_ids": np.arange(n_past, n_seen)[None],{strength_line}
        **past,
    }}
    logits, *present = session.run(None, feeds)
    ids = logits[:, -1:].argmax(-1)
    past = dict(zip(past, present))
    print(ids[0, 0])
```
"""

_VISION = """\
It reads images: `{vision}` makes features of pictures, and `{embedding}` puts them in the
place of the image tokens among the embedded text, which `{graph}` takes. The steering acts
on text and image tokens of the decoder alike.

## From the shell

    grains generate . "your prompt" --image picture.png{option}

## Python

The pictures go through the model's own processor: transformers, Pillow and torch.

```python
from grains_ext.export import TextGenerator

generator = TextGenerator("."{argument})
for _, text in generator.stream("your prompt", images=["picture.png"], max_new_tokens=64):
    print(text, end="", flush=True)
```
"""

_RAW_VISION = """
## onnxruntime

```python
import numpy as np
import onnxruntime
from grains_ext.vision import encode_image_prompt, load_processor

options = onnxruntime.SessionOptions()
options.register_custom_ops_library("./{library}")
session = onnxruntime.InferenceSession("{graph}", options)
vision, embedding = map(onnxruntime.InferenceSession, ("{vision}", "{embedding}"))

prompt = "{image_token} your prompt"  # or messages
ids, inputs = encode_image_prompt(load_processor("."), prompt, ["picture.png"])
pixels = {{value.name: inputs[value.name].numpy() for value in vision.get_inputs()}}
[features] = vision.run(None, pixels)

past = {{
    value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.{numpy})
    for value in session.get_inputs()
    if value.name.startswith("past_key_values.")
}}
ids = np.array([ids], np.int64){types}
for _ in range(20):
    n_past = next(iter(past.values())).shape[2]
    n_seen = n_past + ids.shape[1]
    [embeds] = embedding.run(None, {{"input_ids": ids, "image_features": features}})
    feeds = {{
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, n_seen), np.int64),
        "position_ids": np.arange(n_past, n_seen)[None],{types_line}{strength_line}
        **past,
    }}
    logits, *present = session.run(None, feeds)
    ids, features = logits[:, -1:].argmax(-1), features[:0]
    past = dict(zip(past, present))
    print(ids[0, 0])
```
"""

_TYPES = """
types = inputs["token_type_ids"].numpy()  # 1 at image tokens"""

_TYPES_LINE = """
        "token_type_ids": np.pad(types, ((0, 0), (0, n_seen - types.shape[1]))),"""

_STRENGTH_LINE = """
        "grains.strength": np.array([{strength:g}], np.float32),  # optional; 0: off"""

_GENAI = """
## onnxruntime-genai

`{config}` names the op library, which must lie in this folder.

```python
import onnxruntime_genai as genai

model = genai.Model(".")
tokenizer = genai.Tokenizer(model)
stream = tokenizer.create_stream()
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=200)
generator = genai.Generator(model, parameters)
tokens = list(tokenizer.encode("your prompt")){prefix}
generator.append_tokens([tokens])
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```
"""

_PREFIX = """
if tokens[:1] != [{bos}]:  # genai does not add what this tokenizer begins every text with
    tokens = [{bos}, *tokens]"""

_GENAI_VISION = """
## onnxruntime-genai

`{config}` describes the three graphs, as genai's type `{genai_type}`, and names the op
library, which must lie in this folder. The prompt comes from the model's own processor: genai has
its own for few models.

```python
import numpy as np
import onnxruntime_genai as genai
from grains_ext.vision import encode_image_prompt, load_processor

processor = load_processor(".")
prompt = {prompt}
ids, inputs = encode_image_prompt(processor, prompt, ["picture.png"])
tensors = genai.NamedTensors()
tensors["input_ids"] = np.array([ids], np.int32)
tensors["num_image_tokens"] = np.array([ids.count({image_token_id})], np.int64)
for name in {pixels}:
    tensors[name] = inputs[name].numpy()

model = genai.Model(".")
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + 64)
generator = genai.Generator(model, parameters)
generator.set_inputs(tensors)
while not generator.is_done():
    generator.generate_next_token()
print(processor.decode(generator.get_sequence(0)[len(ids) :]))
```
"""

_ADAPTERS = """
The strength is the graph's own. To switch the steering without another export, write an adapter,
`grains adapter VECTORS --for {graph} --strength 0.5 -o half.onnx_adapter`, and activate it:
`adapters = genai.Adapters(model); adapters.load("half.onnx_adapter", "half");
generator.set_active_adapter(adapters, "half")`.
"""


def readme(
    *,
    name: str,
    model_type: str,
    dtype: str,
    quantize: str | None,
    blocks: list[int],
    strength: float,
    baked: bool,
    opset: int,
    first_token: int | None,
    genai: bool,
    family: VisionFamily | None,
    image_token: tuple[int, str] | None,
    chat: bool,
) -> str:
    """The text. first_token: what the tokenizer begins every text with; None if nothing.

    family, image_token: of a model that reads images; the token's id in the vocabulary, and what
        stands for an image in a prompt. chat: there is a chat template.
    """
    parts = _HEAD + (_TEXT if family is None else _VISION)
    if family is not None and family.position_axes is None:
        parts += _RAW_VISION
    bidirectional = family is not None and family.bidirectional
    text = parts.format(
        name=name,
        model_type=model_type,
        dtype=dtype,
        quantized=f", weights {quantize}" if quantize else "",
        blocks=", ".join(map(str, blocks)),
        strength=strength,
        graph=GRAPH_NAME,
        record=RECORD_NAME,
        library=LIBRARY_NAME,
        oldest=_oldest_onnxruntime(opset, quantize),
        numpy=dtype,
        ids=[1, 2, 3] if first_token is None else [first_token, 2, 3],
        option="" if baked else f" --strength {strength:g}",
        argument="" if baked else f", strength={strength:g}",
        strength_line="" if baked else _STRENGTH_LINE.format(strength=strength),
        vision=VISION_NAME,
        embedding=EMBEDDING_NAME,
        image_token=None if image_token is None else image_token[1],
        types=_TYPES if bidirectional else "",
        types_line=_TYPES_LINE if bidirectional else "",
    )
    if genai and family is not None and image_token is not None:
        text += _GENAI_VISION.format(
            config=GENAI_CONFIG_NAME,
            genai_type=family.genai_type,
            image_token_id=image_token[0],
            pixels=list(family.pixels),
            prompt=(
                '[{"role": "user", "content": "your prompt"}]'
                if chat
                else f'"{image_token[1]} your prompt"'
            ),
        )
    elif genai:
        prefix = "" if first_token is None else _PREFIX.format(bos=first_token)
        text += _GENAI.format(config=GENAI_CONFIG_NAME, prefix=prefix)
    if genai and not baked:
        text += _ADAPTERS.format(graph=GRAPH_NAME)
    return text


def _oldest_onnxruntime(opset: int, quantize: str | None) -> str:
    if opset > DEFAULT_OPSET:
        return f"the first onnxruntime that has opset {opset}"
    return "onnxruntime 1.22" if quantize == "int8" else "onnxruntime 1.20"
