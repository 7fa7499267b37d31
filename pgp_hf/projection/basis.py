"""Hold orthonormal bases of the protected directions, and extend them from task to task by the energy rule."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import check_energy
from .moments import FrequentDirections, SecondMoment

EPS = torch.finfo(torch.float64).eps


class Basis:
    """Orthonormal columns M that span the protected directions of one parameter.

    Args:
        columns: `(*batch, n, r)`; each column has norm 1, or is zero where the ranks within a batch differ.

    Attributes:
        columns: the same, in float64.
        ranks: number of columns in use, `(*batch)`.

    Raises:
        ValueError: columns that are not orthonormal, or have fewer than two dimensions.
    """

    def __init__(self, columns: Tensor) -> None:
        if columns.ndim < 2:
            raise ValueError(f"columns of shape {tuple(columns.shape)}: expected (*batch, n, r).")
        self.columns = columns.detach().to(torch.float64)
        self.ranks = (self.columns.square().sum(-2) > 0.5).sum(-1)
        used = torch.arange(columns.shape[-1], device=columns.device) < self.ranks[..., None]
        error = (self.columns.mT @ self.columns - torch.diag_embed(used.to(torch.float64))).abs()
        if error.numel() and not error.max() < 1e-4:  # `not <` catches NaN as well
            raise ValueError(
                f"columns of shape {tuple(columns.shape)} are not orthonormal (|M^T M - I| up to {error.max():.1e}, "
                "allowed 1e-4; unused columns are zero and come last): orthonormalise them, for example with torch.linalg.qr."
            )

    @classmethod
    def empty(cls, dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None) -> Basis:
        """Return a basis of rank 0 in n=`dim` dimensions: nothing is protected yet."""
        return cls(torch.zeros(*batch_shape, dim, 0, dtype=torch.float64, device=device))

    @property
    def dim(self) -> int:
        """Return the length n of a row."""
        return self.columns.shape[-2]

    @property
    def rank(self) -> int:
        """Return the largest rank within the batch."""
        return self.columns.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the leading dimensions of independent bases."""
        return tuple(self.columns.shape[:-2])

    @property
    def full(self) -> bool:
        """Return whether every direction is protected, so that the parameter cannot move any more."""
        return bool((self.ranks == self.dim).all())

    def to(self, device: torch.device | str) -> Basis:
        """Return the basis on another device, or itself if it is there already."""
        return self if self.columns.device == torch.device(device) else Basis(self.columns.to(device))

    def project(self, rows: Tensor, strength: Tensor | None = None) -> Tensor:
        """Return the part of `rows` `(*batch, N, n)` that lies in the null space, `z - (z M) M^T`.

        With a `strength` `(*batch, r)`, take only this share of each column's part away, `z - (z M) diag(s) M^T`. The
        factors are applied one after the other: 2 N n r multiplications instead of the dense projector's N n^2,
        which is less for r < n/2.
        """
        columns = self.columns.to(rows)
        inside = rows @ columns
        if strength is not None:
            inside = inside * strength.to(rows)[..., None, :]
        return rows - inside @ columns.mT

    def captured(self, moment: SecondMoment | FrequentDirections) -> Tensor:
        """Return the share of the moment's energy inside the span, `tr(M^T C M) / tr C`, `(*batch)`."""
        inside = moment.inside(self.columns.to(moment.device))
        return (inside / moment.total.clamp_min(torch.finfo(torch.float64).tiny)).to(self.columns.device)

    @torch.no_grad()
    def extend(self, moment: SecondMoment | FrequentDirections, energy: float) -> Basis:
        """Extend the basis by the fewest directions that bring its share of the new task's energy to `energy`.

        GPM's rule (Saha et al., 2021, Eqs. 8 and 9) on second moments: with `E = tr C` and the residual
        `C^ = (I - M M^T) C (I - M M^T) = V diag(l) V^T`, l descending,

            r = min { r : tr(M^T C M) + l_1 + ... + l_r >= energy * E },    M <- [M, V_1 .. V_r].

        Existing columns are kept as they are, so the rank never falls.

        Args:
            moment: second moment of the finished task, or a sketch of it, with the batch shape and dimension of this
                basis. With a sketch that had to shrink, either `energy` is certainly reached, at the price of a few
                more directions, or everything that the sketch holds is protected, and every other direction has at
                most the share 1 / `sketch.size`.
            energy: share in (0, 1]; 1 protects every direction that was seen, up to float64 rounding (a direction
                counts as seen above `max(n, rows) * eps` of the energy, the bound of numpy's matrix_rank).

        Returns:
            A new basis; this one is unchanged.

        Raises:
            ValueError: shapes that do not agree, or an energy outside (0, 1].
        """
        check_energy("energy", energy)
        if (moment.batch_shape, moment.dim) != (self.batch_shape, self.dim):
            raise ValueError(
                f"moment of shape {(*moment.batch_shape, moment.dim, moment.dim)} does not fit a basis of shape "
                f"{tuple(self.columns.shape)}: expected {(*self.batch_shape, self.dim, self.dim)}."
            )
        noise = max(self.dim, moment.rows) * EPS  # not the root of rows: equal rows are all rounded the same way
        columns = self.columns.to(moment.device)
        inside, total = moment.inside(columns).flatten().tolist(), moment.total.flatten().tolist()
        columns, ranks = columns.reshape(len(total), self.dim, self.rank), self.ranks.flatten().tolist()
        extended = [
            _extended(columns[i, :, : ranks[i]], moment, i, energy * total[i] - inside[i], noise * total[i])
            for i in range(len(total))
        ]
        width = max(m.shape[1] for m in extended)
        padded = [torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in extended]
        return Basis(torch.stack(padded).reshape(*self.batch_shape, self.dim, width).to(self.columns.device))

    def __repr__(self) -> str:
        return f"Basis(dim={self.dim}, rank={self.rank}, batch_shape={self.batch_shape})"


def _extended(
    m: Tensor, moment: SecondMoment | FrequentDirections, index: int, missing: float, noise: float
) -> Tensor:
    """Extend one basis of a batch, see `Basis.extend`.

    Args:
        m: its columns, `(n, r)`.
        moment: of the whole batch.
        index: position of the basis in the flattened batch.
        missing: energy that the new directions must hold.
        noise: energy below which a direction is rounding error.
    """
    if missing <= noise:
        return m
    values, vectors = moment.residual(index, m)
    r = int((values.cumsum(0) < missing - noise).sum()) + 1
    r = min(r, int((values > noise).sum()), m.shape[0] - m.shape[1])
    new = vectors[:, :r]
    for _ in range(2):  # eigenvectors of small eigenvalues may lean into M; twice is enough
        new = torch.linalg.qr(new - m @ (m.mT @ new)).Q
    return torch.cat([m, new], dim=1)
