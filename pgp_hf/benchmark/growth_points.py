"""Learn small random streams of given sizes, and measure what a task of each costs."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import signal
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from peft import get_peft_model
from transformers import (
    PrinterCallback,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ..data.stream import TaskStream
from ..projection import ProjectionConfig
from ..report.figures import save_figures
from ..runs.digests import FIGURES
from ..runs.folder import ADAPTER, BASES, MANIFEST, RESULTS, RunFolder
from ..runs.reading import read_json
from ..training.arguments import PGPTrainingArguments
from ..training.pgp_trainer import PGPTrainer
from ..tuners.l2p import L2PConfig

PATCH, TEST = 16, 2  # pixels; test images of a class
SECONDS = ("training", "statistics", "evaluation", "files")
"""The parts of a task, in their order; `training` begins with the queries of its images."""


@dataclass(frozen=True)
class Point:
    """The sizes of a stream, and what it is learned by.

    Attributes:
        tasks: number of tasks.
        classes: of a task.
        images: for training, of a class.
        pool: entries of the pool.
        length: tokens of an entry.
        pixels: height and width of the images.
        width: of the model.
        projection: condition that is held.
        figures: whether they are drawn at the end, which takes longer than learning a small stream.
    """

    tasks: int = 6
    classes: int = 5
    images: int = 8
    pool: int = 10
    length: int = 4
    pixels: int = 32
    width: int = 48
    projection: str = "functional"
    figures: bool = False

    @property
    def label(self) -> str:
        """Return a name for a file."""
        return "-".join(f"{name}_{value}" for name, value in asdict(self).items())

    @property
    def tokens(self) -> int:
        """Return the number of patches of an image."""
        return (self.pixels // PATCH) ** 2

    @property
    def all_classes(self) -> int:
        """Return the number of classes of the stream."""
        return self.tasks * self.classes

    def stream(self) -> TaskStream:
        """Return a stream of random images."""
        drawn = np.random.default_rng(0)
        names = [f"class {i}" for i in range(self.all_classes)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

        def rows(each: int) -> datasets.Dataset:
            labels = np.repeat(np.arange(self.all_classes), each)
            pixels = drawn.integers(0, 256, (len(labels), 16, 16, 3)).astype(np.uint8)
            images = [PIL.Image.fromarray(one) for one in pixels]
            return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

        splits = datasets.DatasetDict(train=rows(self.images), test=rows(TEST))
        return TaskStream.from_dataset(splits, num_tasks=self.tasks, seed=0)

    def trainer(self, folder: str) -> Watched:
        """Return the trainer of a run that writes to `folder`."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "num_attention_heads": 3,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": 2,
            "image_size": self.pixels,
            "patch_size": PATCH,
            "num_labels": self.all_classes,
        }
        prompts = L2PConfig(pool_size=self.pool, prompt_length=self.length, top_k=4, head="statistics")
        args = PGPTrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            augmentation="flip",
            figures="none",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Watched(
            get_peft_model(ViTForImageClassification(ViTConfig(**sizes)), prompts),
            args,
            self.stream(),
            ProjectionConfig(method=self.projection),
            processing_class=ViTImageProcessorPil(size={"height": self.pixels, "width": self.pixels}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Marks(trainer))
        return trainer


class Watched(PGPTrainer):
    """Note when the parts of each task end, in seconds of the process.

    Attributes:
        parts: by task, of each of `SECONDS`.
        checkpoint: bytes of the last task's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.parts: list[list[float]] = []
        self.checkpoint = 0
        self.marks: list[float] = []
        super().__init__(*args, **kwargs)

    def mark(self) -> None:
        """Note that a part has ended."""
        self.marks.append(time.process_time())

    def train_task(self, *args: Any, **kwargs: Any) -> Any:
        self.marks = []
        self.mark()
        output = super().train_task(*args, **kwargs)
        self.mark()
        self.parts.append(np.diff(self.marks).tolist())
        return output

    def evaluate_stream(self) -> dict[str, Any]:
        self.mark()
        results = super().evaluate_stream()
        self.mark()
        return results


class _Marks(TrainerCallback):
    """Mark the end of training, and have one checkpoint written, by the last task, whose times do not count."""

    def __init__(self, trainer: Watched) -> None:
        self.watched = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.watched.mark()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = self.watched.task == self.watched.stream.num_tasks - 1
        control.should_save = last and state.epoch == state.num_train_epochs

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watched.checkpoint = size(RunFolder(args.output_dir).checkpoints(self.watched.task or 0))


def size(path: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def resident() -> int | None:
    """Return the largest memory that this process has had so far, in bytes; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(point: Point) -> dict[str, Any]:
    """Learn a stream in this process; return what a task of it costs, ready for JSON."""
    before = resident()
    with tempfile.TemporaryDirectory() as name:
        trainer = point.trainer(name)
        trainer.train()
        peak = resident()
        run = RunFolder(name)
        last, whole = run.task(point.tasks - 1), size(run.root)
        adapter, bases = ((last / file).stat().st_size for file in (ADAPTER, BASES))
        # what other programs disturb least, among tasks that are as late in their stream
        late = np.array(trainer.parts[:-1])[-max(3, point.tasks // 4) :]
        found: dict[str, Any] = {
            "point": asdict(point),
            "seconds": dict(zip(SECONDS, late.min(0).tolist(), strict=True)),
            "memory": None if peak is None or before is None else peak - before,
            "bytes": {
                "adapter": adapter,
                "bases": bases,
                "other files": size(last) - adapter - bases,
                "checkpoint": trainer.checkpoint,
                "whole run": whole,
            },
            "tasks": [dict(zip(SECONDS, parts, strict=True)) for parts in trainer.parts],
        }
        if point.figures:
            revisions, start = [run.task(t) for t in range(point.tasks)], time.process_time()
            save_figures(read_json(last / RESULTS), last / FIGURES, read_json(last / MANIFEST), revisions)
            found["seconds"]["drawing"] = time.process_time() - start
            found["bytes"]["figures"] = size(last / FIGURES)
        return found


def _answer(point: Point, answers: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # a `Trainer` collects garbage as each task begins, which would take longer than a small task itself
    gc.collect()
    gc.freeze()
    answers.put(measure(point))


def measure_alone(point: Point) -> dict[str, Any]:
    """Return what `measure` does, in a process of its own, whose memory is that of the run.

    Raises:
        RuntimeError: the process has failed.
    """
    # a fork has everything imported, and nothing has run in threads yet
    context: Any = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    answers = context.Queue()
    process = context.Process(target=_answer, args=(point, answers))
    process.start()
    found: dict[str, Any] | None = None
    try:
        while found is None and (process.is_alive() or not answers.empty()):
            with suppress(queue.Empty):  # however long it takes, while nothing has killed it
                found = answers.get(timeout=0.1)
        process.join(5)
    finally:
        process.kill()
    if found is None:
        raise RuntimeError(
            f"the stream {point} could not be learned: see the error above, if there is one; else its process was killed."
        )
    return found
