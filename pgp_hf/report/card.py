"""The model card of a run: metadata for the Hub and a short README, rendered from `model_cards/template.md`.

Works on the content of the run's JSON files alone; its sentences and tables are made in `_card_text.py`. A path of the
machine that trained never enters a card: a backbone or dataset that is a local folder appears by the folder's last
name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import embedded
from ..runs.atomic import replacing
from ..runs.folder import PROCESSOR
from ..runs.reading import read_json
from . import sentences as say
from .figures import figure_names

_FIGURE_TEXTS = {
    "accuracy_matrix.png": "Accuracy on each task after each task",
    "task_curves.png": "Average accuracy and forgetting after each task",
    "stability.png": "How far old features drifted, and what was protected, after each task",
    "prompt_usage.png": "Pool entries that each task's test images select",
}


def render_card(
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    projection: Mapping[str, Any] | None,
    *,
    processor: Mapping[str, Any] | None = None,
    figures: Iterable[str] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Renders the card of a run, or of one of its `task-<t>` revisions.

    Args:
        results: content of `results.json`; `prompt_usage`, `changed_selections`, `heads`, `eval_mask` and
            `batchwise_prompt` are read where present.
        manifest: content of `stream.json`.
        adapter_config: content of `adapter_config.json`.
        projection: content of `projection.json`, `None` for a run without projection.
        processor: content of `preprocessor_config.json`, `None` for a run that saved none.
        figures: names of the files in `figures/`; by default those that `pgp_hf.report.figures.save_figures` writes.
        repo_id: the repository the card is for; it names the model and stands in the code, with the tag `task-<t>`.

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
    peft_type = str(_need(adapter_config, "peft_type", "adapter_config"))
    if scenario not in say.SCENARIO_SENTENCES:
        raise ValueError(f"results['scenario'] is {scenario!r}; expected one of {', '.join(say.SCENARIO_SENTENCES)}.")
    base = adapter_config.get("base_model_name_or_path") or ""  # empty for a model that was never saved
    inside = embedded.resolve(base) is not None
    dataset = (manifest.get("dataset") or {}).get("name")
    facts = say.projection_facts(results, projection)
    batchwise = bool(results.get("batchwise_prompt"))
    trained = max((i + 1 for i, row in enumerate(matrix) if any(v is not None for v in row or ())), default=0)
    name = _model_name(peft_type, facts["method"], dataset, repo_id)
    there = figure_names(results) if figures is None else set(figures)
    code = _Code(adapter_config, num_classes, repo_id, trained, processor is not None)

    card_data = ModelCardData(
        library_name="peft",
        base_model=base if _is_hub_id(base) else None,
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["continual-learning", "prompt-tuning", "pgp_hf", peft_type.lower(), scenario.replace("_", "-")],
        datasets=[dataset] if _is_owned(dataset) else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=_eval_results(results, dataset, trained) or None,
    )
    return ModelCard.from_template(
        card_data,
        template_str=_template().read_text(encoding="utf-8"),
        title=name,
        backbone=_backbone(base),
        bring=None if inside or _is_hub_id(base) else _bring(base),
        pool=say.pool(adapter_config, batchwise),
        num_tasks=num_tasks,
        num_classes=num_classes,
        known=len({label for task in (manifest.get("tasks") or [])[:trained] for label in task.get("classes") or []}),
        trained=trained,
        update_rule=say.update_rule(facts, peft_type),
        predict=code.predict(),
        peft=code.peft(),
        resume=json.dumps(f"{repo_id}@task-{trained}" if _is_hub_id(repo_id) else code.adapter, ensure_ascii=False),
        batchwise=batchwise,
        dataset=_linked(dataset, "datasets/", _is_owned) if dataset else "unnamed dataset",
        data_limits=say.data(manifest),
        scenario=scenario,
        scenario_text=say.SCENARIO_SENTENCES[scenario],
        class_order=say.class_order(manifest),
        preprocessing=say.preprocessing(processor),
        head=say.head(adapter_config, bool(results.get("compensate_drift"))),
        projection=say.projection_settings(facts),
        eval_mask=results.get("eval_mask"),
        evaluation=say.evaluation(scenario, results.get("eval_mask"), num_classes),
        seed=say.text(results.get("seed")),
        time=say.time(results),
        versions=", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items()) or "not recorded",
        run_table=say.markdown(say.run_table(results), left=("Head",)),
        heads=bool(results.get("heads")),
        predicts=results.get("head"),
        changed=bool(results.get("changed_selections")),
        task_table=say.markdown(say.task_table(results, manifest, trained), left=("Classes",)),
        protected=any(results.get("projection_rank") or []),
        drift_lacks=say.drift_lacks(results),
        figures={figure: about for figure, about in _FIGURE_TEXTS.items() if figure in there},
        bases=say.markdown([["Parameter", "Protected rank", "Energy", "Samples"], *facts["rows"]], left=("Parameter",))
        if facts["rows"]
        else None,
        statistics=adapter_config.get("head") == "statistics",
        compensated=bool(results.get("compensate_drift")),
        projection_limits=say.projection_limits(facts, adapter_config),
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

    The card goes by what lies beside it: `preprocessor_config.json`, and the figures that
    `pgp_hf.report.figures.save_figures(results, folder / "figures")` has written; it names no other.

    Raises:
        ValueError, FileNotFoundError: as [`render_card`] does; an earlier card then stays as it was.
    """
    folder = Path(path).parent
    beside = {
        "processor": read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else None,
        "figures": [file.name for file in folder.glob("figures/*.png")],
    }
    card = render_card(results, manifest, adapter_config, projection, repo_id=repo_id, **beside)
    with replacing(path) as part:
        part.write_text(str(card), encoding="utf-8", newline="\n")
    return Path(path)


