"""Run the comparison of an example: a run, its unprojected twin, PGP as published, and classifiers without prompts."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import set_seed
from peft import PeftModel
from transformers import BaseImageProcessor

from ..data.stream import TaskStream
from ..methods.projected_prompts import check_projection
from ..projection import ProjectionConfig
from ..report import figures
from ..report.formatting import MISSING, WIDTH, as_measured, fill
from ..report.table import plain
from ..report.verdict import frozen_wins, verdict
from ..runs.atomic import write_json
from ..runs.checks import first_task
from ..runs.folder import MANIFEST, QUERIES, RESULTS, RunFolder
from ..runs.lock import held
from ..runs.reading import read_json
from ..training.pgp_trainer import PGPTrainer
from ..training.resume import find_run
from ..training.signals import leaving
from .arguments import Arguments
from .frozen import Extract, frozen_rows, random_weights
from .recipes import as_published

Results = dict[str, dict[str, Any]]  # by the name of the row
MakeModel = Callable[[Arguments, TaskStream], PeftModel]
TWIN, PUBLISHED = "baseline", "published"  # their folders, in that of the run
SHOWN = 5  # at most, of tasks for which there is no room in a table


class Planned(NamedTuple):
    """A run to train: its folder and what differs between runs."""

    folder: Path
    arguments: Arguments
    projection: ProjectionConfig

    def label(self, name: str) -> str:
        """Return the name of its row, such as "L2P-PGP"."""
        return name if self.projection.method == "none" else f"{name}-{self.projection.method.upper()}"


def plan(arguments: Arguments) -> list[Planned]:
    """Return the runs to train in their order, the run itself last.

    Before it comes its unprojected twin and, in the main job, PGP as published; neither does with `no_compare`, nor
    where the run is not projected.
    """
    output_dir = Path(str(arguments.training.output_dir))  # which is never None: TrainingArguments has a default
    projection = arguments.run.config()
    own = Planned(output_dir, arguments, projection)
    if arguments.run.no_compare or projection.method == "none":
        return [own]
    # what needs a projection is left out
    unprojected = replace(
        projection, method="none", ln_penalty=0.0, equal_images=False, all_keys=False, bf16_probes=False
    )
    runs = [Planned(output_dir / TWIN, arguments, unprojected)]
    if arguments.run.main_job:
        other = as_published(arguments)
        runs.append(Planned(output_dir / PUBLISHED, other, other.run.config()))
    return [*runs, own]


def run(name: str, arguments: Arguments, make_model: MakeModel) -> Results:
    """Train the run and, unless `no_compare` is set, its unprojected twin; print and write the comparison.

    The main job, without data or a recipe of the user's own, trains PGP as published as well. All start from the same
    seed, the same class order and the same initial prompts, and see the same images in the same order.

    Args:
        name: of the adapter, such as "L2P".
        arguments: of the command line, from `parse`.
        make_model: makes the backbone with its adapter for a stream's classes; called once per run, after seeding.

    Returns:
        Results by row name.
    """
    main, runs = arguments.training.process_index == 0, plan(arguments)
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving(main))
        for folder in [runs[-1].folder, *(one.folder for one in runs[:-1]), *_left_over(runs)] if main else ():
            stack.enter_context(held(folder))  # until all are finished
        return _run(name, runs, make_model)


def _run(name: str, runs: list[Planned], make_model: MakeModel) -> Results:
    """Train and compare, in folders that are held."""
    output_dir, arguments, projection = runs[-1]
    args = arguments.training
    stream, processor = arguments.data.load(args.seed), arguments.model.processor()
    rows: Results = {}

    resume = resume_argument(args.resume_from_checkpoint)
    if not resume and not args.overwrite_output_dir:
        RunFolder(output_dir).check_unused()
    if isinstance(resume, str):
        find_run(resume, token=args.hub_token)  # before the others delete anything

    def train(one: Planned) -> PGPTrainer:
        set_seed(args.seed)
        own = copy.copy(args)
        own.output_dir = str(one.folder)
        own.query_cache = args.query_cache or str(runs[-1].folder / QUERIES)  # which all of them share
        own.push_to_hub = args.push_to_hub and one is runs[-1]  # the others are not uploaded
        model = make_model(one.arguments, stream)
        trainer = PGPTrainer(model, own, stream, projection=one.projection, processing_class=processor)
        if trainer.is_world_process_zero():
            print(f"\n{one.label(name)} -> {one.folder}", flush=True)
        if one is runs[0]:
            check_projection(projection, trainer.stream_model)  # before time is spent on the others
            if args.overwrite_output_dir and not resume:
                _clear(runs, trainer)
        trainer.train(resume_from_checkpoint=resume if one is runs[-1] else beside(resume, one.folder.name))
        rows[one.label(name)] = trainer.results.to_dict()
        return trainer

    for one in runs[:-1]:
        train(one)  # whose model is not kept
    trainer = train(runs[-1])
    if trainer.is_world_process_zero():
        if not arguments.run.no_compare:
            rows = {**without_prompts(trainer, arguments, processor), **rows}
        report(rows, runs, name)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return rows


def _clear(runs: list[Planned], trainer: PGPTrainer) -> None:
    """Delete earlier runs, all of them before any begins: an interruption must not leave one of other settings."""
    if trainer.is_world_process_zero():
        for folder in [*(one.folder for one in runs), *_left_over(runs)]:
            if not RunFolder(folder).is_empty():
                RunFolder(folder).clear()
    trainer.accelerator.wait_for_everyone()


def _left_over(runs: list[Planned]) -> list[Path]:
    """Return the folders of runs beside an earlier one that this comparison does not have; none without a comparison."""
    if runs[-1].arguments.run.no_compare:
        return []
    beside = [runs[-1].folder / name for name in (TWIN, PUBLISHED)]
    return [one for one in beside if one not in {run.folder for run in runs} and not RunFolder(one).is_empty()]


def resume_argument(given: str | bool | None) -> str | bool | None:
    """Return `--resume_from_checkpoint`, with the words true and false converted."""
    words: dict[str, bool | None] = {"true": True, "false": None}
    return words.get(str(given).lower(), given)


def beside(resume: str | bool | None, folder: str) -> str | bool | None:
    """Return the run that one beside the run itself continues; None where there is none, as for a revision on the Hub.

    Args:
        resume: what the run itself continues.
        folder: name of the other's folder, `TWIN` or `PUBLISHED`.
    """
    if not isinstance(resume, str):
        return resume
    run = Path(resume)
    others = (run / folder, run.parent / folder / run.name)
    found = [other for other in others if not RunFolder(other).is_empty() or (other / RESULTS).is_file()]
    if not found:
        what = "twin without projection" if folder == TWIN else f"run in {folder}/"
        warnings.warn(f"{resume} has no {what}: that is trained from the first task.", stacklevel=2)
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
    """Return a plain-text table of drift, forgetting and average accuracy at the end, and of the accuracy on the way.

    It has the average accuracy after each task, or after some of many tasks, as far as the terminal is wide.
    """
    tasks = max(len(row["per_task_average_accuracy"]) for row in rows.values())
    shown = list(range(tasks))
    while len((found := plain(_cells(rows, shown))).split("\n", 1)[0]) > WIDTH and len(shown) > 2:
        some = min(len(shown), SHOWN + 1) - 1
        shown = [round(i * (tasks - 1) / max(some - 1, 1)) for i in range(some)]
    return found


def _cells(rows: Results, shown: Sequence[int]) -> list[list[str]]:
    """Return the table's header and rows, with the accuracy after the 0-based tasks that are shown."""
    header = ["", "drift", "forgetting", "avg acc", *(f"task {t + 1}" for t in shown)]
    body = [
        [
            name,
            as_measured(row["drift"][-1], 3),
            MISSING if first_task(row) else as_measured(row["forgetting"], 2),
            as_measured(row["average_accuracy"], 2),
            *(as_measured(row["per_task_average_accuracy"][t], 2) if t >= first_task(row) else MISSING for t in shown),
        ]
        for name, row in rows.items()
    ]
    return [header, *body]


