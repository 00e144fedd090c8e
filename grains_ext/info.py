"""What this installation is made of and which kernels would run: what ``grains info`` prints."""

import importlib.metadata
import platform
from typing import Any

_PACKAGES = (
    "grains_ext",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
)


def installed_versions() -> dict[str, str | None]:
    """Versions by distribution name; None where a package is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def collect() -> dict[str, Any]:
    """Build, processor, versions and the kernels that would run, as plain JSON data."""
    import torch

    from grains_ext import _C
    from grains_ext.export import ort_library_path

    build = _C.build_info()
    cuda_device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if not build["with_cuda"]:
        cuda_kernels = "not built (no CUDA compiler was found, or GRAINS_CUDA=OFF)"
    elif cuda_device is None:
        cuda_kernels = "built, but torch sees no CUDA device"
    else:
        cuda_kernels = f"run on {cuda_device}"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed_versions(),
        "build": build,
        "cpu": {
            "threads": torch.get_num_threads(),
            "instruction_set": _C.cpu_isa(),
            "supported": _C.supported_isas(),
        },
        "cuda": {"device": cuda_device, "kernels": cuda_kernels},
        "onnxruntime_library": str(ort_library_path()),
    }
