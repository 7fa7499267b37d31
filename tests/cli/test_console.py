"""An error of the user is one line on stderr with exit code 2; `--traceback` shows where it comes from."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny

from pgp_hf.cli import console
from pgp_hf.cli.main import main
from pgp_hf.training.signals import ending

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("error", [ValueError("a\n b\x1b[2J"), OSError("a b\x1b[2J"), ImportError("a\tb\x1b[2J")])
def test_one_line(error, capsys):
    def refuse(argv):
        raise error

    assert console.run(refuse, ["--x"]) == 2
    assert capsys.readouterr() == ("", "error: a b\\x1b[2J\n")
    with pytest.raises(type(error)):
        console.run(refuse, ["--traceback", "--x"])


@pytest.mark.parametrize("fault", [lambda: 1 // 0, lambda: len(3), lambda: console.one_line(), lambda: "a" + 1])
def test_a_fault_of_the_program_keeps_its_traceback(fault):
    with pytest.raises((ZeroDivisionError, TypeError)):
        console.run(lambda argv: fault(), [])


def test_a_type_that_is_refused_is_one_line(capsys):
    def refuse():
        raise TypeError(
            "a model without a head"
        )  # fmt: skip

    assert console.run(lambda argv: refuse(), []) == 2 and capsys.readouterr().err == "error: a model without a head\n"


@pytest.mark.parametrize("argv", [[], ["--traceback"]])
def test_an_interruption_is_no_fault(argv, capsys):
    def interrupted(given):
        raise KeyboardInterrupt

    if argv:
        with pytest.raises(KeyboardInterrupt):
            console.run(interrupted, argv)
    else:
        assert console.run(interrupted, argv) == 130 and capsys.readouterr() == ("", "interrupted\n")


def test_a_training_that_is_interrupted_has_the_last_word(capsys):
    def stopped(given):
        raise ending(signal.SIGINT)

    with pytest.raises(SystemExit) as error:
        console.run(stopped, [])
    assert error.value.code == 130 and capsys.readouterr() == ("", "")


def test_an_interruption_of_imports_is_no_fault_either(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("pgp_hf.cli.main.importlib.import_module", interrupted)
    assert main(["learn", "out"]) == 130 and capsys.readouterr() == ("", "interrupted\n")


def test_arguments_in_python_are_told_as_options(capsys):
    def refuse(argv):
        raise ValueError("image_column='x'? resume_from_checkpoint=True, compile_trunk=True, but a/backbone=b stays")

    assert console.run(refuse, []) == 2
    told = "--image_column_name='x'? --resume_from_checkpoint true, --compile_trunk true, but a/backbone=b stays"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_commands_return_their_codes_and_see_no_traceback_option():
    assert console.run(lambda argv: 1 if argv == ["--x"] else 0, ["--x", "--traceback"]) == 1
    assert console.run(lambda argv: None, []) == 0 and console.run(lambda argv: None, [], str.upper) == 0


def test_warnings_are_lines_that_fit():
    found = []

    def warn(argv):
        found.append(warnings.formatwarning("a  path/to-" + "many words " * 20, UserWarning, "file.py", 3))

    before = warnings.formatwarning
    for argv in ([], ["--traceback"]):
        console.run(warn, argv)
    own, full = found
    assert own.startswith("warning: a path/to-many words many") and max(map(len, own.splitlines())) <= 100
    assert "file.py:3: UserWarning" in full and warnings.formatwarning is before


def test_other_libraries_show_no_bar_without_a_terminal(monkeypatch):
    found, name = [], "HF_DATASETS_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(name, raising=False)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown, raising=False)
        console.run(lambda argv: found.append(os.environ.get(name)), [])
    assert found == [None, "1"] and name not in os.environ


@pytest.mark.parametrize("before", [True, False])
def test_traceback_before_or_after_the_command(before, tmp_path, capsys):
    argv = ["presets", "l2p", "none"]
    with pytest.raises(ValueError, match="preset 'none' is unknown"):
        main(["--traceback", *argv] if before else [*argv, "--traceback"])
    assert main(argv) == 2 and capsys.readouterr().err.startswith("error: preset 'none' is unknown: choose one of")


@pytest.mark.parametrize("name", ["l2p_pgp", "dualprompt_pgp", "clip_pgp", "baselines"])
def test_examples_refuse_as_the_command_does_and_help_fast(name, capsys):
    script = EXAMPLES / f"run_{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python {script} [CONFIG]"), done.stderr
    with tiny.script(script) as module:
        assert console.run(module.main, ["none.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: none.yaml does not exist: ") and told.count("\n") == 1


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_show_help_that_fits(example):
    text = example.read_text(encoding="utf-8")
    if "__doc__" in text:  # which is what --help shows
        assert max(map(len, str(ast.get_docstring(ast.parse(text))).splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "option", "value", "reason"),
    [
        ("predict run image.png", "num_workers", "x", "'x' is not a whole number"),
        ("predict run image.png", "num_workers", "-1", "-1 is below 0"),
        ("demo run", "port", "65536", "65536 is above 65535"),
        ("convert weights.safetensors out", "num_heads", "0", "0 is below 1"),
        ("push run me/run", "wait", "-1", "-1 is not a number of seconds from 0"),
        ("push run me/run", "wait", "nan", "nan is not a number of seconds from 0"),
    ],
)
def test_numbers_that_are_refused(capsys, command, option, value, reason):
    with pytest.raises(SystemExit):
        main([*command.split(), f"--{option}={value}"])
    assert capsys.readouterr().err == f"error: argument --{option}: {reason}\n"


@pytest.mark.parametrize("device", ["nonsense", "cpu7x", "cuda:99"])
def test_a_device_that_is_not_here(device, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "run", "image.png", f"--device={device}"])
    told = capsys.readouterr().err
    assert told.startswith(f"error: argument --device: {device} cannot be used here: ") and told.count("\n") == 1


@pytest.mark.parametrize("command", ["presets", "--help", "learn --help", "train l2p --help"])
def test_a_reader_that_has_gone_is_no_error(command):
    program = [sys.executable, "-m", "pgp_hf", *command.split()]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, **pipes, cwd=EXAMPLES.parent, env=buffered) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b"" and process.wait() == 141
