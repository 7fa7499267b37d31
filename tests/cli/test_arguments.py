"""The command line's projection settings are those of `ProjectionConfig`; tasks by number or by size."""

from __future__ import annotations

import re

import pytest
from transformers import HfArgumentParser

import pgp_hf.cli.parsing
from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig, ProjectionConfig
from pgp_hf.cli import baseline_arguments
from pgp_hf.cli.arguments import DataArguments, RunArguments
from pgp_hf.cli.model_arguments import ModelArguments
from pgp_hf.cli.settings import differences, record
from pgp_hf.projection import CONDITIONS


def parse(*argv: str) -> ProjectionConfig:
    return HfArgumentParser(RunArguments).parse_args_into_dataclasses(list(argv))[0].config()


def test_defaults_are_the_dataclass_defaults():
    assert parse() == ProjectionConfig()


@pytest.mark.parametrize("method", ["none", *CONDITIONS])
def test_every_method_is_a_choice(method):
    assert parse("--projection", method) == ProjectionConfig(method=method)


def test_energies_that_may_be_none_can_be_given_as_none(capsys):
    assert parse("--key_energy", "none", "--value-energy=None") == ProjectionConfig(key_energy=None, value_energy=None)
    assert type(parse("--key_energy", "0.5").key_energy) is float
    with pytest.raises(SystemExit):
        parse("--key_energy", "much")
    assert "'much' is neither a number nor 'none'" in capsys.readouterr().err


def test_every_field_is_an_argument():
    given = {
        "energy": 0.5,
        "key_energy": 0.6,
        "value_energy": 0.7,
        "apply_to": "gradient",
        "max_images": 9,
        "probes": 5,
        "probe_space": "logits",
        "hold_key_norm": False,
        "ln_penalty": 0.25,
        "softness": 0.1,
        "equal_images": True,
        "all_keys": True,
        "bf16_probes": True,
    }
    assert {"method", *given} == set(ProjectionConfig.__dataclass_fields__)
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert parse("--projection", "functional", *argv) == ProjectionConfig(method="functional", **given)


@pytest.mark.parametrize(
    ("argv", "message"), [(("--projection", "gpm"), "invalid choice"), (("--probe_space", "x"), "invalid choice")]
)
def test_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


def test_help_is_the_dataclass_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ProjectionConfig.__dataclass_fields__.items():
        assert " ".join(field.metadata["help"].split()) in text, name


# ---- tasks by number or by size -------------------------------------------------------------------------------------


def prompted(*argv: str):
    prompts = pgp_hf.cli.parsing.prompt_arguments(L2PConfig)
    return pgp_hf.cli.parsing.parse("", prompts, "l2p", argv)


def baseline(*argv: str):
    return baseline_arguments.parse("", argv)


COMMANDS = pytest.mark.parametrize("command", [prompted, baseline])


@COMMANDS
def test_the_digits_in_tasks_by_size(command):
    data = command("--init_classes", "4", "--increment=3").data
    assert (data.num_tasks, data.init_classes, data.increment) == (None, 4, 3)  # whatever the default was
    stream = data.load(seed=0)
    assert [len(task.classes) for task in stream.tasks] == [4, 3, 3]
    assert stream.class_order == command("--num_tasks", "2").data.load(seed=0).class_order
    command("--increment", "3", "--init-classes", "4").data.load(seed=0).check_manifest(stream.manifest())  # resumed
    assert [len(task.classes) for task in command("--increment", "6").data.load(seed=0).tasks] == [6, 4]


def test_tasks_by_size_replace_those_of_a_preset():
    data = prompted("--preset", "cifar100-10", "--init-classes", "50", "--increment", "10").data
    assert (data.num_tasks, data.init_classes, data.increment) == (None, 50, 10)
    assert prompted("--preset", "cifar100-10").data.num_tasks == 10


