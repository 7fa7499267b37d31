"""Presets: the published table, the command line's precedence, the dry run, and two steps of training with each."""

from __future__ import annotations

import builtins
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import datasets
import hub_data
import numpy as np
import pytest
import tiny
import transformers

from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig, PGPTrainingArguments, embedded, presets
from pgp_hf.cli import parsing
from pgp_hf.cli.arguments import DataArguments, ModelArguments
from pgp_hf.report import figures

CONFIGS = {"l2p": L2PConfig, "dualprompt": DualPromptConfig, "clip": ClipPromptConfig}
ALL = [(method, name) for method in CONFIGS for name in presets.names(method)]
CIFAR = {"dataset_name": "uoft-cs/cifar100", "label_column_name": "fine_label", "num_classes": 100}
TINY = {"dataset_name": "zh-plus/tiny-imagenet", "label_column_name": "label", "num_classes": 200}
RENDITIONS = {"dataset_name": "axiong/imagenet-r", "label_column_name": "wnid", "num_classes": 200}
BIRDS = {"dataset_name": "bentrevett/caltech-ucsd-birds-200-2011", "label_column_name": "label", "num_classes": 200}

# data, tasks, batch, epochs, lr before and after scaling by batch / 256, prompt length, top-k, head, seed
L2P = {
    "cifar100-10": (CIFAR, 10, 16, 5, 0.03, 0.001875, 5, 5, "prompt", 42),
    "cifar100-20": (CIFAR, 20, 16, 5, 0.03, 0.001875, 5, 5, "prompt", 53),
    "tinyimagenet-10": (TINY, 10, 16, 5, 0.03, 0.001875, 5, 5, "prompt", 52),
    "imagenet-r-10": (RENDITIONS, 10, 16, 50, 0.005, 0.0003125, 30, 1, "prompt", 59),
    "cub200-5": (BIRDS, 5, 16, 5, 0.03, 0.001875, 5, 5, "token", 42),
}
# data, tasks, batch, epochs, lr before and after, length of general and expert prompts, seed
DUALPROMPT = {
    "cifar100-10": (CIFAR, 10, 24, 20, 0.03, 0.0028125, 5, 5, 59),
    "cifar100-20": (CIFAR, 20, 24, 20, 0.03, 0.0028125, 5, 5, 42),
    "tinyimagenet-10": (TINY, 10, 24, 5, 0.03, 0.0028125, 5, 5, 52),
    "imagenet-r-10": (RENDITIONS, 10, 24, 50, 0.005, 0.00046875, 5, 20, 43),
    "cub200-5": (BIRDS, 5, 24, 10, 0.03, 0.0028125, 5, 5, 51),
}
ONLINE = ("cifar100-10", "cifar100-20", "tinyimagenet-10")


def parse(method, name, *arguments):
    argv = ["--preset", name, *map(str, arguments)]
    return parsing.parse("", parsing.prompt_arguments(CONFIGS[method]), method, argv)


