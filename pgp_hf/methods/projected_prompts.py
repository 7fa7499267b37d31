"""Prompts whose updates are projected onto the null space of what older tasks showed them: PGP and its relatives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ..models import Protectable, StreamModel
from ..projection import HasKeys, Projection, ProjectionConfig
from .base import Batch, ContinualMethod, MethodCard, TaskContext
from .registry import register

CITATIONS = {
    "pgp": "Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024",
    "attention": "Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024",
}


@register
class ProjectedPrompts(ContinualMethod):
    """Prompt gradient projection (Qiao et al., ICLR 2024), or another condition of `pgp_hf.projection`.

    Works on a model that is `Protectable`, as the prompt tuners are.

    Args:
        config: what is protected and how.

    Attributes:
        projection: the `Projection` with its bases.
    """

    name = "projected_prompts"
    config_class = ProjectionConfig
    config: ProjectionConfig
    projection: Projection

    def __init__(self, config: ProjectionConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.projection = Projection(self.config)

    @property
    def passes_as_evaluation(self) -> bool:  # type: ignore[override]  # it depends on the settings
        """Return True where the passes of `end_task` show the head what evaluation does, and need no class statistics."""
        config, own = self.config, type(self).end_task is ProjectedPrompts.end_task  # not that of a user's subclass
        return own and self.projection.active and not (config.bf16_probes or config.reads_statistics)

    def describe(self) -> MethodCard:
        condition = self.config.method
        if condition == "none":
            return MethodCard("Prompts without projection", "updates of the prompts were not projected")
        return MethodCard(
            title=f"Projected prompts ({condition})",
            sentence=f"updates of the prompts that have a basis were projected, by the condition `{condition}`",
            citation=CITATIONS.get(condition),
        )

    def settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def check(self, model: StreamModel) -> None:
        check_projection(self.config, model)
        if self.projection.active and not _protectable(model).prompt_parameters():
            warnings.warn(
                f"projection method {self.config.method!r} has nothing to protect: this {model.name} adapter has no prompt "
                "that tasks share. No update will be projected; give it shared prompts, or choose method='none'.",
                stacklevel=5,  # the line that makes a PGPTrainer
            )

    def begin_task(self, context: TaskContext) -> None:
        if self.projection.active:
            parameters = self._parameters(context.model)
            self.projection.fit_entries({name: tuple(parameter.shape) for name, parameter in parameters})
            self.projection.projector.anchor(parameters)

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        if not self.projection.active:
            return ()
        return self.projection.projector.attach(optimizer, lambda: self._parameters(context.model))

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        if not self.config.ln_penalty:
            return losses
        return losses + self.projection.penalty(_protectable(context.model))

    def end_task(self, context: TaskContext) -> None:
        """Extend the projection's bases by what the task's training images show.

        Raises:
            RuntimeError: prompts have moved where they must not.
        """
        if not self.projection.active:
            return
        self.projection.projector.check(self._parameters(context.model))
        self.projection.update_bases(
            _protectable(context.model),
            self._inputs(context),
            keys=(batch.inputs for batch, _ in context.views(None)) if self.config.all_keys else (),
            task=context.task,
            seed=context.seed,
            classes=context.stream.seen_classes(context.task),
            **context.collectives._asdict(),
        )

    def _inputs(self, context: TaskContext) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
        for batch, positions in context.views(self.config.max_images):
            yield batch.inputs, positions

    def _parameters(self, model: StreamModel) -> list[tuple[str, nn.Parameter]]:
        return list(_protectable(model).prompt_parameters().items())


def _protectable(model: StreamModel) -> Protectable:
    if not isinstance(model, Protectable):
        raise TypeError(
            f"a {type(model).__name__} has no prompts that a projection could protect: use a prompt adapter "
            "(pgp_hf.L2PConfig, ...), or another method, such as pgp_hf.methods.create('fine_tuning')."
        )
    return model


def check_projection(config: ProjectionConfig, model: StreamModel) -> None:
    """Raise ValueError when a projection needs something that the adapter lacks, TypeError without a prompt adapter."""
    tuner, head = _protectable(model), model.settings().get("head")
    if config.method == "none":
        return
    if config.reads_statistics and head != "statistics":
        raise ValueError(
            f"probe_space='statistics' needs an adapter with head='statistics', not {head!r}: set it in the adapter's "
            "configuration, or choose another probe_space."
        )
    if config.all_keys and not isinstance(tuner, HasKeys):
        raise ValueError(
            f"all_keys=True is for the keys of a pool that tasks share, and this {model.name} adapter has none: leave it False."
        )
    if config.ln_penalty and not tuner.token_offsets():
        raise ValueError(
            f"ln_penalty={config.ln_penalty} is for prompts that enter the network as tokens, and this {model.name} "
            "adapter has none: leave it at 0."
        )
