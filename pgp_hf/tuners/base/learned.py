"""Keep the number of entries that prediction chooses among in the state dict, as well as in the configuration."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from peft.tuners._buffer_dict import BufferDict

from .layer import PromptLayer

LEARNED_ENTRIES = "learned_entries"


class _Config(Protocol):
    learned_entries: int | None

    @property
    def entries(self) -> int: ...


class LearnedEntries(BufferDict):
    """Write adapters' numbers of learned entries to state dicts, and read them from there.

    The numbers themselves are those of the configurations, so that both always agree. State dicts of earlier versions,
    which lack them, leave them as they are.
    """

    def __init__(self) -> None:
        super().__init__({}, persistent=True)
        self.configs: dict[str, _Config] = {}

    def follow(self, adapter: str, config: _Config) -> None:
        """Keep the number of an adapter from now on."""
        self.configs[adapter] = config
        self[adapter] = torch.zeros((), dtype=torch.int64)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for adapter, count in self.items():
            count.fill_(self.configs[adapter].learned_entries or 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        for adapter in self.keys():
            count, config = state_dict.get(f"{prefix}{adapter}"), self.configs[adapter]
            if count is None:
                continue
            if count.shape != () or count.is_floating_point() or not 0 <= int(count) <= config.entries:
                error_msgs.append(
                    f"{prefix}{adapter} is {count}: expected a number from 0 to the {config.entries} entries."
                )
            else:
                config.learned_entries = int(count) or None


def add_learned_entries(layer: PromptLayer, prefix: str, adapter: str, config: _Config) -> None:
    """Let a wrapped module keep the number for an adapter.

    Args:
        prefix: of the names of the method's parameters.
        adapter: the adapter's name.
        config: of the adapter.
    """
    container = f"{prefix}{LEARNED_ENTRIES}"
    if not hasattr(layer, container):
        setattr(layer, container, LearnedEntries())
        layer.other_param_names = (*layer.other_param_names, container)  # PEFT saves what is named here
    getattr(layer, container).follow(adapter, config)
