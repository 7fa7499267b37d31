"""The card: metadata that the Hub parses, true statements, no path of the training machine.

Its code runs in `test_card_code.py`.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image

from pgp_hf import metrics
from pgp_hf.data.scenarios import SCENARIOS, Scenario
from pgp_hf.data.stream import TaskStream
from pgp_hf.methods import create
from pgp_hf.report import card as model_card
from pgp_hf.report import figures as plots
from pgp_hf.report.learning import describe_learning
from pgp_hf.report.sentences import describe_class_order, describe_head
from pgp_hf.tuners.base.card import AdapterCard
from pgp_hf.tuners.base.config import PromptConfig

N = None
MATRIX = [[90.0, N, N], [80.0, 95.0, N], [85.0, 75.0, 70.0]]


def make_inputs(matrix=MATRIX, num_tasks: int = 3) -> dict:
    """Arguments of `render_card` for a run over `num_tasks` tasks of two classes."""
    rows = sum(any(v is not None for v in row) for row in matrix)
    return {
        "results": {
            "method": "l2p",
            "projection": "pgp",
            "scenario": "class_incremental",
            "num_tasks": num_tasks,
            "accuracy_matrix": matrix,
            **metrics.summarize(matrix),
            "drift": [0.0, 0.0125, 0.02][:rows],
            "projection_rank": [4, 9, 11][:rows],
            "train_images_per_second": 123.456,
            "seconds": {"train": 7.4, "statistics": 0.0, "evaluation": 1234.0},
            "head": "linear",
            "seed": 7,
            "versions": {"pgp_hf": "0.1.0", "torch": "2.13.0"},
            "eval_mask": "seen",
            "batchwise_prompt": False,
        },
        "manifest": {
            "scenario": "class_incremental",
            "num_tasks": num_tasks,
            "num_classes": 2 * num_tasks,
            "seed": 3,
            "class_order": np.random.default_rng(3).permutation(2 * num_tasks).tolist(),
            "label_names": [f"name {c}" for c in range(2 * num_tasks)],
            "test_fraction": None,
            "max_train_samples_per_class": None,
            "dataset": {"name": "uoft-cs/cifar100"},
            "tasks": [
                {
                    "classes": [2 * num_tasks - 1 - 2 * t, 2 * num_tasks - 2 - 2 * t],
                    "train": {"num_images": 100 + t, "sha256": "0"},
                    "test": {"num_images": 20 + t, "sha256": "0"},
                }
                for t in range(num_tasks)
            ],
        },
        "adapter_config": {
            "base_model_name_or_path": "google/vit-base-patch16-224-in21k",
            "peft_type": "L2P",
            "pool_size": 10,
            "prompt_length": 5,
            "top_k": 4,
            "head_type": "prompt",
            "head": "linear",
            "shrinkage": 0.1,
            "revision": None,
        },
        "projection": {
            "method": "pgp",
            "energy": 0.5,
            "key_energy": 0.97,
            "apply_to": "update",
            "max_images": None,
            "a.prompts": {
                "shape": [50, 48],
                "batch_dims": 0,
                "rank": 11,
                "energy": 0.5,
                "role": "prompt",
                "samples": 900,
            },
            "a.keys": {"shape": [10, 48], "batch_dims": 0, "rank": 5, "energy": 0.97, "role": "key", "samples": 303},
        },
    }


PROCESSOR = {
    "do_resize": True,
    "size": {"height": 224, "width": 192},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def two_heads(inputs: dict) -> dict:
    """The same run with a statistics head, half of whose accuracies the linear head has."""
    half = [[None if a is None else a / 2 for a in row] for row in inputs["results"]["accuracy_matrix"]]
    heads = {"linear": half, "statistics": inputs["results"]["accuracy_matrix"]}
    tasks = inputs["results"].get("finished_tasks")
    inputs["results"] |= {
        "head": "statistics",
        "heads": {
            name: {"accuracy_matrix": matrix, **metrics.summarize(matrix, tasks)} for name, matrix in heads.items()
        },
        "changed_selections": [0.0, 0.125, 0.25],
    }
    inputs["adapter_config"]["head"] = "statistics"
    return inputs


def render(inputs: dict, **kwargs) -> ModelCard:
    return model_card.render_card(**inputs, **kwargs)


def tables(card: ModelCard) -> list[list[list[str]]]:
    """Cells of each Markdown table, its header first; each row has as many cells as the header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", card.text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])} and all(re.fullmatch("---:?", rule) for rule in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def table_rows(card: ModelCard) -> list[list[str]]:
    return [row for table in tables(card) for row in table[1:]]


def check_as_a_reader(card: ModelCard) -> None:
    """What no card may have."""
    text = card.text
    assert not re.search(r"\{\{|\{%|undefined|None\b|nan\b", re.sub(r"`[^`\n]*`", "", text))
    assert not re.search(r"\n{3,}|[ \t]\n", text), "blank lines in a row, or a line that ends in blanks"
    lines = text.splitlines()
    sections = [k for k, line in enumerate(lines) if re.match("#+ ", line)]
    for k, after in zip(sections, [*sections[1:], len(lines)], strict=True):
        level, below = lines[k].split()[0], lines[after].split()[0] if after < len(lines) else "#"
        assert any(lines[k + 1 : after]) or below > level, f"{lines[k]!r} is empty"
        assert k == 0 or (lines[k - 1] == "" and lines[k + 1] == "")
    for k, line in enumerate(lines[1:], 1):
        starts = line.startswith(("|", "![", "```python")) and not lines[k - 1].startswith(("|", "!["))
        assert not starts or lines[k - 1] == "", f"no blank line before {line!r}"
    tables(card)


def test_metadata_parses_back_with_the_values(tmp_path):
    inputs = make_inputs()
    path = model_card.save_card(tmp_path / "README.md", **inputs, repo_id="me/l2p-pgp-cifar100", license="mit")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"] and path == tmp_path / "README.md"
    data = ModelCard.load(path).data
    assert data.library_name == "peft" and data.license == "mit"
    assert data.pipeline_tag == "image-classification"
    assert data.base_model == "google/vit-base-patch16-224-in21k" and data.datasets == ["uoft-cs/cifar100"]
    assert {"continual-learning", "prompt-tuning", "pgp_hf", "l2p", "class-incremental"} <= set(data.tags)
    name, found = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "l2p-pgp-cifar100"
    values = {result.metric_name: (result.metric_type, result.metric_value) for result in found}
    assert values == {"Average accuracy": ("accuracy", 76.67), "Forgetting": ("forgetting", 12.5)}
    assert {result.dataset_type for result in found} == {"uoft-cs/cifar100"}
    assert found[0].dataset_name == "Split cifar100 (3 tasks, class-incremental)"
    assert found[0].dataset_args == {"scenario": "class_incremental", "num_tasks": 3, "seed": 7}
    assert found[1].metric_args == {"after_task": 3, "head": "linear", "eval_mask": "seen"}


