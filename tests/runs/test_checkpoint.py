"""A checkpoint is taken whole or not at all: any of its files missing, cut or flipped gives way to the one before."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import tiny
from transformers import TrainerCallback

from pgp_hf.runs.checkpoint import SEAL, check_checkpoint, checkpoints, delete_checkpoint, seal
from pgp_hf.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was interrupted in its first task, with checkpoints after two and four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(folder, callbacks=[Stop()], save_strategy="steps", save_steps=2).train()
    return folder


FILES = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "method.json", "method.safetensors"),
    *("optimizer.json", "optimizer.safetensors", "preprocessor_config.json", "progress.json", "random.safetensors"),
    *("scheduler.json", "settings.json", "stream.json", "trainer_state.json"),
)


def newest(folder):
    return folder / "checkpoints" / "task-1" / "checkpoint-4"


def test_a_checkpoint_holds_safetensors_json_and_a_card(stopped):
    found = sorted(path.name for path in newest(stopped).iterdir())
    assert found == sorted([*FILES, SEAL])
    sealed = json.loads((newest(stopped) / SEAL).read_text())
    assert sealed["format"] == 1 and sealed["best"] is None and sorted(sealed["files"]) == sorted(FILES)
    assert [path.name for path in checkpoints(newest(stopped).parent)] == ["checkpoint-4", "checkpoint-2"]
    check_checkpoint(newest(stopped))


def damaged(path):
    """Yield after each damage to a file, which is whole again in the end."""
    whole = path.read_bytes()
    path.unlink()
    yield "missing"
    for length in sorted({0, 1, len(whole) // 2, len(whole) - 1} - {len(whole)}):
        path.write_bytes(whole[:length])
        yield f"cut to {length}"
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        yield f"flipped at {place}"
    path.write_bytes(whole + b"\0")
    yield "longer"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_named_and_the_checkpoint_before_is_taken(stopped, name):
    run, count = RunFolder(stopped), 0
    for how in damaged(newest(stopped) / name):
        with pytest.warns(
            UserWarning, match=rf"checkpoint-4.* {name.replace('.', '[.]')}|{name}.*The checkpoint before"
        ):
            assert run.last_checkpoint(0) == newest(stopped).with_name("checkpoint-2"), how
        count += 1
    assert count >= 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.last_checkpoint(0) == newest(stopped)


def test_a_damaged_seal_says_the_same_or_gives_way(stopped, tmp_path):
    """A bit in white space is no harm; any other one, and any cut, is noticed."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run, path = RunFolder(tmp_path), newest(tmp_path) / SEAL
    whole = path.read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ 1 << i % 7]) + whole[i + 1 :] for i in range(0, len(whole), 5)]
    cuts = [whole[:length] for length in range(0, len(whole), 97)]
    taken = []
    for altered in [*flips, *cuts]:
        path.write_bytes(altered)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            taken.append(run.last_checkpoint(0).name)
        assert (taken[-1] == "checkpoint-4") == (not told)
        if not told:
            assert json.loads(altered) == json.loads(whole)
    assert taken.count("checkpoint-2") > 0.7 * len(taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format=2: this version reads 1"),
        ({"format": None}, "format=None"),
        ({"files": {}}, "does not list files"),
        ({"files": []}, "does not list files"),
        ({"files": {"../../secret": {"sha256": "0", "bytes": 1}}}, "does not list files"),
        ({"files": {"/etc/passwd": {"sha256": "0", "bytes": 1}}}, "does not list files"),
        ({"files": {"trainer_state.json": 1, "progress.json": {}}}, "does not list files"),
        (
            {"files": {"progress.json": {"sha256": "short", "bytes": 1}}},
            r"short.* is not an object of sha256 \(64 digits",
        ),
        ({"files": {"progress.json": {"sha256": "a" * 64, "bytes": 1}}}, "trainer_state.json is not among them"),
        ({"best": "../../task-1"}, "does not list files"),
        ({"best": 3}, "does not list files"),
        ({"best": "checkpoint-3"}, "goes back to the best checkpoint when training ends, and .*checkpoint-3 has no"),
        ({"more": 1}, "does not list files"),
    ],
)
def test_a_seal_that_says_something_else(stopped, tmp_path, change, message):
    folder = shutil.copytree(newest(stopped), tmp_path / "checkpoint-4")
    content = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder)


