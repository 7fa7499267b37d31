"""Rebuild the classification head from an adapter's class names, before PEFT copies it, and grow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ...heads.growing import grow_classifier
from ...heads.opening import check_saved
from .config import PromptConfig

if TYPE_CHECKING:
    from transformers import ViTForImageClassification


def prepare_head(model: ViTForImageClassification, config: PromptConfig, width: int) -> None:
    """Make `model.classifier` and `config` (fields `id2label`, `modules_to_save`) agree.

    A new adapter takes its class names from the model; a loaded one gives the model a head of its own size, so that a
    checkpoint works on a bare backbone. A model without a classifier is left as it is, and so is a head that the adapter
    does not save.

    Args:
        model: the backbone, with its head.
        config: of the adapter.
        width: length of what the head reads.

    Raises:
        ValueError: a second adapter with another number of classes.
    """
    head = getattr(model, "classifier", None)
    if head is None:
        return
    linear = getattr(head, "original_module", head)  # once an adapter is there, PEFT has wrapped the head
    if config.id2label is None:
        if not isinstance(linear, nn.Linear):
            return
        config.id2label = {int(index): name for index, name in (model.config.id2label or {}).items()}
    if config.modules_to_save is None:
        config.modules_to_save = ["classifier"]
    if "classifier" not in config.modules_to_save:
        return
    classes = len(config.id2label)
    if not isinstance(linear, nn.Linear) or linear.out_features != classes:
        if linear is not head:
            raise ValueError(
                f"the adapter has {classes} classes, the model's head {linear.out_features} from the adapter before it: "
                "adapters side by side on one model need the same classes. Load this one on a fresh backbone."
            )
        reference = next(model.parameters())
        # with low_cpu_mem_usage, PEFT makes all new modules on the meta device: this head needs memory all the same
        fresh = nn.Linear(width, classes, device="meta", dtype=reference.dtype)
        model.classifier = fresh.to_empty(device=reference.device)
        model.classifier.reset_parameters()
        model.num_labels = classes


def check_modules_to_save(model: nn.Module, config: PromptConfig) -> None:
    """Raise ValueError for a name in `modules_to_save` that no module has: PEFT would train nothing, without a word."""
    known = [*(name for name, _ in model.named_modules()), "classifier"]  # which a bare backbone may be given later
    for saved in config.modules_to_save or []:
        if not any(name.endswith(saved) for name in known):  # as PEFT compares them
            raise ValueError(
                f"modules_to_save={config.modules_to_save}: this {type(model).__name__} has no module {saved!r:.80}. Leave "
                "modules_to_save out for the classifier alone, or name modules outside the backbone."
            )


def grow_head(
    model: nn.Module, configs: Mapping[str, PromptConfig], adapter: str, new: Sequence[str], seed: int
) -> None:
    """Add rows for new classes to the head that adapters share, and their names to the model.

    Raises:
        TypeError: a model without a head, or one that is not linear.
        ValueError: a head that is sharded or that the adapter does not save, or adapters of different classes.
    """
    known = configs[adapter].id2label or {}
    check_saved(configs[adapter])
    for name, config in configs.items():
        if len(config.id2label or {}) != len(known):
            raise ValueError(
                f"the adapter {name!r} has {len(config.id2label or {})} classes, the active adapter {adapter!r} "
                f"{len(known)}: adapters side by side grow together. Delete the other (model.delete_adapter({name!r}))."
            )
    grow_classifier(model, known, new, seed)
