"""The benchmark: prompts with and without projection beside frozen baselines, over several seeds.

    python examples/benchmark.py

runs every row on what the package ships (a small backbone, handwritten digits). On a backbone and data of your own the
defaults are a CPU protocol (112 px, 50 training and 20 test images a class, ten tasks, three epochs):

    python examples/benchmark.py --model_name_or_path DIR/vit-tiny-patch16-224 --dataset_name DIR/cifar100 \
        --image_column_name img --label_column_name fine_label --output_dir benchmarks/cifar100 --jobs 2

Rows:
{rows}

A row's name may carry settings: `l2p-functional@energy=0.9,max_images=100` changes fields of the row's
ProjectionConfig, prompt configuration or PGPTrainingArguments, and is a row of its own. Runs of one seed are paired:
the same class order, images, initial prompts and batches. The joint row trains its one task for as many epochs.

Each row and seed runs in a process of its own and ends as one file, OUTPUT_DIR/ROW-seedK.json. Finished runs are
skipped and interrupted ones go on exactly where their work folder stands, so that the same command continues the
benchmark; several commands may share an output folder. After each run the table and its figures are written anew.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from pgp_hf import DualPromptConfig, L2PConfig, PGPTrainingArguments
from pgp_hf.benchmark import table
from pgp_hf.benchmark.plans import Plan, Row, is_folder, plan
from pgp_hf.benchmark.runs import describe, execute, holder
from pgp_hf.cli.arguments import DataArguments, ModelArguments, option
from pgp_hf.heads.closed_form import NearestClassMean, RandomProjectionRidge, ShrinkageLDA


def prompts(
    what: str, config: type, method: str, careful: bool = False, joint: bool = False, **projection: Any
) -> Row:
    training = {"later_prompt_learning_rate": 0.004, "compensate_drift": True} if careful else {}
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
    "dualprompt-none": prompts("DualPrompt, no projection", DualPromptConfig, "none"),
    "dualprompt-pgp": prompts("DualPrompt, PGP on updates", DualPromptConfig, "pgp"),
    "dualprompt-control": prompts(f"DualPrompt, no projection, {CAREFUL}", DualPromptConfig, "none", careful=True),
    "dualprompt-functional": prompts(
        f"DualPrompt, {OUTPUTS}, {CAREFUL}", DualPromptConfig, "functional", True, **FUNCTIONAL
    ),
}
PROTOCOL = (
    "--num_tasks 10 --max_train_samples_per_class 50 --max_eval_samples_per_class 20 --image_size 112 "
    "--num_train_epochs 3 --learning_rate 0.0075 --augmentation flip --output_dir out/benchmark"
).split()
# when neither a model nor data are named
EMBEDDED = (
    "--num_tasks 5 --max_train_samples_per_class 40 --max_eval_samples_per_class 30 "
    "--num_train_epochs 3 --learning_rate 0.0075 --augmentation none --output_dir out/benchmark"
).split()
ELSEWHERE = 75  # a worker's exit code when another process is at its run


@dataclass
class BenchmarkArguments:
    """What to run, and where."""

    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": "rows to run; all by default"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds that each row is run with"})
    jobs: int = field(default=1, metadata={"help": "runs at a time; they share the cores out"})
    work_dir: str | None = field(
        default=None,
        metadata={"help": "folder of unfinished runs, not to be committed; work/NAME beside the output folder"},
    )
    keep: bool = field(default=False, metadata={"help": "keep the work folders of finished runs"})
    table: bool = field(default=False, metadata={"help": "write table and figures of the finished runs; run nothing"})
    table_file: str | None = field(default=None, metadata={"help": "the table; OUTPUT_DIR/table.md by default"})
    dry_run: bool = field(default=False, metadata={"help": "say what is finished and what would run"})
    worker: bool = field(default=False, metadata={"help": argparse.SUPPRESS})


def parse(argv: Sequence[str]) -> tuple[BenchmarkArguments, ModelArguments, DataArguments, PGPTrainingArguments]:
    """The command line, the protocol's arguments before it, so that what is given wins."""
    given = set(map(option, argv))
    own = given & {"--seed", "--resume_from_checkpoint", "--overwrite_output_dir"}
    if own:
        raise ValueError(f"{', '.join(sorted(own))}: runs are named by --seeds and go on by themselves, leave it out.")
    parser = HfArgumentParser(
        (BenchmarkArguments, ModelArguments, DataArguments, PGPTrainingArguments),
        description=__doc__.format(rows="\n".join(f"    {name:<23}{row.what}" for name, row in ROWS.items())),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = given & {"--model_name_or_path", "--dataset_name", "--train_dir"}
    return parser.parse_args_into_dataclasses([*(PROTOCOL if named else EMBEDDED), *argv])


def result_arguments(argv: Sequence[str]) -> str:
    """The arguments that results depend on, for a shell; local folders as DIR/name."""
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
    """Run groups of plans, each in a process of its own, `jobs` at a time; returns how many processes failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    running: dict[subprocess.Popen, tuple[list[Plan], Path, float]] = {}
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
    finally:  # when interrupted too: what they have done stays in their work folders
        for process in running:
            process.terminate()
        for process, (group, *_) in running.items():
            process.wait()
            free(group)
    return failed


def free(group: list[Plan]) -> None:
    """Remove the lock files that a killed process leaves behind."""
    for each in group:
        holder(each.lock)


def conclude(group: list[Plan], code: int, log: Path, minutes: float) -> bool:
    """Say how a process ended; True when it failed."""
    free(group)
    for each in group:
        if each.file.exists():
            outcome = f"finished in {minutes:.1f} min, {describe(each)}"
        elif code == ELSEWHERE:
            outcome = "left to another process, which is at it"
        else:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            outcome = f"FAILED with exit code {code} after {minutes:.1f} min, see {log}: {' '.join(last)}"
        say(f"{each.name} seed {each.seed}: {outcome}")
    return code not in (0, ELSEWHERE)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    bench, model, data, training = parse(argv)
    output = Path(training.output_dir)
    work = Path(bench.work_dir) if bench.work_dir else output.parent / "work" / output.name
    table_file = Path(bench.table_file) if bench.table_file else output / "table.md"
    named = [plan(name, seed, ROWS, model, data, training, work) for seed in bench.seeds for name in bench.rows]
    plans = list({each.label: each for each in named}.values())
    if bench.worker:
        return 0 if execute(plans, result_arguments(argv), bench.keep) else ELSEWHERE

    def write_table() -> None:
        if table.read(output):
            table.write(output, table_file, ROWS)

    if bench.table:
        write_table()
        say(f"table in {table_file}")
        return 0
    groups: dict[str, list[Plan]] = {}  # frozen rows of a seed share a process, and the features
    finished = {each.label: each.finished() for each in plans}
    for each in plans:
        if not finished[each.label]:
            groups.setdefault(each.label if each.classifier is None else f"frozen-{each.seed}", []).append(each)
    if bench.dry_run:
        for each in plans:
            print(
                f"{'finished' if finished[each.label] else 'to run  '}  {each.name} seed {each.seed}: {describe(each)}"
            )
        return 0
    say(f"{len(plans)} runs, {sum(finished.values())} of them finished earlier")
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", encoding="utf-8")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    failed = schedule(list(groups.values()), argv, bench.jobs, write_table)
    write_table()
    say(f"table in {table_file}" + (f"; {failed} processes failed, run again to retry" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
