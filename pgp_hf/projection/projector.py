"""Keep parameters in the null space of their bases, under any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .basis import Basis
from .config import APPLY_TO
from .moments import float64_device

NamedParameters = Iterable[tuple[str, Tensor]]
ROUNDINGS = 8  # of a value: what a copy to its precision can change, sixteen times
SHARE = 1e-4  # of a movement: far above the rounding of bases, far below what any cause has shown
TRANSPOSED = ".T"  # ends the name of a basis for a parameter with its last two dimensions swapped


class Hooks(tuple[RemovableHandle, ...]):
    """Handles of an optimizer's hooks."""

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self:
            hook.remove()


class NullSpaceProjector:
    """Project the movement (or the gradient) of named parameters onto the null space of their bases.

    `apply_to="update"` projects the displacement `p - p_anchor` from the value at the task's start after each step.
    Momentum, Adam's scaling, weight decay and clipping cannot leave the null space then, and rounding does not
    accumulate over steps. `apply_to="gradient"` projects the gradient before the step, as the paper's algorithm does;
    under an optimizer that is not linear in the gradient (Adam) the step leaves the null space all the same.
    `apply_to="both"` guarantees what "update" does, and the optimizer scales and accumulates only gradients inside the
    null space: under "update" alone, directions that may not move influence the size of Adam's steps in those that
    may. (Clipping comes before the step and measures the whole gradient in any case.)

    A parameter is read as `(*batch, rows, n)`, with the batch and n of its basis: its last dimensions multiply to n,
    its first are the batch. Parameters without a basis are left alone. A name ending in ".T" stands for the parameter
    with its last two dimensions swapped; a parameter may have a basis under each of its two names. The two projections
    act on different axes, so they commute and both conditions hold.

    Args:
        bases: basis of each protected parameter, by name.
        apply_to: "update", "gradient" or "both".
        hold_norm: parameters whose rows keep the norm that they had at the anchor, except with "gradient": the part of
            a row inside the null space is rescaled. Cosines with protected directions then stay exactly the same,
            whereas a projection alone keeps the products `q k^T` but not |k|.

    Attributes:
        bases: the same; setting it drops the anchors, since new bases hold from the value at the next task's start.
        hold_norm: the same.
        strength: of bases that shrink movements instead of cutting them, by name: the share that each column takes
            away, `(*batch, r)`. Each step is then shrunk by itself, so that the movement of a whole task is that of
            its steps, shrunk once. Setting `bases` drops it.

    Raises:
        ValueError: an unknown `apply_to`.
    """

    def __init__(
        self, bases: dict[str, Basis] | None = None, apply_to: str = "update", hold_norm: Iterable[str] = ()
    ) -> None:
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to={apply_to!r} is unknown: choose one of {', '.join(APPLY_TO)}.")
        self.bases = dict(bases or {})
        self.apply_to, self.hold_norm = apply_to, set(hold_norm)

    @property
    def bases(self) -> dict[str, Basis]:
        """Return the basis of each protected parameter, by name."""
        return self._bases

    @bases.setter
    def bases(self, bases: dict[str, Basis]) -> None:
        self._bases = bases
        self._anchors: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the last step, by name, where a strength acts on each step
        self.strength: dict[str, Tensor] = {}

    @torch.no_grad()
    def anchor(self, named_parameters: NamedParameters) -> None:
        """Remember the values of the protected parameters; call this at each task's start.

        Raises:
            ValueError: a basis whose parameter is missing, or a parameter that its basis does not fit.
        """
        self._anchors = {}
        for name, parameter, bases in list(self._protected(named_parameters)):
            value = _local(parameter)
            for key, basis in bases.items():
                shape = tuple(_transposed(value, key != name).shape)
                if not _fits(shape, basis):
                    raise ValueError(
                        f"{key} has shape {shape}, which is not ({', '.join(map(str, basis.batch_shape))}"
                        f"{', ' if basis.batch_shape else ''}rows, {basis.dim}) as its basis of shape "
                        f"{tuple(basis.columns.shape)} needs: load the bases that belong to this adapter "
                        "(and do not shard it along the batch of its basis)."
                    )
                # moved here, once a task, rather than in every step
                self.bases[key] = basis.to(float64_device(value.device))
            self._anchors[name] = value.detach().clone()

    @torch.no_grad()
    def project_updates_(self, named_parameters: NamedParameters) -> None:
        """Move each protected parameter to `p_anchor + (p - p_anchor)(I - M M^T)`, in place.

        Raises:
            RuntimeError: `anchor` has not been called since the bases were set.
            ValueError: a basis whose parameter is missing.
        """
        for name, parameter, bases in self._protected(named_parameters):
            if not any(basis.rank for basis in bases.values()):
                continue
            value, start = _local(parameter), self._before.get(name, self.start(name))
            device = float64_device(value.device)
            start = start.to(device).to(torch.float64)
            moved = self._project(bases, name, value.to(device).to(torch.float64) - start)
            if name in self.hold_norm:
                moved = _hold_norm(bases, name, start, moved)
            value.copy_(start + moved)

    @torch.no_grad()
    def check(self, named_parameters: NamedParameters) -> None:
        """Raise RuntimeError if a protected parameter has moved along directions of its bases since `anchor`.

        It has if something moved it after the last step. With `apply_to="gradient"` or a strength, which promise nothing
        of the kind, nothing is checked.

        Raises:
            RuntimeError: such a parameter; or `anchor` has not been called since the bases were set.
            ValueError: a basis whose parameter is missing.
        """
        if self.apply_to == "gradient":
            return
        for name, parameter, bases in self._protected(named_parameters):
            if self.strength.keys() & bases.keys() or not any(basis.rank for basis in bases.values()):
                continue
            value = _local(parameter)
            device = float64_device(value.device)
            value, start = (tensor.to(device).to(torch.float64) for tensor in (value, self.start(name)))
            moved = value - start
            along = float((moved - self._project(bases, name, moved)).norm())
            rounding = ROUNDINGS * torch.finfo(parameter.dtype).eps * float(value.norm())
            if not along <= rounding + SHARE * float(moved.norm()):  # NaN is not
                raise RuntimeError(
                    f"{name} has moved along directions that older tasks protect: {along / float(moved.norm()):.1%} of its "
                    "movement, although each step of the optimizer is projected. Something else moves it: an optimizer that "
                    "steps in the backward pass or exchanges weights in eval(), or a callback. Leave that out."
                )

    def fixed(self, named_parameters: NamedParameters) -> list[Tensor]:
        """Return the parameters that no step moves: those with a basis of full rank that cuts, and not only shrinks, steps.

        With `apply_to="gradient"` there are none.

        Raises:
            ValueError: a basis whose parameter is missing.
        """
        return [
            parameter
            for _, parameter, bases in self._protected(named_parameters)
            if self.apply_to != "gradient"
            and any(basis.full and name not in self.strength for name, basis in bases.items())
        ]

    @torch.no_grad()
    def project_gradients_(self, named_parameters: NamedParameters) -> None:
        """Replace each protected parameter's gradient g by `g (I - M M^T)`, in place.

        Raises:
            ValueError: a basis whose parameter is missing.
        """
        for name, parameter, bases in self._protected(named_parameters):
            if parameter.grad is not None and any(basis.rank for basis in bases.values()):
                gradient = _local(parameter.grad)
                device = float64_device(gradient.device)
                gradient.copy_(self._project(bases, name, gradient.to(device).to(torch.float64)))

    @torch.no_grad()
    def note_values_(self, named_parameters: NamedParameters) -> None:
        """Remember values before a step, of the parameters whose steps are shrunk."""
        if self.strength:
            self._before = {
                name: _local(parameter).detach().clone()
                for name, parameter, bases in self._protected(named_parameters)
                if self.strength.keys() & bases.keys()
            }

    def _project(self, bases: dict[str, Basis], name: str, tensor: Tensor) -> Tensor:
        return _project_all(bases, name, tensor, self.strength)

    def start(self, name: str) -> Tensor:
        """Return the value that the parameter had at the task's start.

        Raises:
            RuntimeError: `anchor` has not been called since the bases were set.
        """
        if name not in self._anchors:
            raise RuntimeError(f"{name} has no anchor: call anchor(named_parameters) at the task's start.")
        return self._anchors[name]

    def _protected(self, named_parameters: NamedParameters) -> Iterator[tuple[str, Tensor, dict[str, Basis]]]:
        """Yield each protected parameter once: its name, itself, and its bases by their own names."""
        parameters = dict(named_parameters)
        found: dict[str, dict[str, Basis]] = {}
        for key, basis in self.bases.items():
            name = key if key in parameters else key.removesuffix(TRANSPOSED)
            if name not in parameters:  # otherwise a wrapper's prefix, for example, would leave it unprotected
                raise ValueError(
                    f"no parameter is named {name!r}, which has a basis: the parameters given are "
                    f"{', '.join(sorted(parameters)) or 'none'}."
                )
            found.setdefault(name, {})[key] = basis
        for name, bases in found.items():
            yield name, parameters[name], bases

    def attach(self, optimizer: Optimizer, named_parameters: Callable[[], NamedParameters]) -> Hooks:
        """Project at every step of `optimizer` from now on.

        Hooks of the optimizer see gradients after accumulation, unscaling and clipping, and do not run for steps that
        a gradient scaler skips.

        Args:
            optimizer: any torch optimizer (not a wrapper of one).
            named_parameters: called at every step, because sharding may swap parameter objects.

        Returns:
            A handle, whose `remove()` detaches the projector.
        """
        hooks = []
        if self.apply_to != "update":
            hooks.append(optimizer.register_step_pre_hook(lambda *_: self.project_gradients_(named_parameters())))
        if self.apply_to != "gradient":
            hooks.append(optimizer.register_step_pre_hook(lambda *_: self.note_values_(named_parameters())))
            hooks.append(optimizer.register_step_post_hook(lambda *_: self.project_updates_(named_parameters())))
        return Hooks(hooks)


