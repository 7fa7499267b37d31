"""State of any shape comes back as it was, to the bit and to the type; what files cannot hold is named."""

from __future__ import annotations

import math
from collections import OrderedDict
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch

from pgp_hf.runs.states import decode, encode, read_state, write_state


def same(a, b):
    """Equal in value and in type, through all containers; NaN equals itself."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and _equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and [*a] == [*b]
            and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
            and (all(same(a[key], b[key]) for key in a))
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def _equal(a, b):
    return torch.equal(a.nan_to_num(0.25), b.nan_to_num(0.25)) if a.is_floating_point() else torch.equal(a, b)


STATES = {
    "nothing": {},
    "numbers": {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": 2**70, "e": True, "f": None, "g": "text", "h": 1},
    "not finite": [float("inf"), -float("inf"), float("nan")],
    "containers": {0: {"betas": (0.9, 0.999), "empty": ((), [], {})}, "0": [1, (2, [3, (4,)])]},
    "tensors": {"step": torch.tensor(3.0), "wide": torch.randn(2, 3).T, "none": torch.empty(0, 4)},
    "values that are not finite": {"x": torch.tensor([float("inf"), float("nan"), 1.0])},
    "keys that look alike": {"s": {0: torch.tensor(1), "0": torch.tensor(2)}, "s.0": torch.tensor(3)},
    "one tensor twice": (lambda t: {"a": t, "b": [t, t[1:]]})(torch.arange(4)),
    "names of its own": {"tensor": {"tuple": "x"}, "dict": {"number": "inf"}, "number": "y", "dtype": "float32"},
    "dtypes": {"momentum_dtype": torch.bfloat16, "of": [torch.float32]},
    **{f"{d}": {"x": torch.tensor([1, 0, 3]).to(d)} for d in (torch.float64, torch.float16, torch.bfloat16)},
    **{f"{d}": {"x": torch.tensor([1, 0, 3]).to(d)} for d in (torch.bool, torch.uint8, torch.int8, torch.int16)},
    **{f"{d}": {"x": torch.tensor([1, 0, 3]).to(d)} for d in (torch.int32, torch.int64)},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back(tmp_path, name):
    write_state(tmp_path, "optimizer", STATES[name])
    found = read_state(tmp_path, "optimizer")
    assert same(STATES[name], found), found
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_what_is_read_is_no_view_of_the_file(tmp_path):
    write_state(tmp_path, "s", {"x": torch.zeros(3)})
    read_state(tmp_path, "s")["x"].fill_(7.0)
    assert not read_state(tmp_path, "s")["x"].any()


def test_dictionaries_of_other_kinds_and_numbers_of_numpy_lose_their_type_alone():
    tree, tensors = encode({"a": OrderedDict(b=np.float64(0.1))}, "x")
    assert decode(tree, tensors) == {"a": {"b": 0.1}}


class Kind(str, Enum):
    A = "a"


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "optimizer.state.3.x is a set"),
        (object(), "optimizer.state.3.x is a object"),
        (partial(print), "is a functools.partial"),
        (np.zeros(3), "is a numpy.ndarray"),
        (np.float32(1), "is a numpy.float32"),
        (b"bytes", "is a bytes"),
        (1j, "is a complex"),
        (Kind.A, "Kind"),
        (torch.zeros(2).as_subclass(Own), "Own"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_anything_else_is_named_with_its_place(tmp_path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        write_state(tmp_path, "optimizer", {"state": {3: {"x": value}}})
    assert "optimizer.state.3.x is a" in str(error.value) and "a tensor or what JSON can hold" in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "tree", [{}, {"a": 1, "b": 2}, {"tensor": "missing"}, {"dict": 3}, {"number": "x"}, {"dtype": "nn"}, {"odd": 1}]
)
def test_parts_that_do_not_belong_together(tree):
    with pytest.raises(ValueError, match="no state is described by"):
        decode(tree, {})
