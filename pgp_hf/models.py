"""The protocols by which everything else meets a model, and the adapter that makes plain models follow them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .backbones.loading import wrapping
from .backbones.still import hold_statistics, release_statistics
from .heads import ClassStatistics
from .heads.growing import grow_classifier, name_classes, new_names
from .heads.opening import open_adapter_head, open_classifier
from .projection import Protectable
from .runs.digest import backbone_key, backbone_sha256

__all__ = [
    "KeepsClassStatistics",
    "PlainModel",
    "Protectable",
    "SelectsPrompts",
    "StreamModel",
    "check_trainable",
    "exchanged",
    "load_weights",
    "open_head",
    "set_trainable",
    "stream_model",
    "weights",
]


@runtime_checkable
class StreamModel(Protocol):
    """A model that learns a stream of tasks: a prompt tuner, or a [`PlainModel`]."""

    @property
    def name(self) -> str:
        """Return the kind of model under which `results.json` lists it, such as "l2p"."""

    @property
    def class_names(self) -> Mapping[int, str] | None:
        """Name of each class by its label id; None for a model without a classifier."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that must agree for a run to be continued, ready for JSON."""

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen weights by its key in `results.json`."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their names in the checkpoint."""

    def class_logits(self, output: ModelOutput) -> Tensor:
        """Return the scores `(B, C)` in an output of the model."""

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call `callback` with the head's input, `(B, d)`, at each forward pass until the handle is removed."""

    def auxiliary_loss(self, output: ModelOutput) -> Tensor | None:
        """Return a loss of the model's own for each image, `(B,)`, such as L2P's pull term."""

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Prepare for a stream of tasks with these classes and class names."""

    def add_classes(self, names: Sequence[str], seed: int) -> None:
        """Let the head know more classes, drawn by the seed and their ids alone; what is stored of those before stays.

        Raises:
            TypeError: no head, or one that cannot grow.
            ValueError: a name that is known, or a head that is frozen or sharded.
        """

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        """Make room for a 0-based task that was not known in advance, with images of these classes."""

    def open_head(self) -> None:
        """Replace the head, if there is one, by one of zero classes, for `add_classes` to grow."""

    def begin_task(self, task: int) -> None:
        """Prepare for the training of the 0-based task."""

    def training_starts(self) -> None:
        """Prepare for the task's first step, after a checkpoint, if any, has been loaded."""

    def after_step(self) -> None:
        """Restore after each optimizer step whatever must not move."""

    def end_task(self, task: int) -> None:
        """Finish the 0-based task, which has been trained."""

    def resume_after(self, task: int) -> None:
        """Continue from the state after the 0-based task, which has been loaded."""


@runtime_checkable
class SelectsPrompts(StreamModel, Protocol):
    """A model in which a query to the frozen backbone selects each image's prompts."""

    @property
    def selected_prompts(self) -> Tensor | None:
        """Pool entries `(B, k)` of the last forward pass."""

    @property
    def pool_size(self) -> int:
        """Number of entries to select from."""

    def query(self, pixel_values: Tensor) -> Tensor:
        """Return the query `(B, d)` of each image, which no training changes."""


@runtime_checkable
class KeepsClassStatistics(StreamModel, Protocol):
    """A model whose head may be the statistics of finished tasks' features."""

    @property
    def statistics(self) -> ClassStatistics | None:
        """Class statistics of finished tasks; None with another head."""

    @property
    def uses_statistics_head(self) -> bool:
        """Return True while logits come from the statistics."""

    def learn_statistics(self, statistics: ClassStatistics) -> None:
        """Take in the statistics of a task that has just been trained."""

    def linear_logits(self, features: Tensor) -> Tensor:
        """Return the trained head's scores `(B, C)` of features `(B, d)`, whichever head is in use."""

    def as_before_task(self, task: int) -> AbstractContextManager[None] | None:
        """Return a block in which images cannot select the entry of this last task; None where tasks have no entries."""


# ---- plain models ----------------------------------------------------------------------------------------------------

FROZEN = (
    "the head of this LoRA model does not learn, so that new classes never get scores: make it with "
    'LoraConfig(modules_to_save=["classifier"], ...), or by pgp_hf.set_trainable(model, "lora:8").'
)
LORA_TARGETS = (("q_proj", "v_proj"), ("query", "value"))  # by the names that vision models give them


