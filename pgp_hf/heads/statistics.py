"""Classify by class statistics: linear discriminant analysis in closed form, gathered task by task; torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import TEMPERATURES, best_temperature, losses

Total = Callable[[Tensor], Tensor]  # the sum of a tensor over the processes of a data-parallel run

TESTED = 8192  # the images of a task that calibrate on each process: more would change little

EMPTY = (
    "the statistics head knows no class yet: train a task first (the trainer gathers the statistics when a task ends), "
    "or load an adapter that has finished one."
)


class ClassStatistics(nn.Module):
    """Sum up features as counts, means and pooled within-class scatter, and classify by them.

    Linear discriminant analysis with a covariance that all classes share: with n features of d dimensions, n_c of them
    and mean mu_c in class c, and scatter `S = sum_i (x_i - mu_{y_i}) (x_i - mu_{y_i})^T`,

        Sigma = (1 - a) S / n + a tr(S) / (n d) I            a the shrinkage (Friedman 1989; Ledoit and Wolf 2004)
        logit_c(x) = mu_c^T Sigma^-1 x - mu_c^T Sigma^-1 mu_c / 2 + log(n_c / n)

    up to a term that all classes share. That is the log posterior of Gaussian classes, so the softmax gives
    probabilities. A class without features has the logit minus infinity. Where no class has more than one feature, S
    is zero and Sigma is taken to be the identity, so the nearest class mean wins.

    All buffers are float64 and stay so under `to`, `half` and PEFT's casts; they remain on the CPU if the device has no
    float64. Means are subtracted before anything is squared, so features far from zero lose no digits.

    Args:
        num_classes: C; 0 for classes that are all to be added.
        dim: d.
        shrinkage: a, in [0, 1]. Above 0, Sigma has an inverse however few features there are.

    Attributes:
        counts: `(C,)`, int64.
        means: `(C, d)`; zero for a class without features.
        scatter: `(d, d)`.
        calibration: `(T,)`: the cross-entropy of left-out training images at each of `calibration.TEMPERATURES`.

    Raises:
        ValueError: fewer than 0 classes or 1 dimension, a shrinkage outside [0, 1].
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    calibration: Tensor

    def __init__(self, num_classes: int, dim: int, shrinkage: float = 0.1) -> None:
        super().__init__()
        if num_classes < 0 or dim < 1:
            raise ValueError(f"num_classes={num_classes}, dim={dim}: they must be at least 0 and 1.")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage={shrinkage} is outside [0, 1]: it is the weight of the isotropic covariance.")
        self.shrinkage = shrinkage
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(num_classes, dim, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("calibration", torch.zeros_like(TEMPERATURES))
        self._solved: tuple[list[tuple[Tensor, int | None]], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def seen(self) -> Tensor:
        """Return a mask of the classes that have features, `(C,)`, bool."""
        return self.counts > 0

    def fresh(self) -> ClassStatistics:
        """Return empty statistics of the same shape, on the same device."""
        classes, dim = self.means.shape
        return ClassStatistics(classes, dim, self.shrinkage).to(self.means.device)

    def add_classes(self, count: int) -> ClassStatistics:
        """Add classes without features behind those that are there, whose numbers stay as they are."""
        dim = self.means.shape[1]
        self.counts = torch.cat([self.counts, self.counts.new_zeros(count)])
        self.means = torch.cat([self.means, self.means.new_zeros(count, dim)])
        return self

    # ---- accumulation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> ClassStatistics:
        """Add features `(N, d)` with labels `(N,)` in 0..C-1, N >= 0.

        Raises:
            ValueError: other shapes, labels out of range, values that are not finite.
        """
        classes, dim = self.means.shape
        if features.ndim != 2 or features.shape[1] != dim or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)} do not fit: "
                f"expected (N, {dim}) and (N,)."
            )
        labels = labels.to(self.counts.device, torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels in {int(labels.min())}..{int(labels.max())}: expected 0..{classes - 1}.")
        x = features.detach().to(self.means.device).to(torch.float64)
        if not torch.isfinite(x).all():
            raise ValueError(
                f"features hold values that are not finite ({int((~torch.isfinite(x)).sum())} of {x.numel()}): "
                "the model's inputs or prompts have diverged."
            )
        batch = self.fresh()
        batch.counts += torch.bincount(labels, minlength=classes)
        batch.means.index_add_(0, labels, x).div_(batch.counts.clamp(min=1)[:, None])
        x = x - batch.means[labels]
        batch.scatter += x.mT @ x
        return self.merge(batch)

    @torch.no_grad()
    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Add the features that `other` summarises (Chan, Golub and LeVeque 1979).

        A class that `other` lacks keeps its mean to the bit.
        """
        ours, theirs = self.counts.double(), other.counts.to(self.counts.device).double()
        share = theirs / (ours + theirs).clamp(min=1)
        apart = other.means.to(self.means.device) - self.means
        apart[theirs == 0] = 0
        self.scatter += other.scatter.to(self.scatter.device) + apart.mT @ ((ours * share)[:, None] * apart)
        self.means += share[:, None] * apart
        self.counts += other.counts.to(self.counts.device)
        return self

    @torch.no_grad()
    def reduce(self, total: Total) -> ClassStatistics:
        """Replace each process's statistics with those of all processes' features.

        Args:
            total: the sum of a tensor over the processes of a data-parallel run; called three times.
        """
        counts = total(self.counts.clone())
        means = total(self.counts[:, None] * self.means) / counts.clamp(min=1)[:, None]
        apart = self.means - means  # each process's scatter is about its own means
        self.scatter.copy_(total(self.scatter + apart.mT @ (self.counts[:, None] * apart)))
        self.means.copy_(means)
        self.counts.copy_(counts)
        return self

    @torch.no_grad()
    def compensate_drift(self, before: Tensor, after: Tensor, total: Total | None = None) -> ClassStatistics:
        """Move the class means along with the drift, estimated from how the features of other images have moved.

        Images of earlier tasks are gone, but those of the new task went through the model both before and after it.
        With x and x + D their features at these two times and m the mean of x, the movement is fitted by ridge
        regression and applied to each mean,

            D ~ mean(D) + (x - m) A,    A = (S + tr(S) / d I)^-1 sum (x - m)^T (D - mean(D)),    S = sum (x - m)^T (x - m)

        a linear form of semantic drift compensation (Yu et al., CVPR 2020; Gomez-Villa et al., ECCV 2024). Counts and
        scatter stay as they are.

        Args:
            before: features `(N, d)`, N >= 0, from before the new task.
            after: features `(N, d)` of the same images from after it.
            total: the sum of a tensor over the processes of a data-parallel run, each with images of its own.

        Raises:
            ValueError: other shapes, or values that are not finite.
        """
        dim, device = self.means.shape[1], self.means.device
        if before.ndim != 2 or before.shape[1] != dim or before.shape != after.shape:
            raise ValueError(
                f"features of shape {tuple(before.shape)} before and {tuple(after.shape)} after: expected (N, {dim}) twice."
            )
        for when, x in (("before", before), ("after", after)):
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"features {when} hold values that are not finite ({int((~torch.isfinite(x)).sum())} of {x.numel()}): "
                    "the model's inputs or prompts have diverged."
                )

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for pair in zip(before.detach().split(4096), after.detach().split(4096), strict=True):
                x, later = (features.to(device).to(torch.float64) for features in pair)
                yield x, later - x

        total = total or (lambda tensor: tensor)
        # two passes: products of features that are not centred first would lose digits
        sums = torch.zeros(2, dim, dtype=torch.float64, device=device)
        for x, moved in batches():
            sums += torch.stack([x.sum(0), moved.sum(0)])
        count = total(torch.tensor(float(len(before)), dtype=torch.float64, device=device)).clamp(min=1)
        centre, shift = total(sums) / count
        products = torch.zeros(2, dim, dim, dtype=torch.float64, device=device)
        for x, moved in batches():
            products += (x - centre).mT @ torch.stack([x - centre, moved - shift])
        scatter, turn = total(products)
        ridge = scatter.diagonal().mean()  # 0 where all features are the same: then only the mean shift is known
        turn = torch.linalg.solve(scatter + ridge * torch.eye(dim).to(scatter), turn) if ridge > 0 else turn
        self.means[self.seen] += shift + (self.means[self.seen] - centre) @ turn
        return self

    # ---- calibration ---------------------------------------------------------------------------------------------

    @property
    def temperature(self) -> float:
        """Return what logits are to be divided by, so that their softmax is as sure as it is right; 1.0 before `calibrate`.

        Classes are not Gaussian, and a few images each say little about their means: at 1.0, wrong answers get scores near
        1. The order of the classes stays as it is.
        """
        return best_temperature(self.calibration)

    @torch.no_grad()
    def calibrate(self, features: Tensor, labels: Tensor, total: Total | None = None) -> ClassStatistics:
        """Take a new task's images, whose features are part of the statistics, as a test: each is scored without itself.

        Against all classes known so far, their scores say how sure the head may be of any image. The losses of earlier
        tasks, which met fewer classes, count half with each task that follows.

        Args:
            features: `(N, d)`, N >= 0.
            labels: `(N,)`.
            total: the sum of a tensor over the processes of a data-parallel run, each with images of its own.
        """
        known = self.seen.nonzero()[:, 0]
        labels = labels.to(self.counts.device)
        # the only image of a class has nothing else to be recognised by
        tested = (self.counts[labels] > 1).nonzero()[:, 0]
        tested = tested[:: -(-len(tested) // TESTED) or 1]
        curve = torch.zeros_like(self.calibration)
        for part in tested.split(1024):
            scores = self._left_out(features[part.to(features.device)], labels[part])
            curve += losses(scores[:, known], torch.searchsorted(known, labels[part])).to(curve)
        self.calibration.div_(2).add_(curve if total is None else total(curve))
        return self

    def _left_out(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of images that the statistics hold, `(N, C)`, as they would be without the image itself.

        With r the image's offset from its class mean, leaving it out takes `n_c / (n_c - 1) r r^T` from the scatter, which
        is a change of rank one in Sigma (Sherman and Morrison 1950), and moves the mean by `r / (n_c - 1)`. The trace in
        the shrinkage stays.
        """
        counts, whitening = self.counts.double(), self.whitening()
        total, own = counts.sum(), counts[labels, None]
        centre = counts @ self.means / total
        means = (self.means - centre) @ whitening
        x = (features.to(self.means.device).to(torch.float64) - centre) @ whitening
        offset = x - means[labels]
        apart = torch.cdist(x, means).square()  # to the means, and the part of it that lies along the offset
        along = (offset * x).sum(-1, keepdim=True) - offset @ means.mT
        length = offset.square().sum(-1, keepdim=True)
        grown = own / (own - 1)
        apart.scatter_(1, labels[:, None], grown**2 * length)
        along.scatter_(1, labels[:, None], grown * length)
        change = (1 - self.shrinkage) / total * grown
        apart += change / (1 - change * length).clamp(min=1e-6) * along.square()
        return (
            counts.log()
            - apart * (total - 1) / total / 2
            + torch.zeros_like(apart).scatter_(1, labels[:, None], -grown.log())
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load statistics of earlier versions as well, which are not calibrated."""
        state_dict.setdefault(f"{prefix}calibration", torch.zeros_like(TEMPERATURES))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- the classifier ------------------------------------------------------------------------------------------

    @property
    def covariance(self) -> Tensor:
        """Return Sigma, `(d, d)`."""
        identity = torch.eye(len(self.scatter), dtype=self.scatter.dtype, device=self.scatter.device)
        scatter = self.scatter / self.counts.sum().clamp(min=1)
        scale = scatter.diagonal().mean()
        if scale == 0:
            return identity
        return (1 - self.shrinkage) * scatter + self.shrinkage * scale * identity

    def whitening(self) -> Tensor:
        """Return W, `(d, d)`, with `W W^T = Sigma^-1`: the head's distances are Euclidean ones between `x W`.

        Raises:
            ValueError: no class has features, or the buffers are damaged.
        """
        if not int(self.counts.sum()):
            raise ValueError(EMPTY)
        factor = self._factor()
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False).mT

    def _factor(self) -> Tensor:
        """Return the Cholesky factor of Sigma."""
        covariance = self.covariance
        if self.shrinkage == 0 and int(rank := torch.linalg.matrix_rank(covariance, hermitian=True)) < len(covariance):
            raise ValueError(
                f"shrinkage=0 leaves the covariance of {int(self.counts.sum())} features without an inverse (rank "
                f"{int(rank)} in {len(covariance)} dimensions): choose a shrinkage above 0."
            )
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise ValueError("the class statistics are damaged: their covariance is not positive definite.")
        return factor

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight `(C, d)`, bias `(C,)` and centre m `(d,)`, with logits `(x - m) weight^T + bias`.

        m, the mean over all features, changes every class's logit by the same amount and keeps the products small.
        The solution is kept until the buffers change.

        Raises:
            ValueError: no class has features, or the buffers are damaged.
        """
        buffers = self.counts, self.means, self.scatter
        # a tensor's version counts its changes in place; inference tensors have none
        state = [(tensor, None if tensor.is_inference() else tensor._version) for tensor in buffers]
        if self._solved is not None and all(
            tensor is kept and version is not None and version == before
            for (tensor, version), (kept, before) in zip(state, self._solved[0], strict=True)
        ):
            return self._solved[1]
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError(EMPTY)
        share = self.counts.double() / total
        centre = share @ self.means
        means = self.means - centre
        means[~self.seen] = 0
        weight = torch.cholesky_solve(means.mT, self._factor()).mT
        bias = share.log() - (weight * means).sum(-1) / 2
        self._solved = state, (weight, bias, centre)
        return self._solved[1]

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `(N, C)`, float32, of features `(N, d)`; minus infinity for classes without features."""
        weight, bias, centre = self.solve()
        with torch.autocast(device_type=weight.device.type, enabled=False):
            logits = (features.detach().to(weight.device).to(torch.float64) - centre) @ weight.mT + bias
        return logits.to(features.device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassStatistics:
        """Follow the model to another device, but not to another precision."""
        device = fn(torch.empty(0, device=self.means.device)).device
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_solved": None}  # a copy's tensors have version counters of their own


@torch.no_grad()
def gather_task(
    statistics: ClassStatistics,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: Total | None = None,
    *,
    before: Tensor | None = None,
    as_before: Callable[[], Tensor] | None = None,
) -> ClassStatistics:
    """Gather the statistics of one task's images, to be merged into those of the earlier tasks.

    Args:
        statistics: of the earlier tasks. Nothing is merged into them here; with `before`, their means are moved along
            with the drift.
        batches: features `(N, d)` and labels `(N,)` of this process's images, as the trained model sees them.
        total: sums over the processes of a data-parallel run; None for a single process.
        before: features of the same images, in the same order, from before the task; None for no compensation.
        as_before: returns the features of the same images once more, passed through the trained model in the way that
            images of earlier tasks are; called after `batches` is exhausted. None if all images pass in the same way.

    Returns:
        Statistics of this task's images alone, of all processes.
    """
    task, after = statistics.fresh(), []
    for features, labels in batches:
        task.update(features, labels)
        if before is not None and as_before is None:
            after.append(features)
    if before is not None:
        statistics.compensate_drift(before, torch.cat(after) if as_before is None else as_before(), total)
    if total is not None:
        task.reduce(total)
    return task
