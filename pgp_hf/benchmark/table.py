"""Write the table of the benchmark; all its numbers, settings and names come from the files of the runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..data.scenarios import SCENARIOS
from ..report.table import markdown
from ..runs.atomic import replacing
from ..runs.reading import read_json
from .columns import columns_of, equal_tasks
from .comparison import differences, mixed, paired
from .figures import CLOSED, Run, figures, of_method
from .plans import Row


def read(folder: Path) -> list[Run]:
    """Return all finished runs in a folder.

    Raises:
        ValueError: a file that is damaged or not of a run; two of the same run, which would count as two seeds.
    """
    found: dict[tuple[str, int], tuple[Path, Run]] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        run = read_json(file)
        if not run.keys() >= {"row", "seed", "settings", "heads"}:
            raise ValueError(f"{file} is not a run of the benchmark: move it out of {folder}.")
        earlier, _ = found.setdefault(key := (run["row"], run["seed"]), (file, run))
        if earlier != file:
            raise ValueError(
                f"{earlier.name} and {file.name} in {folder} both hold row {key[0]!r} with seed {key[1]}: a copy is not "
                "another run. Move one of them out of the folder."
            )
    return [run for _, run in found.values()]


def write(
    folder: Path, file: Path, known: Mapping[str, Row] = MappingProxyType({}), usual: Sequence[str] = ()
) -> None:
    """Write the table of the runs in `folder` to `file`, and the figures into `folder`.

    Args:
        folder: with a file per finished run.
        file: to write.
        known: rows by name, in the order of the table; rows that differ only in their settings follow one another.
        usual: names of the rows that a command has which names none.

    Raises:
        ValueError: no finished run, or some that `read` or `check` refuses.
    """
    runs = read(folder)
    if not runs:
        raise ValueError(f"{folder} holds no finished run (*-seed*.json): run the benchmark first.")
    check(runs, folder)
    place = {name: index for index, name in enumerate(known)}
    runs.sort(key=lambda run: (place.get(base(run["row"]), len(place)), _by_number(run["row"]), run["seed"]))
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run["row"], []).append(run)
    drawn = [
        f"![{path.stem}]({os.path.relpath(path, file.parent)})\n\n{caption}"
        for path, caption in figures(rows, folder).items()
    ]
    parts = ["# Benchmark", protocol(runs), commands(rows, folder, usual), main_table(rows), notes(runs)]
    parts += [legend(rows, known), *drawn, differences(rows), settings(rows)]
    with replacing(file) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def check(runs: list[Run], folder: Path, device: str | None = None) -> None:
    """Raise ValueError for runs of several devices.

    Args:
        runs: in `folder`.
        folder: for the message.
        device: the one that further runs will have; None for no further runs.
    """
    devices = {run.get("machine", {}).get("device", "unknown") for run in runs}
    if device is not None and devices - {device}:
        raise ValueError(
            f"{folder} holds runs of another device ({', '.join(sorted(devices - {device}))}) than this one ({device}), whose "
            "numbers are not comparable: give each device an --output_dir of its own."
        )
    if len(devices) > 1:
        raise ValueError(
            f"{folder} holds runs of several devices ({', '.join(sorted(devices))}), whose numbers are not comparable: give "
            "each device an --output_dir of its own."
        )


def base(row: str) -> str:
    """Return a row's name without its settings."""
    return row.partition("@")[0]


