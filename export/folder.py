"""What lies in an exported folder, and how it comes to lie there: complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

GRAPH_NAME = "model.onnx"
UNSTEERED_NAME = "model_unsteered.onnx"
VISION_NAME = "vision.onnx"
EMBEDDING_NAME = "embedding.onnx"
CONFIG_NAME = "config.json"
LIBRARY_NAME = "libgrains_ort.so"
RECORD_NAME = "grains_export.json"
GENAI_CONFIG_NAME = "genai_config.json"
README_NAME = "README.md"

# A write that fails in the middle names no file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raises where nothing may be written to `folder`: NotADirectoryError or FileExistsError."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is a file; give a folder to export to")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"'{folder}' is not empty; pass overwrite=True (--overwrite) to replace it with all "
            "that it holds"
        )


@contextmanager
def replacing_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` to write to; it takes its place when the block ends well.

    Raises as require_free does, also for what another process has written there meanwhile.
    """
    require_free(folder, overwrite=overwrite)
    # A link stays a link to the new folder, and "." gets its name.
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's, which would make a private folder; and no process id: in a container it is the
    # same each time, and what a killed process left behind would be in the way.
    work = _beside(folder, "tmp")
    work.mkdir()
    try:
        yield work
        _make_readable(work)
        require_free(folder, overwrite=overwrite)
        _move_into_place(work, folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise OSError(
                error.errno, f"cannot write '{folder}': {error.strerror}. Nothing was left behind"
            ) from error
        raise


def _beside(folder: Path, kind: str) -> Path:
    # A name may have 255 bytes, of which the folder's own may take all.
    return folder.with_name(f".{folder.name[:40]}.{uuid4().hex}.{kind}")


def _make_readable(work: Path) -> None:
    """Some writers (safetensors, onnx's external data) make files that their owner alone may read;
    who serves a folder is often another user. The folder's own mode has the umask in it."""
    shared = work.stat().st_mode & 0o666
    for path in work.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | shared)


def _move_into_place(work: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(work, folder)
        return
    # A folder cannot replace one that holds files: the old one steps aside first.
    old = _beside(folder, "old")
    os.replace(folder, old)
    try:
        os.replace(work, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)
