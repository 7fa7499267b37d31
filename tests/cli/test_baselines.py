"""`run_baselines.py`: its options, a run of one method, and the table of all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from pgp_hf import PGPTrainingArguments, StreamTrainer, load_pretrained
from pgp_hf.cli import baselines
from pgp_hf.cli.arguments import DataArguments, ModelArguments
from pgp_hf.cli.baseline_arguments import names, parse
from pgp_hf.cli.frozen import frozen_rows
from pgp_hf.methods import METHODS, FineTuning, create

SCRIPT = Path(__file__).parents[2] / "examples" / "run_baselines.py"

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def script():
    with tiny.script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Options for a backbone and images in local folders, and for a short training."""
    root = tmp_path_factory.mktemp("local")
    tiny.backbone(num_labels=3).save_pretrained(root / "vit")
    tiny.processor().save_pretrained(root / "vit")
    for split, rows in tiny.data(classes=4, train=6, test=3).items():
        rows.to_parquet(root / "data" / f"{split}.parquet")
    return [
        *("--model_name_or_path", str(root / "vit"), "--dataset_name", str(root / "data"), "--num_tasks", "2"),
        *("--num_train_epochs", "1", "--augmentation", "flip", "--seed", "3", "--use_cpu", "true"),
        *(
            "--disable_tqdm",
            "true",
            "--report_to",
            "none",
            "--save_strategy",
            "no",
            "--per_device_train_batch_size",
            "4",
        ),
    ]


