"""Read and compare manifests: the settings, class order and content hashes that identify a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checking import check_int, shorten
from .shifts import Shift

MANIFEST_FORMAT = 1
MAX_IMAGES = 10**8  # of a task, which has a label each in memory
SPLITS = ("train", "test")
# besides the tasks' contents, these must agree for two streams to be the same ...
_SAME = ("scenario", "shift", "num_tasks", "num_classes", "label_names", "label_values", "class_order", "renderings")
# ... of which these may be longer in one of two streams that begin alike ...
_GROWING = ("label_names", "label_values", "class_order")
# ... and these settings are named as the likely cause when something does not
_CAUSES = (
    "seed",
    "label_column",
    "image_column",
    "test_fraction",
    "train_val_split",
    "max_train_samples_per_class",
    "max_eval_samples_per_class",
)
_OPTIONAL = ("train_val_split", "shift", "renderings")  # written only where they are given
Divided = list[tuple[tuple[int, ...], tuple[int, ...]]]


def new_settings(
    scenario: str, seed: int | None, source: Mapping[str, Any], train_val_split: float | None = None
) -> dict[str, Any]:
    """Return what a manifest says of a stream besides its tasks, classes and names.

    Args:
        scenario, seed: of the stream.
        source: its dataset and settings, from `Labelled.described`; empty for a stream that begins with nothing.
        train_val_split: share of the training rows that is held out for validation.
    """
    settings: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "dataset": {"name": None, "fingerprint": dict.fromkeys(SPLITS)},
        "scenario": scenario,
        "seed": seed,
        "num_tasks": 0,
        "num_classes": 0,
        "label_column": None,
        "image_column": None,
        "label_names": [],
        "label_values": [],
        "class_order": [],
        "test_fraction": None,
        **({} if train_val_split is None else {"train_val_split": train_val_split}),
        "max_train_samples_per_class": None,
        "max_eval_samples_per_class": None,
    }
    return {**settings, **source}


KEYS = (*new_settings("", None, {}), "tasks")


def divide(manifest: Mapping[str, Any]) -> Divided:
    """Return the classes of each task, and those of them that no earlier task has.

    Raises:
        KeyError, TypeError: tasks that are missing or have another form.
        ValueError: tasks that contradict each other, `num_tasks`, `num_classes` or `class_order`.
    """
    tasks, count = manifest["tasks"], manifest.get("num_classes")
    divided = [(tuple(task["classes"]), tuple(task.get("new_classes", task["classes"]))) for task in tasks]
    new = [label for _, added in divided for label in added]
    # a stream that goes on after its first tasks keeps the names of classes that never came
    reserved = manifest.get("class_order") == new and len(manifest.get("label_names") or ()) == count
    if (
        len(divided) != manifest["num_tasks"]
        or type(count) is not int
        or not all(type(label) is int and 0 <= label < count for classes, _ in divided for label in classes)
        or not _each_once(divided)
        or not (len(new) == count or reserved)
    ):
        raise ValueError(
            f"num_classes={count!r}: expected tasks with the classes 0 to num_classes - 1, each new in one task alone, "
            "in num_tasks tasks."
        )
    return divided


def _each_once(divided: Divided) -> bool:
    """Return True if each task has classes, each once, and its new classes are those that no earlier task has."""
    seen: set[int] = set()
    for classes, added in divided:
        own = set(classes)
        if not classes or len(own) < len(classes) or len(set(added)) < len(added) or set(added) != own - seen:
            return False
        seen |= own
    return True


def check_form(manifest: Any) -> None:
    """Raise TypeError unless a manifest is a mapping, ValueError unless it is in this format."""
    if not isinstance(manifest, Mapping):
        raise TypeError(f"manifest must be a dict as from TaskStream.manifest(), got {type(manifest).__name__}")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"manifest format must be {MANIFEST_FORMAT}, got {manifest.get('format')!r}")


def check_complete(manifest: Any) -> Divided:
    """Return what `divide` does of a manifest from which a stream can be made.

    Raises:
        TypeError: not a mapping.
        ValueError: another format, or something is missing or contradicts the rest.
    """
    check_form(manifest)
    if lacking := [key for key in KEYS if key not in manifest]:
        raise ValueError(f"manifest lacks {shorten(lacking)}; pass one written by TaskStream.manifest()")
    try:
        divided = divide(manifest)
        for task in manifest["tasks"]:
            for split in SPLITS:
                images, sha256 = (
                    check_int("num_images", task[split]["num_images"], 0, MAX_IMAGES),
                    task[split]["sha256"],
                )
                if (sha256 is None) != (images == 0) or not isinstance(sha256, str | None):
                    raise ValueError(f"{images} {split} images with sha256={sha256!r}")
        names = manifest["label_names"]
        if len(names) != manifest["num_classes"] or not all(isinstance(name, str) for name in names):
            raise ValueError(f"label_names={shorten(names)} are not {manifest['num_classes']} strings")
        Shift.read(manifest)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"manifest does not describe a stream ({reason}); pass one written by TaskStream.manifest()"
        ) from error
    return divided


def compare(own: Mapping[str, Any], other: Mapping[str, Any], tasks: int | None = None) -> None:
    """Raise ValueError unless two manifests describe the same stream, or streams whose first `tasks` are the same.

    Args:
        own: of the stream here.
        other: of an earlier run; it may lack something.
        tasks: number of tasks to compare; all by default.
    """
    lacking = [key for key in own if key not in other and key not in _OPTIONAL]
    if lacking:
        raise ValueError(f"manifest lacks {shorten(lacking)}; pass one written by TaskStream.manifest()")
    if tasks is not None:
        own, other = (_beginning(manifest, tasks, where) for manifest, where in ((own, "here"), (other, "there")))
        shared = {key: min(len(own[key]), len(other[key])) for key in _GROWING}
        own, other = (
            {**manifest, "num_classes": None, **{key: manifest[key][:length] for key, length in shared.items()}}
            for manifest in (own, other)
        )
    differences = [_difference(key, own.get(key), other.get(key)) for key in _SAME if own.get(key) != other.get(key)]
    pairs = list(zip(own["tasks"], other["tasks"], strict=False))
    for t, (here, there) in enumerate(pairs):
        if here["classes"] == there.get("classes"):
            for split in SPLITS:
                if here[split] != there.get(split):
                    what = f"{split} images of task {t} (0-based)"
                    differences.append(_difference(what, here[split], there.get(split)))
        elif not differences:  # known classes have come again
            differences.append(_difference(f"classes of task {t} (0-based)", here["classes"], there.get("classes")))
    if differences:
        causes = _causes(own, other)
        for here, there in pairs:
            causes += _causes(here.get("source", {}), there.get("source", {}))
        hint = f" Settings that differ: {'; '.join(dict.fromkeys(causes))}." if causes else ""
        shown = differences[:4] + [f"{len(differences) - 4} more differences"] * (len(differences) > 4)
        raise ValueError(
            f"this stream is not the one in the manifest: {'; '.join(shown)}.{hint} "
            f"Build it from the same data with the same arguments, or start a new run in another folder"
        )


def first_tasks(manifest: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the manifest of a stream that ends after its first `count` tasks; class names stay."""
    tasks = manifest["tasks"][:count]
    order = [label for task in tasks for label in task.get("new_classes", task["classes"])]
    shift = {"renderings": manifest["renderings"][:count]} if "renderings" in manifest else {}
    return {**manifest, "num_tasks": len(tasks), "class_order": order, "tasks": tasks, **shift}


