"""The model card of a run: metadata for the Hub and a short README, rendered from `model_cards/template.md`.

Works on the content of the run's JSON files alone. A path of the machine that trained never enters a card: a backbone
or dataset that is a local folder appears by the folder's last name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import embedded
from ._atomic import replacing
from .plots import figure_names

_FIGURE_TEXTS = {
    "accuracy_matrix.png": "Accuracy on each task after each task",
    "task_curves.png": "Average accuracy, forgetting, drift and protected rank after each task",
    "prompt_usage.png": "Pool entries that each task's test images select",
}
_SCENARIOS = {
    "class_incremental": "class-incremental",
    "task_incremental": "task-incremental",
    "online": "class-incremental, one pass over the data (online)",
}
_MISSING = "–"


def render_card(
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    *,
    repo_id: str | None = None,
) -> ModelCard:
    """Renders the card of a run, or of one of its `task-<t>` revisions.

    Args:
        results: content of `results.json`; `prompt_usage`, `changed_selections`, `heads`, `eval_mask` and
            `batchwise_prompt` are read where present.
        manifest: content of `stream.json`.
        adapter_config: content of `adapter_config.json`.
        projection: content of `projection.json`, `None` for a run without projection.
        repo_id: the repository the card is for; it names the model and stands in the loading snippet.

    Returns:
        The card. Its `model-index` holds average accuracy and forgetting.

    Raises:
        ValueError: an input lacks an entry the card cannot do without.
        FileNotFoundError: the template is missing.
    """
    matrix = _need(results, "accuracy_matrix", "results")
    scenario = _need(results, "scenario", "results")
    num_tasks = int(_need(results, "num_tasks", "results"))
    num_classes = int(_need(manifest, "num_classes", "manifest"))
    base = adapter_config.get("base_model_name_or_path") or ""  # empty for a model that was never saved
    peft_type = str(_need(adapter_config, "peft_type", "adapter_config"))
    if scenario not in _SCENARIOS:
        raise ValueError(f"results['scenario'] is {scenario!r}; expected one of {', '.join(_SCENARIOS)}.")
    dataset = (manifest.get("dataset") or {}).get("name")
    facts = _projection_facts(results, projection)
    batchwise = bool(results.get("batchwise_prompt"))
    statistics = adapter_config.get("head") == "statistics"
    trained = max((i + 1 for i, row in enumerate(matrix) if any(_is_number(v) for v in row or ())), default=0)
    name = _model_name(peft_type, facts["method"], dataset, repo_id)

    data = ModelCardData(
        library_name="peft",
        base_model=base if _is_hub_id(base) else None,
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["continual-learning", "prompt-tuning", "pgp_hf", peft_type.lower(), scenario.replace("_", "-")],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=_eval_results(results, dataset) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_template().read_text(encoding="utf-8"),
        title=name,
        base_name=_public_name(base) if base else None,
        base_is_local=not _is_hub_id(base) and embedded.resolve(base) is None,
        snippet=_snippet(base, num_classes, repo_id, peft_type == "CLIP_PROMPT"),
        clip=peft_type == "CLIP_PROMPT",
        head_name="class-statistics head" if statistics else "linear head",
        statistics=_text(adapter_config.get("shrinkage")) if statistics else None,
        pool=_pool(adapter_config, batchwise),
        num_classes=num_classes,
        num_tasks=num_tasks,
        trained=trained,
        update_rule=_update_rule(facts),
        batchwise=batchwise,
        dataset_name=_public_name(dataset) if dataset else "unnamed dataset",
        scenario=_SCENARIOS[scenario],
        class_order=_class_order(manifest),
        evaluation=_evaluation(scenario, results.get("eval_mask"), num_classes),
        seed=_text(results.get("seed")),
        speed=f"{_number(results.get('train_images_per_second'), 1)} training images per second",
        versions=", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items()) or "not recorded",
        summary=_summary(results),
        heads=[[name, *_summary(of)] for name, of in sorted((results.get("heads") or {}).items(), reverse=True)],
        changed=bool(results.get("changed_selections")),
        tasks=_task_rows(results, manifest, trained),
        figures=[(figure, _FIGURE_TEXTS[figure]) for figure in figure_names(results)],
        parameters=facts["rows"],
        projected=facts["method"] != "none",
    )


def save_card(
    path: str | os.PathLike,
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    *,
    repo_id: str | None = None,
) -> Path:
    """Writes [`render_card`]'s card to `path` (a `README.md`), over the stub that PEFT leaves there; returns `path`.

    The card shows `figures/*.png` beside it, as `pgp_hf.plots.save_figures(results, folder / "figures")` writes them.

    Raises:
        ValueError, FileNotFoundError: as [`render_card`] does; an earlier card then stays as it was.
    """
    card = render_card(results, manifest, adapter_config, projection, repo_id=repo_id)
    with replacing(path) as part:
        part.write_text(str(card), encoding="utf-8", newline="\n")
    return Path(path)


def _summary(results: Mapping[str, Any]) -> list[str]:
    keys = ("average_accuracy", "forgetting", "forgetting_clipped", "backward_transfer", "learning_accuracy")
    return [_number(results.get(key), 2) for key in keys]


def _template() -> Path:
    """The template inside an installed wheel, or else in the source tree."""
    here = Path(__file__).parent
    places = (here / "model_card_template.md", here.parent / "model_cards" / "template.md")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"The model card's template is missing: looked for {places[0].name} inside the package and for "
        f"model_cards/{places[1].name} in the source tree. Reinstall pgp-hf."
    )


# Names: what is on the Hub may be named in full, a local folder only by its last name.


def _is_hub_id(name: Any) -> bool:
    """Whether `name` can be an id on the Hub; an existing folder of that name counts as local."""
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _public_name(name: str) -> str:
    """A Hub id as it is; of anything that looks like a path, the last part."""
    if _is_hub_id(name):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return last if last.strip(".~") else "unnamed"


def _model_name(peft_type: str, method: str, dataset: str | None, repo_id: str | None) -> str:
    if repo_id:
        return _public_name(repo_id).split("/")[-1]
    parts = [peft_type, "" if method == "none" else method, _public_name(dataset).split("/")[-1] if dataset else ""]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")


def _snippet(base: str, num_classes: int, repo_id: str | None, clip: bool) -> str:
    """Loads backbone and adapter; a backbone with a head of another size is no obstacle."""
    inside = embedded.resolve(base) is not None
    source = base if _is_hub_id(base) or inside else f"path/to/{_public_name(base) if base else 'the-backbone'}"
    source = json.dumps(source, ensure_ascii=False)
    source = f"embedded.resolve({source})" if inside else source
    adapter = repo_id if _is_hub_id(repo_id) else "path/to/this/folder"
    kind = "CLIPModel" if clip else "AutoModelForImageClassification"
    size = "" if clip else f", num_labels={num_classes}, ignore_mismatched_sizes=True"
    use = "\nlogits = model(pixel_values=pixel_values).logits_per_image  # one column a class" if clip else ""
    package = "\nfrom pgp_hf import embedded" if inside else ""
    return f"""import pgp_hf  # registers the adapter with PEFT
