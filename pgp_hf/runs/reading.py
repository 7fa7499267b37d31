"""Read files from untrusted sources: bounded in size, checked, safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MAX_JSON = 16 * 2**20  # bytes; the accuracies of 1,000 tasks take 13 MB, ImageNet-21k's class names 3 MB
MAX_HEADER = 8 * 2**20
MAX_NAMES = 50_000  # tensors in a file
MAX_TENSORS = 2**31
MAX_DIMS = 8
MAX_DIGITS = 1000  # of a whole number
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".dill", ".ckpt", ".joblib", ".npy", ".npz")
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_ENTRY = {"dtype", "shape", "data_offsets"}
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: a file that is missing, damaged, larger than 16 MB, nested too deeply or not an object, that repeats
            a name, or holds a number that is not finite.
    """
    try:
        with _opened(path, MAX_JSON) as file:
            text = file.read().decode("utf-8")
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} where an object is expected")
    except RecursionError as error:
        raise ValueError(f"{path} is missing or damaged (nested too deeply).") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): the folder is not a finished task.") from error
    return content


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file by name, without reading a tensor or allocating memory for one.

    Raises:
        ValueError: a file that is missing or larger than 2 GB; a header that is damaged, repeats a name, has more than
            50,000 names or declares sizes that the file does not have.
    """
    try:
        with _opened(path, MAX_TENSORS) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header declares {length} bytes, at most {MAX_HEADER} are allowed")
            header = file.read(length)
            if (count := header.count(b"{") - 1) > MAX_NAMES:  # each entry is an object; parsing them takes seconds
                raise ValueError(f"its header has {count} entries, at most {MAX_NAMES} are allowed")
            # the library refuses overlaps, gaps, trailing bytes, deep nesting and sizes that do not fit the data
            with safe_open(path, framework="pt") as tensors:
                slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118  # not a dict
                shapes = {name: _check_shape(name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices}
            # ... but not these: of two entries with one name it takes the last, and it skips unknown keys
            for name, entry in json.loads(header, object_pairs_hook=_unique).items():
                if name != "__metadata__" and entry.keys() != _ENTRY:
                    raise ValueError(
                        f"the entry of {name!r} must have dtype, shape and data_offsets, and nothing else"
                    )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}).") from error
    return shapes


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, all of whose numbers must be finite.

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
    # copied, because a product of matrices rounds by their alignment in memory, and those in a file have another
    return {name: tensor.clone() for name, tensor in tensors.items()}


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def refuse_pickles(names: Iterable[str], where: str | os.PathLike[str]) -> None:
    """Raise ValueError if a listing of files has one in a format that can run code when it is read."""
    for name in sorted(names):
        if name.lower().endswith(PICKLED):
            raise ValueError(
                f"{where} holds {name!r}, a format that can run code when it is read: pgp_hf reads safetensors and JSON "
                "only, from folders and repositories that hold nothing of the kind. Remove the file if you trust the "
                "rest."
            )


def refuse_code(content: Any, path: str | os.PathLike[str]) -> None:
    """Raise ValueError if the content of a JSON file asks for custom code to be run."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            asked = next((name for name, own in value.items() if _asks_for_code(name, own)), None)
            if asked:
                raise ValueError(
                    f"{path} asks for code to be run ({asked}): pgp_hf never runs custom code (trust_remote_code)."
                )
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _asks_for_code(name: str, value: Any) -> bool:
    # a repository where the name of an implementation is expected holds kernels, which transformers would fetch and run
    kernel = name.endswith("_implementation") and isinstance(value, str) and "/" in value
    return kernel or (name in _CODE and bool(value))


@contextmanager
def _opened(path: str | os.PathLike[str], most: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most `most` bytes; anything else, such as a pipe, might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{size} bytes, at most {most} are allowed")
        yield file


def _check_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape; raise ValueError for one that torch cannot hold, or a dtype that this package never writes."""
    if dtype not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {dtype!r}, known are {', '.join(_DTYPES)}")
    if len(shape) > MAX_DIMS or any(length >= 2**63 for length in shape):
        raise ValueError(f"{name!r} has shape {shape}: expected at most {MAX_DIMS} lengths below 2**63")
    return shape


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the name {name!r} occurs twice")
        content[name] = value
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:  # Python refuses them too, and names a setting of its own
        raise ValueError(f"a number of {len(text)} digits, at most {MAX_DIGITS} are allowed")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text} is too large")
    return number
