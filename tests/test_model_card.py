"""The card: metadata that the Hub parses, true statements, no path of the training machine, a snippet that runs."""

from __future__ import annotations

import copy
import json
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from pgp_hf import metrics, model_card

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
            "drift": [0.0, 0.0123, 0.02][:rows],
            "projection_rank": [4, 9, 11][:rows],
            "train_images_per_second": 123.456,
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
            "class_order": list(range(2 * num_tasks))[::-1],
            "label_names": [f"name {c}" for c in range(2 * num_tasks)],
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
        },
        "projection": {
            "method": "pgp",
            "apply_to": "update",
            "parameters": {
                "a.prompts": {"shape": [50, 48], "batch_dims": 0, "rank": 11, "energy": 0.5, "samples": 900},
                "a.keys": {"shape": [10, 48], "batch_dims": 0, "rank": [2, 5], "energy": 0.97, "samples": 303},
            },
            "rank_per_task": [4, 9, 11],
        },
    }


def render(inputs: dict, **kwargs) -> ModelCard:
    return model_card.render_card(**inputs, **kwargs)


def table_rows(card: ModelCard) -> list[list[str]]:
    """Cells of the rows of all Markdown tables, headers and rules left out."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [
        row for k, row in enumerate(rows) if not set(lines[k]) <= set("|-:") and row[0] not in ("Task", "Parameter")
    ]


def test_metadata_parses_back_with_the_values(tmp_path):
    inputs = make_inputs()
    path = model_card.save_card(tmp_path / "README.md", **inputs, repo_id="me/l2p-pgp-cifar100")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"] and path == tmp_path / "README.md"
    data = ModelCard.load(path).data
    assert data.library_name == "peft" and data.license == "apache-2.0"
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


def test_tables_hold_the_numbers():
    rows = table_rows(render(make_inputs()))
    assert ["76.67", "12.50", "12.50", "-12.50", "85.00"] in rows
    assert ["1", "name 5, name 4", "100 / 20", "90.0", "85.0", "90.0", "0.0000", "4"] in rows
    assert ["2", "name 3, name 2", "101 / 21", "95.0", "75.0", "87.5", "0.0123", "9"] in rows
    assert ["3", "name 1, name 0", "102 / 22", "70.0", "70.0", "76.7", "0.0200", "11"] in rows
    assert ["`a.prompts`", "11 of 48", "0.5", "900"] in rows
    assert ["`a.keys`", "5 of 48", "0.97", "303"] in rows


def test_protocol_is_stated():
    text = render(make_inputs()).text
    for fact in (
        "`google/vit-base-patch16-224-in21k`",
        "10 prompts of 5 tokens, 4 of them selected for each image",
        "uoft-cs/cifar100, 6 classes in 3 tasks, class-incremental",
        "stream seed 3",
        "**Training seed:** 7",
        'logits of classes not yet seen are masked (`eval_mask="seen"`)',
        "123.5 training images per second",
        "pgp_hf 0.1.0, torch 2.13.0",
        "Each update was projected (`pgp`)",
        "chosen for each image alone",
    ):
        assert fact in text, fact
    assert "This revision" not in text and "Warning" not in text
    assert not re.search(r"\{\{|\{%|undefined|None", text)


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


def test_class_order_in_label_order_or_given():
    inputs = make_inputs()
    inputs["manifest"]["seed"] = None
    assert "**Class order:** given;" in render(inputs).text
    inputs["manifest"]["class_order"].sort()
    assert "**Class order:** label order;" in render(inputs).text


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
    inputs["projection"] = method and {"method": method, "apply_to": "update"}
    card = render(inputs)
    assert "Updates were not projected" in card.text
    assert "## Projection" not in card.text and "protects the directions" not in card.text
    assert model_index_to_eval_results(card.data.to_dict()["model-index"])[0] == "l2p-cifar100"


def test_projection_described_at_the_top_level():
    """`projection.json` with the parameters beside the settings instead of below `parameters`."""
    inputs = make_inputs()
    nested = inputs["projection"]
    expected = str(render(inputs))
    inputs["projection"] = {"method": "pgp", "apply_to": "update", "energy": 0.5, **nested["parameters"]}
    assert str(render(inputs)) == expected
    inputs["projection"]["apply_to"] = "gradient"
    assert "Each gradient was projected" in render(inputs).text


@pytest.mark.parametrize("rows", [1, 2])
def test_a_revision_in_the_middle_of_the_stream(rows):
    inputs = make_inputs(MATRIX[:rows] + [[N] * 3] * (3 - rows))
    text = render(inputs).text
    assert f"**This revision stands after task {rows} of 3**" in text
    assert [row[0] for row in table_rows(render(inputs)) if "name" in row[1]] == [str(i + 1) for i in range(rows)]
    assert text == render({**inputs, "results": inputs["results"] | {"accuracy_matrix": MATRIX[:rows]}}).text


def test_one_task():
    card = render(make_inputs([[88.5]], num_tasks=1))
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_value for result in found] == [88.5, 0.0]
    assert "2 classes in 1 task, " in card.text and "1 tasks" not in card.text


def test_null_entries_show_as_dashes_and_stay_out_of_the_index():
    inputs = make_inputs()
    inputs["results"] |= {
        "accuracy_matrix": [[90.0, N, N], [N, 95.0, N], [85.0, N, 70.0]],
        "forgetting": None,
        "backward_transfer": float("nan"),
        "drift": [0.0, None],
        "projection_rank": [],
        "train_images_per_second": None,
        "versions": {},
    }
    inputs["manifest"] |= {"label_names": [], "tasks": [], "dataset": {"name": None}}
    card = render(inputs)
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_name for result in found] == ["Average accuracy"]
    assert ["76.67", "–", "12.50", "–", "85.00"] in table_rows(card)
    assert ["2", "–", "– / –", "95.0", "–", "87.5", "–", "–"] in table_rows(card)
    assert "unnamed dataset" in card.text and not re.search(r"None|nan", card.text)


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
    assert f"`{shown}`" in card.text and f'"path/to/{shown}"' in card.text
    assert '"path/to/this/folder"' in card.text
    assert f"a local folder named `{shown}`" in card.text


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
        and '"path/to/the-backbone"' in card.text
        and "``" not in card.text.replace("```", "")
    )


def test_names_cannot_break_the_table_or_the_metadata(tmp_path):
    inputs = make_inputs()
    inputs["manifest"]["label_names"] = ["a|b", "<b>", "{{ x }}", "line\nbreak", "`c`", "---"]
    inputs["manifest"]["dataset"]["name"] = "my: 'data' # {x}"
    path = model_card.save_card(tmp_path / "README.md", **inputs)
    card = ModelCard.load(path)
    assert all(len(row) in (4, 5, 8) for row in table_rows(card))
    assert r"a\|b" in card.text and "&lt;b>" in card.text and "{{ x }}" in card.text and "line break" in card.text
    assert model_index_to_eval_results(card.data.to_dict()["model-index"])[1][0].dataset_type == "my: 'data' # {x}"


def test_many_classes_are_cut_short():
    inputs = make_inputs()
    inputs["manifest"]["tasks"][0]["classes"] = list(range(6)) * 2
    assert "name 0, name 1, name 2, name 3, name 4 and 7 more" in render(inputs).text


def test_figures_are_those_that_save_figures_writes():
    inputs = make_inputs()
    shown = lambda: re.findall(r"\]\(figures/(.*?)\)", render(inputs).text)  # noqa: E731
    assert shown() == ["accuracy_matrix.png", "task_curves.png"]
    inputs["results"]["prompt_usage"] = [[1, 2]] * 3
    assert shown() == ["accuracy_matrix.png", "task_curves.png", "prompt_usage.png"]


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
    monkeypatch.setattr(model_card, "__file__", str(package / "model_card.py"))
    with pytest.raises(FileNotFoundError, match="template is missing.*Reinstall"):
        render(make_inputs())
    (tmp_path / "site" / "model_cards").mkdir()
    (tmp_path / "site" / "model_cards" / "template.md").write_text(
        "---\n{{ card_data }}\n---\nsource", encoding="utf-8"
    )
    assert render(make_inputs()).text.strip() == "source"
    (package / "model_card_template.md").write_text("---\n{{ card_data }}\n---\nwheel", encoding="utf-8")
    assert render(make_inputs()).text.strip() == "wheel"


def test_the_snippet_runs_and_gives_the_trained_model(tmp_path, monkeypatch):
    """Executed as printed, but for the two paths; the backbone has a head of another size."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    from pgp_hf import L2PConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone, adapter = tmp_path / "tiny-vit", tmp_path / "run"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).save_pretrained(backbone)
    base = AutoModelForImageClassification.from_pretrained(backbone, num_labels=6, ignore_mismatched_sizes=True)
    model = get_peft_model(base, L2PConfig(pool_size=4, prompt_length=2, top_k=2)).eval()
    model.save_pretrained(adapter)
    inputs = make_inputs()
    inputs["adapter_config"] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    model_card.save_card(adapter / "README.md", **inputs)
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for shown, path in (("path/to/tiny-vit", backbone), ("path/to/this/folder", adapter)):
        assert snippet.count(f'"{shown}"') == 1
        snippet = snippet.replace(f'"{shown}"', repr(str(path)))
    names: dict = {}
    exec(compile(snippet, "snippet", "exec"), names)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(names["model"](pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    assert not names["model"].training
