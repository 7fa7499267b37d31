"""Compare the rows of the benchmark, paired by seed: which with which, and whether pairs are pairs."""

from __future__ import annotations

import json
from typing import Any

from ..cli.arguments import DataArguments, ModelArguments
from ..cli.settings import Settings
from ..cli.settings import differences as unlike
from ..report.table import markdown
from ..training.settings import BEFORE
from .columns import equal_tasks, in_turn, paired_spread, spread
from .figures import CLOSED, HEADS, Run, of_method, own_head
from .plans import without_seed

WITH_DEFAULTS = {"model", "data", "training"}  # parts of the settings whose defaults `unlike` knows
LATER = {"later_prompt_learning_rate", "compensate_drift"}  # settings that have no effect in the first task


def _training(run: Run) -> dict[str, Any]:
    """Return a run's training settings without those that are off, which the files of older runs may lack."""
    return {key: value for key, value in run["settings"]["training"].items() if value not in (None, False)}


def paired(runs: list[Run]) -> str:
    """Return a sentence on whether runs of one seed are paired.

    No projection acts in the first task, so the accuracy after it must agree.
    """
    first: dict[str, dict[float, list[str]]] = {}
    for run in runs:
        if "prompt" in run["settings"] and run["num_tasks"] > 1:
            training = {k: v for k, v in _training(run).items() if k not in LATER}
            own = [run["settings"].get(part) for part in ("prompt", "run", "data", "model")]
            alike = json.dumps([run["seed"], *own, training], sort_keys=True)
            linear = run["heads"]["linear"]  # which has no matrix where the statistics head predicts
            matrix = linear.get("accuracy_matrix")
            accuracy = matrix[0][0] if matrix else linear["by_task"]["when_learned"][0]
            first.setdefault(alike, {}).setdefault(accuracy, []).append(f"{run['row']} seed {run['seed']}")
    groups = [found for found in first.values() if sum(map(len, found.values())) > 1]
    apart = [name for found in groups if len(found) > 1 for names in found.values() for name in names]
    if apart:
        return f"NOT paired, since their accuracy after the first task differs: {', '.join(apart)}."
    if not groups:
        return ""
    return (
        "Runs of one seed are paired: those with the same prompts and training have the same accuracy after the first "
        "task (checked)."
    )


def mixed(runs: list[Run]) -> str:
    """Return a sentence on rows whose seeds have other settings than one another; nothing where there are none."""
    first: dict[str, Settings] = {}  # those of a row
    apart: dict[str, dict[str, None]] = {}
    for run in runs:
        own = without_seed(run["settings"])
        if own == (here := first.setdefault(run["row"], own)):
            continue
        # what only one of them has was not recorded yet when the other was made
        known = {part: {**own.get(part, {}), **here.get(part, {})} for part in {*own, *here} - WITH_DEFAULTS}
        for text in unlike(here, own, known):
            apart.setdefault(run["row"], {})[text.partition(" is ")[0]] = None
    told = "; ".join(f"{row} in {', '.join(keys)}" for row, keys in apart.items())
    return f"NOT of one setting each, since seeds of a row differ: {told}." if told else ""


def differences(rows: dict[str, list[Run]]) -> str:
    """Return the differences, paired by seed, of each row from its reference.

    That of prompts is the row without projection or, where that did not run, the one without the settings in its name; a
    row that is not trained like it has a control as well, the row without projection that is. That of a method is
    fine-tuning.
    """

    def runs_of(name: str | None) -> list[Run]:
        return [] if name is None else rows.get(name, [])

    against = [name for name, runs in rows.items() if CLOSED in runs[0]["heads"] or name.endswith("-frozen")]
    lines = [["row", "reference"]]
    lines[0] += [f"{title} minus the reference's" for title in HEADS.values()]
    lines[0] += ["statistics head minus the reference's linear head"]
    lines[0] += [*(f"statistics head minus {name}" for name in against), "drift, times the reference's"]
    lines[0] += [
        "control",
        *(f"{title} minus the control's" for title in HEADS.values()),
        "drift, times the control's",
    ]
    for name, runs in rows.items():
        if CLOSED in runs[0]["heads"]:
            continue
        reference = _reference(name, rows)
        cells = [_paired(runs, head, runs_of(reference), head) for head in HEADS]
        cells += [_paired(runs, "statistics", runs_of(reference), "linear")]
        cells += [_paired(runs, "statistics", rows[other], "statistics") for other in against]
        cells += [_drift_ratio(runs, runs_of(reference))]
        control = None if of_method(runs) else _control(name, rows)
        control = None if control == reference else control
        cells += [control or "", *(_paired(runs, head, runs_of(control), head) for head in HEADS)]
        cells += [_drift_ratio(runs, runs_of(control))]
        lines.append([name, reference or "", *cells])
    if len(lines) == 1:
        return ""
    return (
        "## Paired differences of average accuracy (points), and of drift\n\nMean over the seeds, and the difference of each "
        "seed. Of three seeds or more, with the standard error of the mean: better or worse is said only where all "
        "differences have one sign and their mean exceeds two standard errors. Where nothing differs, 18 % of comparisons of "
        "three seeds pass (t distribution, two degrees of freedom): of many verdicts, some are chance.\n\n"
    ) + markdown(lines)


