"""Provide the base of all prompt tuners: injection into a model and removal, and the interface of a trainer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ...heads.growing import new_names
from ...heads.opening import open_adapter_head
from ...heads.statistics import ClassStatistics
from ...projection.protocol import PerSample, Traced, flat
from ...runs.digest import backbone_key, backbone_sha256
from .attention import in_products
from .config import PromptConfig
from .head import grow_head
from .layer import PromptLayer


class PromptTuner(BaseTuner):
    """A PEFT tuner with prompts in wrapped modules of a frozen backbone; a method fills in the abstract parts.

    To a trainer it is a `pgp_hf.models.StreamModel`, a `KeepsClassStatistics` and `Protectable`.

    A method sets `prefix`, which its parameters' names begin with, and declares the class of its `adapter_config`.
    """

    tuner_layer_cls = PromptLayer
    target_module_mapping: dict[str, list[str]] = {}
    _in_task = False
    _found: list[PromptLayer] | None = None  # the wrapped modules, until others are

    # ---- what a method defines -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """Return the frozen image model, whose `embeddings` are wrapped."""

    @abstractmethod
    def _wrap(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> PromptLayer:
        """Add an adapter's parameters to a module.

        Args:
            config: the adapter's configuration, of the method's own class.
            adapter_name: a name for it.
            target: the module, or its wrapper when another adapter is there.
            name: of the module in the model.

        Returns:
            The wrapper.
        """

    @abstractmethod
    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """Return the active adapter's parameters that a projection may protect, by their names in its file."""

    @abstractmethod
    def protected_rows(self, pixel_values: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield what these images show to those parameters: (name, role, rows)."""

    @abstractmethod
    def attention_rows(self, pixel_values: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the same for consistent attention: queries as they meet the prompt, and the attention they pay to it.

        A name ending in ".T" stands for the parameter with its last two dimensions swapped.
        """

    @abstractmethod
    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """Return the backbone's features `(B, d)` of images, as they are without any prompt."""

    def token_offsets(self) -> dict[str, Tensor]:
        """Return what is added to prompts before the first LayerNorm, where they enter the network as tokens.

        By name of the parameter, in a shape that broadcasts with it; empty for prompts that are not tokens.
        """
        return {}

    def _per_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what turns the gradients of all images' copies of a parameter into rows; one row each by default."""
        return flat

    def _after_backbone(self, backbone: Any, args: tuple[Any, ...], output: Any) -> ModelOutput | None:
        """Hide the prompts in the backbone's output, both of the method's own classes."""
        return None

    # ---- a stream ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Return the method's PEFT type in lower case, such as "l2p"."""
        return self.adapter_config.method_name.lower()

    @property
    def class_names(self) -> dict[int, str] | None:
        """Return the name of each class; None without a classifier."""
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
        saved_whole = f".modules_to_save.{adapter}."

        def name_in_file(name: str) -> str:
            if saved_whole in name:
                return f"base_model.{name.replace(saved_whole, '.')}"
            return f"base_model.{name.removesuffix(f'.{adapter}')}"

        return {name_in_file(name): value for name, value in self.named_parameters() if value.requires_grad}

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
            # those that it has: a stream may have come further than a model that grows
            config.id2label = {label: names.get(label, own) for label, own in (config.id2label or {}).items()}

    def add_classes(self, names: Sequence[str], seed: int) -> None:
        """Let the head know more classes; nothing that is stored of those before changes.

        Adapters side by side share the classes: the heads of all grow.

        Args:
            names: of the new classes, whose ids follow those before.
            seed: of the run; a class's row in a trained head depends on it and the class id alone.

        Raises:
            TypeError: no head, or one that is not linear.
            ValueError: a name that is known, a head that is sharded or that the adapter does not save.
        """
        new = new_names(names, self.class_names, self.model)
        configs = cast("dict[str, PromptConfig]", self.peft_config)
        grow_head(self.model, configs, self.adapter, new, seed)
        for name, config in configs.items():
            self._name_new_classes(name, config, new)

    def _name_new_classes(self, adapter: str, config: PromptConfig, new: Sequence[str]) -> None:
        known = config.id2label or {}
        config.id2label = {**known, **dict(enumerate(new, len(known)))}
        if (statistics := self._statistics_of(adapter)) is not None:
            statistics.add_classes(len(new))

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        """Make room for a 0-based task that was not known in advance.

        Args:
            task: its index; `begin_task` follows.
            classes: label ids of its images.
            seed: of the run.
        """

    def open_head(self) -> None:
        """Replace the head, if there is one, by one of zero classes, for `add_classes` to grow.

        Raises:
            TypeError: a head that is not linear, or a model that cannot be given one.
            ValueError: several adapters, which share the head, or a head that the adapter does not save.
        """
        config, adapter, before = self.adapter_config, self.adapter, self.model
        if (name := open_adapter_head(self, adapter)) is not None:
            for hook in before.__dict__.pop("_prompt_hooks", []):
                hook.remove()
            config.target_modules = [f"{name}.{target}" for target in config.target_modules or ()]
            self._post_injection_hook(self.model, config, adapter)
            self._cast_adapter_dtype(adapter)  # the new head has the backbone's precision
        config.id2label = {}
        if config.head == "statistics":
            self._add_statistics(self.layer, config, adapter)

    def begin_task(self, task: int) -> None:
        """Prepare for the training of the 0-based task; the trained head classifies from now on."""
        self._in_task = True

    def training_starts(self) -> None:
        """Prepare for the task's first step, after a checkpoint has been loaded, if there is one."""

    def after_step(self) -> None:
        """Restore after an optimizer step whatever must not move."""

    def end_task(self, task: int) -> None:
        """Finish the 0-based task, which has been trained."""

    def resume_after(self, task: int) -> None:
        """Continue from the state after the 0-based task, which has been loaded."""
        self._in_task = False

    # ---- injection -----------------------------------------------------------------------------------------------

    def _check_width(self, config: PromptConfig, width: int) -> None:
        """Set the backbone's width in a new configuration, or compare it with that of a loaded one."""
        if config.hidden_size not in (None, width):
            raise ValueError(
                f"the adapter was made for a backbone of hidden size {config.hidden_size}, this one has {width}: "
                f"load it on its own backbone ({config.base_model_name_or_path or 'see its adapter_config.json'})."
            )
        config.hidden_size = width

    def _check_targets(self, config: PromptConfig, targets: list[str]) -> None:
        """Refuse a loaded adapter whose parameters belong to modules that have other names here."""
        given = config.target_modules
        if given is not None and sorted([given] if isinstance(given, str) else given) != sorted(targets):
            raise ValueError(
                f"the adapter was made for the modules {given}, in this {type(self.model).__name__} they are {targets}: "
                "its parameters have no counterpart here. Load it on the kind of model it was made on, for example a "
                "ViTForImageClassification instead of a bare ViTModel."
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(PromptConfig, peft_config)
        layer, self._found = self._wrap(config, adapter_name, target, current_key), None
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)
        if layer is self.layer and config.head == "statistics":
            self._add_statistics(layer, config, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep what trains in float32 beneath any backbone: as PEFT does it for prompts, the head and all that is saved."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules() if autocast_adapter_dtype else ():
            copies = getattr(module, "modules_to_save", None)
            if isinstance(copies, nn.ModuleDict) and adapter_name in copies:
                copies[adapter_name].to(torch.promote_types(next(self.model.parameters()).dtype, torch.float32))

    def unload(self) -> nn.Module:
        """Return the base model without adapter and hooks, as it was before."""
        self._remove_hooks()
        self._found = None
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

    def _install_hooks(self, hooks: list[RemovableHandle]) -> None:
        """Replace the hooks of an earlier tuner on the same model."""
        # transformers' own `load_adapter` makes a new tuner for each adapter: with the hooks of all of them, every
        # forward pass would select prompts several times. They are kept on the model, the one thing the tuners share
        self._remove_hooks()
        self.model.__dict__["_prompt_hooks"] = hooks

    def _remove_hooks(self) -> None:
        of_failed_pass = self.__dict__.pop("_head_hook", None)
        for hook in [*self.model.__dict__.pop("_prompt_hooks", []), *([of_failed_pass] if of_failed_pass else [])]:
            hook.remove()

    def _check_merge_allowed(self) -> None:
        raise ValueError("prompts depend on the image and cannot be merged into weights: use unload() to drop them.")

    # ---- the parts -----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[PromptLayer]:
        """Return the wrapped modules, in the order of the forward pass."""
        if self._found is None:  # a walk over all modules takes longer than everything else in a small step
            self._found = [module for module in self.model.modules() if isinstance(module, PromptLayer)]
        return self._found

    @property
    def layer(self) -> PromptLayer:
        """Return the wrapped embeddings, which hold the keys."""
        return cast(PromptLayer, self.backbone.embeddings)

    @property
    def adapter(self) -> str:
        """Return the name of the active adapter."""
        # from a wrapped module: both PEFT and transformers set it there, but only PEFT sets the tuner's
        return next(name for name in self.layer.active_adapters if name in self.peft_config)

    @property
    def adapter_config(self) -> PromptConfig:
        """Return the configuration of the active adapter (`config` is the backbone's, as PEFT users expect)."""
        return cast(PromptConfig, self.peft_config[self.adapter])

    def class_logits(self, output: ModelOutput) -> Tensor:
        """Return the scores `(B, C)` in an output of the model."""
        return output["logits"]

    @property
    def selected_prompts(self) -> Tensor | None:
        """Return the pool entries `(B, k)` of the last forward pass; None where nothing is selected."""
        return self.layer.selected

    def _check_size(self, pixel_values: Tensor) -> None:
        """Note the images' size in training; in prediction, refuse images that another processor has made.

        Raises:
            ValueError: images of another size than in training.
        """
        config, size = self.adapter_config, list(pixel_values.shape[-2:])
        if self.model.training and self._in_task:
            config.image_size = size if config.image_size in (None, size) else []
        elif config.image_size not in (None, [], size):
            height, width = config.image_size
            raise ValueError(
                f"pixel_values are {size[0]} x {size[1]}, and the prompts were trained on {height} x {width}: use the image "
                "processor in the adapter's folder. transformers.pipeline(..., model=FOLDER) takes the backbone's, unless "
                "image_processor=FOLDER names it. To predict at another size all the same, set the adapter configuration's "
                "image_size to None."
            )

    # ---- heads ---------------------------------------------------------------------------------------------------

    def _add_statistics(self, layer: PromptLayer, config: PromptConfig, adapter_name: str) -> None:
        """Give the wrapped embeddings, where the adapter's keys are, its class statistics as buffers."""
        container = f"{self.prefix}statistics"
        if not hasattr(layer, container):
            setattr(layer, container, nn.ModuleDict())
            layer.other_param_names = (*layer.other_param_names, container)  # PEFT saves what is named here
        statistics = ClassStatistics(len(config.id2label or {}), self._head_width(config), config.shrinkage)
        getattr(layer, container)[adapter_name] = statistics.to(next(layer.base_layer.parameters()).device)

    def _head_width(self, config: Any) -> int:
        """Return the length of the features that `watch_features` gives."""
        return config.hidden_size

    @property
    def statistics(self) -> ClassStatistics | None:
        """Return the class statistics of the adapter in use; None with a linear head or while it is disabled."""
        return self._statistics_of(self.layer.adapter)

    def _statistics_of(self, adapter: str | None) -> ClassStatistics | None:
        known = getattr(self.layer, f"{self.prefix}statistics", {})
        return dict(known.items()).get(adapter)

    @property
    def uses_statistics_head(self) -> bool:
        """Return True where logits come from the statistics: in evaluation, except while a task is being learned."""
        return self.statistics is not None and not self.model.training and not self._in_task

    def learn_statistics(self, statistics: ClassStatistics) -> None:
        """Merge the statistics of a finished task into the head, which classifies by them from now on.

        Raises:
            ValueError: the adapter has another head, or is disabled.
        """
        known = self.statistics
        if known is None:
            raise ValueError(
                f"head={self.adapter_config.head!r} has no class statistics in use: set head='statistics' in the "
                "adapter's configuration, and leave the adapter enabled."
            )
        known.merge(statistics)
        self._in_task = False

    def as_before_task(self, task: int) -> AbstractContextManager[None] | None:
        """Return a block in which no image selects the entry of this last task; None where tasks have no entries."""
        return None

    def linear_logits(self, features: Tensor) -> Tensor:
        """Return the trained head's scores `(B, C)` of features `(B, d)`, whichever head is in use."""
        return self.model.classifier(features)

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call `callback` with the head's input, `(B, d)`, at each forward pass until the handle is removed."""
        return self.model.classifier.register_forward_pre_hook(partial(_show_input, callback))

    @torch.enable_grad()
    def traced(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None, autocast: torch.dtype | None = None
    ) -> Traced:
        """Run a forward pass that is differentiable in each image's own copy of the shared prompts, and only in it.

        Prompts are selected as always, and the selection gets no gradient. `torch.autograd.grad` of the features with
        respect to the copies touches no parameter's `grad`.

        Args:
            autocast: precision of the pass, other than that of the query.
        """
        device = pixel_values.device.type
        precision = nullcontext() if autocast is None else torch.autocast(device, autocast)
        kernel = nullcontext() if autocast is None or device != "cpu" else in_products(cast(Any, self.backbone).config)
        given = {} if prompt_query is None else {"prompt_query": prompt_query}
        features: list[Tensor] = []
        watch = self.watch_features(features.append)
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, PromptLayer)}
        for layer in layers.values():
            layer.copies = {}
        try:
            with precision, kernel:
                self.model(pixel_values=pixel_values, **given)
            copies = {
                f"base_model.model.{path}.{name}": PerSample(values, self._per_entry())
                for path, layer in layers.items()
                for name, values in (layer.copies or {}).items()
                if values.numel()
            }
        finally:
            watch.remove()
            for layer in layers.values():
                layer.copies = None
        return Traced(features[0], copies, {})


def _show_input(callback: Callable[[Tensor], object], classifier: nn.Module, args: tuple[Any, ...]) -> None:
    # no local function, which could not be pickled; it returns None, since any other value would replace the input
    callback(args[0])
