"""The joint upper bound: trained as one task of all classes, measured, written and resumed as the last of the stream's."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf import load_pretrained
from pgp_hf.methods import FineTuning, Joint, create
from pgp_hf.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def content(folder, name="results.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("joint")
    trainer = tiny.trainer(folder, method=Joint())
    trainer.train()
    return trainer, folder


# ---- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", tiny.some_of(tiny.ADAPTERS, "l2p"))
@pytest.mark.parametrize("head", tiny.some_of(["linear", "statistics"], "statistics"))
def test_it_learns_what_fine_tuning_learns_of_a_stream_of_one_task(tmp_path, adapter, head):
    settings = {"later_prompt_learning_rate": 0.0, "compensate_drift": head == "statistics"}  # there is nothing later
    joint = tiny.trainer(tmp_path / "joint", method=Joint(), model=tiny.model(adapter, head=head), **settings)
    one = tiny.stream(num_tasks=1)
    alone = tiny.trainer(tmp_path / "alone", method=FineTuning(), model=tiny.model(adapter, head=head), stream=one)
    assert joint.stream.class_order == one.class_order
    joint.train()
    alone.train()
    assert same(weights(tmp_path / "joint"), weights(tmp_path / "alone"))
    results = joint.results.to_dict()
    assert results["images_trained"] == alone.results.images_trained == 2 * 48  # two epochs, as of any other method
    row = results["accuracy_matrix"][2]
    assert np.mean(row) == pytest.approx(alone.results.matrix[0][0])  # tasks of one size
    if head == "statistics":
        counts = next(tensor for name, tensor in weights(tmp_path / "joint").items() if name.endswith("counts"))
        assert counts.tolist() == [8] * 6
        linear = results["heads"]["linear"]
        assert linear["per_task_average_accuracy"][:2] == [None] * 2 and linear["forgetting"] is None
        assert np.mean(linear["by_task"]["now"]) == pytest.approx(alone.results.linear.now[0])


def test_the_loss_has_all_classes_whichever_mask(run, tmp_path):
    tiny.trainer(tmp_path, method=Joint(), train_mask="seen").train()
    assert same(weights(tmp_path), weights(run[1]))


def test_the_scenarios(run, tmp_path):
    for scenario in ("task_incremental", "online"):
        stream = tiny.stream(scenario=scenario)
        tiny.trainer(tmp_path / scenario, method=Joint(), stream=stream).train()
    easier, harder = content(tmp_path / "task_incremental"), content(run[1])
    assert same(weights(tmp_path / "task_incremental"), weights(run[1]))
    assert all(a >= b for a, b in zip(easier["accuracy_matrix"][2], harder["accuracy_matrix"][2], strict=True))
    assert easier["average_accuracy"] > harder["average_accuracy"]
    assert content(tmp_path / "online")["images_trained"] == 48


# ---- what is measured and written ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "head"),
    [
        ("l2p", "linear"),
        ("dualprompt", "statistics"),
        pytest.param("dualprompt", "linear", marks=pytest.mark.slow),
        pytest.param("clip", "linear", marks=pytest.mark.slow),
    ],
)
def test_the_last_row_is_what_the_loaded_model_answers_on_each_tasks_test_images(tmp_path, adapter, head):
    trainer = tiny.trainer(tmp_path, method=create("joint"), model=tiny.model(adapter, head=head))
    trainer.train()
    for revision in (None, "task-3"):
        classifier = load_pretrained(tmp_path, revision, backbone=tiny.backbone(tiny.ADAPTERS[adapter]))
        found = []
        for j in range(3):
            images = trainer.stream.test(j)
            predictions = list(classifier.classify(item["image"] for item in images))
            named = [prediction.labels[0]["label"] for prediction in predictions]
            names = [trainer.stream.label_names[label] for label in images.labels]
            found.append(100 * np.mean([a == b for a, b in zip(named, names, strict=True)]))
            if adapter == "dualprompt":  # the images of all tasks have trained the first entry
                assert [prediction.prompts for prediction in predictions] == [[0]] * 8
        assert found == pytest.approx(content(tmp_path)["accuracy_matrix"][2])
    assert set(classifier.classes) == set(range(6))


def test_rows_are_null_but_the_last(run):
    trainer, folder = run
    results = content(folder)
    assert results["method"] == "joint" and results["num_tasks"] == 3 and results["projection"] == "none"
    matrix = results["accuracy_matrix"]
    assert matrix[:2] == [[None] * 3] * 2 and None not in matrix[2]
    average = pytest.approx(np.mean(matrix[2]))
    assert results["average_accuracy"] == average and results["per_task_average_accuracy"] == [None, None, average]
    for name in ("forgetting", "forgetting_clipped", "backward_transfer", "learning_accuracy"):
        assert results[name] is None
    assert results["drift"] == results["changed_selections"] == [0, 0, 0] == results["projection_rank"]
    assert [sum(row) for row in results["prompt_usage"]] == [8 * 2] * 3  # test images x top_k
    assert content(folder, "stream.json") == trainer.stream.manifest()


def test_only_the_last_task_is_written(run):
    folder = run[1]
    assert sorted(path.name for path in folder.glob("task-*")) == ["task-3"]
    assert content(folder, "continued.json") == {"first": 2}
    assert RunFolder(folder).finished_tasks() == 3 and RunFolder(folder).first == 2
    assert [path.name for path in (folder / "features").iterdir()] == ["task-3.safetensors"]
    assert not (folder / "checkpoints" / "task-3").exists()
    assert same(weights(folder), weights(folder / "task-3"))


def test_the_card_tells_of_one_task_and_of_no_forgetting(run):
    card = (run[1] / "README.md").read_text()
    assert "trained with **Joint training** on the 3 tasks of a stream, learned as one, and" in card
    assert "After all 3 tasks, learned as one, from a single run:" in card
    accuracies = [f"{value:.1f}" for value in run[0].results.matrix[0]]
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("|")]
    assert [row[-1].strip() for row in rows if row[0].strip() in ("1", "2", "3")] == accuracies
    for word in ("orgetting", "one after the other", "When learned", "ransfer", "Drift", "rank", "task_curves"):
        assert word not in card, word


def test_progress_is_told_without_forgetting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # without a terminal there is no bar
    trainer = tiny.trainer(tmp_path, method=Joint(), num_train_epochs=1, disable_tqdm=False)
    trainer.train()
    out, bars = capsys.readouterr()
    assert "Tasks 1 to 3 of 3 as one: 48 images of class 3, class 2, class 5" in out
    assert f"average accuracy {np.mean(trainer.results.matrix[0]):.2f} %, protected rank 0 -> {tmp_path}" in " ".join(
        out.split()
    )
    assert "training tasks 1 to 3" in bars and "orgetting" not in out
    logged = trainer.state.log_history[-1]
    assert logged["eval_task_3_accuracy"] == trainer.results.matrix[0][2]
    assert not {"eval_forgetting", "eval_drift", "eval_changed_selections"} & logged.keys()


def test_a_stream_of_one_task_is_joint_already(tmp_path):
    trainer = tiny.trainer(tmp_path, method=Joint(), stream=tiny.stream(num_tasks=1))
    trainer.train()
    results = content(tmp_path)
    assert results["forgetting"] == 0 and results["accuracy_matrix"] == trainer.results.matrix
    assert not (tmp_path / "continued.json").exists() and (tmp_path / "task-1").is_dir()


# ---- resuming --------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder, step=14, method=Joint, **settings):
    """Stop two steps behind the first epoch's checkpoint, or wherever `step` says."""
    stop = StopAt(step)
    trainer = tiny.trainer(folder, method=method(), callbacks=[stop], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop.step = None
    return trainer


@pytest.mark.parametrize(
    "again",
    tiny.some_of(
        ["in a new process", "in the same trainer", "in another folder"], "in the same trainer", "in another folder"
    ),
)
def test_resumed_within_training_it_is_the_same_run(run, tmp_path, again):
    trainer = interrupted(tmp_path / "run")
    folder = tmp_path / "run"
    assert content(folder, "continued.json") == {"first": 2} and not (folder / "task-3").exists()
    assert [path.name for path in (folder / "checkpoints" / "task-3").iterdir()] == ["checkpoint-12"]
    where = True
    if again != "in the same trainer":
        where = True if again == "in a new process" else str(folder)
        folder = folder if again == "in a new process" else tmp_path / "other"
        trainer = tiny.trainer(folder, method=Joint())
    trainer.train(resume_from_checkpoint=where)
    assert same(weights(folder), weights(run[1])) and trainer.results.matrix == run[0].results.matrix
    assert content(folder, "continued.json") == {"first": 2} and RunFolder(folder).finished_tasks() == 3


@pytest.mark.parametrize(("adapter", "head"), [("dualprompt", "statistics"), ("clip", "linear")])
@pytest.mark.slow
def test_resumed_within_training_on_other_models(tmp_path, adapter, head):
    def trainer(name, **settings):
        return tiny.trainer(tmp_path / name, method=Joint(), model=tiny.model(adapter, head=head), **settings)

    trainer("straight").train()
    interrupted(tmp_path / "resumed", model=tiny.model(adapter, head=head))
    trainer("resumed").train(resume_from_checkpoint=True)
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert tiny.same_results(content(tmp_path / "straight"), content(tmp_path / "resumed"))


def test_trained_by_train_task_it_is_resumed_too(run, tmp_path):
    stop = StopAt(14)
    trainer = tiny.trainer(tmp_path, method=Joint(), callbacks=[stop])
    for t in (0, 3):
        with pytest.raises(
            ValueError, match=rf"t={t} is not.*0 of 3.*t=2 comes next.*'joint' learns all tasks as one"
        ):
            trainer.train_task(t)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_task(2)
    assert content(tmp_path, "continued.json") == {"first": 2}
    resumed = tiny.trainer(tmp_path, method=Joint())
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(tmp_path), weights(run[1]))
    with pytest.raises(ValueError, match="t=2 is not the next task: 3 of 3 tasks are trained"):
        resumed.train_task(2)


