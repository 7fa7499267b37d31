"""A tuner and a method that the package does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import mapping
from torch import Tensor, nn

from pgp_hf.methods import METHODS, ContinualMethod, MethodCard, MethodState
from pgp_hf.methods import register as register_method
from pgp_hf.tuners import register
from pgp_hf.tuners.base import AdapterCard, PromptConfig, PromptLayer, ViTPromptTuner
from pgp_hf.tuners.base.consistency import consistency_rows
from pgp_hf.tuners.base.layer import strip_prompts

# ---- a tuner ---------------------------------------------------------------------------------------------------------

PROMPT = "base_model.model.vit.embeddings.shared_token_prompt"
HEAD = "base_model.model.classifier"


@dataclass
class SharedTokenConfig(PromptConfig):
    """Configure one learned token that all images share."""

    method_name = "SHARED_TOKEN"

    scale: float = field(default=0.5, metadata={"help": "standard deviation of the token's initial values"})

    @classmethod
    def card(cls, settings):
        return AdapterCard(parts=f"one token, drawn with a standard deviation of {settings['scale']}", selects=False)


class SharedTokenEmbeddings(PromptLayer):
    adapter_layer_names = ("shared_token_prompt",)

    def update_layer(self, adapter_name: str, config: SharedTokenConfig) -> None:
        token = config.scale * torch.randn(1, self.position_embeddings.shape[-1])
        self.add_parameters(adapter_name, config.inference_mode, shared_token_prompt=token)

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Tensor:
        embeddings = self.base_layer(pixel_values, *args, **kwargs)
        if self.adapter is None:
            return embeddings
        token = self.expand_to_batch("shared_token_prompt", len(embeddings))
        return torch.cat([embeddings[:, :1], token, embeddings[:, 1:]], dim=1)


class SharedTokenModel(ViTPromptTuner):
    prefix = "shared_"  # not its name with an underscore, which PEFT would take by default
    pool_size = 1

    def _targets(self, config: SharedTokenConfig, stem: str, backbone: nn.Module) -> list[str]:
        return [f"{stem}embeddings"]

    def _wrap(self, config: SharedTokenConfig, adapter_name: str, target: nn.Module, name: str) -> PromptLayer:
        layer = target if isinstance(target, SharedTokenEmbeddings) else SharedTokenEmbeddings(target)
        layer.update_layer(adapter_name, config)
        return layer

    def _select(self, query: Tensor, config: SharedTokenConfig) -> Tensor:
        return query.new_zeros(len(query))

    def _after_backbone(self, backbone, args, output):
        if self.layer.adapter is not None:
            strip_prompts(output, 1)
        return output

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        return {PROMPT: self.layer.shared_token_prompt[self.adapter]}

    @torch.no_grad()
    def protected_rows(self, pixel_values: Tensor, prompt_query=None) -> Iterator[tuple[str, str, Tensor]]:
        yield PROMPT, "prompt", self.layer(pixel_values).flatten(0, 1)

    @torch.no_grad()
    def attention_rows(self, pixel_values: Tensor, prompt_query=None) -> Iterator[tuple[str, str, Tensor]]:
        first = self.backbone.layers[0]
        width, _ = consistency_rows(self.layer(pixel_values), [first.layernorm_before], first.attention, 1)
        yield PROMPT, "prompt", width.flatten(0, 2)


@contextmanager
def registered_tuner() -> Iterator[None]:
    """Register the tuner for a while: others ask which adapters there are."""
    register(SharedTokenConfig, SharedTokenModel)
    try:
        yield
    finally:
        for known in (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        ):
            del known["SHARED_TOKEN"]


# ---- a method --------------------------------------------------------------------------------------------------------


@dataclass
class AnchorConfig:
    strength: float = 1.0


class Anchor(ContinualMethod):
    """Draws the weights towards where the task before has left them; counts the images that it has been shown."""

    name = "anchor_for_tests"
    config_class = AnchorConfig
    scenarios = frozenset({"class_incremental"})

    def __init__(self, config=None):
        super().__init__(config)
        self.anchors, self.images = {}, 0

    def describe(self):
        return MethodCard(
            "Anchored weights", "weights are drawn to where they were", ("It knows no old image.",), "Us"
        )

    def loss(self, context, batch, output, losses):
        self.images += len(batch.labels)
        assert (batch.tasks == context.task).all() and len(batch.indices) == len(batch.labels) == len(losses)
        own = context.model.trainable()
        penalty = sum((own[name] - anchor).square().sum() for name, anchor in self.anchors.items())
        return losses + self.config.strength * penalty

    def end_task(self, context):
        self.anchors = {name: p.detach().clone() for name, p in context.model.trainable().items()}

    def state(self):
        return MethodState(dict(self.anchors), {"images": self.images})

    def load_state(self, state):
        self.anchors, self.images = dict(state.tensors), state.values["images"]


@contextmanager
def registered_method() -> Iterator[None]:
    """Register the method for a while."""
    register_method(Anchor)
    try:
        yield
    finally:
        del METHODS[Anchor.name]