@pytest.fixture
def main(script, local, monkeypatch, capsys):
    """Run the script with further options; the function returns what it prints."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["run_baselines", *local, *map(str, argv)])
        script.main()
        return capsys.readouterr().out

    return call


def read(path):
    return json.loads(path.read_text())


# ---- the command line ------------------------------------------------------------------------------------------------


def help_of(script, capsys, monkeypatch, *argv, option="--help_all"):
    monkeypatch.setattr(sys, "argv", ["run_baselines", *argv, option])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_help_lists_the_methods_and_the_recipe(script, capsys, monkeypatch):
    text = help_of(script, capsys, monkeypatch)
    for name in names():
        assert f"\n  {name} " in text and create(name).describe().title in text
    assert "projected_prompts" not in text and "--strength" not in text
    words = " ".join(text.split())
    for told in ("head (default: 5e-05)", "of the head (default: 0.001)", "each task (default: cosine)", "last:N"):
        assert told in words
    assert "(default: out/baselines_fine_tuning)" in words


@pytest.mark.parametrize("name", names())
def test_every_method_has_its_settings_among_the_options(script, capsys, monkeypatch, name):
    text = help_of(script, capsys, monkeypatch, "--method", name)
    short = help_of(script, capsys, monkeypatch, "--method", name, option="--help")
    assert len(short.splitlines()) <= 60 and max(map(len, short.splitlines())) <= 100
    settings = text.partition(f"\nsettings of {name}:\n")[2]
    for one in fields(METHODS[name].config_class):
        assert f"\n  --{one.name} " in f"\n{settings}" and " ".join(one.metadata["help"].split()) in " ".join(
            settings.split()
        )
        assert f"\n  --{one.name} " in short
    (made,) = parse("", ["--method", name]).methods().values()
    assert type(made) is METHODS[name] and made.config == create(name).config


def test_settings_reach_the_method():
    found = parse("", ["--method", "ewc", "--strength", "3", "--mode=separate", "--max-images", "7"])
    assert found.methods()["ewc"].settings() == {
        **create("ewc").settings(),
        "strength": 3.0,
        "mode": "separate",
        "max_images": 7,
    }


def test_what_a_dry_run_prints(capsys):
    for argv, expected in (
        (["--method", "ewc", "--strength", "3"], {"ewc": create("ewc", strength=3.0).settings()}),
        (["--method", "all"], {name: create(name).settings() for name in names()}),
    ):
        with pytest.raises(SystemExit) as stop:
            parse("", [*argv, "--trainable", "head", "--dry_run"])
        assert not stop.value.code
        told = json.loads(capsys.readouterr().out)
        assert told["methods"] == expected and told["trainable"] == "head"
        assert (told["training"]["learning_rate"], told["training"]["head_learning_rate"]) == (5e-5, 1e-3)


def test_defaults():
    model, data, run, training, settings = parse("", [])
    assert (run.method, run.trainable, run.no_compare, settings) == ("fine_tuning", "all", False, {})
    assert model.source.endswith("vit") and data.num_tasks == 5
    assert (training.output_dir, training.overwrite_output_dir) == ("out/baselines_fine_tuning", True)
    assert parse("", ["--output_dir", "x"]).training.overwrite_output_dir is False
    assert parse("", ["--resume_from_checkpoint", "true"]).training.overwrite_output_dir is False
    every = parse("", ["--method", "all"]).training  # repeated, it goes on
    assert (every.output_dir, every.overwrite_output_dir) == ("out/baselines_all", False)
    own = parse("", ["--method=ewc", "--model_name_or_path", "m"])
    assert (own.data.num_tasks, own.training.num_train_epochs) == (10, 5)
    assert (own.training.output_dir, own.training.overwrite_output_dir) == ("out/baselines_ewc", False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "nope"], "method 'nope' is unknown here: choose one of .*ewc.* and all"),
        (["--method", "projected_prompts"], r"unknown here: .*run_l2p_pgp\.py"),
        (["--trainable", "first:2"], "trainable='first:2' is unknown: choose all, last:N, head or lora:R"),
        (["--method", "ewc", "--strength", "-3"], "strength=-3.0 is out of range"),
        (["--strength", "3"], "--strength is a setting of --method ewc, and this is --method fine_tuning"),
        (["--method", "all", "--memory-size", "3"], "--memory_size is a setting of .*this is --method all"),
        (["--trainable", "lora:2", "--image_size", "40"], "--image_size 40 and --trainable lora:2 are mutually exclu"),
        (["--method", "all", "--push_to_hub", "true"], "--push_to_hub and --method all are mutually exclusive"),
        (["--method", "all", "--resume_from_checkpoint", "x"], "--resume_from_checkpoint x is for a single method"),
        (["--head_learning_rate", "-1"], "head_learning_rate=-1.0 is out of range"),
        (["--preset", "cifar10"], "preset .cifar10. is unknown: choose one of"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(main, monkeypatch, argv, message):
    monkeypatch.setattr(DataArguments, "load", lambda *_: pytest.fail("the data was loaded"))
    with pytest.raises(ValueError, match=message):
        main(*argv)


def test_a_setting_with_the_name_of_another_option_is_refused(monkeypatch):
    @dataclass
    class Config:
        num_tasks: int = 3

    class Ambiguous(FineTuning):
        name, config_class = "ambiguous", Config

    monkeypatch.setitem(METHODS, "ambiguous", Ambiguous)
    with pytest.raises(ValueError, match="method 'ambiguous' has a setting 'num_tasks', and so have all runs: rename"):
        parse("", ["--method", "ambiguous"])
    assert parse("", ["--method", "ewc"]).run.method == "ewc"


# ---- one method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "model"), [("last:1", "last:1"), pytest.param("lora:2", "lora:2", marks=pytest.mark.slow)]
)
def test_one_method(main, tmp_path, trainable, model):
    out = tmp_path / "out"
    printed = main("--method", "ewc", "--strength", 7, "--trainable", trainable, "--output_dir", out)
    rows = read(out / "comparison.json")
    frozen = [f"frozen, {name}" for name in ("nearest class mean", "shrinkage LDA", "random-projection ridge")]
    assert list(rows) == [*frozen, "ewc"] and (out / "figures" / "comparison.png").is_file()
    results = read(out / "results.json")
    del results["sha256"]
    assert results == rows["ewc"] and (results["method"], results["model"]) == ("ewc", model)
    assert read(out / "method.json")["settings"]["strength"] == 7 and (out / "task-2").is_dir()
    for name, row in rows.items():
        assert name in printed and f"{row['average_accuracy']:.2f}" in printed
    assert str(out) in printed
    with pytest.raises(ValueError, match="holds an earlier run"):
        main("--method", "ewc", "--output_dir", out)


def test_validation_images_are_recorded_and_not_mixed_with_test_images(main, tmp_path):
    common = ["--output_dir", tmp_path, "--no_compare", "true"]
    main(*common, "--train_val_split", "0.5")
    for folder in (tmp_path, tmp_path / "task-1"):
        stream = read(folder / "stream.json")
        assert stream["train_val_split"] == 0.5 and stream["tasks"][0]["test"]["num_images"] == 6
        assert "evaluated on 50 % of the training images" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="train_val_split: None here, 0.5 in the manifest"):
        main(*common, "--resume_from_checkpoint", "true")


def test_another_image_size_is_part_of_the_model(main, tmp_path):
    main("--image_size", 30, "--output_dir", tmp_path, "--no_compare", "true")
    assert list(read(tmp_path / "comparison.json")) == ["fine_tuning"]
    assert read(tmp_path / "config.json")["image_size"] == 30
    image = tiny.data(classes=4)["test"][0]["image"]
    assert load_pretrained(tmp_path).predict([image])[0][0]["label"].startswith("class")


def test_position_embeddings_are_interpolated_as_by_the_model_itself(local):
    stream = tiny.stream()
    plain = ModelArguments(local[1], attn_implementation="eager")
    model, twin = (
        made.backbone(stream, resize=True).eval()
        for made in (ModelArguments(local[1], image_size=40, attn_implementation="eager"), plain)
    )
    assert model.config.image_size == 40 and model.config._attn_implementation == "eager"
    pixels = tiny.images(size=40)
    with torch.no_grad():
        expected = twin.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert torch.equal(model.vit(pixels).last_hidden_state, expected)
    own = twin.config.image_size
    assert ModelArguments(local[1], image_size=own).backbone(stream, resize=True).config.image_size == own


def test_a_model_that_is_no_transformer_gets_a_new_head(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=tiny.CLASSES)
    saved = ResNetForImageClassification(config)
    saved.save_pretrained(tmp_path)
    made = ModelArguments(str(tmp_path), image_size=48).backbone(tiny.stream(), resize=True)
    before, after = (model.classifier[-1].weight for model in (saved, made))
    assert before.shape == after.shape and not torch.equal(before, after) and not made.classifier[-1].bias.any()


def test_frozen_rows_do_not_depend_on_whether_prompts_are_added(tmp_path):
    stream, args = tiny.stream(), PGPTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    plain = {"frozen": baselines.head_features(tiny.backbone())}
    prompted = {"frozen": tiny.model("l2p").base_model.frozen_features}
    rows = [frozen_rows(stream, tiny.processor(), args, extractors) for extractors in (plain, prompted)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


# ---- all methods -----------------------------------------------------------------------------------------------------


TRAINED = ("ewc", "fine_tuning", "joint")


class Picky(FineTuning):
    """Refuses when it has seen the model and the stream."""

    name = "picky"

    def check(self, model):
        self.model = model.name

    def training_stream(self, stream):
        raise ValueError(f"a {self.model} model is not to its taste.")


@pytest.fixture(scope="module")
def few():
    """Leave four methods, three of which work on the model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {*names()} - {*TRAINED}:
            patch.delitem(METHODS, name)
        patch.setitem(METHODS, "picky", Picky)
        yield


