"""Run the comparison of an example: a run, its unprojected twin, and classifiers without prompts, in one table."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from peft import PeftModel
from transformers import BaseImageProcessor

from ..data.stream import TaskStream
from ..methods.projected_prompts import check_projection
from ..projection import ProjectionConfig
from ..report import figures
from ..report.formatting import MISSING, as_measured
from ..report.table import plain
from ..runs.atomic import write_json
from ..runs.checks import first_task
from ..runs.folder import RESULTS, RunFolder
from ..runs.lock import held
from ..training.pgp_trainer import PGPTrainer
from ..training.resume import find_run
from ..training.signals import leaving
from .arguments import Arguments
from .frozen import Extract, frozen_rows, random_weights

Results = dict[str, dict[str, Any]]  # by the name of the row
TWIN = "baseline"  # its folder, in that of the run


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
    args, main = arguments.training, arguments.training.process_index == 0
    output_dir = Path(str(args.output_dir))  # which is never None: TrainingArguments has a default
    twin = not arguments.run.no_compare and arguments.run.config().method != "none"
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving(main))
        for folder in (output_dir, *([output_dir / TWIN] if twin else [])) if main else ():
            stack.enter_context(held(folder))  # until both are finished
        return _run(name, arguments, make_model, output_dir, twin)


def _run(
    name: str, arguments: Arguments, make_model: Callable[[TaskStream], PeftModel], output_dir: Path, twin: bool
) -> Results:
    """Train and compare, in folders that are held."""
    args, projection = arguments.training, arguments.run.config()
    stream, processor = arguments.data.load(args.seed), arguments.model.processor()
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
    resume = resume_argument(args.resume_from_checkpoint)
    if not resume and not args.overwrite_output_dir:
        RunFolder(output_dir).check_unused()
    if isinstance(resume, str):
        find_run(resume, token=args.hub_token)  # before the twin deletes anything
    if twin:
        unprojected = replace(projection, method="none", ln_penalty=0.0)  # a penalty needs a projection
        train(unprojected, output_dir / TWIN, _twin_of(resume))
    trainer = train(projection, output_dir, resume)
    if trainer.is_world_process_zero():
        if not arguments.run.no_compare:
            rows = {**without_prompts(trainer, arguments, processor), **rows}
        report(rows, output_dir, twin)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return rows


def resume_argument(given: str | bool | None) -> str | bool | None:
    """Return `--resume_from_checkpoint`, with the words true and false converted."""
    words: dict[str, bool | None] = {"true": True, "false": None}
    return words.get(str(given).lower(), given)


def _twin_of(resume: str | bool | None) -> str | bool | None:
    """Return the run that the twin continues; None where there is none, as for a revision on the Hub."""
    if not isinstance(resume, str):
        return resume
    run = Path(resume)
    twins = (run / TWIN, run.parent / TWIN / run.name)
    found = [twin for twin in twins if not RunFolder(twin).is_empty() or (twin / RESULTS).is_file()]
    if not found:
        warnings.warn(f"{resume} has no twin without projection: that is trained from the first task.", stacklevel=2)
    return str(found[0]) if found else None


def without_prompts(trainer: PGPTrainer, arguments: Arguments, processor: BaseImageProcessor) -> Results:
    """Return the results of the backbone without prompts.

    CLIP has a zero-shot row as well; the embedded ViT has rows with random weights, as a lower bound.
    """
    tuner, args = trainer.tuner, trainer.args
    extractors: dict[str, Extract] = {"frozen": tuner.frozen_features}
    if arguments.model.kind == "vit" and arguments.model.model_name_or_path is None:
        position = {"interpolate_pos_encoding": tuner.adapter_config.interpolate_pos_encoding}
        extractors = {"random": random_weights(tuner.model.config, args, **position), **extractors}
    names = tuner.zero_shot_features if arguments.model.kind == "clip" else None
    return frozen_rows(trainer.stream, processor, args, extractors, names)


def table(rows: Results) -> str:
    """Return a plain-text table: average accuracy after each task, then the figures at the end of the stream."""
    tasks = max(len(row["per_task_average_accuracy"]) for row in rows.values())
    header = ["", *(f"task {t + 1}" for t in range(tasks)), "avg acc", "forgetting", "drift"]
    body = [
        [
            name,
            *(MISSING for _ in range(first_task(row))),
            *(as_measured(value, 2) for value in row["per_task_average_accuracy"][first_task(row) :]),
            as_measured(row["average_accuracy"], 2),
            MISSING if first_task(row) else as_measured(row["forgetting"], 2),
            as_measured(row["drift"][-1], 3),
        ]
        for name, row in rows.items()
    ]
    return plain([header, *body])


def print_comparison(rows: Results, output_dir: Path, refused: Mapping[str, str] | None = None) -> None:
    """Print the table, and write it and the curves of the runs that were trained.

    Args:
        rows: results by the name of the row.
        output_dir: the folder to write to.
        refused: by name, why there is no such row.
    """
    print(
        "\nAverage accuracy over the tasks seen, after each task (%); at the end: average accuracy, forgetting, drift\n"
    )
    print(table(rows))
    refused = refused or {}
    for name, reason in refused.items():
        print(f"\nno row {name}: {reason}")
    content = {**rows, **{name: {"refused": why} for name, why in refused.items()}}
    write_json(output_dir / "comparison.json", content, rows=True)
    figures.comparison(rows, output_dir / "figures" / "comparison.png")


def report(rows: Results, output_dir: Path, twin: bool) -> None:
    """Print the table, write it and its curves, and list the files of the run."""
    print_comparison(rows, output_dir)
    tasks = max(len(row["drift"]) for row in rows.values())
    print(
        f"\nWritten to {output_dir}: the adapter after the last task, bases, results.json, README.md (model card);"
        f"\n  task-1 ... task-{tasks}: the same files after each task; figures/: accuracy matrix, curves, "
        "stability, usage, comparison;"
        f"\n  comparison.json: this table"
        + ("; baseline/: the same files of the run without projection." if twin else ".")
    )
