"""A forward pass in which each image has its own copy of the prompts, so that one backward pass serves all images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class PerSample(NamedTuple):
    """The copies of one parameter that a batch of images has worked with.

    Attributes:
        values: `(B, ...)`, a leaf of the graph: the gradient of a sum over images is each image's own gradient here.
        rows: turns a gradient of that shape into rows `(*batch, B, n)` of the parameter.
    """

    values: Tensor
    rows: Callable[[Tensor], Tensor]


class Traced(NamedTuple):
    """What a traced forward pass offers.

    Attributes:
        features: what the head reads, `(B, d)`, as a function of `copies`.
        copies: per parameter, by its name in `adapter_model.safetensors`.
        keys: rows `(B, d)` that the images show to the keys of a pool, by the keys' name.
    """

    features: Tensor
    copies: dict[str, PerSample]
    keys: dict[str, Tensor]


def flat(gradient: Tensor) -> Tensor:
    """Rows `(B, n)` over all dimensions of a parameter.

    Joint rows constrain less than one row a head or token would: what has to stay is the sum of their contributions to
    an output, not each contribution. R joint rows take at most R of all directions, R rows a head up to R in each.
    """
    return gradient.flatten(1)