@pytest.fixture(scope="module")
def finished(few, script, local, tmp_path_factory):
    """The folder that `--method all` leaves, interrupted in the second task of the second method and repeated."""
    out, interrupted = tmp_path_factory.mktemp("all") / "out", StreamTrainer.train_task

    def train_task(self, t, **kwargs):
        if t == 1 and self.method.name == "fine_tuning":
            raise KeyboardInterrupt
        return interrupted(self, t, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_baselines", *local, "--method", "all", "--output_dir", str(out)])
        patch.setattr(StreamTrainer, "train_task", train_task)
        with pytest.raises(KeyboardInterrupt):
            script.main()
        assert not (out / "comparison.json").exists() and not (out / "fine_tuning" / "task-2").exists()
        patch.setattr(StreamTrainer, "train_task", interrupted)
        script.main()
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(StreamTrainer, "train", lambda *_, **__: pytest.fail("a run was trained"))


def test_all_methods_make_one_table(finished):
    rows = read(finished / "comparison.json")
    assert list(rows)[3:] == [*TRAINED, "picky"] and all(name.startswith("frozen") for name in list(rows)[:3])
    assert rows["picky"] == {"refused": "a full model is not to its taste."}
    for name in TRAINED:
        results = read(finished / name / "results.json")
        del results["sha256"]
        assert results == rows[name] and results["method"] == name and (finished / name / "task-2").is_dir()
    # both start from the same weights, and have the same first task
    assert rows["ewc"]["accuracy_matrix"][0] == rows["fine_tuning"]["accuracy_matrix"][0]
    assert (finished / "figures" / "comparison.png").is_file() and not (finished / "picky").exists()


def test_a_table_tells_how_much_each_method_keeps():
    """By default, some keep 2000 images, which is more than the digits have."""
    rows = {
        "frozen, nearest class mean": {},
        "ewc": {"memory": {"images": 0, "bytes": 0}},
        "derpp": {"memory": {"images": 1000, "bytes": 1}},
    }
    assert baselines.exemplars(rows, 1437) == "Kept at the end, of 1,437 training images: derpp 1,000 (69.6 %)."
    rows["icarl"] = {"memory": {"images": 1437, "bytes": 1}}
    assert baselines.exemplars(rows, 1437).endswith(
        "derpp 1,000 (69.6 %), icarl 1,437 (100 %). A memory of all images repeats the whole stream: --method icarl "
        "--memory_size N keeps fewer."
    )
    del rows["derpp"], rows["icarl"]
    assert baselines.exemplars(rows, 1437) == ""


def test_an_interrupted_run_ends_as_if_it_had_not_been(finished, main, tmp_path):
    main("--output_dir", tmp_path, "--no_compare", "true")
    rows = [read(folder / "results.json") for folder in (tmp_path, finished / "fine_tuning")]
    assert rows[0]["sha256"] == rows[1]["sha256"] and tiny.same_results(*rows)


def test_finished_runs_are_not_trained_again(main, out, monkeypatch, untrained):
    before = read(out / "comparison.json")
    (out / "comparison.json").unlink()
    monkeypatch.setattr(baselines, "frozen_rows", lambda *_: pytest.fail("features were computed again"))
    printed = main("--method", "all", "--output_dir", out)
    assert all(f"\n{name}: finished earlier" in printed for name in TRAINED)
    assert "no row picky: a full model is not to its taste." in printed
    assert read(out / "comparison.json") == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--learning_rate", "0.5"],
            r"settings.json has other settings \(training.learning_rate is 5e-05 there, 0.5 here",
        ),
        (["--trainable", "head"], "run.trainable is 'all' there, 'head' here"),
        (["--seed", "4"], "run.seed is 3 there, 4 here"),
        (["--max_train_samples_per_class", "3"], "data.max_train_samples_per_class is None there, 3 here"),
        (["--train_val_split", "0.5"], "data.train_val_split is None there, 0.5 here"),
    ],
)
def test_runs_with_other_settings_are_not_mixed(main, out, untrained, argv, message):
    with pytest.raises(ValueError, match=message):
        main("--method", "all", "--output_dir", out, *argv)