def print_comparison(
    rows: Results, output_dir: Path, refused: Mapping[str, str] | None = None, *, draw: bool = True
) -> None:
    """Print the table, and write it and the curves of the runs that were trained.

    Args:
        rows: results by the name of the row.
        output_dir: the folder to write to.
        refused: by name, why there is no such row.
        draw: write the curves.
    """
    print(
        "\nDrift: how far the features of old test images have moved, relative to their length. Forgetting"
        "\nand average accuracy in %; task T: average accuracy over the tasks seen, after task T.\n"
    )
    print(table(rows))
    refused = refused or {}
    for name, reason in refused.items():
        print("\n" + fill(f"no row {name}: {reason}"))
    content = {**rows, **{name: {"refused": why} for name, why in refused.items()}}
    write_json(output_dir / "comparison.json", content, rows=True)
    if draw:
        manifest = output_dir / MANIFEST
        figures.comparison(
            rows,
            output_dir / "figures" / "comparison.png",
            manifest=read_json(manifest) if manifest.is_file() else None,
        )


def report(rows: Results, runs: list[Planned], name: str) -> None:
    """Print the table, write it and its curves, list the files of the run, and say what the table shows.

    Args:
        rows: results by the name of the row.
        runs: those that were trained, the run itself last.
        name: of the adapter.
    """
    output_dir, arguments, _ = runs[-1]
    drawn = arguments.training.figures != "none"
    print_comparison(rows, output_dir, draw=drawn)
    label = {one.folder.name: one.label(name) for one in runs[:-1]}
    tasks, own = max(len(row["drift"]) for row in rows.values()), rows[runs[-1].label(name)]
    written = (
        f"Written to {output_dir}: {runs[-1].label(name)}, the adapter after the last task, bases, results.json, README.md "
        f"(model card); task-1 ... task-{tasks}: the same files after each task; "
        f"{'figures/: accuracy matrix, curves, stability, usage, comparison; ' if drawn else ''}comparison.json: this table"
    )
    print("\n" + fill(written, "  "))
    twin = rows[label[TWIN]] if label else None
    if twin:
        print(f"  {TWIN}/: {label[TWIN]}, the same without projection")
    if twin and PUBLISHED in label:
        trained = " and ".join(as_measured(_trained_head(row), 2) for row in (own, twin))
        published = (
            f"  {PUBLISHED}/: {label[PUBLISHED]}, PGP as published, where the trained head predicts; with that head, "
            f"{runs[-1].label(name)} and {label[TWIN]} reach {trained} %"
        )
        print(fill(published, "    "))
    no_source = not (arguments.model.model_name_or_path or arguments.data.dataset_name or arguments.data.train_dir)
    for text in (frozen_wins(rows, embedded=no_source), verdict(own, twin) if twin else None):
        if text:
            print("\n" + fill(text))


def _trained_head(row: dict[str, Any]) -> float | None:
    """Return the average accuracy of the head that was trained along with a statistics head."""
    return row["heads"]["linear"]["average_accuracy"]