@pytest.mark.parametrize(
    ("base", "dataset", "kept"),
    [
        ("google/vit-base", "uoft-cs/cifar100", ("google/vit-base", ["uoft-cs/cifar100"])),
        (None, None, (None, None)),
        ("pgp_hf:embedded-vit", "scikit-learn digits", (None, None)),
        ("pgp_hf:embedded-clip", "cifar100", (None, None)),  # the name of a builder, or of a local folder
    ],
)
def test_metadata_names_only_what_the_hub_can_hold(base, dataset, kept):
    inputs = make_inputs()
    inputs["adapter_config"]["base_model_name_or_path"] = base
    inputs["manifest"]["dataset"]["name"] = dataset
    card = render(inputs)
    check_as_a_reader(card)
    data = ModelCard(str(card)).data
    assert (data.base_model, data.datasets) == kept
    for name in filter(None, [data.base_model, *(data.datasets or [])]):
        validate_repo_id(name)
    for result in model_index_to_eval_results(data.to_dict()["model-index"])[1]:
        assert re.fullmatch(r"[\w./-]+", result.dataset_type)
    assert ("](https://huggingface.co/google/vit-base)" in card.text) == (base == "google/vit-base")
    assert ("](https://huggingface.co/datasets/uoft-cs/cifar100)" in card.text) == (dataset == "uoft-cs/cifar100")
    if base and ":" in base:
        assert f"the frozen `{base}`, a small backbone inside the package" in card.text
        assert f'embedded.resolve("{base}")' in card.text and "insert its path" not in card.text


def test_tables_hold_the_numbers():
    rows = table_rows(render(make_inputs()))
    assert ["76.67", "12.50", "12.50", "-12.50", "85.00", "0.020"] in rows
    assert ["1", "name 5, name 4", "100 / 20", "90.0", "85.0", "90.0", "0.000", "4"] in rows
    assert ["2", "name 3, name 2", "101 / 21", "95.0", "75.0", "87.5", "0.013", "9"] in rows
    assert ["3", "name 1, name 0", "102 / 22", "70.0", "70.0", "76.7", "0.020", "11"] in rows
    assert ["`a.prompts`", "11 of 48", "0.5", "900"] in rows
    assert ["`a.keys`", "5 of 48", "0.97", "303"] in rows


def test_two_heads_stand_beside_drift_and_changed_selections():
    card = render(two_heads(make_inputs()))
    check_as_a_reader(card)
    run, task, _ = tables(card)
    assert run[0][0] == "Head" and run[0][-2:] == ["Drift", "Changed"]
    assert run[1:] == [
        ["statistics (used to predict)", "76.67", "12.50", "12.50", "-12.50", "85.00", "0.020", "25.0"],
        ["linear", "38.33", "6.25", "6.25", "-6.25", "42.50", "0.020", "25.0"],
    ]
    assert task[0][5:] == ["Average so far", "Average so far, linear", "Drift", "Changed", "Rank"]
    assert [row[5:] for row in task[2:]] == [
        ["87.5", "43.8", "0.013", "12.5", "9"],
        ["76.7", "38.3", "0.020", "25.0", "11"],
    ]
    for fact in (
        "(shrinkage 0.1)",
        "and never refreshed; linear discriminant analysis in closed form. Also saved: the linear head used in training\n",
        "Accuracies are those of the statistics head unless another is named.",
        "Changed: percentage of old test images",
        "Class statistics",
    ):
        assert fact in card.text, fact
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert found[0].metric_value == 76.67 and found[0].metric_args["head"] == "statistics"


def test_tasks_that_drift_leaves_out_are_named():
    inputs = two_heads(make_inputs())
    assert "leaves out" not in render(inputs).text and "leave out" not in render(inputs).text
    inputs["results"]["drift_lacks"] = [0]
    assert "**Drift and changed selections leave out the images of task 1**: the run was" in render(inputs).text
    inputs["results"]["drift_lacks"] = [0, 1, 3]
    del inputs["results"]["changed_selections"]
    assert "**Drift leaves out the images of tasks 1, 2 and 4**: the run was" in render(inputs).text


def test_protocol_is_stated():
    inputs = make_inputs()
    card = render(inputs, processor=PROCESSOR)
    check_as_a_reader(card)
    for fact in (
        "[`google/vit-base-patch16-224-in21k`](",
        "10 prompts of 5 tokens, 4 of them selected for each image",
        "cifar100), 6 classes in 3 tasks\n",
        "**Scenario:** class-incremental\n",
        "drawn with stream seed 3",
        "**Preprocessing:** resized to 224 × 192 pixels (bicubic), scaled to 0..1, normalised with mean 0.5 and "
        "standard deviation (0.2686, 0.2613, 0.2758) (`preprocessor_config.json`)",
        "**Head:** linear, on the mean of the prompt tokens\n",
        '`method="pgp"`, `energy=0.5`, `key_energy=0.97`, `apply_to="update"`, `max_images=None`\n',
        "**Training seed:** 7",
        'logits of classes not yet seen are masked (`eval_mask="seen"`)',
        "**Time:** 7 s of training (123.5 images per second), 21 min of evaluation\n",
        "pgp_hf 0.1.0, torch 2.13.0",
        "the updates of the prompts that all tasks share were projected (`pgp`)",
        "**Prompts:** chosen for each image alone;",
    ):
        assert fact in card.text, fact
    assert "This is the revision" not in card.text and "Warning" not in card.text
    inputs["manifest"] |= {"max_train_samples_per_class": 50, "test_fraction": 0.2}
    limits = "; at most 50 training images per class; 20 % of the images held out for testing\n"
    assert limits in render(inputs).text and "**Preprocessing:** not recorded" in render(inputs).text
    inputs["manifest"] |= {"test_fraction": None, "train_val_split": 0.25}
    validation = "; evaluated on 25 % of the training images, held out for validation, instead of test images\n"
    assert validation in render(inputs).text


def test_metadata_say_what_was_tested_on():
    inputs, found = make_inputs(), []
    for settings in ({}, {"train_val_split": 0.25}, {"shift": "renderings", "renderings": ["grey"] * 3}):
        card = render({**inputs, "manifest": inputs["manifest"] | settings})
        found.append(model_index_to_eval_results(card.data.to_dict()["model-index"])[1][0])
    assert [one.dataset_split for one in found] == ["test", "validation", "test"]
    assert [one.dataset_args.get("shift") for one in found] == [None, None, "renderings"]


def test_the_limits_of_the_size_check_are_stated():
    inputs = make_inputs()
    said = "cannot notice another mean or standard deviation"
    assert said not in render(inputs, processor=PROCESSOR).text  # of an adapter that has noted no size
    inputs["adapter_config"] |= {"image_size": [224, 192]}
    card = render(inputs, processor=PROCESSOR)
    check_as_a_reader(card)
    assert said in card.text and "unless `image_processor=` names this adapter too" in card.text
    assert said not in render(inputs).text  # without a processor of its own


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "none"),
        ({"do_convert_rgb": True, "do_resize": False, "do_rescale": True, "rescale_factor": 0.5}, "RGB, values times 0.5"),
        (
            {"do_resize": True, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            "resized to 256 pixels on the shorter edge, centre crop of 224 × 224 pixels",
        ),
        ({"do_resize": True, "size": 64, "resample": 99, "do_normalize": True}, "resized to 64 pixels, normalised with mean – and standard deviation –"),
    ],
)  # fmt: skip
def test_preprocessing_of_any_processor(settings, text):
    assert (
        f"**Preprocessing:** {text} (`preprocessor_config.json`)\n" in render(make_inputs(), processor=settings).text
    )


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"peft_type": "L2P", "head_type": "token"}, "linear, on the CLS token"),
        ({"peft_type": "DUALPROMPT"}, "linear, on the CLS token"),
        ({"peft_type": "CLIP_PROMPT"}, "similarity with the class names, each behind its task's context"),
        ({"peft_type": "CLIP_PROMPT", "head": "statistics"}, "class statistics of the image features: the mean of each"),
        ({"peft_type": "L2P", "head_type": "prompt", "head": "statistics"}, "class statistics of the mean of the prompt t"),
    ],
)  # fmt: skip
def test_heads_of_every_method(config, head):
    inputs = make_inputs()
    inputs["adapter_config"] = {"base_model_name_or_path": "a/b", "shrinkage": 0.1, "head": "linear", **config}
    assert f"**Head:** {head}" in render(inputs).text


