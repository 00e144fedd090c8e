"""Models, and files of lines, by the names that a user gives."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from grains_ext.cli.output import err, quiet
from grains_ext.progress import no_loading_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    name: str, dtype: str, device: str, trust_remote_code: bool
) -> "tuple[PreTrainedModel, Any]":
    """The model in eval mode, and its tokenizer, or its processor where it reads images.

    Raises ValueError or OSError, which say what was given, for what is no model or no device.
    """
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION_LANGUAGE_MODELS,
    )

    from grains_ext.vision import load_processor

    check_device(device)
    _check_name(name)
    try:
        with err.status(f"loading {escape(name)}"), no_loading_bars() if quiet() else nullcontext():
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            reads_images = config.model_type in VISION_LANGUAGE_MODELS
            auto_model = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
            load = load_processor if reads_images else AutoTokenizer.from_pretrained
            try:
                processor = load(name, trust_remote_code=trust_remote_code)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{name} has no {'processor' if reads_images else 'tokenizer'} that can be "
                    f"loaded; save it beside the model (tokenizer.save_pretrained): {error}"
                ) from error
            model = auto_model.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name} are damaged or cut short, copy them again: {error}"
        ) from error
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"no model folder {name!r} here, and it could not be had from the hub: {error}"
        ) from error
    return model.to(device).eval(), processor


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; a model is a folder, or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        found = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{name} is no model: a folder that save_pretrained wrote has a config.json, this one "
            f"holds {found}"
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.strip("/").count("/") > 1):
        raise FileNotFoundError(f"no model folder {name!r}, and as a hub id it would be owner/name")


def check_device(name: str) -> None:
    """Before minutes of loading. Raises ValueError for what is no device here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"{name!r} is no device; expected cpu, cuda, or cuda:1 for the second GPU"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise ValueError(
            f"no device {name}: torch {torch.__version__} {built} and sees "
            f"{torch.cuda.device_count()} GPUs"
        )


def lines(path: Path | None) -> list[str] | None:
    """The lines of a text file that are not blank."""
    if path is None:
        return None
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
