"""Carry out one run of the benchmark in the calling process, from its lock to its file."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from .. import metrics
from ..cli.settings import digests
from ..data.images import ImageCollator
from ..data.stream import TaskStream
from ..heads.closed_form import frozen_matrices, stream_features
from ..methods import METHODS, ProjectedPrompts
from ..models import set_trainable
from ..report.formatting import as_number
from ..runs import removal
from ..runs.atomic import write_json
from ..runs.folder import QUERIES, RunFolder
from ..runs.reading import read_json
from ..training.results import SUMMARY, versions
from ..training.trainer import StreamTrainer
from ..tuners import ClipPromptConfig, L2PConfig
from .figures import CLOSED
from .plans import Plan


def execute(plans: list[Plan], arguments: str, keep: bool = False) -> bool:
    """Carry out one plan, or several frozen rows of one seed, which share their features.

    Args:
        plans: what to run.
        arguments: the command line that the results depend on, for their files.
        keep: do not delete the work folders of finished runs.

    Returns:
        False if another process is running one of them, in which case nothing is done.
    """
    with contextlib.ExitStack() as stack:
        if not all(stack.enter_context(claimed(plan.lock)) for plan in plans):
            return False
        plans = [plan for plan in plans if not plan.finished()]  # another process may have finished one by now
        if not plans:
            return True
        for plan in plans:
            write_json(plan.folder / "settings.json", plan.settings())
        try:
            for plan, results in _frozen(plans) if plans[0].classifier is not None else _trained(*plans):
                head = {"row": plan.name, "seed": plan.seed, "arguments": arguments, "settings": plan.settings()}
                write_json(plan.file, {**head, **results, **machine(plan.training.device)}, rows=True)
                if not keep:
                    _clear(plan)
        except Exception:
            for plan in plans:
                if RunFolder(plan.folder / "run").is_empty():  # what was refused may come back with other settings
                    _clear(plan)
            raise
    return True


def _clear(plan: Plan) -> None:
    """Delete what a run has written into its work folder."""
    RunFolder(plan.folder / "run").clear()
    removal.remove(plan.folder, ["settings.json"])  # and the folder, if that was all


def _frozen(plans: list[Plan]) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """Run each classifier on the features of one backbone and one stream, which are extracted once."""
    plan = plans[0]
    stream = plan.data.load(plan.seed)
    backbone = plan.model.backbone(stream)
    # any adapter will do, since all give access to the bare backbone
    config = L2PConfig(interpolate_pos_encoding=plan.model.interpolates(backbone))
    tuner: Any = get_peft_model(backbone, config).to(plan.training.device).base_model
    collator = ImageCollator(plan.model.processor())
    options: dict[str, Any] = {
        "device": plan.training.device,
        "batch_size": plan.training.per_device_eval_batch_size,
    }
    began = time.perf_counter()
    train = stream_features(tuner.frozen_features, stream.train, stream.num_tasks, collator, **options)
    extraction = time.perf_counter() - began
    test = stream_features(tuner.frozen_features, stream.test, stream.num_tasks, collator, **options)
    known = copy.copy(stream)
    known.scenario = "task_incremental"
    for plan in plans:
        make = {plan.name: lambda plan=plan: copy.deepcopy(plan.classifier)}
        within = _accuracies(frozen_matrices(known, train, test, make)[plan.name])
        began = time.perf_counter()
        found = _accuracies(frozen_matrices(stream, train, test, make)[plan.name])
        yield (
            plan,
            {
                "num_tasks": stream.num_tasks,
                "num_classes": stream.num_classes,
                "sha256": digests(stream, backbone),
                "heads": {CLOSED: {**found, "task_incremental": within}},
                "trainable_parameters": 0,
                "memory": {"images": 0, "bytes": 0},
                "drift": [0.0] * stream.num_tasks,
                "seconds": {"features": extraction, "fit": time.perf_counter() - began},
            },
        )


def _trained(plan: Plan) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """Train one run, continuing from what its work folder holds."""
    known, training = plan.data.load(plan.seed), copy.copy(plan.training)
    stream = TaskStream.empty(known.scenario, plan.seed) if plan.row.surprises else known
    training.output_dir, training.seed, training.disable_tqdm = str(plan.folder / "run"), plan.seed, True
    training.query_cache = training.query_cache or str(plan.folder.parent / QUERIES)  # which all runs share
    training.push_to_hub = False
    set_seed(plan.seed)  # for the head and the prompts, which are drawn next
    backbone, model = _model(plan, known)
    made_of = digests(known, backbone)
    method = ProjectedPrompts(plan.projection) if plan.row.method is None else METHODS[plan.row.method](plan.method)
    trainer = StreamTrainer(model, training, stream, method, processing_class=plan.model.processor())
    resumed = not trainer.folder.is_empty()
    if plan.row.surprises:
        for t in range(known.num_tasks):
            parts = {"train": known.train(t), "test": known.test(t)}
            arrived = {split: images.dataset(known.label_names) for split, images in parts.items()}
            trainer.learn(datasets.DatasetDict(arrived), resume_from_checkpoint=resumed)
    else:
        trainer.train(resume_from_checkpoint=resumed or None)
    results = trainer.results.to_dict()
    # accuracies are in `heads`, the others in `settings` and at the top of the file
    accuracies = ("accuracy_matrix", *SUMMARY, "task_incremental")
    heads = results.pop("heads", {})
    heads[results["head"]] = {key: results[key] for key in accuracies if key in results}
    elsewhere = {*accuracies, "method", "method_settings", "projection", "seed", "versions"}
    kept = {key: value for key, value in results.items() if key not in elsewhere}
    images = sum(known.num_images("train", t) for t in range(known.num_tasks))
    told = {"num_classes": known.num_classes, "train_images": images, "sha256": made_of}
    yield plan, {**told, **kept, "heads": heads, "resumed": resumed}


def _accuracies(matrix: list[list[float | None]]) -> dict[str, Any]:
    """Return an accuracy matrix, and what follows from it."""
    return {"accuracy_matrix": matrix, **metrics.summarize(matrix)}


def _model(plan: Plan, stream: TaskStream) -> tuple[PreTrainedModel, PreTrainedModel | PeftModel]:
    """Make the model of a row that is trained; return its backbone as well."""
    if plan.learner is not None:
        plain = plan.model.backbone(stream, resize=True)
        return plain, set_trainable(plain, plan.learner.trainable)
    if plan.model.kind == "clip":
        backbone: Any = plan.model.clip()
        names = ClipPromptConfig.for_classes(plan.model.tokenizer(), stream.label_names)
        config = replace(plan.prompt, class_tokens=names.class_tokens, id2label=names.id2label)
    else:
        backbone, config = plan.model.backbone(stream), plan.prompt
    config = replace(config, interpolate_pos_encoding=plan.model.interpolates(backbone))
    return backbone, get_peft_model(backbone, config)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` during the block; yield whether that succeeded.

    The operating system releases the lock when the process that holds it ends, for whatever reason, so a lock is never
    stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, pid = FileLock(path), _pid_file(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        pid.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield True
    finally:
        pid.unlink(missing_ok=True)
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is open; there filelock removes it
            path.unlink(missing_ok=True)  # while locked, so that nobody can lock a file that is about to vanish
        lock.release()


def holder(path: Path) -> str | None:
    """Return the pid of the process that holds a lock file; if none does, remove the file and return None."""
    if not path.exists():
        return None
    with claimed(path) as mine:
        if mine:
            return None
    try:
        return _pid_file(path).read_text(encoding="utf-8").strip() or "unknown"
    except FileNotFoundError:  # the holder has just begun, or just ended
        return "unknown"


def _pid_file(lock: Path) -> Path:
    """Return the file that holds the pid; not the lock file, which filelock may empty and Windows keeps unreadable."""
    return lock.with_suffix(".pid")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine(device: torch.device) -> dict[str, Any]:
    """Describe this process and its machine: CPU time (s), peak memory (MB), threads, cores, versions; no host name.

    Args:
        device: that the run has computed on, which may be a CPU beside a GPU.
    """
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return {
        "cpu_seconds": round(time.process_time(), 1),
        **_peak_memory(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": named[1] if named else platform.processor() or "unknown",
            "device": device_name(device),
        },
        "versions": versions(),
    }


def _peak_memory() -> dict[str, float]:
    """Return the peak resident memory (MB) of this process; nothing on Windows, which has no `resource`."""
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_mb": round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)}


def describe(plan: Plan) -> str:
    """Return the main numbers of a finished run, or how far an unfinished one has come."""
    if not plan.file.exists():
        run, pid = RunFolder(plan.folder / "run"), holder(plan.lock)
        begun = "new" if run.is_empty() else f"continues after {run.finished_tasks()} finished tasks"
        return f"process {pid} is running it" if pid else begun
    results = read_json(plan.file)
    heads = [
        f"{name} {as_number(head['average_accuracy'], 2)} % (forgetting {as_number(head['forgetting'], 2)})"
        for name, head in results["heads"].items()
    ]
    return ", ".join([*heads, f"drift {as_number(results['drift'][-1], 3)}"])
