"""Run the comparison of an example: a run, its unprojected twin, and classifiers without prompts, in one table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, BaseImageProcessor

from .. import metrics
from ..data.images import ImageCollator
from ..data.stream import TaskStream
from ..heads.closed_form import frozen_matrices, stream_features
from ..methods.projected_prompts import check_projection
from ..projection import ProjectionConfig
from ..report import figures
from ..report.formatting import as_number
from ..report.table import plain
from ..runs.atomic import write_json
from ..runs.folder import RunFolder
from ..training.pgp_trainer import PGPTrainer
from .arguments import Arguments, ModelArguments

Results = dict[str, dict[str, Any]]  # by the name of the row


def run(name: str, arguments: Arguments, make_model: Callable[[TaskStream], PeftModel]) -> Results:
    """Train the run and, unless `no_compare` is set, its unprojected twin; print and write the comparison.

    Both start from the same seed, the same class order and the same initial prompts, and see the same images in the
    same order.

    Args:
        name: of the adapter, such as "L2P".
        arguments: of the command line, from `parse`.
        make_model: makes the backbone with its adapter for a stream's classes; called once per run, after seeding.

    Returns:
        Results by row name.
    """
    args, projection = arguments.training, arguments.run.config()
    stream, processor = arguments.data.load(args.seed), arguments.model.processor()
    output_dir = Path(str(args.output_dir))  # which is never None: TrainingArguments has a default
    rows: Results = {}

    def train(projection: ProjectionConfig, folder: Path, resume: str | bool | None) -> PGPTrainer:
        set_seed(args.seed)
        own = copy.copy(args)
        own.output_dir = str(folder)
        own.push_to_hub = args.push_to_hub and folder == output_dir  # the twin is not uploaded
        trainer = PGPTrainer(make_model(stream), own, stream, projection=projection, processing_class=processor)
        label = name if projection.method == "none" else f"{name}-{projection.method.upper()}"
        if trainer.is_world_process_zero():
            print(f"\n{label} -> {folder}", flush=True)
        check_projection(arguments.run.config(), trainer.stream_model)  # before time is spent on the twin
        trainer.train(resume_from_checkpoint=resume)
        rows[label] = trainer.results.to_dict()
        return trainer

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's own
    resume = _resume(args.resume_from_checkpoint)
    if not resume and not args.overwrite_output_dir:
        RunFolder(output_dir).check_unused()
    compare = not arguments.run.no_compare
    twin = compare and projection.method != "none"
    if twin:
        unprojected = replace(projection, method="none", ln_penalty=0.0)  # a penalty needs a projection
        train(unprojected, output_dir / "baseline", _twin_of(resume))
    trainer = train(projection, output_dir, resume)
    if trainer.is_world_process_zero():
        if compare:
            rows = {**frozen_rows(trainer, stream, arguments.model, processor), **rows}
        report(rows, output_dir, twin)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return rows


def _resume(given: str | bool | None) -> str | bool | None:
    """Return `--resume_from_checkpoint`, with the words true and false converted."""
    words: dict[str, bool | None] = {"true": True, "false": None}
    return words.get(str(given).lower(), given)


def _twin_of(resume: str | bool | None) -> str | bool | None:
    """Return the checkpoint that the twin continues from; a revision on the Hub has no twin."""
    if isinstance(resume, str):
        return str(Path(resume) / "baseline") if Path(resume).is_dir() else None
    return resume


def frozen_rows(
    trainer: PGPTrainer, stream: TaskStream, model_args: ModelArguments, processor: BaseImageProcessor
) -> Results:
    """Return the results of the backbone without prompts.

    CLIP has a zero-shot row as well; the embedded ViT has rows with random weights, as a lower bound.
    """
    tuner = trainer.tuner
    extractors: dict[str, Callable[[Tensor], Tensor]] = {"frozen": tuner.frozen_features}
    if model_args.kind == "vit" and model_args.model_name_or_path is None:
        set_seed(trainer.args.seed)
        random = AutoModel.from_config(tuner.model.config).to(tuner.model.device).eval()
        position = {"interpolate_pos_encoding": tuner.adapter_config.interpolate_pos_encoding}
        extractors = {"random": lambda pixels: random(pixels, **position).last_hidden_state[:, 0], **extractors}
    matrices: dict[str, list[list[float | None]]] = {}
    for label, extract in extractors.items():
        collator = ImageCollator(processor)
        options: dict[str, Any] = {
            "device": tuner.model.device,
            "batch_size": trainer.args.eval_batch_size,
            "progress": None if trainer.args.disable_tqdm else f"  {label} features",
        }
        train, test = (
            stream_features(extract, images, stream.num_tasks, collator, **options)
            for images in (stream.train, stream.test)
        )
        found = frozen_matrices(stream, train, test)
        matrices.update({f"{label}, {name}": matrix for name, matrix in found.items()})
    if model_args.kind == "clip":
        names = torch.nn.functional.normalize(tuner.zero_shot_features(), dim=-1).cpu().numpy()
        matrices["frozen, zero-shot"] = _zero_shot_matrix(stream, test, names)
    return {
        name: {**metrics.summarize(matrix), "accuracy_matrix": matrix, "drift": [0.0] * stream.num_tasks}
        for name, matrix in matrices.items()
    }


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


def table(rows: Results) -> str:
    """Return a plain-text table: average accuracy after each task, then the figures at the end of the stream."""
    tasks = max(len(row["per_task_average_accuracy"]) for row in rows.values())
    header = ["", *(f"task {t + 1}" for t in range(tasks)), "avg acc", "forgetting", "drift"]
    body = [
        [
            name,
            *(as_number(value, 2) for value in row["per_task_average_accuracy"]),
            f"{row['average_accuracy']:.2f}",
            as_number(row["forgetting"], 2),
            f"{row['drift'][-1]:.3f}",
        ]
        for name, row in rows.items()
    ]
    return plain([header, *body])


def report(rows: Results, output_dir: Path, twin: bool) -> None:
    """Print the table, write it and its curves, and list the files of the run."""
    print(
        "\nAverage accuracy over the tasks seen, after each task (%); at the end: average accuracy, forgetting, drift\n"
    )
    print(table(rows))
    write_json(output_dir / "comparison.json", rows)
    trained = {name: row for name, row in rows.items() if "method" in row}
    figures.task_curves(trained, output_dir / "figures" / "comparison.png")
    tasks = max(len(row["drift"]) for row in trained.values())
    print(
        f"\nWritten to {output_dir}: the adapter after the last task, bases, results.json, README.md (model card);"
        f"\n  task-1 ... task-{tasks}: the same files after each task; figures/: accuracy matrix, curves, "
        "stability, usage, comparison;"
        f"\n  comparison.json: this table"
        + ("; baseline/: the same files of the run without projection." if twin else ".")
    )