@COMMANDS
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_tasks", "3", "--increment", "2"], "--num_tasks and --increment are mutually exclusive"),
        (["--num-tasks=3", "--init-classes=4", "--increment", "2"], "--num_tasks and --init_classes and --increment"),
        (["--init_classes", "4"], "--init_classes needs --increment"),
        (["--init_classes", "4", "--num_tasks", "2"], "--num_tasks and --init_classes are mutually exclusive"),
    ],
)
def test_tasks_by_number_and_by_size(command, argv, message):
    with pytest.raises(ValueError, match=message):
        command(*argv)


# ---- before anything is loaded --------------------------------------------------------------------------------------


@COMMANDS
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_dir", "x", "--dataset_split", "train"], "--dataset_split goes with --dataset_name"),
        (["--dataset_revision", "v1"], "--dataset_revision goes with --dataset_name"),
        (["--train_dir", "x", "--dataset_config_name", "a"], "--dataset_config_name goes with --dataset_name"),
        (["--dataset_name", "x", "--validation_dir", "y"], "--validation_dir goes with --train_dir"),
        (["--model_revision", "v1"], "--model_revision goes with --model_name_or_path"),
        (["--image_size", "0"], "image_size=0: expected a multiple"),
    ],
)
def test_options_that_would_be_ignored_or_fail_later(command, argv, message):
    with pytest.raises(ValueError, match=message):
        command(*argv)


@pytest.mark.parametrize(
    ("config", "method", "argv", "message"),
    [
        (L2PConfig, "l2p", ["--pool_size", "0"], "pool_size=0 is out of range"),
        (L2PConfig, "l2p", ["--top_k", "11"], "top_k=11 is above pool_size=10"),
        (DualPromptConfig, "dualprompt", ["--general_layers", "0", "0"], "name each layer once"),
        (ClipPromptConfig, "clip", ["--image_length", "-1"], "image_length=-1 is out of range"),
    ],
)
def test_prompts_are_checked_when_they_are_read(config, method, argv, message):
    with pytest.raises(ValueError, match=message):
        pgp_hf.cli.parsing.parse("", pgp_hf.cli.parsing.prompt_arguments(config), method, [*argv, "--dry_run"])


def test_a_source_of_the_users_own_replaces_all_of_a_preset():
    data = prompted("--preset", "cifar100-10", "--train_dir", "photos", "--validation_dir", "others").data
    assert (data.dataset_name, data.dataset_split, data.validation_dir) == (None, None, "others")


@pytest.mark.parametrize("kind", ["nowhere", "file", "adapter", "empty"])
def test_what_is_not_a_backbone(kind, tmp_path):
    path = tmp_path / kind
    if kind == "file":
        path.touch()
    elif kind != "nowhere":
        path.mkdir()
    if kind == "adapter":
        (path / "adapter_config.json").touch()
    told = {
        "nowhere": f"the folder {path} does not exist: expected the folder of a backbone",
        "file": f"{path} is a file",
        "adapter": f"{path} holds an adapter",
        "empty": f"the image processor of {path} cannot be loaded: ",
    }
    with pytest.raises(ValueError, match=re.escape(told[kind])):
        ModelArguments(model_name_or_path=str(path)).processor()


@COMMANDS
def test_a_dry_run_prints_the_sizes(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--init_classes", "4", "--increment", "3", "--dry_run")
    text = capsys.readouterr().out
    assert not stop.value.code and '"init_classes": 4' in text and '"increment": 3' in text
    assert '"num_tasks": null' in text


@COMMANDS
def test_help_shows_the_sizes(command, capsys):
    with pytest.raises(SystemExit):
        command("--help_all")
    words = " ".join(capsys.readouterr().out.split())
    assert "number of classes of the first task, with --increment" in words
    assert "number of classes of each further task, instead of --num_tasks" in words


def test_records_without_the_sizes_are_those_of_streams_by_number():
    arguments = prompted("--num_tasks", "5")
    mine = record(arguments.model, arguments.data)
    old = {
        part: {k: v for k, v in own.items() if k not in ("init_classes", "increment")} for part, own in mine.items()
    }
    assert differences(mine, old) == []
    sized = record(arguments.model, DataArguments(num_tasks=None, increment=2))
    assert any("data.increment is None there, 2 here" in line for line in differences(sized, old))
