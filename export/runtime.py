"""onnxruntime sessions with the compiled op library registered."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grains_ext

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

Provider = str | tuple[str, dict[str, Any]]

_LIBRARY_NAME = "libgrains_ort.so"


def require_onnxruntime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        ImportError: neither onnxruntime nor onnxruntime-gpu is installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError(
            "onnxruntime is not installed. Install one of the two builds, which share one import "
            "name: pip install 'grains_ext[cpu]' (onnxruntime) or 'grains_ext[gpu]' "
            "(onnxruntime-gpu)"
        )
    return importlib.import_module("onnxruntime")


def ort_library_path() -> str:
    """Path of the op library, for `SessionOptions.register_custom_ops_library` of any binding.

    Raises:
        FileNotFoundError: the native libraries have not been built.
    """
    path = Path(grains_ext.__file__).resolve().parent / _LIBRARY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the native libraries have not been built. Run `make setup` in a "
            "checkout, or pip install --no-build-isolation ."
        )
    return str(path)


def session(
    path_or_bytes: str | Path | bytes,
    *,
    library: bool = True,
    session_options: SessionOptions | None = None,
    providers: Sequence[Provider] | None = None,
) -> InferenceSession:
    """An InferenceSession over a model with `grains` nodes.

    Args:
        path_or_bytes: a model file (needed where weights lie beside it) or a serialised model.
        library: register the op library, so that the fused kernels run. False runs the model-local
            functions, as an onnxruntime without the library does.
        session_options: used and, with `library`, changed: the library is registered in it. Options
            that have it already are left as they are.
        providers: execution providers in order of preference; by default CUDA where this
            onnxruntime was built with it, then CPU.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: there is no such model file, or `library` is set and not built.
    """
    onnxruntime = require_onnxruntime()
    if not isinstance(path_or_bytes, bytes) and not Path(path_or_bytes).is_file():
        raise FileNotFoundError(f"no model file {path_or_bytes}")
    options = session_options
    if options is None:
        options = onnxruntime.SessionOptions()
        # Errors only: onnxruntime warns of each input with a default, and ours are meant so.
        options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(ort_library_path())
    if providers is None:
        available = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in available]
    model = path_or_bytes if isinstance(path_or_bytes, bytes) else str(path_or_bytes)
    return onnxruntime.InferenceSession(model, options, providers=list(providers))