@pytest.mark.parametrize(
    ("scenario", "mask", "fact"),
    [
        ("class_incremental", "none", 'all 6 classes compete, untrained ones included (`eval_mask="none"`'),
        ("online", "seen", "one pass over the data (online)"),
        ("task_incremental", "seen", "the task of each test image is given"),
        ("class_incremental", None, "not recorded"),
    ],
)
def test_evaluation_rules(scenario, mask, fact):
    inputs = make_inputs()
    inputs["results"] |= {"scenario": scenario, "eval_mask": mask}
    text = render(inputs).text
    assert fact in text
    assert ("are masked" in text) == (mask == "seen" and scenario != "task_incremental")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_tasks": 2}, "drawn with stream seed 0"),
        ({"num_tasks": 2, "seed": 7}, "drawn with stream seed 7"),
        ({"num_tasks": 2, "seed": None}, "label order"),
        ({"num_tasks": 2, "class_order": [5, 0, 1, 2, 3, 4]}, "given"),
        ({"num_tasks": 2, "class_order": [5, 0, 1, 2, 3, 4], "seed": None}, "given"),
        ({"tasks": [[3, 1], [0]]}, "given"),
    ],
)
def test_class_order(settings, told):
    data = tiny.data(classes=6, train=2, test=1)
    stream = TaskStream.from_dataset(data, **settings)
    assert describe_class_order(stream.manifest()) == told
    first = TaskStream.from_manifest(stream.manifest(), num_tasks=1)
    first.append(data["train"])
    assert describe_class_order(first.manifest()) == f"{told}, then as the tasks arrived"


def test_batchwise_prompts_are_warned_about():
    inputs = make_inputs()
    inputs["results"]["batchwise_prompt"] = True
    text = render(inputs).text
    assert "> **Warning: prompts were chosen for whole batches** (`batchwise_prompt=True`)" in text
    assert "for each image" not in text and "image alone" not in text


@pytest.mark.parametrize("method", [None, "none"])
def test_a_run_without_projection_claims_none(method):
    inputs = make_inputs()
    inputs["results"] |= {"projection": "none", "projection_rank": [0, 0, 0]}
    inputs["projection"] = method and {"method": method, "energy": 0.5, "apply_to": "update"}
    card = render(inputs)
    check_as_a_reader(card)
    assert "Updates were not projected" in card.text and "**Projection:** none\n" in card.text
    for claim in ("## Projection", "protects", "Rank", "rank", "projection holds", "energy"):
        assert claim not in card.text, claim
    assert model_index_to_eval_results(card.data.to_dict()["model-index"])[0] == "l2p-cifar100"


@pytest.mark.parametrize("peft_type", ["L2P", "DUALPROMPT", "CLIP_PROMPT"])
@pytest.mark.parametrize(
    ("method", "rule", "limit"),
    [
        ("pgp", "prompt gradient projection, ICLR 2024", "does not cover the value path of inserted tokens, the residual"),
        ("attention", "null space, NeurIPS 2024", "does not cover the residual stream or deeper layers"),
        ("functional", "through the whole network and to first order", "holds to first order, along sampled directions"),
        ("frozen", "learned from the first task only", "needed of the shared prompts was never learned"),
    ],
)  # fmt: skip
def test_what_each_projection_keeps_and_does_not(method, rule, limit, peft_type):
    inputs = make_inputs()
    inputs["projection"]["method"], inputs["adapter_config"]["peft_type"] = method, peft_type
    if peft_type != "L2P" or method == "frozen":
        inputs["projection"]["a.keys"]["role"] = "all"
    card = render(inputs)
    check_as_a_reader(card)
    (told,) = [line for line in card.text.splitlines() if line.startswith("From the second task on")]
    limits = card.text.partition("## Limits")[2]
    assert rule in told and limit in limits
    assert ("keys moved" in told) == (peft_type == "L2P" and method != "frozen")
    assert ("never moves" in told or "never move." in told) == (peft_type != "L2P")
    assert ("linear head is not projected" in limits) == (peft_type != "CLIP_PROMPT" and method != "frozen")
    inputs["projection"] |= {"apply_to": "gradient", "key_energy": None}
    del inputs["projection"]["a.keys"]
    text = render(inputs).text
    assert "the gradients of the prompts" in text and "keys moved" not in text
    assert ("lead out of the null space" in text) == (method != "frozen")


@pytest.mark.parametrize("rule", ["pgp", "frozen"])
@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({"peft_type": "CLIP_PROMPT", "text_length": 4, "image_length": 0}, " The text context of a finished task"),
        ({"peft_type": "DUALPROMPT", "general_length": 0, "pool_size": 3}, " The expert prefixes of a finished task"),
    ],
)
def test_a_projection_that_has_nothing_to_protect_says_so(config, own, rule):
    """The card goes by the bases, whatever projection was asked for."""
    inputs = make_inputs()
    inputs["adapter_config"] = {"base_model_name_or_path": "a/b", "head": "linear", **config}
    inputs["projection"] = {"method": rule, "energy": 0.5, "apply_to": "gradient"}
    inputs["results"] |= {"projection": rule, "projection_rank": [0, 0, 0]}
    card = render(inputs)
    check_as_a_reader(card)
    told = f"No update was projected: the adapter has nothing that the projection (`{rule}`) protects.{own}"
    assert f"\n\n{told}" in card.text
    assert f'**Projection:** `method="{rule}"`, `energy=0.5`, `apply_to="gradient"`; without effect\n' in card.text
    for claim in ("were projected", "## Projection", "Rank", "rank", "The projection", "not projected:", "energies"):
        assert claim not in card.text, claim
    assert "image prompt" not in card.text and "general" not in card.text
    name, _ = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == f"{config['peft_type'].lower().replace('_', '-')}-cifar100"


@pytest.mark.parametrize(("peft_type", "by_keys"), [("L2P", True), ("DUALPROMPT", True), ("CLIP_PROMPT", False)])
def test_only_pools_with_keys_select_prompts(peft_type, by_keys):
    inputs = make_inputs()
    inputs["adapter_config"]["peft_type"], inputs["projection"] = peft_type, None
    text = render(inputs).text
    rule = ": only the selection of prompts by their keys keeps tasks apart" if by_keys else ""
    assert f"Updates were not projected{rule}." in text
    assert f"**Prompts:** {'chosen for each image alone' if by_keys else 'the same for every image'}; batch" in text


# ---- other methods ---------------------------------------------------------------------------------------------------

METHOD = {
    "name": "ewc",
    "settings": {"strength": 100.0, "kind": "diagonal"},
    "state": {},
    "card": {
        "title": "Elastic weight consolidation (EWC)",
        "sentence": "a penalty held each weight near its old value, the more it mattered to older tasks",
        "limits": ["It assumes that weights matter independently of each other."],
        "citation": "Kirkpatrick et al.,\n  PNAS 2017",
    },
}


