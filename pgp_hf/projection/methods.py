"""What each projection protects: which rows a parameter's movement must be orthogonal to.

A method is a function of a model and a batch of inputs that yields `Observation`s. It knows the model only through
the methods that a prompt tuner offers, so that projections and tuners stay independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Observation(NamedTuple):
    """Rows that one batch of old inputs shows to one parameter.

    Attributes:
        name: the parameter's name as in the adapter's checkpoint.
        role: "prompt", "key" (of a pool) or "value" (of a prefix); each has its own energy.
        rows: `(*batch, N, n)`: the parameter, reshaped to `(*batch, rows, n)`, shall not move along them.
    """

    name: str
    role: str
    rows: Tensor


def pgp(model: Any, inputs: dict[str, Tensor]) -> Iterable[Observation]:
    """Prompt gradient projection (Qiao et al., ICLR 2024): `x_t dp^T = 0` and `p_t dp^T = 0`.

    The attention of an old input is kept when each token row x_t and each prompt row p_t of the old task is
    orthogonal to the prompt's change (Eqs. 5 to 9). Both conditions hold for the rows stacked, never for their sum.
    Keys are held likewise against the old queries, `q_t dk^T = 0`.
    """
    return model.protected_rows(**inputs)


METHODS: dict[str, Callable[[Any, dict[str, Tensor]], Iterable[Observation]]] = {"pgp": pgp}
