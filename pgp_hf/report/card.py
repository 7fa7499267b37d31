"""Render the model card of a run: metadata for the Hub and a short README, by `model_cards/template.md`.

A card is made from the content of the run's JSON files alone. Local paths never enter it: of a backbone or dataset in a
local folder, it shows the last part of the path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ..data.scenarios import SCENARIOS, Scenario
from ..runs.atomic import replacing
from ..runs.checks import finished_tasks, first_task
from ..runs.digest import BACKBONE_KEYS
from ..runs.folder import DESCRIPTION, MANIFEST, METHOD, PROCESSOR, RESULTS, config_name
from ..runs.reading import read_json
from .figures import figure_names
from .formatting import NOT_MEASURED, as_number, as_text, is_number
from .learning import Learning, describe_learning
from .made import WHOLE, Made, describe_adapter, describe_whole
from .names import is_owned, name_model, public_name
from .numbers import eval_results, run_rows, task_rows
from .sentences import (
    dataset_names,
    describe_class_order,
    describe_data,
    describe_data_limits,
    describe_evaluation,
    describe_head,
    describe_origin,
    describe_preprocessing,
    describe_time,
    describe_versions,
    earlier_revisions,
    tasks_without_drift,
)
from .snippets import Source, peft_code, predict_code, predict_whole_code, transformers_code
from .table import markdown

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard


class _Run(NamedTuple):
    """The inputs of a card's parts: JSON content under the names of `render_card`, and values taken from it."""

    results: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    scenario: Scenario
    num_tasks: int
    num_classes: int
    trained: int  # finished tasks
    as_one: bool  # whether they were learned as one
    batchwise: bool
    base: str  # name or path of the model that the run started from, empty for one that was never saved
    datasets: Sequence[str]
    whole: bool  # whether it is a whole model, and not an adapter
    kind: str  # the adapter's PEFT type, or what of a whole model has learned
    adapter: AdapterCard
    made: Made
    learning: Learning