def of_method(method: dict, **projection) -> dict:
    """Arguments of `render_card` for a run of a method other than projected prompts."""
    inputs = make_inputs()
    inputs["projection"] = {"method": "none", **projection}
    inputs["results"] |= {"method": method["name"], "projection": "none", "projection_rank": [0, 0, 0]}
    return {**inputs, "method": method}


def test_another_method_is_told_by_its_own_words():
    card = render(of_method(METHOD))
    check_as_a_reader(card)
    intro, _, rest = card.text.partition("## Use")
    section = rest.partition("## Learning method\n")[2].partition("## Protocol")[0].strip()
    assert "They were trained with **Elastic weight consolidation (EWC)** on a stream of 3 tasks" in intro
    assert section == (
        "A penalty held each weight near its old value, the more it mattered to older tasks.\n\n"
        '- **Method:** `ewc` (`strength=100.0`, `kind="diagonal"`)\n'
        "- **Citation:** Kirkpatrick et al., PNAS 2017"
    )
    assert (
        "\n- It assumes that weights matter independently of each other.\n"
        in card.text.partition("## Limits")[2] + "\n"
    )
    assert "project" not in card.text.lower()
    assert "without keeping old images" not in card.text  # the method may keep some
    assert model_index_to_eval_results(card.data.to_dict()["model-index"])[0] == "l2p-ewc-cifar100"


def test_a_method_of_few_words():
    for method in (
        {"name": "own"},
        {"name": "own", "settings": {}, "card": {"title": "", "sentence": "", "limits": []}},
    ):
        card = render(of_method(method))
        check_as_a_reader(card)
        assert "trained with **own** on" in card.text and "**Method:** `own`\n" in card.text
        assert "Citation" not in card.text


def test_what_an_adapter_keeps_is_told_with_any_method():
    inputs = of_method(METHOD)
    inputs["adapter_config"]["peft_type"] = "DUALPROMPT"
    assert "to older tasks. The expert prefixes of a finished task never move.\n" in render(inputs).text


def test_the_bases_of_another_method_are_shown():
    base = {"shape": [50, 48], "batch_dims": 0, "rank": 11, "energy": 0.5, "role": "prompt", "samples": 900}
    inputs = of_method(METHOD, energy=0.5, **{"a.weight": base})
    inputs["results"]["projection_rank"] = [4, 9, 11]
    card = render(inputs)
    check_as_a_reader(card)
    assert ["`a.weight`", "11 of 48", "0.5", "900"] in table_rows(card) and "Rank: largest" in card.text
    assert '**Projection:** `method="none"`, `energy=0.5`\n' in card.text and "PGP" not in card.text


def test_a_revision_of_another_method_continues_with_its_trainer():
    inputs = of_method(METHOD)
    inputs["results"]["accuracy_matrix"] = MATRIX[:1]
    assert "`StreamTrainer(...).train(resume_from_checkpoint=" in render(inputs).text
    assert "`PGPTrainer(...).train(resume_from_checkpoint=" in render({**inputs, "method": None}).text


def test_projected_prompts_are_told_by_their_bases_as_before_there_were_methods():
    method = {"name": "projected_prompts", "settings": {}, "card": {"title": "T", "sentence": "S", "limits": ["L"]}}
    assert str(render({**make_inputs(), "method": method})) == str(render(make_inputs()))


def test_a_saved_card_reads_the_method_in_its_folder(tmp_path):
    inputs = of_method(METHOD)
    del inputs["method"]
    (tmp_path / "method.json").write_text(json.dumps(METHOD), encoding="utf-8")
    text = model_card.save_card(tmp_path / "README.md", **inputs).read_text(encoding="utf-8")
    assert "**Elastic weight consolidation (EWC)**" in text
    given = {"name": "other", "settings": {}, "card": {"title": "Another", "sentence": "s", "limits": []}}
    text = model_card.save_card(tmp_path / "README.md", **inputs, method=given).read_text(encoding="utf-8")
    assert "**Another**" in text and "Elastic" not in text


# ---- whole models and LoRA -------------------------------------------------------------------------------------------

BASE = "google/vit-base-patch16-224-in21k"
LINK = f"[`{BASE}`](https://huggingface.co/{BASE})"
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["value", "query"], "bias": "none", "rank_pattern": {}}
UNHELD = "features of old images stay as they were only as far as the method holds them."


def of_model(what: str, method: str | dict = "fine_tuning", base: str | None = BASE, **lora) -> dict:
    """Arguments of `render_card` for a run in which `what` has learned, as `results.json` calls it."""
    if isinstance(method, str):
        made = create(method)
        method = {"name": method, "settings": made.settings(), "card": asdict(made.describe())}
    inputs = of_method(method)
    inputs["results"]["model"] = what
    named = {} if base is None else {"base_model_name_or_path": base}
    whole = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "id2label": {}}
    inputs["adapter_config"] = {**({**LORA, **lora} if what.startswith("lora") else whole), **named}
    return inputs


@pytest.mark.parametrize("adjusts", [True, False])
def test_scores_that_lack_the_methods_correction_say_so(adjusts):
    text = render(of_method({**METHOD, "adjusts_logits": adjusts})).text
    assert ("These are the scores of the model alone" in text) == adjusts


@pytest.mark.parametrize("method", ["fine_tuning", "ewc", "derpp", "bic"])
@pytest.mark.parametrize(
    ("what", "opening", "library", "limits"),
    [
        ("full", f"{LINK}, trained whole with", "transformers", [f"All tasks share all parameters: {UNHELD}", "against a classifier on the features that it started with"]),
        ("last:1", f"{LINK}, trained in its last block and its head with", "transformers", [f"All tasks share the block that learns: {UNHELD}"]),
        ("last:2", f"{LINK}, trained in its last 2 blocks and its head with", "transformers", [f"All tasks share the blocks that learn: {UNHELD}"]),
        ("head", f"{LINK}, trained in its head alone with", "transformers", ["Only the head learns: it can do little about"]),
        ("lora:8", f"An adapter for the frozen {LINK}: PEFT's LoRA of rank 8 on queries and values (`query`, `value`), and a head. It was trained with", "peft", [f"All tasks share the adapter: {UNHELD}", "against a classifier on the frozen features"]),
    ],
)  # fmt: skip
def test_what_has_learned_is_told(what, opening, library, limits, method):
    inputs = of_model(what, method)
    card = render(inputs, processor=PROCESSOR)
    check_as_a_reader(card)
    title, whole = inputs["method"]["card"]["title"], not what.startswith("lora")
    stored = "stored as a model of [transformers](" if whole else "is stored as a [PEFT]("
    assert f"\n{opening} **{title}** on a stream of 3 tasks, one after the other, and {stored}" in card.text
    for limit in limits:
        assert f"{limit}" in card.text.partition("## Limits")[2], limit
    for part in ("`None`", "prompts", "Prompts", "keys", "Updates were", "without keeping old images", "CLS"):
        assert part not in card.text, part
    kept = re.findall("rehearsal-free|kept [0-9]+ images", card.text)
    assert kept == (["rehearsal-free", "kept 0 images"] if method in ("bic", "derpp") else [])
    assert ("frozen" in card.text) == (what != "full") and ("PEFT" in card.text) == (not whole)
    assert (
        "**Head:** the model's " + ("own `classifier`, which" if whole else "`classifier`, trained with") in card.text
    )

    data = ModelCard(str(card)).data
    kind = what.replace(":", "-") if whole else "lora"
    assert (data.library_name, data.base_model) == (library, BASE)
    assert kind in data.tags and "prompt-tuning" not in data.tags
    name, _ = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == f"{kind}-{method.replace('_', '-')}-cifar100"


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("full", ""),
        ("head", " All its other parameters are frozen."),
        ("last:1", " Whatever lies between this block and the head learned as well; all parameters before it are frozen."),
        ("last:3", " Whatever lies between these blocks and the head learned as well; all parameters before them are frozen."),
    ],
)  # fmt: skip
def test_what_is_frozen_of_a_whole_model_is_told(what, frozen):
    assert f" made with `pgp_hf`.{frozen}\n" in render(of_model(what)).text


