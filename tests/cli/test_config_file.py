"""A file of options as the first argument: the command line wins over it, and it over a preset."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import torch

from pgp_hf import L2PConfig
from pgp_hf.cli import baseline_arguments, learn, parsing
from pgp_hf.cli.config_file import expand
from pgp_hf.cli.main import main
from pgp_hf.cli.presets import FOLDERS, as_file
from pgp_hf.presets import names

FILE = """
# what a comment says
preset: cifar100-10
num-tasks: 4
learning_rate: 1e-3        # a text for YAML
image_mean: [-0.5, 0.25, 0.5]
lr_scheduler_kwargs: {num_cycles: 2}
reinit_optimizer: true
key_energy: none
class_order_seed: null
template_like: null
"""


@pytest.fixture
def file(tmp_path):
    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def l2p(*argv):
    return parsing.parse(None, parsing.prompt_arguments(L2PConfig), "l2p", argv)


def test_a_file_is_as_if_its_options_were_on_the_command_line(file):
    text = FILE.replace("template_like: null\n", "")
    model, data, _, run, training = l2p(file(text), "--num_tasks", "5", "--seed=3")
    assert (run.preset, run.key_energy, data.num_tasks, data.class_order_seed) == ("cifar100-10", None, 5, None)
    assert (training.seed, training.learning_rate, training.reinit_optimizer) == (3, 0.001, True)
    assert model.image_mean == [-0.5, 0.25, 0.5] and training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert data.dataset_name == "uoft-cs/cifar100" and training.output_dir == "out/l2p_cifar100-10"


def test_json(file):
    found = l2p(file(json.dumps({"top_k": 3, "learning_rate": 0.5, "grow_pool": None}), "config.json"), "--top_k", "2")
    assert (found.prompts.top_k, found.training.learning_rate) == (2, 0.5)


def test_null_replaces_a_default_and_a_preset(file):
    found = l2p(file("preset: cifar100-10\nimage_mean: null\n"))
    assert found.model.image_mean is None and l2p("--preset", "cifar100-10").model.image_mean == [0.0]
    assert l2p(file("image_mean: null\n"), "--image_mean", "1").model.image_mean == [1.0]


def test_the_command_line_replaces_what_a_file_says_in_other_words(file):
    data = l2p(
        file("num_tasks: 4\ndataset_name: me/data\nlabel_column_name: fine\ndataset_split: all\n"), "--increment=2"
    ).data
    assert (data.num_tasks, data.increment, data.dataset_name) == (None, 2, "me/data")
    data = l2p(file("num_tasks: 4\ndataset_name: me/data\nlabel_column_name: fine\n"), "--train_dir", "photos").data
    assert (data.num_tasks, data.dataset_name, data.train_dir, data.label_column_name) == (4, None, "photos", None)
    data = l2p(file("increment: 4\ninit_classes: 2\n"), "--num_tasks", "5").data
    assert (data.num_tasks, data.increment, data.init_classes) == (5, None, None)


def test_a_baseline_with_settings_of_its_method(file):
    found = baseline_arguments.parse(
        None, [file("method: ewc\nstrength: 3\npreset: [cifar100-10, sgd-1e-3]\n"), "--strength=4"]
    )
    assert found.methods()["ewc"].settings()["strength"] == 4.0 and found.training.optim == "sgd"


def test_a_file_may_name_the_run_that_learns_on(file):
    config = file("run: out/a\ntrain_dir: photos\n")
    assert learn._with_run([config]).tokens == ["out/a", "--train_dir=photos"]
    assert learn._with_run([config, "--seed", "1"]).tokens == ["out/a", "--train_dir=photos", "--seed", "1"]
    assert learn._with_run([config, "out/b"]).tokens == ["--train_dir=photos", "out/b"]
    assert learn._with_run(["out/b", "--seed", "1"]).tokens == ["out/b", "--seed", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learnin_rate: 3\n",
            r"config.yaml has 'learnin_rate', which is not an option .*: did you mean learning_rate\?",
        ),
        ("zzz: null\n", "config.yaml has 'zzz', which is not an option of this command. --help_all lists all"),
        ("- num_tasks\n", "config.yaml holds no options: expected lines such as"),
        ("seed: [1\n", "config.yaml cannot be read"),
        ("image_mean: []\n", r"config.yaml: image_mean is \[\]: expected one or more numbers or texts, or null"),
        ("report_to: [no]\n", r"config.yaml: report_to is \[False\]: .* write yes, no, on and off in quotes"),
        ("num_tasks: 3\nincrement: 2\n", "mutually exclusive"),
        ("num_tasks: null\n", "num_tasks"),
    ],
)
def test_what_is_refused(file, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        l2p(file(text)).data.load(0)


def test_refused_in_one_line(file, capsys, tmp_path):
    for argv in (
        [file("sed: 3\n")],
        [str(tmp_path / "none.yaml")],
        [file("seed: 3\n"), "--lerning_rate", "1"],
        ["--seed", "1", file("seed: 3\n")],
        [file("seed: much\n")],
    ):
        try:
            code = main(["train", "l2p", *argv])
        except SystemExit as stop:  # argparse's own
            code = stop.code
        told = capsys.readouterr().err
        assert code == 2 and told.startswith("error: ") and told.count("\n") == 1, told


def test_without_a_file_nothing_changes():
    argv = ["--dataset_name", "x.yaml", "a.json"]
    assert expand(argv) == (argv, frozenset(), None, frozenset()) and expand([]).tokens == []


@pytest.mark.parametrize("given", [["--output_dir", "a", "b"], "output_dir: [a, b]\n"])
def test_a_second_value_is_refused_by_the_option_that_it_follows(file, given):
    argv = given if isinstance(given, list) else [file(given)]
    with pytest.raises(ValueError, match="'b' belongs to no option: --output_dir takes a single value"):
        l2p(*argv)


def test_null_makes_way_for_an_option_that_excludes_it(file):
    assert l2p(file("num_tasks: null\nincrement: 5\n")).data.increment == 5


# ---- pgp-hf presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FOLDERS)
def test_presets_are_listed(method, capsys):
    assert main(["presets", method]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in names(FOLDERS[method])) and max(map(len, out.splitlines())) <= 100
    assert main(["presets"]) == 0 and out in capsys.readouterr().out


def test_a_preset_as_a_file_is_the_preset(file, capsys):
    assert main(["presets", "l2p", "imagenet-r-10"]) == 0
    text = capsys.readouterr().out
    assert text == as_file("l2p", "imagenet-r-10") and max(map(len, text.splitlines())) <= 100
    mine = l2p(file(text), "--output_dir", "out")
    preset = l2p("--preset", "imagenet-r-10", "--output_dir", "out")
    assert (mine.model, mine.data, vars(mine.prompts)) == (preset.model, preset.data, vars(preset.prompts))
    same = {field.name for field in fields(mine.training)} - {"logging_dir"}
    assert {name: getattr(mine.training, name) for name in same} == {
        name: getattr(preset.training, name) for name in same
    }
    assert main(["presets", "l2p", "none"]) == 2 and re.match(
        "error: preset 'none' is unknown", capsys.readouterr().err
    )


def test_a_preset_as_a_file_is_the_preset_on_a_gpu(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    mine, preset = expand([file(as_file("l2p", "cifar100-10"))]), expand(["--preset", "cifar100-10"])
    assert parsing._for_device(mine.given()) == parsing._for_device(preset.given()) == {"bf16": True}
