"""Refuse optimizers that move weights outside `step`, where rules for updates have no hold on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

STEPS = 3  # averages and weights are still the same after the first
GIVEN_MODEL = {"model", "params", "optimizer_dict"}  # with these, an optimizer brings parameters of its own


def check_optimizer(trainer: Trainer) -> None:
    """Raise ValueError if the trainer's optimizer moves weights outside its `step`.

    Projections, entries of finished tasks and the constraints of methods are applied when a step ends. Weights that
    move in the backward pass, or that `eval()` exchanges, escape them. Three steps on a small model show whether they do.

    Raises:
        ImportError: an optimizer whose package is missing.
        ValueError: such an optimizer.
    """
    chosen = trainer.optimizer_cls_and_kwargs
    name = getattr(trainer.args.optim, "value", trainer.args.optim) if chosen is None else chosen[0].__name__
    # by its name, since these need linear layers that a small model lacks
    layerwise = chosen is None and str(name).endswith("layerwise")
    if chosen is None and not layerwise:
        _check_arguments(trainer, str(name))
    moved = "the backward pass" if layerwise else _moves_in(trainer)
    if moved is not None:
        raise ValueError(
            f"the optimizer {name!r} moves weights in {moved}, and not in step() alone: what is evaluated and saved would "
            "leave the null space of a projection, and entries of finished tasks would move. Choose another, such as "
            "optim='adamw_torch' or 'sgd'."
        )


def of_one_task(given: tuple[Any, dict[str, Any]] | None) -> tuple[Any, dict[str, Any]] | None:
    """Return a copy of an optimizer's class and arguments, which a `Trainer` uses up: it takes the parameters out of them."""
    if given is None:
        return None
    kind, settings = given[0], dict(given[1])
    if "params" in settings:
        settings["params"] = [_group(one) for one in settings["params"]]
    return kind, settings


def _group(one: Any) -> Any:
    """Return a copy of a group of parameters: an optimizer keeps the group itself, with its changing learning rate."""
    if not isinstance(one, dict):
        return one
    return {name: list(value) if isinstance(value, Iterator) else value for name, value in one.items()}


def check_given(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise ValueError if an optimizer was given parameters that the model does not have, or no longer has."""
    own = {id(parameter) for parameter in model.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if lost := sum(id(parameter) not in own for parameter in given):
        raise ValueError(
            f"optimizer_cls_and_kwargs: {lost} of the {len(given)} parameters in 'params' are not the model's, whose own would "
            "learn nothing. Those of a head that grows are new ones in each task: leave 'params' out."
        )


def _check_arguments(trainer: Trainer, name: str) -> None:
    """Raise ValueError for an optimizer that cannot be made with the arguments that the trainer has for it."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)  # type: ignore[arg-type]  # only a PeftModel is not one
    except ImportError as error:
        raise ImportError(f"optim={name!r} needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"optim={name!r} with optim_args={trainer.args.optim_args!r} cannot be used ({error}): write optim_args as "
            "'name=value,name=value', with values that the optimizer takes."
        ) from error


def _moves_in(trainer: Trainer) -> str | None:
    """Return the call outside `step` in which the trainer's optimizer moves the weights of a small model; None for none."""
    own = trainer.optimizer, trainer.optimizer_cls_and_kwargs
    if own[1] is not None:
        if GIVEN_MODEL & own[1][1].keys():
            return None
        trainer.optimizer_cls_and_kwargs = own[1][0], dict(own[1][1])
    try:
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            trainer.optimizer = None
            return _try(Trainer.create_optimizer(trainer, model), list(model.parameters()))
    except ImportError:
        raise
    except Exception:
        # one that needs the real model or its device: what has moved is measured at the end of each task
        return None
    finally:
        trainer.optimizer, trainer.optimizer_cls_and_kwargs = own


def _try(optimizer: Optimizer, parameters: list[nn.Parameter]) -> str | None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()  # so that no movement is too small to show
    stepped = _values(parameters)

    def after_step(*_: Any) -> None:
        stepped[:] = _values(parameters)

    def backward() -> None:
        torch.stack(
            [(parameter * slope).sum() for parameter, slope in zip(parameters, slopes, strict=True)]
        ).sum().backward()

    slopes = [torch.linspace(1, 2, parameter.numel()).view_as(parameter) for parameter in parameters]
    optimizer.register_step_post_hook(after_step)
    calls: list[tuple[str, Callable[[], object] | None]] = [
        ("train()", getattr(optimizer, "train", None)),
        ("the backward pass", backward),
        ("what follows step()", optimizer.step),
        ("zero_grad()", optimizer.zero_grad),
        ("eval()", getattr(optimizer, "eval", None)),
    ]
    for _ in range(STEPS):
        for where, call in calls:
            if callable(call):
                call()
            if not all(torch.equal(*pair) for pair in zip(stepped, parameters, strict=True)):
                return where
    return None


def _values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