@pytest.mark.parametrize(
    ("base", "opening"),
    [
        (BASE, LINK),
        ("/home/someone/secret/vit-x", "`vit-x`"),
        ("vit-x", "`vit-x`"),  # what a path was reduced to
        ("pgp_hf:embedded-vit", "`pgp_hf:embedded-vit`, a small backbone inside the package"),
        (None, "A `ViTForImageClassification` built in memory"),
    ],
)
def test_a_whole_model_needs_no_backbone_and_may_have_its_license(base, opening):
    card = render(of_model("full", base=base), processor=PROCESSOR)
    check_as_a_reader(card)
    assert f"\n{opening}, trained whole with" in card.text
    assert "secret" not in str(card) and "someone" not in str(card)
    assert 'load_pretrained("path/to/this/folder")' in card.text and "insert its path" not in card.text
    for part in ("backbone=", "embedded.resolve", "PeftModel", "import pgp_hf"):
        assert part not in card.text, part
    assert card.data.license is None and "\nlicense" not in str(card)  # nobody has chosen one
    assert card.data.base_model == (base if base == BASE else None)
    derived = f"derive from those of {opening}, whose license applies to them as well"
    assert (derived in card.text) == (base is not None)


@pytest.mark.parametrize("what", ["full", "last:2", "head", "lora:8"])
def test_tasks_learned_as_one_are_not_said_to_share_anything(what):
    inputs = of_model(what, "joint")
    inputs["results"]["accuracy_matrix"] = [[N] * 3, [N] * 3, MATRIX[2]]
    card = render(inputs)
    check_as_a_reader(card)
    assert "on the 3 tasks of a stream, learned as one, and" in card.text
    assert "All tasks share" not in card.text and "old images" not in card.text


@pytest.mark.parametrize("architectures", [None, [], ["a `b`"], [7]])
def test_a_whole_model_without_any_name(architectures):
    inputs = of_model("full", base=None)
    inputs["adapter_config"]["architectures"] = architectures
    assert "\nA model built in memory, trained whole with" in render(inputs).text


@pytest.mark.parametrize(
    ("base", "place"),
    [
        (BASE, f'"{BASE}"'),
        ("/b/vit-x", '"path/to/vit-x"'),
        ("pgp_hf:embedded-vit", 'embedded.resolve("pgp_hf:embedded-vit")'),
        (None, '"path/to/the-backbone"'),
    ],
)
def test_a_whole_model_without_an_image_processor_takes_another(base, place):
    card = render(of_model("full", base=base))
    check_as_a_reader(card)
    assert card.text.count(f"processor = AutoImageProcessor.from_pretrained({place}, ") == 2
    assert 'load_pretrained("path/to/this/folder", processor=processor)' in card.text
    assert card.text.count("from pgp_hf import embedded") == (2 if base and ":" in base else 0)
    assert ("insert the path of a processor" in card.text) == ("path/to" in place)


@pytest.mark.parametrize(
    ("what", "repo_id", "told"), [("full", None, True), ("full", "me/run", False), ("lora:8", None, False)]
)
def test_weights_that_may_go_are_promised_only_where_they_stay(what, repo_id, told):
    inputs = of_model(what)
    assert "save_full_weights" not in render(inputs, repo_id=repo_id).text  # the last task's stay
    inputs["results"]["accuracy_matrix"] = MATRIX[:2]
    card = render(inputs, repo_id=repo_id)
    check_as_a_reader(card)
    assert ("`model.safetensors` may be gone from this folder" in card.text) == told
    assert "`StreamTrainer(...).train(resume_from_checkpoint=" in card.text


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({"target_modules": ["v_proj", "q_proj"], "r": 2}, "LoRA of rank 2 on queries and values (`q_proj`, `v_proj`), and a head."),
        ({"target_modules": ["query", "dense"]}, "LoRA of rank 8 on the layers `dense`, `query`, and a head."),
        *(
            (unusual, "`LORA`, with the settings in `adapter_config.json`.")
            for unusual in (
                {"target_modules": ".*query"}, {"target_modules": ["a `b`"]}, {"target_modules": None}, {"r": None},
                {"rank_pattern": {"query": 4}}, {"bias": "all"}, {"use_dora": True}, {"layers_to_transform": [1]},
            )
        ),
    ],
)  # fmt: skip
def test_lora_is_told_as_far_as_a_sentence_can(lora, parts):
    text = render(of_model("lora:8", **lora)).text
    assert f": PEFT's {parts} It was trained with" in text
    assert (
        f'"{BASE}", dtype=torch.float32, num_labels=6, ignore_mismatched_sizes=True\n' in text
        and "import pgp_hf  #" not in text
    )


# ---- other adapters and scenarios ------------------------------------------------------------------------------------


class ForeignConfig(PromptConfig):
    """Of a prompt adapter that says nothing of itself."""

    method_name = "FOREIGN"


class TalkativeConfig(PromptConfig):
    """Of a prompt adapter that does."""

    method_name = "TALKATIVE"

    @classmethod
    def card(cls, settings):
        return AdapterCard(f"{settings['words']} words", selects=True, head="ridge", finished="No word is taken back.")


@pytest.mark.parametrize("head", ["linear", "statistics"])
@pytest.mark.parametrize(
    ("peft_type", "opening"),
    [
        ("FOREIGN", "Prompts for the frozen `b`: those of the adapter `FOREIGN`, with the settings in `adapter_config.json`. They"),
        ("IA3", "An adapter for the frozen `b`: PEFT's `IA3`, with the settings in `adapter_config.json`. It"),
        ("NOT_REGISTERED", "An adapter for the frozen `b`: PEFT's `NOT_REGISTERED`, with the settings in"),
    ],
)  # fmt: skip
def test_an_adapter_that_says_nothing_gets_a_plain_card(monkeypatch, peft_type, opening, head):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "FOREIGN", ForeignConfig)
    inputs = make_inputs()
    inputs["projection"] = None
    inputs["adapter_config"] = {
        "base_model_name_or_path": "/b",
        "peft_type": peft_type,
        "head": head,
        "shrinkage": 0.1,
    }
    card = render(inputs)
    check_as_a_reader(card)
    assert f"\n{opening}" in card.text and "Updates were not projected.\n" in card.text
    expected = {
        "linear": "trained with the adapter\n",
        "statistics": "class statistics of the features that the trained head reads: the mean",
    }
    assert f"**Head:** {expected[head]}" in card.text
    for claim in ("**Prompts:**", "by their keys", "linear head", "CLS"):
        assert claim not in card.text, claim
    assert ("prompt-tuning" in card.data.tags) == ("prompts can do little" in card.text) == (peft_type == "FOREIGN")


