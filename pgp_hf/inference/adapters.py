"""Read an adapter's settings from an untrusted file, and put the adapter on a backbone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import tuners  # noqa: F401 (registers the adapters)
from ..backbones.loading import wrapping
from ..models import weights
from ..runs.folder import ADAPTER, ADAPTER_CONFIG
from ..runs.revision import Revision
from ..tuners.base.config import PromptConfig
from ..tuners.base.learned import LEARNED_ENTRIES

# what transformers, PEFT and the tuners raise for impossible settings
UNFIT = (
    *(TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, ArithmeticError, StopIteration),
    StrictDataclassError,
)

# settings of LoRA that a prediction depends on, or that do not matter to it; any other must be at its default, since
# some change the backbone or name modules to import
_LORA = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout"),
}


class Adapter(NamedTuple):
    """An adapter's settings.

    Attributes:
        config: as PEFT has them.
        class_names: by label id.
        base_class: name of the class of transformers that loads the backbone.
    """

    config: PeftConfig
    class_names: dict[int, str]
    base_class: str


def plain_backbone(backbone: nn.Module) -> PreTrainedModel:
    """Return a backbone that was passed; raise ValueError for another kind of model, or one with an adapter."""
    if not isinstance(backbone, PreTrainedModel) or any(isinstance(m, BaseTunerLayer) for m in backbone.modules()):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}: pass a transformers model without an adapter, its Hub id or "
            "folder."
        )
    return backbone


def read_adapter(revision: Revision) -> Adapter:
    """Return an adapter's settings; raise ValueError for an unknown type or impossible settings."""
    path = revision.folder / ADAPTER_CONFIG
    fields = {**revision.config, "inference_mode": True}
    prompts = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(cls, PromptConfig)}
    if fields["peft_type"] not in (*prompts, "LORA"):
        raise ValueError(
            f"{path} has peft_type={fields['peft_type']!r}: expected one of {', '.join(prompts)}, the prompt adapters "
            "that are registered, or LORA."
        )
    try:
        if fields["peft_type"] == "LORA":
            return _read_lora(fields, revision.manifest)
        return _read_prompts(prompts[fields["peft_type"]](**fields), revision.manifest)
    except UNFIT as error:
        raise ValueError(f"{path} is not a valid adapter configuration ({error}).") from error


def _read_prompts(config: PromptConfig, manifest: dict[str, Any] | None) -> Adapter:
    names = config.id2label or {}
    if list(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"id2label={str(names)[:80]} does not name the classes 0, 1, ... in turn")
    if manifest and names == {index: f"LABEL_{index}" for index in names}:  # placeholders of transformers
        names = config.id2label = dict(enumerate(manifest["label_names"]))
    if not names:
        raise ValueError("it names no classes (id2label): it was saved from a model without a classifier")
    return Adapter(config, names, config.base_class)


def _read_lora(fields: dict[str, Any], manifest: dict[str, Any] | None) -> Adapter:
    if manifest is None:
        raise ValueError("a LoRA adapter names no classes, and there is no stream.json: load it with PEFT")
    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    for name, value in fields.items():
        if name not in _LORA and value != defaults.get(name):
            raise ValueError(f"{name}={str(value)[:60]} is not a setting that predictions are made with")
    return Adapter(LoraConfig(**fields), dict(enumerate(manifest["label_names"])), "AutoModelForImageClassification")


def expected_weights(
    base: PreTrainedModel, config: PeftConfig, names: dict[int, str] | None = None
) -> dict[str, Tensor]:
    """Return the adapter's tensors on this backbone, on the meta device; the backbone is not touched.

    Args:
        names: of the classes that its head has; those of the backbone by default.
    """
    own = copy.deepcopy(base.config)
    if names is not None:
        own.id2label = names
    try:
        with torch.device("meta"):
            return weights(wrap(type(base)(own), copy.deepcopy(config)))
    except UNFIT as error:
        raise ValueError(f"the adapter does not fit this {type(base).__name__}: {error}") from error


def read_weights(revision: Revision, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read an adapter's tensors.

    Args:
        revision: the adapter's files.
        expected: tensors of the names and shapes that there must be; files of earlier versions may lack numbers of learned
            entries.

    Raises:
        ValueError: a file that is damaged, was altered, has other names or shapes, or contradicts the settings.
    """
    counts = {name for name in expected if name.endswith(f"_{LEARNED_ENTRIES}")}
    calibrations = {name for name in expected if name.endswith("_statistics.calibration")}
    found = revision.weights(expected, later=counts | calibrations)
    noted = revision.config.get(LEARNED_ENTRIES) or 0
    for name in counts & found.keys():
        if int(found[name]) != noted:
            raise ValueError(
                f"{revision.folder / ADAPTER}: {name!r} is {int(found[name])}, and {ADAPTER_CONFIG} has "
                f"{LEARNED_ENTRIES}={noted}: the files do not belong together."
            )
    return found


def wrap(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter with new values on a backbone."""
    with wrapping():
        return PeftModel(base, config)
