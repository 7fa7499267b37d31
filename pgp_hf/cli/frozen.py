"""Rows of the frozen backbone in the examples' tables: classifiers in closed form, which train nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import AutoModel, BaseImageProcessor, PretrainedConfig

from .. import metrics
from ..data.images import ImageCollator
from ..data.stream import TaskStream
from ..heads.closed_form import frozen_matrices, stream_features
from ..training.arguments import PGPTrainingArguments

Extract = Callable[[Tensor], Tensor]  # pixel values `(B, 3, H, W)` to features `(B, d)`


def frozen_rows(
    stream: TaskStream,
    processor: BaseImageProcessor,
    args: PGPTrainingArguments,
    extractors: Mapping[str, Extract],
    class_features: Callable[[], Tensor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the results of classifiers on frozen features by the name of the row.

    Args:
        stream: the tasks.
        processor: prepares their images.
        args: device and batch size.
        extractors: by label, a backbone's features of images; "frozen" is the one that methods start from.
        class_features: features `(C, P)` of class names; with them comes a zero-shot row of the "frozen" backbone.
    """
    matrices: dict[str, list[list[float | None]]] = {}
    for label, extract in extractors.items():
        collator = ImageCollator(processor)
        options: dict[str, Any] = {
            "device": args.device,
            "batch_size": args.eval_batch_size,
            "progress": None if args.disable_tqdm else f"  {label} features",
        }
        train, test = (
            stream_features(extract, images, stream.num_tasks, collator, **options)
            for images in (stream.train, stream.test)
        )
        found = frozen_matrices(stream, train, test)
        matrices.update({f"{label}, {name}": matrix for name, matrix in found.items()})
        if label == "frozen" and class_features is not None:
            names = torch.nn.functional.normalize(class_features(), dim=-1).cpu().numpy()
            matrices["frozen, zero-shot"] = _zero_shot_matrix(stream, test, names)
    return {
        name: {**metrics.summarize(matrix), "accuracy_matrix": matrix, "drift": [0.0] * stream.num_tasks}
        for name, matrix in matrices.items()
    }


def random_weights(config: PretrainedConfig, args: PGPTrainingArguments, **options: Any) -> Extract:
    """Return the features, as an extractor, of a backbone with random weights, as a lower bound.

    Args:
        config: of the backbone.
        args: device and seed.
        options: for each forward pass.
    """
    set_seed(args.seed)
    random = AutoModel.from_config(config).to(args.device).eval()
    return lambda pixels: random(pixels, **options).last_hidden_state[:, 0]


def _zero_shot_matrix(stream: TaskStream, test: list[np.ndarray], names: np.ndarray) -> list[list[float | None]]:
    """Return the accuracy matrix (percent) of image features `(N_t, P)` compared with class names' features `(C, P)`."""
    rows = []
    for i in range(stream.num_tasks):
        row: list[float | None] = [None] * stream.num_tasks
        for j in range(i + 1):
            classes = stream.allowed_classes(i, j)
            predicted = np.array([classes[best] for best in (test[j] @ names[classes].T).argmax(1)])
            row[j] = float(100 * np.mean(predicted == stream.test(j).labels))
        rows.append(row)
    return rows
