"""Describe a family of image models: where it has what prompts need, and which of its tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLS = "the CLS token"
ATTENTION = ("q_proj", "k_proj", "v_proj", "head_dim")
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """Describe models with a CLS token, then perhaps registers, then patches, whose head reads CLS alone.

    Every family has `embeddings`, whose output the encoder takes. A subclass changes what differs.

    Args:
        name: for people.
        models: names of the backbone's classes in transformers, by which its own and derived ones are known.
        classifier: name of the class that puts a linear `classifier` on the backbone.
        example: a checkpoint on the Hub.
        query_from: by what prompts are selected, for people.
        head_input: what the classifier reads, for people.
        layers: path of the encoder's layers in the backbone.
        attention: name of a layer's attention.
        norm: name of the LayerNorm in front of it.
        start: number of tokens in front of the prompts.
        parts: length of the head's input, in widths of a token.
        hands_on: True where the attention hands keyword arguments on to the function that computes it.
    """

    name: str
    models: tuple[str, ...]
    classifier: str
    example: str
    query_from: str = CLS
    head_input: str = CLS
    layers: str = "layers"
    attention: str = "attention"
    norm: str = "layernorm_before"
    start: int = 1
    parts: int = 1
    hands_on: bool = True

    # ---- which models belong to it -------------------------------------------------------------------------------

    def fits(self, module: nn.Module) -> bool:
        """Return True for a backbone of this family by its modules, whatever its class is called."""
        return False

    def reasons(self, model: nn.Module, backbone: Any) -> Iterator[str]:
        """Yield why prompts do not fit a backbone of this family, or the model around it."""
        if any(getattr(one, "main_input_name", "pixel_values") != "pixel_values" for one in (model, backbone)):
            yield "it does not read single images"
        yield from self._own_reasons(model, backbone)
        blocks = self.blocks(backbone)
        if not isinstance(blocks, nn.ModuleList) or not all(self._is_block(block) for block in blocks):
            yield (
                f"its layers are not those of a {self.name}, with {self.norm} and an attention of q_proj, k_proj and v_proj"
            )

    def _own_reasons(self, model: nn.Module, backbone: Any) -> Iterator[str]:
        """Yield what only this family asks about."""
        yield from ()

    def _is_block(self, block: nn.Module) -> bool:
        attention = getattr(block, self.attention, None)
        return hasattr(block, self.norm) and all(hasattr(attention, name) for name in ATTENTION)

    # ---- its modules ---------------------------------------------------------------------------------------------

    def blocks(self, backbone: nn.Module) -> Any:
        """Return the encoder's layers."""
        module: Any = backbone
        for name in self.layers.split("."):
            module = getattr(module, name, None)
        return module

    def width(self, backbone: Any) -> int:
        """Return the length of a token."""
        return int(backbone.config.hidden_size)

    def attention_path(self, index: int) -> str:
        """Return the path of a layer's attention in the backbone."""
        return f"{self.layers}.{index}.{self.attention}"

    def rotation(self, backbone: Any, pixel_values: Tensor) -> Rotate | None:
        """Return what turns queries and keys `(B, H, T, dh)` by the tokens' positions; None where nothing does."""
        return None

    # ---- tokens that enter the encoder ---------------------------------------------------------------------------

    def offset(self, embeddings: Any) -> Tensor:
        """Return what is added to prompts as their position, `(1, 1, d)` or a number: by default the position of CLS."""
        offset: Tensor = embeddings.position_embeddings[:, :1]
        return offset

    def place(self, embeddings: Any, prompts: Tensor) -> Tensor:
        """Return prompts `(B, n, d)` as the embeddings would have made them."""
        placed: Tensor = embeddings.dropout(prompts + self.offset(embeddings))
        return placed

    def set_positions(self, kwargs: dict[str, Any], interpolate: bool) -> None:
        """Let the backbone interpolate its position embeddings, unless the caller has said otherwise.

        Args:
            kwargs: of the backbone's forward pass.
            interpolate: as the adapter's configuration has it.
        """
        if interpolate and kwargs.get("interpolate_pos_encoding") is None:
            kwargs["interpolate_pos_encoding"] = True

    # ---- tokens that are read ------------------------------------------------------------------------------------

    def query(self, output: Any) -> Tensor:
        """Return the feature `(B, d)` of images by which prompts are selected: the frozen model's CLS."""
        query: Tensor = output.last_hidden_state[:, 0]
        return query

    def with_prompts_read(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        """Return the last hidden state `(B, T, d)` with the mean of the prompts `(B, 1, d)` in the place of CLS."""
        return torch.cat([prompts, hidden[:, 1:]], dim=1)

    def pooled(self, backbone: Any, hidden: Tensor) -> Tensor | None:
        """Return what the backbone's pooler makes of a last hidden state; None without a pooler."""
        return None if backbone.pooler is None else backbone.pooler(hidden)
