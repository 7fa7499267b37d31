"""What the example scripts share: the paired run, the rows without prompts, and the table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel

from .. import metrics
from ..data.images import ImageCollator
from ..data.stream import TaskStream
from ..heads.closed_form import frozen_matrices, stream_features
from ..projection import ProjectionConfig
from ..report import figures as plots
from ..runs.atomic import write_json
from ..runs.folder import RunFolder
from ..training.arguments import PGPTrainingArguments
from ..training.trainer import PGPTrainer, check_projection
from .arguments import DataArguments, ModelArguments, RunArguments, parse

__all__ = ["DataArguments", "ModelArguments", "PGPTrainingArguments", "RunArguments", "parse", "run", "table"]


def run(
    name: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: PGPTrainingArguments,
    make_model: Callable[[TaskStream], PeftModel],
) -> dict[str, Any]:
    """Train the run and, unless told otherwise, its unprojected twin; print and write the comparison.

    Both start from the same seed, the same class order and the same initial prompts, and see the same images in the
    same order.

    Args:
        name: of the method, for example "L2P".
        make_model: the backbone with its adapter, for a stream's classes; called once for each run, after seeding.

    Returns:
        Results by row name.
    """
    stream, processor = data_args.load(args.seed), model_args.processor()
    rows: dict[str, dict[str, Any]] = {}

    def train(projection: ProjectionConfig, output_dir: Path, resume: str | bool | None) -> PGPTrainer:
        set_seed(args.seed)
        arguments = copy.copy(args)
        arguments.output_dir = str(output_dir)
        arguments.push_to_hub = args.push_to_hub and output_dir == Path(args.output_dir)  # the twin stays here
        trainer = PGPTrainer(make_model(stream), arguments, stream, projection=projection, processing_class=processor)
        label = name if projection.method == "none" else f"{name}-{projection.method.upper()}"
        if trainer.is_world_process_zero():
            print(f"\n{label} -> {output_dir}", flush=True)
        check_projection(run_args.config(), trainer.tuner)  # before the twin takes its time
        trainer.train(resume_from_checkpoint=resume)
        rows[label] = trainer.results.to_dict()
        return trainer

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's own
    output_dir, projection = Path(args.output_dir), run_args.config()
    resume: Any = {"true": True, "false": None}.get(
        str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint
    )
    if not resume and not args.overwrite_output_dir:
        RunFolder(output_dir).check_unused()
    compare = not run_args.no_compare
    if compare and projection.method != "none":
        twin = resume
        if isinstance(resume, str):  # a revision on the Hub has no twin beside it
            twin = str(Path(resume) / "baseline") if Path(resume).is_dir() else None
        train(replace(projection, method="none", ln_penalty=0.0), output_dir / "baseline", twin)
    trainer = train(projection, output_dir, resume)
    if trainer.is_world_process_zero():
        if compare:
            rows = {**frozen_rows(trainer, stream, model_args), **rows}
        report(rows, output_dir, twin=compare and projection.method != "none")
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return rows


def frozen_rows(trainer: PGPTrainer, stream: TaskStream, model_args: ModelArguments) -> dict[str, dict[str, Any]]:
    """Results of the backbone without prompts.

    For CLIP also zero-shot; for the embedded ViT also with random weights, as a floor.
    """
    tuner = trainer.tuner
    extractors: dict[str, Callable[[Tensor], Tensor]] = {"frozen": tuner.frozen_features}
    if model_args.kind == "vit" and model_args.model_name_or_path is None:
        set_seed(trainer.args.seed)
        random = AutoModel.from_config(tuner.model.config).to(tuner.model.device).eval()
        position = {"interpolate_pos_encoding": tuner.adapter_config.interpolate_pos_encoding}
        extractors = {"random": lambda pixels: random(pixels, **position).last_hidden_state[:, 0], **extractors}
    matrices = {}
    for label, extract in extractors.items():
        collator = ImageCollator(trainer.processing_class)
        options = {
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


def _zero_shot_matrix(stream: TaskStream, test: list[Any], names: Any) -> list[list[float | None]]:
    """Accuracy (percent) of image features `(N_t, P)` against class name features `(C, P)`, classes seen so far."""
    rows = []
    for i in range(stream.num_tasks):
        row: list[float | None] = [None] * stream.num_tasks
        for j in range(i + 1):
            own = stream.scenario == "task_incremental"
            classes = list(stream.tasks[j].classes) if own else stream.seen_classes(i)
            predicted = [classes[best] for best in (test[j] @ names[classes].T).argmax(1)]
            row[j] = float(100 * (predicted == stream.test(j).labels).mean())
        rows.append(row)
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A plain-text table: average accuracy after each task, then the figures at the end of the stream."""
    tasks = max(len(row["per_task_average_accuracy"]) for row in rows.values())
    head = ["", *(f"task {t + 1}" for t in range(tasks)), "avg acc", "forgetting", "drift"]
    body = [
        [
            name,
            *(f"{value:.2f}" for value in row["per_task_average_accuracy"]),
            f"{row['average_accuracy']:.2f}",
            f"{row['forgetting']:.2f}",
            f"{row['drift'][-1]:.3f}",
        ]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(rows: dict[str, dict[str, Any]], output_dir: Path, twin: bool) -> None:
    """Print the table, write it and its curves, and say where everything is."""
    print(
        "\nAverage accuracy over the tasks seen, after each task (%); at the end: average accuracy, forgetting, drift\n"
    )
    print(table(rows))
    write_json(output_dir / "comparison.json", rows)
    trained = {name: row for name, row in rows.items() if "method" in row}
    plots.task_curves(trained, output_dir / "figures" / "comparison.png")
    tasks = max(len(row["drift"]) for row in trained.values())
    print(
        f"\nWritten to {output_dir}: the adapter after the last task, bases, results.json, README.md (model card);"
        f"\n  task-1 ... task-{tasks}: the same as it stood after each task; figures/: accuracy matrix, curves, stability, usage, comparison;"
        f"\n  comparison.json: this table"
        + ("; baseline/: the same files of the run without projection." if twin else ".")
    )
