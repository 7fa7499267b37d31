"""Values of a dataclass against its annotations."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from pgp_hf.fields import check_fields


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Base:
    size: float | None = None


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 0.5
    limit: int | None = None
    on: bool = True
    mode: Literal["a", "b"] = "a"
    colour: Colour | str = "red"
    name: str | None = None
    layers: list[int] | None = None


@pytest.mark.parametrize(
    ("field", "value", "error", "expected"),
    [
        ("count", None, TypeError, "count=None: expected a whole number"),
        ("count", "4", TypeError, "count='4' is a str: expected a whole number"),
        ("count", 2.0, TypeError, "count=2.0 is a float: expected a whole number"),
        ("count", True, TypeError, "count=True is a bool: expected a whole number"),
        ("rate", "1e-3", TypeError, "rate='1e-3' is a str: expected a number"),
        ("rate", False, TypeError, "rate=False is a bool: expected a number"),
        ("rate", float("nan"), ValueError, "rate=nan is not a number"),
        ("rate", np.float32("nan"), ValueError, "rate=nan is not a number"),
        ("limit", 2.5, TypeError, "limit=2.5 is a float: expected a whole number or None"),
        ("limit", "none", TypeError, "limit='none' is a str: expected a whole number or None"),
        ("on", 1, TypeError, "on=1 is an int: expected True or False"),
        ("on", None, TypeError, "on=None: expected True or False"),
        ("mode", "c", ValueError, "mode='c' is unknown: choose one of a, b"),
        ("mode", ["a"], ValueError, r"mode=\['a'\] is unknown"),
        ("mode", None, ValueError, "mode=None is unknown"),
        ("colour", "blue", ValueError, "colour='blue' is unknown: choose one of red"),
    ],
)
def test_what_is_of_another_type_is_named(field, value, error, expected):
    with pytest.raises(error, match=expected):
        check_fields(Settings(**{field: value}))


def test_what_fits_stays_and_numpys_numbers_become_pythons():
    given = Settings(np.int64(3), np.float32(0.25), np.uint8(2), np.bool_(False), "b", Colour.RED, None, [1])
    check_fields(given)
    assert given == Settings(3, 0.25, 2, False, "b", Colour.RED, None, [1])
    json.dumps([given.count, given.rate, given.limit, given.on])
    whole = Settings(rate=1)
    check_fields(whole)
    assert type(whole.rate) is int  # files of earlier runs have it so


def test_fields_of_a_base_are_skipped_unless_declared_anew():
    @dataclass
    class Inherits(Base):
        own: int = 0

    @dataclass
    class Redeclares(Base):
        size: float | None = 1.0

    check_fields(Inherits("large"), skip=Base.__mro__)
    with pytest.raises(TypeError, match="size='large'"):
        check_fields(Inherits("large"))
    with pytest.raises(TypeError, match="size='large'"):
        check_fields(Redeclares("large"), skip=Base.__mro__)
