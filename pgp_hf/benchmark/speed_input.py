"""Time how fast one process makes batches of stored images: decoded, cropped, mirrored, resized and normalised."""

from __future__ import annotations

import importlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from transformers import ViTImageProcessorPil

from ..data.images import AugmentedImages, ImageCollator
from ..data.stream import TaskStream

EXACT, BATCHED = "image processor, image by image", "batched, from memory-mapped uint8"
BAR = 3.0
_IMAGES, _BATCH, _STORED = 192, 64, 32


def _stream() -> tuple[TaskStream, list[bytes]]:
    """Return random images of 32 px, as a stream and as files."""
    pixels = np.random.default_rng(0).integers(0, 256, (_IMAGES, _STORED, _STORED, 3)).astype(np.uint8)
    images = [PIL.Image.fromarray(each) for each in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": images, "label": [i % 2 for i in range(_IMAGES)]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return TaskStream.from_dataset(datasets.DatasetDict(train=rows, test=rows), num_tasks=1, seed=None), files


def _way(stream: TaskStream, pixels: int, exact: bool, keep: bool) -> Callable[[int], None]:
    images = AugmentedImages(stream.train(0), "crop_flip", 0.05, 0, 0, exact=exact)
    collate = ImageCollator(ViTImageProcessorPil(size={"height": pixels, "width": pixels}), exact)
    if keep:
        images.keep_pixels()

    def epoch(number: int) -> None:
        images.set_epoch(number)
        for start in range(0, _IMAGES, _BATCH):
            collate([images[i] for i in range(start, start + _BATCH)])

    return epoch


def _torchvision(files: Sequence[bytes], pixels: int) -> Callable[[int], None] | None:
    """Return an epoch by torchvision's transforms; None where it is not installed."""
    try:
        v2: Any = importlib.import_module("torchvision.transforms.v2")  # only compared with, and needed by nothing
    except ImportError:
        return None
    transform: Any = v2.Compose(
        [
            v2.RandomResizedCrop((pixels, pixels), scale=(0.05, 1)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )

    def epoch(number: int) -> None:
        for start in range(0, _IMAGES, _BATCH):
            chosen = files[start : start + _BATCH]
            torch.stack([transform(PIL.Image.open(io.BytesIO(each)).convert("RGB")) for each in chosen])

    return epoch


def rates(pixels: int, rounds: int) -> dict[str, list[float]]:
    """Return images a second of a process's time, one thread, in each round, by the way that batches are made."""
    stream, files = _stream()
    ways: dict[str, Callable[[int], None] | None] = {
        EXACT: _way(stream, pixels, True, False),
        "batched, decoded in each epoch": _way(stream, pixels, False, False),
        BATCHED: _way(stream, pixels, False, True),
        "torchvision, image by image": _torchvision(files, pixels),
    }
    found: dict[str, list[float]] = {name: [] for name, way in ways.items() if way is not None}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(-1, rounds):
            for name, way in ways.items():
                if way is None:
                    continue
                start = time.process_time()
                way(number + 1)
                if number >= 0:
                    found[name].append(_IMAGES / (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    return found


def _times(rates: Sequence[float], others: Sequence[float]) -> float:
    """Return how many times the others' rates these are: the median over the rounds, in each of which both took their turn."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def report(pixels: int, rounds: int) -> list[str]:
    """Return the lines of the table and of the bar."""
    found = rates(pixels, rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    lines = [
        "",
        f"## Input: {_STORED} px PNG, random crop, mirrored, {pixels} px, one process, one thread",
        "",
        "| way | images/s | from | to | image by image = 1 |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        share = _times(values, found[EXACT])
        lines.append(f"| {name} | {medians[name]:,.0f} | {min(values):,.0f} | {max(values):,.0f} | {share:.2f} |")
    if len(found) < 4:
        lines.append("| torchvision | not installed | | | |")
    share = _times(found[BATCHED], found[EXACT])
    met = "met    " if share >= BAR else "NOT MET"
    return [*lines, "", f"    {met}  input: batched at least {BAR:g} times image by image: {share:.2f} times"]
