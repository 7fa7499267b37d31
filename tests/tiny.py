"""Tiny models, streams and trainers for all tests.

A run takes about a second. Sizes differ from each other as far as small numbers allow, so that mixing two of them up
shows, and weights are drawn wide enough to tell images apart. Models draw from seeds of their own: a call gives the
same weights each time and leaves the caller's random numbers as they were.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from pgp_hf import (
    ClipPromptConfig,
    DualPromptConfig,
    L2PConfig,
    PGPTrainer,
    PGPTrainingArguments,
    ProjectionConfig,
    StreamTrainer,
    TaskStream,
    set_trainable,
)
from pgp_hf.report import figures
from pgp_hf.tuners.base import PromptConfig

SIDE = 20  # pixels
CLASSES = 6

ADAPTERS = {"l2p": "classification", "dualprompt": "classification", "clip": "clip"}  # and their kinds of backbone

_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}

# several prompts that images share, and class names of one to three tokens
_SETTINGS: dict[str, tuple[type[PromptConfig], dict[str, Any]]] = {
    "l2p": (L2PConfig, {"pool_size": 5, "prompt_length": 2, "top_k": 2}),
    "dualprompt": (
        DualPromptConfig,
        {"general_layers": [0, 1], "expert_layers": [1], "pool_size": 3, "general_length": 3},
    ),
    "clip": (
        ClipPromptConfig,
        {
            "pool_size": 3,
            "text_length": 2,
            "image_length": 3,
            "class_tokens": [[38, *range(c, c + 1 + c % 3), 39] for c in range(CLASSES)],
            "id2label": {c: f"class {c}" for c in range(CLASSES)},
        },
    ),
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---- images ----------------------------------------------------------------------------------------------------------


def data(classes: int = CLASSES, train: int = 8, test: int = 4, seed: int = 0) -> datasets.DatasetDict:
    """Return splits of noisy images around one random pattern for each class; `train` and `test` count per class."""
    return datasets.DatasetDict(_data(classes, train, test, seed))


@functools.cache
def _data(classes: int, train: int, test: int, seed: int) -> dict[str, datasets.Dataset]:
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (classes, 5, 5, 3))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {c}" for c in range(classes)])}
    )

    def split(per_class: int) -> datasets.Dataset:
        labels = rng.permutation(np.repeat(np.arange(classes), per_class))
        images = []
        for label in labels:
            noisy = np.clip(patterns[label].repeat(4, 0).repeat(4, 1) + rng.normal(0, 40, (SIDE, SIDE, 3)), 0, 255)
            images.append(Image.fromarray(noisy.astype(np.uint8)))
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    return {"train": split(train), "test": split(test)}


def stream(**settings: Any) -> TaskStream:
    """Return a stream of three tasks of `dataset`, by default `data()`."""
    settings = {"num_tasks": 3, "seed": 0, **settings}
    return TaskStream.from_dataset(settings.pop("dataset", None) or data(), **settings)


def images(count: int = 5, size: int | tuple[int, int] = SIDE, channels: int = 3, seed: int = 0) -> Tensor:
    """Return random pixels `(count, channels, height, width)`."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def processor() -> ViTImageProcessorPil:
    """Return an image processor for the backbones."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def some_of(names: Iterable[str], *default: str) -> list[Any]:
    """Return parameters of a test: the `default` ones run by default, the others are slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


# ---- models ----------------------------------------------------------------------------------------------------------


def backbone(kind: str = "classification", attention: str = "sdpa", seed: int = 7, **sizes: Any) -> PreTrainedModel:
    """Return an untrained model in eval mode: a ViT for `classification`, a ViT as a bare `backbone`, or a `clip`.

    `sizes` change the ViT's configuration, `text_config` and `vision_config` among them that of CLIP's towers.
    """
    with seeded(seed):
        if kind == "clip":
            made = CLIPModel(_clip_config(**sizes))
            made.set_attn_implementation(attention)
            return made.eval()
        cls = {"classification": ViTForImageClassification, "backbone": ViTModel}[kind]
        labels = {"num_labels": CLASSES} if kind == "classification" else {}
        wide = {"initializer_range": 0.2, "image_size": SIDE, "patch_size": 5, "hidden_size": 24}
        return cls(ViTConfig(attn_implementation=attention, **{**_TOWER, **wide, **labels, **sizes})).eval()