def test_a_damaged_best_checkpoint_is_passed_over_with_those_that_need_it(stopped, tmp_path):
    run = RunFolder(tmp_path)
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    two, four = (run.checkpoints(0) / name for name in ("checkpoint-2", "checkpoint-4"))
    (four / SEAL).unlink()
    seal(four, "checkpoint-2")
    assert run.last_checkpoint(0) == four
    (two / "method.json").write_text("{}")
    with pytest.warns(UserWarning, match="goes back to the best checkpoint.*method.json is damaged"):
        assert run.last_checkpoint(0) is None


def test_a_checkpoint_of_an_earlier_version_is_named_and_not_read(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 4):
        folder = run.checkpoints(0) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"\x80\x04never read")
        (folder / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match="earlier version, whose optimizer state is pickled and is not read") as told:
        assert run.last_checkpoint(0) is None
    assert {f"checkpoint-{step}" for step in (2, 4)} == {str(w.message).partition(" was")[0][-12:] for w in told}


def test_an_unfinished_checkpoint_and_other_folders_are_passed_over(stopped, tmp_path):
    run = RunFolder(tmp_path)
    assert run.last_checkpoint(0) is None
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint-notes", "checkpoint-9-old", ".checkpoint-10-x7"):
        (run.checkpoints(0) / name).mkdir()
    (run.checkpoints(0) / "checkpoint-11").write_text("a file")
    assert run.last_checkpoint(0).name == "checkpoint-4"
    (run.checkpoints(0) / "checkpoint-100").mkdir()
    with pytest.warns(UserWarning, match=f"checkpoint-100 has no {SEAL}: it was not written to its end"):
        assert run.last_checkpoint(0).name == "checkpoint-4"


def test_what_was_being_written_is_swept_and_nothing_else(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = RunFolder(tmp_path)
    for name in (".checkpoint-6-x7_ab3de", ".checkpoint-notes", ".checkpoint-6-mine", "notes"):
        (run.checkpoints(0) / name).mkdir()
        (run.checkpoints(0) / name / "optimizer.json").write_text("")
    (tmp_path / "checkpoints" / "mine" / ".checkpoint-6-x7_ab3de").mkdir(parents=True)
    run.sweep()
    left = {path.name for path in run.checkpoints(0).iterdir()}
    assert left == {".checkpoint-notes", ".checkpoint-6-mine", "notes", "checkpoint-2", "checkpoint-4"}
    assert (tmp_path / "checkpoints" / "mine" / ".checkpoint-6-x7_ab3de").exists()
    assert run.last_checkpoint(0) == run.checkpoints(0) / "checkpoint-4"


@pytest.mark.parametrize("seal_too", [True, False])
def test_only_what_was_written_is_deleted(stopped, tmp_path, seal_too):
    folder = shutil.copytree(newest(stopped), tmp_path / "checkpoint-4")
    if not seal_too:
        (folder / SEAL).write_text("{")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "rng_state_0.pth").write_bytes(b"")
    kept = shutil.copytree(folder, tmp_path / "checkpoint-6")
    (kept / "notes.txt").write_text("mine")
    (kept / "inner").mkdir()
    (kept / "inner" / "more.csv").write_text("mine")
    for each in (folder, kept):
        delete_checkpoint(each)
    assert not folder.exists()
    assert sorted(path.name for path in kept.rglob("*")) == ["inner", "more.csv", "notes.txt"]


def test_a_seal_names_no_file_outside_to_delete(stopped, tmp_path):
    folder = shutil.copytree(newest(stopped), tmp_path / "checkpoint-4")
    (tmp_path / "mine.txt").write_text("mine")
    content = json.loads((folder / SEAL).read_text())
    content["files"] |= {"../mine.txt": {"sha256": "0", "bytes": 4}, str(tmp_path / "mine.txt"): {}}
    (folder / SEAL).write_text(json.dumps(content))
    delete_checkpoint(folder)
    assert (tmp_path / "mine.txt").exists() and not folder.exists()
