"""Hold orthonormal bases of the protected directions, and extend them from task to task by the energy rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import check_energy
from .moments import FrequentDirections, SecondMoment

EPS = torch.finfo(torch.float64).eps
SINGLE = 2**20  # a basis with more values than this, 8 MB, is kept and saved in single precision
HALVED = (
    2**24
)  # and one with more than this, 64 MB then, by the complements of those spans that are more than half of all


class Basis:
    """Orthonormal columns M that span the protected directions of one parameter.

    A large basis is kept in single precision, without the columns that an entry of its batch does not use; arithmetic is in
    double precision, one entry at a time. Where a span takes up more than half of the n dimensions, `extend` may keep an
    orthonormal basis N of its complement instead: `I - M M^T = N N^T`.

    Args:
        columns: `(*batch, n, r)`; each column has norm 1, or is zero where the ranks within a batch differ.
        complement: for each entry of the flattened batch, whether its columns are N instead; None for none.

    Attributes:
        ranks: number of columns in use, `(*batch)`.

    Raises:
        ValueError: columns that are not orthonormal, or have fewer than two dimensions; not one flag for each entry.
    """

    def __init__(self, columns: Tensor, complement: Sequence[bool] | None = None) -> None:
        if columns.ndim < 2:
            raise ValueError(f"columns of shape {tuple(columns.shape)}: expected (*batch, n, r).")
        columns = columns.detach()
        self._shape = tuple(columns.shape)
        self._dense: Tensor | None = None
        self._entries: list[Tensor] = []
        self._inverse: list[bool] = []
        if complement is not None or (is_large(columns) and columns.dtype == torch.float32):
            # the entries are counted, since columns of none, all of whose complements are empty, leave no -1 to infer
            count = torch.Size(self.batch_shape).numel()
            self._keep(list(columns.reshape(count, *columns.shape[-2:]).to(torch.float32)), complement)
            return
        self._dense = columns = columns.to(torch.float64)
        self.ranks = _count(columns)
        self._check(_error(columns, self.ranks))

    @classmethod
    def _of_entries(
        cls, entries: list[Tensor], batch_shape: tuple[int, ...], complement: Sequence[bool] | None = None
    ) -> Basis:
        """Return a large basis of the entries of its flattened batch, `(n, r)` each, in single precision."""
        basis = cls.empty(len(entries[0]))
        basis._shape, basis._dense = (*batch_shape, len(entries[0]), 0), None
        basis._keep(entries, complement)
        return basis

    def _keep(self, entries: list[Tensor], complement: Sequence[bool] | None) -> None:
        ranks, dim = [], self._shape[-2]
        self._inverse = [False] * len(entries) if complement is None else list(complement)
        if len(self._inverse) != len(entries):
            raise ValueError(
                f"complement has {len(self._inverse)} flags: expected one for each of {len(entries)} entries."
            )
        for entry, inverse in zip(entries, self._inverse, strict=True):
            wide = entry.to(torch.float64)
            count = _count(wide)
            self._check(_error(wide, count))
            trim = int(count) < entry.shape[1] and (self.batch_shape or inverse)
            self._entries.append(entry[:, : int(count)].clone() if trim else entry)
            ranks.append(dim - count if inverse else count)
        self.ranks = torch.stack(ranks).reshape(self.batch_shape)
        rank = int(self.ranks.max()) if any(self._inverse) else max(entry.shape[1] for entry in entries)
        self._shape = *self.batch_shape, dim, rank

    def _check(self, error: Tensor) -> None:
        if error.numel() and not error.max() < 1e-4:  # `not <` catches NaN as well
            raise ValueError(
                f"columns of shape {self._shape} are not orthonormal (|M^T M - I| up to {error.max():.1e}, "
                "allowed 1e-4; unused columns are zero and come last): orthonormalise them, for example with torch.linalg.qr."
            )

    @classmethod
    def empty(cls, dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None) -> Basis:
        """Return a basis of rank 0 in n=`dim` dimensions: nothing is protected yet."""
        return cls(torch.zeros(*batch_shape, dim, 0, dtype=torch.float64, device=device))

    @property
    def columns(self) -> Tensor:
        """Return M, `(*batch, n, r)`: in float64, or of a large basis in float32, put together anew."""
        if self._dense is not None:
            return self._dense
        if not self.batch_shape and not any(self._inverse):
            return self._entries[0]
        found = [self._spanning(i) for i in range(len(self._entries))]
        return torch.stack([_padded(entry, self.rank) for entry in found]).reshape(self._shape)

    def _spanning(self, index: int) -> Tensor:
        """Return M of one entry of a large basis, without unused columns."""
        entry = self._entries[index]
        return _complement(entry.to(torch.float64)).to(entry) if self._inverse[index] else entry

    @property
    def stored(self) -> tuple[Tensor, list[bool] | None]:
        """Return the arguments that the same basis is made of: columns, and which of the entries hold their complement's."""
        if not any(self._inverse):
            return self.columns, None
        width = max(entry.shape[1] for entry in self._entries)
        held = torch.stack([_padded(entry, width) for entry in self._entries])
        return held.reshape(*self._shape[:-1], width), list(self._inverse)

    @property
    def dim(self) -> int:
        """Return the length n of a row."""
        return self._shape[-2]

    @property
    def rank(self) -> int:
        """Return the largest rank within the batch."""
        return self._shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the leading dimensions of independent bases."""
        return self._shape[:-2]

    @property
    def device(self) -> torch.device:
        """Return the device that holds the columns."""
        return self.ranks.device

    @property
    def nbytes(self) -> int:
        """Return the bytes that the columns take."""
        return sum(m.nbytes for m in (self._entries if self._dense is None else [self._dense]))

    @property
    def may_halve(self) -> bool:
        """Return whether some rank makes the basis so large that `extend` may keep complements."""
        return self.ranks.numel() * self.dim**2 > HALVED

    @property
    def full(self) -> bool:
        """Return whether every direction is protected, so that the parameter cannot move any more."""
        return bool((self.ranks == self.dim).all())

    def to(self, device: torch.device | str) -> Basis:
        """Return the basis on another device, or itself if it is there already."""
        if self.device == torch.device(device):
            return self
        if self._dense is not None:
            return Basis(self._dense.to(device))
        return Basis._of_entries([entry.to(device) for entry in self._entries], self.batch_shape, self._inverse)

    def lengthened(self, count: int) -> Basis:
        """Return the basis with more entries along its first dimension, of rank 0."""
        if any(self._inverse):
            fresh = [self._entries[0].new_zeros(self.dim, 0)] * (torch.Size(self.batch_shape[1:]).numel() * count)
            shape = self.batch_shape[0] + count, *self.batch_shape[1:]
            return Basis._of_entries([*self._entries, *fresh], shape, [*self._inverse, *[False] * len(fresh)])
        return Basis(torch.cat([self.columns, self.columns.new_zeros(count, *self._shape[1:])]))

    def entry(self, index: int) -> Tensor:
        """Return M of one entry of the flattened batch, `(n, r)`, in float64."""
        if self._dense is None:
            return _padded(self._spanning(index).to(torch.float64), self.rank)
        return self._dense.reshape(torch.Size(self.batch_shape).numel(), *self._shape[-2:])[index]

    def project(self, rows: Tensor, strength: Tensor | None = None) -> Tensor:
        """Return the part of `rows` `(*batch, N, n)` that lies in the null space, `z - (z M) M^T`.

        With a `strength` `(*batch, r)`, take only this share of each column's part away, `z - (z M) diag(s) M^T`. The
        factors are applied one after the other: 2 N n r multiplications instead of the dense projector's N n^2,
        which is less for r < n/2.
        """
        if self._dense is not None:
            return _project(rows, self._dense.to(rows), strength)
        if strength is not None and any(self._inverse):
            raise ValueError("a basis that is kept by its complement has no columns that a strength could be of.")
        if not self.batch_shape and not any(self._inverse):
            return _project(rows, self._entries[0].to(rows), strength)
        flat = rows.expand(*self.batch_shape, *rows.shape[-2:]).reshape(-1, *rows.shape[-2:])
        left = flat.clone()
        strengths = None if strength is None else strength.reshape(-1, self.rank)
        width = self.rank
        if any(self._inverse):
            width = max(0 if own else m.shape[1] for m, own in zip(self._entries, self._inverse, strict=True))
        wide = rows.new_empty(1, self.dim, width)  # one for all entries, in turn
        for i, (entry, inverse) in enumerate(zip(self._entries, self._inverse, strict=True)):
            if inverse:
                own = entry.to(rows)
                left[i] = (flat[i] @ own) @ own.mT
            elif rank := entry.shape[1]:  # as a batch of one, which gives the same bits as within the whole batch
                wide[0, :, :rank], wide[0, :, rank:] = entry, 0
                left[i : i + 1] = _project(flat[i : i + 1], wide, None if strengths is None else strengths[i : i + 1])
        return left.reshape(*self.batch_shape, *rows.shape[-2:])

    def captured(self, moment: SecondMoment | FrequentDirections) -> Tensor:
        """Return the share of the moment's energy inside the span, `tr(M^T C M) / tr C`, `(*batch)`."""
        inside = moment.inside(self.columns.to(moment.device, torch.float64))
        return (inside / moment.total.clamp_min(torch.finfo(torch.float64).tiny)).to(self.device)

    @torch.no_grad()
    def extend(self, moment: SecondMoment | FrequentDirections, energy: float, halve: bool = False) -> Basis:
        """Extend the basis by the fewest directions that bring its share of the new task's energy to `energy`.

        GPM's rule (Saha et al., 2021, Eqs. 8 and 9) on second moments: with `E = tr C` and the residual
        `C^ = (I - M M^T) C (I - M M^T) = V diag(l) V^T`, l descending,

            r = min { r : tr(M^T C M) + l_1 + ... + l_r >= energy * E },    M <- [M, V_1 .. V_r].

        Existing columns are kept as they are, so the rank never falls. Of a complement's basis N, with the eigenvectors V of
        `N^T C N`, what remains is `N <- N [V_r+1 .. V_n]`, which spans a part of what it did.

        Args:
            moment: second moment of the finished task, or a sketch of it, with the batch shape and dimension of this
                basis. With a sketch that had to shrink, either `energy` is certainly reached, at the price of a few
                more directions, or everything that the sketch holds is protected, and every other direction has at
                most the share 1 / `sketch.size`.
            energy: share in (0, 1]; 1 protects every direction that was seen, up to float64 rounding (a direction
                counts as seen above `max(n, rows) * eps` of the energy, the bound of numpy's matrix_rank).
            halve: keep a very large basis by complements, where those are smaller; entries that are stay so in any case.

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
        total, ranks = moment.total.flatten().tolist(), self.ranks.flatten().tolist()
        inside = self._inside(moment)
        extended: list[Tensor] = []
        inverse = list(self._inverse) or [False] * len(total)
        large, highest = any(inverse), self.rank
        for i in range(len(total)):
            missing = energy * total[i] - inside[i], noise * total[i]
            if inverse[i]:
                extended.append(_narrowed(self._entries[i].to(moment.device, torch.float64), moment, i, *missing))
                continue
            own = self.entry(i).to(moment.device)[:, : ranks[i]]
            extended.append(_extended(own, moment, i, *missing))
            highest = max(highest, extended[-1].shape[1])
            values = len(total) * self.dim * highest
            if halve and values > HALVED:
                _halve(extended, inverse)
            large = large or values > SINGLE
            if large:  # at once, since all of them in double precision take twice the memory
                extended = [m.to(torch.float32) for m in extended]
        if large:
            return Basis._of_entries([m.to(self.device, torch.float32) for m in extended], self.batch_shape, inverse)
        width = max(m.shape[1] for m in extended)
        padded = torch.stack([_padded(m, width) for m in extended])
        return Basis(padded.reshape(*self.batch_shape, self.dim, width).to(self.device))

    def _inside(self, moment: SecondMoment | FrequentDirections) -> list[float]:
        """Return the energy of each entry's moment that is in its span already."""
        if any(self._inverse) or isinstance(moment, FrequentDirections):
            # one by one: rows are long, and all bases in double precision large
            return [self._inside_one(moment, i) for i in range(self.ranks.numel())]
        found: list[float] = moment.inside(self.columns.to(moment.device, torch.float64)).flatten().tolist()
        return found

    def _inside_one(self, moment: SecondMoment | FrequentDirections, index: int) -> float:
        if not self._inverse or not self._inverse[index]:
            return moment.inside_one(index, self.entry(index).to(moment.device))
        own = self._entries[index].to(moment.device, torch.float64)
        return moment.held_one(index) - moment.inside_one(index, own)

    def __repr__(self) -> str:
        return f"Basis(dim={self.dim}, rank={self.rank}, batch_shape={self.batch_shape})"


