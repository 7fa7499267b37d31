"""Keeps parameters in the null space of their bases while any optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from .basis import Basis
from .config import APPLY_TO
from .moments import float64_device

NamedParameters = Iterable[tuple[str, Tensor]]


class NullSpaceProjector:
    """Projects the movement (or the gradient) of named parameters onto the null space of their bases.

    `apply_to="update"` projects the displacement `p - p_anchor` from the value at the task's start after each step:
    momentum, Adam's scaling, weight decay and clipping cannot leave the null space, nor does rounding pile up over
    steps. `apply_to="gradient"` projects the gradient before the step, as the poster's algorithm has it; under an
    optimizer that is not linear in the gradient (Adam) the step leaves the null space all the same.

    A parameter of any shape is read as `(*batch, -1, n)`, with the batch and n of its basis; parameters without a
    basis are left alone.

    Args:
        bases: basis of each protected parameter, by name.
        apply_to: "update" or "gradient".

    Attributes:
        bases: the same; setting it drops the anchors, since a task's bases hold from the value it starts at.
    """

    def __init__(self, bases: dict[str, Basis] | None = None, apply_to: str = "update") -> None:
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to={apply_to!r} is unknown: choose one of {', '.join(APPLY_TO)}.")
        self.bases = dict(bases or {})
        self.apply_to = apply_to

    @property
    def bases(self) -> dict[str, Basis]:
        return self._bases

    @bases.setter
    def bases(self, bases: dict[str, Basis]) -> None:
        self._bases = bases
        self._anchors: dict[str, Tensor] = {}

    @torch.no_grad()
    def anchor(self, named_parameters: NamedParameters) -> None:
        """Remember where the protected parameters stand; call at each task's start.

        Raises:
            ValueError: a basis whose parameter is missing, or a parameter that its basis does not fit.
        """
        self._anchors = {}
        for name, basis, parameter in list(self._protected(named_parameters)):
            value = _local(parameter)
            block = basis.dim * _product(basis.batch_shape)
            if value.shape[-1] != basis.dim or value.numel() % block:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, which is not ({', '.join(map(str, basis.batch_shape))}"
                    f"{', ' if basis.batch_shape else ''}rows, {basis.dim}) as its basis of shape "
                    f"{tuple(basis.columns.shape)} needs: load the bases that belong to this adapter."
                )
            self._anchors[name] = value.detach().clone()
            # once a task rather than once a step
            self.bases[name] = basis.to(float64_device(value.device))

    @torch.no_grad()
    def project_updates_(self, named_parameters: NamedParameters) -> None:
        """Put each protected parameter at `p_anchor + (p - p_anchor)(I - M M^T)`, in place.

        Raises:
            RuntimeError: `anchor` has not been called since the bases were set.
            ValueError: a basis whose parameter is missing.
        """
        for name, basis, parameter in self._protected(named_parameters):
            if basis.rank == 0:
                continue
            if name not in self._anchors:
                raise RuntimeError(f"{name} has no anchor: call anchor(named_parameters) at the task's start.")
            value, start = _local(parameter), self._anchors[name].to(basis.columns)
            value.copy_(start + _project(basis, value.to(basis.columns) - start))

    @torch.no_grad()
    def project_gradients_(self, named_parameters: NamedParameters) -> None:
        """Replace each protected parameter's gradient g by `g (I - M M^T)`, in place.

        Raises:
            ValueError: a basis whose parameter is missing.
        """
        for _, basis, parameter in self._protected(named_parameters):
            if basis.rank and parameter.grad is not None:
                gradient = _local(parameter.grad)
                gradient.copy_(_project(basis, gradient.to(basis.columns)))

    def _protected(self, named_parameters: NamedParameters) -> Iterator[tuple[str, Basis, Tensor]]:
        parameters = dict(named_parameters)
        for name, basis in self.bases.items():
            if name not in parameters:  # a wrapper's prefix, say, would leave it unprotected
                raise ValueError(
                    f"no parameter is named {name!r}, which has a basis: the parameters given are "
                    f"{', '.join(sorted(parameters)) or 'none'}."
                )
            yield name, basis, parameters[name]

    def attach(
        self, optimizer: Optimizer, named_parameters: Callable[[], NamedParameters]
    ) -> torch.utils.hooks.RemovableHandle:
        """Project at every step of `optimizer` from now on.

        Optimizer hooks see gradients after accumulation, unscaling and clipping, and do not run for steps that a
        gradient scaler skips.

        Args:
            optimizer: any torch optimizer (not a wrapper of one).
            named_parameters: called at every step, because sharding may swap parameter objects.

        Returns:
            A handle; `remove()` detaches.
        """
        if self.apply_to == "gradient":
            return optimizer.register_step_pre_hook(lambda *_: self.project_gradients_(named_parameters()))
        return optimizer.register_step_post_hook(lambda *_: self.project_updates_(named_parameters()))


def _project(basis: Basis, tensor: Tensor) -> Tensor:
    rows = basis.project(tensor.reshape(*basis.batch_shape, -1, basis.dim))
    full = basis.ranks == basis.dim
    return rows.masked_fill(full[..., None, None], 0).reshape(tensor.shape)  # where rounding would leave a little


def _local(tensor: Tensor) -> Tensor:
    # a DTensor sharded on dim 0 is projected shard by shard: the projection acts on the last dimension
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
