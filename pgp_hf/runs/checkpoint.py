"""A checkpoint within a task: which files it is made of, and whether they are those that were written.

checkpoint-N/  the state after N steps, which `checkpoint.json` completes:
  the model or adapter, method.safetensors and method.json, stream.json
  optimizer.json, scheduler.json, scaler.json   with a .safetensors each for their tensors
  random.safetensors    random states, a row for each process
  trainer_state.json    of the `Trainer`
  settings.json         what results depend on
  progress.json         what is counted within a task
  checkpoint.json       size and SHA-256 of each file; written last
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import removal
from .atomic import write_json
from .listing import Digest, parse_digests
from .reading import read_json

SEAL = "checkpoint.json"
OPTIMIZER, SCHEDULER, SCALER, RANDOM = "optimizer", "scheduler", "scaler", "random.safetensors"
TRAINER_STATE, SETTINGS, PROGRESS = "trainer_state.json", "settings.json", "progress.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin")
# first what the others depend on
_FILES = (
    *(SEAL, TRAINER_STATE, SETTINGS, PROGRESS, RANDOM),
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", "README.md"),
    *("preprocessor_config.json", "processor_config.json", "method.safetensors", "method.json", "stream.json"),
    *(f"{name}.{kind}" for name in (OPTIMIZER, SCHEDULER, SCALER) for kind in ("json", "safetensors")),
    *_PICKLES,
)
UNFINISHED = re.compile(r"\.checkpoint-\d+-[a-z0-9_]{8}")  # as `mkdtemp` calls folders


def seal(folder: Path, best: str | None) -> None:
    """Complete a checkpoint by the digests of all its files.

    Args:
        best: name of another checkpoint beside it that training goes back to when it ends; None for none.
    """
    files = {
        file.relative_to(folder).as_posix(): asdict(Digest.of(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    write_json(folder / SEAL, {"format": FORMAT, "best": best, "files": files})


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError, naming the file, unless training can go on from a checkpoint exactly as it would have.

    The checkpoint that it goes back to when it ends is checked as well.
    """
    content = check_files(folder)
    if f"{OPTIMIZER}.json" not in content["files"]:
        raise ValueError(f"{folder} holds the model alone (save_only_model=True), without the optimizer's state")
    best = content["best"]
    if best is not None and best != folder.name:
        try:
            check_files(folder.parent / best)
        except ValueError as error:
            raise ValueError(f"{folder} goes back to the best checkpoint when training ends, and {error}") from error


def check_files(folder: Path) -> dict[str, Any]:
    """Return the content of `checkpoint.json`; raise ValueError, naming the file, unless all files are as written."""
    if not (folder / SEAL).is_file():
        if any((folder / name).exists() for name in _PICKLES):
            raise ValueError(
                f"{folder} was written by an earlier version, whose optimizer state is pickled and is not read"
            )
        raise ValueError(f"{folder} has no {SEAL}: it was not written to its end")
    content = read_json(folder / SEAL)
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder / SEAL} has format={content.get('format')!r}: this version reads {FORMAT}")
    try:
        listed = _parse(content)
    except ValueError as error:
        raise ValueError(
            f"{folder / SEAL} is damaged: it does not list files with their size and SHA-256 ({error})"
        ) from error
    for name, noted in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if difference := noted.difference(path, SEAL):
            raise ValueError(f"{path} is damaged or was altered: {difference}")
    return content


def step_of(folder: Path) -> int | None:
    """Return the number of steps in a checkpoint's name; None for another folder."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found and folder.is_dir() else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a task's folder of them, the newest first."""
    found = [(step, path) for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def has_states(folder: Path) -> bool:
    """Return True if a checkpoint was written to its end, with the optimizer's state."""
    return all((folder / name).is_file() for name in (SEAL, f"{OPTIMIZER}.json"))


def was_begun(folder: Path) -> bool:
    """Return True if a checkpoint's folder holds a file of it."""
    return any((folder / name).exists() for name in _FILES)


def delete_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint, and the folder unless it holds anything else."""
    states = [path.name for path in folder.glob("rng_state_*.pth")]  # of several processes, by an earlier version
    removal.remove(folder, removal.written(folder, (*_FILES, *states), [SEAL]))
    removal.remove_empty(folder)


def _parse(content: dict[str, Any]) -> dict[str, Digest]:
    """Return the digests in `checkpoint.json` by path; raise ValueError for any other content."""
    if content.keys() != {"format", "best", "files"}:
        raise ValueError(f"it has {', '.join(content)[:120]} where format, best and files are expected")
    best, files = content["best"], parse_digests(content["files"])
    if best is not None and not (isinstance(best, str) and _NAME.fullmatch(best)):
        raise ValueError(f"best={best!r:.80} is not the name of a checkpoint")
    if lacking := {TRAINER_STATE, PROGRESS} - files.keys():
        raise ValueError(f"{min(lacking)} is not among them")
    return files
