"""The base of all methods: fine-tuning, of which a method overrides the parts that it does differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ..data.scenarios import SCENARIOS
from ..models import StreamModel
from ..projection import Projection

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ..data.stream import TaskStream  # loads `datasets`, which prediction does without

Item = Mapping[str, object]  # of a dataset: "image", "label", "task", "index"
Collective = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """The images of one training step, as a method may know them.

    Attributes:
        inputs: what the model is given, `pixel_values` among it.
        labels: `(B,)`.
        tasks: 0-based task of each image, `(B,)`; None if the user's own collator does not provide it.
        indices: position of each image within its task, `(B,)`; None in the same case.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    tasks: Tensor | None
    indices: Tensor | None

    @classmethod
    def split(cls, inputs: dict[str, Tensor]) -> Batch:
        """Split a collated batch into the model's inputs and what only a method reads."""
        rest = dict(inputs)
        labels, tasks, indices = rest.pop("labels"), rest.pop("task", None), rest.pop("index", None)
        return cls(rest, labels, tasks, indices)


class Collectives(NamedTuple):
    """The operations that the processes of a data-parallel run do together; each is None in a single process.

    Attributes:
        reduce: the sum of a tensor over the processes.
        gather: tensors of one shape, concatenated along dimension 0 in the order of the processes.
        broadcast: the main process's tensor.
    """

    reduce: Collective | None = None
    gather: Collective | None = None
    broadcast: Collective | None = None


@dataclass(frozen=True)
class TaskContext:
    """The task that a method is called for.

    Attributes:
        task: 0-based.
        stream: all tasks, as `training_stream` returned them.
        model: the model in training.
        seed: of the run.
        train_mask: "task" or "seen": the default classes in the loss.
        views: the task's training images without augmentation, this process's share of them, in batches: the batch, and
            the images' positions within the task. Called with the largest number of images to take, None for all. The
            model is in eval mode, and no random number is consumed.
        old_images: training images of this task or older ones by task and position within it, as a batch: augmented as
            in training, by numbers that are a function of the run's seed, the image and the integer given. No random
            number is consumed.
        exemplars: the same images as a dataset, which is augmented anew in each epoch, for `train_images`.
        observe: the model's view of training images without augmentation, by task and position within it. All processes
            get all of it. No random number is consumed.
        forward: the model's output for a batch as in prediction: in eval mode, each image selecting its own prompts, in
            the precision of training. Gradients are recorded as they are outside; see [`Forward`].
        collectives: see [`Collectives`].
    """

    task: int
    stream: TaskStream
    model: StreamModel
    seed: int
    train_mask: str
    views: Callable[[int | None], Iterator[tuple[Batch, list[int]]]]
    old_images: Callable[[Sequence[Sequence[int]], int], Batch]
    exemplars: Callable[[Sequence[Sequence[int]]], Dataset[Item]]
    observe: Callable[[Sequence[Sequence[int]]], Observed]
    forward: Forward
    collectives: Collectives = field(default_factory=Collectives)


