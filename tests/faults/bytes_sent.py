"""Measure what the processes of a data-parallel run send to each other, by phase.

    python tests/faults/bytes_sent.py

prints the figures of `examples/configs/README.md`: two processes on this machine, models of ViT-B/16's size with random
weights. Bytes are those of the tensors that one process hands to collective operations. They do not depend on the
hardware, on the weights or on the size of the images, which are small.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]

import forks  # noqa: E402
import tiny  # noqa: E402

from pgp_hf import DualPromptConfig, L2PConfig, ProjectionConfig, StreamTrainer, TaskStream, methods  # noqa: E402
from pgp_hf.runs.atomic import write_json  # noqa: E402
from pgp_hf.runs.reading import read_json  # noqa: E402
from pgp_hf.tuners.base import PromptConfig  # noqa: E402

PHASES = ("begin", "steps", "statistics", "evaluation")
WIDTH = {"c10::Half": 2, "c10::BFloat16": 2, "float": 4, "int": 4, "double": 8, "long int": 8, "long": 8}
WIDTH |= {"unsigned char": 1, "bool": 1, "signed char": 1}


class _Marks(TrainerCallback):
    """Leave a mark in the profile where a phase begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _mark("steps")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _mark("statistics")


def _mark(phase: str) -> None:
    with record_function(f"phase {phase}"):
        pass


def of_task(trainer: StreamTrainer, task: int) -> dict[str, Any]:
    """Train a task; return the bytes that this process has sent in each phase, and the number of steps."""
    evaluate = trainer.evaluate_stream

    def marked() -> dict[str, Any]:
        _mark("evaluation")
        trainer.evaluate_stream = evaluate
        return evaluate()

    trainer.evaluate_stream = marked
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        trainer.train_task(task)
    sent, phase = Counter[str](), "begin"
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("phase "):
            phase = event.name().removeprefix("phase ")
        elif event.name().startswith("gloo:"):
            for shape, dtype in zip(event.shapes(), event.dtypes(), strict=False):
                sent[phase] += torch.Size(shape).numel() * WIDTH[dtype]
    return {**{name: sent[name] for name in PHASES}, "optimizer_steps": trainer.state.global_step}


def measure(make: Callable[[Path], StreamTrainer], folder: Path, processes: int = 2, tasks: int = 2) -> dict[str, Any]:
    """Return what one process sends in the last of a run's first `tasks` tasks."""

    def work(rank: int) -> None:
        trainer = make(folder / "run")
        trainer.add_callback(_Marks())
        for t in range(tasks):
            found = of_task(trainer, t)
        learner = trainer.stream_model
        found["processes"] = processes
        found["trainable"] = sum(4 * tensor.numel() for tensor in learner.trainable().values())
        found["model"] = sum(tensor.nbytes for tensor in trainer.model.parameters())
        found["test_images"] = sum(len(trainer.stream.test(t)) for t in range(tasks))
        write_json(folder / f"{rank}.json", found)
        trainer.end()

    folder.mkdir(parents=True, exist_ok=True)
    if codes := [code for code in forks.together(processes, work, folder / "log", longest=3600) if code]:
        raise RuntimeError(f"exit codes {codes}: {(folder / 'log.0').read_text()[-2000:]}")
    return read_json(folder / "0.json")


# ---- the figures of the README ---------------------------------------------------------------------------------------


def _full_size() -> dict[str, Callable[[Path], StreamTrainer]]:
    """Return makers of trainers on ViT-B/16 for images of 32 px, for ten tasks of ten classes."""
    stream = TaskStream.from_dataset(tiny.data(classes=100, train=2, test=1), num_tasks=10, seed=0)

    def vit() -> PreTrainedModel:
        with tiny.seeded(0):
            return ViTForImageClassification(ViTConfig(image_size=32, num_labels=100))

    def trainer(folder: Path, model: Any, **settings: Any) -> StreamTrainer:
        few = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 5}
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        own = {"stream": stream, "processing_class": processor, "save_strategy": "no", **few, **settings}
        return tiny.trainer(folder, model=model, **own)

    def prompts(config: PromptConfig, **settings: Any) -> Callable[[Path], StreamTrainer]:
        return lambda folder: trainer(folder, get_peft_model(vit(), config), **settings)

    l2p = {"pool_size": 10, "prompt_length": 5, "top_k": 5}
    functional = ProjectionConfig(method="functional", max_images=8, probes=2)
    return {
        "L2P": prompts(L2PConfig(**l2p)),
        "L2P, `functional`, statistics head": prompts(
            L2PConfig(**l2p, head="statistics"), projection=functional, compensate_drift=True
        ),
        "DualPrompt": prompts(DualPromptConfig(pool_size=10)),
        "whole model, `fine_tuning`": lambda folder: trainer(folder, vit(), method=methods.create("fine_tuning")),
    }


def main() -> None:
    torch.set_num_threads(1)
    print("| model and method | what learns | each step | task begins | statistics | evaluation, each test image |")
    print("|---|---|---|---|---|---|")
    with tiny.without_figures(), tempfile.TemporaryDirectory() as folder:
        for name, make in _full_size().items():
            found = measure(make, Path(folder) / name)
            step = found["steps"] / found["optimizer_steps"]
            image = found["evaluation"] / found["test_images"] * found["processes"]
            shown = [found["trainable"], step, found["begin"], found["statistics"], image]
            print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in shown)} |", flush=True)


if __name__ == "__main__":
    main()
