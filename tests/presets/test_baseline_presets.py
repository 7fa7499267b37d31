"""Presets of `run_baselines.py`: one recipe for all data sets, a second one, the data sets' structures, two steps."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import hub_data
import pytest
import tiny

from pgp_hf import presets
from pgp_hf.cli.baseline_arguments import PRESETS, BaselineTrainingArguments, names, parse

SCRIPT = Path(__file__).parents[2] / "examples" / "run_baselines.py"
RECIPE = "sgd-1e-3"
DATA = [name for name in presets.names(PRESETS) if name != RECIPE]
TASKS = {"cifar100-10": 10, "cifar100-20": 20, "tinyimagenet-10": 10, "imagenet-r-10": 10, "cub200-5": 5}

pytestmark = pytest.mark.usefixtures("without_figures")


def dry_run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse("", [*argv, "--dry_run"])
    assert not stop.value.code
    return json.loads(capsys.readouterr().out)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_data_sets_are_those_of_the_prompts():
    assert set(DATA) == set(TASKS) == {name for name in presets.names("l2p") if not name.endswith("-online")}
    for name in DATA:
        ours, theirs = presets.load(PRESETS, name), presets.load("l2p", name)
        assert ours["data"] == theirs["data"] and ours["preprocessing"] == theirs["preprocessing"]
        assert ours["model"] == {key: value for key, value in theirs["model"].items() if key != "image_size"}
        images = ("augmentation", "crop_min_scale", "dataloader_num_workers", "eval_mask", "train_mask")
        assert all(ours["training"][key] == theirs["training"][key] for key in images)
        assert set(ours) == {"about", "differs", "unsure", "preprocessing", "model", "data", "training"}
        assert any("not pinned" in text for text in ours["unsure"])


def test_all_data_sets_have_the_default_recipe():
    defaults = {one.name: one.default for one in fields(BaselineTrainingArguments)}
    recipes = [presets.load(PRESETS, name)["training"] for name in DATA]
    assert all(recipe == recipes[0] for recipe in recipes)
    own = {key: value for key, value in recipes[0].items() if key not in ("dataloader_num_workers",)}
    assert {key: defaults[key] for key in own} == own
    assert (own["learning_rate"], own["head_learning_rate"], own["lr_scheduler_type"]) == (5e-5, 1e-3, "cosine")
    assert (own["weight_decay"], own["max_grad_norm"], own["num_train_epochs"]) == (0, 1, 5)


@pytest.mark.parametrize("name", DATA)
def test_a_dry_run_prints_settings_and_notes(capsys, name):
    settings = dry_run(capsys, "--preset", name, "--method", "ewc")
    preset = presets.load(PRESETS, name)
    assert settings["presets"] == {name: {key: preset[key] for key in ("about", "differs", "unsure")}}
    assert settings["data"]["dataset_name"] in hub_data.HUB and settings["data"]["num_tasks"] == TASKS[name]
    assert settings["model"]["model_name_or_path"] == "google/vit-base-patch16-224-in21k"
    assert settings["preprocessing"][f"as {name} has it"] == preset["preprocessing"]
    assert settings["training"]["learning_rate"] == 5e-5 and settings["training"]["num_train_epochs"] == 5
    assert settings["training"]["output_dir"] == f"out/baselines_{name}_ewc"


@pytest.mark.parametrize("order", [1, -1])
def test_a_recipe_goes_with_a_data_set_and_wins(capsys, order):
    both = ["imagenet-r-10", RECIPE]
    settings = dry_run(capsys, "--preset", *both[::order], "--method", "lwf", "--num_train_epochs", "7")
    training, expected = settings["training"], presets.load(PRESETS, RECIPE)["training"]
    assert {key: training[key] for key in expected if key != "num_train_epochs"} == {
        key: value for key, value in expected.items() if key != "num_train_epochs"
    }
    assert (training["optim"], training["optim_args"], training["learning_rate"]) == ("sgd", "momentum=0.9", 1e-3)
    assert (training["head_learning_rate"], training["num_train_epochs"]) == (1e-3, 7)
    assert settings["data"]["dataset_name"] == "axiong/imagenet-r" and list(settings["presets"]) == both
    assert training["output_dir"] == f"out/baselines_imagenet-r-10_{RECIPE}_lwf"


def test_a_recipe_goes_with_data_of_the_command_line_and_with_the_digits():
    own = parse("", ["--preset", RECIPE, "--dataset_name", "mine", "--num_tasks", "4"])
    assert (own.data.dataset_name, own.data.num_tasks, own.training.augmentation) == ("mine", 4, "crop_flip")
    digits = parse("", [f"--preset={RECIPE}"])
    assert (digits.data.dataset_name, digits.data.num_tasks, digits.training.augmentation) == (None, 5, "none")
    for arguments in (own, digits):
        training = arguments.training
        assert (training.optim, training.num_train_epochs, training.per_device_train_batch_size) == ("sgd", 20, 128)
        assert (training.max_grad_norm, training.weight_decay, training.lr_scheduler_type) == (0, 2e-4, "constant")
    assert digits.training.overwrite_output_dir and not own.training.overwrite_output_dir


def test_another_source_drops_what_belongs_to_the_presets_own():
    model, data, *_ = parse("", ["--preset", "imagenet-r-10", "--train_dir", "folder", "--model_name_or_path", "mine"])
    assert (data.dataset_name, data.dataset_split, data.label_column_name) == (None, None, None)
    assert (data.num_tasks, data.class_order, data.test_fraction) == (10, "label", 0.2)
    assert (model.model_name_or_path, model.model_revision, model.image_mean) == ("mine", None, [0.0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cifar10"], "preset 'cifar10' is unknown: choose one of cifar100-10, .*sgd-1e-3, tinyimagenet-10"),
        (
            ["cub200-5", RECIPE, "cifar100-10"],
            "--preset cub200-5 cifar100-10 names 2 data sets: give .* with sgd-1e-3",
        ),
    ],
)
def test_bad_presets(argv, message):
    with pytest.raises(ValueError, match=message):
        parse("", ["--preset", *argv])


# ---- structures of the data sets -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let Hub ids load from folders of the same structure; the function returns the folder of an id."""
    load, folders = datasets.load_dataset, dict[str, Path]()

    def load_dataset(name, *args, **kwargs):
        return load(str(folders[name]) if name in folders else name, *args, **kwargs)

    def serve(source, **changes):
        hub_data.write(tmp_path / "hub", source, **changes)
        folders[source] = tmp_path / "hub"
        return tmp_path / "hub"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return serve


