"""The console command: `pgp-hf`, or `python -m pgp_hf`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pgp_hf import __version__, load_pretrained
from pgp_hf.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0 and capsys.readouterr().out == alone
    assert alone.startswith("usage: pgp-hf ") and all(f"{name}  " in alone for name in COMMANDS)


def test_help_imports_nothing_that_takes_long():
    code = """
import sys
from pgp_hf.cli.main import COMMANDS, main
main([])
for command in (*COMMANDS, "train l2p", "train baseline"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print({"torch", "transformers", "datasets", "peft", "numpy", "huggingface_hub", "gradio"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out == f"pgp-hf {__version__}\n"


@pytest.mark.parametrize("argv", [["lern"], ["--lern"], ["pred", "--help"]])
def test_unknown_commands(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    told = capsys.readouterr().err
    assert error.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert "learn" in told if argv[0].isalpha() else "--lern" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as error:
        main([name, "--help"])
    assert error.value.code == 0 and capsys.readouterr().out.startswith(f"usage: pgp-hf {name} ")


def test_the_package_declares_the_command():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"pgp-hf": f"{main.__module__}:{main.__name__}"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as error:
        raise SystemExit(main([name, "--no_such_option"]))
    out, told = capsys.readouterr()
    assert error.value.code == 2 and out == "" and told.startswith("error: ") and told.count("\n") == 1


def test_predict(tmp_path, without_figures, capsys):
    run, photo = tiny.finished_run(tmp_path), tmp_path / "photo.png"
    tiny.stream().test(0)[0]["image"].save(photo)
    best = load_pretrained(run).predict(photo)[0][0]
    capsys.readouterr()
    assert main(["predict", str(run), str(photo)]) == 0
    assert capsys.readouterr().out.split(maxsplit=2) == [str(photo), f"{best['score']:.2%}", f"{best['label']}\n"]
    assert main(["predict", str(tmp_path / "nowhere"), str(photo)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    with pytest.raises(ValueError, match="nowhere"):
        main(["predict", str(tmp_path / "nowhere"), str(photo), "--traceback"])


def test_push_refuses_a_folder_without_tasks(tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/run"]) == 2
    out, told = capsys.readouterr()
    assert out == "" and told.startswith(f"error: {tmp_path} holds no finished task") and told.count("\n") == 1