class PlainModel:
    """A model of transformers without prompts, trained whole, in part, or through PEFT's LoRA, as a [`StreamModel`].

    It keeps nothing of its own: another one around the same model is the same.

    Args:
        model: a model for image classification whose head is its `classifier`, or a `PeftModel` with LoRA around one.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def lora(self) -> LoraConfig | None:
        """Return the active adapter's configuration; None without one."""
        config = self.model.peft_config[self.model.active_adapter] if isinstance(self.model, PeftModel) else None
        return config if isinstance(config, LoraConfig) else None

    @property
    def name(self) -> str:
        """Return what learns: "full", "last:2", "head" or "lora:8"; "partial" for anything else, which `check` refuses."""
        if self.lora is not None:
            return f"lora:{self.lora.r}"
        learning = [name for name, parameter in self.base.named_parameters() if parameter.requires_grad]
        known = ["full", *(["head"] if self.class_names is not None else [])]
        # no error here, since every `isinstance` with a protocol reads the name
        with suppress(ValueError):
            known += [f"last:{count + 1}" for count in range(len(_blocks(self.base)[1]))]
        return next((name for name in known if learning == _learning(self.base, name)), "partial")

    def check(self) -> None:
        """Raise ValueError unless what learns has a name, and the head is part of it."""
        if self.lora is not None and not self.head_parameters():
            raise ValueError(FROZEN)
        if self.name == "partial":
            count = sum(parameter.requires_grad for parameter in self.base.parameters())
            raise ValueError(
                f"{count} parameters of the {type(self.base).__name__} have requires_grad=True, which are neither all of "
                "them, nor the head's, nor those of its last blocks: choose what learns by "
                'pgp_hf.set_trainable(model, "all"), "last:N", "head" or "lora:R".'
            )

    @property
    def head(self) -> nn.Module:
        """Return the classifier."""
        return _head(self.base)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the head's parameters that learn."""
        return [parameter for parameter in self.head.parameters() if parameter.requires_grad]

    @property
    def class_names(self) -> dict[int, str] | None:
        """Return the name of each class; None without a classifier."""
        return dict(self.base.config.id2label) if hasattr(self.base, "classifier") else None

    def settings(self) -> dict[str, Any]:
        """Return LoRA's settings, which must agree for a run to be continued; nothing for other models."""
        names = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
        return {} if self.lora is None else {name: getattr(self.lora, name) for name in names}

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the weights beneath LoRA; nothing for a model whose weights are all in its folder."""
        if self.lora is None:
            return {}
        found = backbone_sha256(self.base, self.lora.modules_to_save)
        return {} if found is None else {backbone_key(self.base): found}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their names in the model."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def class_logits(self, output: ModelOutput) -> Tensor:
        """Return the scores `(B, C)`."""
        return cast(Tensor, output["logits"])

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call `callback` with the classifier's input, `(B, d)`, at each forward pass until the handle is removed."""
        return self.head.register_forward_pre_hook(partial(_show_input, callback))

    def run(self, inputs: Mapping[str, Any]) -> ModelOutput:
        """Return the model's output, past the hooks on it as a whole: from within such a hook, it can run again."""
        return cast(ModelOutput, self.model.forward(**inputs))

    def auxiliary_loss(self, output: ModelOutput) -> Tensor | None:
        """Return None: the model has no loss of its own."""
        return None

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Take the classes' names from a stream, unless the model had names for them."""
        config = self.base.config
        if config.id2label == {label: f"LABEL_{label}" for label in config.id2label}:
            name_classes(self.base, {label: names.get(label, own) for label, own in config.id2label.items()})

    def add_classes(self, names: Sequence[str], seed: int) -> None:
        """Add a row to the head for each of these new classes, drawn by the seed and the class id alone."""
        known = self.class_names
        new = new_names(names, known, self.base)
        if self.lora is not None and "classifier" not in (self.lora.modules_to_save or ()):
            raise ValueError(FROZEN)
        grow_classifier(self.base, known or {}, new, seed)

    def open_head(self) -> None:
        """Replace the head by one of zero classes; a bare backbone is put into a model with a head, from then on `model`."""
        if isinstance(self.model, PeftModel):
            open_adapter_head(self.model.base_model, str(self.model.active_adapter))
            self.base = self.model.get_base_model()
        else:
            self.model = self.base = open_classifier(self.base)

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        """Do nothing: tasks share all parameters."""

    def begin_task(self, task: int) -> None:
        """Do nothing: tasks share all parameters."""

    def training_starts(self) -> None:
        """Hold the running statistics of frozen layers, such as BatchNorms."""
        hold_statistics(self.base)

    def after_step(self) -> None:
        """Do nothing: what must not move has no gradient."""

    def end_task(self, task: int) -> None:
        """Let go of the running statistics."""
        release_statistics(self.base)

    def resume_after(self, task: int) -> None:
        """Do nothing: see `begin_task`."""


