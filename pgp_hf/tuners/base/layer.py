"""Wrap a module of the backbone, hold the adapters' parameters there, and remove prompts from outputs."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


class PromptLayer(nn.Module, BaseTunerLayer):
    """Wrap a module of the backbone and hold the parameters of its adapters.

    A subclass names its parameters in `adapter_layer_names`; each name is a `ParameterDict` with an entry for each
    adapter.

    Attributes:
        bypass: set while the query is computed, which must see the frozen model.
        selected: `(B, k)` pool entries chosen for the running batch, or None.
        copies: during a traced pass, each image's copies of the parameters, by container; else None.
        prepared: what `prepare` has made for the pass under way, or None.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.bypass = False
        self.selected: Tensor | None = None
        self.copies: dict[str, Tensor] | None = None
        self.prepared: Any = None
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def __getattr__(self, name: str) -> Any:
        # the backbone reads attributes of the module that is wrapped, such as `embeddings.patch_embeddings`
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, or deleted: without this, the lookup would recurse
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks for a `weight`, as linear layers have it; here the parameters lie deeper inside the module
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def add_parameters(self, adapter_name: str, inference_mode: bool, **parameters: Tensor) -> None:
        """Add an adapter's parameters, each given by the name of its container."""
        for name, value in parameters.items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def capture_per_sample(self, name: str, values: Tensor) -> Tensor:
        """Return the values `(B, ...)` that a parameter has for each image, as they enter a forward pass.

        A traced pass gets a leaf of its own in their place, which `copies` keeps by the name of the container.
        """
        if self.copies is not None:
            self.copies[name] = values = values.detach().clone().requires_grad_()
        return values

    def expand_to_batch(self, name: str, batch: int) -> Tensor:
        """Return the active adapter's parameter in the container `name` for each image, `(B, *shape)`.

        They are all the same, except in a traced pass, see `capture_per_sample`.
        """
        parameter = getattr(self, name)[self.adapter]
        return self.capture_per_sample(name, parameter.expand(batch, *parameter.shape))

    def prepare(self, batch: int) -> None:
        """Make what a forward pass on so many images needs of the parameters, before a compiled block begins."""

    def release(self) -> None:
        """Undo what was done to the wrapped module; called when the adapter is unloaded."""

    @property
    def adapter(self) -> str | None:
        """Return the name of the adapter in use; None while it is disabled or bypassed."""
        if self.disable_adapters or self.bypass:
            return None
        present = self._all_available_adapter_names()
        return next((name for name in self.active_adapters if name in present), None)


def uniform(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw from (-1, 1), as the released code of L2P and DualPrompt initialises prompts and keys."""
    return torch.empty(*shape).uniform_(-1, 1, generator=generator)


def strip_prompts(output: BaseModelOutputWithPooling, n: int, start: int = 1) -> None:
    """Remove the n prompts behind the first tokens from a backbone's output, which gets its unprompted shapes.

    Args:
        output: of the backbone.
        n: number of prompt tokens.
        start: number of tokens in front of them.
    """

    def without(tensor: Tensor, dim: int) -> Tensor:
        rest = tensor.narrow(dim, start + n, tensor.shape[dim] - start - n)
        return torch.cat([tensor.narrow(dim, 0, start), rest], dim=dim)

    if output.last_hidden_state is not None:
        output.last_hidden_state = without(output.last_hidden_state, 1)
    if output.hidden_states is not None:
        output.hidden_states = tuple(without(hidden, 1) for hidden in output.hidden_states)
    if output.attentions is not None:
        output.attentions = tuple(without(without(weights, -1), -2) for weights in output.attentions)