def _template() -> Path:
    """The template inside an installed wheel, or else in the source tree."""
    here = Path(__file__).parents[1]
    places = (here / "model_card_template.md", here.parent / "model_cards" / "template.md")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"The model card's template is missing: looked for {places[0].name} inside the package and for "
        f"model_cards/{places[1].name} in the source tree. Reinstall pgp-hf."
    )


# ---- names: what is on the Hub may be named in full, a local folder only by its last name ----------------------------


def _is_hub_id(name: Any) -> bool:
    """Whether `name` can be an id on the Hub; an existing folder of that name counts as local."""
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_owned(name: Any) -> bool:
    """Whether `name` is an id with its owner; without one it may be any folder's name, or a builder's."""
    return _is_hub_id(name) and "/" in name


def _public_name(name: str) -> str:
    """A Hub id as it is; of anything that looks like a path, the last part."""
    if _is_hub_id(name):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return last if last.strip(".~") else "unnamed"


def _linked(name: str, kind: str, known: Any) -> str:
    """A name in Markdown, with a link where it is known to be on the Hub."""
    public = _public_name(name)
    return f"[{public}](https://huggingface.co/{kind}{public})" if known(name) else say.cell(public)


def _backbone(base: str) -> str:
    if embedded.resolve(base) is not None:
        return f"the frozen `{base}`, a small backbone inside the package"
    if _is_hub_id(base):
        return f"the frozen [`{base}`](https://huggingface.co/{base})"
    return f"the frozen `{_public_name(base)}`" if base else "a frozen backbone without a name"


def _bring(base: str) -> str:
    """What to do about a backbone that is nowhere on the Hub."""
    return f"a local folder named `{_public_name(base)}`" if base else "built in memory"


def _model_name(peft_type: str, method: str, dataset: str | None, repo_id: str | None) -> str:
    if repo_id:
        return _public_name(repo_id).split("/")[-1]
    parts = [peft_type, "" if method == "none" else method, _public_name(dataset).split("/")[-1] if dataset else ""]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")


# ---- code and metadata -----------------------------------------------------------------------------------------------


