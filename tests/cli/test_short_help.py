"""The short help: it has the package's own options, fits a terminal, and its commands can be copied."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest

from pgp_hf import DualPromptConfig, L2PConfig, PGPTrainingArguments
from pgp_hf.cli import baseline_arguments, helping, parsing, trainings
from pgp_hf.cli.arguments import DataArguments, ModelArguments, RunArguments
from pgp_hf.cli.learn import LearnArguments
from pgp_hf.cli.main import main
from pgp_hf.cli.train import METHODS

PROMPTS = {
    "l2p": parsing.prompt_arguments(L2PConfig),
    "dualprompt": parsing.prompt_arguments(DualPromptConfig),
    "clip": trainings.clip_arguments(),
}
KINDS = {name: (ModelArguments, DataArguments, prompts, RunArguments) for name, prompts in PROMPTS.items()}
KINDS |= {"baseline": baseline_arguments.COMMON[:3], "learn": (LearnArguments,)}
HIDDEN = {"remove_unused_columns", "logging_steps", "logging_nan_inf_filter"}  # of transformers, with other defaults
COMMANDS = {**{name: ("train", name) for name in METHODS}, "learn": ("learn",)}


def shown(name, capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main([*COMMANDS[name], *options])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_has_all_own_options_and_fits(name, capsys):
    text = shown(name, capsys, "--help")
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert not re.search(r"bound\w", text)  # where two columns met
    own = {field.name for kind in KINDS[name] for field in dataclasses.fields(kind) if field.init}
    own |= set(PGPTrainingArguments.__annotations__) - HIDDEN
    # of models without prompts, and of those with
    others = set(helping.PROMPTS_ALONE.split()) if name == "baseline" else {"head_learning_rate"}
    assert others <= own
    own -= others
    told = set(re.findall(r"--(\w+)", text))
    assert own <= told, f"pgp_hf/cli/helping.py lacks {sorted(own - told)}"
    assert not others & told
    full = shown(name, capsys, "--help_all")
    unknown = told - set(re.findall(r"--(\w+)", full)) - {"traceback", "help"}
    assert not unknown, f"pgp_hf/cli/helping.py names {sorted(unknown)}"
    assert max(map(len, full.splitlines())) <= 100 and "--adam_beta1" in full and "--adam_beta1" not in text
    assert shown(name, capsys, "-h") == text


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_told_as_they_are(name, capsys):
    kinds = (*KINDS[name], *([baseline_arguments.BaselineTrainingArguments] if name == "baseline" else []))
    kinds = (PGPTrainingArguments, *kinds)
    defaults = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    text, checked = shown(name, capsys, "--help"), 0
    for option, what in re.findall(r"^  --(\w+) (.*(?:\n {32}.*)*)", text, re.MULTILINE):
        told = re.search(r"\(default: ([^)]*)\)", what) or re.search(r"(\w+) \(default\)", what)
        if told is None or "'s own" in told[1] or option in ("output_dir", "revision"):
            continue
        field = defaults[option]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        expected = " ".join(map(str, default)) if isinstance(default, list) else str(default).removesuffix(".0")
        assert told[1].removesuffix(".0") == expected, option
        checked += 1
    assert checked >= (0 if name == "learn" else 7)


@pytest.mark.parametrize("name", METHODS)
def test_commands_of_the_help_can_be_copied(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("num_tasks: 2\n")
    lines = re.findall(r"^  ((?:pgp-hf|accelerate launch -m pgp_hf) train .*)", shown(name, capsys, "--help"), re.M)
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line, comments=True)
        argv = words[words.index("train") + 2 :]
        if "--help" not in argv:
            if name == "baseline":
                baseline_arguments.parse(None, argv)
            else:
                parsing.parse(None, PROMPTS[name], name, argv)


def test_the_baselines_are_those_that_can_be_chosen():
    assert list(helping.BASELINES) != [] and set(helping.BASELINES) == set(baseline_arguments.names())
