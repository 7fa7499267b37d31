"""Finished work is never trained over or deleted, whatever is asked for by mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forks
import pytest
import tiny
from transformers import TrainerCallback

from pgp_hf import PGPTrainer, TaskStream
from pgp_hf.runs.folder import QUERIES, RunFolder
from pgp_hf.runs.lock import held

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trainer(folder, **settings):
    return tiny.trainer(folder, num_train_epochs=1, **settings)


def learner(run, folder, **settings):
    """Return a trainer that goes on from a run."""
    return PGPTrainer.from_pretrained(run, args=tiny.arguments(folder, num_train_epochs=1, **settings))


def new_classes():
    extra = tiny.data(classes=8, seed=1)
    return extra["train"].filter(lambda label: label > 5, input_columns="label")


# ---- gaps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["task-1", "task-2", "continued.json"])
def test_a_run_with_a_gap_is_neither_resumed_nor_learned_on(run, tmp_path, lost):
    if lost == "continued.json":
        (run / lost).write_text('{"first": 5}')
    else:
        shutil.rmtree(run / lost)
    before = content(run)
    for source, folder in ((True, run), (str(run), tmp_path / "new")):
        with pytest.raises(ValueError, match="a finished task is never trained over"):
            trainer(folder).train(resume_from_checkpoint=source)
    with pytest.raises(ValueError, match="a finished task is never trained over"):
        learner(run, run)
    assert content(run) == before and not content(tmp_path / "new")


def test_the_last_task_may_be_trained_again_on_purpose(run, finished):
    shutil.rmtree(run / "task-3")
    before = {name: data for name, data in content(run).items() if name.parts[0] in ("task-1", "task-2")}
    trainer(run).train(resume_from_checkpoint=True)
    assert before.items() <= content(run).items()
    weights = Path("task-3", "adapter_model.safetensors")
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_gap_behind_which_the_run_was_continued_in_another_process(run):
    """Two trainers take up one run, one after the other: the second does not overwrite what the first has learned."""
    first, second = learner(run, run), learner(run, run)
    first.learn(new_classes())
    before = content(run)
    with pytest.raises(ValueError, match="holds task-4 already, and a finished task is never trained over"):
        second.learn(new_classes())
    assert content(run) == before


# ---- paths that are mistaken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("where", ["rnu", "empty", "run/checkpoints", "run/features", "backbone"])
def test_a_path_without_a_run_deletes_and_begins_nothing(run, tmp_path, where, overwrite):
    (tmp_path / "empty").mkdir()
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "model.safetensors").write_text("no run")
    before = content(run)
    wrong = "holds neither a finished task nor a checkpoint" if (tmp_path / where).exists() else "does not exist"
    for folder in (run, tmp_path / "new"):
        with pytest.raises(ValueError, match=f"{where}' {wrong}") as caught:
            trainer(folder, overwrite_output_dir=overwrite).train(resume_from_checkpoint=str(tmp_path / where))
        assert (f"It is inside the run {run}: pass that." in str(caught.value)) == where.startswith("run/")
    assert content(run) == before and not content(tmp_path / "new")


def test_checkpoints_that_are_not_whole_are_no_run_to_go_on_from(run, tmp_path):
    (tmp_path / "begun" / "checkpoints" / "task-1" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints" / "task-1" / "checkpoint-3" / "results.json").write_text("{}")
    before = content(run)
    with pytest.raises(ValueError, match="neither a finished task nor a checkpoint"):
        trainer(run, overwrite_output_dir=True).train(resume_from_checkpoint=str(tmp_path / "begun"))
    assert content(run) == before


def test_an_empty_output_folder_begins_a_run(tmp_path):
    """A run that died before its first checkpoint is repeated by the same line as one that died later."""
    with pytest.warns(UserWarning, match="holds no run to resume: starting with the first task"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    assert RunFolder(tmp_path / "run").finished_tasks() == 3


def test_resuming_replaces_no_file_of_somebody_else(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds README.md, which the files of a run would replace"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "task-1").exists()


def test_resuming_a_finished_run_keeps_an_edited_card(run):
    (run / "README.md").write_text("edited")
    trainer(run).train(resume_from_checkpoint=True)
    assert (run / "README.md").read_text() == "edited"


def test_learning_on_does_not_delete_checkpoints_of_another_run(run, finished, tmp_path):
    """Neither where the folder holds nothing else, nor beside the first of the tasks that would be copied there."""
    for tasks in (0, 1):
        folder = tmp_path / f"other-{tasks}"
        checkpoint = folder / "checkpoints" / f"task-{tasks + 1}" / "checkpoint-4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("precious")
        if tasks:
            shutil.copytree(finished / "task-1", folder / "task-1")
        before = content(folder)
        with pytest.raises(ValueError, match=f"another run. Choose|holds an earlier run .{tasks} finished"):
            learner(run, folder).learn(new_classes(), resume_from_checkpoint=True)
        assert content(folder) == before


# ---- overwriting -----------------------------------------------------------------------------------------------------

FOREIGN = (
    *("task-notes/thesis.txt", "features/my.csv", "checkpoints/precious.ckpt", "thesis.txt", "task-1/notes.txt"),
    *("checkpoints/task-1/checkpoint-4/mine.txt", "task-2/figures/mine.png", "baseline/task-1/results.json"),
)


def test_overwriting_leaves_everything_that_the_run_did_not_write(run):
    for name in FOREIGN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("precious")
    with pytest.raises(ValueError, match="holds an earlier run .3 finished tasks.*overwrite_output_dir=True"):
        trainer(run, seed=5).train()
    again = trainer(run, seed=5, overwrite_output_dir=True, save_strategy="steps", save_steps=2)
    again.train()
    assert [(run / name).read_text() for name in FOREIGN] == ["precious"] * len(FOREIGN)
    assert [json.loads((run / f"task-{t}/results.json").read_text())["seed"] for t in (1, 2, 3)] == [5, 5, 5]
    trainer(run, seed=5).train(resume_from_checkpoint=True)  # it is whole
    assert not list((run / "checkpoints").rglob("*.safetensors"))


def test_images_that_do_not_decode_are_found_before_anything_is_deleted(run):
    before, stream = content(run), tiny.stream()

    def refuse(*args, **kwargs):
        raise ValueError("image 3 does not decode")

    stream.verify = refuse
    with pytest.raises(ValueError, match="image 3 does not decode"):
        trainer(run, stream=stream, overwrite_output_dir=True).train()
    assert content(run) == before


def test_a_single_task_does_not_begin_over_a_finished_run(run):
    before = content(run)
    with pytest.raises(ValueError, match="holds an earlier run .3 finished tasks"):
        trainer(run).train_task(0)
    assert content(run) == before
    shutil.rmtree(run / "task-3"), shutil.rmtree(run / "task-2"), shutil.rmtree(run / "task-1")
    with pytest.raises(ValueError, match="which the files of a run would replace"):  # its last task is still there
        trainer(run).train()
    trainer(run, overwrite_output_dir=True).train_task(0)
    assert RunFolder(run).finished_tasks() == 1


def test_copies_of_a_run_do_not_mix_with_another(run, finished, tmp_path):
    """Learning on with a folder that holds fewer tasks of another run, which a copy would have replaced."""
    folder = tmp_path / "other"
    trainer(folder, seed=5).train_task(0)
    before = content(folder)
    with pytest.raises(ValueError, match="holds task-1 of another run"):
        learner(run, folder).learn(new_classes(), resume_from_checkpoint=True)
    assert content(folder) == before
    # a copy that was interrupted is completed
    half = tmp_path / "half"
    shutil.copytree(finished / "task-1", half / "task-1")
    learner(run, half).learn(new_classes(), resume_from_checkpoint=True)
    assert RunFolder(half).finished_tasks() == 4


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_before_it_writes(tmp_path):
    """While a run trains, another process on the same folder ends with an error, and the run is as it would have been."""
    said = []

    def second() -> None:
        trainer(tmp_path / "run", seed=5).train(resume_from_checkpoint=True)

    class Second(TrainerCallback):
        def on_task_begin(self, *args, task, **kwargs):
            if task == 1:
                said.append((forks.run(second, tmp_path / "log"), (tmp_path / "log").read_text()))

    trainer(tmp_path / "run", callbacks=[Second()]).train()
    trainer(tmp_path / "alone").train()
    assert said[0][0] == 1 and "run is being written by process" in said[0][1]
    weights = Path("task-3", "adapter_model.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("call", ["train", "train_task", "learn"])
def test_every_way_to_train_holds_the_folder(tmp_path, call):
    entered = []

    class Look(TrainerCallback):
        def on_task_begin(self, *args, **kwargs):
            entered.append((tmp_path / "run" / ".run.lock").exists())

    if call == "learn":
        made = trainer(
            tmp_path / "run", callbacks=[Look()], stream=TaskStream.empty(), model=tiny.model(kind="backbone")
        )
        made.learn(new_classes())
    else:
        made = trainer(tmp_path / "run", callbacks=[Look()])
        made.train() if call == "train" else made.train_task(0)
    assert entered and all(entered) and not list((tmp_path / "run").glob(".*"))
    with held(tmp_path / "run"):
        assert RunFolder(tmp_path / "run").finished_tasks()


# ---- what a killed run leaves ----------------------------------------------------------------------------------------


def test_the_next_start_cleans_up_after_a_kill(run):
    shutil.rmtree(run / "task-3")
    names = (".task-3-ab_12xyz/config.json", ".results.json.99.tmp", "features/.task-3.safetensors.99.tmp", ".copying")
    names += ("checkpoints/task-2/checkpoint-4/trainer_state.json", ".run.lock", ".run.lock.json")
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("left behind")
    (run / "results.json").write_text("half")  # of the copy to the top level
    trainer(run).train(resume_from_checkpoint=True)
    assert not [path for path in run.rglob(".*") if path.parent.name != QUERIES] and not (run / "checkpoints").exists()
    assert json.loads((run / "results.json").read_text()) == json.loads((run / "task-3/results.json").read_text())
