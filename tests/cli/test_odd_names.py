"""Folders whose names look like patterns, from the first task to the predictions of a run that was continued."""

from __future__ import annotations

import json

import pytest
import tiny

from pgp_hf.cli.learn import as_options
from pgp_hf.cli.main import main
from pgp_hf.runs.folder import RESULTS

pytestmark = pytest.mark.usefixtures("without_figures")


def write(root, classes, seed):
    """Write a folder of images of classes."""
    for i, row in enumerate(tiny.data(classes=len(classes), train=5, test=1, seed=seed)["train"]):
        folder = root / classes[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("name", "other"),
    [("c?%s{0}", "cX"), *[pytest.param(*names, marks=pytest.mark.slow) for names in (("a[1]", "a1"), ("b*", "bX"))]],
)
def test_a_run_learns_and_predicts_in_folders_of_any_name(name, other, tmp_path, capsys):
    for folder in (tmp_path / other, tmp_path / other / "more"):  # what the names would mean as patterns
        folder.mkdir()
        (folder / RESULTS).write_text("{}")
    place = tmp_path / name
    place.mkdir()
    run = tiny.finished_run(place)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    trainer = tiny.trainer(run, num_train_epochs=1)
    trainer.train(resume_from_checkpoint=True)
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    photos = write(place / "photos", ("cat", "dog"), seed=5)
    options = ("--train_dir", photos, "--output_dir", place / "more", "--num_train_epochs", 1, "--use_cpu", "true")
    assert main(["learn", *map(str, (run, *options)), "--disable_tqdm", "true"]) == 0
    assert json.loads((place / "more" / RESULTS).read_text())["finished_tasks"] == 4
    capsys.readouterr()
    assert main(["predict", str(place / "more"), str(photos / "cat"), "--json_lines"]) == 0
    found = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
    assert found == sorted(map(str, (photos / "cat").iterdir()))
    assert (tmp_path / other / "more" / RESULTS).read_text() == "{}"


def test_a_path_in_a_message_keeps_its_name():
    path = "/data/test_dataset/label_names/resume_from_checkpoint=True"
    assert as_options(f"test_dataset {path} is no folder") == f"--known_test_dir {path} is no folder"
