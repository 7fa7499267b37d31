"""Define the protocol by which conditions and projections use a model, and the records that it gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

# (name, role, rows), see `Observation`
NamedRows = Iterable[tuple[str, str, Tensor]]


class PerSample(NamedTuple):
    """One parameter's copies, one for each image of a batch, so that one backward pass serves all images.

    Attributes:
        values: `(B, ...)`, a leaf of the graph: the gradient of a sum over images holds each image's own gradient.
        rows: turns a gradient of that shape into rows `(*batch, B, n)` of the parameter.
    """

    values: Tensor
    rows: Callable[[Tensor], Tensor]


class Traced(NamedTuple):
    """The outcome of a forward pass in which each image has its own copy of the prompts.

    Attributes:
        features: the head's input, `(B, d)`, as a function of `copies`.
        copies: per parameter, by its name in the checkpoint.
        keys: rows `(B, d)` that the images show to the keys of a pool, by the keys' name.
    """

    features: Tensor
    copies: Mapping[str, PerSample]
    keys: Mapping[str, Tensor]


def flat(gradient: Tensor) -> Tensor:
    """Flatten per-image gradients `(B, ...)` to rows `(B, n)` over all dimensions of a parameter.

    Joint rows constrain less than one row per head or token would: what has to stay is the sum of all contributions to
    an output, not each contribution. R joint rows take up at most R directions, R rows per head up to R in each head.
    """
    return gradient.flatten(1)


class Whitens(Protocol):
    """Class statistics that define the metric in which a head measures distances."""

    def whitening(self) -> Tensor:
        """Return W, `(d, d)`, with `W W^T = Sigma^-1`, the inverse of the covariance that the classes share."""


@runtime_checkable
class Protectable(Protocol):
    """A model with parameters that old images share and that a projection can therefore protect.

    Members that read images are called in eval mode, with the inputs of the model by keyword. A condition uses only
    some of the members: "pgp" the `protected_rows`, "attention" the `attention_rows`, "functional" the last four.
    """

    def prompt_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters to protect, by their names in the checkpoint; empty if there is nothing to protect."""

    def token_offsets(self) -> Mapping[str, Tensor]:
        """Return what is added to prompt tokens before the first LayerNorm, by parameter name.

        Each offset broadcasts with its parameter; parameters that do not enter the network as tokens are left out.
        """

    # properties, because implementations differ in the inputs that they name
    @property
    def protected_rows(self) -> Callable[..., NamedRows]:
        """Yield the rows that images show to the parameters, `(*batch, N, n)`, for the condition "pgp"."""

    @property
    def attention_rows(self) -> Callable[..., NamedRows]:
        """Yield the rows along which a parameter changes the first attention of images, `(*batch, N, n)`.

        A name ending in ".T" stands for the parameter with its last two dimensions swapped.
        """

    @property
    def traced(self) -> Callable[..., Traced]:
        """Run a forward pass that is differentiable in each image's own copy of the parameters.

        With an `autocast` dtype, it runs in that precision, but for the query.
        """

    def linear_logits(self, features: Tensor) -> Tensor:
        """Return the trained head's scores `(B, C)` of features `(B, d)`."""

    @property
    def statistics(self) -> Whitens | None:
        """Return the class statistics of a statistics head; None for any other head."""


@runtime_checkable
class HasKeys(Protocol):
    """A model with a pool whose keys can be protected without a pass that is differentiable."""

    @property
    def key_rows(self) -> Callable[..., NamedRows]:
        """Yield the rows that images show to the keys, `(N, n)`."""
