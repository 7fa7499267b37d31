"""Accumulate second moments of a stream of rows: in full, or as a sketch of bounded size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SKETCH = 512  # rows that a sketch keeps when it shrinks; it holds up to twice that number


class SecondMoment:
    """An uncentred second moment `C = sum_i z_i z_i^T`, accumulated in float64 over any number of rows.

    It is uncentred because a condition such as `x dp^T = 0` must hold for the mean of x as well, which centring would
    drop.

    Args:
        dim: length n of a row.
        batch_shape: leading dimensions of independent moments, for example `(layers, heads)`.
        device: where to accumulate; the CPU for a device without float64, such as MPS.
        fused: add products in place, without rounding them first, which takes a quarter of the time for long rows.

    Attributes:
        sum: C, `(*batch_shape, n, n)`, float64.
        rows: number of rows summed so far, per moment.

    Raises:
        ValueError: a `dim` below 1.
    """

    def __init__(
        self,
        dim: int,
        batch_shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        fused: bool = False,
    ) -> None:
        _check_dim(dim)
        self.fused = fused
        self.sum = torch.zeros(*batch_shape, dim, dim, dtype=torch.float64, device=float64_device(device))
        self.rows = 0

    @property
    def dim(self) -> int:
        """Return the length n of a row."""
        return self.sum.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the leading dimensions of independent moments."""
        return tuple(self.sum.shape[:-2])

    @property
    def device(self) -> torch.device:
        """Return the device that accumulates."""
        return self.sum.device

    @property
    def total(self) -> Tensor:
        """Return the energy `tr C`, `(*batch_shape)`."""
        return self.sum.diagonal(dim1=-2, dim2=-1).sum(-1)

    @torch.no_grad()
    def update(self, rows: Tensor) -> SecondMoment:
        """Add rows of shape `(*batch_shape, N, n)`, N >= 0.

        Raises:
            ValueError: rows of another shape, or values that are not finite.
        """
        rows = _checked(rows, self)
        if self.fused:
            flat = rows.reshape(-1, *rows.shape[-2:])
            self.sum.view(-1, self.dim, self.dim).baddbmm_(flat.mT, flat)
        else:
            self.sum += rows.mT @ rows
        self.rows += rows.shape[-2]
        return self

    def merge(self, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add what the other processes of a data-parallel run have summed; `gather` is not needed here."""
        self.sum = reduce(self.sum)
        self.rows = int(reduce(torch.tensor(self.rows, device=self.device)))

    def inside(self, columns: Tensor) -> Tensor:
        """Return the energy in the span of orthonormal columns M `(*batch_shape, n, r)`, `tr(M^T C M)`."""
        return (columns * (self.sum @ columns)).sum((-2, -1))

    def inside_one(self, index: int, columns: Tensor) -> float:
        """Return the same for one moment of the flattened batch and its columns `(n, r)`."""
        return float((columns * (self._one(index) @ columns)).sum())

    def held_one(self, index: int) -> float:
        """Return the energy that `inside_one` finds in all dimensions."""
        return float(self._one(index).trace())

    def _one(self, index: int) -> Tensor:
        return self.sum.reshape(-1, self.dim, self.dim)[index]

    def along(self, columns: Tensor) -> Tensor:
        """Return the energy along each column, `(*batch_shape, r)`."""
        return (columns * (self.sum @ columns)).sum(-2)

    def residual(self, index: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues `(k,)`, descending, and eigenvectors `(n, k)` of `(I - M M^T) C (I - M M^T)`.

        Args:
            index: position of the moment in the flattened batch.
            columns: M, `(n, r)`.
        """
        c = self._one(index)
        c = c - columns @ (columns.mT @ c)
        c = c - (c @ columns) @ columns.mT
        values, vectors = torch.linalg.eigh((c + c.mT) / 2)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def within(self, index: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues `(k,)`, descending, and eigenvectors `(r, k)` of `N^T C N`.

        Args:
            index: position of the moment in the flattened batch.
            columns: N, orthonormal, `(n, r)`.
        """
        c = columns.mT @ self._one(index) @ columns
        values, vectors = torch.linalg.eigh((c + c.mT) / 2)
        return values.flip(0).clamp_min(0), vectors.flip(1)


class FrequentDirections:
    """A second moment in bounded memory: Frequent Directions (Liberty, KDD 2013), with `SecondMoment`'s interface.

    Of the rows A `(N, n)` it holds B, at most `2 l` rows. As long as no more than `2 l` rows other than zero have
    come, B is A and everything is exact. After that, whenever B is full, it is replaced by `l` rows: with singular
    values s and right singular vectors V of B, row i becomes `sqrt(max(s_i^2 - s_{l+1}^2, 0)) v_i`. The loss is at
    most

        0 <= A^T A - B^T B <= |A|_F^2 / l    (as quadratic forms; Liberty's Theorem 1),

    and nothing at all when the rows have rank `l` or less. `total` is |A|_F^2 exactly, so that the share of energy
    that B attributes to a direction never exceeds its true share. The blocks that are shrunk depend only on the order
    of the rows, not on how they are cut into batches. Several processes each sketch a part of the rows: they agree
    with one process to rounding as long as nothing is shrunk, and within the bound after that.

    Args:
        dim: length n of a row.
        batch_shape: leading dimensions of independent sketches.
        device: where to hold the rows; the CPU for a device without float64.
        size: l, `SKETCH` by default.

    Attributes:
        held: B of each sketch of the flattened batch, `(k, n)`, float64.
        rows: number of rows seen so far, per sketch, zeros included.
        exact: False once a row had to be shrunk.

    Raises:
        ValueError: a `dim` below 1.
    """

    def __init__(
        self,
        dim: int,
        batch_shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        size: int | None = None,
    ) -> None:
        _check_dim(dim)
        self.dim, self.batch_shape, self.size = dim, tuple(batch_shape), SKETCH if size is None else size
        self.device, self.rows, self.exact = float64_device(device), 0, True
        count = torch.Size(batch_shape).numel()
        self.held = [torch.zeros(0, dim, dtype=torch.float64, device=self.device) for _ in range(count)]
        self._total = torch.zeros(count, dtype=torch.float64, device=self.device)

    @property
    def total(self) -> Tensor:
        """Return the energy |A|_F^2 of all rows seen, `(*batch_shape)`."""
        return self._total.reshape(self.batch_shape)

    @torch.no_grad()
    def update(self, rows: Tensor) -> FrequentDirections:
        """Add rows of shape `(*batch_shape, N, n)`, N >= 0.

        Raises:
            ValueError: rows of another shape, or values that are not finite.
        """
        rows = _checked(rows, self)
        for index, new in enumerate(rows.reshape(len(self.held), -1, self.dim)):
            self._total[index] += new.square().sum()
            self._append(index, new)
        self.rows += rows.shape[-2]
        return self

    @torch.no_grad()
    def merge(self, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor] | None) -> None:
        """Add the rows of the other processes; a sketch of sketches keeps the bound.

        Args:
            reduce: sums a tensor over the processes.
            gather: concatenates tensors of equal shape along dimension 0, in the order of the processes.

        Raises:
            ValueError: no `gather`.
        """
        if gather is None:
            raise ValueError("a sketch is merged by the rows of all processes: pass gather as well as reduce.")
        self._total = reduce(self._total)
        self.rows = int(reduce(torch.tensor(self.rows, device=self.device)))
        shrunk = gather(torch.tensor([not self.exact], dtype=torch.int64, device=self.device))
        lengths = torch.tensor([[len(held) for held in self.held]], device=self.device)
        for index, longest in enumerate(gather(lengths).amax(0).tolist()):
            if longest:  # padded with zeros, because gather needs equal shapes
                held = self.held[index]
                rows = gather(torch.nn.functional.pad(held, (0, 0, 0, longest - len(held))))
                self.held[index] = held[:0]
                self._append(index, rows)
        self.exact = self.exact and not shrunk.any()

    def inside(self, columns: Tensor) -> Tensor:
        """Return a lower bound of the energy in the span of orthonormal columns `(*batch_shape, n, r)`."""
        columns = columns.reshape(len(self.held), *columns.shape[-2:])
        found = [self.inside_one(index, m) for index, m in enumerate(columns)]
        return torch.tensor(found, dtype=torch.float64, device=self.device).reshape(self.batch_shape)

    def inside_one(self, index: int, columns: Tensor) -> float:
        """Return the same for one sketch of the flattened batch and its columns `(n, r)`."""
        return float((self.held[index] @ columns).square().sum())

    def held_one(self, index: int) -> float:
        """Return the energy that `inside_one` finds in all dimensions, of one sketch of the flattened batch."""
        return float(self.held[index].square().sum())

    def along(self, columns: Tensor) -> Tensor:
        """Return a lower bound of the energy along each column, `(*batch_shape, r)`."""
        flat = columns.reshape(len(self.held), *columns.shape[-2:])
        found = [(b @ m).square().sum(0) for b, m in zip(self.held, flat, strict=True)]
        return torch.stack(found).reshape(*self.batch_shape, columns.shape[-1])

    def residual(self, index: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors as `SecondMoment.residual` does; k is the number of rows, at most n."""
        rows = self.held[index]
        for _ in range(2):
            rows = rows - (rows @ columns) @ columns.mT
        _, s, v = torch.linalg.svd(rows, full_matrices=False)
        return s.square(), v.mT

    def within(self, index: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors as `SecondMoment.within` does; k is the number of rows, at most r."""
        _, s, v = torch.linalg.svd(self.held[index] @ columns, full_matrices=False)
        return s.square(), v.mT

    def _append(self, index: int, rows: Tensor) -> None:
        """Append rows to those held, except zeros, which stem from padding and unselected entries."""
        held = torch.cat([self.held[index], rows[rows.any(-1)]])
        while len(held) > 2 * self.size:
            held = torch.cat([self._shrunk(held[: 2 * self.size]), held[2 * self.size :]])
        self.held[index] = held

    def _shrunk(self, rows: Tensor) -> Tensor:
        """Return the `l` rows that replace `2 l`."""
        # U^T B = S V^T: the Gram matrix of the rows is enough, and smaller than B
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        values, vectors = values[-self.size - 1 :], vectors[:, -self.size :]
        lost, kept = values[0].clamp_min(0), values[1:]
        self.exact = False
        scale = (1 - lost / kept).clamp_min(0).sqrt().nan_to_num(0)
        shrunk: Tensor = scale[:, None] * (vectors.mT @ rows)
        return shrunk


def second_moment(
    dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None, fused: bool = False
) -> SecondMoment | FrequentDirections:
    """Return whichever takes less memory: a sketch for n above `2 * SKETCH`, otherwise the full moment."""
    if dim > 2 * SKETCH:
        return FrequentDirections(dim, batch_shape, device)
    return SecondMoment(dim, batch_shape, device, fused)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim={dim}: a row needs at least one element.")


def _checked(rows: Tensor, moment: SecondMoment | FrequentDirections) -> Tensor:
    """Return `rows` in float64 on the moment's device, after checking their shape and values."""
    expected = (*moment.batch_shape, "N", moment.dim)
    if rows.ndim != len(expected) or tuple(rows.shape[:-2]) != moment.batch_shape or rows.shape[-1] != moment.dim:
        raise ValueError(
            f"rows of shape {tuple(rows.shape)} do not fit: expected ({', '.join(map(str, expected))}), "
            f"with n={moment.dim} the length of a row."
        )
    rows = rows.detach().to(moment.device).to(torch.float64)
    if not torch.isfinite(rows).all():
        raise ValueError(
            f"rows hold values that are not finite ({int((~torch.isfinite(rows)).sum())} of {rows.numel()}): "
            "the model's inputs or prompts have diverged."
        )
    return rows


def float64_device(device: torch.device | str | None) -> torch.device:
    """Return `device`, or the CPU if the device has no float64 (MPS)."""
    device = torch.device("cpu" if device is None else device)
    return torch.device("cpu") if device.type == "mps" else device