def _show_input(callback: Callable[[Tensor], object], head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    # no local function, which could not be pickled with the model
    callback(inputs[0].flatten(1))


def check_trainable(what: str) -> None:
    """Raise ValueError unless `what` is something that `set_trainable` knows, on whatever model."""
    kind, _, number = what.partition(":")
    if what not in ("all", "head") and not (kind in ("last", "lora") and re.fullmatch(r"[1-9]\d{0,5}", number)):
        raise ValueError(f"trainable={what!r} is unknown: choose all, last:N, head or lora:R, with N and R from 1.")


def set_trainable(model: PreTrainedModel, what: str) -> PreTrainedModel | PeftModel:
    """Choose what of a model for image classification learns.

    Args:
        model: such as `ViTForImageClassification`; its parameters' `requires_grad` is set.
        what: "all"; "last:N" for its last N blocks and whatever follows them, such as a LayerNorm and the head; "head";
            or "lora:R" for PEFT's LoRA of rank R on queries and values, and the head.

    Returns:
        The model, with "lora:R" inside a `PeftModel`.

    Raises:
        ValueError: something else, more blocks than there are, or a model without queries and values of known names.
    """
    check_trainable(what)
    if what.startswith("lora:"):
        return _with_lora(model, int(what.removeprefix("lora:")))
    learning = set(_learning(model, "full" if what == "all" else what))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return model


def _with_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = next((names for names in LORA_TARGETS if linear.issuperset(names)), None)
    if targets is None:
        raise ValueError(
            f"the linear layers of this {type(model).__name__} are called {', '.join(sorted(linear))}, among which queries "
            "and values cannot be told: wrap it yourself, by "
            'peft.get_peft_model(model, LoraConfig(target_modules=[...], modules_to_save=["classifier"])).'
        )
    _head(model)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), modules_to_save=["classifier"])
    with wrapping():
        made = get_peft_model(model, settings)
    assert isinstance(made, PeftModel)  # PEFT's mixed models come from another argument
    return made


def _head(model: nn.Module) -> nn.Module:
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no classifier: use a model with a head, for example one from "
            "AutoModelForImageClassification."
        )
    return head


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of blocks of a vision model, and its name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outer)} lists of blocks where one is expected, so that its last blocks cannot "
            'be told: choose "all", "head" or "lora:R".'
        )
    return outer[0]


def _learning(model: nn.Module, name: str) -> list[str]:
    """Return the names of the parameters that learn in a model of this name, in their order."""
    names = [parameter for parameter, _ in model.named_parameters()]
    if name == "full":
        return names
    if name == "head":
        own = {id(parameter) for parameter in _head(model).parameters()}
        return [parameter for parameter, value in model.named_parameters() if id(value) in own]
    list_name, blocks = _blocks(model)
    count = int(name.removeprefix("last:"))
    if count > len(blocks):
        raise ValueError(f"trainable='last:{count}' is more than the {len(blocks)} blocks of {type(model).__name__}.")
    first = f"{list_name}.{len(blocks) - count}."
    return names[next(i for i, parameter in enumerate(names) if parameter.startswith(first)) :]


# ---- whole models ----------------------------------------------------------------------------------------------------


def stream_model(model: nn.Module) -> StreamModel:
    """Find the [`StreamModel`] inside what a trainer was given, or make one of it.

    Raises:
        TypeError: it is neither a prompt adapter in a `PeftModel`, nor a model of transformers, nor LoRA on one.
    """
    # the PeftModel forwards attribute access to its tuner, so that it would pass the check itself
    inside = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(inside, StreamModel):
        return inside
    if isinstance(model, PreTrainedModel | PeftModel):
        plain = PlainModel(model)
        if isinstance(plain.base, PreTrainedModel) and (plain.model is plain.base or plain.lora is not None):
            return plain
    raise TypeError(
        f"model is a {type(model).__name__} that cannot learn a stream: pass a model of transformers with a classifier "
        "(see pgp_hf.set_trainable), or one with a prompt adapter, peft.get_peft_model(model, pgp_hf.L2PConfig(...))."
    )


def open_head(model: PeftModel | PreTrainedModel) -> PeftModel | PreTrainedModel:
    """Replace a model's head by one of zero classes, which a stream that begins with nothing lets grow.

    Args:
        model: as a trainer takes it, with any head: of another size, without classes (`num_labels=0`), or none at all.

    Returns:
        The model to use: the same, but for a bare backbone without adapter, which is put into a model with a head.

    Raises:
        TypeError: a model that cannot learn a stream, a head that is not linear.
        ValueError: several adapters, which share the head, or a head that the adapter does not save.
    """
    learner = stream_model(model)
    learner.open_head()
    return learner.model if isinstance(learner, PlainModel) else model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a finished task keeps of a model: its adapter's tensors, or else all of them."""
    if isinstance(model, PeftModel):
        found: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=model.active_adapter, save_embedding_layers=False
        )
        return found
    return model.state_dict()


@contextmanager
def exchanged(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values inside the block; nothing is copied.

    Args:
        own: parameters by name, such as a model's `trainable()`.
        values: by the same names; parameters without one keep their own.
    """
    before = {name: own[name].data for name in values}
    try:
        for name, value in values.items():
            own[name].data = value
        torch.clear_autocast_cache()  # it knows parameters by identity, and not by value
        yield
    finally:
        for name, value in before.items():
            own[name].data = value
        torch.clear_autocast_cache()


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model what [`weights`] returned."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(tensors), adapter_name=model.active_adapter)
    else:
        model.load_state_dict(tensors)
