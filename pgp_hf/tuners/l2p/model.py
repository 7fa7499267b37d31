"""Train and use L2P: prompts from a pool, inserted behind the CLS token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...projection.protocol import Traced
from ..base.consistency import consistency_rows
from ..base.entries import add_entries
from ..base.layer import strip_prompts, uniform
from ..base.pool import cosine_similarity, select_top_k
from ..base.vit import ViTPromptTuner
from .config import L2PConfig
from .layer import L2PEmbeddings

if TYPE_CHECKING:
    from transformers import ViTModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class L2PModel(ViTPromptTuner):
    """Add an L2P prompt pool to a model of any of `pgp_hf.backbones.FAMILIES`.

    Each image gets the `top_k` prompts whose keys are nearest to its query. After the backbone the prompt tokens are
    removed again, so that outputs have the shapes that they have without prompts, and the token at index 0 becomes
    what the head is to read (`head_type`); a head that reads the mean of the patches as well still does.
    """

    prefix = "l2p_"
    adapter_config: L2PConfig
    layer: L2PEmbeddings

    def _targets(self, config: L2PConfig, stem: str, backbone: ViTModel) -> list[str]:
        return [f"{stem}embeddings"]

    def _wrap(self, config: L2PConfig, adapter_name: str, target: nn.Module, name: str) -> L2PEmbeddings:
        layer = target if isinstance(target, L2PEmbeddings) else L2PEmbeddings(target, self.family)
        layer.update_layer(adapter_name, config)
        return layer

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Take the classes' names, and add what all tasks' `grow_pool` makes; later tasks' entries cannot be selected yet."""
        super().prepare_stream(tasks, names)
        self._grow_to(self._selectable(len(tasks) - 1))

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        """Add the 0-based task's entries, if `grow_pool` says so, drawn by the seed and their indices alone."""
        super().add_task(task, classes, seed)
        self._grow_to(self._selectable(task), seed)

    def begin_task(self, task: int) -> None:
        """Let images select the 0-based task's entries as well.

        Raises:
            ValueError: they have not been added.
        """
        super().begin_task(task)
        self._select_among(task)

    def resume_after(self, task: int) -> None:
        super().resume_after(task)
        self._select_among(task)

    def as_before_task(self, task: int) -> AbstractContextManager[None] | None:
        return None if self.adapter_config.grow_pool is None else self._among_entries_before(task)

    @contextmanager
    def _among_entries_before(self, task: int) -> Iterator[None]:
        config, learned = self.adapter_config, self.adapter_config.learned_entries
        config.learned_entries = self._selectable(task - 1)
        try:
            yield
        finally:
            config.learned_entries = learned

    def _selectable(self, task: int) -> int:
        """Return the number of entries that images can select once the 0-based task has begun."""
        config = self.adapter_config
        return config.pool_size + (config.grow_pool or 0) * max(task, 0)

    def _grow_to(self, size: int, seed: int | None = None) -> None:
        config, layer = self.adapter_config, self.layer
        added = range(config.entries, size)
        if not added:
            return
        add_entries([(layer.l2p_prompt, 0), (layer.l2p_key, 0)], self.adapter, added, uniform, seed)
        config.learned_entries = config.learned_entries or config.entries
        config.added_entries = size - config.pool_size

    def _select_among(self, task: int) -> None:
        config = self.adapter_config
        if config.grow_pool is None:
            return
        if (size := self._selectable(task)) > config.entries:
            raise ValueError(
                f"task {task + 1} selects among {size} entries (pool_size={config.pool_size}, grow_pool="
                f"{config.grow_pool}), and there are {config.entries}: call add_task({task}, classes, seed) first."
            )
        config.learned_entries = size

    # ---- a forward pass ------------------------------------------------------------------------------------------

    @property
    def pool_size(self) -> int:
        return self.adapter_config.entries

    def _check_call(self, config: L2PConfig, kwargs: dict[str, Any]) -> None:
        if kwargs.get("attention_mask") is not None and config.top_k * config.prompt_length:
            raise ValueError(
                "attention_mask does not fit once prompt tokens are inserted: leave it out (all patches attend), "
                "or disable the adapter."
            )

    def _select(self, query: Tensor, config: L2PConfig) -> Tensor:
        similarity = cosine_similarity(query, self.layer.l2p_key[self.adapter])
        self.layer.selected = selected = self._nearest(similarity.detach(), config)
        return similarity.gather(1, selected).sum(-1)

    def _nearest(self, similarity: Tensor, config: L2PConfig) -> Tensor:
        return select_top_k(similarity[:, : config.learned_entries], config.top_k, config.batchwise_prompt)

    def _predicted(self, query: Tensor) -> Tensor:
        return self._nearest(cosine_similarity(query, self.layer.l2p_key[self.adapter]), self.adapter_config)

    def _count_read(self) -> int:
        return 1 + self.layer.inserted  # `strip_prompts` finds the prompts in their place

    def _prompt_values(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], [self.layer.l2p_prompt[self.adapter]]

    def _after_backbone(
        self, backbone: ViTModel, args: tuple[Any, ...], output: BaseModelOutputWithPooling
    ) -> BaseModelOutputWithPooling | None:
        layer = self.layer
        n = 0 if layer.bypass or layer.adapter is None else layer.inserted
        if n == 0:
            return None
        hidden, family = output["last_hidden_state"], layer.family
        strip_prompts(output, n, family.start)
        if self.adapter_config.head_type == "prompt":
            prompts = hidden[:, family.start : family.start + n].mean(1, keepdim=True)
            output.last_hidden_state = family.with_prompts_read(output["last_hidden_state"], prompts)
        if getattr(output, "pooler_output", None) is not None:
            output.pooler_output = family.pooled(backbone, output["last_hidden_state"])
        return output

    # ---- what a projection protects ------------------------------------------------------------------------------

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """Return the active adapter's prompts and keys, by their names in `adapter_model.safetensors`."""
        layer, adapter = self.layer, self.adapter
        stem = f"base_model.model.{cast(list[str], self.adapter_config.target_modules)[0]}"
        return {f"{stem}.l2p_prompt": layer.l2p_prompt[adapter], f"{stem}.l2p_key": layer.l2p_key[adapter]}

    def token_offsets(self) -> dict[str, Tensor]:
        """Return the position that the prompts share: the embedding of CLS's, `(1, 1, d)`, or 0."""
        (prompt_name, _), config = self.prompt_parameters(), self.adapter_config
        inserted = config.top_k * config.prompt_length
        if not inserted:
            return {}
        offset = self.layer.family.offset(self.layer.base_layer).detach()
        return {prompt_name: offset.to(torch.promote_types(offset.dtype, torch.float32))}

    @torch.no_grad()
    def protected_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield what these images show to the prompts and keys: (name, role, rows).

        For the prompts these are the rows that meet them in the first attention: CLS, the image's selected prompts and
        its patches, each with position embedding, `(B * (1 + top_k * prompt_length + N), d)`. For the keys these are
        the queries, normalised as the cosine has them, `(B, d)`.
        """
        prompt_name, key_name = self.prompt_parameters()
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        yield prompt_name, "prompt", self._tokens(pixel_values, query).flatten(0, 1)
        yield key_name, "key", _key_rows(query)

    @torch.no_grad()
    def attention_rows(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield rows for the first attention as `consistency_rows` has them, and the queries for the keys.

        For the prompts there are rows along the width, `(B * H * T, d)`, which all entries share, and rows over the
        tokens of each entry, `(M, B * H * T, L)`, zero for images that have not selected it.
        """
        prompt_name, key_name = self.prompt_parameters()
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        tokens = self._tokens(pixel_values, query)
        if self.layer.inserted:
            family, backbone = self.layer.family, self.backbone
            first = family.blocks(backbone)[0]
            width, length = consistency_rows(
                tokens,
                [getattr(first, family.norm)],
                getattr(first, family.attention),
                self.layer.inserted,
                start=family.start,
                rotate=family.rotation(backbone, pixel_values),
            )
            yield prompt_name, "prompt", width.flatten(0, 2)
            length = length.flatten(1, 2).unflatten(-1, (self.adapter_config.top_k, -1))  # (B, H * T, k, L)
            length = self._by_entry(length.transpose(1, 2), cast(Tensor, self.layer.selected))
            yield f"{prompt_name}.T", "value", length.flatten(1, 2)
        yield key_name, "key", _key_rows(query)

    def traced(
        self, pixel_values: Tensor, prompt_query: Tensor | None = None, autocast: torch.dtype | None = None
    ) -> Traced:
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        rows = {name: rows for name, _, rows in self.key_rows(pixel_values, query)}
        return super().traced(pixel_values, query, autocast)._replace(keys=rows)

    def key_rows(self, pixel_values: Tensor, prompt_query: Tensor | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield what these images show to the keys: (name, role, rows)."""
        _, key_name = self.prompt_parameters()
        query = self.query(pixel_values) if prompt_query is None else prompt_query
        yield key_name, "key", _key_rows(query)

    def _per_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what makes one row of length `L * d` for each entry of the pool and each image, `(M, B, L * d)`.

        The row is zero where an image has not selected the entry.
        """
        selected = cast(Tensor, self.layer.selected)  # by the pass that is being traced
        return lambda gradient: self._by_entry(gradient.flatten(2), selected)

    def _by_entry(self, values: Tensor, selected: Tensor) -> Tensor:
        """Return values `(B, k, ...)` of the selected entries as `(M, B, ...)` of all, zero for the others."""
        entries = values.new_zeros(self.adapter_config.entries, *values.shape[:1], *values.shape[2:])
        entries[selected, torch.arange(len(values), device=values.device)[:, None]] = values
        return entries

    def _tokens(self, pixel_values: Tensor, query: Tensor) -> Tensor:
        """Return what enters the first layer: CLS, the selected prompts, patches."""
        self._select(query, self.adapter_config)
        layer, positions = self.layer, dict[str, Any]()
        layer.family.set_positions(positions, self.adapter_config.interpolate_pos_encoding)
        dtype = next(layer.base_layer.parameters()).dtype
        return cast(Tensor, layer(pixel_values.to(dtype), **positions))  # as the ViT does before its embeddings


def _key_rows(query: Tensor) -> Tensor:
    """Return what queries show to the keys: themselves, normalised as the cosine has them."""
    return F.normalize(query.float(), dim=-1)
