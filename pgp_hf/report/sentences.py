"""What a model card says of a run, sentence by sentence and row by row, from the content of its JSON files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Resampling

SCENARIO_SENTENCES = {
    "class_incremental": "class-incremental",
    "task_incremental": "task-incremental",
    "online": "class-incremental, one pass over the data (online)",
}
MISSING = "–"
_RUN_COLUMNS = ("Average accuracy", "Forgetting", "Forgetting, clipped", "Backward transfer", "Learning accuracy")
_RUN_KEYS = ("average_accuracy", "forgetting", "forgetting_clipped", "backward_transfer", "learning_accuracy")
_KEPT = {  # by projection: what the update rule keeps, and what it does not
    "pgp": (
        "prompts move orthogonally to the tokens, queries and prompts that earlier tasks showed them (prompt gradient "
        "projection, ICLR 2024)",
        "The projection covers the products of prompts with old tokens or queries where the prompts enter the network. "
        "It does not cover the value path of inserted tokens, the residual stream, LayerNorm and deeper layers; the "
        "drift above is what that leaves.",
    ),
    "attention": (
        "prompts move so that the attention they enter first stays as it was for old images (visual prompt tuning in "
        "null space, NeurIPS 2024)",
        "The projection covers the attention that the prompts enter first, as long as the LayerNorm statistics of "
        "prompt tokens stay, which it cannot enforce. It does not cover the residual stream and deeper layers; the "
        "drift above is what that leaves.",
    ),
    "functional": (
        "prompts move orthogonally to the directions in which what the head reads of old images would change, through "
        "the whole network and to first order",
        "The projection holds to first order, along sampled directions, and while an image selects the same prompts: "
        "long steps and changed selections move old features all the same.",
    ),
    "frozen": (
        "the prompts and keys that tasks share learned with the first task only",
        "What later tasks needed of the shared prompts was never learned.",
    ),
}
_OWN = {
    "DUALPROMPT": " The expert prefixes of a finished task never move.",
    "CLIP_PROMPT": " The text context of a finished task never moves.",
}


# ---- what was learned, and how ---------------------------------------------------------------------------------------


def pool(config: Mapping[str, Any], batchwise: bool) -> str:
    """The prompts, by the adapter's own settings."""

    def get(key: str) -> str:
        return text(config.get(key))

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
    each = "batch" if batchwise else "image"
    return (
        f"{get('pool_size')} prompts of {get('prompt_length')} tokens, {get('top_k')} of them selected for each {each}"
    )


def head(config: Mapping[str, Any], compensated: bool = False) -> str:
    """What classifies, and from what."""
    clip = config.get("peft_type") == "CLIP_PROMPT"
    trained = "similarity with the class names, each behind its task's context" if clip else "linear"
    reads = "the mean of the prompt tokens" if config.get("head_type", "token") == "prompt" else "the CLS token"
    reads = "the image features" if clip else reads
    if config.get("head") != "statistics":
        return trained if clip else f"{trained}, on {reads}"
    later = "moved since as the features of later tasks' images moved" if compensated else "never refreshed"
    return (
        f"class statistics of {reads}: the mean of each class and one covariance for all (shrinkage "
        f"{text(config.get('shrinkage'))}), gathered from the training images when their task ended and {later}; "
        f"linear discriminant analysis in closed form. The {'contexts' if clip else 'linear head'} that served the "
        "training came along"
    )


def projection_facts(results: Mapping[str, Any], projection: Mapping[str, Any] | None) -> dict[str, Any]:
    """The one reader of `projection.json`: its `method`, its `settings` and one table row per projected parameter."""
    content = projection or {}
    method = content.get("method", results.get("projection"))
    parameters = {name: entry for name, entry in content.items() if isinstance(entry, Mapping)}
    rows = []
    for name, entry in parameters.items():
        shape = entry.get("shape") or []
        of = f" of {shape[-1]}" if shape else ""
        rows.append(
            [f"`{name}`", number(entry.get("rank"), 0) + of, text(entry.get("energy")), text(entry.get("samples"))]
        )
    settings = {name: value for name, value in content.items() if name not in parameters}
    return {"method": str(method or "none"), "settings": settings, "rows": rows}


