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
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .atomic import write_json
from .reading import read_json, sha256

SEAL = "checkpoint.json"
OPTIMIZER, SCHEDULER, SCALER, RANDOM = "optimizer", "scheduler", "scaler", "random.safetensors"
TRAINER_STATE, SETTINGS, PROGRESS = "trainer_state.json", "settings.json", "progress.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin")


def seal(folder: Path, best: str | None) -> None:
    """Complete a checkpoint by the digests of all its files.

    Args:
        best: name of another checkpoint beside it that training goes back to when it ends; None for none.
    """
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256(file), "bytes": file.stat().st_size}
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
        if any(next(folder.glob(name), None) for name in _PICKLES):
            raise ValueError(
                f"{folder} was written by an earlier version, whose optimizer state is pickled and is not read"
            )
        raise ValueError(f"{folder} has no {SEAL}: it was not written to its end")
    content = read_json(folder / SEAL)
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder / SEAL} has format={content.get('format')!r}: this version reads {FORMAT}")
    if content.keys() != {"format", "best", "files"} or not _is_manifest(content["best"], content["files"]):
        raise ValueError(f"{folder / SEAL} is damaged: it does not list files with their size and SHA-256")
    for name, noted in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if (size := path.stat().st_size) != noted["bytes"]:
            raise ValueError(f"{path} is damaged: it has {size} bytes, and {noted['bytes']} were written")
        if sha256(path) != noted["sha256"]:
            raise ValueError(f"{path} is damaged or was altered: its SHA-256 is not the one in {SEAL}")
    return content


def step_of(folder: Path) -> int | None:
    """Return the number of steps in a checkpoint's name; None for another folder."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found and folder.is_dir() else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a task's folder of them, the newest first."""
    found = [(step, path) for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def delete_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint, and the folder unless it holds anything else."""
    for file in written_files(folder):
        file.unlink(missing_ok=True)
    remove_empty(folder)


def written_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a checkpoint that a run has written, as far as they can be told from others; the seal first."""
    try:
        listed = [name for name in read_json(folder / SEAL)["files"] if _is_inside(name)]
    except (ValueError, KeyError, TypeError):
        listed = []
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    for name in dict.fromkeys((SEAL, *listed, *_KNOWN, *pickles)):
        if (file := folder / name).is_file():
            yield file


# by which a checkpoint without a readable list is recognised
_KNOWN = (
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", "README.md"),
    *("preprocessor_config.json", "method.safetensors", "method.json", "stream.json", RANDOM),
    *(f"{name}.{kind}" for name in (OPTIMIZER, SCHEDULER, SCALER) for kind in ("json", "safetensors")),
    *(TRAINER_STATE, SETTINGS, PROGRESS),
)


def remove_empty(folder: Path) -> None:
    """Remove a folder and those inside it, as far as they hold no file."""
    for inside in [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]:
        remove_empty(inside)
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_manifest(best: Any, files: Any) -> bool:
    return (best is None or (isinstance(best, str) and _NAME.fullmatch(best) is not None)) and (
        isinstance(files, dict)
        and {TRAINER_STATE, PROGRESS} <= files.keys()
        and all(_is_inside(name) and isinstance(noted, dict) for name, noted in files.items())
        and all(
            noted.keys() == {"sha256", "bytes"} and isinstance(noted["sha256"], str) and type(noted["bytes"]) is int
            for noted in files.values()
        )
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
