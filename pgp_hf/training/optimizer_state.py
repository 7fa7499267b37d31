"""Check that the state of an optimizer can be kept in a checkpoint, before it has any, and give it back."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..runs.states import encode
from .random_states import same_random_states


def plain(optimizer: Any) -> Optimizer:
    """Return an optimizer without accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer_state(optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer has state, or will have, that is neither tensor nor JSON.

    Most optimizers make their state in the first step, which is tried on stand-ins for a few parameters. Where that does
    not work, the state shows after the first step itself.
    """
    encode(optimizer.state_dict(), "optimizer")
    if not optimizer.state and (state := _state_after_a_step(optimizer)) is not None:
        encode(state, "optimizer")


def _state_after_a_step(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the state that an optimizer would have after a step; None if that cannot be tried."""
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("state", "param_groups", "step") and not name.endswith("_hooks")
    }
    hooks: dict[str, Any] = {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    tried = object.__new__(type(optimizer))
    with suppress(Exception), same_random_states(_device(optimizer)):
        groups = [{**copy.deepcopy(_settings(group)), "params": _stand_ins(group)} for group in optimizer.param_groups]
        vars(tried).update({**copy.deepcopy(own), **hooks, "state": defaultdict(dict), "param_groups": groups})
        type(optimizer).step(tried)
        return type(optimizer).state_dict(tried)
    return None


def _device(optimizer: Optimizer) -> torch.device:
    devices = [parameter.device for group in optimizer.param_groups for parameter in group["params"]]
    return devices[0] if devices else torch.device("cpu")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _stand_ins(group: dict[str, Any]) -> list[nn.Parameter]:
    """Return a parameter for each number of dimensions in a group, as the smallest one is, with a gradient."""
    found: dict[int, nn.Parameter] = {}
    for parameter in sorted(group["params"], key=Tensor.numel):
        if parameter.ndim not in found:
            found[parameter.ndim] = made = nn.Parameter(torch.zeros_like(parameter))
            made.grad = torch.ones_like(made)
    return list(found.values())


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return what `load_optimizer` takes: the optimizer's kind, and its state."""
    return {"kind": _kind(optimizer), "state": optimizer.state_dict()}


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], where: Path) -> None:
    """Give an optimizer the state that it had at a checkpoint.

    Args:
        saved: what `optimizer_state` returned.
        where: the checkpoint.

    Raises:
        ValueError: the state of another optimizer, of other parameters, or with other learning rates.
    """
    state = saved["state"]
    rates = [_learning_rates(groups) for groups in (state["param_groups"], optimizer.param_groups)]
    for what, was, now in (("optimizer", saved["kind"], _kind(optimizer)), ("learning rates", *rates)):
        if was != now and was is not None and now is not None:
            raise ValueError(
                f"{where} was trained with the {what} {was}, and now it is {now}: continue with the same, or start a new "
                "run in another output_dir."
            )
    optimizer.load_state_dict(state)
    # torch casts it to the precision of the parameter, while an optimizer may keep it in one of its own
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        own = optimizer.state.get(parameter, {})
        for name, kept in state["state"].get(index, {}).items():
            now = own.get(name)
            if isinstance(kept, Tensor) and isinstance(now, Tensor) and now.dtype != kept.dtype:
                own[name] = kept.to(now.device)


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def note_learning_rates(optimizer: Optimizer) -> None:
    """Note the learning rates that a schedule begins with in the groups, as most schedules do themselves."""
    for group in optimizer.param_groups:
        rate = group["lr"]
        group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)


def _learning_rates(groups: list[dict[str, Any]]) -> list[float] | None:
    """Return the learning rates that a schedule began with; None if they were not noted."""
    noted = [float(group["initial_lr"]) for group in groups if "initial_lr" in group]
    return noted if len(noted) == len(groups) else None
