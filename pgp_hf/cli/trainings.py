"""Make the models of the training commands, and run them: what `pgp-hf train` and the examples have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..data.stream import TaskStream
from ..models import set_trainable
from ..tuners import ClipPromptConfig, DualPromptConfig, L2PConfig
from . import baseline_arguments, baselines, experiment
from .arguments import Arguments
from .parsing import parse, prompt_arguments


def vit_model(kind: type[L2PConfig | DualPromptConfig], arguments: Arguments, stream: TaskStream) -> PeftModel:
    """Return the backbone with prompts of a kind, for a stream's classes."""
    backbone = arguments.model.backbone(stream)
    config = kind(
        **vars(arguments.prompts),
        head=arguments.run.head,
        interpolate_pos_encoding=arguments.model.interpolates(backbone),
    )
    return get_peft_model(backbone, config)


def clip_model(arguments: Arguments, stream: TaskStream) -> PeftModel:
    """Return CLIP with prompts for the names of a stream's classes."""
    backbone = arguments.model.clip()
    config = ClipPromptConfig.for_classes(
        arguments.model.tokenizer(),
        stream.label_names,
        **vars(arguments.prompts),
        head=arguments.run.head,
        pool_size=stream.num_tasks,
        interpolate_pos_encoding=arguments.model.interpolates(backbone),
    )
    return get_peft_model(backbone, config)


def clip_arguments() -> type:
    """Return the arguments of CLIP's prompts."""
    template = field(default="{}", metadata={"help": "text around each class name, such as 'a photo of a {}.'"})
    return prompt_arguments(ClipPromptConfig, template=template)


def l2p(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train L2P prompts."""
    arguments = parse(None, prompt_arguments(L2PConfig), "l2p", argv, prog)
    experiment.run("L2P", arguments, partial(vit_model, L2PConfig))


def dualprompt(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train DualPrompt."""
    arguments = parse(None, prompt_arguments(DualPromptConfig), "dualprompt", argv, prog)
    experiment.run("DualPrompt", arguments, partial(vit_model, DualPromptConfig))


def clip(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train CLIP prompts."""
    arguments = parse(None, clip_arguments(), "clip", argv, prog)
    experiment.run("CLIP", arguments, clip_model)


def baseline(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train the model itself, by the method that `--method` names."""
    arguments = baseline_arguments.parse(None, argv, prog)

    def make_model(stream: TaskStream) -> PreTrainedModel | PeftModel:
        return set_trainable(arguments.model.backbone(stream, resize=True), arguments.run.trainable)

    baselines.run(arguments, make_model)


TRAININGS: dict[str, Callable[[Sequence[str] | None, str | None], None]] = {
    "l2p": l2p,
    "dualprompt": dualprompt,
    "clip": clip,
    "baseline": baseline,
}
