"""Train and use DualPrompt: an expert entry is selected by the task in training, by the query in prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..base.config import PromptConfig
from ..base.entries import TaskEntryTuner
from ..base.last_block import end_reading
from ..base.layer import PromptLayer
from ..base.pool import cosine_similarity
from ..base.vit import ViTPromptTuner
from .config import DualPromptConfig
from .layer import DualPromptAttention, DualPromptEmbeddings
from .selection import TaskStatistics, add_queries, queries_of

if TYPE_CHECKING:
    from transformers import ViTModel

EXPERT = ("dualprompt_expert_key", "dualprompt_expert_value")
GENERAL = ("dualprompt_general_key", "dualprompt_general_value")


class DualPromptModel(TaskEntryTuner, ViTPromptTuner):
    """Add DualPrompt to a model of any of `pgp_hf.backbones.FAMILIES`.

    In training every image uses the expert entry of the task set by `begin_task`; in prediction each image uses the
    entry whose key is nearest to its query, among those that tasks have used, or what `DualPromptConfig.selection` says.
    An entry whose task has ended never moves again.
    """

    prefix = "dualprompt_"
    adapter_config: DualPromptConfig

    def _targets(self, config: DualPromptConfig, stem: str, backbone: ViTModel) -> list[str]:
        layers = sorted({*config.general_layers, *config.expert_layers})
        family = self.family
        depth = len(family.blocks(backbone))
        if layers and layers[-1] >= depth:
            raise ValueError(
                f"layer {layers[-1]} is beyond the backbone's {depth} layers (0 to {depth - 1}): "
                "set general_layers and expert_layers accordingly."
            )
        return [f"{stem}embeddings", *(f"{stem}{family.attention_path(index)}" for index in layers)]

    def _wrap(
        self, config: DualPromptConfig, adapter_name: str, target: nn.Module, name: str
    ) -> DualPromptEmbeddings | DualPromptAttention:
        if name.endswith("embeddings"):
            embeddings = target if isinstance(target, DualPromptEmbeddings) else DualPromptEmbeddings(target)
            embeddings.update_layer(adapter_name, config)
            self._add_queries(embeddings, adapter_name, config)
            return embeddings
        index = int(name.split(".")[-2])
        end_reading(target)  # a last block that gets prefixes computes all tokens
        attention = target if isinstance(target, DualPromptAttention) else DualPromptAttention(target, self.family)
        attention.update_layer(adapter_name, config, index in config.general_layers, index in config.expert_layers)
        return attention

    @property
    def attentions(self) -> list[DualPromptAttention]:
        """Return the attention modules with prefixes."""
        return [layer for layer in self.layers if isinstance(layer, DualPromptAttention)]

    # ---- statistics of queries ---------------------------------------------------------------------------------------

    @property
    def query_statistics(self) -> TaskStatistics | None:
        """Return the statistics of queries by which prediction selects experts; None where it selects by keys."""
        return queries_of(self.layer, self.layer.adapter)

    def _add_queries(self, layer: PromptLayer, adapter: str, config: DualPromptConfig) -> None:
        if config.selection != "key":
            shape = len(config.id2label or {}), config.entries, cast(int, config.hidden_size)
            add_queries(layer, adapter, TaskStatistics(*shape, config.shrinkage))

    def _name_new_classes(self, adapter: str, config: PromptConfig, new: Sequence[str]) -> None:
        super()._name_new_classes(adapter, config, new)
        if (statistics := queries_of(self.layer, adapter)) is not None:
            statistics.add_classes(len(new))

    def open_head(self) -> None:
        super().open_head()
        self._add_queries(self.layer, self.adapter, self.adapter_config)

    def grow(self, pool_size: int) -> None:
        super().grow(pool_size)
        self._make_room()

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        super().add_task(task, classes, seed)
        self._make_room()

    def _make_room(self) -> None:
        if (statistics := self.query_statistics) is not None:
            statistics.make_room(self.adapter_config.entries)

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def _start_entry(self, task: int) -> None:
        if self.adapter_config.copy_previous and task > 0:
            for container, axis in self._entries():
                if axis == 1:  # prefixes; each key starts at random
                    parameter = container[self.adapter]
                    parameter[:, task] = parameter[:, task - 1]

    def _entries(self) -> Iterator[tuple[nn.ParameterDict, int]]:
        for layer in self.layers:
            for container, axis in (("dualprompt_key", 0), *((expert, 1) for expert in EXPERT)):
                parameters = getattr(layer, container, None)
                if parameters is not None and self.adapter in parameters:
                    yield parameters, axis

    # ---- a forward pass ------------------------------------------------------------------------------------------

    @property
    def pool_size(self) -> int:
        return self.adapter_config.entries

    def _select(self, query: Tensor, config: DualPromptConfig) -> Tensor:
        similarity = cosine_similarity(query, self.layer.dualprompt_key[self.adapter])
        known, mixture = config.learned_entries or config.entries, None
        statistics = self._statistics_in_use
        if self.training and self._task is not None:
            selected = torch.full((len(query), 1), self._task, device=query.device)
        elif statistics is not None:
            posterior = statistics.posterior(query, known)
            selected = posterior.argmax(-1, keepdim=True)
            mixture = posterior if config.selection == "mixture" else None
        else:
            selected = similarity.detach()[:, :known].argmax(-1, keepdim=True)
        for layer in self.layers:
            layer.selected = selected
        for attention in self.attentions:
            attention.mixture = mixture
        return similarity.gather(1, selected).sum(-1)

    @property
    def _statistics_in_use(self) -> TaskStatistics | None:
        """Return the statistics of queries once a task has left some."""
        return self.query_statistics if self.adapter_config.learned_entries else None

    def _predicted(self, query: Tensor) -> Tensor:
        known = self.adapter_config.learned_entries or self.adapter_config.entries
        if self._statistics_in_use is not None:
            return self._statistics_in_use.posterior(query, known).argmax(-1, keepdim=True)
        similarity = cosine_similarity(query, self.layer.dualprompt_key[self.adapter])
        return similarity[:, :known].argmax(-1, keepdim=True)

    def _prompt_values(self) -> tuple[list[Tensor], list[Tensor]] | None:
        if self.adapter_config.selection == "mixture":
            return None  # images get a part of every expert

        def values(containers: tuple[str, ...]) -> list[Tensor]:
            found = [getattr(layer, container) for layer in self.attentions for container in containers]
            return [parameters[self.adapter] for parameters in found if self.adapter in parameters]

        return values(GENERAL), [expert.transpose(0, 1) for expert in values(EXPERT)]

    @contextmanager
    def as_before_task(self, task: int) -> Iterator[None]:
        config, learned = self.adapter_config, self.adapter_config.learned_entries
        config.learned_entries = task
        try:
            yield
        finally:
            config.learned_entries = learned

    # ---- what a projection protects ------------------------------------------------------------------------------

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """Return the general prefixes, by their names in `adapter_model.safetensors`.

        Experts are not among them: a finished entry never moves, and no old input has selected the entry in training.
        """
        name = self.adapter
        return {
            f"base_model.model.{path}.{container}": getattr(layer, container)[name]
            for path, layer in self._general_attentions().items()
            for container in GENERAL
        }

    def _general_attentions(self) -> dict[str, DualPromptAttention]:
        """Return the attention modules with general prefixes of at least one token, by their paths in the model."""
        name = self.adapter
        return {
            path: layer
            for path, layer in self.model.named_modules()
            if isinstance(layer, DualPromptAttention)
            and name in layer.dualprompt_general_key
            and layer.dualprompt_general_key[name].numel()
        }

    @torch.no_grad()
    def protected_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield what these images show to the general prefixes, for each layer and head.

        One head's output for the query rows Q is `A_p P_v + A_x V`, where `[A_p, A_x] = softmax(Q [P_k; K]^T / sqrt dh)`.

        Keys: the weights stay when `Q dP_k^T = 0`; the rows are the queries, `(H, B * T, dh)`.
        Values: given the weights, the output changes by `A_p dP_v`; it stays when every column of dP_v is orthogonal to
        the weights that the queries give to the L slots, so the rows are those of A_p, `(H, B * T, L)`, and the value
        prefixes are stored transposed, `(H, dh, L)`.
        """
        general = self._general_attentions()
        for layer in general.values():
            layer.record = []
        try:
            self.model(pixel_values, **({} if prompt_query is None else {"prompt_query": prompt_query}))
            for path, layer in general.items():
                stem = f"base_model.model.{path}"
                for query, weights in layer.record or ():
                    length = layer.dualprompt_general_key[self.adapter].shape[1]
                    yield f"{stem}.dualprompt_general_key", "prompt", _by_head(query)
                    yield f"{stem}.dualprompt_general_value", "value", _by_head(weights[..., :length])
        finally:
            for layer in general.values():
                layer.record = None

    def attention_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the `protected_rows`: no LayerNorm and no W_k come between a prefix and the attention."""
        return self.protected_rows(pixel_values, prompt_query)


def _by_head(tensor: Tensor) -> Tensor:
    """Reshape `(B, H, T, n)` to `(H, B * T, n)`."""
    return tensor.transpose(0, 1).flatten(1, 2)