def is_large(columns: Tensor) -> bool:
    """Return whether a basis of these columns is kept in single precision."""
    return columns.numel() > SINGLE


def _count(columns: Tensor) -> Tensor:
    """Return the number of columns in use, `(*batch)`."""
    return (columns.square().sum(-2) > 0.5).sum(-1)


def _error(columns: Tensor, ranks: Tensor) -> Tensor:
    """Return how far columns are from orthonormal ones that are followed by zeros."""
    used = torch.arange(columns.shape[-1], device=columns.device) < ranks[..., None]
    return (columns.mT @ columns - torch.diag_embed(used.to(torch.float64))).abs()


def _padded(columns: Tensor, width: int) -> Tensor:
    missing = width - columns.shape[-1]
    return torch.nn.functional.pad(columns, (0, missing)) if missing else columns


def _project(rows: Tensor, columns: Tensor, strength: Tensor | None) -> Tensor:
    inside = rows @ columns
    if strength is not None:
        inside = inside * strength.to(rows)[..., None, :]
    return rows - inside @ columns.mT


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


def _complement(m: Tensor) -> Tensor:
    """Return orthonormal columns `(n, n - r)` of what is orthogonal to those of M `(n, r)`."""
    whole: Tensor = torch.linalg.qr(m, mode="complete").Q
    return whole[:, m.shape[1] :]


def _halve(entries: list[Tensor], inverse: list[bool]) -> None:
    """Replace entries of more than n / 2 columns by their complements, and note which, both in place."""
    for i, m in enumerate(entries):
        if not inverse[i] and 2 * m.shape[1] > m.shape[0]:
            entries[i], inverse[i] = _complement(m.to(torch.float64)), True


def _narrowed(
    n: Tensor, moment: SecondMoment | FrequentDirections, index: int, missing: float, noise: float
) -> Tensor:
    """Take the new directions from a complement's basis N `(n, k)`; the arguments are those of `_extended`."""
    if missing <= noise or not n.shape[1]:
        return n
    values, vectors = moment.within(index, n)
    r = int((values.cumsum(0) < missing - noise).sum()) + 1
    r = min(r, int((values > noise).sum()), n.shape[1])
    left: Tensor = torch.linalg.qr(n @ _complement(vectors[:, :r])).Q
    return left