@pytest.mark.parametrize("source", ["itself", "a copy", "a copy of the task"])
def test_a_finished_run_has_nothing_left_to_do(run, tmp_path, source):
    before, folder = run[1], tmp_path / "run"
    where = True
    if source == "a copy of the task":
        shutil.copytree(before / "task-3", tmp_path / "copy")
        where = str(tmp_path / "copy")
    else:
        shutil.copytree(before, tmp_path / "copy")
        where, folder = (True, tmp_path / "copy") if source == "itself" else (str(tmp_path / "copy"), folder)
    resumed = tiny.trainer(folder, method=Joint())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert resumed.train(resume_from_checkpoint=where).global_step == 0
    assert same(weights(folder), weights(before)) and content(folder, "continued.json") == {"first": 2}
    assert tiny.same_results(resumed.results.to_dict(), run[0].results.to_dict())
    kept, computed = (load_file(path / "features" / "task-3.safetensors") for path in (before, folder))
    assert same(kept, computed)
    assert resumed.evaluate_stream()["accuracy_matrix"] == content(before)["accuracy_matrix"]


def test_a_copy_of_the_task_selects_as_the_run_did(tmp_path):
    """Entries that no task has trained are not selected, by the model that a run goes on with either."""
    trainer = tiny.trainer(tmp_path / "run", method=Joint(), model=tiny.model("dualprompt"))
    trainer.train()
    shutil.copytree(tmp_path / "run" / "task-3", tmp_path / "copy")
    resumed = tiny.trainer(tmp_path / "other", method=Joint(), model=tiny.model("dualprompt"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "copy"))
    assert resumed.evaluate_stream()["prompt_usage"] == trainer.results.usage == [[8, 0, 0]] * 3
    kept, computed = (load_file(tmp_path / name / "features" / "task-3.safetensors") for name in ("run", "other"))
    assert same(kept, computed)