def _clip_config(text_config: dict | None = None, vision_config: dict | None = None, **sizes: Any) -> CLIPConfig:
    ends = {"bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39}
    text = {"hidden_size": 24, "vocab_size": 40, "max_position_embeddings": 18, **ends}
    vision = {"hidden_size": 36, "image_size": SIDE, "patch_size": 5}
    return CLIPConfig(
        text_config={**_TOWER, **text, **(text_config or {})},
        vision_config={**_TOWER, **vision, **(vision_config or {})},
        **{"projection_dim": 16, "initializer_factor": 4.0, **sizes},
    )


def config(adapter: str = "l2p", **settings: Any) -> PromptConfig:
    """Return an adapter's configuration."""
    cls, own = _SETTINGS[adapter]
    return cls(**copy.deepcopy({**own, **settings}))


def model(
    adapter: str | PromptConfig = "l2p",
    base: PreTrainedModel | None = None,
    *,
    kind: str | None = None,
    attention: str = "sdpa",
    seed: int = 11,
    **settings: Any,
) -> PeftModel:
    """Return a model in eval mode with an adapter, by name with its `settings` or by its configuration.

    It is put on `base`, or else on a `backbone` of this `kind` and `attention`.
    """
    if isinstance(adapter, str):
        kind = kind or ADAPTERS[adapter]
        adapter, settings = config(adapter, **settings), {}
    assert not settings, "a configuration has its settings"
    base = backbone(kind or "classification", attention) if base is None else base
    with seeded(seed):
        return get_peft_model(base, adapter).eval()


def plain(name: str = "full", base: PreTrainedModel | None = None, seed: int = 11) -> PreTrainedModel | PeftModel:
    """Return a model without prompts, by what of it learns: "full", "last:1", "head", "lora:2"."""
    with seeded(seed):
        return set_trainable(backbone() if base is None else base, "all" if name == "full" else name)


@torch.no_grad()
def features(model: PeftModel, pixels: Tensor) -> Tensor:
    """Return what the head reads, `(B, d)`."""
    found: list[Tensor] = []
    watch = model.base_model.watch_features(found.append)
    model(pixel_values=pixels)
    watch.remove()
    return found[0]


# ---- runs ------------------------------------------------------------------------------------------------------------


def arguments(folder: Path | str, **settings: Any) -> PGPTrainingArguments:
    """Return the arguments of a short run."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "augmentation": "flip",
        "disable_tqdm": True,
        "seed": 3,
    }
    return PGPTrainingArguments(str(folder), **{**defaults, **settings})


def trainer(folder: Path | str, **settings: Any) -> StreamTrainer:
    """Return a `StreamTrainer` where a `method` is given, else a `PGPTrainer`.

    Of `settings`, the fields of `PGPTrainingArguments` go there and the others to the trainer.
    """
    given = {field.name for field in fields(PGPTrainingArguments)} & settings.keys()
    args = arguments(folder, **{name: settings.pop(name) for name in given})
    own = {"processing_class": processor(), **settings}
    own["model"], own["stream"] = own.get("model") or model(), own.get("stream") or stream()
    if "method" in own:
        return StreamTrainer(args=args, **own)
    own["projection"] = own.get("projection") or ProjectionConfig(energy=0.9, key_energy=0.9)
    return PGPTrainer(args=args, **own)


@contextmanager
def without_figures() -> Iterator[Callable[..., Any]]:
    """Draw no figure, which takes longer than training; yield the function that does."""
    with pytest.MonkeyPatch.context() as patch:
        draw = figures.save_figures
        patch.setattr(figures, "save_figures", lambda *args: [])
        yield draw


def finished_run(folder: Path, adapter: str = "l2p", **settings: Any) -> Path:
    """Return `folder/run`, a finished run without figures; its adapter names the backbone in `folder/backbone`."""
    backbone(ADAPTERS[adapter]).save_pretrained(folder / "backbone")
    learner = model(adapter, **settings)
    learner.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    with without_figures():
        trainer(folder / "run", model=learner, num_train_epochs=1).train()
    return folder / "run"


def same_results(a: dict, b: dict) -> bool:
    """Return whether two result dicts agree in everything that does not measure time."""
    timed = {"seconds", "train_images_per_second", "images_trained", "versions"}
    return {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


@contextmanager
def script(path: Path) -> Iterator[ModuleType]:
    """Load a script of the examples as a module."""
    name = f"script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # HfArgumentParser resolves a dataclass's annotations there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