def render_card(
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    *,
    method: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    figures: Iterable[str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Render the card of a run, or of one of its `task-<t>` revisions.

    Args:
        results: content of `results.json`; `prompt_usage`, `changed_selections`, `heads`, `eval_mask`,
            `batchwise_prompt` and `continues` are read where present.
        manifest: content of `stream.json`.
        adapter_config: content of `adapter_config.json`, or of `config.json` where a whole model has learned.
        projection: content of `projection.json`, `None` for a run without projection.
        method: content of `method.json`, `None` for projected prompts.
        processor: content of `preprocessor_config.json`, `None` for a run that saved none.
        figures: names of the files in `figures/`; by default those that `pgp_hf.report.figures.save_figures` writes.
        repo_id: the repository that the card is for; it names the model and appears in the code, with the tag
            `task-<t>`.
        license: its id on the Hub, such as "apache-2.0"; without one, the card claims none.

    Returns:
        The card. Its `model-index` holds average accuracy and forgetting, as far as they were measured.

    Raises:
        ValueError: an input that lacks a required entry, or has an unknown one.
        FileNotFoundError: a missing template.
    """
    run = _read(results, manifest, adapter_config, projection, method)
    name = name_model(
        repo_id,
        run.kind,
        run.learning.name,
        public_name(run.datasets[0]).split("/")[-1] if run.datasets else None,
    )
    source = Source.of(adapter_config, repo_id, run.trained)
    own_processor = processor is not None
    present = figure_names(results) if figures is None else set(figures)
    return ModelCard.from_template(
        _metadata(run, name, license),
        template_str=_template().read_text(encoding="utf-8"),
        title=name,
        figures={figure: about for figure, about in _figure_texts(run).items() if figure in present},
        code=_code(run, source, own_processor),
        bring=_bring(run, source, own_processor),
        checks_size=own_processor and not run.whole and _checks_size(run, adapter_config),
        weights_may_go=run.whole and source.tag is None,
        **_opening(run, repo_id),
        **_protocol(run, processor),
        **_numbers(run),
    )


def save_card(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    *,
    method: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write [`render_card`]'s card to `path` (a `README.md`), over the stub that PEFT leaves there; return `path`.

    The card reflects the files in its folder: `preprocessor_config.json`, `method.json` unless `method` is given, and
    the figures that `pgp_hf.report.figures.save_figures(results, folder / "figures")` has written; it shows no others.

    Raises:
        ValueError, FileNotFoundError: as [`render_card`] does; an earlier card then stays as it was.
    """
    folder = Path(path).parent
    contents = results, manifest, adapter_config, projection
    card = _render_in(folder, *contents, method=method, repo_id=repo_id, license=license)
    with replacing(path) as part:
        part.write_text(str(card), encoding="utf-8", newline="\n")
    return Path(path)


def card_of(folder: Path) -> ModelCard:
    """Return the card of a task's folder, or of a copy of one, according to the files and figures in it now.

    Raises:
        ValueError, FileNotFoundError: as [`render_card`] does, or for a file that cannot be read.
    """
    names = (RESULTS, MANIFEST, config_name(folder), DESCRIPTION)
    return _render_in(folder, *(read_json(folder / name) for name in names))


def _render_in(
    folder: Path,
    *contents: Any,
    method: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    return render_card(
        *contents,
        method=_read_if_present(folder / METHOD) if method is None else method,
        processor=_read_if_present(folder / PROCESSOR),
        figures=[file.name for file in folder.glob("figures/*.png")],
        repo_id=repo_id,
        license=license,
    )


def _read_if_present(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _template() -> Path:
    """Return the template's path: inside an installed wheel, or else in the source tree."""
    package = Path(__file__).parents[1]
    places = (package / "model_card_template.md", package.parent / "model_cards" / "template.md")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"The model card's template is missing: looked for {places[0].name} inside the package and for "
        f"model_cards/{places[1].name} in the source tree. Reinstall pgp-hf."
    )


# ---- the parts of a card ---------------------------------------------------------------------------------------------


def _read(
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    method: Mapping[str, Any] | None,
) -> _Run:
    _need(results, "accuracy_matrix", "results")
    scenario = _need(results, "scenario", "results")
    if scenario not in SCENARIOS:
        raise ValueError(f"results['scenario'] is {scenario!r}; expected one of {', '.join(SCENARIOS)}.")
    num_tasks = int(_need(results, "num_tasks", "results"))
    num_classes = int(_need(manifest, "num_classes", "manifest"))
    batchwise, base = bool(results.get("batchwise_prompt")), config.get("base_model_name_or_path") or ""
    model = str(results.get("model"))
    whole = config.get("peft_type") is None and WHOLE.fullmatch(model) is not None
    kind = model if whole else str(_need(config, "peft_type", "adapter_config"))
    adapter = describe_whole() if whole else describe_adapter(config, batchwise)
    as_one = first_task(results) > 0
    if as_one:
        adapter = adapter._replace(finished="")
    return _Run(
        results=results,
        manifest=manifest,
        config=config,
        scenario=SCENARIOS[scenario],
        num_tasks=num_tasks,
        num_classes=num_classes,
        trained=finished_tasks(results),
        as_one=as_one,
        batchwise=batchwise,
        base=base,
        datasets=dataset_names(manifest),
        whole=whole,
        kind=kind,
        adapter=adapter,
        made=Made.of_whole(kind, base, config) if whole else Made.of_adapter(adapter, base),
        learning=describe_learning(config, adapter, projection, method),
    )


def _need(source: Mapping[str, Any], key: str, name: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"{name} has no {key!r}, which the model card needs; it has {', '.join(sorted(source))}.")
    return source[key]


def _metadata(run: _Run, name: str, license: str | None) -> ModelCardData:
    kind = ["prompt-tuning"] if run.adapter.prompts else []
    return ModelCardData(
        library_name=run.made.library,
        base_model=run.base if is_owned(run.base) else None,
        pipeline_tag="image-classification",
        license=license,
        tags=[
            "continual-learning",
            *kind,
            "pgp_hf",
            run.kind.lower().replace(":", "-"),
            run.scenario.name.replace("_", "-"),
        ],
        datasets=[name for name in run.datasets if is_owned(name)] or None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=eval_results(run.results, run.manifest, run.datasets, run.trained),
    )


def _code(run: _Run, source: Source, own_processor: bool) -> dict[str, str]:
    if run.whole:
        predict = predict_whole_code(source, own_processor)
        alone = transformers_code(source, run.num_classes, own_processor)
    else:
        predict = predict_code(source)
        alone = peft_code(source, run.adapter, run.num_classes, own_processor, _precision(run.results))
    return {"predict": predict, "alone": alone, "checkpoint": source.checkpoint}


def _precision(results: Mapping[str, Any]) -> str:
    """Return the precision that a backbone had in training, by the name of its digest."""
    named = [name for name in results.get("sha256") or () if name in BACKBONE_KEYS]
    return named[0].removeprefix("backbone.") if named else "float32"


def _checks_size(run: _Run, adapter_config: Mapping[str, Any]) -> bool:
    """Return whether the adapter refuses images of another size; False where no pipeline takes its folder, as with CLIP."""
    return bool(adapter_config.get("image_size")) and run.adapter.scores == "logits"


def _bring(run: _Run, source: Source, own_processor: bool) -> str | None:
    """Return a sentence on the path that the reader has to fill in besides the folder's, None for none."""
    if source.found or (run.whole and own_processor):
        return None
    found = f"a local folder named `{public_name(run.base)}`" if run.base else "built in memory"
    if run.whole:
        return (
            f"The run saved no image processor, and the model that it started from was {found}: insert the path of a "
            "processor in the code above."
        )
    return f"The backbone was {found}: insert its path in the code above."


def _opening(run: _Run, repo_id: str | None) -> dict[str, Any]:
    """Return the template's values for what was trained, and how."""
    tasks: Sequence[Mapping[str, Any]] = run.manifest.get("tasks") or []
    known = len({label for task in tasks[: run.trained] for label in task.get("classes") or []})
    return {
        "adapter": run.adapter,
        "made": run.made,
        "learning": run.learning,
        "limits": [
            *([] if run.as_one or not run.learning.shared else run.made.shared),
            *run.made.limits,
            *run.learning.limits,
        ],
        "num_tasks": run.num_tasks,
        # after the last task those that it knows, since a stream that goes on may have names without images
        "num_classes": known or run.num_classes if run.trained == run.num_tasks else run.num_classes,
        "trained": run.trained,
        "as_one": run.as_one,
        "known": known,
        "origin": describe_origin(run.results, repo_id),
        "statistics": run.config.get("head") == "statistics",
        "compensated": _compensated(run),
    }


def _protocol(run: _Run, processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the template's values for the conditions under which the numbers were measured."""
    mask = run.results.get("eval_mask")
    return {
        "batchwise": run.batchwise,
        "dataset": describe_data(run.manifest),
        "data_limits": describe_data_limits(run.manifest),
        "scenario": run.scenario,
        "class_order": describe_class_order(run.manifest),
        "preprocessing": describe_preprocessing(processor),
        "head": describe_head(run.adapter, run.config, _compensated(run), run.learning, run.as_one),
        "eval_mask": mask,
        "evaluation": describe_evaluation(run.scenario, mask, run.num_classes),
        "seed": as_text(run.results.get("seed")),
        "time": describe_time(run.results),
        "versions": describe_versions(run.results),
    }


def _compensated(run: _Run) -> bool:
    return bool(run.results.get("compensate_drift")) and not run.as_one


def _figure_texts(run: _Run) -> dict[str, str]:
    rank = " and protected rank" if _protected(run) else ""
    return {
        "accuracy_matrix.png": f"Accuracy on each task after {'all of them' if run.as_one else 'each task'}",
        "task_curves.png": "Average accuracy and forgetting after each task",
        "forgetting_by_task.png": "Accuracy on each earlier task, at its best and now",
        "stability.png": f"Drift of old features{rank} after each task",
        "prompt_usage.png": "Pool entries that each task's test images select",
        "prompts_and_keys.png": "Movement of prompts and keys with the tasks",
    }


def _protected(run: _Run) -> bool:
    return any(run.results.get("projection_rank") or [])


def _calibration(results: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the calibration errors before and after, in percentage points; None where they were not measured."""
    errors = results.get("calibration_error") or {}
    before, after = errors.get("before"), errors.get("after")
    if not (is_number(before) and is_number(after)):
        return None
    return {"before": as_number(100 * before, 1), "after": as_number(100 * after, 1)}


def _numbers(run: _Run) -> dict[str, Any]:
    """Return the template's values for the tables and their legends."""
    rows = task_rows(run.results, run.manifest, run.trained, earlier_revisions(run.results))
    tables = {
        "run_table": markdown(run_rows(run.results), left=("Head",)),
        "task_table": markdown(rows, left=("Classes",)),
    }
    return {
        **tables,
        "gaps": any(NOT_MEASURED in table for table in tables.values()),
        "heads": bool(run.results.get("heads")),
        "used_head": run.results.get("head"),
        "changed": bool(run.results.get("changed_selections")),
        "protected": _protected(run),
        "without_drift": tasks_without_drift(run.results),
        "calibration": _calibration(run.results),
    }
