"""Dark experience replay: old images are shown again, with the scores that the model once gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from .base import Batch, ContinualMethod, MethodCard, MethodState, TaskContext
from .memory import Examples, MemoryConfig, Reservoir
from .registry import register

DRAW, INSERT = 0, 1  # last number of the keys that random draws are a function of


@dataclass
class DERppConfig(MemoryConfig):
    """Configure [`DERpp`].

    Args:
        memory_size: number of images that are kept; 0 is fine-tuning.
        alpha: weight of the squared error between the scores of kept images and those that they had.
        beta: weight of the cross-entropy of kept images; 0 is DER.
        memory_stores: see [`MemoryConfig`].

    Raises:
        ValueError: a setting out of its range.
    """

    memory_size: int = field(default=1000, metadata={"help": "number of images kept; 0 is fine-tuning"})
    alpha: float = field(
        default=0.3, metadata={"help": "weight of the squared error to the scores stored with kept images"}
    )
    beta: float = field(default=0.5, metadata={"help": "weight of the cross-entropy on kept images"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_size < 0:
            raise ValueError(f"memory_size={self.memory_size} is out of range: it is a number of images, from 0.")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: use a finite number >= 0.")


def dark_experience(logits: Tensor, then: Tensor, others: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `alpha * MSE(z, h) + beta * CE(z', y')` for each pair of kept images, `(B,)`, over all classes.

    The squared error is the mean over classes, as in the released code; the paper's squared norm is C times as large.
    Classes that a kept image was not scored for, since they have come later, are left out of it.

    Args:
        logits, then: z and h, `(B, C)`: scores of kept images now and when they were taken in; there, NaN for classes that
            have come since.
        others, labels: z' and y', `(B, C)` and `(B,)`: scores and labels of other kept images.
    """
    known = ~then.isnan()
    error = torch.where(known, logits.float() - then.nan_to_num(), 0.0).square().sum(-1) / known.sum(-1)
    return alpha * error + beta * F.cross_entropy(others.float(), labels, reduction="none")


@register
class DERpp(ContinualMethod):
    """Dark experience replay ++ (Buzzega et al., NeurIPS 2020), with a reservoir of training images.

    Every image of a step comes with two kept ones, x' and x'', drawn independently of each other:

        loss = CE(z(x), y) + alpha * MSE(z(x'), h') + beta * CE(z(x''), y'')

    After the step, its images are presented to the reservoir together with h, the scores that they had in it. The first
    term covers the classes of the loss (`train_mask`), the other two cover all outputs of the head.

    Kept images are known by task and position: they are read from the stream and augmented afresh, and no file of the
    run holds any unless `memory_stores` is "images". Images of older tasks only ever leave the memory, so those that were
    in it when the last task ended are all that a task may ask for. Kept images pass through the model as in prediction, without dropout, and with prompts that each
    selects for itself. Draws are a function of the seed, the task, the step and the image, so that neither accumulation
    nor the number of processes changes them.

    Args:
        config, settings: see [`DERppConfig`].

    Attributes:
        memory: the `Reservoir`.
        step: optimizer steps so far, over all tasks.
    """

    name = "derpp"
    config_class = DERppConfig
    config: DERppConfig

    def __init__(self, config: DERppConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.memory, self.step = Reservoir(self.config.memory_size), 0
        self._shown: list[tuple[Tensor, ...]] = []  # places, labels, logits of the step under way

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Dark experience replay (DER++)",
            sentence="each step also trained on images of a memory, by their labels and towards the scores that the model "
            "had given them when they were taken in",
            limits=(
                f"It is not rehearsal-free: training kept {len(self.memory)} images ({self.config.memory_size} at most), "
                "which further tasks need as well.",
                self.config.limit(),
            ),
            citation="Buzzega et al., Dark Experience for General Continual Learning: a Strong, Simple Baseline, NeurIPS 2020",
        )

    def begin_task(self, context: TaskContext) -> None:
        self.memory.widen(len(context.model.class_names or ()))
        self._shown = []

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        if not self.config.memory_size:
            return ()
        return (optimizer.register_step_post_hook(lambda *_: self._insert(context)),)

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        if not self.config.memory_size:
            return losses
        if batch.tasks is None or batch.indices is None:
            raise ValueError(
                "the collator drops each image's task and index, by which DER++ keeps it: pass them on, as "
                "pgp_hf.data.images.ImageCollator does."
            )
        logits = context.model.class_logits(output).detach().float()
        self._shown.append((torch.stack([batch.tasks, batch.indices], 1), batch.labels, logits))
        if not len(self.memory):
            return losses
        kept = self._draw(context, batch.indices.cpu())
        again = context.model.class_logits(context.forward(context.old_images(kept.places.tolist(), self.step)))
        (now, others), (then, _) = again.chunk(2), kept.logits.to(again.device).chunk(2)
        labels = kept.labels.to(again.device).chunk(2)[1]
        return losses + dark_experience(now, then, others, labels, self.config.alpha, self.config.beta)

    def _draw(self, context: TaskContext, indices: Tensor) -> Examples:
        """Return an x' for each of these images of the task, `(B,)`, followed by an x'' for each."""
        images = len(context.stream.train(context.task))
        slots = self.memory.draw(2, images, (context.seed, context.task, self.step, DRAW))
        assert self.memory.examples is not None
        return self.memory.examples.at(slots[:, indices].flatten())

    def _insert(self, context: TaskContext) -> None:
        """Present the images of the step that has just been made.

        Raises:
            ValueError: its loss was not this method's.
        """
        if not self._shown:
            raise ValueError("DER++ was not asked for the step's loss: leave compute_loss_func out.")
        shown = [torch.cat(parts) for parts in zip(*self._shown, strict=True)]
        if (gather := context.collectives.gather) is not None:
            shown = [gather(part) for part in shown]
        examples = Examples(*(part.cpu() for part in shown))
        # in an order that no number of processes changes; a loader that pads its last batch repeats images
        _, first = np.unique(examples.places.numpy(), axis=0, return_index=True)
        self.memory.add(examples.at(torch.from_numpy(first)), (context.seed, context.task, self.step, INSERT))
        self.step, self._shown = self.step + 1, []

    def exemplars(self) -> Sequence[Sequence[int]]:
        kept: list[list[int]] = [] if self.memory.examples is None else self.memory.examples.places.tolist()
        return kept

    def state(self) -> MethodState:
        return MethodState(self.memory.tensors(), {"presented": self.memory.presented, "step": self.step})

    def load_state(self, state: MethodState) -> None:
        values = state.values
        if any(type(values.get(name)) is not int for name in ("presented", "step")):
            raise ValueError(f"the state of DER++ holds {values}: expected the integers presented and step.")
        self.memory.load(state.tensors, values["presented"])
        self.step, self._shown = values["step"], []