def _project_all(bases: dict[str, Basis], name: str, tensor: Tensor, strengths: dict[str, Tensor]) -> Tensor:
    """Return the part of `tensor`, shaped like parameter `name`, that each of its bases leaves, by its strength."""
    for key, basis in bases.items():
        oriented, strength = _transposed(tensor, key != name), strengths.get(key)
        rows = basis.project(oriented.reshape(*basis.batch_shape, -1, basis.dim), strength)
        full = basis.ranks == basis.dim  # exactly zero there, but for rounding
        if strength is not None:
            full = torch.zeros_like(full)
        tensor = _transposed(rows.masked_fill(full[..., None, None], 0).reshape(oriented.shape), key != name)
    return tensor


def _hold_norm(bases: dict[str, Basis], name: str, start: Tensor, moved: Tensor) -> Tensor:
    """Return `moved`, changed inside the null space so that each row of `start + moved` has the norm of `start`'s row.

    A row is k = k_par + k_perp. Its protected part k_par is that of the start, so |k| stays the same if |k_perp| does.
    """
    before = _project_all(bases, name, start, {})
    after = before + moved
    held, norm = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, after * (held / norm.clamp_min(torch.finfo(norm.dtype).tiny)), before) - before


def _transposed(tensor: Tensor, swap: bool) -> Tensor:
    return tensor.mT if swap else tensor


def _fits(shape: tuple[int, ...], basis: Basis) -> bool:
    """Return whether the first dimensions are the basis's batch and the last, one or several, multiply to its n."""
    batch = len(basis.batch_shape)
    return shape[:batch] == basis.batch_shape and any(
        torch.Size(shape[i:]).numel() == basis.dim for i in range(batch, len(shape))
    )


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    # shards of dimension 0 can be projected one by one: the projection acts on the last dimensions
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
