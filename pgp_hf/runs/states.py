"""Write and read state of any shape that is made of tensors and JSON values, such as an optimizer's: never a pickle."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .atomic import write_json, write_tensors
from .reading import read_json

# what JSON lacks is an object with a single one of these names
_TENSOR, _TUPLE, _DICT, _NUMBER, _DTYPE = "tensor", "tuple", "dict", "number", "dtype"
_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
}


def encode(state: Any, what: str) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into what JSON can hold and its tensors by name; nothing is copied.

    Args:
        state: None, numbers, text, tensors and dtypes, in dictionaries, lists and tuples.
        what: its name in error messages, and the first part of those of the tensors.

    Raises:
        ValueError: anything else, whose place and type are named.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, place: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float) and not isinstance(value, Enum):
            return float(value) if math.isfinite(value) else {_NUMBER: str(float(value))}
        if type(value) is list:
            return [visit(part, f"{place}.{i}") for i, part in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            return {_TUPLE: [visit(part, f"{place}.{i}") for i, part in enumerate(value)]}
        if isinstance(value, dict):
            # as pairs, since keys may be integers
            return {_DICT: [[visit(key, place), visit(own, f"{place}.{key}")] for key, own in value.items()]}
        if isinstance(value, torch.dtype):
            return {_DTYPE: str(value).removeprefix("torch.")}
        if _is_plain(value):
            name = place if place not in tensors else f"{place}#{len(tensors)}"  # keys 0 and "0"
            tensors[name] = value
            return {_TENSOR: name}
        raise ValueError(f"{place} is a {_described(value)}, where a tensor or what JSON can hold is expected")

    return visit(state, what), tensors


def decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Put together what `encode` has split.

    Raises:
        ValueError: parts that do not belong together.
    """
    if isinstance(tree, list):
        return [decode(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    try:
        ((kind, value),) = tree.items()
        if kind == _DICT:
            return {decode(key, tensors): decode(own, tensors) for key, own in value}
        if kind == _TUPLE:
            return tuple(decode(part, tensors) for part in value)
        if kind == _TENSOR:
            return tensors[value]
        if kind == _NUMBER:
            return float(value)
        if kind == _DTYPE and isinstance(dtype := getattr(torch, value), torch.dtype):
            return dtype
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no state is described by {str(tree)[:80]!r}.") from error
    raise ValueError(f"no state is described by {str(tree)[:80]!r}.")


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write `name.json` and, where the state has tensors, `name.safetensors`; raise what `encode` does."""
    tree, tensors = encode(state, name)
    if tensors:
        write_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", {"state": tree})


def read_state(folder: Path, name: str) -> Any:
    """Read what `write_state` has written, with the tensors on the CPU.

    The files have been checked against their digests: values that are not finite may belong to the state, and a large
    model's optimizer exceeds the limits for files from elsewhere.

    Raises:
        ValueError: files that do not belong together.
    """
    path = folder / f"{name}.safetensors"
    # copied, because results of an operation may depend on the alignment in memory, and a file has its own
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()} if path.exists() else {}
    return decode(read_json(folder / f"{name}.json")["state"], tensors)


def _is_plain(value: Any) -> bool:
    """Return True for a tensor that a safetensors file can hold, and that is no subclass with a meaning of its own."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and value.dtype in _TYPES
    )


def _described(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{name} ({value.dtype}, {value.layout}, {value.device})" if isinstance(value, Tensor) else name