def train_hashes(manifest: Mapping[str, Any], tasks: int) -> list[str]:
    """Return the hashes of the first tasks' training images."""
    try:
        return [str(task["train"]["sha256"]) for task in manifest["tasks"][:tasks]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "manifest lacks the hashes of training images; pass one written by TaskStream.manifest()"
        ) from error


def copied(value: Any) -> Any:
    """Copy nested dicts and lists, so that a caller's edits stay the caller's."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _beginning(manifest: Mapping[str, Any], tasks: int, where: str) -> dict[str, Any]:
    if len(manifest["tasks"]) < tasks:
        raise ValueError(f"{tasks} tasks cannot be compared: there are {len(manifest['tasks'])} {where}")
    return first_tasks(manifest, tasks)


def _causes(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    pairs = {key: (here.get(key), there.get(key)) for key in _CAUSES}
    return [_difference(key, own, other) for key, (own, other) in pairs.items() if own != other]


def _difference(what: str, here: Any, there: Any) -> str:
    """Describe how two values differ; of two sequences, the first place where they do."""
    if isinstance(here, dict) and isinstance(there, Mapping):
        key = "num_images" if here["num_images"] != there.get("num_images") else "sha256"
        return _difference(f"{what}, {key}", here[key], there.get(key))
    if isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            return _difference(f"{what}, length", len(here), len(there))
        at = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        return _difference(f"{what}[{at}]", here[at], there[at])
    return f"{what}: {here!r} here, {there!r} in the manifest"