from peft import PeftModel{package}
from transformers import {kind}

base = {kind}.from_pretrained({source}{size})
model = PeftModel.from_pretrained(base, {json.dumps(adapter)}).eval(){use}"""


# What the card says.


def _eval_results(results: Mapping[str, Any], dataset: str | None) -> list[EvalResult]:
    scenario, num_tasks = results["scenario"], int(results["num_tasks"])
    public = _public_name(dataset) if dataset else "unnamed dataset"
    common = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": public,
        "dataset_name": f"Split {public.split('/')[-1]} ({num_tasks} tasks, {scenario.replace('_', '-')})",
        "dataset_split": "test",
        "dataset_args": {"scenario": scenario, "num_tasks": num_tasks, "seed": results.get("seed")},
    }
    return [
        EvalResult(metric_type=kind, metric_name=title, metric_value=round(float(results[key]), 2), **common)
        for key, kind, title in (
            ("average_accuracy", "accuracy", "Average accuracy"),
            ("forgetting", "forgetting", "Forgetting"),
        )
        if _is_number(results.get(key))
    ]


def _projection_facts(results: Mapping[str, Any], projection: Mapping[str, Any] | None) -> dict[str, Any]:
    """The one reader of `projection.json`: `method`, `apply_to` and one table row per projected parameter."""
    content = projection or {}
    method = content.get("method", results.get("projection"))
    if isinstance(method, Mapping):  # results may hold the whole configuration
        method = method.get("method")
    parameters = content.get("parameters")
    if parameters is None:
        parameters = {name: entry for name, entry in content.items() if isinstance(entry, Mapping) and "rank" in entry}
    rows = []
    for name, entry in parameters.items():
        rank, shape = entry.get("rank"), entry.get("shape") or []
        rank = max(rank, default=0) if isinstance(rank, list | tuple) else rank
        of = f" of {shape[-1]}" if shape else ""
        samples = entry.get("samples")
        rows.append(
            [
                f"`{name}`",
                f"{_number(rank, 0)}{of}",
                _text(entry.get("energy")),
                _text(samples if not isinstance(samples, list | tuple) else max(samples, default=None)),
            ]
        )
    return {"method": str(method or "none"), "apply_to": content.get("apply_to"), "rows": rows}


def _update_rule(facts: Mapping[str, Any]) -> str:
    if facts["method"] == "none":
        return "Updates were not projected: nothing but the prompt selection protects earlier tasks."
    what = "gradient" if facts["apply_to"] == "gradient" else "update"
    return (
        f"Each {what} was projected (`{facts['method']}`) onto the null space of what the training images of earlier "
        f"tasks showed the prompts and keys, so that what those images see stays put."
    )


def _pool(config: Mapping[str, Any], batchwise: bool) -> str:
    """The prompts, by the adapter's own settings."""
    get = {key: _text(value) for key, value in config.items()}.get
    if config.get("peft_type") == "DUALPROMPT":
        return (
            f"general prefixes of length {get('general_length')} in layers {get('general_layers')} and "
            f"{get('pool_size')} expert prefixes of length {get('expert_length')} in layers {get('expert_layers')}, "
            "one per task, found by key"
        )
    if config.get("peft_type") == "CLIP_PROMPT":
        return (
            f"{get('text_length')} context tokens per task before each class name and {get('image_length')} image "
            "prompt tokens shared by all tasks"
        )
    size, length, top_k = (_text(config.get(key)) for key in ("pool_size", "prompt_length", "top_k"))
    return f"{size} prompts of {length} tokens, {top_k} of them selected for each {'batch' if batchwise else 'image'}"


