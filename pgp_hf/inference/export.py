"""Write a classifier as one file that runs without this package: an ONNX model, or an exported program of torch."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import BaseImageProcessor

from ..heads.statistics import ClassStatistics
from ..models import StreamModel

TOLERANCE = 1e-4
"""Largest difference between the file's scores and the classifier's."""

BATCHES = (1, 2, 7)
NEEDED = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 2**30  # bytes of weights; an ONNX file cannot have more than 2 GiB


class _Scores(nn.Module):
    """Map pixels `(B, 3, H, W)`, float32, to the scores of some classes, `(B, K)`, which sum to 1."""

    classes: Tensor

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        reference = next(model.parameters())
        self.dtype = reference.dtype
        self.register_buffer("classes", torch.tensor(list(classes), device=reference.device), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values.to(self.dtype)).logits
        return logits.float().softmax(-1)[:, self.classes]


def export(
    model: nn.Module,
    learner: StreamModel,
    processor: BaseImageProcessor,
    classes: Sequence[int],
    path: str | os.PathLike[str],
    format: str = "onnx",
) -> Path:
    """Write a classifier's model to a file; for the arguments and errors see `PromptClassifier.export`."""
    if format not in ("onnx", "torch"):
        raise ValueError(f"format={format!r} is unknown: choose one of onnx, torch.")
    if format == "onnx" and (missing := [name for name in NEEDED if find_spec(name) is None]):
        raise ImportError(f"format='onnx' needs {', '.join(missing)}: pip install 'pgp_hf[export]'.")
    if getattr(getattr(learner, "adapter_config", None), "batchwise_prompt", False):
        raise ValueError(
            "with batchwise_prompt=True scores depend on the other images of a batch: this cannot be exported."
        )
    names = learner.class_names or {}
    notes = {
        "labels.json": json.dumps([names[label] for label in classes]),
        "preprocessor_config.json": json.dumps(processor.to_dict()),
    }
    scores, path = _Scores(model, classes), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = _examples(processor).to(scores.classes.device)
    with torch.no_grad(), _quiet():
        with _solved(model):
            program = _trace(scores, pixels)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            write = _write_onnx if format == "onnx" else _write_torch
            run = write(program, pixels, Path(folder) / path.name, notes)
            for count in BATCHES:
                _compare(run(pixels[:count]), scores(pixels[:count]), count)
            for file in Path(folder).iterdir():  # weights above the limit have a file of their own
                os.replace(file, path.parent / file.name)
    return path


def _examples(processor: BaseImageProcessor) -> Tensor:
    """Return pixels of noise, as many images as the largest batch."""
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(max(BATCHES))]
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels.float()


def _trace(scores: _Scores, pixels: Tensor) -> ExportedProgram:
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    try:
        return torch.export.export(scores, (pixels,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises any type for what it cannot trace
        raise ValueError(
            f"this {type(scores.model).__name__} cannot be exported: torch cannot trace it ({str(error).splitlines()[0]})."
        ) from error


def _write_torch(
    program: ExportedProgram, pixels: Tensor, path: Path, notes: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, str(path), extra_files=notes)
    return torch.export.load(str(path)).module()


def _write_onnx(
    program: ExportedProgram, pixels: Tensor, path: Path, notes: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    made: Any = torch.onnx.export(
        program, (pixels,), input_names=["pixel_values"], output_names=["scores"], dynamo=True, verbose=False
    )
    made.model.metadata_props.update({name.removesuffix(".json"): text for name, text in notes.items()})
    made.save(str(path), external_data=weights > ONE_FILE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["scores"], {"pixel_values": pixels.cpu().numpy()})[0])


def _compare(found: Tensor, expected: Tensor, count: int) -> None:
    difference = float((found.cpu() - expected.cpu()).abs().max())
    if not difference <= TOLERANCE:  # NaN neither
        raise ValueError(
            f"the exported model's scores differ from the classifier's by {difference:.2g} in a batch of {count}, more than "
            f"{TOLERANCE:g}: this model or method does something that cannot be traced, and no file was written."
        )


@contextmanager
def _solved(model: nn.Module) -> Iterator[None]:
    """Let classifiers by statistics use their solutions as they are: how these are found cannot be traced."""
    found = [module for module in model.modules() if isinstance(module, ClassStatistics) and module.counts.any()]
    for statistics in found:
        vars(statistics)["solve"] = partial(tuple, statistics.solve())
    try:
        yield
    finally:
        for statistics in found:
            del vars(statistics)["solve"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, whose warnings are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
