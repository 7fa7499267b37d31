"""The command line that classifies: `examples/predict.py`."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from pgp_hf import load_pretrained
from pgp_hf.cli import console

SCRIPT = Path(__file__).parents[2] / "examples" / "predict.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that names its backbone."""
    return tiny.finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(tmp_path):
    """Three images: one at the top, two in folders below; and a file that is none."""
    stream = tiny.stream()
    for i, name in enumerate(("a.png", "deep/b.jpg", "deep/er/c.PNG")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        stream.test(i)[0]["image"].save(tmp_path / name)
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def predict(capsys):
    def call(*arguments):
        main = runpy.run_path(str(SCRIPT))["main"]
        code = console.run(main, [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_table(run, photos, predict):
    code, out, err = predict(run, photos, "--top_k", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    files = [photos / "a.png", photos / "deep" / "b.jpg", photos / "deep" / "er" / "c.PNG"]
    assert len(lines) == 6
    for i, (file, found) in enumerate(zip(files, load_pretrained(run).predict(files, top_k=2), strict=True)):
        assert lines[2 * i].split(maxsplit=2) == [str(file), f"{found[0]['score']:.2%}", found[0]["label"]]
        assert lines[2 * i + 1].split(maxsplit=1) == [f"{found[1]['score']:.2%}", found[1]["label"]]


@pytest.mark.parametrize("size", [1, 2, 32])
def test_json_lines_of_a_revision(run, photos, predict, size):
    arguments = ("--revision", "task-1", "--json_lines", "--batch_size", size)
    code, out, _ = predict(run, photos / "deep", photos / "a.png", *arguments)
    found = [json.loads(line) for line in out.splitlines()]
    files = [photos / "deep" / "b.jpg", photos / "deep" / "er" / "c.PNG", photos / "a.png"]
    assert code == 0 and [one["image"] for one in found] == [str(file) for file in files]
    classifier = load_pretrained(run, "task-1")
    for one, expected in zip(found, classifier.classify(files), strict=True):
        assert [entry["label"] for entry in one["predictions"]] == [expected.labels[0]["label"]]
        assert one["predictions"][0]["score"] == pytest.approx(expected.labels[0]["score"], abs=1e-5)
        assert one["prompts"] == expected.prompts


def test_files_that_cannot_be_read_are_named_after_the_others(run, photos, predict):
    (photos / "deep" / "broken.png").write_bytes(b"\x89PNG broken")
    (photos / "empty").mkdir()
    code, out, err = predict(run, photos / "deep", photos / "gone.png", photos / "empty", "--json_lines")
    assert code == 1
    assert [Path(json.loads(line)["image"]).name for line in out.splitlines()] == ["b.jpg", "c.PNG"]
    for text in ("gone.png does not exist", "empty holds no images", "broken.png cannot be read as an image"):
        assert text in err
    assert err.count("error: ") == 3


def test_a_file_that_is_named_twice_is_classified_once(run, photos, predict):
    _, out, _ = predict(run, photos / "a.png", photos, photos / "a.png")
    assert out.count("a.png") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_for_many_files_on_a_terminal_does_not_touch_the_output(run, tmp_path, predict, monkeypatch, terminal):
    for i in range(25):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    code, out, err = predict(run, tmp_path, "--json_lines", "--batch_size", 10)
    assert code == 0 and ("25/25" in err if terminal else err == "")
    assert [json.loads(line)["image"] for line in out.splitlines()] == sorted(str(f) for f in tmp_path.glob("*.png"))


def test_a_model_that_is_refused(run, photos, predict, tmp_path):
    code, out, err = predict(run, photos, "--revision", "task-9")
    assert (code, out) == (2, "") and err.startswith("error: revision='task-9'") and err.count("\n") == 1
    assert predict(tmp_path / "nowhere", photos)[0] == 2


@pytest.mark.parametrize("arguments", [["--top_k", "0"], ["--batch_size", "none"], ["--num_workers", "-1"], []])
def test_wrong_arguments(arguments, predict, capsys):
    with pytest.raises(SystemExit) as error:
        predict(*(["model", "image", *arguments] if arguments else []))
    assert error.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_help(predict, capsys):
    with pytest.raises(SystemExit) as error:
        predict("--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for option in ("--revision", "--top_k", "--batch_size", "--json_lines", "--backbone", "exit code"):
        assert option in text


def test_as_a_script(run, photos, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(run), str(photos / "a.png")])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert error.value.code == 0 and "class " in capsys.readouterr().out