def _class_order(manifest: Mapping[str, Any]) -> str:
    order, seed = manifest.get("class_order"), manifest.get("seed")
    if order and list(order) == sorted(order):
        return "label order"
    return "given" if seed is None else f"stream seed {seed}"


def _evaluation(scenario: str, mask: str | None, num_classes: int) -> str:
    if scenario == "task_incremental":
        return "the task of each test image is given, and only that task's classes compete"
    rules = {
        "seen": 'no task id is given; logits of classes not yet seen are masked (`eval_mask="seen"`)',
        "none": f"no task id is given; all {num_classes} classes compete, untrained ones included "
        '(`eval_mask="none"`, as in the released code)',
        None: "no task id is given; whether unseen classes were masked is not recorded",
    }
    if mask not in rules:
        raise ValueError(f"results['eval_mask'] is {mask!r}; expected 'seen' or 'none'.")
    return rules[mask]


def _task_rows(results: Mapping[str, Any], manifest: Mapping[str, Any], trained: int) -> list[list[str]]:
    matrix, tasks = results["accuracy_matrix"], manifest.get("tasks") or []
    names = manifest.get("label_names") or []
    changed, rows = results.get("changed_selections"), []
    for i in range(trained):
        task = tasks[i] if i < len(tasks) else {}
        images = [_text((task.get(part) or {}).get("num_images")) for part in ("train", "test")]
        rows.append(
            [
                str(i + 1),
                _classes(task.get("classes") or [], names),
                " / ".join(images),
                _number(_at(matrix[i], i), 1),
                _number(_at(matrix[trained - 1], i), 1),
                _number(_at(results.get("per_task_average_accuracy"), i), 1),
                _number(_at(results.get("drift"), i), 4),
                *([_number(100 * changed[i], 1)] if changed else []),
                _number(_at(results.get("projection_rank"), i), 0),
            ]
        )
    return rows


def _classes(classes: list[int], names: list[str], most: int = 5) -> str:
    shown = ", ".join(_cell(names[c]) if c < len(names) else str(c) for c in classes[:most])
    return shown + (f" and {len(classes) - most} more" if len(classes) > most else "") or _MISSING


def _cell(text: Any) -> str:
    """Free text made safe for one cell of a Markdown table."""
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def _need(source: Mapping[str, Any], key: str, name: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"{name} has no {key!r}, which the model card needs; it has {', '.join(sorted(source))}.")
    return source[key]


def _at(values: Any, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else _MISSING


def _text(value: Any) -> str:
    return _MISSING if value is None else str(value)