class Forward(Protocol):
    """The model's output for a batch as in prediction, for the methods of a [`TaskContext`]."""

    def __call__(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> ModelOutput:
        """Return the output.

        Args:
            batch: the images.
            parameters: values to use instead of those of `context.model.trainable()`, by their names there, such as a
                teacher's; no gradient is then recorded.
        """


class Observed(NamedTuple):
    """What a model makes of training images, in the order asked for, on the CPU.

    Attributes:
        features: the head's inputs, float32, `(N, d)`.
        logits: the model's scores, float32, `(N, C)`.
    """

    features: Tensor
    logits: Tensor


class MethodState(NamedTuple):
    """The memory of a method from task to task, in a form that files can hold.

    Attributes:
        tensors: by name; in `method.safetensors`.
        values: ready for JSON; in `method.json`.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class MethodCard:
    """The description of a method on a model card.

    Args:
        title: its name, such as "Elastic weight consolidation (EWC)".
        sentence: what it does, in one sentence.
        limits: what it does not promise, a sentence each.
        citation: of its paper; None for none.
        shared: whether all tasks share what learns; False where each has an expert of its own.
    """

    title: str
    sentence: str
    limits: tuple[str, ...] = ()
    citation: str | None = None
    shared: bool = True


@dataclass
class NoSettings:
    """The configuration of a method without any setting."""


class ContinualMethod:
    """A way of learning a stream, the same for every `StreamModel` and every trainer.

    Each part does by default what fine-tuning does. A method overrides what differs and is registered by
    `pgp_hf.methods.register`; its trainer calls the parts in this order:

        check                   once, when the trainer is made
        training_stream         then, and for each task that is appended: the tasks that it trains on
        train_images            before a task: which images it trains on
        begin_task, attach      before its first step
        classes, loss           at each step
        end_task                after its last step: statistics, bases, Fisher information
        predict_logits          in every evaluation, and by `load_pretrained`; it calls adjust_logits
        state                   when the trainer is made, at every checkpoint, and when a task's files are written
        load_state              when a run is resumed

    An instance keeps what it has learned, so each trainer takes a new one.

    Args:
        config: an instance of `config_class`; its defaults when not given.
        settings: fields of `config_class`, in place of a `config`, as in `EWC(strength=100.0)`.

    Attributes:
        name: by which it is registered, recorded and chosen.
        config_class: a dataclass, the fields of which are the method's settings.
        scenarios: those in which the method is defined.
        projection: bases that the method keeps and applies; None for a method without. They are written to
            `projection.safetensors` and `projection.json`.

    Raises:
        TypeError: `config` is not an instance of `config_class`, or settings come with it.
        ValueError: an unknown setting, or one out of its range.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[DataclassInstance]] = NoSettings
    scenarios: ClassVar[frozenset[str]] = frozenset(SCENARIOS)
    projection: Projection | None = None
    begun = False  # whether a trainer has used this instance
    passes_as_evaluation = False  # whether `end_task` shows the head each view once, as evaluation does

    def __init__(self, config: DataclassInstance | None = None, **settings: object) -> None:
        if config is not None and not isinstance(config, self.config_class):
            raise TypeError(
                f"config is a {type(config).__name__}: {type(self).__name__} takes a {self.config_class.__name__}."
            )
        if config is not None and settings:
            raise TypeError(
                f"{type(self).__name__} takes a config or settings, not both: put {min(settings)} into the "
                f"{self.config_class.__name__}, or leave that out."
            )
        self.config = self.configure(**settings) if config is None else config

    @classmethod
    def configure(cls, **settings: object) -> DataclassInstance:
        """Return an instance of `config_class` with these settings; raise ValueError for one that it does not have."""
        known = cls.config_class.__dataclass_fields__
        if unknown := sorted(settings.keys() - known.keys()):
            raise ValueError(
                f"method {cls.name!r} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}."
            )
        return cls.config_class(**settings)

    # ---- what it is ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON has them; a run is continued only with the same."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        return settings

    def describe(self) -> MethodCard:
        """Return what the model card says of the method."""
        return MethodCard(self.name.replace("_", " ").capitalize(), "")

    @property
    def rank(self) -> int:
        """Return the largest number of directions along which a parameter is kept from moving; 0 for none."""
        return 0 if self.projection is None else self.projection.rank

    def check(self, model: StreamModel) -> None:
        """Raise TypeError or ValueError, with the fix, if the method does not work on this model."""

    def training_stream(self, stream: TaskStream) -> TaskStream:
        """Return the stream to train on: `stream` itself, or `stream.joined()` to learn all its tasks as one.

        Results, test images and files are those of `stream` in any case; tasks that are learned as one are evaluated
        once, after the last of them. Where the stream has no end, it is called for each task that is appended, before
        anything is trained on it: only to raise. `stream.has_train` then tells which training images are there.

        Raises:
            ValueError: a stream on which the method does not work, with the fix.
        """
        return stream

    # ---- a task --------------------------------------------------------------------------------------------------

    def train_images(self, context: TaskContext, images: Dataset[Item]) -> Dataset[Item]:
        """Return the task's training images, with those of older tasks for a method that keeps some."""
        return images

    def begin_task(self, context: TaskContext) -> None:
        """Prepare for a task; the model has prepared itself, but has not been trained on it."""

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        """Add the method's rules for gradients and updates to the task's optimizer; return their handles."""
        return ()

    def classes(self, context: TaskContext) -> Sequence[int]:
        """Return the label ids that take part in the loss; an image of another class is an error.

        A task of one class competes with all classes seen so far, whatever `train_mask`: alone, its loss would be zero.
        """
        own = context.stream.tasks[context.task].classes
        return context.stream.seen_classes(context.task) if context.train_mask == "seen" or len(own) == 1 else own

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        """Return each image's loss, `(B,)`.

        Never reduced: the trainer divides the sum by the images of the whole step, so that neither accumulation nor the
        number of processes changes a result. A penalty that does not depend on the image is added to each image's loss.

        Args:
            batch: the images.
            output: what the model made of them.
            losses: cross-entropy over `classes`, with the model's auxiliary loss, `(B,)`.
        """
        return losses

    def end_task(self, context: TaskContext) -> None:
        """Keep whatever later tasks need from the trained task.

        Gradients are on. The model is in training mode until `context.views` is read. With `auto_find_batch_size`, a call
        that runs out of memory is followed by another one with smaller batches, after `load_state`.
        """

    def exemplars(self) -> Sequence[Sequence[int]]:
        """Return the training images that are kept for later tasks, each by its 0-based task and its position within it.

        They are counted in `results.json`, with the size that they would have.
        """
        return ()

    @property
    def stores_images(self) -> bool:
        """Return True if the run keeps the images of `exemplars`; once their task has ended, the stream's are not read."""
        return getattr(self.config, "memory_stores", None) == "images"

    @property
    def adjusts_logits(self) -> bool:
        """Return True if predictions need the method, since it has scores of its own."""
        return any(
            getattr(type(self), part) is not getattr(ContinualMethod, part)
            for part in ("adjust_logits", "predict_logits")
        )

    def adjust_logits(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the final scores `(B, C)`, given the model's own and the head's input, `(B, d)`."""
        return logits

    def predict_logits(
        self, model: StreamModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor
    ) -> Tensor:
        """Return the final scores `(B, C)`: by default what `adjust_logits` makes of the model's own.

        A method overrides it to run the model again, such as with other weights. The call may come from a hook on the
        model, which must not run again: `PlainModel.run` goes past it.

        Args:
            model: in training or loaded.
            inputs: what it was given, `pixel_values` among it.
            logits, features: as `adjust_logits` has them.
        """
        return self.adjust_logits(logits, features)

    # ---- what lasts ----------------------------------------------------------------------------------------------

    def state(self) -> MethodState:
        """Return the method's memory, without the bases of its projection, which have files of their own."""
        return MethodState({}, {})

    def load_state(self, state: MethodState) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: a state of another method.
        """
        if state.tensors or state.values:
            found = ", ".join(sorted([*state.tensors, *state.values]))
            raise ValueError(
                f"method {self.name!r} remembers nothing, but its files hold {found}: they are another's."
            )
