"""Second moments, streamed."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Uncentred second moment `C = sum_i z_i z_i^T`, accumulated in float64 over any number of rows.

    Uncentred, because a condition such as `x dp^T = 0` must hold for the mean of x as well, which centring would drop.
    Sums of several processes add up: all-reduce `sum` and `rows`.

    Args:
        dim: length n of a row.
        batch_shape: leading dimensions of independent moments, for example `(layers, heads)`.
        device: where to accumulate (a device without float64, such as MPS, falls to the CPU).

    Attributes:
        sum: `(*batch_shape, n, n)`, float64.
        rows: rows summed so far, per moment.
    """

    def __init__(self, dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: a row needs at least one element.")
        self.sum = torch.zeros(*batch_shape, dim, dim, dtype=torch.float64, device=float64_device(device))
        self.rows = 0

    @property
    def dim(self) -> int:
        return self.sum.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.sum.shape[:-2])

    @torch.no_grad()
    def update(self, rows: Tensor) -> SecondMoment:
        """Add rows of shape `(*batch_shape, N, n)`, N >= 0.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        expected = (*self.batch_shape, "N", self.dim)
        if rows.ndim != len(expected) or tuple(rows.shape[:-2]) != self.batch_shape or rows.shape[-1] != self.dim:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} do not fit: expected ({', '.join(map(str, expected))}), "
                f"with n={self.dim} the length of a row."
            )
        rows = rows.detach().to(self.sum.device).to(torch.float64)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"rows hold values that are not finite ({int((~torch.isfinite(rows)).sum())} of {rows.numel()}): "
                "the model's inputs or prompts have diverged."
            )
        self.sum += rows.mT @ rows
        self.rows += rows.shape[-2]
        return self


def float64_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the CPU where the device has no float64 (MPS)."""
    device = torch.device("cpu" if device is None else device)
    return torch.device("cpu") if device.type == "mps" else device