def data_of(name, *argv):
    return parse("", ["--preset", name, *map(str, argv)]).data


def check_stream(stream, name, source, per_class):
    """Check classes, tasks and images, and read one of each task."""
    structure = hub_data.HUB[source]
    assert stream.label_names == [structure.name(label) for label in range(structure.classes)]
    assert stream.class_order == list(range(structure.classes)) and stream.num_tasks == TASKS[name]
    size = structure.classes // TASKS[name]
    for t in range(stream.num_tasks):
        for images, count in zip((stream.train(t), stream.test(t)), per_class, strict=True):
            labels = images.labels.tolist()
            assert sorted(labels) == sorted([*stream.tasks[t].classes] * count) and len(labels) == count * size
        assert stream.train(t)[0]["image"].mode == "RGB"


@pytest.mark.parametrize("name", DATA)
def test_the_hubs_data_set(hub, name):
    source = presets.load(PRESETS, name)["data"]["dataset_name"]
    folder = hub(source)
    stream = data_of(name).load(0)
    check_stream(stream, name, source, (2, 1))
    assert stream.manifest()["dataset"]["name"] == source
    # the same from a folder with a copy of it; another source drops the preset's split
    split = ["--dataset_split", "test"] if name == "imagenet-r-10" else []
    copy = data_of(name, "--dataset_name", folder, *split).load(0)
    copy.check_manifest(stream.manifest())
    validation = data_of(name, "--train_val_split", "0.5").load(0)
    check_stream(validation, name, source, (1, 1))