def dry_run(capsys, method, name, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse(method, name, "--dry_run", *arguments)
    assert not stop.value.code
    return json.loads(capsys.readouterr().out)


def test_every_line_of_the_table_has_a_preset():
    online = {f"{name}-online" for name in ONLINE}
    assert set(presets.names("l2p")) == set(L2P) | online
    assert set(presets.names("dualprompt")) == set(DUALPROMPT) | online
    assert presets.names("clip") == ["cifar100-10"]


def check_common(settings, data, tasks, batch, epochs, lr, scaled, seed):
    training = settings["training"]
    expected = {
        "per_device_train_batch_size": batch,
        "images_per_step": batch,
        "learning_rate": scaled,
        "learning_rate_per_256_images": lr,
        "seed": seed,
        "optim": "adamw_torch",
        "weight_decay": 0,
        "max_grad_norm": 1,
        "lr_scheduler_type": "constant",
        "reinit_optimizer": True,
        "train_mask": "task",
        "num_train_epochs": epochs,
    }
    assert {key: training[key] for key in expected} == expected
    assert lr * batch / 256 == pytest.approx(scaled, rel=1e-12)
    assert settings["data"]["num_tasks"] == tasks and settings["data"]["class_order"] == "label"
    for key in ("dataset_name", "label_column_name"):
        assert settings["data"][key] == data[key]
    assert settings["model"]["model_name_or_path"] == "google/vit-base-patch16-224-in21k"
    images = settings["preprocessing"]
    assert (images["image_size"], images["image_mean"], images["image_std"]) == (224, [0], [1])
    assert (images["augmentation"], images["crop_min_scale"]) == ("crop_flip", 0.05)


@pytest.mark.parametrize("name", presets.names("l2p"))
def test_l2p_is_as_in_the_table(capsys, name):
    settings = dry_run(capsys, "l2p", name)
    data, tasks, batch, epochs, lr, scaled, length, top_k, head, seed = L2P[name.removesuffix("-online")]
    online = name.endswith("-online")
    check_common(settings, data, tasks, batch, 1 if online else epochs, lr, scaled, seed)
    assert settings["data"]["scenario"] == ("online" if online else "class_incremental")
    assert settings["prompts"] == {
        "pool_size": 10,
        "prompt_length": length,
        "top_k": top_k,
        "grow_pool": None,
        "pull_constraint_coeff": 0.1,
        "head_type": head,
        "batchwise_prompt": False,  # predictions depend on their own image alone; see `differs`
    }


@pytest.mark.parametrize("name", presets.names("dualprompt"))
def test_dualprompt_is_as_in_the_table(capsys, name):
    settings = dry_run(capsys, "dualprompt", name)
    data, tasks, batch, epochs, lr, scaled, general, expert, seed = DUALPROMPT[name.removesuffix("-online")]
    online = name.endswith("-online")
    check_common(settings, data, tasks, batch, 1 if online else epochs, lr, scaled, seed)
    assert settings["data"]["scenario"] == ("online" if online else "class_incremental")
    assert settings["prompts"] == {
        "pool_size": 10,
        "general_length": general,
        "expert_length": expert,
        "general_layers": [0, 1],
        "expert_layers": [2, 3, 4],
        "copy_previous": True,
        "grow_pool": tasks > 10,  # more tasks than entries
        "selection": "key",
        "pull_constraint_coeff": 1,
    }


def test_clip_is_as_in_the_table(capsys):
    settings = dry_run(capsys, "clip", "cifar100-10")
    assert settings["prompts"] == {"image_length": 10, "text_length": 16}
    assert settings["model"]["model_name_or_path"] == "openai/clip-vit-base-patch16"
    training = settings["training"]
    assert (training["optim"], training["optim_args"], training["seed"]) == ("sgd", "momentum=0.9", 1997)
    assert (training["learning_rate"], training["weight_decay"], training["max_grad_norm"]) == (0.01, 2e-4, 0)
    assert (training["per_device_train_batch_size"], training["num_train_epochs"]) == (32, 5)
    assert training["lr_scheduler_type"] == "cosine" and settings["data"]["num_tasks"] == 10
    assert settings["preprocessing"]["image_mean"] == [0.507, 0.487, 0.441]


@pytest.mark.parametrize(("method", "name"), ALL)
def test_every_preset_says_what_it_is(method, name):
    preset = presets.load(method, name)
    assert set(preset) == {"about", "differs", "unsure", "preprocessing", *presets.GROUPS}
    fields = {
        "model": ModelArguments,
        "data": DataArguments,
        "training": PGPTrainingArguments,
    }
    for group, kind in fields.items():
        assert set(preset[group]) <= {field.name for field in dataclasses.fields(kind)}
    assert set(preset["preprocessing"]) == {"train", "test", "pixels"}
    assert any("not pinned" in text for text in preset["unsure"])
    assert (preset["model"]["model_revision"], preset["data"]["dataset_revision"]) == ("main", "main")


@pytest.mark.parametrize("method", CONFIGS)
def test_prompts_are_settings_of_the_method(method):
    for name in presets.names(method):
        wanted = presets.load(method, name)["prompts"]
        settings = CONFIGS[method](**wanted)
        assert {key: getattr(settings, key) for key in wanted} == wanted and set(wanted) <= set(settings.command_line)


@pytest.mark.parametrize(("method", "name"), ALL)
def test_values_have_the_types_that_the_command_line_gives_them(method, name):
    """Defaults of a parser are not read as arguments are, unless they are text."""
    preset = presets.load(method, name)
    read = parse(method, name)
    groups = {"model": read.model, "data": read.data, "prompts": read.prompts, "training": read.training}
    given = []
    for group in presets.GROUPS:
        for key, value in preset[group].items():
            given += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    written = parsing.parse("", parsing.prompt_arguments(CONFIGS[method]), method, given)
    for group in presets.GROUPS:
        for key in preset[group]:
            one, other = getattr(groups[group], key), getattr(getattr(written, group), key)
            assert repr(one) == repr(other) and type(one) is type(other), key


def test_the_command_line_wins(capsys):
    own = ["--num_train_epochs", "2", "--learning_rate=0.5", "--top_k", "3", "--class_order", "random", "--seed", "7"]
    own += ["--image_mean", "0.1", "0.2", "0.3", "--model_name_or_path", "mine", "--max_grad_norm", "0"]
    model, data, prompts, run, training = parse("l2p", "cifar100-10", *own)
    assert (training.num_train_epochs, training.learning_rate, training.max_grad_norm, training.seed) == (2, 0.5, 0, 7)
    assert (prompts.top_k, prompts.prompt_length, data.class_order, data.num_tasks) == (3, 5, "random", 10)
    assert (model.image_mean, model.image_std) == ([0.1, 0.2, 0.3], [1.0])
    settings = dry_run(capsys, "l2p", "cifar100-10", *own)
    assert settings["training"]["learning_rate"] == 0.5 and settings["data"]["class_order_seed"] == 7
    # the order on the command line does not matter
    argv = [*own, "--preset=cifar100-10"]
    made = parsing.prompt_arguments(L2PConfig)
    assert vars(parsing.parse("", made, "l2p", argv).prompts) == vars(prompts)


@pytest.mark.parametrize(
    "flag", [["--no_reinit_optimizer"], ["--reinit_optimizer", "false"], ["--no-reinit-optimizer"]]
)
def test_a_switch_turns_off_what_a_preset_turns_on(flag):
    assert parse("l2p", "cifar100-10").training.reinit_optimizer is True
    assert parse("l2p", "cifar100-10", *flag).training.reinit_optimizer is False


def test_another_source_drops_what_belongs_to_the_presets_own():
    model, data, *_ = parse("l2p", "imagenet-r-10")
    assert (model.model_revision, data.dataset_split) == ("main", "test")
    model, data, *_ = parse("l2p", "imagenet-r-10", "--dataset-name", "mine", "--model-name-or-path=other")
    assert (model.model_name_or_path, model.model_revision) == ("other", None)
    assert (data.dataset_name, data.dataset_revision, data.dataset_split) == ("mine", None, None)
    assert (data.label_column_name, data.num_tasks) == ("wnid", 10)
    _, data, *_ = parse("l2p", "imagenet-r-10", "--train_dir", "folder")
    assert (data.dataset_name, data.label_column_name, data.num_tasks) == (None, None, 10)


def test_unknown_presets_are_named_with_the_known():
    with pytest.raises(ValueError, match="preset 'cifar10' is unknown: choose one of cifar100-10, cifar100-10-online"):
        parse("l2p", "cifar10")
    with pytest.raises(ValueError, match="preset 'cub200-5' is unknown: choose one of cifar100-10.$"):
        parse("clip", "cub200-5")
    for name in ("../l2p/cifar100-10", ""):
        with pytest.raises(ValueError, match="is unknown: choose one of"):
            parse("dualprompt", name)
    with pytest.raises(ValueError, match="method 'new' has none"):
        parsing.parse("", parsing.prompt_arguments(L2PConfig), "new", ["--preset", "cifar100-10"])


def test_abbreviations_are_refused():
    """They would be read by the parser but not recognised as given, so that a preset's value could win."""
    with pytest.raises(ValueError, match="--dataset_na"):
        parse("l2p", "cifar100-10", "--dataset_na", "x")


def test_a_dry_run_reads_and_writes_nothing_else(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    opened = []
    real = builtins.open

    def watch(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            opened.append(file)
        return real(file, mode, *args, **kwargs)

    def refuse(*_, **__):
        raise AssertionError("a dry run loads nothing")

    monkeypatch.setattr(builtins, "open", watch)
    for name in ("AutoImageProcessor", "AutoModelForImageClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    settings = dry_run(capsys, "l2p", "cub200-5")
    assert settings["preset"] == "cub200-5" and settings["method"] == "l2p" and "CUB" in settings["about"]
    assert settings["projection"]["method"] == "pgp" and settings["projection"]["unprojected twin"] is True
    assert settings["training"]["output_dir"] == "out/l2p_cub200-5"
    assert settings["preprocessing"]["as the preset has it"]["test"] == "the whole image resized to 224 x 224"
    assert opened == [] and list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):  # without a preset: the embedded default
        parsing.parse("", parsing.prompt_arguments(L2PConfig), "l2p", ["--dry_run", "--top_k", "2"])
    settings = json.loads(capsys.readouterr().out)
    assert settings["preset"] is None and settings["data"]["num_tasks"] == 5 and settings["prompts"]["top_k"] == 2
    assert settings["preprocessing"]["image_size"] == "the backbone's own"


# ---- preprocessing and data that presets ask for ---------------------------------------------------------------------


@pytest.mark.parametrize(("given", "mean"), [([0.0], [0.0, 0.0, 0.0]), ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])])
def test_mean_and_standard_deviation_replace_the_processors(tmp_path, given, mean):
    tiny.processor().save_pretrained(tmp_path)
    tiny.backbone().save_pretrained(tmp_path)
    processor = ModelArguments(str(tmp_path), image_mean=given, image_std=[1.0]).processor()
    image = tiny.data(classes=2)["train"][0]["image"]
    pixels = processor([image], return_tensors="np")["pixel_values"][0]
    expected = np.moveaxis(np.asarray(image) / 255, -1, 0) - np.array(mean)[:, None, None]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    for wrong, message in (({"image_mean": [0.1, 0.2]}, "has 2 numbers"), ({"image_std": [0.0]}, "above 0")):
        with pytest.raises(ValueError, match=message):
            ModelArguments(str(tmp_path), **wrong).processor()


def test_one_split_with_names_as_labels(tmp_path):
    """ImageNet-R as it is on the Hub: no train split, WordNet ids as strings."""
    hub_data.write(tmp_path, "axiong/imagenet-r", classes=6)
    arguments = {"dataset_name": str(tmp_path), "num_tasks": 3, "label_column_name": "wnid"}
    with pytest.raises(ValueError, match="no split 'train', only .'test'.: name one with --dataset_split"):
        DataArguments(**arguments).load(0)
    arguments |= {"dataset_split": "test", "test_fraction": 0.34}
    stream = DataArguments(**arguments, class_order="label").load(5)
    assert stream.label_names == sorted(stream.label_names) == [hub_data.wnid(label) for label in range(6)]
    assert stream.class_order == list(range(6)) and stream.seed == 5
    assert [len(stream.train(t)) for t in range(3)] == [4, 4, 4] and [len(stream.test(t)) for t in range(3)] == [
        2,
        2,
        2,
    ]
    manifest = stream.manifest()
    assert manifest["dataset"]["name"] == tmp_path.name and manifest["test_fraction"] == 0.34
    again = DataArguments(**arguments, class_order="label").load(6).manifest()
    assert again["tasks"] != manifest["tasks"]  # the seed draws the images held out, the order stays
    assert DataArguments(**arguments).load(5).class_order != list(range(6))


@pytest.mark.parametrize("label_type", ["class", "integer"])
def test_label_order(monkeypatch, label_type):
    rows = tiny.data(classes=4)
    if label_type == "integer":
        rows = rows.cast_column("label", datasets.Value("int32"))
    data = DataArguments(dataset_name="x", num_tasks=2, class_order="label")
    monkeypatch.setattr(data, "_named", lambda name: rows)
    assert data.load(0).class_order == [0, 1, 2, 3]


# ---- two steps of training -------------------------------------------------------------------------------------------


# by default one, online; others have strings as labels in a single split or CLIP, or differ in numbers alone
QUICK = {("l2p", "cifar100-10-online")}


def save_backbone(method, preset, target):
    """A random backbone of the preset's image size in few patches, with image processor and, for CLIP, tokenizer."""
    size = {"image_size": preset["model"]["image_size"], "patch_size": 56}
    if method == "clip":
        own = embedded.clip_path()
        for file in own.glob("tokenizer*"):
            (target / file.name).write_bytes(file.read_bytes())
        settings = json.loads((own / "config.json").read_text())
        vision = {"num_hidden_layers": 1, **size}
        tiny.backbone("clip", text_config=settings["text_config"], vision_config=vision).save_pretrained(target)
    else:
        layers = 1 if method == "l2p" else 1 + max(preset["prompts"]["expert_layers"])
        tiny.backbone(num_hidden_layers=layers, **size).save_pretrained(target)
    tiny.processor().save_pretrained(target)


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow], id="-".join(case)) for case in ALL],
)
def test_two_steps_on_random_data(tmp_path, monkeypatch, method, name):
    """Through the example script, as a user starts it."""
    for drawing in ("save_figures", "comparison"):  # most of the time otherwise
        monkeypatch.setattr(figures, drawing, lambda *_, **__: [])
    lines = {"l2p": L2P, "dualprompt": DUALPROMPT, "clip": {"cifar100-10": (CIFAR, 10, 1997)}}
    line = lines[method][name.removesuffix("-online")]
    preset = presets.load(method, name)
    data = preset["data"]
    one_split = "dataset_split" in data
    hub_data.write(tmp_path / "data", data["dataset_name"])
    (tmp_path / "backbone").mkdir()
    save_backbone(method, preset, tmp_path / "backbone")
    own = ["--model_name_or_path", tmp_path / "backbone", "--dataset_name", tmp_path / "data"]
    own += ["--output_dir", tmp_path / "out", "--use_cpu", "true", "--disable_tqdm", "true", "--no_compare"]
    own += ["--save_strategy", "no", "--dataloader_num_workers", 0, "--verify_images", "false"]
    own += ["--dataset_split", data["dataset_split"]] if one_split else []
    own += [] if name.endswith("-online") else ["--max_steps", 2]  # online is one epoch: two steps of these data
    script = Path(__file__).parents[2] / "examples" / f"run_{method}_pgp.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--preset", name, *map(str, own)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == line[1]
    assert results["scenario"] == data["scenario"] and results["seed"] == line[-1]
    stream = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert stream["class_order"] == list(range(line[0]["num_classes"]))
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    pixels = ([0.507, 0.487, 0.441], [0.267, 0.256, 0.276]) if method == "clip" else ([0.0] * 3, [1.0] * 3)
    assert (processor["image_mean"], processor["image_std"]) == pixels
