"""One file of digests for all files of a task: what it lists, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import tiny

from pgp_hf import load_pretrained
from pgp_hf.runs.digests import Digests
from pgp_hf.runs.folder import DIGESTS, RunFolder
from pgp_hf.runs.revision import Revision

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with tiny.without_figures():
        return tiny.finished_run(tmp_path_factory.mktemp("digests"), head="statistics")


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder, **changes):
    """Change entries of the file; a function changes the value that is there."""
    content = json.loads((folder / DIGESTS).read_text())
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    (folder / DIGESTS).write_text(json.dumps(content))


def test_all_files_of_each_task_are_listed_and_the_file_is_written_last(run):
    for t in range(3):
        folder = run / f"task-{t + 1}"
        content = json.loads((folder / DIGESTS).read_text())
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        last = files.pop(DIGESTS)
        assert content["files"].keys() == files.keys() > {"preprocessor_config.json", "stream.json", "README.md"}
        for entry, path in ((content["files"][name], path) for name, path in files.items()):
            assert entry == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        data = (run / "features" / f"task-{t + 1}.safetensors").read_bytes()
        assert content["features"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        assert last.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in files.values())
    assert (run / DIGESTS).read_bytes() == last.read_bytes()


def test_it_is_the_last_file_that_is_copied_to_the_top(run, tmp_path, monkeypatch):
    shutil.copytree(run / "task-1", tmp_path / "task-1")
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(str(b)), replace(a, b)))
    RunFolder(tmp_path).promote(0)
    assert len(order) > 5 and order[-1] == str(tmp_path / DIGESTS)


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "stream.json", "results.json", "method.json", "projection.json"]
)
def test_a_file_that_is_read_is_refused_when_it_was_altered(copy, name):
    path = copy / "task-3" / name
    path.write_text(path.read_text().replace("\n", " \n", 1))  # the same content
    with pytest.raises(
        ValueError, match=rf"{name} is not the file that the run wrote: it has \d+ bytes, \d+ by digests.json"
    ):
        load_pretrained(copy, "task-3")
    path.write_text(path.read_text().replace(" \n", "\n ", 1)[1:])
    with pytest.raises(ValueError, match=f"{name} is not the file that the run wrote"):
        load_pretrained(copy, "task-3")


def test_cards_and_figures_may_be_edited_and_added(copy):
    folder = copy / "task-3"
    (folder / "README.md").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.png").write_bytes(b"1")
    (folder / "notes.txt").write_text("mine")
    assert load_pretrained(folder).predict(tiny.data()["test"][0]["image"])


def test_files_that_are_missing_or_that_the_run_did_not_write_are_named(copy):
    (copy / "task-2" / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="processor_config.json is not listed in digests.json"):
        load_pretrained(copy, "task-2")
    (copy / "task-3" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no preprocessor_config.json, which digests.json lists"):
        load_pretrained(copy, "task-3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "no object of digests by path"),
        ({"more": 1}, "it has files, features, more where"),
        ({"features": {"sha256": "a" * 64}}, "not an object of sha256"),
        ({"features": {"sha256": "A" * 64, "bytes": 1}}, "not an object of sha256"),
        ({"features": {"sha256": "a" * 64, "bytes": True}}, "not an object of sha256"),
        ({"files": lambda files: {**files, "../x": files["README.md"]}}, r"'\.\./x' is not a path in this folder"),
        ({"files": lambda files: {**files, "/etc/x": files["README.md"]}}, "is not a path in this folder"),
        ({"files": lambda files: {**files, "a\\b": files["README.md"]}}, "is not a path in this folder"),
    ],
    ids=["a list", "another name", "no size", "capitals", "a truth value", "a parent", "absolute", "a backslash"],
)
def test_a_damaged_file_of_digests_is_refused(copy, changes, message):
    rewrite(copy / "task-3", **changes)
    with pytest.raises(ValueError, match=rf"digests.json is damaged \(.*{message}"):
        Digests.read(copy / "task-3")
    with pytest.raises(ValueError, match="digests.json is damaged"):
        load_pretrained(copy, "task-3")


def test_a_run_of_an_earlier_version_has_no_digests_and_loads(copy):
    (copy / DIGESTS).unlink()
    for t in range(3):
        (copy / f"task-{t + 1}" / DIGESTS).unlink()
    assert Revision.read(copy).digests is None and load_pretrained(copy).predict(tiny.data()["test"][0]["image"])
    trainer = tiny.trainer(copy, model=tiny.model(head="statistics"), num_train_epochs=1)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.results.matrix) == 3


def resumed(source, target, **settings):
    trainer = tiny.trainer(target, model=tiny.model(head="statistics"), num_train_epochs=1, **settings)
    trainer.train(resume_from_checkpoint=str(source))
    return trainer


def test_features_that_were_altered_are_refused(copy, tmp_path):
    path = copy / "features" / "task-2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"features.task-2.safetensors is not the file that the run wrote"):
        resumed(copy, copy)
    rewrite(copy / "task-2", features=None)
    with pytest.raises(ValueError, match=r"features.task-2.safetensors is not listed in"):
        resumed(copy, copy)


def test_features_beside_a_single_task_are_checked_by_the_digests_of_their_own_task(copy, tmp_path):
    path = copy / "features" / "task-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"features.task-1.safetensors is not the file that the run wrote"):
        resumed(copy / "task-2", tmp_path / "on")


def test_a_copy_of_a_run_has_digests_of_its_own(copy, tmp_path):
    (copy / "task-2" / "README.md").write_text("edited")
    resumed(copy, tmp_path / "on")
    for t in range(3):
        folder = tmp_path / "on" / f"task-{t + 1}"
        found = Digests.read(folder)
        assert found.files["README.md"].bytes == (folder / "README.md").stat().st_size
        for name in found.files:
            found.check(name)
        found.check_features(tmp_path / "on" / "features" / f"task-{t + 1}.safetensors", own=True)
    resumed(tmp_path / "on", tmp_path / "on")


def test_the_first_task_of_a_run_from_a_single_revision_has_the_digests_of_earlier_features(copy, tmp_path):
    """As its folders are not there, the features of the tasks before are computed again, or taken over."""
    alone = tmp_path / "alone"
    shutil.copytree(copy / "task-2", alone / "task-2")
    shutil.copytree(copy / "features", alone / "features")
    on = tmp_path / "on"
    resumed(alone / "task-2", on)
    assert Digests.read(on / "task-2").earlier_features.keys() == {"task-1.safetensors"}
    assert not Digests.read(on / "task-3").earlier_features
    resumed(on, on)
    path = on / "features" / "task-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"features.task-1.safetensors is not the file that the run wrote"):
        resumed(on, on)


def test_a_file_that_was_altered_is_not_copied_to_another_run(copy, tmp_path):
    path = copy / "task-1" / "method.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"task-1.method.safetensors is not the file that the run wrote"):
        resumed(copy, tmp_path / "on")