@pytest.mark.parametrize("name", ["imagenet-r-10", "tinyimagenet-10", "cub200-5"])
def test_image_files_in_folders_of_classes(tmp_path, name):
    source = presets.load(PRESETS, name)["data"]["dataset_name"]
    structure = hub_data.write_images(tmp_path / "files", source)
    train, *test = (tmp_path / "files" / split for split in structure.images)
    (train / "README.txt").write_text("as in the archive of ImageNet-R")
    argv = ["--train_dir", train, *(["--validation_dir", test[0]] if test else [])]
    stream = data_of(name, *argv).load(0)
    check_stream(stream, name, source, (2, 1))
    assert stream.manifest()["test_fraction"] == (None if test else 0.2)


def test_an_archive_with_images_one_folder_deeper_is_refused(tmp_path):
    """As that of Tiny ImageNet: train/n01443537/images/n01443537_0.JPEG."""
    structure = hub_data.write_images(tmp_path, "zh-plus/tiny-imagenet", images={"train": 1}, classes=3)
    for label in range(structure.classes):
        folder = tmp_path / "train" / structure.name(label)
        files = list(folder.iterdir())
        (folder / "images").mkdir()
        for file in files:
            file.rename(folder / "images" / file.name)
    with pytest.raises(
        ValueError, match="train have no labels: expected one subfolder per class .* Move images that are nested"
    ):
        data_of("tinyimagenet-10", "--train_dir", tmp_path / "train").load(0)


# ---- two steps of training -------------------------------------------------------------------------------------------


@pytest.fixture
def train(hub, tmp_path, monkeypatch):
    """Take two steps per task with a preset through the script; the function returns the rows of the comparison."""

    def call(*argv):
        tiny.backbone(num_hidden_layers=1).save_pretrained(tmp_path / "vit")
        tiny.processor().save_pretrained(tmp_path / "vit")
        own = ["--model_name_or_path", "vit", "--max_steps", "2", "--output_dir", "out", "--use_cpu", "true"]
        own += ["--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no", "--verify_images", "false"]
        own += ["--no_compare", "--dataloader_num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["run_baselines", *argv, *own])
        with tiny.script(SCRIPT) as module:
            module.main()
        return json.loads(Path("out/comparison.json").read_text())

    return call


@pytest.mark.timeout(900)  # every method in one test
@pytest.mark.parametrize(
    ("name", "method", "recipe"),
    [
        ("cub200-5", "fine_tuning", []),
        *(pytest.param(name, "all", [], marks=pytest.mark.slow) for name in DATA),
        pytest.param("imagenet-r-10", "all", [RECIPE], marks=pytest.mark.slow),
    ],
)
def test_two_steps_on_random_data(train, hub, name, method, recipe):
    source = presets.load(PRESETS, name)["data"]["dataset_name"]
    images = {split: count * 5 if count > 1 else count for split, count in hub_data.HUB[source].images.items()}
    hub(source, images=images)  # BiC needs ten training images of a class
    rows = train("--preset", name, *recipe, "--method", method)
    assert list(rows) == (names() if method == "all" else [method])
    assert "refused" not in str(rows)
    for row in rows.values():
        assert len(row["accuracy_matrix"]) == row["num_tasks"] == TASKS[name]
    folder = Path("out") if method != "all" else Path("out/lwf")
    stream = json.loads((folder / "stream.json").read_text())
    assert stream["dataset"]["name"] == source and stream["class_order"] == list(range(stream["num_classes"]))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.0] * 3, [1.0] * 3)
