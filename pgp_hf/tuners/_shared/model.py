"""The tuner that every prompt method builds on: injection, unloading, and what a trainer may ask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .layer import PromptLayer


class PromptTuner(BaseTuner):
    """A PEFT tuner with prompts in wrapped modules of a frozen backbone; a method fills in the abstract parts.

    A trainer meets methods through the part on streams, and through `class_logits`, `watch_features`, `query` (None
    where nothing is selected) and `selected_prompts`.
    """

    tuner_layer_cls = PromptLayer
    query: Callable[..., Tensor] | None = None
    target_module_mapping: dict[str, list[str]] = {}

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

    def prepare_stream(self, tasks: list[list[int]]) -> None:
        """Called once before a stream; `tasks` has the classes of each task."""

    def begin_task(self, task: int) -> None:
        """Called before the 0-based task trains."""

    def training_starts(self) -> None:
        """Called when a task's first step is near, after a checkpoint was loaded."""

    def end_task(self, task: int) -> None:
        """Called after the 0-based task has trained."""

    def resume_after(self, task: int) -> None:
        """Called when the state after the 0-based task has been loaded."""

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

    @abstractmethod
    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """The backbone's features `(B, d)` of images, as they are without any prompt."""

    def watch_features(self, callback: Callable[[Tensor], Any]) -> Any:
        """Calls back with what the head reads, `(B, d)`, at each forward pass; returns a handle to `remove()`."""
        return self.model.classifier.register_forward_pre_hook(lambda module, args: callback(args[0]))
