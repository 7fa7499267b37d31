"""The multi-centroid gate: in the features of a backbone of its own, each task has points that its images come near."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import StreamModel

LEAST_SHARE = 1e-5  # is added to shares, whose logarithm is taken


def match(means: Tensor, centroids: Tensor) -> Tensor:
    """Return a centroid for each class, no two the same, `(n,)`: those for which the sum of `<mean, centroid>` is largest.

    Args:
        means: of the classes' features, `(n, d)`.
        centroids: at least as many, `(k, d)`.
    """
    from scipy.optimize import linear_sum_assignment  # only here: prediction does without, and it takes long to import

    return torch.from_numpy(linear_sum_assignment((means @ centroids.mT).numpy(), maximize=True)[1])


def positives(features: Tensor, labels: Tensor, sizes: Sequence[int], centroids: Sequence[Tensor]) -> Tensor:
    """Return each image's centroid, that which is matched to its class, counted over all tasks, `(B,)`.

    The means are those of the batch; classes without an image in it leave their centroids to others.

    Args:
        features: `(B, d)`.
        labels: positions of the classes in the order in which they came, `(B,)`.
        sizes: number of classes of each task.
        centroids: of each task, `(k_t, d)`.
    """
    features, labels = features.detach().float().cpu(), labels.cpu()
    found, first_class, first = torch.empty_like(labels), 0, 0
    for size, own in zip(sizes, centroids, strict=True):
        classes = torch.unique(labels[(labels >= first_class) & (labels < first_class + size)])
        if len(classes):
            means = torch.stack([features[labels == label].mean(0) for label in classes])
            for label, centroid in zip(classes, match(means, own.detach().float().cpu()), strict=True):
                found[labels == label] = first + centroid
        first_class, first = first_class + size, first + len(own)
    return found


def log_shares(counts: Tensor) -> Tensor:
    """Return the logarithm of each number's share of their sum, `(n,)`."""
    return (counts / counts.sum() + LEAST_SHARE).log()


