"""Configure the DualPrompt adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...backbones.family import CLS
from ...fields import check_value
from ..base.card import AdapterCard, entries, setting
from ..base.config import PoolConfig

FOUND = {
    "key": "found by key",
    "statistics": "found by class statistics of the query",
    "mixture": "mixed by the probability of each task, from class statistics of the query",
}


@dataclass
class DualPromptConfig(PoolConfig):
    """Configure general prompts, which all tasks share, and an expert entry for each task; the defaults are PGP's.

    Both are prefixes, put in front of the keys and values of an attention.

    Args:
        pool_size: number of expert entries, one per task.
        general_length: length of the general prefixes; 0 leaves them out.
        expert_length: length of the expert prefixes; 0 leaves them out.
        general_layers: layers, counted from 0, that take the general prefixes.
        expert_layers: layers, counted from 0, that take the expert prefixes.
        grow_pool: enlarge the pool when a stream that is known in advance has more tasks than entries. A task that nobody
            foresaw gets its entry in any case.
        copy_previous: start a task's expert entry as a copy of the previous task's.
        selection: how prediction finds an image's expert: "key", the entry whose learned key is nearest to its query, as
            published; "statistics", that of the most probable task, by class statistics of the queries in closed form, as
            the statistics head has them of features; "mixture", the experts of all tasks, weighted by that probability.
        learned_entries: number of entries that tasks have used so far, among which prediction chooses; filled in by
            training.
        added_entries: number of entries that came with tasks that nobody foresaw; filled in.
        pull_constraint_coeff: weight of the pull term, which draws a task's key towards its queries.
        interpolate_pos_encoding: interpolate the position embeddings to the input's size, for a backbone trained at
            another.
        head: what classifies: "linear", the trained linear head; "statistics", the class means and the covariance of
            finished tasks.
        shrinkage: how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1].
        modules_to_save: names of modules that are trained and saved whole; the classifier by default, [] for none.
        hidden_size, id2label, image_size, head_input, target_modules, exclude_modules: filled in; leave them out.

    Raises:
        ValueError: sizes that are negative, a layer named twice or negative.
    """

    method_name = "DUALPROMPT"
    command_line = (
        "pool_size",
        "general_length",
        "expert_length",
        "general_layers",
        "expert_layers",
        "pull_constraint_coeff",
        "copy_previous",
        "selection",
        "grow_pool",
    )

    pool_size: int = field(default=10, metadata={"help": "number of expert entries, one per task"})
    general_length: int = field(default=5, metadata={"help": "length of the general prefixes; 0 leaves them out"})
    expert_length: int = field(default=5, metadata={"help": "length of the expert prefixes; 0 leaves them out"})
    general_layers: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "layers, counted from 0, that take the general prefixes"}
    )
    expert_layers: list[int] = field(
        default_factory=lambda: [2, 3, 4], metadata={"help": "layers, counted from 0, that take the expert prefixes"}
    )
    grow_pool: bool = field(
        default=False, metadata={"help": "enlarge the pool when the stream has more tasks than entries"}
    )
    copy_previous: bool = field(
        default=True, metadata={"help": "start a task's expert entry as a copy of the previous task's"}
    )
    selection: Literal["key", "statistics", "mixture"] = field(
        default="key",
        metadata={
            "help": "how prediction finds an image's expert: by the nearest learned key, by class statistics of the queries "
            "(the most probable task's), or as a mixture of all, weighted by that probability"
        },
    )
    pull_constraint_coeff: float = field(
        default=1.0, metadata={"help": "weight of the pull term, which draws a task's key towards its queries"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(general_length=0, expert_length=0)
        for name in ("general_layers", "expert_layers"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"{name}={given!r}: expected a list of layers, counted from 0; [] for none.")
            layers = [check_value(f"a layer of {name}", layer, int) for layer in given]
            if len(set(layers)) != len(layers) or any(layer < 0 for layer in layers):
                raise ValueError(f"{name}={layers}: name each layer once, counted from 0.")
            setattr(self, name, layers)

    @classmethod
    def card(cls, settings: Mapping[str, Any]) -> AdapterCard:
        def prefixes(kind: str) -> str:
            length, layers = setting(settings, f"{kind}_length"), setting(settings, f"{kind}_layers")
            return f"{kind} prefixes of length {length} in layers {layers}"

        parts = [] if settings.get("general_length") == 0 else [prefixes("general")]
        found = FOUND.get(settings.get("selection", "key"), "found by an unknown rule")
        parts += [f"{entries(settings)} {prefixes('expert')}, one per task, {found}"]
        return AdapterCard(
            parts=" and ".join(parts),
            selects=True,
            features=(features := settings.get("head_input") or CLS),
            head=f"linear, on {features}",
            trained_head="the linear head",
            linear_head=True,
            finished="The expert prefixes of a finished task never move.",
        )
