"""The errors of reading, editing and making ONNX graphs."""


class GraphError(ValueError):
    """The graph is not one that can be steered; the message says what was found and what helps."""


class ExportError(RuntimeError):
    """The model does not export, or the exported graph does not compute what the model does."""