def test_an_adapter_from_elsewhere_speaks_for_itself(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "TALKATIVE", TalkativeConfig)
    inputs = make_inputs()
    inputs["adapter_config"] |= {"peft_type": "TALKATIVE", "words": 7}
    text = render(inputs).text
    assert ": 7 words. They were" in text and "**Head:** ridge\n" in text and "No word is taken back.\n" in text
    assert "**Prompts:** chosen for each image alone" in text


@pytest.mark.parametrize("task_known", [True, False])
def test_a_registered_scenario_needs_no_sentence_of_the_cards(monkeypatch, task_known):
    scenario = Scenario("blurry", title="blurred task borders", help="", task_known=task_known)
    monkeypatch.setitem(SCENARIOS, "blurry", scenario)
    inputs = make_inputs()
    inputs["results"]["scenario"] = "blurry"
    card = render(inputs)
    assert "**Scenario:** blurred task borders\n" in card.text and "blurry" in card.data.tags
    assert ("the task of each test image is given" in card.text) == task_known
    assert ("`predict` does not take a task" in card.text) == task_known


@pytest.mark.parametrize("rows", [1, 2])
def test_a_revision_in_the_middle_of_the_stream(rows):
    inputs = make_inputs(MATRIX[:rows] + [[N] * 3] * (3 - rows))
    text = render(inputs).text
    assert f"**This is the revision after task {rows} of 3**" in text
    assert [row[0] for row in table_rows(render(inputs)) if "name" in row[1]] == [str(i + 1) for i in range(rows)]
    assert f"it knows {2 * rows} of the 6 classes" in text
    assert 'train(resume_from_checkpoint="path/to/this/folder")' in text and "revision=" not in text
    assert text == render({**inputs, "results": inputs["results"] | {"accuracy_matrix": MATRIX[:rows]}}).text
    card = render(inputs, repo_id="me/run")
    check_as_a_reader(card)
    assert card.text.count(f'"me/run", revision="task-{rows}"') == 2  # and once more for a saved processor
    assert render(inputs, repo_id="me/run", processor={}).text.count(f'"me/run", revision="task-{rows}"') == 3
    assert f'train(resume_from_checkpoint="me/run@task-{rows}")' in card.text
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert found[0].dataset_name == f"Split cifar100 (3 tasks, class-incremental, after task {rows})"
    assert found[0].metric_args["after_task"] == rows


def test_the_last_revision_is_pinned_too_and_has_nothing_to_go_on_with():
    text = render(make_inputs(), repo_id="me/run").text
    assert 'load_pretrained("me/run", revision="task-3")' in text and "resume_from_checkpoint" not in text


def test_a_pinned_backbone_stays_pinned():
    inputs = make_inputs()
    inputs["adapter_config"]["revision"] = "abc123"
    assert '.from_pretrained("google/vit-base-patch16-224-in21k", revision="abc123", dtype=' in render(inputs).text


def test_the_backbone_is_loaded_in_the_precision_of_the_training():
    inputs = make_inputs()
    assert "dtype=torch.float32)" in render(inputs).text
    inputs["results"]["sha256"] = {"adapter_model.safetensors": "0" * 64, "backbone.bfloat16": "0" * 64}
    assert "dtype=torch.bfloat16)" in render(inputs).text


def test_one_task():
    card = render(make_inputs([[88.5]], num_tasks=1))
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_value for result in found] == [88.5, 0.0]
    check_as_a_reader(card)
    assert "2 classes in 1 task\n" in card.text and "1 tasks" not in card.text


def test_what_is_null_was_not_measured_and_stays_out_of_the_index():
    inputs = make_inputs()
    inputs["results"] |= {
        "accuracy_matrix": [[90.0, N, N], [N, 95.0, N], [85.0, N, 70.0]],
        "forgetting": None,
        "backward_transfer": float("nan"),
        "drift": [0.0, None],
        "projection_rank": [],
        "train_images_per_second": None,
        "seconds": {},
        "versions": {},
    }
    inputs["manifest"] |= {"label_names": [], "tasks": [], "dataset": {"name": None}}
    card = render(inputs)
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_name for result in found] == ["Average accuracy"]
    check_as_a_reader(card)
    assert ["76.67", "not measured", "12.50", "–", "85.00", "not measured"] in table_rows(card)
    assert ["2", "–", "– / –", "95.0", "not measured", "87.5", "not measured"] in table_rows(card)
    assert "unnamed dataset" in card.text


def goes_on(matrix, **results) -> dict:
    """A run without the old test images."""
    tasks = len(matrix)
    inputs = make_inputs([[50.0] * tasks] * tasks, num_tasks=tasks)
    drift = [None if i and row[:i] == [None] * i else 0.01 * i for i, row in enumerate(matrix)]
    inputs["results"] |= {"accuracy_matrix": matrix, **metrics.summarize(matrix, tasks), "finished_tasks": tasks}
    inputs["results"] |= {"drift": drift, **results}
    return inputs


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("matrix", "run", "tasks"),
    [
        ([[90.0, N, N], [80.0, 95.0, N], [N, N, 70.0]], [N, N, 85.0, N], [[90, N, 90], [95, N, 87.5], [70, 70, N]]),
        ([[90.0, N], [80.0, N]], [N, 10.0, N, 0.01], [[90, 80, 90], [N, N, N]]),
        ([[N]], [N, 0.0, N, 0.0], [[N, N, N]]),
        ([[88.5]], [88.5, 0.0, 88.5, 0.0], [[88.5, 88.5, 88.5]]),
    ],
)
def test_what_was_not_measured_is_said_and_stays_out_of_the_index(matrix, run, tasks, heads):
    inputs = two_heads(goes_on(matrix)) if heads else goes_on(matrix)
    if heads:
        changed = [None if value is None else value / 2 for value in inputs["results"]["drift"]]
        inputs["results"]["changed_selections"] = changed
    card = render(inputs)
    check_as_a_reader(card)

    def shown(value, digits):
        return "not measured" if value is None else f"{value:.{digits}f}"

    first, second = tables(card)[:2]
    row = dict(zip(first[0], first[1], strict=True))
    digits = {"Average accuracy": 2, "Forgetting": 2, "Learning accuracy": 2, "Drift": 3}
    assert [row[title] for title in digits] == [shown(value, n) for value, n in zip(run, digits.values(), strict=True)]
    for own, expected in zip(second[1:], tasks, strict=True):
        assert own[3:6] == [shown(value, 1) for value in expected]
    gaps = any(None in row[: i + 1] for i, row in enumerate(matrix))
    assert ("Not measured: this needs test images" in card.text) is gaps
    index = card.data.to_dict().get("model-index")
    found = model_index_to_eval_results(index)[1] if index else []
    measured = {name: value for name, value in zip(("accuracy", "forgetting"), run, strict=False) if value is not None}
    assert {result.metric_type: result.metric_value for result in found} == measured


ORIGIN = {"repo": "me/first", "revision": "task-2", "commit": "0123456789abcdef", "tasks": 2}


