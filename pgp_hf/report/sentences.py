"""Describe a run's protocol for its model card, phrase by phrase, from the content of its JSON files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL.Image import Resampling

from ..data.classes import drawn_order
from ..data.scenarios import Scenario
from ..runs.checks import origin_on_hub
from .formatting import MISSING, as_number, as_text, is_number
from .names import is_hub_id, name_dataset, public_name

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard
    from .learning import Learning

_EVAL_MASKS = {
    "seen": 'no task id is given; logits of classes not yet seen are masked (`eval_mask="seen"`)',
    "none": "no task id is given; all {num_classes} classes compete, untrained ones included "
    '(`eval_mask="none"`, as in the released code)',
    None: "no task id is given; whether unseen classes were masked is not recorded",
}


def describe_head(
    adapter: AdapterCard,
    config: Mapping[str, Any],
    compensated: bool,
    learning: Learning | None = None,
    as_one: bool = False,
) -> str:
    """Describe the classifier and its input.

    Args:
        adapter: description of the adapter, or of what learned of a whole model.
        config: content of `adapter_config.json`, or of a whole model's `config.json`.
        compensated: whether the means of older classes were moved with the features' drift.
        learning: how the tasks were learned.
        as_one: whether they were learned as one.
    """
    if config.get("head") != "statistics":
        if learning is None or not learning.adjusts:
            return adapter.head
        own = adapter.head if learning.shared else "one for each expert"
        return f"{own}; the method computes the final scores"
    if as_one:
        gathered = "gathered from the training images of all tasks at the end"
    else:
        later = (
            "shifted since then by the drift estimated from later tasks' images" if compensated else "never refreshed"
        )
        gathered = f"gathered from the training images when their task ended and {later}"
    return (
        f"class statistics of {adapter.features}: the mean of each class and one covariance for all (shrinkage "
        f"{as_text(config.get('shrinkage'))}), {gathered}; "
        f"linear discriminant analysis in closed form. Also saved: {adapter.trained_head} used in training"
    )


def dataset_names(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the datasets that the tasks are from, in order, as far as they have any."""
    names = [(source.get("dataset") or {}).get("name") for source in _sources(manifest)]
    return list(dict.fromkeys(filter(None, names)))


def describe_data(manifest: Mapping[str, Any]) -> str:
    """Name the datasets in Markdown."""
    return ", ".join(map(name_dataset, dataset_names(manifest))) or name_dataset(None)


def describe_data_limits(manifest: Mapping[str, Any]) -> str:
    """Describe the limits on images per class, and the shares held out; empty if there are neither."""
    found = list(dict.fromkeys(map(_data_limits, _sources(manifest))))
    return found[0] if len(found) == 1 else "; limits and shares held out differ between tasks, see `stream.json`"


