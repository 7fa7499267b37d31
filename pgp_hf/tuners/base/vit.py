"""Choose prompts on a ViT by a query to the frozen model: compute the query, and hook into the forward pass."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ...backbones import Family
from ...backbones.family import CLS
from ...backbones.registry import check, find
from ...backbones.vit import ViTLike
from ...heads.growing import name_classes
from ...projection.protocol import Traced
from ...runs.digest import tensor_sha256
from .config import PromptConfig
from .embeddings import PromptedEmbeddings, shared_embeddings
from .head import check_modules_to_save, prepare_head
from .last_block import begin_reading, end_reading, forget, is_reading, narrow
from .layer import PromptLayer
from .model import PromptTuner
from .outputs import add_similarity

if TYPE_CHECKING:
    from transformers import ViTForImageClassification, ViTModel


_OUTPUTS = ("output_hidden_states", "output_attentions")


class ViTPromptTuner(PromptTuner):
    """Add prompts to a model of any of `pgp_hf.backbones.FAMILIES`, chosen by a query to the frozen model.

    One forward pass runs these hooks: before the backbone, the frozen model's feature of the same images (or
    `prompt_query`, `(B, d)`, when the caller has kept it) selects each image's prompts; after the backbone, the method
    hides its prompts from everything downstream; after the whole model, in training, the output gets
    `prompt_similarity` `(B,)`, and a loss that the model computed itself gets the pull term
    `- pull_constraint_coeff * mean_b sum_k cos(q_b, k)`.
    """

    _backbone_name: tuple[int, str] | None = None  # of the model with this id, which a head may be put around
    _similarity: Tensor | None = None
    _as_tuple = False
    _head_hook: RemovableHandle | None = None  # on the classifier, for one forward pass
    _for_classifier = False  # whether the pass under way is one of the whole model
    _reads_first = False  # whether only the first tokens of the pass under way are read

    # ---- what a method defines -----------------------------------------------------------------------------------

    @abstractmethod
    def _targets(self, config: Any, stem: str, backbone: ViTModel) -> list[str]:
        """Return the names of the modules to wrap; `stem` is the backbone's name with a dot, or empty."""

    @abstractmethod
    def _select(self, query: Tensor, config: Any) -> Tensor:
        """Choose prompts for queries `(B, d)`; return each image's summed cosine with its keys, `(B,)`."""

    @property
    @abstractmethod
    def pool_size(self) -> int:
        """Return the number of pool entries that images select from."""

    def _check_call(self, config: Any, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for arguments of a forward pass that do not fit."""

    # ---- injection -----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(PromptConfig, peft_config)
        check(self.model)
        name, family = find(self.model)
        backbone = self.model.get_submodule(name)
        targets = self._targets(config, f"{name}." if name else "", backbone)
        self._check_targets(config, targets)
        config.target_modules = targets
        self._check_width(config, family.width(backbone))
        config.head_input = None if family.head_input == CLS else family.head_input
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(PromptConfig, peft_config)
        prepare_head(cast("ViTForImageClassification", model), config, self._head_width(config))
        self._name_classes()  # of the active adapter, which need not be this one
        check_modules_to_save(model, config)
        inside = [name for name, _ in self.backbone.named_modules() if name]
        for saved in config.modules_to_save or []:
            if any(name == saved or name.endswith(f".{saved}") for name in inside):
                raise ValueError(
                    f"modules_to_save={config.modules_to_save}: {saved!r} is in the backbone, which must stay frozen "
                    "for queries to mean the same in every task. Name modules outside it, such as the classifier."
                )

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        last = self.family.blocks(self.backbone)[-1]
        self._install_hooks(
            [
                last.register_forward_pre_hook(self._before_last_block, with_kwargs=True),
                model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
                self.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
                self.backbone.register_forward_hook(self._after_backbone),
                self.backbone.register_forward_hook(self._for_head),
                model.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        )

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        super().prepare_stream(tasks, names)
        self._name_classes()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use another adapter, and its class names."""
        super().set_adapter(adapter_name, inference_mode)
        self._name_classes()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; after the active one, all wrapped modules use the same other one."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:
            self.set_adapter(
                self.active_adapters
            )  # PEFT chooses for each module, among those that have parameters there

    def _name_classes(self) -> None:
        """Note the class names of the active adapter in the model, as pipelines read them."""
        known = cast("dict[str, PromptConfig]", self.peft_config)
        for config in (known[name] for name in self.active_adapters if name in known):
            if config.id2label is not None and "classifier" in (config.modules_to_save or ()):
                name_classes(self.model, config.id2label)

    @property
    def backbone(self) -> ViTModel:
        """Return the image model, such as a `ViTModel`."""
        known = self._backbone_name  # asked for many times in each pass
        if known is None or known[0] != id(self.model):
            known = self._backbone_name = id(self.model), find(self.model)[0]
        return self.model.get_submodule(known[1])

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the frozen blocks of the backbone."""
        blocks: nn.ModuleList = self.family.blocks(self.backbone)
        return blocks

    @property
    def family(self) -> Family:
        """Return the description of the backbone: where its parts are, and which tokens are read."""
        return find(self.model)[1]

    def _head_width(self, config: Any) -> int:
        family = self.family
        return family.parts * family.width(self.backbone)

    # ---- a forward pass ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Return the query q(x) of each image: a feature of the frozen model, its CLS if it has one, `(B, d)` (L2P, Sec. 4.2).

        It is computed in eval mode, so that dropout cannot change which prompts an image gets.
        """
        backbone, layers = self.backbone, self.layers
        family = self.family
        family.set_positions(kwargs, self.adapter_config.interpolate_pos_encoding)
        training = [module for module in backbone.modules() if module.training]
        bypass = [layer.bypass for layer in layers]
        self._reads_first = self.reads_last_block
        try:
            for layer in layers:
                layer.bypass = True
            for module in training:  # one by one, so that modules that are in eval mode already stay in it
                module.training = False
            return family.query(backbone(pixel_values, return_dict=True, **kwargs))
        finally:
            self._reads_first = False
            for layer, value in zip(layers, bypass, strict=True):
                layer.bypass = value
            for module in training:
                module.training = True

    def traced(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None, autocast: torch.dtype | None = None
    ) -> Traced:
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        return super().traced(pixel_values, query, autocast)

    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        return self.query(pixel_values)

    # ---- the last block ------------------------------------------------------------------------------------------

    @property
    def reads_last_block(self) -> bool:
        """Return True where the last block computes only the tokens that are read, see `read_last_block`."""
        return is_reading(self._last_attention())

    def read_last_block(self, only_read: bool = True) -> None:
        """Let the last block compute only the tokens that the head or a query reads, or all of them again.

        The same numbers up to rounding. It applies where only the scores are asked for: not to hidden states, attentions,
        or a backbone that is called by itself.

        Raises:
            ValueError: a backbone whose head reads all tokens, or prompts in the last block's attention.
        """
        attention = self._last_attention()
        if only_read and (not isinstance(self.family, ViTLike) or isinstance(attention, PromptLayer)):
            why = "has prompts in its last block" if isinstance(attention, PromptLayer) else "reads all tokens"
            raise ValueError(f"this {self.name} adapter on a {self.family.name} {why}: leave its last block whole.")
        (begin_reading if only_read else end_reading)(attention)

    def _last_attention(self) -> nn.Module:
        attention: nn.Module = getattr(self.family.blocks(self.backbone)[-1], self.family.attention)
        return attention

    def _count_read(self) -> int:
        """Return the number of first tokens that are read in a pass of the whole model."""
        return 1

    def _before_last_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, *others = args
        forget(getattr(block, self.family.attention))
        # a checkpoint runs the block's forward pass again in the backward pass, without its hooks
        again = getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()
        if (
            again
            or not self._reads_first
            or any(other is not None for other in (*others, kwargs.get("attention_mask")))
        ):
            return None
        norm, attention = getattr(block, self.family.norm), getattr(block, self.family.attention)
        return (narrow(attention, norm, hidden, 1 if self.layer.bypass else self._count_read()), *others), kwargs

    def unload(self) -> nn.Module:
        """Return the base model without adapter and hooks, as it was before."""
        end_reading(self._last_attention())
        return super().unload()

    # ---- what the head reads, again --------------------------------------------------------------------------------

    def _prompt_values(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return the values that all images share, and those of the entries, with the entries along dimension 0.

        None for a method that does not tell: its features then count as moved in each evaluation.
        """
        return None

    def _predicted(self, query: Tensor) -> Tensor:
        """Return the entries `(B, k)` that images select in prediction, by their queries; without a pool, all the same."""
        return torch.zeros(len(query), 1, dtype=torch.long, device=query.device)

    @torch.no_grad()
    def feature_states(self, batches: Sequence[Tensor | None]) -> list[str | None]:
        """Return a digest of the prompts that the images of each batch select, by their queries; None without those."""
        values = None if self.layer.adapter is None else self._prompt_values()
        if values is None:
            return [None] * len(batches)
        shared, entries = values
        device = next(self.layer.parameters()).device
        # modules between backbone and head may learn as well (modules_to_save)
        between = [value for name, value in self.trainable().items() if not self._is_prompt_or_head(name)]
        common = "".join(tensor_sha256(value) for value in [*shared, *between])
        own = ["".join(tensor_sha256(value[entry]) for value in entries) for entry in range(self.pool_size)]
        states: list[str | None] = []
        for query in batches:
            if query is None:
                states.append(None)
                continue
            chosen = self._predicted(query.to(device)).tolist()
            text = common + ";".join(",".join(own[entry] for entry in row) for row in chosen)
            states.append(hashlib.sha256(f"{self.adapter} {chosen} {text}".encode()).hexdigest())
        return states

    def _is_prompt_or_head(self, name: str) -> bool:
        """Return True for the name of a parameter that is either, as `trainable` has it."""
        last = name.rpartition(".")[2]
        return last.startswith(self.prefix) or name.startswith("base_model.model.classifier.")

    def score_features(self, features: Tensor) -> Tensor:
        """Return the scores `(B, C)` of what the head reads, `(B, d)`, as a pass in evaluation has them."""
        statistics = self.statistics if self.uses_statistics_head else None
        return self.linear_logits(features) if statistics is None else statistics(features)

    def _before_model(
        self, model: ViTForImageClassification, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.layer.bypass:
            return None
        if self._head_hook is not None:  # of a pass that failed
            self._head_hook.remove()
            self._head_hook = None
        if self.uses_statistics_head and hasattr(model, "classifier"):
            # anew for each pass: PEFT copies a classifier together with its hooks, for every adapter that is added
            self._head_hook = model.classifier.register_forward_hook(self._after_classifier)
        # states and attentions of all tokens may be asked for
        asked = any(kwargs.get(name, getattr(model.config, name, False)) for name in _OUTPUTS)
        self._for_classifier = hasattr(model, "classifier") and not asked
        return_dict = kwargs.get("return_dict")
        self._as_tuple = not (model.config.return_dict if return_dict is None else return_dict)
        return args, {**kwargs, "return_dict": True}  # the hooks below need names; `_after_model` undoes it

    def _before_backbone(
        self, backbone: ViTModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.layer.bypass:
            return None
        within, self._for_classifier, self._reads_first = self._for_classifier, False, False
        query = kwargs.pop("prompt_query", None)
        self._similarity = None
        for layer in self.layers:
            layer.selected = None
            if isinstance(layer, PromptedEmbeddings):
                layer.forget()
        if self.layer.adapter is None:
            return args, kwargs
        config = self.adapter_config
        self._check_call(config, kwargs)
        self.family.set_positions(kwargs, config.interpolate_pos_encoding)
        pixel_values = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self._check_size(pixel_values)
        if query is None:
            position = {k: v for k, v in kwargs.items() if k == "interpolate_pos_encoding" and v is not None}
            with shared_embeddings(self.layer, pixel_values):
                query = self.query(pixel_values, **position)
        elif query.shape != (len(pixel_values), config.hidden_size):
            raise ValueError(
                f"prompt_query of shape {tuple(query.shape)}: expected {(len(pixel_values), config.hidden_size)}, "
                "one feature of the frozen model per image (see `query`)."
            )
        similarity = self._select(query, config)
        self._similarity = similarity if self.model.training else None
        self._reads_first = within and self.reads_last_block
        return args, kwargs

    def _for_head(self, backbone: ViTModel, args: tuple[Any, ...], output: Any) -> None:
        """Give the head its input in its own precision, which may be above the backbone's."""
        head = getattr(self.model, "classifier", None)
        if self.layer.bypass or head is None:
            return
        copies = getattr(head, "modules_to_save", {})
        adapter = self.layer.adapter
        used = copies[adapter] if adapter in copies else getattr(head, "original_module", head)
        hidden, parameter = getattr(output, "last_hidden_state", None), next(used.parameters(), None)
        if hidden is not None and parameter is not None:
            output.last_hidden_state = hidden.to(parameter.dtype)

    def _after_classifier(self, classifier: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._head_hook is not None:
            self._head_hook.remove()
            self._head_hook = None
        statistics = self.statistics
        # always float32, since half precision has too few digits to rank classes
        return None if statistics is None else statistics(args[0])

    def _after_model(
        self, model: ViTForImageClassification, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
    ) -> Any:
        if self.layer.bypass:
            return None
        # taken off the tuner: `copy.deepcopy` of a model that holds a tensor with a graph would fail
        similarity, self._similarity = self._similarity, None
        if similarity is not None:
            changes = {}
            loss = getattr(output, "loss", None)
            if loss is not None:
                items = kwargs.get("num_items_in_batch")
                pull = similarity.mean() if items is None else similarity.sum() / items
                changes["loss"] = loss - self.adapter_config.pull_constraint_coeff * pull
            output = add_similarity(output, similarity, **changes)
        return output.to_tuple() if self._as_tuple else output