def _reference(name: str, rows: dict[str, list[Run]]) -> str | None:
    """Return the row without projection: the one with the same settings if there is one, else the plain one.

    Where neither ran, a row with settings in its name has the row without them. None of another precision, or otherwise
    computed. Of a method, the row of fine-tuning with the same training.
    """
    if of_method(rows[name]):
        return _fine_tuned(name, rows)
    method, _, setting = name.partition("@")
    plain = f"{method.partition('-')[0]}-none"
    candidates = (f"{plain}@{setting}", plain, method)
    return next(
        (row for row in candidates if row in rows and row != name and _alike(rows[name][0], rows[row][0])), None
    )


def _alike(one: Run, other: Run) -> bool:
    """Return True for runs that are compared: of one stream and backbone, and computed alike."""
    return _stream_of(one, other) == _stream_of(other, one) and _computed_alike(one, other)


def _stream_of(run: Run, other: Run) -> tuple[dict[str, Any], ...]:
    """Return the settings of the stream and the backbone, without the division into tasks where one of two runs has none.

    That one's average accuracy is over images, and the other's over tasks: they are comparable where these are equal.
    """
    data: dict[str, Any] = {**vars(DataArguments()), **run["settings"]["data"]}
    model: dict[str, Any] = {
        **vars(ModelArguments()),
        **run["settings"]["model"],
        "kind": None,
    }  # as a row's name says
    if 1 in (run["num_tasks"], other["num_tasks"]) and equal_tasks(run) and equal_tasks(other):
        data |= dict.fromkeys(("num_tasks", "init_classes", "increment"))
    return data, model


def _computed_alike(one: Run, other: Run) -> bool:
    """Return True unless runs differ in settings that change numbers, but not what is learned."""
    if not all("training" in run["settings"] for run in (one, other)):  # a classifier in closed form
        return True
    found = [{**BEFORE, **run["settings"]["training"]} for run in (one, other)]
    names = ("bf16", "fp16", "exact_images", "last_block", "compile_trunk")
    return all(found[0].get(name, False) == found[1].get(name, False) for name in names)


def _fine_tuned(name: str, rows: dict[str, list[Run]]) -> str | None:
    def alike(row: str) -> tuple[Any, ...]:
        run = rows[row][0]
        return run["settings"]["run"], _training(run), run["settings"]["data"]

    tuned = [
        row for row, runs in rows.items() if of_method(runs) and runs[0]["settings"]["method"]["name"] == "fine_tuning"
    ]
    return next(
        (row for row in tuned if row != name and alike(row) == alike(name) and _alike(rows[row][0], rows[name][0])),
        None,
    )


def _control(name: str, rows: dict[str, list[Run]]) -> str | None:
    """Return the row without projection that has the prompts and the training of row `name`.

    Of a row of surprises it is one of surprises, whose own control is the row that knows its stream in advance.
    """

    def alike(run: Run) -> tuple[Any, ...]:
        return run["settings"]["prompt"], _training(run), run["settings"]["data"]

    run = rows[name][0]
    own, begun = alike(run), run["settings"].get("run")
    ways = (begun, None) if run["settings"]["projection"]["method"] == "none" else (begun,)
    found = {
        row: other["settings"].get("run")
        for row, (other, *_) in rows.items()
        if row != name and "prompt" in other["settings"] and other["settings"]["projection"]["method"] == "none"
        if alike(other) == own and _alike(rows[row][0], rows[name][0])
    }
    return next((row for way in ways for row in found if found[row] == way), None)


def _paired(runs: list[Run], head: str, others: list[Run], other: str) -> str:
    theirs = {run["seed"]: run for run in others}
    pairs = [
        (own_head(run, head), own_head(twin, other))
        for run in runs
        if (twin := theirs.get(run["seed"])) and _alike(run, twin) and _of_the_same_images(run, twin)
    ]
    found = [a["average_accuracy"] - b["average_accuracy"] for a, b in pairs if a is not None and b is not None]
    if not found or (runs[0]["row"] == others[0]["row"] and head == other):
        return "–"
    return paired_spread(found, 2)


def _of_the_same_images(run: Run, other: Run) -> bool:
    """Return False if the data has changed between two runs that name the same."""
    digests = {one["sha256"]["stream"] for one in (run, other) if "sha256" in one}
    return len(digests) < 2 or run["num_tasks"] != other["num_tasks"]  # the digest is also of the division into tasks


def _drift_ratio(runs: list[Run], others: list[Run]) -> str:
    theirs = {run["seed"]: run for run in others}
    own = [
        (run["drift"][-1], twin["drift"][-1])
        for run in runs
        if in_turn(run) and (twin := theirs.get(run["seed"])) and _alike(run, twin)
    ]
    return spread([drift / other for drift, other in own if drift is not None and other], 2)
