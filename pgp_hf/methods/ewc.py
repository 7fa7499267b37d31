"""Elastic weight consolidation: parameters that older tasks depend on are drawn back to where these left them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ..fields import check_fields
from ..models import KeepsClassStatistics
from .base import Batch, ContinualMethod, MethodCard, MethodState, TaskContext
from .registry import register

SCALE = 2.0**12  # of log p in backward passes: in float16, a single image's gradients would underflow


@dataclass
class EWCConfig:
    """Configure [`EWC`].

    Args:
        strength: weight lambda of the penalty, at least 0; 0 is fine-tuning. It is worth tuning on a grid from 1 to 1e5.
        mode: "online", one quadratic penalty around the last task's parameters; or "separate", one for each task.
        gamma: share of the older tasks' Fisher information that a new task keeps, in [0, 1]; "online" only.
        labels: of which label the gradient is taken: "sampled", one drawn from the model's own prediction; "exact", all
            of them, weighted by it; or "true", the image's own, which gives the empirical Fisher information.
        max_images: largest number of a task's images that the Fisher information is computed from; all by default.

    Raises:
        ValueError: a setting out of its range.
    """

    strength: float = field(default=1e4, metadata={"help": "weight of the penalty; 0 is fine-tuning"})
    mode: Literal["online", "separate"] = field(
        default="online", metadata={"help": "one penalty around the last task's parameters, or one for each task"}
    )
    gamma: float = field(
        default=1.0, metadata={"help": "share of the older tasks' Fisher information that is kept, with mode='online'"}
    )
    labels: Literal["sampled", "exact", "true"] = field(
        default="sampled",
        metadata={
            "help": "label of the gradients: drawn from the prediction, all by their probability, or the true one"
        },
    )
    max_images: int | None = field(
        default=None, metadata={"help": "images of a task for the Fisher information; all when not given"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength={self.strength} is out of range: use a finite number >= 0.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} is outside [0, 1]: it is a share of what was known before.")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images={self.max_images} is out of range: use at least 1, or None for all.")


class Quadratic(NamedTuple):
    """A quadratic penalty around the parameters that a task has left.

    Attributes:
        fisher: diagonal of the Fisher information, by name of the parameter and of its shape.
        anchor: the parameters as the task left them, likewise.
    """

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return `1/2 sum_i F_i (theta_i - theta*_i)^2`, a scalar."""
        terms = [
            (fisher * (parameters[name] - self.anchor[name]).square()).sum() for name, fisher in self.fisher.items()
        ]
        return torch.stack(terms).sum() / 2

    def to(self, parameters: Mapping[str, Tensor]) -> Quadratic:
        """Return the same on the parameters' devices and in their shapes; what they have grown by is free to move."""
        moved = ({name: _grown(tensor, parameters[name]) for name, tensor in part.items()} for part in self)
        return Quadratic(*moved)


