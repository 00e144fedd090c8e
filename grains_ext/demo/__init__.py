"""The demo: a small world, a Llama trained in it, and the whole path from pairs to steered ONNX."""
