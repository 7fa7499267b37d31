"""The L2P tuner: selects prompts by a query to the frozen model, and hides them from everything downstream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .._shared.head import prepare_head
from .._shared.outputs import add_similarity
from .config import L2PConfig
from .layer import L2PEmbeddings


class L2PModel(BaseTuner):
    """Adds an L2P prompt pool to a `ViTModel` or `ViTForImageClassification` of any size.

    One forward pass runs three hooks: before the backbone, the frozen model's CLS feature of the same images (or
    `prompt_query`, `(B, d)`, when the caller has kept it) selects each image's prompts; after the backbone, the
    prompt tokens are taken out again, so that outputs keep their unprompted shapes, and the token at index 0 becomes
    what the head shall read; after the whole model, in training, the output gets `prompt_similarity` `(B,)`, and a
    loss that the model computed itself gets the pull term `- pull_constraint_coeff * mean_b sum_k cos(q_b, k)`.
    """

    prefix = "l2p_"
    tuner_layer_cls = L2PEmbeddings
    target_module_mapping: dict[str, list[str]] = {}

    # ---- injection -----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: L2PConfig, model_config: dict) -> L2PConfig:
        name = _backbone_name(self.model)
        backbone = self.model.get_submodule(name)
        peft_config.target_modules = [f"{name}.embeddings" if name else "embeddings"]
        width = backbone.config.hidden_size
        if peft_config.hidden_size not in (None, width):
            raise ValueError(
                f"the adapter was made for a backbone of hidden size {peft_config.hidden_size}, this one has {width}: "
                f"load it on its own backbone ({peft_config.base_model_name_or_path or 'see its adapter_config.json'})."
            )
        peft_config.hidden_size = width
        return peft_config

    def _prepare_model(self, peft_config: L2PConfig, model: nn.Module) -> None:
        prepare_head(model, peft_config)

    def _create_and_replace(
        self,
        peft_config: L2PConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        **_: Any,
    ) -> None:
        if isinstance(target, L2PEmbeddings):
            target.update_layer(adapter_name, peft_config)
            return
        layer = L2PEmbeddings(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _post_injection_hook(self, model: nn.Module, config: L2PConfig, adapter_name: str) -> None:
        self._similarity: Tensor | None = None
        if self.layer.hooks:  # transformers' own load_adapter makes a tuner for each adapter of a model
            return
        self.layer.hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            self.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            self.backbone.register_forward_hook(self._after_backbone),
            model.register_forward_hook(self._after_model, with_kwargs=True),
        ]

    def unload(self) -> nn.Module:
        """The base model without adapter and hooks, as it was before."""
        for hook in self.layer.hooks:
            hook.remove()
        self.backbone.embeddings = self.layer.base_layer
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        del self.model.peft_config  # else the next get_peft_model would take its adapters over
        return self.model

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "L2P prompts depend on the image and cannot be merged into weights: use unload() to drop them."
        )

    # ---- the parts -----------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The `ViTModel`."""
        return self.model.get_submodule(_backbone_name(self.model))

    @property
    def layer(self) -> L2PEmbeddings:
        return self.backbone.embeddings

    @property
    def config(self) -> L2PConfig:
        """Configuration of the active adapter."""
        return self.peft_config[self.layer.active_adapters[0]]

    @property
    def selected_prompts(self) -> Tensor | None:
        """Pool indices `(B, top_k)` of the last forward pass."""
        return self.layer.selected

    # ---- a forward pass ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The query function q(x): the frozen model's CLS feature, `(B, d)` (L2P, Sec. 4.2).

        Always in eval mode, so that dropout cannot change which prompts an image gets.
        """
        backbone, layer = self.backbone, self.layer
        kwargs.setdefault("interpolate_pos_encoding", self.config.interpolate_pos_encoding)
        training = [module for module in backbone.modules() if module.training]
        bypass, layer.bypass = layer.bypass, True
        try:
            for module in training:
                module.training = False
            return backbone(pixel_values, return_dict=True, **kwargs).last_hidden_state[:, 0]
        finally:
            layer.bypass = bypass
            for module in training:
                module.training = True

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.layer.bypass:
            return None
        return_dict = kwargs.get("return_dict")
        self._as_tuple = not (model.config.return_dict if return_dict is None else return_dict)
        return args, {**kwargs, "return_dict": True}  # the hooks below need names; _after_model undoes it

    def _before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        layer = self.layer
        if layer.bypass:
            return None
        query = kwargs.pop("prompt_query", None)
        self._similarity = layer.selected = None
        if layer.adapter is None:
            return args, kwargs
        config = self.config
        if kwargs.get("attention_mask") is not None and config.top_k * config.prompt_length:
            raise ValueError(
                "attention_mask does not fit once prompt tokens are inserted: leave it out (all patches attend), "
                "or disable the adapter."
            )
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
        similarity = layer.select(query, config)
        self._similarity = similarity if self.model.training else None
        return args, kwargs

    def _after_backbone(self, backbone: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
        layer = self.layer
        n = 0 if layer.bypass or layer.adapter is None else layer.inserted
        if n == 0:
            return None
        hidden = output.last_hidden_state
        output.last_hidden_state = _without(hidden, n)
        if self.config.head_type == "prompt":
            head_input = hidden[:, 1 : 1 + n].mean(1, keepdim=True)
            output.last_hidden_state = torch.cat([head_input, hidden[:, 1 + n :]], dim=1)
        if getattr(output, "pooler_output", None) is not None:
            output.pooler_output = backbone.pooler(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(_without(h, n) for h in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(_without(_without(a, n, dim=-1), n, dim=-2) for a in output.attentions)
        return output

    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> Any:
        if self.layer.bypass:
            return None
        # popped: a graph tensor left on a module would break copy.deepcopy
        similarity, self._similarity = self._similarity, None
        if similarity is not None:
            changes = {}
            if getattr(output, "loss", None) is not None:
                items = kwargs.get("num_items_in_batch")
                pull = similarity.mean() if items is None else similarity.sum() / items
                changes["loss"] = output.loss - self.config.pull_constraint_coeff * pull
            output = add_similarity(output, similarity, **changes)
        return output.to_tuple() if self._as_tuple else output

    # ---- what a projection protects ------------------------------------------------------------------------------

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's prompts and keys, by their names in `adapter_model.safetensors`."""
        layer, adapter = self.layer, self.layer.active_adapters[0]
        stem = f"base_model.model.{self.config.target_modules[0]}"
        return {f"{stem}.l2p_prompt": layer.l2p_prompt[adapter], f"{stem}.l2p_key": layer.l2p_key[adapter]}

    @torch.no_grad()
    def protected_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """What these images show to the prompts and keys: (name, role, rows).

        For the prompts, the rows that meet them in the first attention: CLS, the image's selected prompts and its
        patches, each with position embedding, `(B * (1 + top_k * prompt_length + N), d)`. For the keys, the queries,
        normalised as the cosine has them, `(B, d)`.
        """
        prompt_name, key_name = self.prompt_parameters()
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        self.layer.select(query, self.config)
        pixel_values = pixel_values.to(self.layer.position_embeddings.dtype)  # as ViTModel does
        tokens = self.layer(pixel_values, interpolate_pos_encoding=self.config.interpolate_pos_encoding)
        yield prompt_name, "prompt", tokens.flatten(0, 1)
        yield key_name, "key", F.normalize(query.float(), dim=-1)


def _backbone_name(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if hasattr(getattr(module, "embeddings", None), "patch_embeddings") and hasattr(
            module.embeddings, "cls_token"
        ):
            return name
    raise ValueError(
        f"{type(model).__name__} has no patch embeddings with a CLS token, behind which L2P inserts its prompts: "
        "use a ViTModel or a ViTForImageClassification."
    )


def _without(tensor: Tensor, n: int, dim: int = 1) -> Tensor:
    """`tensor` without the entries 1..n along `dim`."""
    return torch.cat([tensor.narrow(dim, 0, 1), tensor.narrow(dim, 1 + n, tensor.shape[dim] - 1 - n)], dim=dim)
