"""A stream, a backbone and a trainer of odd small sizes, for tests that run the whole thing in a second."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from pgp_hf import L2PConfig, PGPTrainer, PGPTrainingArguments, ProjectionConfig, TaskStream
from pgp_hf.report import figures as plots

SIDE = 20


def data(classes: int = 6, train: int = 8, test: int = 4, seed: int = 0) -> datasets.DatasetDict:
    """Noisy images around one random pattern a class."""
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

    return datasets.DatasetDict(train=split(train), test=split(test))


def stream(**kwargs: Any) -> TaskStream:
    arguments = {"num_tasks": 3, "seed": 0, **kwargs}
    return TaskStream.from_dataset(arguments.pop("dataset", None) or data(), **arguments)


def backbone(num_labels: int = 6, **kwargs: Any) -> ViTForImageClassification:
    torch.manual_seed(7)
    config = ViTConfig(
        **{
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 48,
            "image_size": SIDE,
            "patch_size": 5,
            "num_labels": num_labels,
            "initializer_range": 0.2,  # random weights that tell images apart
            **kwargs,
        }
    )
    return ViTForImageClassification(config)


def model(num_labels: int = 6, **kwargs: Any):
    base = backbone(num_labels)
    torch.manual_seed(11)
    return get_peft_model(base, L2PConfig(**{"pool_size": 5, "prompt_length": 2, "top_k": 2, **kwargs}))


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def trainer(output_dir: Path | str, *, projection: ProjectionConfig | None = None, **kwargs: Any) -> PGPTrainer:
    """A trainer; keyword arguments that `PGPTrainer` takes go there, the others to `PGPTrainingArguments`."""
    own = {name: kwargs.pop(name) for name in ("callbacks", "compute_metrics", "optimizers") if name in kwargs}
    arguments = {
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "augmentation": "flip",
        "disable_tqdm": True,
        "seed": 3,
    }
    made = {"model": kwargs.pop("model", None), "stream": kwargs.pop("stream", None)}
    return PGPTrainer(
        made["model"] or model(),
        PGPTrainingArguments(str(output_dir), **{**arguments, **kwargs}),
        made["stream"] or stream(),
        projection=projection or ProjectionConfig(energy=0.9, key_energy=0.9),
        processing_class=processor(),
        **own,
    )


def same_results(a: dict, b: dict) -> bool:
    """Whether two result dicts agree in everything that does not measure time."""
    timed = {"seconds", "train_images_per_second", "images_trained", "versions"}
    return {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def finished_run(folder: Path) -> Path:
    """Folder of a finished run of three tasks, without figures, whose adapter names its backbone."""
    own = model()
    backbone().save_pretrained(folder / "backbone")
    own.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figures", lambda results, folder: [])
        trainer(folder / "run", model=own, num_train_epochs=1).train()
    return folder / "run"


@contextmanager
def script(path: Path) -> Iterator[ModuleType]:
    """A script of the examples as a module."""
    name = f"script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # HfArgumentParser resolves a dataclass's annotations there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
