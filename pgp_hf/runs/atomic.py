"""Write files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path, whose file takes the place of `path` when the block ends without an error.

    Missing folders are created. An earlier file stays as it is until then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, since a rename is atomic only within one file system
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # as of a write, where the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, rows: bool = False) -> None:
    """Write JSON atomically; raise ValueError for NaN and infinities, which JSON does not have.

    Args:
        rows: write each list of numbers and text on one line, which takes a third of the space in a matrix.
    """
    text = _in_rows(content) if rows else json.dumps(content, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    # safetensors refuses tensors that share memory, such as one tensor under two names
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary)


def sync(path: Path) -> None:
    """Write a file, or a folder with all that is in it, through to the disk, so that a power failure leaves it whole."""
    for one in (*path.rglob("*"), path) if path.is_dir() else (path,):
        if one.is_dir():
            sync_names(one)
        else:
            with one.open("rb+") as file:  # Windows syncs no file that is open for reading alone
                os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Write a folder's list of files through to the disk, where the system can do so."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _in_rows(value: Any, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(str(key))}: {_in_rows(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _in_rows(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