def test_a_run_that_goes_on_names_and_links_what_it_continues():
    inputs = goes_on([[90.0, N, N], [80.0, 95.0, N], [N, N, 70.0]], continues=ORIGIN)
    card = render(inputs, repo_id="me/second")
    check_as_a_reader(card)
    hub = "https://huggingface.co/me/first"
    assert (
        f"\n\nContinues [`me/first`]({hub}) at [`task-2`]({hub}/tree/task-2) "
        f"(commit [`0123456`]({hub}/commit/0123456789abcdef)); the revisions of the first 2 tasks are linked"
    ) in card.text
    assert [row[0] for row in tables(card)[1][1:]] == [f"[1]({hub}/tree/task-1)", f"[2]({hub}/tree/task-2)", "3"]
    assert "Continues" not in render(make_inputs()).text
    # a run that goes on from one that went on: each task is linked where it was pushed
    inputs["results"]["continues"] = {
        **ORIGIN,
        "continues": {**ORIGIN, "repo": "you/zero", "commit": None, "tasks": 1},
    }
    links = [row[0] for row in tables(render(inputs))[1][1:]]
    assert links == ["[1](https://huggingface.co/you/zero/tree/task-1)", f"[2]({hub}/tree/task-2)", "3"]


@pytest.mark.parametrize("repo", [None, "/home/somebody/secret/run", "C:\\somebody\\run"])
def test_a_local_run_that_is_continued_is_not_linked(repo):
    inputs = goes_on(
        [[90.0, N], [N, 95.0]], continues={"repo": repo, "revision": "task-1", "commit": None, "tasks": 1}
    )
    text = render(inputs).text
    named = " named `run`" if repo else ""
    assert f"\n\nContinues an earlier run, from a local folder{named}, at `task-1`.\n" in text
    assert "somebody" not in text and [row[0] for row in tables(render(inputs))[1][1:]] == ["1", "2"]


def appended(inputs: dict, tasks: dict[int, dict]) -> dict:
    """The same run, some of whose tasks were appended from datasets of their own."""
    for t, source in tasks.items():
        inputs["manifest"]["tasks"][t]["source"] = source
    return inputs


def test_datasets_of_appended_tasks_are_named():
    source = {"dataset": {"name": "me/photos"}, "test_fraction": 0.2}
    card = render(appended(make_inputs(), {2: source}))
    check_as_a_reader(card)
    photos = "[me/photos](https://huggingface.co/datasets/me/photos)"
    known = "[uoft-cs/cifar100](https://huggingface.co/datasets/uoft-cs/cifar100)"
    assert f"- **Data:** {known}, {photos}, 6 classes in 3 tasks; limits and shares held out differ" in card.text
    assert "given, then as the tasks arrived;" in card.text
    assert card.data.datasets == ["uoft-cs/cifar100", "me/photos"]
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {(result.dataset_type, result.dataset_name.split(" (")[0]) for result in found} == {
        ("other", "Split cifar100 and photos")
    }
    inputs = appended(make_inputs(), {t: source for t in range(3)})  # a stream that began with nothing
    inputs["manifest"]["dataset"]["name"] = None
    card = render(inputs)
    assert f"- **Data:** {photos}, 6 classes in 3 tasks; 20 % of the images held out for testing\n" in card.text
    assert "**Class order:** as the tasks arrived;" in card.text and card.data.datasets == ["me/photos"]


def test_new_images_of_a_known_class_and_names_without_images():
    inputs = make_inputs()
    inputs["manifest"] |= {"num_classes": 9, "label_names": [f"name {c}" for c in range(9)]}
    inputs["manifest"]["tasks"][2] |= {"classes": [5, 1], "new_classes": [1]}
    text = render(inputs).text
    assert "5 classes in 3 tasks" in text and "- It knows 5 classes, and" in text
    assert "(1, 9): one column per class" in text
    inputs = make_inputs([[50.0]], num_tasks=1)
    inputs["manifest"]["tasks"][0]["classes"] = [1]
    text = render(inputs).text
    assert "1 class in 1 task\n" in text and "- It knows 1 class, and" in text and "1 classes" not in text


@pytest.mark.parametrize("heads", [False, True])
def test_tasks_learned_as_one_are_compared_with_nothing(heads):
    inputs = make_inputs([[N, N, N], [N, N, N], [85.0, 75.0, 70.0]])
    inputs["results"] |= {"drift": [0.0] * 3, "projection_rank": [0] * 3, "compensate_drift": True}
    inputs["adapter_config"] |= {"peft_type": "DUALPROMPT", "general_layers": [0], "expert_layers": [2]}
    inputs["adapter_config"] |= {"general_length": 5, "expert_length": 20}
    inputs = two_heads(inputs) if heads else inputs
    inputs["projection"], inputs["results"]["projection"] = {"method": "none"}, "none"
    card = render({**inputs, "method": METHOD})
    check_as_a_reader(card)
    run, task = tables(card)
    assert run[0][-1] == "Average accuracy" and len(run) == 2 + heads and {len(row) for row in run} == {1 + heads}
    assert run[1][-1] == "76.67"
    assert task[0] == ["Task", "Classes", "Train / test images", "Accuracy"]
    assert task[1:] == [
        ["1", "name 5, name 4", "100 / 20", "85.0"],
        ["2", "name 3, name 2", "101 / 21", "75.0"],
        ["3", "name 1, name 0", "102 / 22", "70.0"],
    ]
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [(result.metric_type, result.metric_value) for result in found] == [("accuracy", 76.67)]
    assert "on the 3 tasks of a stream, learned as one, and are stored" in card.text
    assert ("Accuracies are those of the statistics head.\n" in card.text) is heads
    for word in ("one after the other", "orgetting", "drift", "finished task", "older classes", "stay as they were"):
        assert word not in card.text, word


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/someone/secret/vit-x", "vit-x"),
        ("/home/someone/secret/vit-x/", "vit-x"),
        ("C:\\Users\\someone\\secret\\vit-x", "vit-x"),
        ("./secret/vit-x", "vit-x"),
        ("../secret/vit-x", "vit-x"),
        ("~/secret/vit-x", "vit-x"),
        ("secret/deep/vit-x", "vit-x"),
        ("file:///home/someone/secret/vit-x", "vit-x"),
        ("/", "unnamed"),
        ("..", "unnamed"),
    ],
)
def test_local_paths_never_enter_a_card(path, shown):
    inputs = make_inputs()
    inputs["adapter_config"]["base_model_name_or_path"] = path
    inputs["manifest"]["dataset"]["name"] = path
    card = render(inputs, repo_id=path)
    assert "secret" not in str(card) and "someone" not in str(card)
    assert card.data.base_model is None and card.data.datasets is None
    check_as_a_reader(card)
    assert f"`{shown}`" in card.text and f'backbone="path/to/{shown}"' in card.text
    assert '"path/to/this/folder"' in card.text and "revision=" not in card.text
    assert f"a local folder named `{shown}`: insert its path" in card.text