def _grown(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor on a parameter's device, with zeros where the parameter has grown."""
    tensor = tensor.to(parameter.device)
    if tensor.shape == parameter.shape:
        return tensor
    grown = tensor.new_zeros(parameter.shape)
    grown[tuple(slice(length) for length in tensor.shape)] = tensor
    return grown


def squared_gradients(logits: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return `sum_c w_c (d log p_c / d theta)^2` of one image for each parameter, in float32.

    Args:
        logits: `(C,)`, a function of the parameters; p is their softmax.
        weights: w, `(C,)`: one-hot for a single label, p itself for the expectation over all labels.
        parameters: each gets a sum of its own shape.
    """
    log_p = SCALE * logits.float().log_softmax(-1)
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for label in weights.nonzero().flatten().tolist():
        gradients = torch.autograd.grad(log_p[label], parameters, retain_graph=True)
        for own, gradient in zip(total, gradients, strict=True):
            own += weights[label] * (gradient.float() / SCALE).square()
    return total


def label_weights(logits: Tensor, true: int, labels: str, key: Sequence[int]) -> Tensor:
    """Return how much each label counts in one image's Fisher information, `(C,)`.

    Args:
        logits: `(C,)`.
        true: position of the image's own label among them.
        labels: as [`EWCConfig`] has it.
        key: integers of which the draw is a function.
    """
    p = logits.detach().float().softmax(-1)
    if labels == "exact":
        return p
    if labels == "sampled":
        number = np.random.default_rng(key).random()
        true = min(int((p.double().cumsum(-1) < number).sum()), len(p) - 1)
    return torch.zeros_like(p).index_fill_(0, torch.tensor([true], device=p.device), 1.0)


@register
class EWC(ContinualMethod):
    """Elastic weight consolidation (Kirkpatrick et al., PNAS 2017), by default in its online form.

    A parameter is drawn back the more, the more the predictions for older tasks' images depend on it:

        loss = cross-entropy + strength / 2 * sum_i F_i (theta_i - theta*_i)^2

    F is the diagonal of the Fisher information, the mean over a task's unaugmented images of the squared gradient of
    log p(y|x), each image's own. It costs a forward and a backward pass of batch size 1 for each image when the task
    ends. With `mode="online"` (Schwarz et al., ICML 2018), F is summed over tasks, the older ones discounted by `gamma`,
    and theta* is where the last task ended; with "separate" each task keeps its own pair.

    What counts are the parameters that the head's input depends on; the head itself is left out, since its rows for new
    classes have to move. p covers the classes of the loss.

    Args:
        config, settings: see [`EWCConfig`].

    Attributes:
        terms: the penalties so far, one with `mode="online"`.
    """

    name = "ewc"
    config_class = EWCConfig
    config: EWCConfig

    def __init__(self, config: EWCConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.terms: list[Quadratic] = []

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Elastic weight consolidation (EWC)",
            sentence="from the second task on, a quadratic penalty drew the parameters that tasks share to where older "
            "tasks had left them, weighted by the diagonal of their Fisher information",
            limits=(
                "The head is not part of the penalty: its scores for old classes are not held.",
                "The penalty takes each parameter by itself, and holds near where older tasks ended.",
            ),
            citation="Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017",
        )

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        """Bring the penalties to the parameters' devices and shapes: a checkpoint has been loaded, if there is one."""
        parameters = context.model.trainable()
        self.terms = [term.to(parameters) for term in self.terms]
        return ()

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        if not self.terms or not self.config.strength:
            return losses
        parameters = context.model.trainable()
        return losses + self.config.strength * torch.stack([term(parameters) for term in self.terms]).sum()

    def end_task(self, context: TaskContext) -> None:
        """Compute the task's Fisher information, and keep its parameters."""
        if not self.config.strength:
            return
        if not (fisher := self._fisher(context)):
            warnings.warn(
                f"EWC has nothing to hold: no trained parameter of this {context.model.name} model is shared by tasks and "
                "changes what the head reads. This is fine-tuning; train more of the model, or choose another method.",
                stacklevel=2,
            )
            return
        parameters = context.model.trainable()
        self.consolidate(fisher, {name: parameters[name].detach().clone() for name in fisher})

    def consolidate(self, fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> None:
        """Take in a task's Fisher information and parameters, by name."""
        if self.config.mode == "online" and self.terms:
            (older,) = self.terms
            fisher = {name: self.config.gamma * older.fisher[name] + own for name, own in fisher.items()}
            self.terms = []
        self.terms.append(Quadratic(fisher, anchor))

    def _fisher(self, context: TaskContext) -> dict[str, Tensor]:
        """Return the diagonal of the task's Fisher information by parameter name; empty where nothing is shared."""
        classes, total, images = list(self.classes(context)), dict[str, Tensor](), 0
        for batch, positions in context.views(self.config.max_images):
            for i, position in enumerate(positions):
                image = Batch(
                    {name: value[i : i + 1] for name, value in batch.inputs.items()}, batch.labels, None, None
                )
                with torch.enable_grad():
                    logits, features = _trained_logits(context, image)
                    if not images:
                        shared = _shared(features, context.model.trainable())
                    if not shared:
                        return {}
                    logits = logits[0, classes]
                    true = classes.index(int(batch.labels[i]))
                    weights = label_weights(logits, true, self.config.labels, (context.seed, context.task, position))
                    squares = squared_gradients(logits, weights, list(shared.values()))
                total = {name: total.get(name, 0) + own for name, own in zip(shared, squares, strict=True)}
                images += 1
        if (reduce := context.collectives.reduce) is None:
            return {name: own / images for name, own in total.items()}
        device = batch.labels.device
        images = int(reduce(torch.tensor(images, device=device)))
        return {name: reduce(own) / images for name, own in total.items()}

    def state(self) -> MethodState:
        tensors = {
            f"{number}.{kind}.{name}": tensor
            for number, term in enumerate(self.terms)
            for kind, part in term._asdict().items()
            for name, tensor in part.items()
        }
        return MethodState(tensors, {})

    def load_state(self, state: MethodState) -> None:
        terms: dict[int, Quadratic] = {}
        for name, tensor in state.tensors.items():
            number, _, rest = name.partition(".")
            kind, _, parameter = rest.partition(".")
            if not number.isdecimal() or kind not in Quadratic._fields:
                raise ValueError(f"the state of EWC holds {name!r}: expected names such as '0.fisher.<parameter>'.")
            getattr(terms.setdefault(int(number), Quadratic({}, {})), kind)[parameter] = tensor
        if any(term.fisher.keys() != term.anchor.keys() for term in terms.values()):
            raise ValueError("the state of EWC is incomplete: each parameter needs its fisher and its anchor.")
        self.terms = [terms[number] for number in sorted(terms)]


def _trained_logits(context: TaskContext, image: Batch) -> tuple[Tensor, Tensor]:
    """Return the trained head's scores `(1, C)`, and what it has read, `(1, d)`."""
    features: list[Tensor] = []
    watch = context.model.watch_features(features.append)
    try:
        output = context.forward(image)
    finally:
        watch.remove()
    model = context.model
    if isinstance(model, KeepsClassStatistics) and model.uses_statistics_head:
        return model.linear_logits(features[0].float()), features[0]
    return model.class_logits(output), features[0]


def _shared(features: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters that the head's input depends on: all that learn, but the head and what only selects."""
    if not features.requires_grad:
        return {}
    gradients = torch.autograd.grad(features.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    found = zip(parameters.items(), gradients, strict=True)
    return {name: parameter for (name, parameter), gradient in found if gradient is not None}
