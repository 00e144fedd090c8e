"""The README.md of an exported folder: the lines that run it."""

from __future__ import annotations

from grains_ext.export.folder import (
    GENAI_CONFIG_NAME,
    GRAPH_NAME,
    LIBRARY_NAME,
    RECORD_NAME,
)
from grains_ext.export.trace import DEFAULT_OPSET

_HEAD = """\
# {name}, steered

A decoder of type `{model_type}` ({dtype}{quantized}) whose hidden states are steered at blocks
{blocks}, strength {strength:g}. `{graph}` holds prefill and cached decoding in one graph;
`steering.safetensors` the directions; `{record}` how all of it was made and how far it is
from the PyTorch model.

It runs on {oldest} and newer: with `{library}` registered, the steering runs as
native fused operators; without it, as the standard operators that the graph carries along.

## From the shell

    grains generate . "your prompt" --strength {strength:g} --max-new-tokens 64

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
) -> str:
    """The text. first_token: what the tokenizer begins every text with; None if nothing."""
    text = _HEAD.format(
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
        strength_line="" if baked else _STRENGTH_LINE.format(strength=strength),
    )
    if genai:
        prefix = "" if first_token is None else _PREFIX.format(bos=first_token)
        text += _GENAI.format(config=GENAI_CONFIG_NAME, prefix=prefix)
        text += "" if baked else _ADAPTERS.format(graph=GRAPH_NAME)
    return text


def _oldest_onnxruntime(opset: int, quantize: str | None) -> str:
    if opset > DEFAULT_OPSET:
        return f"the first onnxruntime that has opset {opset}"
    return "onnxruntime 1.22" if quantize == "int8" else "onnxruntime 1.20"