def _by_number(name: str) -> list[int | str]:
    """Return a key by which the numbers in names count as such: 2 comes before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def protocol(runs: list[Run]) -> str:
    """Describe in paragraphs what the runs have in common; where they differ, list all values."""

    def of(*path: str, none: str = "default") -> str:
        return _values(runs, *path, none=none)

    def data(name: str) -> str:
        return of("settings", "data", name, none="all")

    def training(name: str) -> str:
        return of("settings", "training", name)

    source = "train_dir" if any(run["settings"]["data"].get("train_dir") for run in runs) else "dataset_name"
    tasks = _values([run for run in runs if run["num_tasks"] > 1] or runs, "num_tasks")
    told = " ".join(filter(None, [paired(runs), mixed(runs)]))
    text = [
        f"Data: {of('settings', 'data', source, none='the embedded digits')}, {data('scenario')}{_shown(runs)}; classes: "
        f"{of('num_classes')}, tasks: {tasks}, training images a class: {data('max_train_samples_per_class')}, test "
        f"images a class: {data('max_eval_samples_per_class')}. Backbone: "
        f"{' / '.join(dict.fromkeys(map(_backbone, runs)))}, image size: "
        f"{of('settings', 'model', 'image_size', none='its own')}. Seeds: {of('seed')}. {told}".strip()
    ]
    if any("training" in run["settings"] for run in runs):
        text.append(
            f"Training: {training('optim')}, {training('lr_scheduler_type')} learning rate "
            f"{training('learning_rate')}, batch {training('per_device_train_batch_size')}, epochs a task: "
            f"{_epochs(runs)}, augmentation: {training('augmentation')}, classes in the loss: "
            f"{training('train_mask')}, classes a prediction may take: {training('eval_mask')}, precision: "
            f"{' / '.join(dict.fromkeys(_precision(run) for run in runs if 'training' in run['settings']))}."
        )
    every = [run for run in runs if run["num_tasks"] > 1]
    content = [run for run in every if "sha256" in run]
    if content:
        seeds = {
            run["seed"]: _values([r for r in content if r["seed"] == run["seed"]], "sha256", "stream")
            for run in content
        }
        noted = "" if len(content) == len(every) else f" (noted by {len(content)} of {len(every)} runs)"
        text.append(
            f"SHA-256{noted} of the backbone's weights: {_values(content, 'sha256', 'backbone')}; of class order and "
            f"images: {', '.join(f'seed {seed} {digest}' for seed, digest in sorted(seeds.items()))}."
        )
    versions = [f"{name} {of('versions', name)}" for name in runs[0]["versions"]]
    text.append(
        f"Machine: {of('machine', 'processor')}, device: {of('machine', 'device')}, cores: {of('cpu_count')}, threads a "
        f"run: {of('threads')}; {', '.join(versions)}."
    )
    return "\n\n".join(text)


def _epochs(runs: list[Run]) -> str:
    """Return the epochs a task; in a scenario of one epoch the setting has no effect."""
    return _values(
        [
            {"epochs": 1.0 if _one_epoch(run) else run["settings"]["training"].get("num_train_epochs")}
            for run in runs
            if "training" in run["settings"]
        ],
        "epochs",
    )


def _one_epoch(run: Run) -> bool:
    return SCENARIOS[run["settings"]["data"].get("scenario", "class_incremental")].one_epoch


def _shown(runs: list[Run]) -> str:
    text = ""
    for key, told in (
        ("shift", "each task's images in a rendering of its own"),
        ("train_val_split", "tested on images held out of the training images"),
    ):
        rows = {run["row"]: bool(run["settings"]["data"].get(key)) for run in runs}
        which = f" ({', '.join(row for row, own in rows.items() if own)} alone)" if not all(rows.values()) else ""
        text += f", {told}{which}" if any(rows.values()) else ""
    return text


def _backbone(run: Run) -> str:
    model = run["settings"]["model"]
    return model["model_name_or_path"] or ("the embedded CLIP" if model.get("kind") == "clip" else "the embedded ViT")


def _precision(run: Run) -> str:
    frozen = run["settings"]["model"].get("dtype", "float32")
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if run["settings"]["training"].get(short):
            return f"{name} autocast over {frozen} weights"
    return "float32" if frozen == "float32" else f"frozen weights in {frozen}"


def commands(rows: dict[str, list[Run]], folder: Path, usual: Sequence[str]) -> str:
    """Return the commands of these runs, one for each set of arguments and seeds."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, runs in rows.items():
        for arguments in sorted({run["arguments"] for run in runs}):
            seeds = tuple(run["seed"] for run in runs if run["arguments"] == arguments)
            groups.setdefault((arguments, seeds), []).append(name)
    lines = []
    for (arguments, seeds), names in groups.items():
        chosen = "" if set(names) == set(usual) else f" --rows {shlex.join(names)}"
        where = shlex.quote(folder.name if folder.is_absolute() else str(folder))
        lines.append(
            f"python examples/benchmark.py {arguments}{' ' * bool(arguments)}--output_dir {where}{chosen} "
            f"--seeds {' '.join(map(str, seeds))}"
        )
    return "```\n" + "\n".join(lines) + "\n```"


def main_table(rows: dict[str, list[Run]]) -> str:
    """Return the table of means and standard deviations over the seeds, with a line per row."""
    columns = [
        column
        for column in columns_of([run for runs in rows.values() for run in runs])
        if not column.optional or any(value for runs in rows.values() for value in column.of(runs))
    ]
    head = ["row", "seeds", *(column.title for column in columns)]
    lines = [[name, str(len(runs)), *(column.cell(runs) for column in columns)] for name, runs in rows.items()]
    return markdown([head, *lines])