def update_rule(facts: Mapping[str, Any], peft_type: str) -> str:
    own, method = _OWN.get(peft_type, ""), facts["method"]
    if method == "none":
        return "Updates were not projected: only the selection of prompts by their keys keeps tasks apart." + own
    what = {"gradient": "gradient", "both": "gradient and each update"}.get(
        facts["settings"].get("apply_to"), "update"
    )
    kept = f": {_KEPT[method][0]}" if method in _KEPT else ""
    keys = peft_type == "L2P" and method != "frozen" and facts["settings"].get("key_energy") is not None
    kept += "; keys move orthogonally to old queries" if keys else ""
    return f"From the second task on, each {what} of what tasks share was projected (`{method}`){kept}.{own}"


def projection_settings(facts: Mapping[str, Any]) -> str:
    if facts["method"] == "none":
        return "none"
    settings = facts["settings"] or {"method": facts["method"]}
    quoted = {name: f'"{value}"' if isinstance(value, str) else value for name, value in settings.items()}
    return ", ".join(f"`{name}={value}`" for name, value in quoted.items())


def projection_limits(facts: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What the projection does not promise."""
    method, settings = facts["method"], facts["settings"]
    limits = [_KEPT[method][1]] if method in _KEPT else []
    if method in ("none", "frozen"):
        return limits
    limits.append(
        "It protects what earlier training images showed, up to the energies above, not every image of those classes."
    )
    if config.get("head") != "statistics" and config.get("peft_type") != "CLIP_PROMPT":
        limits.append("The linear head is not projected: it goes on learning on features that it has not held still.")
    if settings.get("apply_to") == "gradient":
        limits.append("Only gradients were projected: Adam and weight decay lead out of the null space.")
    return limits


# ---- the protocol ----------------------------------------------------------------------------------------------------


def data(manifest: Mapping[str, Any]) -> str:
    """How many images of each class, where that was limited, and where the test images come from."""
    limits = {"training": "max_train_samples_per_class", "test": "max_eval_samples_per_class"}
    parts = [f"at most {manifest[key]} {split} images a class" for split, key in limits.items() if manifest.get(key)]
    if manifest.get("test_fraction"):
        parts.append(f"{100 * manifest['test_fraction']:g} % of the images held out for testing")
    return "".join(f"; {part}" for part in parts)


def class_order(manifest: Mapping[str, Any]) -> str:
    order, seed = manifest.get("class_order"), manifest.get("seed")
    if order and list(order) == sorted(order):
        return "label order"
    return "given" if seed is None else f"drawn with stream seed {seed}"


def preprocessing(processor: Mapping[str, Any] | None) -> str:
    """The image processor's steps, by its saved settings."""
    if processor is None:
        return "not recorded; the backbone's own image processor"
    steps = ["RGB"] if processor.get("do_convert_rgb") else []
    if processor.get("do_resize"):
        how = [f" ({one.name.lower()})" for one in Resampling if one == processor.get("resample")]
        steps.append(f"resized to {_size(processor.get('size'))}{''.join(how)}")
    if processor.get("do_center_crop"):
        steps.append(f"centre crop of {_size(processor.get('crop_size'))}")
    if processor.get("do_rescale"):
        factor = processor.get("rescale_factor")
        usual = _is_number(factor) and math.isclose(factor, 1 / 255)
        steps.append("scaled to 0..1" if usual else f"values times {text(factor)}")
    if processor.get("do_normalize"):
        mean, deviation = (_channels(processor.get(key)) for key in ("image_mean", "image_std"))
        steps.append(f"normalised by mean {mean} and deviation {deviation}")
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
    shown = [f"{value:.4g}" if _is_number(value) else MISSING for value in values]
    return shown[0] if len(set(shown)) == 1 else f"({', '.join(shown)})"


def evaluation(scenario: str, mask: str | None, num_classes: int) -> str:
    """The rule by which a test image is classified.

    Raises:
        ValueError: an unknown `mask`.
    """
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


def time(results: Mapping[str, Any]) -> str:
    """Wall time by activity, as far as it was recorded."""
    speed = f"{number(results.get('train_images_per_second'), 1)} images per second"
    seconds = {name: value for name, value in (results.get("seconds") or {}).items() if _is_number(value) and value}
    if not seconds:
        return f"{speed} in training"
    parts = [f"{_duration(value)} of {name.replace('train', 'training')}" for name, value in seconds.items()]
    parts[0] += f" ({speed})" if "train" in seconds else ""
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def run_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: one for the run, or one for each head, first that which predicts."""
    heads = results.get("heads") or {}
    changed = results.get("changed_selections")
    moved = [number((results.get("drift") or [None])[-1], 3)] + ([number(100 * changed[-1], 1)] if changed else [])
    columns = [*_RUN_COLUMNS, "Drift", *(["Changed"] if changed else [])]
    if not heads:
        return [columns, [*(number(results.get(key), 2) for key in _RUN_KEYS), *moved]]
    speaks = results.get("head")
    return [["Head", *columns]] + [
        [
            f"{name} (predicts)" if name == speaks else name,
            *(number(heads[name].get(key), 2) for key in _RUN_KEYS),
            *moved,
        ]
        for name in sorted(heads, key=lambda name: (name != speaks, name))
    ]


def task_table(results: Mapping[str, Any], manifest: Mapping[str, Any], trained: int) -> list[list[str]]:
    """Header and a row per finished task."""
    matrix, tasks = results["accuracy_matrix"], manifest.get("tasks") or []
    names, changed = manifest.get("label_names") or [], results.get("changed_selections")
    others = {name: of for name, of in (results.get("heads") or {}).items() if name != results.get("head")}
    protected = any(results.get("projection_rank") or [])
    rows = [
        [
            "Task", "Classes", "Train / test images", "When learned", "Now", "Average so far",
            *(f"Average so far, {name}" for name in others), "Drift", *(["Changed"] if changed else []),
            *(["Rank"] if protected else []),
        ]
    ]  # fmt: skip
    for i in range(trained):
        task = tasks[i] if i < len(tasks) else {}
        images = [text((task.get(part) or {}).get("num_images")) for part in ("train", "test")]
        rows.append(
            [
                str(i + 1),
                _classes(task.get("classes") or [], names),
                " / ".join(images),
                number(_at(matrix[i], i), 1),
                number(_at(matrix[trained - 1], i), 1),
                number(_at(results.get("per_task_average_accuracy"), i), 1),
                *(number(_at(of.get("per_task_average_accuracy"), i), 1) for of in others.values()),
                number(_at(results.get("drift"), i), 3),
                *([number(100 * changed[i], 1)] if changed else []),
                *([number(_at(results.get("projection_rank"), i), 0)] if protected else []),
            ]
        )
    return rows


def drift_lacks(results: Mapping[str, Any]) -> str | None:
    """Which tasks' images drift leaves out, as "1 and 2"; None for a run that measured all."""
    lacking = [str(task + 1) for task in results.get("drift_lacks") or []]
    return " and ".join(filter(None, [", ".join(lacking[:-1]), lacking[-1]])) if lacking else None


def markdown(rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table of a header and rows; columns are aligned to the right but for those named in `left`."""
    rule = ["---" if name in left else "---:" for name in rows[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _classes(classes: Sequence[int], names: Sequence[str], most: int = 5) -> str:
    shown = [_short(names[c]) if c < len(names) else str(c) for c in classes[:most]]
    between = "; " if any("," in name for name in shown) else ", "  # as in "tench, Tinca tinca"
    rest = f" and {len(classes) - most} more" if len(classes) > most else ""
    return between.join(map(cell, shown)) + rest or MISSING


def _short(name: Any, most: int = 32) -> str:
    name = " ".join(str(name).split())
    return name if len(name) <= most else f"{name[: most - 1].rstrip(' ,;')}…"


def cell(content: Any) -> str:
    """Free text made safe for one line, or one cell of a table, in Markdown."""
    line = " ".join(str(content).split())
    return re.sub(r"[\\|`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line).replace("<", "&lt;")


def _at(values: Any, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else MISSING


def text(value: Any) -> str:
    return MISSING if value is None else str(value)