def task_scores(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return each task's score, that of its best centroid, `(B, T)`.

    Args:
        scores: of all centroids, `(B, K)`.
        sizes: number of centroids of each task.
    """
    return torch.stack([own.amax(-1) for own in torch.split(scores, list(sizes), dim=-1)], -1)


def combine(logits: Tensor, log_weights: Tensor, rule: str) -> Tensor:
    """Return scores with the weights of their experts.

    Args:
        logits: `(B, C)`.
        log_weights: logarithm of the weight of each class's expert, `(B, C)`.
        rule: "multiply" returns `w z`, which raises negative scores where w is small; "log" returns `z + log w`.
    """
    return logits * log_weights.exp() if rule == "multiply" else logits + log_weights


def read_features(model: StreamModel, run: Callable[[], object]) -> Tensor:
    """Return what the head reads while `run` passes images through the model, `(B, d)`, in float32."""
    found: list[Tensor] = []
    watch = model.watch_features(found.append)
    try:
        run()
    finally:
        watch.remove()
    return found[-1].float()


class Gate:
    """Score tasks by centroids, and learn both the centroids and the features that they are in.

    Args:
        per_class: number of centroids for each class of a task, at least 1.

    Attributes:
        backbone: values of the model's parameters except the head's, by name; empty if there is no gate.
        centroids: of each task, `(k_t, d)`.
        weight, bias: map the scores of K centroids to C classes, `(C, K)` and `(C,)`.
    """

    def __init__(self, per_class: float = 1.0) -> None:
        self.per_class = per_class
        self.backbone: dict[str, Tensor] = {}
        self.centroids: list[Tensor] = []
        self.weight, self.bias = torch.zeros(0, 0), torch.zeros(0)

    @property
    def sizes(self) -> list[int]:
        """Return the number of centroids of each task."""
        return [len(own) for own in self.centroids]

    @property
    def head(self) -> list[Tensor]:
        """Return all that learns besides the backbone."""
        return [*self.centroids, self.weight, self.bias]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.backbone = {name: value.to(device) for name, value in self.backbone.items()}
        self.centroids = [own.to(device) for own in self.centroids]
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)

    def grow(self, classes: int, width: int, key: Sequence[int]) -> None:
        """Add a task; what is known of older ones stays as it is.

        Args:
            classes: number of its classes.
            width: d.
            key: integers of which the draws are a function.
        """
        rng, (rows, columns) = np.random.default_rng(key), self.weight.shape
        count = math.ceil(self.per_class * classes)
        drawn = rng.standard_normal((count, width)) / math.sqrt(width)
        bound = 1 / math.sqrt(columns + count)
        wide = rng.uniform(-bound, bound, (rows + classes, columns + count))
        self.centroids.append(torch.from_numpy(drawn).float().to(self.weight.device))
        weight = torch.from_numpy(wide).float().to(self.weight.device)
        weight[:rows, :columns] = self.weight
        self.weight, self.bias = weight, torch.cat([self.bias, self.bias.new_zeros(classes)])

    def scores(self, features: Tensor) -> Tensor:
        """Return `<g(x), m>` for each centroid, `(B, K)`, given g(x), `(B, d)`."""
        return features @ torch.cat(self.centroids).mT

    def loss(self, features: Tensor, labels: Tensor, taught: Tensor, counts: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the loss of a batch, a scalar.

        It is the cross-entropy of each image's centroid, and the divergence of classes, to which the scores are mapped,
        from what the experts say. Both have the frequencies in the training images added to their scores.

        Args:
            features: g(x), `(B, d)`.
            labels: positions of the classes in the order in which they came, `(B,)`.
            taught: the experts' scores in the same order, `(B, C)`.
            counts: number of training images of each class, `(C,)`.
            sizes: number of classes of each task.
        """
        scores, device = self.scores(features), features.device
        images = torch.stack([own.sum() for own in torch.split(counts, list(sizes))])
        k = torch.tensor(self.sizes)
        tasks, classes = log_shares(images / k).repeat_interleave(k).to(device), log_shares(counts).to(device)
        positive = positives(features, labels, sizes, self.centroids).to(device)
        own = F.cross_entropy(scores + tasks, positive)
        mapped = F.linear(scores, self.weight, self.bias) + classes
        kept = F.kl_div(mapped.log_softmax(-1), taught.float().log_softmax(-1), reduction="batchmean", log_target=True)
        return own / self.per_class + kept

    def tensors(self) -> dict[str, Tensor]:
        """Return all values by name; empty if there is no gate."""
        centroids = {f"centroids.{task}": own for task, own in enumerate(self.centroids)}
        linear = {"weight": self.weight, "bias": self.bias} if self.centroids else {}
        return {**{f"backbone.{name}": value for name, value in self.backbone.items()}, **centroids, **linear}

    def load(self, tensors: Mapping[str, Tensor], tasks: int) -> None:
        """Take over what `tensors` returned.

        Args:
            tasks: number of tasks that it knows, with "weight" and "bias" if there are any.

        Raises:
            ValueError: tensors of other names or shapes.
        """
        rest = dict(tensors)
        backbone = {name: rest.pop(name) for name in tensors if name.startswith("backbone.")}
        centroids = [rest.pop(f"centroids.{task}", torch.empty(0)) for task in range(tasks)]
        weight, bias = rest.pop("weight", torch.zeros(0, 0)), rest.pop("bias", torch.zeros(0))
        width = {own.shape[1:] for own in centroids}
        fits = weight.shape == (len(bias), sum(map(len, centroids))) and bool(weight.numel()) == bool(tasks)
        if rest or not fits or len(width) > 1 or (tasks and not backbone):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in backbone}
            raise ValueError(
                f"a gate of {tasks} tasks has a backbone, as many groups of centroids of one width, and a map from them "
                f"to classes; this one has {shapes}: it is another's."
            )
        self.backbone = {name.removeprefix("backbone."): value for name, value in backbone.items()}
        self.centroids, self.weight, self.bias = centroids, weight, bias
