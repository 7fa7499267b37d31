"""What a trainer checks and arranges before it trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.scenarios import SCENARIOS
from ..data.stream import TaskStream
from ..methods import ContinualMethod
from ..models import StreamModel, stream_model
from .arguments import PGPTrainingArguments


def check_model(model: nn.Module, stream: TaskStream) -> None:
    """Raise TypeError or ValueError unless the model learns streams and has a head for this one's classes."""
    names = stream_model(model).class_names
    if names is None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise TypeError(
            f"{type(base).__name__} has no classifier: use a model with a head, for example "
            "AutoModelForImageClassification (a CLIPModel takes its class names from ClipPromptConfig.for_classes)."
        )
    if not isinstance(stream, TaskStream):
        raise TypeError(f"stream is a {type(stream).__name__}: pass a pgp_hf.TaskStream.")
    if len(names) != stream.num_classes:
        raise ValueError(
            f"the model's head has {len(names)} outputs, the stream {stream.num_classes} classes: load the backbone with "
            f"num_labels={stream.num_classes} (and ignore_mismatched_sizes=True if it had a head)."
        )


def check_settings(
    args: PGPTrainingArguments, stream: TaskStream, method: ContinualMethod, learner: StreamModel
) -> None:
    """Raise ValueError for arguments, stream, method and model that do not go together."""
    if stream.scenario not in method.scenarios:
        raise ValueError(
            f"method {method.name!r} is not defined for scenario={stream.scenario!r}: it has "
            f"{', '.join(sorted(method.scenarios))}. Choose one of these, or another method."
        )
    if SCENARIOS[stream.scenario].one_epoch and args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} and scenario={stream.scenario!r} (one epoch) are mutually exclusive."
        )
    method.check(learner)
    head = learner.settings().get("head")
    if args.compensate_drift and head != "statistics":
        raise ValueError(
            f"compensate_drift=True moves the class means of a statistics head, and this adapter has head={head!r}: set "
            "head='statistics' in its configuration, or leave compensate_drift out."
        )


def separate_learning_rate(optimizer: Optimizer, parameters: Iterable[Tensor], learning_rate: float) -> None:
    """Give some of an optimizer's parameters a learning rate of their own."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
