"""The tuner that every prompt method builds on: injection, the query pass, and the hooks around a forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .head import prepare_head
from .layer import PromptLayer
from .outputs import add_similarity


class PromptTuner(BaseTuner):
    """Adds prompts to a `ViTModel` or `ViTForImageClassification` of any size, chosen by a query to the frozen model.

    One forward pass runs these hooks: before the backbone, the frozen model's CLS feature of the same images (or
    `prompt_query`, `(B, d)`, when the caller has kept it) selects each image's prompts; after the backbone, the method
    hides its prompts from everything downstream; after the whole model, in training, the output gets
    `prompt_similarity` `(B,)`, and a loss that the model computed itself gets the pull term
    `- pull_constraint_coeff * mean_b sum_k cos(q_b, k)`.
    """

    tuner_layer_cls = PromptLayer
    target_module_mapping: dict[str, list[str]] = {}

    # ---- what a method defines -----------------------------------------------------------------------------------

    @abstractmethod
    def _targets(self, config: Any, stem: str, backbone: nn.Module) -> list[str]:
        """Names of the modules to wrap; `stem` is the backbone's name with a dot, or empty."""

    @abstractmethod
    def _wrap(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> nn.Module:
        """`target` (a module, or its wrapper when another adapter is there) with the adapter's parameters added."""

    @abstractmethod
    def _select(self, query: Tensor, config: Any) -> Tensor:
        """Choose prompts for queries `(B, d)`; returns each image's summed cosine with its keys, `(B,)`."""

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

    def resume_after(self, task: int) -> None:
        """Called when the state after the 0-based task has been loaded."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def _check_call(self, config: Any, kwargs: dict[str, Any]) -> None:
        """Refuse arguments of a forward pass that do not fit."""

    def _after_backbone(self, backbone: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
        """Hide the prompts in the backbone's output."""

    # ---- injection -----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        name = backbone_name(self.model)
        backbone = self.model.get_submodule(name)
        peft_config.target_modules = self._targets(peft_config, f"{name}." if name else "", backbone)
        width = backbone.config.hidden_size
        if peft_config.hidden_size not in (None, width):
            raise ValueError(
                f"the adapter was made for a backbone of hidden size {peft_config.hidden_size}, this one has {width}: "
                f"load it on its own backbone ({peft_config.base_model_name_or_path or 'see its adapter_config.json'})."
            )
        peft_config.hidden_size = width
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        prepare_head(model, peft_config)

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

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if "_hooks" in self.__dict__:  # a second adapter shares them
            return
        self.__dict__["_similarity"] = None
        self.__dict__["_hooks"] = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            self.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            self.backbone.register_forward_hook(self._after_backbone),
            model.register_forward_hook(self._after_model, with_kwargs=True),
        ]

    def unload(self) -> nn.Module:
        """The base model without adapter and hooks, as it was before."""
        for hook in self.__dict__.pop("_hooks", []):
            hook.remove()
        for name, module in list(self.model.named_modules()):
            original = (
                module.base_layer if isinstance(module, PromptLayer) else getattr(module, "original_module", None)
            )
            if original is not None:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, original)
            if isinstance(module, PromptLayer):
                module.release()
        return self.model

    def _check_merge_allowed(self) -> None:
        raise ValueError("prompts depend on the image and cannot be merged into weights: use unload() to drop them.")

    # ---- the parts -----------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The `ViTModel`."""
        return self.model.get_submodule(backbone_name(self.model))

    @property
    def layers(self) -> list[PromptLayer]:
        """The wrapped modules, in the order of the forward pass."""
        return [module for module in self.model.modules() if isinstance(module, PromptLayer)]

    @property
    def layer(self) -> Any:
        """The wrapped embeddings, which hold the keys."""
        return self.backbone.embeddings

    @property
    def adapter_config(self) -> Any:
        """Configuration of the active adapter (`config` is the backbone's, as PEFT users expect)."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def selected_prompts(self) -> Tensor | None:
        """Pool entries `(B, k)` of the last forward pass."""
        return self.layer.selected

    # ---- a forward pass ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The query function q(x): the frozen model's CLS feature, `(B, d)` (L2P, Sec. 4.2).

        Always in eval mode, so that dropout cannot change which prompts an image gets.
        """
        backbone, layers = self.backbone, self.layers
        kwargs.setdefault("interpolate_pos_encoding", self.adapter_config.interpolate_pos_encoding)
        training = [module for module in backbone.modules() if module.training]
        bypass = [layer.bypass for layer in layers]
        try:
            for layer in layers:
                layer.bypass = True
            for module in training:
                module.training = False
            return backbone(pixel_values, return_dict=True, **kwargs).last_hidden_state[:, 0]
        finally:
            for layer, value in zip(layers, bypass, strict=True):
                layer.bypass = value
            for module in training:
                module.training = True

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.layer.bypass:
            return None
        return_dict = kwargs.get("return_dict")
        self._as_tuple = not (model.config.return_dict if return_dict is None else return_dict)
        return args, {**kwargs, "return_dict": True}  # the hooks below need names; _after_model undoes it

    def _before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.layer.bypass:
            return None
        query = kwargs.pop("prompt_query", None)
        self.__dict__["_similarity"] = None
        for layer in self.layers:
            layer.selected = None
        if self.layer.adapter is None:
            return args, kwargs
        config = self.adapter_config
        self._check_call(config, kwargs)
        if config.interpolate_pos_encoding and kwargs.get("interpolate_pos_encoding") is None:
            kwargs["interpolate_pos_encoding"] = True
        pixel_values = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if query is None:
            position = {k: v for k, v in kwargs.items() if k == "interpolate_pos_encoding" and v is not None}
            query = self.query(pixel_values, **position)
        elif query.shape != (len(pixel_values), config.hidden_size):
            raise ValueError(
                f"prompt_query of shape {tuple(query.shape)}: expected {(len(pixel_values), config.hidden_size)}, "
                "one CLS feature of the frozen model per image."
            )
        similarity = self._select(query, config)
        self.__dict__["_similarity"] = similarity if self.training else None
        return args, kwargs

    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> Any:
        if self.layer.bypass:
            return None
        # popped: a graph tensor left on a module would break copy.deepcopy
        similarity = self.__dict__["_similarity"]
        self.__dict__["_similarity"] = None
        if similarity is not None:
            changes = {}
            if getattr(output, "loss", None) is not None:
                items = kwargs.get("num_items_in_batch")
                pull = similarity.mean() if items is None else similarity.sum() / items
                changes["loss"] = output.loss - self.adapter_config.pull_constraint_coeff * pull
            output = add_similarity(output, similarity, **changes)
        return output.to_tuple() if self._as_tuple else output


def backbone_name(model: nn.Module) -> str:
    """Name of the ViT inside `model`, empty when it is the model itself.

    Raises:
        ValueError: there is none.
    """
    for name, module in model.named_modules():
        embeddings = getattr(module, "embeddings", None)
        if hasattr(embeddings, "patch_embeddings") and hasattr(embeddings, "cls_token"):
            return name
    raise ValueError(
        f"{type(model).__name__} has no patch embeddings with a CLS token, which visual prompts need: "
        "use a ViTModel or a ViTForImageClassification."
    )
