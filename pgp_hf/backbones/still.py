"""Keep the running statistics of frozen layers as they are; in training, those of a BatchNorm follow each batch."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = "_still_hooks"


def hold_statistics(model: nn.Module) -> None:
    """Let layers whose weights do not learn normalise in training as they do in prediction, until `release_statistics`.

    Otherwise a frozen backbone would follow the images of each task, and adapters do not hold its running statistics.
    """
    release_statistics(model)
    whole = all(parameter.requires_grad for parameter in model.parameters())
    # kept on the model, as the hooks are: more than one object may stand for it
    model.__dict__[_HOOKS] = [
        module.register_forward_pre_hook(_as_in_prediction)
        for module in model.modules()
        if getattr(module, "track_running_stats", False) and not _learns(module, whole)
    ]


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`."""
    for hook in model.__dict__.pop(_HOOKS, []):
        hook.remove()


def _learns(module: Any, whole: bool) -> bool:
    """Return whether a layer learns; one without weights does if the whole model does."""
    return whole if module.weight is None else bool(module.weight.requires_grad)


def _as_in_prediction(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.training = False  # here, since a `Trainer` sets the mode of the whole model before each step
