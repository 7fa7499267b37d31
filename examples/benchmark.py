r"""Compare prompts, projected or not, methods that train a model, and frozen features.

    python examples/benchmark.py

runs every row on what the package ships (a small backbone, handwritten digits), with three
seeds. With your own backbone and data, the defaults are a protocol for CPUs (112 px, 50 training
and 20 test images per class, ten tasks, three epochs):

    python examples/benchmark.py --model_name_or_path DIR/vit-tiny-patch16-224 \
        --dataset_name DIR/cifar100 --image_column_name img --label_column_name fine_label \
        --output_dir benchmarks/cifar100 --jobs 2

Rows:
{rows}

A row's name may carry settings: `l2p-functional@energy=0.9,max_images=100` changes fields of the
row's ProjectionConfig, prompt configuration or PGPTrainingArguments, and counts as a row of its
own; `ewc@strength=1000` and `fine_tuning@trainable=lora:8` change those of a method, and what of
the model learns. On the embedded digits, methods with exemplars have two rows by default, with 2
and with 10 images a class. Methods have the recipe of run_baselines.py: --learning_rate,
--lr_scheduler_type, --later_prompt_learning_rate, --compensate_drift, --last_block and
--compile_trunk are for prompts, --last_block not for those of CLIP. The clip rows have the embedded
CLIP; with --model_name_or_path, a CLIP model, they run only when they are named. So do
dualprompt-joint and the rows of surprises, where the model begins without classes and learns each
task as it comes.

With --shift renderings, each task sees the world differently; the joint rows of prompts are left
out. With --scenario, so are rows that the scenario does not have. Choose settings with
--train_val_split 0.2 in an output folder of their own: all figures are then those of held-out
training images, and the test images choose nothing.

Runs of one seed are paired: they have the same class order, images, initial prompts and batches.
The joint rows train their single task for as many epochs as the others train each task.

Each row and seed runs in a process of its own, which writes one file, OUTPUT_DIR/ROW-seedK.json.
Finished runs are skipped, and interrupted ones continue exactly from their work folder, so the
same command continues the benchmark; several commands may share an output folder. After each run,
the table and its figures are written again.

    python examples/benchmark.py --speed --help
    python examples/benchmark.py --growth --help

are other benchmarks: of the time and memory that a step takes, and of how the cost of a task grows
with tasks, classes, images, prompts and the model.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig, PGPTrainingArguments
from pgp_hf.benchmark import growth, speed, table
from pgp_hf.benchmark.plans import Plan, Row, plan
from pgp_hf.benchmark.runs import describe, device_name, execute, holder
from pgp_hf.cli import console
from pgp_hf.cli.arguments import DataArguments, ModelArguments
from pgp_hf.cli.baseline_arguments import BaselineTrainingArguments, names
from pgp_hf.cli.config_file import CommandLine, expand, option
from pgp_hf.cli.parsing import HELP, SOURCES, read
from pgp_hf.cli.settings import is_folder
from pgp_hf.heads.closed_form import NearestClassMean, RandomProjectionRidge, ShrinkageLDA
from pgp_hf.methods import create
from pgp_hf.tuners.base.config import PromptConfig

# what the command line says of prompts, and methods have as it is by default: they refuse anything else
PROMPTS_ALONE: dict[str, Any] = {
    name: PGPTrainingArguments.__dataclass_fields__[name].default
    for name in ("later_prompt_learning_rate", "compensate_drift", "last_block", "compile_trunk")
}


def prompts(
    what: str,
    config: type[PromptConfig],
    method: str,
    careful: bool = False,
    joint: bool = False,
    **projection: Any,
) -> Row:
    """Define a row of prompts; a careful one is trained as `CAREFUL` describes."""
    training: dict[str, Any] = {"later_prompt_learning_rate": 0.004, "compensate_drift": True} if careful else {}
    if config is ClipPromptConfig:
        training["last_block"] = PROMPTS_ALONE["last_block"]
    return Row(what, prompt=config, projection={"method": method, **projection}, training=training, joint=joint)


OUTPUTS, FIRST_ATTENTION = "what the head reads of old images is held", "the first attention of old images is held"
CAREFUL = "smaller steps after the first task, class means follow the drift"
FUNCTIONAL: dict[str, Any] = {"energy": 0.95, "apply_to": "both", "max_images": 200}
ROWS = {
    "frozen-ncm": Row("frozen features, nearest class mean", NearestClassMean),
    "frozen-lda": Row("frozen features, shrinkage LDA", ShrinkageLDA),
    "frozen-ridge": Row("frozen features, ridge regression on random projections", RandomProjectionRidge),
    "l2p-joint": prompts("L2P, all classes as one task: an upper bound", L2PConfig, "none", joint=True),
    "l2p-frozen": prompts("L2P, prompts and keys frozen after the first task", L2PConfig, "frozen"),
    "l2p-none": prompts("L2P, no projection", L2PConfig, "none"),
    "l2p-pgp-gradient": prompts(
        "L2P, PGP on gradients, as in the paper's algorithm", L2PConfig, "pgp", apply_to="gradient"
    ),
    "l2p-pgp": prompts("L2P, PGP on updates", L2PConfig, "pgp"),
    "l2p-attention": prompts(f"L2P, {FIRST_ATTENTION}", L2PConfig, "attention"),
    "l2p-control": prompts(f"L2P, no projection, {CAREFUL}", L2PConfig, "none", careful=True),
    "l2p-functional": prompts(f"L2P, {OUTPUTS}, {CAREFUL}", L2PConfig, "functional", True, **FUNCTIONAL),
    "dualprompt-joint": prompts(
        "DualPrompt, all classes as one task: an upper bound", DualPromptConfig, "none", joint=True
    ),
    "dualprompt-none": prompts("DualPrompt, no projection", DualPromptConfig, "none"),
    "dualprompt-pgp": prompts("DualPrompt, PGP on updates", DualPromptConfig, "pgp"),
    "dualprompt-control": prompts(f"DualPrompt, no projection, {CAREFUL}", DualPromptConfig, "none", careful=True),
    "dualprompt-functional": prompts(
        f"DualPrompt, {OUTPUTS}, {CAREFUL}", DualPromptConfig, "functional", True, **FUNCTIONAL
    ),
    "clip-none": prompts("CLIP, no projection", ClipPromptConfig, "none"),
    "clip-pgp": prompts("CLIP, PGP on updates", ClipPromptConfig, "pgp"),
    "clip-control": prompts(f"CLIP, no projection, {CAREFUL}", ClipPromptConfig, "none", careful=True),
    "clip-functional": prompts(f"CLIP, {OUTPUTS}, {CAREFUL}", ClipPromptConfig, "functional", True, **FUNCTIONAL),
}
SURPRISES = {
    f"{name}-surprises": replace(ROWS[name], what=f"{ROWS[name].what}; each task a surprise", surprises=True)
    for name in ("l2p-control", "l2p-functional", "dualprompt-control", "dualprompt-functional")
}
ROWS |= SURPRISES
WHEN_NAMED = {*SURPRISES, "dualprompt-joint"}  # rows that run when they are named
RECIPE = {
    one: BaselineTrainingArguments.__dataclass_fields__[one].default
    for one in BaselineTrainingArguments.__annotations__
} | PROMPTS_ALONE
ROWS |= {
    name: Row(create(name).describe().title, method=name, training=RECIPE)
    for name in sorted(names(), key=lambda name: name not in ("fine_tuning", "joint"))  # the bounds come first
}
# of methods with exemplars, on the embedded digits: 2 and 10 images of each of 10 classes
EXEMPLARS = {
    "icarl": ("memory_per_class=2", "memory_per_class=10"),
    "bic": ("memory_per_class=2,validation_share=0.5", "memory_per_class=10"),
    "derpp": ("memory_size=20", "memory_size=100"),
    "der_mcg": ("memory_per_class=2", "memory_per_class=10"),
}
COMMON: dict[str, Any] = {"num_train_epochs": 3, "learning_rate": 0.0075, "output_dir": "out/benchmark"}
PROTOCOL = {
    **COMMON,
    "num_tasks": 10,
    "max_train_samples_per_class": 50,
    "max_eval_samples_per_class": 20,
    "image_size": 112,
    "augmentation": "flip",
}
# when neither a model nor data are named
EMBEDDED = {
    **COMMON,
    "num_tasks": 5,
    "max_train_samples_per_class": 40,
    "max_eval_samples_per_class": 30,
    "augmentation": "none",
}
ELSEWHERE = 75  # a worker's exit code when another process is running its run


@dataclass
class BenchmarkArguments:
    """Choose the rows and seeds to run, and the folders."""

    rows: list[str] = field(
        default_factory=list,
        metadata={"help": "rows to run; by default all, without the clip rows if a model is named"},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds to run each row with"})
    jobs: int = field(default=1, metadata={"help": "number of runs at a time, which share the cores"})
    work_dir: str | None = field(
        default=None,
        metadata={"help": "folder of unfinished runs, ignored by git; work/NAME next to the output folder by default"},
    )
    keep: bool = field(default=False, metadata={"help": "do not delete the work folders of finished runs"})
    table: bool = field(
        default=False, metadata={"help": "write table and figures of the finished runs, and run nothing"}
    )
    table_file: str | None = field(
        default=None, metadata={"help": "file of the table; OUTPUT_DIR/table.md by default"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print which runs are finished and which remain, and stop"})
    worker: bool = field(default=False, metadata={"help": argparse.SUPPRESS})


def usual_rows(argv: Sequence[str]) -> list[str]:
    """Return the names of the rows that run when the command line names none."""
    given = {option(token): (token.partition("=")[2] or after) for token, after in pairwise([*argv, ""])}
    scenario, shift = given.get("--scenario", DataArguments.scenario), given.get("--shift")
    rows = [name for name, row in ROWS.items() if name not in WHEN_NAMED and row.refusal(scenario, shift) is None]
    if "--model_name_or_path" in given:
        return [name for name in rows if ROWS[name].prompt is not ClipPromptConfig]
    if given.keys() & SOURCES:
        return rows
    return [each for name in rows for each in ([f"{name}@{one}" for one in EXEMPLARS.get(name, ())] or [name])]


def parse(argv: Sequence[str]) -> tuple[BenchmarkArguments, ModelArguments, DataArguments, PGPTrainingArguments]:
    """Parse the command line, whose defaults are the protocol."""
    given = set(map(option, argv))
    own = given & {"--seed", "--resume_from_checkpoint", "--overwrite_output_dir"}
    if own:
        raise ValueError(
            f"{', '.join(sorted(own))}: runs are named by --seeds and resumed automatically; leave it out."
        )
    indent = max(map(len, ROWS)) + 6
    wrapper = textwrap.TextWrapper(100, subsequent_indent=" " * indent, break_on_hyphens=False)
    listed = [wrapper.fill(f"    {name}".ljust(indent) + row.what) for name, row in ROWS.items()]
    description = str(__doc__).format(rows="\n".join(listed))
    line = CommandLine(list(argv))
    kinds = (BenchmarkArguments, ModelArguments, DataArguments, PGPTrainingArguments)
    bench, model, data, training = read(kinds, line, PROTOCOL if given & (SOURCES | HELP) else EMBEDDED, description)
    data.choose_tasks(given)
    bench.rows = bench.rows or usual_rows(argv)
    return bench, model, data, training


def result_arguments(argv: Sequence[str]) -> str:
    """Return the arguments that results depend on, as a shell reads them; local folders become DIR/name."""
    own, kept, skipping = {f"--{one.name}" for one in fields(BenchmarkArguments)} | {"--output_dir"}, [], False
    for token in argv:
        if token.startswith("--"):
            skipping = option(token) in own
        if not skipping:
            flag, equals, value = token.partition("=") if token.startswith("--") else ("", "", token)
            public = f"DIR/{os.path.basename(os.path.abspath(value))}" if is_folder(value) else value
            kept.append(f"{flag}{equals}{public}")
    return shlex.join(kept)


def schedule(groups: list[list[Plan]], argv: Sequence[str], jobs: int, after: Callable[[], None]) -> int:
    """Run groups of plans, each in a process of its own, `jobs` at a time; return how many processes failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    running: dict[subprocess.Popen[bytes], tuple[list[Plan], Path, float]] = {}
    waiting, failed = list(groups), 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                group = waiting.pop(0)
                log = group[0].work / "logs" / f"{group[0].label}.txt"  # outlives the work folders
                log.parent.mkdir(parents=True, exist_ok=True)
                rows = [each.name for each in group]
                command = [sys.executable, __file__, *argv, "--worker", "true", "--seeds", str(group[0].seed)]
                with open(log, "ab") as out:
                    process = subprocess.Popen([*command, "--rows", *rows], stdout=out, stderr=out, env=environment)
                running[process] = group, log, time.monotonic()
                number = len(groups) - len(waiting)
                say(f"{' '.join(rows)} seed {group[0].seed}: started ({number} of {len(groups)}), log in {log}")
            time.sleep(0.2)
            for process in [each for each in running if each.poll() is not None]:
                group, log, began = running.pop(process)
                failed += conclude(group, process.returncode, log, (time.monotonic() - began) / 60)
                after()
    finally:  # when interrupted, too: their progress stays in their work folders
        for process in running:
            process.terminate()
        for process, (group, *_) in running.items():
            process.wait()
            free(group)
    return failed