class _Code:
    """The card's code, which runs as it stands beside a `photo.jpg`.

    Args:
        config: content of `adapter_config.json`.
        trained: number of finished tasks, whose tag stands in the code for a repository.
        processor: whether the run saved its image processor.
    """

    def __init__(
        self, config: Mapping[str, Any], num_classes: int, repo_id: str | None, trained: int, processor: bool
    ) -> None:
        base = config.get("base_model_name_or_path") or ""
        self.inside, self.clip = embedded.resolve(base) is not None, config.get("peft_type") == "CLIP_PROMPT"
        self.found = self.inside or _is_hub_id(base)
        self.base = base if self.found else f"path/to/{_public_name(base) if base else 'the-backbone'}"
        self.adapter = repo_id if _is_hub_id(repo_id) else "path/to/this/folder"
        self.tag = f', revision="task-{trained}"' if _is_hub_id(repo_id) else ""
        self.pinned = f", revision={json.dumps(config['revision'])}" if config.get("revision") else ""
        self.processor, self.num_classes = processor, num_classes

    def predict(self) -> str:
        backbone = "" if self.found else f", backbone={json.dumps(self.base, ensure_ascii=False)}"
        arguments = f"{json.dumps(self.adapter)}{self.tag}{backbone}"
        arguments = f"\n    {arguments}\n" if len(arguments) > 60 else arguments
        return f"""from pgp_hf import load_pretrained

classifier = load_pretrained({arguments})
print(classifier.predict("photo.jpg", top_k=3))"""

    def peft(self) -> str:
        """The adapter brings the size of its head."""
        kind = "CLIPModel" if self.clip else "AutoModelForImageClassification"
        name = json.dumps(self.base, ensure_ascii=False)
        source = f"embedded.resolve({name})" if self.inside else name
        saved = f"{json.dumps(self.adapter)}{self.tag}" if self.processor else f"{source}{self.pinned}"
        scores = "logits_per_image" if self.clip else "logits"
        package = "\nfrom pgp_hf import embedded" if self.inside else ""
        return f"""import pgp_hf  # registers the adapter with PEFT
import torch
from peft import PeftModel{package}
from PIL import Image
from transformers import AutoImageProcessor, {kind}

base = {kind}.from_pretrained({source}{self.pinned})
model = PeftModel.from_pretrained(base, {json.dumps(self.adapter)}{self.tag}).eval()
processor = AutoImageProcessor.from_pretrained({saved}, backend="pil")
pixels = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    scores = model(pixel_values=pixels).{scores}  # (1, {self.num_classes}): a column a class"""


def _eval_results(results: Mapping[str, Any], dataset: str | None, trained: int) -> list[EvalResult]:
    scenario, num_tasks = results["scenario"], int(results["num_tasks"])
    public = _public_name(dataset) if dataset else "unnamed dataset"
    so_far = f", after task {trained}" if trained < num_tasks else ""
    common = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": re.sub(r"[^\w./-]+", "-", public).strip("-") or "unnamed",  # as ids on the Hub are written
        "dataset_name": f"Split {public.split('/')[-1]} ({num_tasks} tasks, {scenario.replace('_', '-')}{so_far})",
        "dataset_split": "test",
        "dataset_args": {"scenario": scenario, "num_tasks": num_tasks, "seed": results.get("seed")},
        "metric_args": {
            key: value
            for key, value in (
                ("after_task", trained),
                ("head", results.get("head")),
                ("eval_mask", results.get("eval_mask")),
            )
            if value is not None
        },
    }
    return [
        EvalResult(metric_type=kind, metric_name=title, metric_value=round(float(results[key]), 2), **common)
        for key, kind, title in (
            ("average_accuracy", "accuracy", "Average accuracy"),
            ("forgetting", "forgetting", "Forgetting"),
        )
        if say.number(results.get(key), 2) != say.MISSING
    ]


def _need(source: Mapping[str, Any], key: str, name: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"{name} has no {key!r}, which the model card needs; it has {', '.join(sorted(source))}.")
    return source[key]
