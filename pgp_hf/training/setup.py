"""Check before training that arguments, model, stream and method fit together, and prepare the model for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BaseImageProcessor, PreTrainedModel, PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import is_in_notebook

from ..data.scenarios import SCENARIOS
from ..data.stream import TaskStream
from ..heads.statistics import ClassStatistics
from ..inference.backbone import check_sizes
from ..methods import ContinualMethod, ProjectedPrompts
from ..models import PlainModel, Protectable, StreamModel, stream_model
from .arguments import PGPTrainingArguments
from .display import StreamPrinter, StreamProgress
from .results import StreamResults


def check_arguments(args: Any, method: Any, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments that a stream requires or rules out.

    Args:
        args, method: as `StreamTrainer` takes them.
        arguments: the others of a `Trainer`.
    """
    if not isinstance(args, PGPTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: pass pgp_hf.PGPTrainingArguments(output_dir, ...).")
    if not isinstance(method, ContinualMethod | None):
        raise TypeError(
            f"method={method!r:.80} is a {type(method).__name__}: pass a method, as pgp_hf.methods.create(name) makes it."
        )
    args.check()  # set_push_to_hub() and others come after the arguments' own checks
    for name in ("train_dataset", "eval_dataset"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name} is the stream's own, which each task sets anew: leave it out. Other images are evaluated by "
                "trainer.evaluate(images)."
            )
    processor = arguments.get("processing_class")
    if isinstance(processor, BaseImageProcessor):
        try:
            check_sizes(processor)
        except ValueError as error:  # as the saved one would be
            raise ValueError(f"a run with this processing_class could not be loaded again: {error}.") from error
    if processor is None and arguments.get("data_collator") is None:
        raise ValueError(
            "processing_class is missing: pass the backbone's image processor, for example "
            "AutoImageProcessor.from_pretrained(name, backend='pil')."
        )
    if any(part is not None for part in arguments.get("optimizers", ())):
        raise ValueError(
            "optimizers=(...) would be used for one task, and without projection: choose it with args.optim, or pass "
            "optimizer_cls_and_kwargs=(torch.optim.SGD, {...}), from which each task makes its own."
        )


def check_model(model: nn.Module, stream: TaskStream, classes: int) -> None:
    """Raise TypeError or ValueError unless the model learns streams and has a head for so many classes."""
    learner = stream_model(model)
    names = learner.class_names
    if not isinstance(model, PeftModel | PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}: pass the PeftModel around it, which can be saved "
            "(peft.get_peft_model(model, pgp_hf.L2PConfig(...)))."
        )
    if names is None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise TypeError(
            f"{type(base).__name__} has no classifier: use a model with a head, for example "
            "AutoModelForImageClassification (a CLIPModel takes its class names from ClipPromptConfig.for_classes)."
        )
    if len(names) != classes:
        raise ValueError(
            f"the model's head has {len(names)} outputs, the stream {classes} classes: load the backbone by "
            "pgp_hf.load_backbone(name, stream), whatever head its checkpoint has."
        )
    own = {name: label for label, name in names.items()}
    for label, name in enumerate(stream.label_names[:classes]):
        if own.get(name, label) != label:
            raise ValueError(
                f"the model has {name!r} as class {own[name]}, the stream has it as class {label}, and predictions would get "
                "the wrong names: load the backbone with id2label=stream.id2label, or make a CLIP model's configuration by "
                "ClipPromptConfig.for_classes(tokenizer, stream.label_names)."
            )
    if isinstance(learner, PlainModel):
        learner.check()


def keep_statistics_local(model: nn.Module) -> None:
    """Keep class statistics, which are buffers, out of what each step sends between processes.

    They change between tasks only, on all processes alike, and would be more than the gradients of all prompts.
    """
    names = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, ClassStatistics)
        for name, _ in module.named_buffers()
    ]
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]  # where DistributedDataParallel looks


def check_precision(model: nn.Module, scaled: bool) -> None:
    """Raise ValueError for a model that cannot be trained in its precision.

    Args:
        scaled: whether losses are scaled, so that gradients do not vanish in float16.
    """
    half = [
        (name, parameter.dtype)
        for name, parameter in stream_model(model).trainable().items()
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32
    ]
    if half:
        name, dtype = half[0]
        raise ValueError(
            f"{name} and {len(half) - 1} more parameters that learn are in {str(dtype).removeprefix('torch.')}, in which "
            "rounding undoes small steps and moves prompts along protected directions: load the model with "
            "dtype=torch.float32 and keep it so. bf16=True computes in half precision and leaves the weights in float32."
        )
    if not scaled and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError(
            "the model's frozen weights are in float16, in which gradients vanish or overflow without fp16=True: load it "
            "with dtype=torch.float32 (transformers takes the precision of the file otherwise), or torch.bfloat16."
        )


def refuse_sharding(sharded: bool) -> None:
    """Raise ValueError where DeepSpeed or FSDP is enabled."""
    if sharded:
        raise ValueError(
            "DeepSpeed and FSDP shard parameters, while queries and protected directions need them whole: use plain data "
            "parallelism (accelerate launch --multi_gpu); prompts are too small to gain from sharding."
        )