def notes(runs: list[Run]) -> str:
    """Explain the table."""
    text = ["Mean ± standard deviation over the seeds (sample standard deviation), at the end of the stream."]
    if any(CLOSED in run["heads"] for run in runs):
        text.append(
            "A row without prompts has a classifier in closed form, listed in the columns of the statistics head."
        )
    if any(of_method([run]) for run in runs):
        text.append(
            "Methods train the model without prompts; the columns of the linear head have their own predictions, with "
            "nearest means or corrections where these are part of the method."
        )
    if any("task_incremental" in head for run in runs for head in run["heads"].values()):
        text.append(
            "Task-incremental: average accuracy, after the same training, where each test image's task is given, so that "
            "only the task's classes compete; a classifier in closed form then learns each task by itself."
        )
    if any(run["num_tasks"] == 1 for run in runs) and not all(map(equal_tasks, runs)):
        text.append(
            "Average accuracy is over tasks, which differ in their number of classes here, and that of prompts which learn all "
            "classes as one task is over images: it is compared with no other row's."
        )
    if any(run.get("memory", {}).get("images") for run in runs):
        text.append(
            "Exemplars: training images kept for later tasks; their bytes are those of uncompressed 8-bit RGB images at the data's own resolution."
        )
    text.append(
        "Drift: relative change of old test images' features since their task ended. Changed selections: share of old "
        "test images that select other prompts than then. Rank: largest number of protected directions of a parameter. "
        "Training: wall time with all statistics, without evaluation; CPU: processor time of the whole process, which "
        "other work on the machine lengthens less. Peak memory: resident, of the whole process; both count what rows "
        "without prompts share, such as features, in each of them."
    )
    resumed = [f"{run['row']} seed {run['seed']}" for run in runs if run.get("resumed")]
    if resumed:
        text.append(f"Interrupted and resumed, so that their times are lower bounds: {', '.join(resumed)}.")
    return " ".join(text)


def legend(rows: dict[str, list[Run]], known: Mapping[str, Row]) -> str:
    """Return a list of the known rows, each described in a few words."""
    names = [name for name in known if name in map(base, rows)]
    return "\n".join(f"- `{name}`: {known[name].what}" for name in names)


def settings(rows: dict[str, list[Run]]) -> str:
    """Return the settings: first those that all rows with prompts share, and all methods, then those of each row."""
    texts, told = [], {name: _classifier(runs) for name, runs in rows.items()}
    for title, kind, parts in (
        ("rows with prompts", "prompt", ("projection", "prompt", "training")),
        ("methods", "method", ("run", "method", "training")),
    ):
        group = {name: runs for name, runs in rows.items() if kind in runs[0]["settings"]}
        every = [run for runs in group.values() for run in runs]
        keys = dict.fromkeys(
            (part, key)
            for run in every
            for part in parts
            for key, value in run["settings"][part].items()
            if value is not None and (part, key) != ("method", "name")
        )
        shared = [
            (part, key)
            for part, key in keys
            if all(
                key in run["settings"][part] and run["settings"][part][key] == every[0]["settings"][part][key]
                for run in every
            )
        ]
        if common := _listed(every, shared):
            texts.append(f"All {title}: {common}.")
        for name, runs in group.items():
            own = runs[0]["settings"]
            none = own.get("projection", {}).get("method") == "none"
            told[name] = _listed(
                runs,
                [
                    (part, key)
                    for part, key in keys
                    if key in own[part]
                    and (part, key) not in shared
                    and not (none and part == "projection" and key != "method")
                ],
            )
    for name, runs in rows.items():
        if runs[0]["num_tasks"] == 1:
            told[name] = ", ".join([*filter(None, [told[name]]), "num_tasks=1"])
    return "\n\n".join(["## Settings", *texts, markdown([["row", "settings"], *map(list, told.items())])])


def _classifier(runs: list[Run]) -> str:
    keys = runs[0]["settings"].get("classifier", {})
    return _listed(runs, [("classifier", key) for key in keys if key != "seed"])


def _listed(runs: list[Run], keys: list[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={_values(runs, 'settings', part, key)}" for part, key in keys)


def _values(runs: list[Run], *path: str, none: str = "none") -> str:
    """Return the value at `path` in the runs that have it; if they differ, all values."""
    found: list[Any] = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT and value not in found:
            found.append(value)
    return " / ".join(none if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in found) or "unknown"


_ABSENT = object()
