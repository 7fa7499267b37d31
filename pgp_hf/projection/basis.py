"""Orthonormal bases of the protected directions, and the energy rule that grows them from task to task."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import check_energy
from .moments import SecondMoment

EPS = torch.finfo(torch.float64).eps


class Basis:
    """Orthonormal columns M that span the protected directions of one parameter.

    Args:
        columns: `(*batch, n, r)`; each column has norm 1, or is zero where the ranks within a batch differ.

    Attributes:
        columns: the same, float64.
        ranks: `(*batch)`, number of columns in use.
    """

    def __init__(self, columns: Tensor) -> None:
        if columns.ndim < 2:
            raise ValueError(f"columns of shape {tuple(columns.shape)}: expected (*batch, n, r).")
        self.columns = columns.detach().to(torch.float64)
        self.ranks = (self.columns.square().sum(-2) > 0.5).sum(-1)
        used = torch.arange(columns.shape[-1], device=columns.device) < self.ranks[..., None]
        error = (self.columns.mT @ self.columns - torch.diag_embed(used.to(torch.float64))).abs()
        if error.numel() and not error.max() < 1e-4:  # `not <` also catches NaN
            raise ValueError(
                f"columns of shape {tuple(columns.shape)} are not orthonormal (|M^T M - I| up to {error.max():.1e}, "
                "allowed 1e-4; unused columns are zero and come last): orthonormalise them, for example by torch.linalg.qr."
            )

    @classmethod
    def empty(cls, dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None) -> Basis:
        """A basis of rank 0 in n=`dim` dimensions: nothing is protected yet."""
        return cls(torch.zeros(*batch_shape, dim, 0, dtype=torch.float64, device=device))

    @property
    def dim(self) -> int:
        return self.columns.shape[-2]

    @property
    def rank(self) -> int:
        """Largest rank within the batch."""
        return self.columns.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.columns.shape[:-2])

    @property
    def full(self) -> bool:
        """True when every direction is protected: the parameter cannot move any more."""
        return bool((self.ranks == self.dim).all())

    def to(self, device: torch.device | str) -> Basis:
        return Basis(self.columns.to(device))

    def project(self, rows: Tensor) -> Tensor:
        """Part of `rows` that lies in the null space: `z - (z M) M^T`, for rows `(*batch, N, n)`.

        Applied in factors: 2 N n r multiplications instead of N n^2 for the dense projector (less below r = n/2).
        """
        columns = self.columns.to(rows)
        return rows - (rows @ columns) @ columns.mT

    def captured(self, moment: SecondMoment) -> Tensor:
        """Share of the moment's energy inside the span, `tr(M^T C M) / tr C`, shape `(*batch)`."""
        c = moment.sum.to(self.columns.device)
        inside = (self.columns * (c @ self.columns)).sum((-2, -1))
        return inside / c.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)

    @torch.no_grad()
    def extend(self, moment: SecondMoment, energy: float) -> Basis:
        """The basis grown by the fewest directions that bring its share of the new task's energy to `energy`.

        GPM's rule (Saha et al., 2021, Eqs. 8 and 9) on second moments: with `E = tr C` and the residual
        `C^ = (I - M M^T) C (I - M M^T) = V diag(l) V^T`, l descending,

            r = min { r : tr(M^T C M) + l_1 + ... + l_r >= energy * E },    M <- [M, V_1 .. V_r].

        The columns there already are stay as they are, so the rank never falls.

        Args:
            moment: second moment of the finished task, of this basis's batch shape and dimension.
            energy: share in (0, 1]; 1 protects every direction that was seen, up to float64 rounding (a direction
                counts as seen above `max(n, rows) * eps` of the energy, the bound that numpy's matrix_rank uses).

        Raises:
            ValueError: shapes that differ, or an energy outside (0, 1].
        """
        check_energy("energy", energy)
        if (moment.batch_shape, moment.dim) != (self.batch_shape, self.dim):
            raise ValueError(
                f"moment of shape {tuple(moment.sum.shape)} does not fit a basis of shape {tuple(self.columns.shape)}: "
                f"expected {(*self.batch_shape, self.dim, self.dim)}."
            )
        noise = max(self.dim, moment.rows) * EPS  # constant rows round the same way each time
        moments = moment.sum.to(self.columns.device).reshape(-1, self.dim, self.dim)
        columns = self.columns.reshape(len(moments), self.dim, self.rank)
        grown = [
            _extend(m[:, :rank], c, energy, noise)
            for m, rank, c in zip(columns, self.ranks.flatten().tolist(), moments, strict=True)
        ]
        width = max(m.shape[1] for m in grown)
        padded = [torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in grown]
        return Basis(torch.stack(padded).reshape(*self.batch_shape, self.dim, width))

    def __repr__(self) -> str:
        return f"Basis(dim={self.dim}, rank={self.rank}, batch_shape={self.batch_shape})"


def _extend(m: Tensor, c: Tensor, energy: float, noise: float) -> Tensor:
    """One basis `(n, r)` grown for one moment `(n, n)`, `noise` the relative rounding; see `Basis.extend`."""
    total = c.trace()
    noise = noise * total  # what rounding leaves of a zero eigenvalue
    missing = energy * total - (m * (c @ m)).sum() - noise
    if total <= 0 or missing <= 0:
        return m
    residual = c - m @ (m.mT @ c)
    residual = residual - (residual @ m) @ m.mT
    values, vectors = torch.linalg.eigh((residual + residual.mT) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    r = int((values.cumsum(0) < missing).sum()) + 1
    r = min(r, int((values > noise).sum()), m.shape[0] - m.shape[1])
    new = vectors[:, :r]
    for _ in range(2):  # twice is enough: eigenvectors of small values may lean into M
        new = torch.linalg.qr(new - m @ (m.mT @ new)).Q
    return torch.cat([m, new], dim=1)