def free(group: list[Plan]) -> None:
    """Remove the lock files that a killed process has left behind."""
    for each in group:
        holder(each.lock)


def conclude(group: list[Plan], code: int, log: Path, minutes: float) -> bool:
    """Print how a process ended; return True if it failed."""
    free(group)
    for each in group:
        if each.file.exists():
            outcome = f"finished in {minutes:.1f} min, {describe(each)}"
        elif code == ELSEWHERE:
            outcome = "left to another process, which is running it"
        else:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            outcome = f"FAILED with exit code {code} after {minutes:.1f} min, see {log}: {' '.join(last)}"
        say(f"{each.name} seed {each.seed}: {outcome}")
    return code not in (0, ELSEWHERE)


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def stop(signum: int, frame: object) -> None:
    """Exit with the code that shells expect after a signal, but run `finally` blocks first."""
    raise SystemExit(128 + signum)


def write_so_far(output: Path, write: Callable[[], None]) -> None:
    """Write the table of the runs that are finished, if any; what keeps it from being written must not end other runs."""
    try:
        if table.read(output):
            write()
    except ValueError as error:
        say(f"no table: {error}")


def in_groups(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return what a process each runs: a plan, or all frozen rows of a seed, which share their features."""
    groups: dict[str, list[Plan]] = {}
    for each in plans:
        groups.setdefault(each.label if each.classifier is None else f"frozen-{each.seed}", []).append(each)
    return list(groups.values())


def carry_out(groups: list[list[Plan]], argv: Sequence[str], jobs: int, work: Path, after: Callable[[], None]) -> int:
    """Run groups of plans as `schedule` does, ended by signals in good order; return how many processes failed."""
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", encoding="utf-8")
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        return schedule(groups, argv, jobs, after)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    argv = expand(sys.argv[1:] if argv is None else argv).tokens
    if "--speed" in argv:
        return speed.main([token for token in argv if token != "--speed"])
    if "--growth" in argv:
        return growth.main([token for token in argv if token != "--growth"])
    bench, model, data, training = parse(argv)
    output = Path(str(training.output_dir))
    work = Path(bench.work_dir) if bench.work_dir else output.parent / "work" / output.name
    table_file = Path(bench.table_file) if bench.table_file else output / "table.md"
    named = [plan(name, seed, ROWS, model, data, training, work) for seed in bench.seeds for name in bench.rows]
    plans = list({each.label: each for each in named}.values())
    if bench.worker:
        return 0 if execute(plans, result_arguments(argv), bench.keep) else ELSEWHERE

    def write_table() -> None:
        table.write(output, table_file, ROWS, usual_rows(argv))

    if bench.table:
        write_table()
        say(f"table in {table_file}")
        return 0
    finished, runs = {each.label: each.finished() for each in plans}, table.read(output)
    for each in plans:
        each.check_seeds(runs)
    if bench.dry_run:
        for each in plans:
            print(
                f"{'finished' if finished[each.label] else 'to run  '}  {each.name} seed {each.seed}: {describe(each)}"
            )
        return 0
    groups = in_groups([each for each in plans if not finished[each.label]])
    if groups:  # rather than when the first run has been trained
        table.check(runs, output, device_name(training.device))
    say(f"{len(plans)} runs, {sum(finished.values())} of them finished earlier")
    failed = carry_out(groups, argv, bench.jobs, work, lambda: write_so_far(output, write_table))
    written = bool(table.read(output))  # another process may be running all of them
    if written:
        write_table()
    told = f"table in {table_file}" if written else "no run is finished"
    say(told + (f"; {failed} processes failed, run again to retry" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
