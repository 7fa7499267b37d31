"""`PGPTrainer`: the trainer of a stream with prompts whose updates are projected."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ..data.stream import TaskStream
from ..methods import ProjectedPrompts
from ..projection import Projection, ProjectionConfig
from .arguments import PGPTrainingArguments
from .trainer import Kind, StreamTrainer


class PGPTrainer(StreamTrainer):
    """Learn a `TaskStream` with prompts whose updates are projected: a `StreamTrainer` with that method.

    Args:
        model: a `PeftModel` with a prompt adapter of this package and a classification head.
        args: training arguments; each task is trained with them.
        stream: the tasks.
        projection: settings of the projection; `ProjectionConfig()` by default, `method="none"` for no projection.
        processing_class: the backbone's image processor, for training, evaluation and the saved folder.
        kwargs: any other argument of `Trainer`.

    Attributes:
        projection: the `Projection` with its bases.

    Raises:
        TypeError, ValueError: as [`StreamTrainer`]; a projection that the adapter cannot have.
    """

    method: ProjectedPrompts

    def __init__(
        self,
        model: PeftModel,
        args: PGPTrainingArguments,
        stream: TaskStream,
        projection: ProjectionConfig | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, stream, ProjectedPrompts(projection), processing_class, **kwargs)

    @classmethod
    def with_method(
        cls: type[Kind], model: Any, args: PGPTrainingArguments, stream: TaskStream, method: Any, **kwargs: Any
    ) -> Kind:
        if not isinstance(method, ProjectedPrompts):
            raise TypeError(f"this run was trained by the method {method.name!r}: use StreamTrainer.from_pretrained.")
        make: Any = cls  # which takes a projection where its base takes a method
        return make(model, args, stream, method.config, **kwargs)

    @property
    def projection(self) -> Projection:
        """The `Projection` with its bases."""
        return self.method.projection

    @property
    def tuner(self) -> Any:
        """The prompt tuner inside the `PeftModel`."""
        return self.stream_model


def trainer_of(method: str, **source: Any) -> StreamTrainer:
    """Return the trainer of a finished run.

    Args:
        method: the registered name of its method.
        source: arguments of `from_pretrained`.
    """
    kind = PGPTrainer if method == ProjectedPrompts.name else StreamTrainer
    return kind.from_pretrained(**source)