def test_joint_and_fine_tuning_do_not_continue_each_other(run, tmp_path):
    tiny.trainer(tmp_path / "ft", method=FineTuning()).train_task(0)
    with pytest.raises(ValueError, match="method='fine_tuning', this one 'joint'"):
        tiny.trainer(tmp_path / "a", method=Joint()).train(resume_from_checkpoint=str(tmp_path / "ft"))
    with pytest.raises(ValueError, match="method='joint', this one 'fine_tuning'"):
        tiny.trainer(tmp_path / "b", method=FineTuning()).train(resume_from_checkpoint=str(run[1]))
    for own, other, step in ((Joint, FineTuning, 14), (FineTuning, Joint, 6)):  # within the first that they train
        folder = tmp_path / own.name
        interrupted(folder, step, own)
        with pytest.raises(ValueError, match=f"method.name: '{other.name}', was '{own.name}'"):
            tiny.trainer(folder, method=other()).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("alone", "message"),
    [
        (True, "values outside the rows 2 to 2"),
        (False, "accuracies from task 1 on, this one will have them from task 3 on"),
    ],
)
def test_results_that_were_altered_are_not_continued(run, tmp_path, alone, message):
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    for path in (folder, folder / "task-3"):
        results = content(path)
        results["accuracy_matrix"][:2] = [[50.0, None, None], [50.0, 50.0, None]]
        if not alone:  # the other entries fit
            results["per_task_average_accuracy"][:2] = [50.0, 50.0]
            del results["first_task"]
        (path / "results.json").write_text(json.dumps(results))
        (path / "digests.json").unlink()
    trainer = tiny.trainer(folder, method=Joint())
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert not trainer.results.matrix


def test_a_joint_run_that_has_written_nothing_leaves_no_trace_on_the_next(tmp_path):
    interrupted(tmp_path, step=2)
    assert content(tmp_path, "continued.json") == {"first": 2}
    following = tiny.trainer(tmp_path, method=FineTuning(), num_train_epochs=1)
    following.train()
    assert RunFolder(tmp_path).finished_tasks() == 3 and not (tmp_path / "continued.json").exists()
    joint = tiny.trainer(tmp_path, method=Joint(), num_train_epochs=1, overwrite_output_dir=True)
    joint.train()
    assert sorted(path.name for path in tmp_path.glob("task-*")) == ["task-3"]


def test_a_loss_that_is_not_finite_has_finished_nothing(tmp_path):
    trainer = tiny.trainer(tmp_path, method=Joint())
    with torch.no_grad():
        trainer.model.classifier.modules_to_save["default"].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="in task 3 at step 1 of 24 .*; no task was finished"):
        trainer.train()