def test_a_finished_run_of_another_method_or_stream_is_refused(main, out, untrained):
    shutil.copytree(out / "ewc", out / "fine_tuning", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="has name='ewc', this one 'fine_tuning'"):
        main("--method", "all", "--output_dir", out)
    with pytest.raises(ValueError, match="holds the runs of --method all: choose another --output_dir"):
        main("--method", "ewc", "--output_dir", out, "--overwrite_output_dir", "true")
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match="out/ewc holds a run of unknown settings, without .*settings.json: choose"):
        main("--method", "all", "--output_dir", out)


def test_all_runs_can_be_started_anew(main, out, monkeypatch):
    before = read(out / "comparison.json")
    other = ["--method", "all", "--output_dir", out, "--head_learning_rate", "0.02", "--no_compare", "true"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # before the first run has ended
        patch.setattr(StreamTrainer, "train_task", mock.Mock(side_effect=KeyboardInterrupt))
        main(*other, "--overwrite_output_dir", "true")
    assert not list(out.glob("*/task-*")) and not (out / "frozen.json").exists()
    assert "finished earlier" not in main(*other)
    after = read(out / "comparison.json")
    assert list(after) == [*TRAINED, "picky"] and after["fine_tuning"]["drift"] != before["fine_tuning"]["drift"]
    assert read(out / "settings.json")["training"]["head_learning_rate"] == 0.02


def test_a_table_without_any_method_is_refused(main, few, tmp_path, monkeypatch):
    for name in names():
        monkeypatch.setattr(METHODS[name], "scenarios", frozenset({"online"}))
    with pytest.raises(
        ValueError, match="no method works on this model and stream: .*'ewc' is not defined for scenario"
    ):
        main("--method", "all", "--output_dir", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_on_the_embedded_default(tmp_path):
    few = ("--max_train_samples_per_class", "4", "--max_eval_samples_per_class", "3", "--num_train_epochs", "1")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        str(SCRIPT),
        "--method",
        "all",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    for _ in range(2):
        done = subprocess.run(
            [*command, *few], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path / "out" / "baselines_all" / "comparison.json")
    assert sorted(list(rows)[6:]) == sorted(names()) and "random, shrinkage LDA" in rows  # those refused come last
    assert all(f"\n{name}: finished earlier" in done.stdout for name in names() if "refused" not in rows[name])
