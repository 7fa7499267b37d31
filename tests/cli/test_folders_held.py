"""The commands of the examples hold their folders, leave on signals, and delete nothing by mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny

from pgp_hf import L2PConfig
from pgp_hf.cli import baseline_arguments, baselines, experiment
from pgp_hf.cli.parsing import parse, prompt_arguments
from pgp_hf.runs.lock import HOLDER, LOCK

CPU = ("--use_cpu", "true")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*argv, **settings):
    arguments = parse("", prompt_arguments(L2PConfig), "l2p", [*CPU, *map(str, argv)])
    return experiment.run(
        "L2P", arguments, lambda _, stream: tiny.model(base=tiny.backbone(num_labels=stream.num_classes))
    )


def run_baselines(*argv):
    return baselines.run(
        baseline_arguments.parse("", [*CPU, *map(str, argv)]),
        lambda stream: tiny.plain("full", tiny.backbone(num_labels=stream.num_classes)),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def pair(finished, tmp_path):
    """A finished run and its twin."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.copytree(finished, out / "baseline")
    return out


@pytest.mark.parametrize("where", ["rnu", "out/rnu"])
def test_a_mistaken_path_deletes_neither_the_run_nor_its_twin(pair, tmp_path, where):
    before = content(pair)
    given = ("--output_dir", pair, "--overwrite_output_dir", "true", "--resume_from_checkpoint", tmp_path / where)
    for command in (run, run_baselines):
        with pytest.raises(ValueError, match="rnu' does not exist: expected"):
            command(*given)
    assert content(pair) == before


@pytest.mark.parametrize(
    ("name", "what"), [("baseline", "twin without projection"), ("published", "run in published/")]
)
def test_a_run_beside_goes_on_from_the_one_beside(pair, finished, name, what):
    shutil.move(pair / "baseline", pair / name)
    assert experiment.beside(True, name) is True and experiment.beside(None, name) is None
    assert experiment.beside(str(pair), name) == str(pair / name)
    assert experiment.beside(str(pair / "task-2"), name) == str(pair / name / "task-2")
    for none in (str(finished), str(finished / "task-1"), "owner/name@task-1"):
        with pytest.warns(UserWarning, match=f"has no {what}: that is trained from the first task"):
            assert experiment.beside(none, name) is None


@pytest.mark.parametrize(
    ("command", "argv", "folders"),
    [
        (run, (), ("out", "out/baseline", "out/published")),
        (run, ("--projection", "pgp"), ("out", "out/baseline")),
        (run, ("--no_compare", "true"), ("out",)),
        (run, ("--projection", "none"), ("out",)),
        (run_baselines, ("--method", "all"), ("out",)),
        (run_baselines, ("--method", "ewc"), ("out",)),
    ],
)
def test_the_folders_are_held_and_a_signal_leaves(tmp_path, monkeypatch, capsys, command, argv, folders):
    module, held = (experiment if command is run else baselines), []

    def work(*args):
        held.extend(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(LOCK))
        os.kill(os.getpid(), signal.SIGHUP)
        held.append("went on")

    monkeypatch.setattr(module, "_run", work)
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as caught:
        command("--output_dir", tmp_path / "out", *argv)
    assert caught.value.code == 128 + signal.SIGHUP and signal.getsignal(signal.SIGHUP) == before
    assert sorted(held) == [*folders] and not (tmp_path / "out").exists()
    assert "SIGHUP: stopped at once." in capsys.readouterr().err


def test_a_file_called_settings_is_not_deleted(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    Path(tmp_path / "out" / "settings.json").write_text(json.dumps({"editor.fontSize": 12}))
    with pytest.raises(ValueError, match="settings.json is not of earlier runs"):
        baselines._clear(tmp_path / "out")
    assert (tmp_path / "out" / "settings.json").exists()
    assert not (tmp_path / "out" / HOLDER).exists()
