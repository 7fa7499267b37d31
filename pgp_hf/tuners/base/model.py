"""The tuner that every prompt method builds on: injection, unloading, and what a trainer may ask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ...heads.statistics import ClassStatistics
from ...projection.protocol import PerSample, Traced, flat
from ...runs.digest import backbone_key, backbone_sha256
from .layer import PromptLayer


class PromptTuner(BaseTuner):
    """A PEFT tuner with prompts in wrapped modules of a frozen backbone; a method fills in the abstract parts.

    To a trainer it is a `pgp_hf.models.StreamModel`, a `KeepsClassStatistics` and `Protectable`.
    """

    tuner_layer_cls = PromptLayer
    target_module_mapping: dict[str, list[str]] = {}
    _in_task = False

    # ---- what a method defines -----------------------------------------------------------------------------------

    @abstractmethod
    def _wrap(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> nn.Module:
        """`target` (a module, or its wrapper when another adapter is there) with the adapter's parameters added."""

    @abstractmethod
    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters that a projection may protect, by their names in the adapter file."""

    @abstractmethod
    def protected_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """What these images show to those parameters: (name, role, rows)."""

    def token_offsets(self) -> dict[str, Tensor]:
        """Of the prompts that enter the network as tokens, what is added to them before the first LayerNorm.

        By name of the parameter, in a shape that broadcasts with it; empty where prompts are no tokens.
        """
        return {}

    @abstractmethod
    def attention_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """The same for consistent attention: queries as they meet the prompt, and the attention that they pay to it.

        A name ending in ".T" stands for the parameter with its last two dimensions swapped.
        """

    def _per_entry(self) -> Callable[[Tensor], Tensor]:
        """Turns the gradient of each image's copy of a parameter into rows; all of it is one row by default."""
        return flat

    # ---- a stream ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The method's PEFT type in lower case, such as "l2p"."""
        return self.adapter_config.peft_type.lower()

    @property
    def class_names(self) -> dict[int, str] | None:
        """Name of each class; None without a classifier."""
        return self.adapter_config.id2label

    def settings(self) -> dict[str, Any]:
        """Return the adapter's own settings, which must agree for a run to be continued."""
        return self.adapter_config.settings()

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen backbone by its key in `results.json`; nothing for sharded weights."""
        found = backbone_sha256(self.model, self.adapter_config.modules_to_save)
        return {} if found is None else {backbone_key(self.model): found}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their names in `adapter_model.safetensors`."""
        adapter = self.adapter
        return {
            f"base_model.{name}".replace(f".modules_to_save.{adapter}", "").removesuffix(f".{adapter}"): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def auxiliary_loss(self, output: ModelOutput) -> Tensor | None:
        """Return each image's pull term with its weight, `(B,)`; None where no keys are selected."""
        similarity = getattr(output, "prompt_similarity", None)
        return None if similarity is None else -self.adapter_config.pull_constraint_coeff * similarity

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Take the classes' names from a stream, unless the model had names for them.

        Args:
            tasks: label ids of each task.
            names: by label id.
        """
        config = self.adapter_config
        if config.id2label == {label: f"LABEL_{label}" for label in config.id2label or ()}:
            config.id2label = dict(names)

    def begin_task(self, task: int) -> None:
        """Called before the 0-based task trains; the linear head classifies from now on."""
        self._in_task = True

    def training_starts(self) -> None:
        """Called when a task's first step is near, after a checkpoint was loaded."""

    def end_task(self, task: int) -> None:
        """Called after the 0-based task has trained."""

    def resume_after(self, task: int) -> None:
        """Called when the state after the 0-based task has been loaded."""
        self._in_task = False

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def _after_backbone(self, backbone: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
        """Hide the prompts in the backbone's output."""

    # ---- injection -----------------------------------------------------------------------------------------------

    def _check_width(self, config: Any, width: int) -> None:
        """Note the backbone's width in a new configuration, hold a loaded one against it."""
        if config.hidden_size not in (None, width):
            raise ValueError(
                f"the adapter was made for a backbone of hidden size {config.hidden_size}, this one has {width}: "
                f"load it on its own backbone ({config.base_model_name_or_path or 'see its adapter_config.json'})."
            )
        config.hidden_size = width

    def _check_targets(self, config: Any, targets: list[str]) -> None:
        """Refuse a loaded adapter whose parameters belong to modules that are called otherwise here."""
        given = config.target_modules
        if given is not None and sorted([given] if isinstance(given, str) else given) != sorted(targets):
            raise ValueError(
                f"the adapter was made for the modules {given}, in this {type(self.model).__name__} they are {targets}: "
                "its parameters would find no place. Load it on the kind of model it was made on, for example a "
                "ViTForImageClassification instead of a bare ViTModel."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = self._wrap(peft_config, adapter_name, target, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)
        if layer is self.layer and peft_config.head == "statistics":
            self._add_statistics(layer, peft_config, adapter_name)

    def unload(self) -> nn.Module:
        """The base model without adapter and hooks, as it was before."""
        self._remove_hooks()
        for name, module in list(self.model.named_modules()):
            original = (
                module.base_layer if isinstance(module, PromptLayer) else getattr(module, "original_module", None)
            )
            if original is not None:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, original)
            if isinstance(module, PromptLayer):
                module.release()
        self.model.__dict__.pop("peft_config", None)
        return self.model

    def _install_hooks(self, hooks: list[Any]) -> None:
        """Take over from the hooks of a tuner that has added an adapter to the same model before."""
        self._remove_hooks()
        self.model.__dict__["_prompt_hooks"] = hooks

    def _remove_hooks(self) -> None:
        for hook in self.model.__dict__.pop("_prompt_hooks", []):
            hook.remove()

    def _check_merge_allowed(self) -> None:
        raise ValueError("prompts depend on the image and cannot be merged into weights: use unload() to drop them.")

    # ---- the parts -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The frozen image model, whose `embeddings` are wrapped."""

    @property
    def layers(self) -> list[PromptLayer]:
        """The wrapped modules, in the order of the forward pass."""
        return [module for module in self.model.modules() if isinstance(module, PromptLayer)]

    @property
    def layer(self) -> Any:
        """The wrapped embeddings, which hold the keys."""
        return self.backbone.embeddings

    @property
    def adapter(self) -> str:
        """Name of the active adapter, as the wrapped modules have it: PEFT and transformers both set it there."""
        return next(name for name in self.layer.active_adapters if name in self.peft_config)

    @property
    def adapter_config(self) -> Any:
        """Configuration of the active adapter (`config` is the backbone's, as PEFT users expect)."""
        return self.peft_config[self.adapter]

    def class_logits(self, output: ModelOutput) -> Tensor:
        """The scores `(B, C)` in an output of the model."""
        return output.logits

    @property
    def selected_prompts(self) -> Tensor | None:
        """Pool entries `(B, k)` of the last forward pass; None where nothing is selected."""
        return self.layer.selected

    # ---- heads ---------------------------------------------------------------------------------------------------

    def _add_statistics(self, layer: PromptLayer, config: Any, adapter_name: str) -> None:
        """Give the wrapped embeddings, where the adapter's keys are, its class statistics as buffers."""
        if config.id2label is None:
            raise ValueError(
                f"head='statistics' needs classes, which a {type(self.model).__name__} does not name: use a model with a "
                "head, for example AutoModelForImageClassification (for a CLIPModel, ClipPromptConfig.for_classes)."
            )
        container = f"{self.prefix}statistics"
        if not hasattr(layer, container):
            setattr(layer, container, nn.ModuleDict())
            layer.other_param_names = (*layer.other_param_names, container)
        statistics = ClassStatistics(len(config.id2label), self._head_width(config), config.shrinkage)
        getattr(layer, container)[adapter_name] = statistics.to(next(layer.base_layer.parameters()).device)

    def _head_width(self, config: Any) -> int:
        """Length of the features that `watch_features` gives."""
        return config.hidden_size

    @property
    def statistics(self) -> ClassStatistics | None:
        """Class statistics of the adapter in use; None with a linear head, and while the adapter is disabled."""
        known = getattr(self.layer, f"{self.prefix}statistics", {})
        return dict(known.items()).get(self.layer.adapter)

    @property
    def uses_statistics_head(self) -> bool:
        """Whether the logits are those of the statistics: in evaluation, except while a task is being learned."""
        return self.statistics is not None and not self.model.training and not self._in_task

    def learn_statistics(self, statistics: ClassStatistics) -> None:
        """Take in what a finished task's training images show to the head, which speaks from now on."""
        self.statistics.merge(statistics)
        self._in_task = False

    def as_before_task(self, task: int) -> AbstractContextManager | None:
        """A block in which images pass as they did before this last task, whose entry they may not select.

        None where tasks have no entries that images select: then all images pass as old ones do.
        """
        return None

    def linear_logits(self, features: Tensor) -> Tensor:
        """What the trained head makes of features `(B, d)`, whichever head speaks; `(B, C)`."""
        return self.model.classifier(features)

    @abstractmethod
    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """The backbone's features `(B, d)` of images, as they are without any prompt."""

    def watch_features(self, callback: Callable[[Tensor], Any]) -> Any:
        """Calls back with what the head reads, `(B, d)`, at each forward pass; returns a handle to `remove()`."""
        return self.model.classifier.register_forward_pre_hook(lambda module, args: callback(args[0]))

    @torch.enable_grad()
    def traced(self, pixel_values: Tensor, prompt_query: Tensor | None = None) -> Traced:
        """A forward pass that is differentiable in each image's own copy of the shared prompts, and in nothing else.

        Selection is as ever and gets no gradient. No parameter's `grad` is touched by `torch.autograd.grad` of the
        features with respect to the copies.
        """
        features: list[Tensor] = []
        watch = self.watch_features(features.append)
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, PromptLayer)}
        for layer in layers.values():
            layer.copies = {}
        try:
            self.model(pixel_values=pixel_values, **({} if prompt_query is None else {"prompt_query": prompt_query}))
            copies = {
                f"base_model.model.{path}.{name}": PerSample(values, self._per_entry())
                for path, layer in layers.items()
                for name, values in layer.copies.items()
                if values.numel()
            }
        finally:
            watch.remove()
            for layer in layers.values():
                layer.copies = None
        return Traced(features[0], copies, {})
