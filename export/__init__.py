"""Steering of ONNX graphs: op library, injection, export, verification.

Names are imported at first use: a server that only needs `session` or `ort_library_path` loads
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grains_ext.export.adapter import write_adapter
    from grains_ext.export.attribution import export_attribution
    from grains_ext.export.attribution_graph import AttributionGraph
    from grains_ext.export.errors import ExportError, GraphError
    from grains_ext.export.functions import DOMAIN, OPSET_VERSION, add_functions, function_proto
    from grains_ext.export.generate import OnnxDecoder, PromptImages
    from grains_ext.export.inject import inject, remove_steering
    from grains_ext.export.locate import Site, locate
    from grains_ext.export.model import export_model
    from grains_ext.export.runtime import ort_library_path, session
    from grains_ext.export.surgery import Injected
    from grains_ext.export.text import TextGenerator
    from grains_ext.export.trace import export_graph
    from grains_ext.export.triton import write_triton
    from grains_ext.export.verify import Parity, RuntimeParity, count_nodes, verify
    from grains_ext.export.vision_runtime import ImageReader, Prompt

_HOMES = {
    "adapter": ("write_adapter",),
    "attribution": ("export_attribution",),
    "attribution_graph": ("AttributionGraph",),
    "errors": ("ExportError", "GraphError"),
    "functions": ("DOMAIN", "OPSET_VERSION", "add_functions", "function_proto"),
    "generate": ("OnnxDecoder", "PromptImages"),
    "inject": ("inject", "remove_steering"),
    "locate": ("Site", "locate"),
    "model": ("export_model",),
    "runtime": ("ort_library_path", "session"),
    "text": ("TextGenerator",),
    "trace": ("export_graph",),
    "surgery": ("Injected",),
    "triton": ("write_triton",),
    "verify": ("Parity", "RuntimeParity", "count_nodes", "verify"),
    "vision_runtime": ("ImageReader", "Prompt"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DOMAIN",
    "OPSET_VERSION",
    "AttributionGraph",
    "ExportError",
    "GraphError",
    "ImageReader",
    "Injected",
    "OnnxDecoder",
    "Parity",
    "Prompt",
    "PromptImages",
    "RuntimeParity",
    "Site",
    "TextGenerator",
    "add_functions",
    "count_nodes",
    "export_attribution",
    "export_graph",
    "export_model",
    "function_proto",
    "inject",
    "locate",
    "ort_library_path",
    "remove_steering",
    "session",
    "verify",
    "write_adapter",
    "write_triton",
]


class _Package(ModuleType):
    """`inject`, `locate` and `verify` name a module and its function: here, the function wins.

    Python sets a package's attribute to each submodule that is imported; that is left out.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME_OF or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