def test_an_existing_relative_folder_is_local_too(tmp_path, monkeypatch):
    (tmp_path / "secret" / "vit-x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    inputs = make_inputs()
    inputs["adapter_config"]["base_model_name_or_path"] = "secret/vit-x"  # has the form of a Hub id
    card = render(inputs)
    assert "secret" not in str(card) and card.data.base_model is None


@pytest.mark.parametrize("base", [None, ""])
def test_a_backbone_without_a_name(base):
    inputs = make_inputs()
    inputs["adapter_config"]["base_model_name_or_path"] = base
    card = render(inputs)
    assert (
        card.data.base_model is None
        and 'backbone="path/to/the-backbone"' in card.text
        and "for a frozen backbone without a name:" in card.text
        and "``" not in card.text.replace("```", "")
    )


def test_names_cannot_break_the_table_or_the_metadata(tmp_path):
    inputs = make_inputs()
    inputs["manifest"]["label_names"] = ["a|b", "<b>", "{{ x }}", "line\nbreak", "`c`", "---"]
    inputs["manifest"]["dataset"]["name"] = "my: 'data' # {x}"
    path = model_card.save_card(tmp_path / "README.md", **inputs)
    card = ModelCard.load(path)
    tables(card)
    assert r"a\|b" in card.text and "&lt;b>" in card.text and "{{ x }}" in card.text and "line break" in card.text
    found = model_index_to_eval_results(card.data.to_dict()["model-index"])[1][0]
    assert found.dataset_type == "other" and "my: 'data' # {x}" in found.dataset_name


def test_many_classes_and_long_names_are_cut_short():
    inputs = make_inputs()
    inputs["manifest"]["tasks"][0]["classes"] = list(range(6)) * 2
    assert "name 0, name 1, name 2, name 3, name 4 and 7 more" in render(inputs).text
    inputs["manifest"]["label_names"][:2] = ["pine_tree", "tench, Tinca tinca, and a name without any end"]
    assert "| pine_tree; tench, Tinca tinca, and a name…; name 2; name 3; name 4 and 7 more |" in render(inputs).text


def test_figures_are_those_that_save_figures_writes():
    inputs = make_inputs()
    shown = lambda card: re.findall(r"\]\(figures/(.*?)\)", card.text)  # noqa: E731
    assert shown(render(inputs)) == [
        "accuracy_matrix.png",
        "task_curves.png",
        "forgetting_by_task.png",
        "stability.png",
    ]
    inputs["results"]["prompt_usage"] = [[1, 2]] * 3
    assert shown(render(inputs)) == plots.figure_names(inputs["results"])
    for figures in ([], ["prompt_usage.png"], ["stability.png", "other.png"]):
        card = render(inputs, figures=figures)
        check_as_a_reader(card)
        assert shown(card) == [name for name in figures if name != "other.png"]


def test_a_saved_card_goes_by_what_lies_beside_it(tmp_path):
    inputs = make_inputs()
    inputs["results"]["prompt_usage"] = [[1, 2]] * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    plots.save_figures(inputs["results"], tmp_path / "figures")
    (tmp_path / "figures" / "prompt_usage.png").unlink()
    text = model_card.save_card(tmp_path / "README.md", **inputs).read_text(encoding="utf-8")
    named = re.findall(r"\]\((figures/.*?)\)", text)
    assert len(named) == 4 and all((tmp_path / name).is_file() for name in named)
    assert "resized to 224 × 192 pixels (bicubic)" in text
    assert 'AutoImageProcessor.from_pretrained("path/to/this/folder"' in text
    (tmp_path / "preprocessor_config.json").unlink()
    text = model_card.save_card(tmp_path / "README.md", **inputs).read_text(encoding="utf-8")
    assert 'AutoImageProcessor.from_pretrained("google/vit-base-patch16-224-in21k"' in text


def test_inputs_are_left_alone_and_survive_json():
    inputs = make_inputs()
    before = copy.deepcopy(inputs)
    card = str(render(inputs))
    assert inputs == before
    assert str(render(json.loads(json.dumps(inputs)))) == card


@pytest.mark.parametrize(
    ("which", "key", "value", "message"),
    [
        ("results", "accuracy_matrix", None, "results has no 'accuracy_matrix'"),
        ("results", "scenario", "domain", "'domain'"),
        ("results", "eval_mask", "some", "'some'"),
        ("manifest", "num_classes", None, "manifest has no 'num_classes'"),
        ("adapter_config", "peft_type", None, "adapter_config has no 'peft_type'"),
    ],
)
def test_bad_input_is_named_and_an_old_card_stays(tmp_path, which, key, value, message):
    path = model_card.save_card(tmp_path / "README.md", **make_inputs())
    before = path.read_bytes()
    inputs = make_inputs()
    inputs[which][key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        model_card.save_card(path, **inputs)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_template_of_the_wheel_comes_first_and_a_missing_one_is_named(tmp_path, monkeypatch):
    package = tmp_path / "site" / "pgp_hf"
    package.mkdir(parents=True)
    monkeypatch.setattr(model_card, "__file__", str(package / "report" / "card.py"))
    with pytest.raises(FileNotFoundError, match="template is missing.*Reinstall"):
        render(make_inputs())
    (tmp_path / "site" / "model_cards").mkdir()
    (tmp_path / "site" / "model_cards" / "template.md").write_text(
        "---\n{{ card_data }}\n---\nsource", encoding="utf-8"
    )
    assert render(make_inputs()).text.strip() == "source"
    (package / "model_card_template.md").write_text("---\n{{ card_data }}\n---\nwheel", encoding="utf-8")
    assert render(make_inputs()).text.strip() == "wheel"


def test_the_code_for_an_embedded_backbone_runs_as_it_stands(tmp_path, monkeypatch):
    """The others are in `test_card_code.py`."""
    import tiny
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from pgp_hf import embedded

    base = AutoModelForImageClassification.from_pretrained(embedded.vit_path(), num_labels=6)
    model = tiny.model(base=base)
    folder = tmp_path / "path" / "to" / "this" / "folder"
    model.save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(embedded.vit_path(), backend="pil")
    inputs = make_inputs()
    inputs["adapter_config"] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    text = model_card.save_card(folder / "README.md", **inputs).read_text(encoding="utf-8")
    predict, peft = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert str(tmp_path) not in text and str(embedded.vit_path().parent) not in text

    monkeypatch.chdir(tmp_path)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.save("photo.jpg")
    names: dict = {}
    exec(compile(peft, "peft", "exec"), names)
    pixels = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(names["scores"], model(pixel_values=pixels).logits)
    assert not names["model"].training and names["scores"].shape == (1, 6) and "(1, 6)" in peft
    assert 'load_pretrained("path/to/this/folder")' in predict


def test_the_head_of_tasks_learned_as_one_and_of_methods_that_compute_scores():
    adapter, statistics = AdapterCard("parts", head="its own"), {"head": "statistics", "shrinkage": 0.1}
    assert "when their task ended and never refreshed" in describe_head(adapter, statistics, False)
    as_one = describe_head(adapter, statistics, False, as_one=True)
    assert "of all tasks at the end" in as_one and "their task ended" not in as_one
    method = {"name": "der_mcg", "card": {"title": "DER", "shared": False}, "adjusts_logits": True}
    learning = describe_learning({}, adapter, None, method)
    assert describe_head(adapter, {}, False, learning) == "one for each expert; the method computes the final scores"
    plain = describe_learning({}, adapter, None, {**method, "card": {}, "adjusts_logits": False})
    assert describe_head(adapter, {}, False, plain) == "its own"
    assert create("der_mcg").describe().shared is False and create("icarl").describe().shared is True


def test_calibration_is_told_where_it_was_measured():
    inputs = make_inputs()
    assert "calibrated" not in render(inputs).text
    inputs["results"]["calibration_error"] = {"before": 0.1234, "after": 0.0321}
    card = render(inputs)
    check_as_a_reader(card)
    assert (
        "share of right answers by 3.2 points on average, and did so by 12.3 before they were calibrated." in card.text
    )
