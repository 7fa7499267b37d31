"""Files that may come from strangers, read with suspicion: bounded, checked, safetensors and JSON alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_JSON = 8 * 2**20  # bytes; ImageNet-21k's class names take 3 MB
MAX_HEADER = 8 * 2**20
MAX_TENSORS = 2**31
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".dill", ".ckpt", ".joblib", ".npy", ".npz")
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: a file that is missing, damaged, above 8 MB, nested too deeply, not an object, with a name twice or
            with a number that is not finite.
    """
    try:
        with _opened(path, MAX_JSON) as file:
            text = file.read().decode("utf-8")
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object is expected")
    except RecursionError as error:
        raise ValueError(f"{path} is missing or damaged (nested too deeply).") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): the folder is not a finished task.") from error
    return content


def tensor_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a safetensors file's header; no tensor is read, and no memory taken for any.

    Raises:
        ValueError: a file that is missing or above 2 GB, a header that is damaged, holds a name twice or declares
            other sizes than the file has.
    """
    try:
        with _opened(path, MAX_TENSORS) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"its header declares {length} bytes, the file has {size}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        return _check_header(header, size - 8 - length)
    except RecursionError as error:
        raise ValueError(f"{path} is missing or damaged (its header is nested too deeply).") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}).") from error


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a safetensors file, all of whose numbers are finite.

    Raises:
        ValueError: as `tensor_shapes`; values that are not finite.
    """
    tensor_shapes(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{path}: {name!r} holds {bad} values that are not finite: it is damaged or diverged.")
    return tensors


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def refuse_pickles(names: Iterable[str], where: str | os.PathLike) -> None:
    """Raise ValueError when a listing of files has one that only code could read."""
    for name in sorted(names):
        if name.lower().endswith(PICKLED):
            raise ValueError(
                f"{where} holds {name!r}, a format that can run code when it is read: pgp_hf reads safetensors and JSON "
                "alone, and no folder or repository that mixes them with others. Remove the file if you trust the rest."
            )


def refuse_code(content: Any, path: str | os.PathLike) -> None:
    """Raise ValueError when the content of a JSON file asks for code of its own to be run."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            asked = next((name for name in _CODE if value.get(name)), None)
            if asked:
                raise ValueError(f"{path} asks for code of its own ({asked}): pgp_hf runs none (trust_remote_code).")
            todo += value.values()
        elif isinstance(value, list):
            todo += value


@contextmanager
def _opened(path: str | os.PathLike, most: int) -> Iterator[BinaryIO]:
    """A regular file (no device or pipe, which may have no end) of at most `most` bytes."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("no regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{size} bytes, allowed are {most}")
        yield file


def _check_header(header: dict[str, Any], room: int) -> dict[str, tuple[int, ...]]:
    shapes, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {name!r} is not one of dtype, shape and data_offsets")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _BITS:
            raise ValueError(f"{name!r} has dtype {dtype!r}, known are {', '.join(_BITS)}")
        if not (_counts(shape) and len(shape) <= 8 and _counts(span) and len(span) == 2):
            raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {span!r}")
        numbers = 1
        for length in shape:
            numbers *= length
        if span[1] - span[0] != numbers * _BITS[dtype] // 8 or span[1] > room:
            raise ValueError(
                f"{name!r} declares shape {shape} of {dtype} at bytes {span}; the file has {room} bytes of data"
            )
        shapes[name] = tuple(shape)
        spans.append(tuple(span))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != room:
        raise ValueError(f"its tensors end at byte {end} of {room}")
    return shapes


def _counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers, none negative or beyond 63 bits."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice!r} stands there twice")
    return content


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text} is too large")
    return number
