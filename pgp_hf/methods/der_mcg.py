"""DER with a multi-centroid gate: an expert for each task, and a gate that says whose scores count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ..data.scenarios import SCENARIOS
from ..models import PlainModel, StreamModel, exchanged
from .base import Batch, MethodCard, MethodState, TaskContext
from .exemplars import ExemplarConfig, ExemplarMethod
from .gate import Gate, combine, read_features, task_scores
from .registry import register
from .stages import descend, from_main_process, steps, tune_heads

if TYPE_CHECKING:
    from ..data.stream import TaskStream

AUXILIARY, CENTROIDS, GATE, TUNING = 0, 1, 2, 3  # last numbers of the keys that random draws are a function of
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the gate


@dataclass
class DERMCGConfig(ExemplarConfig):
    """Configure [`DERMCG`].

    Args:
        memory_size: number of images that are kept in all, the same number of each class seen so far; 2000 where
            `memory_per_class` is not given either.
        memory_per_class: number of images that are kept of each class, instead.
        memory_stores: see [`MemoryConfig`].
        combine: "multiply": a score is multiplied by its expert's weight, as published, which raises negative scores of
            experts with small weights; "log": the logarithm of the weight is added.
        gate_temperature: what the gate's scores are divided by before they become weights.
        centroids_per_class: number of the gate's centroids for each class, at least 1; rounded up for each task.
        tuning_epochs: passes over the exemplars in which all heads are tuned after a task; 0 keeps them as trained.
        tuning_learning_rate: of Adam, in the first half of these passes; then a tenth.
        gate_epochs: passes over the task's images and the exemplars in which the gate learns; 0 for no gate.
        gate_learning_rate: of SGD, in the first half of these passes; then a tenth.
        gate_batch_size: images in a step of the gate, all on one device.

    Raises:
        ValueError: a setting out of its range.
    """

    combine: str = field(
        default="multiply",
        metadata={"help": "how the gate weighs scores: multiply them by its weights, or add their log"},
    )
    gate_temperature: float = field(default=12.0, metadata={"help": "temperature of the gate's softmax"})
    centroids_per_class: float = field(
        default=1.0, metadata={"help": "number of the gate's centroids per class, at least 1"}
    )
    tuning_epochs: int = field(default=30, metadata={"help": "passes over the exemplars that tune all heads"})
    tuning_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of the heads in these passes"})
    gate_epochs: int = field(default=5, metadata={"help": "passes over all images that train the gate; 0 for no gate"})
    gate_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of the gate in these passes"})
    gate_batch_size: int = field(default=64, metadata={"help": "images in a step of the gate"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine not in ("multiply", "log"):
            raise ValueError(f"combine={self.combine!r} is unknown: choose one of multiply, log.")
        for name in ("gate_temperature", "tuning_learning_rate", "gate_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: use a finite number > 0.")
        for name, least in (
            ("centroids_per_class", 1),
            ("tuning_epochs", 0),
            ("gate_epochs", 0),
            ("gate_batch_size", 1),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: use a finite number from {least}.")


def auxiliary_targets(labels: Tensor, old: int) -> Tensor:
    """Return 0 for an image of any old class, and from 1 for the new classes, `(B,)`.

    Args:
        labels: positions of the classes in the order in which they came, `(B,)`.
        old: number of old classes.
    """
    return (labels - old + 1).clamp(min=0)


@register
class DERMCG(ExemplarMethod):
    """Dynamically expandable representation with a multi-centroid gate, without pruning, after the released code.

    Each task has an expert: a model of its own, which starts as the one before it ended and is then left as it is, with a
    head for the task's classes. The model in training is the newest. A task has three stages:

    1. The newest expert learns the task's images and the exemplars. Its scores stand beside those of older experts, and an
       auxiliary head, which is dropped afterwards, tells the new classes from each other and from all old ones at once:

           loss = CE(z, y) + CE(auxiliary, y'),   z = all experts' scores of their own classes,   y' = 0 for any old class

       The first task has no auxiliary head.
    2. From the second task on, all heads are trained anew on the exemplars, of which each class has as many, with scores
       divided by 5; the experts' features stay.
    3. The gate, another model of the same kind, learns which task an image belongs to: see [`Gate`]. It starts as the
       model did in the first task, and then goes on from where it was.

    With g_t the best score among the centroids of task t, an image gets the scores `w_t z`, where `w = softmax(g / 12)`.
    Within a task, whose gate is still to come, all experts' scores stand side by side. So they do in the task-incremental
    scenario, which has no gate: the expert of the image's task decides.

    The code is that of the gate (github.com/CSIncWW/MultiCentroidGate); the paper's own equations could not be compared.
    DER's pruning masks were never released, so the model grows by whatever of it learns: by all of it, or with
    `set_trainable(model, "last:N")` by its last blocks, which share the others. Deviations:

    - Old heads are left as they are in stage 1, where they learn in the code; stage 2 replaces them in both.
    - Stage 2 starts from heads of zeros instead of random ones, uses Adam instead of SGD, and reads features of
      unaugmented exemplars, computed once.
    - The gate starts from the given weights instead of random ones, and augments images as training does, without
      RandAugment. Its map to classes keeps the biases of old classes.
    - Exemplars are chosen by the features of the newest expert, the code's `coreset_feature="last"`.
    - Heads have biases where the model's has, and epochs and learning rates are those of fine-tuning a trained model.

    As in the code, centroids are matched to the classes of a batch alone: a class may change its centroid from batch to
    batch. Dropout is off in whatever does not learn, and in the gate.

    New images of known classes are learned together with new classes, as exemplars are; a task of known classes alone,
    whose expert would have no class to score, is refused. `train_mask` and label smoothing do not matter. The auxiliary head learns at the rate of the head, and is no part of the
    norm by which gradients are clipped. Every process trains heads and gate on the same batches; the main one's are kept.
    Each checkpoint, and each task's folder, holds all experts and the gate. Drift, in the results, is that of the newest
    expert, while older ones do not move.

    Args:
        config, settings: see [`DERMCGConfig`].

    Attributes:
        tasks: the classes of each expert, that in training included.
        experts: values of the trainable parameters of all experts but the newest, by name.
        gate: the `Gate`.
        auxiliary: weight of the auxiliary head; None where there is none.
        memory: the exemplars.
    """

    name = "der_mcg"
    config_class = DERMCGConfig
    config: DERMCGConfig
    scenarios = frozenset({"class_incremental", "task_incremental"})

    def __init__(self, config: DERMCGConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.tasks: list[list[int]] = []
        self.experts: list[dict[str, Tensor]] = []
        self.gate = Gate(self.config.centroids_per_class)
        self.auxiliary: nn.Parameter | None = None
        self._features: Tensor | None = None  # that the head has read last, where there is an auxiliary head
        self._watch: RemovableHandle | None = None

    # ---- what it is ----------------------------------------------------------------------------------------------

    def describe(self) -> MethodCard:
        gated = "weighted by a gate that tells tasks apart" if self.gate.backbone else "side by side"
        besides = " and the gate" if self.gate.backbone else ""
        raised = ("Weights multiply scores, as published, which raises negative ones.",)
        return MethodCard(
            title="DER with a multi-centroid gate (without pruning, after the released code)",
            sentence="each task was learned by an expert of its own, together with exemplars of older classes; predictions "
            f"are the scores of all experts, {gated}",
            limits=(
                *self.limits(),
                f"It grows with each task: every image passes through all experts ({len(self.tasks)} so far){besides}, each as "
                "large as whatever of the model learns.",
                "DER's pruning masks, which bound the growth in the paper, were never released and are missing.",
                *(raised if self.gate.backbone and self.config.combine == "multiply" else ()),
            ),
            citation="Yan et al., DER: Dynamically Expandable Representation for Class Incremental Learning, CVPR 2021; "
            "gate: the code in github.com/CSIncWW/MultiCentroidGate",
            shared=False,
        )

    def check(self, model: StreamModel) -> None:
        super().check(model)
        if not isinstance(model, PlainModel) or model.lora is not None or model.name == "head":
            raise ValueError(
                f"method 'der_mcg' trains a copy of the backbone for each task, and the backbone of this {model.name} model "
                'does not learn: use a model with pgp_hf.set_trainable(model, "all") or "last:N", or another method.'
            )
        if any(getattr(module, "track_running_stats", False) for module in model.base.modules()):
            raise ValueError(
                f"this {type(model.base).__name__} keeps running statistics (BatchNorm), which all experts of method "
                "'der_mcg' would share: use a model with LayerNorm, such as a ViT, or another method."
            )
        linear = [module for module in model.head.modules() if [*module.parameters(recurse=False)]]
        if [type(module) for module in linear] != [nn.Linear]:
            raise ValueError(
                f"method 'der_mcg' needs a head with one linear layer, and that of this {type(model.base).__name__} is a "
                f"{type(model.head).__name__}: use another model or another method."
            )

    def training_stream(self, stream: TaskStream) -> TaskStream:
        """Return the stream.

        Raises:
            ValueError: there is no room for exemplars, or a task has known classes alone.
        """
        for task in super().training_stream(stream).tasks:
            if not task.new_classes:
                raise ValueError(
                    f"method 'der_mcg' trains a new expert for each task, which scores the classes that no older one does, and "
                    f"task {task.index + 1} has new images of known classes alone: bring new classes along, or choose "
                    "another method."
                )
        return stream

    # ---- an expert -----------------------------------------------------------------------------------------------

    def begin_task(self, context: TaskContext) -> None:
        own, head = context.model.trainable(), _head_of(context.model)
        if context.task:
            self.experts.append({name: value.detach().clone() for name, value in own.items()})
        elif self.config.gate_epochs and not SCENARIOS[context.stream.scenario].task_known:
            self.gate.backbone = {name: value.detach().clone() for name, value in own.items() if name not in head}
        self.tasks.append(list(context.stream.tasks[context.task].new_classes))
        weight = next(iter(head.values()))
        self._to(weight.device)
        self._stop_watching()
        self.auxiliary = None
        if context.task:
            rng = np.random.default_rng([context.seed, context.task, AUXILIARY])
            bound, shape = 1 / math.sqrt(weight.shape[1]), (len(self.tasks[-1]) + 1, weight.shape[1])
            self.auxiliary = nn.Parameter(torch.from_numpy(rng.uniform(-bound, bound, shape)).float())
            self._watch = context.model.watch_features(self._keep)

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        """Add the auxiliary head to the optimizer."""
        groups = optimizer.param_groups
        for group in [group for group in groups if group.get("auxiliary")]:  # of the task before
            groups.remove(group)
            optimizer.state.pop(group["params"][0], None)
        if self.auxiliary is None:
            return ()
        head = next(iter(_head_of(context.model).values()))
        self._to(head.device)  # a checkpoint that has been loaded is on the CPU
        self.auxiliary = nn.Parameter(self.auxiliary.detach().to(head.device))
        like = next(group for group in groups if any(one is head for one in group["params"]))
        rate = like.get("initial_lr", like["lr"])  # that of an optimizer which is kept has decayed
        optimizer.add_param_group({**like, "params": [self.auxiliary], "lr": rate, "auxiliary": True})
        if (reduce := context.collectives.reduce) is None:
            return ()
        processes = reduce(torch.ones((), device=head.device))
        parameter: Any = self.auxiliary  # torch has not annotated its hooks
        return (parameter.register_hook(lambda gradient: reduce(gradient) / processes),)

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        features, self._features = self._features, None  # before older experts replace it
        labels = self._positions(batch.labels)
        scores = [
            *self._scores(context, batch, self.experts),
            context.model.class_logits(output).float()[:, self.tasks[-1]],
        ]
        found = F.cross_entropy(torch.cat(scores, 1), labels, reduction="none")
        if self.auxiliary is None:
            return found
        assert features is not None
        if next(iter(_head_of(context.model).values())).grad is None:
            self.auxiliary.grad = None  # a step begins, for which the trainer clears the model's gradients alone
        targets = auxiliary_targets(labels, len(self._seen) - len(self.tasks[-1]))
        told_apart = F.linear(features.float(), self.auxiliary).float()
        return found + F.cross_entropy(told_apart, targets, reduction="none")

    def _keep(self, features: Tensor) -> None:
        self._features = features

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = self._features = None

    # ---- heads and gate ------------------------------------------------------------------------------------------

    def end_task(self, context: TaskContext) -> None:
        """Choose exemplars, tune all heads on them, and train the gate on what the expert has learned."""
        self._stop_watching()
        self.auxiliary = None
        old = self.memory.places(), self.memory.labels()
        super().end_task(context)
        if context.task and self.config.tuning_epochs:
            self._tune_heads(context)
        if self.gate.backbone:
            self._train_gate(context, *old)

    @torch.no_grad()
    def _tune_heads(self, context: TaskContext) -> None:
        own, head, features = context.model.trainable(), _head_of(context.model), []
        experts = self._experts(context)
        for expert in experts:
            with exchanged(own, expert):
                features.append(context.observe(self.memory.places()).features)
        labels, sizes = self._positions(self.memory.labels()), [len(classes) for classes in self.tasks]
        config, key = self.config, (context.seed, context.task, TUNING)
        with torch.enable_grad():
            tuned = tune_heads(
                features, labels, sizes, len(head) > 1, config.tuning_epochs, config.tuning_learning_rate, key
            )
        for expert, classes, parts in zip(experts, self.tasks, tuned, strict=True):
            for name, part in zip(head, parts, strict=True):
                expert[name][classes] = from_main_process(context, part.to(expert[name]))

    def _train_gate(self, context: TaskContext, old: list[list[int]], old_labels: Tensor) -> None:
        """Train the gate on the task's images and those exemplars with which it was learned."""
        config, gate, images = self.config, self.gate, context.stream.train(context.task)
        places = [[context.task, index] for index in range(len(images))] + old
        labels = self._positions(torch.cat([torch.from_numpy(images.labels), old_labels]))
        counts, sizes = torch.bincount(labels, minlength=len(self._seen)), [len(classes) for classes in self.tasks]
        own, experts = context.model.trainable(), self._experts(context)
        width = next(iter(_head_of(context.model).values())).shape[1]
        gate.grow(sizes[-1], width, (context.seed, context.task, CENTROIDS))
        learning = [*(own[name] for name in gate.backbone), *(part.requires_grad_() for part in gate.head)]
        optimizer = torch.optim.SGD(
            learning, lr=config.gate_learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        key = (context.seed, context.task, GATE)
        with exchanged(own, gate.backbone):
            for step, rows in enumerate(
                steps(optimizer, len(places), config.gate_batch_size, config.gate_epochs, key)
            ):
                batch = context.old_images([places[row] for row in rows], step)
                taught = torch.cat(self._scores(context, batch, experts), 1)
                features = read_features(context.model, partial(context.forward, batch))
                loss = gate.loss(features, labels[rows], taught, counts, sizes)
                descend(optimizer, loss, "the gate (gate_learning_rate)")
            for part in learning:
                part.data.copy_(from_main_process(context, part.detach()))
                part.grad = None
        for part in gate.head:
            part.requires_grad_(False)

    def _experts(self, context: TaskContext) -> list[dict[str, Tensor]]:
        """Return the values of all experts; the newest one's are those of the model itself."""
        return [*self.experts, {name: value.detach() for name, value in context.model.trainable().items()}]

    def _scores(self, context: TaskContext, batch: Batch, experts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return the scores that experts, from the first on, give their own classes, `(B, C_t)`."""
        return [
            context.model.class_logits(context.forward(batch, expert)).float()[:, classes]
            for expert, classes in zip(experts, self.tasks, strict=False)
        ]

    # ---- predictions ---------------------------------------------------------------------------------------------

    @property
    def _seen(self) -> list[int]:
        return [label for classes in self.tasks for label in classes]

    def _positions(self, labels: Tensor) -> Tensor:
        """Return the positions of classes in the order in which they came."""
        position = torch.full((max(self._seen) + 1,), -1, dtype=torch.int64)
        position[self._seen] = torch.arange(len(self._seen))
        return position.to(labels.device)[labels]

    def _to(self, device: torch.device) -> None:
        self.experts = [{name: value.to(device) for name, value in expert.items()} for expert in self.experts]
        self.gate.to(device)

    @torch.no_grad()
    def predict_logits(
        self, model: StreamModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor
    ) -> Tensor:
        """Return the scores of all experts, weighted by the gate."""
        if not self.experts:
            return logits
        assert isinstance(model, PlainModel)
        self._to(logits.device)
        own = dict(model.model.named_parameters())

        def run(values: Mapping[str, Tensor]) -> ModelOutput:
            # in the model's own precision, in which it may have been loaded
            with exchanged(own, {name: value.to(own[name].dtype) for name, value in values.items()}):
                return model.run(inputs)

        scores = logits.clone()
        for expert, classes in zip(self.experts, self.tasks[:-1], strict=True):
            scores[:, classes] = model.class_logits(run(expert)).float()[:, classes]
        if len(self.gate.centroids) < len(self.tasks):
            return scores
        found = self.gate.scores(read_features(model, lambda: run(self.gate.backbone)))
        tasks = task_scores(found, self.gate.sizes) / self.config.gate_temperature
        # outputs of classes that are still to come are the newest expert's
        expert_of = torch.full((logits.shape[1],), len(self.tasks) - 1)
        for number, classes in enumerate(self.tasks):
            expert_of[classes] = number
        return combine(scores, tasks.log_softmax(-1)[:, expert_of.to(tasks.device)], self.config.combine)

    # ---- what lasts ----------------------------------------------------------------------------------------------

    def state(self) -> MethodState:
        memory, values = super().state()
        parts = {
            "memory": memory,
            "gate": self.gate.tensors(),
            **{f"expert.{number}": expert for number, expert in enumerate(self.experts)},
        }
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        if self.auxiliary is not None:
            tensors["auxiliary"] = self.auxiliary.detach()
        return MethodState(tensors, {**values, "tasks": [list(classes) for classes in self.tasks]})

    def load_state(self, state: MethodState) -> None:
        tasks, rest = state.values.get("tasks"), dict(state.tensors)
        if not isinstance(tasks, list) or not all(isinstance(classes, list) and classes for classes in tasks):
            raise ValueError(f"the state of DER with a gate has tasks={tasks!r}: expected each task's classes.")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): rest.pop(name) for name in [*rest] if name.startswith(prefix)}

        memory, gate = part("memory."), part("gate.")
        experts = [part(f"expert.{number}.") for number in range(len(tasks) - 1)]
        auxiliary = rest.pop("auxiliary", None)
        if rest or not all(expert.keys() == experts[0].keys() != set() for expert in experts):
            raise ValueError(
                f"the state of DER with a gate has {', '.join(sorted(rest)[:3]) or 'experts of different kinds'}, besides "
                f"{len(tasks)} tasks: expected the parameters of all experts but the newest."
            )
        known = sum(name.startswith("centroids.") for name in gate)
        if known not in (0, len(tasks) - 1, len(tasks)):
            raise ValueError(f"the state of DER with a gate has centroids of {known} tasks: expected {len(tasks)}.")
        super().load_state(MethodState(memory, state.values))
        self.gate = Gate(self.config.centroids_per_class)
        self.gate.load(gate, known)
        self.tasks, self.experts = [list(classes) for classes in tasks], experts
        self.auxiliary = None if auxiliary is None else nn.Parameter(auxiliary)


def _head_of(model: StreamModel) -> dict[str, nn.Parameter]:
    """Return the head's parameters by name: its weight, then its bias."""
    assert isinstance(model, PlainModel)
    own = {id(parameter) for parameter in model.head_parameters()}
    return {name: parameter for name, parameter in model.trainable().items() if id(parameter) in own}
