"""The error of everything that reads or edits an ONNX graph."""


class GraphError(ValueError):
    """The graph is not one that can be steered; the message says what was found and what helps."""
