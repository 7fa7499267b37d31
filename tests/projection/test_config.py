"""A configuration can be written as JSON, whatever kind of number it was given."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from pgp_hf.projection import ProjectionConfig

SHARES, COUNTS = ("energy", "key_energy", "value_energy", "ln_penalty"), ("probes", "max_images")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(
            (name, value, float)
            for name in SHARES
            for value in (np.float32(0.5), np.float64(0.5), Fraction(1, 2), 0.5)
        ),
        *((name, np.int64(1), int) for name in SHARES),
        *((name, number(3), int) for name in COUNTS for number in (np.int64, np.uint8, int)),
    ],
)
def test_a_number_of_any_kind(name, value, kind):
    config = ProjectionConfig(**{name: value})
    found = json.loads(json.dumps(config.to_dict()))
    assert found == {**ProjectionConfig().to_dict(), name: kind(value)} and type(getattr(config, name)) is kind


@pytest.mark.parametrize("name", [*SHARES, *COUNTS])
@pytest.mark.parametrize("value", [np.float32("nan"), np.float64(-1), np.bool_(True), "0.5"])
def test_other_values_are_still_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        ProjectionConfig(**{name: value})


def test_the_order_of_arguments_and_of_files():
    config = ProjectionConfig("functional", 0.9, "both")
    assert (config.method, config.energy, config.apply_to) == ("functional", 0.9, "both")
    assert list(config.to_dict())[:6] == ["method", "energy", "key_energy", "value_energy", "apply_to", "max_images"]