def _sources(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what describes the dataset of the first tasks, then that of each task that was appended."""
    tasks = manifest.get("tasks") or []
    appended = [task["source"] for task in tasks if task.get("source")]
    return appended if appended and len(appended) == len(tasks) else [manifest, *appended]


def _data_limits(manifest: Mapping[str, Any]) -> str:
    limits = {"training": "max_train_samples_per_class", "test": "max_eval_samples_per_class"}
    parts = [f"at most {manifest[key]} {split} images per class" for split, key in limits.items() if manifest.get(key)]
    if manifest.get("test_fraction"):
        parts.append(f"{100 * manifest['test_fraction']:g} % of the images held out for testing")
    if manifest.get("train_val_split"):
        share = f"{100 * manifest['train_val_split']:g} %"
        parts.append(f"evaluated on {share} of the training images, held out for validation, instead of test images")
    if manifest.get("renderings"):
        parts.append(f"each task's images in a rendering of their own: {', '.join(manifest['renderings'])}")
    return "".join(f"; {part}" for part in parts)


def describe_class_order(manifest: Mapping[str, Any]) -> str:
    """Describe the origin of the class order."""
    order, seed, tasks = list(manifest.get("class_order") or []), manifest.get("seed"), manifest.get("tasks") or []
    later = {label for task in tasks if task.get("source") for label in task.get("new_classes", task["classes"])}
    arrived = any(task.get("source") for task in tasks)
    order = [label for label in order if label not in later]
    if arrived and not order:
        return "as the tasks arrived"
    first = "label order" if order and order == sorted(order) else "given"
    if first == "given" and isinstance(seed, int):  # which a stream has in any case, since it draws images too
        count = len(manifest.get("label_values") or order)
        if order == drawn_order(seed, count)[: len(order)]:
            first = f"drawn with stream seed {seed}"
    return f"{first}, then as the tasks arrived" if arrived else first


def describe_preprocessing(processor: Mapping[str, Any] | None) -> str:
    """Describe the image processor's steps, according to its saved settings."""
    if processor is None:
        return "not recorded; the backbone's own image processor"
    steps = ["RGB"] if processor.get("do_convert_rgb") else []
    if processor.get("do_resize"):
        filters = [f" ({one.name.lower()})" for one in Resampling if one == processor.get("resample")]
        steps.append(f"resized to {_size(processor.get('size'))}{''.join(filters)}")
    if processor.get("do_center_crop"):
        steps.append(f"centre crop of {_size(processor.get('crop_size'))}")
    if processor.get("do_rescale"):
        factor = processor.get("rescale_factor")
        usual = is_number(factor) and math.isclose(factor, 1 / 255)
        steps.append("scaled to 0..1" if usual else f"values times {as_text(factor)}")
    if processor.get("do_normalize"):
        mean, deviation = (_channels(processor.get(key)) for key in ("image_mean", "image_std"))
        steps.append(f"normalised with mean {mean} and standard deviation {deviation}")
    return ", ".join(steps or ["none"]) + " (`preprocessor_config.json`)"


def _size(size: Any) -> str:
    if isinstance(size, int):
        return f"{size} pixels"
    size = size if isinstance(size, Mapping) else {}
    if "height" in size and "width" in size:
        return f"{size['height']} × {size['width']} pixels"
    return f"{size['shortest_edge']} pixels on the shorter edge" if "shortest_edge" in size else "an unknown size"


def _channels(values: Any) -> str:
    values = values if isinstance(values, list | tuple) else [values]
    shown = [f"{value:.4g}" if is_number(value) else MISSING for value in values]
    return shown[0] if len(set(shown)) == 1 else f"({', '.join(shown)})"


def describe_evaluation(scenario: Scenario, mask: str | None, num_classes: int) -> str:
    """Describe the rule by which a test image is classified.

    Raises:
        ValueError: an unknown `mask`.
    """
    if scenario.task_known:
        return "the task of each test image is given, and only that task's classes compete"
    if mask not in _EVAL_MASKS:
        raise ValueError(f"results['eval_mask'] is {mask!r}; expected 'seen' or 'none'.")
    return _EVAL_MASKS[mask].format(num_classes=num_classes)


def describe_time(results: Mapping[str, Any]) -> str:
    """Describe the wall time of each activity that was recorded."""
    speed = f"{as_number(results.get('train_images_per_second'), 1)} images per second"
    seconds = {name: value for name, value in (results.get("seconds") or {}).items() if is_number(value) and value}
    if not seconds:
        return f"{speed} in training"
    parts = [f"{_duration(value)} of {name.replace('train', 'training')}" for name, value in seconds.items()]
    parts[0] += f" ({speed})" if "train" in seconds else ""
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def describe_versions(results: Mapping[str, Any]) -> str:
    """Return the versions of the packages that the run used."""
    return (
        ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()) or "not recorded"
    )


def tasks_without_drift(results: Mapping[str, Any]) -> str | None:
    """Return the tasks whose images drift leaves out, such as "1 and 2"; None if it leaves out none."""
    lacking = [str(task + 1) for task in results.get("drift_lacks") or []]
    return " and ".join(filter(None, [", ".join(lacking[:-1]), lacking[-1]])) if lacking else None


def describe_origin(results: Mapping[str, Any], repo_id: str | None = None) -> str | None:
    """Say in Markdown which revision the run goes on from; None for a run from its first task.

    Args:
        results: content of `results.json`.
        repo_id: the repository that the card is for; a revision in the same repository is not mentioned.
    """
    newest = results.get("continues")
    origin = origin_on_hub(results)
    while origin and origin["repo"] == repo_id:
        newest, origin = origin.get("continues"), origin_on_hub(origin)
    if not (origin := origin or newest):
        return None
    repo, revision, tasks = origin.get("repo"), origin["revision"], origin["tasks"]
    if not is_hub_id(repo):
        named = f" named `{public_name(repo)}`" if repo else ""
        return f"Continues an earlier run, from a local folder{named}, at `{revision}`."
    at = f"[`{revision}`]({_address(repo)}/tree/{revision})"
    commit = origin.get("commit")
    exactly = f" (commit [`{commit[:7]}`]({_address(repo)}/commit/{commit}))" if commit else ""
    which = "the revision of task 1 is" if tasks == 1 else f"the revisions of the first {tasks} tasks are"
    return f'Continues [`{repo}`]({_address(repo)}) at {at}{exactly}; {which} linked under "Task by task".'


def earlier_revisions(results: Mapping[str, Any]) -> dict[int, str]:
    """Return by 0-based index the addresses of tasks' revisions in the repositories that the run goes on from."""
    origin, found = origin_on_hub(results), {}
    while origin:
        before = origin_on_hub(origin)  # whose tasks were not copied
        if is_hub_id(origin["repo"]):
            own = range(before["tasks"] if before else 0, origin["tasks"])
            found.update({t: f"{_address(origin['repo'])}/tree/task-{t + 1}" for t in own})
        origin = before
    return found


def _address(repo: str) -> str:
    return f"https://huggingface.co/{repo}"
