"""What the wrapped modules of every prompt tuner have in common."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class PromptLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of the backbone; parameters are `ParameterDict`s keyed by adapter, named in `adapter_layer_names`.

    Attributes:
        bypass: set during the query pass, which must see the frozen model.
        selected: `(B, k)` pool entries chosen for the running batch, or None.
        copies: during a traced pass, each image's copies of the parameters, by container; else None.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.bypass = False
        self.selected: Tensor | None = None
        self.copies: dict[str, Tensor] | None = None
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def __getattr__(self, name: str) -> Any:
        # models read attributes of the modules they own, patch_embeddings for one
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def add_parameters(self, adapter_name: str, inference_mode: bool, **parameters: Tensor) -> None:
        """Add an adapter's parameters, by container."""
        for name, value in parameters.items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def capture_per_sample(self, name: str, values: Tensor) -> Tensor:
        """PerSample `(B, ...)` of a parameter on their way into a forward pass; a leaf of their own in a traced one."""
        if self.copies is not None:
            self.copies[name] = values = values.detach().clone().requires_grad_()
        return values

    def expand_to_batch(self, name: str, batch: int) -> Tensor:
        """The active adapter's parameter in container `name`, `(B, *shape)`: the same for each image, see `capture_per_sample`."""
        parameter = getattr(self, name)[self.adapter]
        return self.capture_per_sample(name, parameter.expand(batch, *parameter.shape))

    def release(self) -> None:
        """Undo whatever was done to the wrapped module; called when the adapter is unloaded."""

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use, None when disabled or bypassed."""
        if self.disable_adapters or self.bypass:
            return None
        present = self._all_available_adapter_names()
        return next((name for name in self.active_adapters if name in present), None)


def uniform(*shape: int) -> Tensor:
    """Uniform in (-1, 1), as the released code of L2P and DualPrompt initialises prompts and keys."""
    return torch.empty(*shape).uniform_(-1, 1)


def strip_prompts(output: Any, n: int) -> None:
    """Take the tokens 1..n, the prompts behind CLS, out of a backbone's output, so that it has its unprompted shapes."""

    def without(tensor: Tensor, dim: int) -> Tensor:
        rest = tensor.narrow(dim, 1 + n, tensor.shape[dim] - 1 - n)
        return torch.cat([tensor.narrow(dim, 0, 1), rest], dim=dim)

    output.last_hidden_state = without(output.last_hidden_state, 1)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(without(hidden, 1) for hidden in output.hidden_states)
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(without(without(weights, -1), -2) for weights in output.attentions)