def check_scenario(method: ContinualMethod, stream: TaskStream) -> None:
    """Raise ValueError unless the method is defined for the stream's scenario."""
    if stream.scenario not in method.scenarios:
        raise ValueError(
            f"method {method.name!r} is not defined for scenario={stream.scenario!r}: it has "
            f"{', '.join(sorted(method.scenarios))}. Choose one of these, or another method."
        )


def check_settings(
    args: PGPTrainingArguments, stream: TaskStream, method: ContinualMethod, learner: StreamModel
) -> None:
    """Raise ValueError for arguments, stream, method and model that do not fit together."""
    if method.begun:
        raise ValueError(
            f"this {type(method).__name__} has learned tasks in another trainer: make a new one for each trainer, with the "
            "same settings to continue the run (train(resume_from_checkpoint=...))."
        )
    check_scenario(method, stream)
    if SCENARIOS[stream.scenario].one_epoch and args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} and scenario={stream.scenario!r} (one epoch) are mutually exclusive."
        )
    method.check(learner)
    if args.head_learning_rate is not None and not isinstance(learner, PlainModel):
        raise ValueError(
            f"head_learning_rate={args.head_learning_rate} is for models without prompts (see "
            f"pgp_hf.set_trainable), and this one has the adapter {learner.name!r}: leave it out."
        )
    if args.later_prompt_learning_rate is not None and not isinstance(learner, Protectable):
        raise ValueError(
            f"later_prompt_learning_rate={args.later_prompt_learning_rate} is for prompts, and this model, {learner.name!r}, has "
            "none: leave it out. head_learning_rate is that of its head."
        )
    head = learner.settings().get("head")
    if args.compensate_drift and head != "statistics":
        raise ValueError(
            f"compensate_drift=True moves the class means of a statistics head, and this model has head={head!r}: use an "
            "adapter with head='statistics' in its configuration, or leave compensate_drift out."
        )


def set_last_block(args: PGPTrainingArguments, learner: StreamModel) -> None:
    """Let the model's last block compute what `last_block` says.

    Raises:
        ValueError: a model of which every token is read.
    """
    read, only_read = getattr(learner, "read_last_block", None), args.last_block == "read"
    if read is not None:
        read(only_read)
    elif only_read:
        raise ValueError(
            f"last_block='read' is for prompts on a ViT that a query selects, and this model is {learner.name!r}: leave it "
            "out."
        )


@contextmanager
def without_fixed(args: PGPTrainingArguments, method: ContinualMethod, learner: StreamModel) -> Iterator[None]:
    """Compute no gradient inside the block of parameters that the method's projection keeps from moving at all.

    It is exact unless gradients are clipped: their norm then lacks these parameters, so `skip_fixed` has to ask for it.
    """
    fixed: list[Tensor] = []
    clips = args.max_grad_norm is not None and 0 < args.max_grad_norm < float("inf")
    projection = method.projection
    if projection is not None and isinstance(learner, Protectable) and (args.skip_fixed or not clips):
        fixed = projection.projector.fixed(learner.prompt_parameters().items())
    if len(fixed) == len(learner.trainable()):
        fixed = []  # a loss needs something that learns
    try:
        for parameter in fixed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


def new_results(
    args: PGPTrainingArguments, stream: TaskStream, method: ContinualMethod, learner: StreamModel, first: int
) -> StreamResults:
    """Return the results of a run that has not begun; `first` is the 0-based index of the first task to evaluate."""
    settings, projection = learner.settings(), method.projection
    return StreamResults(
        method=learner.name if method.name == ProjectedPrompts.name else method.name,
        model=learner.name,
        method_settings=method.settings(),
        trainable_parameters=trainable_parameters(learner),
        projection="none" if projection is None else projection.config.method,
        head=settings.get("head", "linear"),
        scenario=stream.scenario,
        num_tasks=stream.num_tasks,
        seed=args.seed,
        eval_mask=args.eval_mask,
        batchwise_prompt=settings.get("batchwise_prompt", False),
        compensate_drift=args.compensate_drift,
        first=first,
    )


def trainable_parameters(learner: StreamModel) -> int:
    """Return the number of numbers that learn."""
    return sum(parameter.numel() for parameter in learner.trainable().values())


def set_learning_rates(optimizer: Optimizer, args: PGPTrainingArguments, learner: StreamModel, task: int) -> None:
    """Give the parameters of a new optimizer that have learning rates of their own in a 0-based task theirs."""
    later, head = args.later_prompt_learning_rate, args.head_learning_rate
    if task and later is not None and isinstance(learner, Protectable):
        separate_learning_rate(optimizer, learner.prompt_parameters().values(), later)
    if head is not None and isinstance(learner, PlainModel):
        separate_learning_rate(optimizer, learner.head_parameters(), head)


def separate_learning_rate(optimizer: Optimizer, parameters: Iterable[Tensor], learning_rate: float) -> None:
    """Give some of an optimizer's parameters a learning rate of their own."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})


def show_progress(trainer: Trainer) -> None:
    """Let a trainer show how a stream goes on, in place of what transformers shows of each task."""
    if trainer.args.disable_tqdm:
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(StreamPrinter())
        return
    trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK)
    if is_in_notebook():
        from .notebook import NotebookProgress  # which needs IPython

        trainer.add_callback(NotebookProgress())
    else:
        trainer.add_callback(StreamProgress())
