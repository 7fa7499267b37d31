"""A projection over a stream: statistics while a task ends, bases while the next one trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .config import ProjectionConfig
from .methods import METHODS
from .moments import SecondMoment
from .projector import NullSpaceProjector


class Projection:
    """The projector of a stream and the statistics that grow its bases.

    Args:
        config: what is protected and how.

    Attributes:
        projector: applies the bases of all finished tasks.
        info: per parameter `{"shape", "batch_dims", "rank", "energy", "samples", "rank_per_task"}`.
    """

    def __init__(self, config: ProjectionConfig | None = None) -> None:
        self.config = config or ProjectionConfig()
        self.projector = NullSpaceProjector(apply_to=self.config.apply_to)
        self.info: dict[str, dict[str, Any]] = {}
        self._moments: dict[str, SecondMoment] = {}
        self._energies: dict[str, float] = {}

    @property
    def active(self) -> bool:
        return self.config.method != "none"

    @property
    def bases(self) -> dict[str, Basis]:
        return self.projector.bases

    @property
    def rank(self) -> int:
        """Largest rank over the projected parameters; 0 before the first task has ended."""
        return max((basis.rank for basis in self.bases.values()), default=0)

    @torch.no_grad()
    def observe(self, model: Any, inputs: dict[str, Tensor]) -> None:
        """Add one batch of the finished task to the statistics; the model is in eval mode."""
        if not self.active:
            return
        for name, role, rows in METHODS[self.config.method](model, inputs):
            energy = getattr(self.config, {"prompt": "energy", "key": "key_energy", "value": "value_energy"}[role])
            if energy is None:
                continue
            if name not in self._moments:
                self._moments[name] = SecondMoment(rows.shape[-1], tuple(rows.shape[:-2]), rows.device)
                self._energies[name] = energy
            self._moments[name].update(rows)

    def end_task(
        self,
        shapes: dict[str, tuple[int, ...]],
        reduce: Callable[[Tensor], Tensor] | None = None,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Grow the bases by what was observed since the last call, and forget the statistics.

        Args:
            shapes: shape of each observed parameter.
            reduce: sums a tensor over the processes of a data-parallel run.
            broadcast: the main process's value of a tensor; one process alone decides ranks and eigenvectors, whose
                signs may differ between machines.

        Warns:
            UserWarning: a basis that has become full, which means that its parameter cannot move any more.
        """
        bases = dict(self.bases)
        for name in sorted(self._moments):
            moment, energy = self._moments[name], self._energies[name]
            if reduce is not None:
                moment.sum = reduce(moment.sum)
                moment.rows = int(reduce(torch.tensor(moment.rows, device=moment.sum.device)))
            old = bases.get(name, Basis.empty(moment.dim, moment.batch_shape, moment.sum.device))
            basis = old.to(moment.sum.device).extend(moment, energy)
            if broadcast is not None:
                rank = int(broadcast(torch.tensor(basis.rank, device=moment.sum.device)))
                columns = basis.columns.new_zeros(*basis.columns.shape[:-1], rank)
                keep = min(rank, basis.rank)
                columns[..., :keep] = basis.columns[..., :keep]
                basis = Basis(broadcast(columns))
            if basis.full:
                warnings.warn(
                    f"The basis of {name} has full rank {basis.dim}: the parameter cannot move in later tasks. "
                    f"Lower its energy ({energy}) to keep some plasticity.",
                    stacklevel=2,
                )
            bases[name] = basis
            before = self.info.get(name, {"samples": 0, "rank_per_task": []})
            self.info[name] = {
                "shape": [*basis.batch_shape, torch.Size(shapes[name]).numel() // _block(basis), basis.dim],
                "batch_dims": len(basis.batch_shape),
                "rank": basis.rank,
                "energy": energy,
                "samples": before["samples"] + moment.rows,
                "rank_per_task": [*before["rank_per_task"], basis.rank],
            }
        self.projector.bases = bases
        self._moments, self._energies = {}, {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases by parameter name (contiguous, on the CPU), and a JSON-serialisable description."""
        tensors = {name: basis.columns.cpu().contiguous() for name, basis in self.bases.items()}
        return tensors, {**self.config.to_dict(), **self.info}

    def load_state(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Take over the bases that `state` returned.

        Raises:
            ValueError: bases without a description, not orthonormal, or of another method.
        """
        if description.get("method") != self.config.method:
            raise ValueError(
                f"the saved projection has method={description.get('method')!r}, this one {self.config.method!r}: "
                "use the same method to continue."
            )
        unknown = sorted(set(tensors) - set(description))
        if unknown:
            raise ValueError(f"the projection's description lacks the parameter {unknown[0]!r}, which has a basis.")
        self.projector.bases = {name: Basis(columns) for name, columns in tensors.items()}
        self.info = {name: dict(description[name]) for name in tensors}


def _block(basis: Basis) -> int:
    return basis.dim * torch.Size(basis.batch_shape).numel()
