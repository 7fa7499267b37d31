"""What a script that was made for a `Trainer` calls: metrics in its log, the model saved once more, the model card."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from pgp_hf import load_pretrained, methods

pytestmark = pytest.mark.usefixtures("without_figures")


def make(kind, folder, **settings):
    """A trainer of a run that can be loaded without being told its backbone."""
    backbone = tiny.backbone()
    backbone.save_pretrained(folder / "backbone")
    if kind == "plain":
        return tiny.trainer(folder / "run", model=tiny.plain(), method=methods.create("fine_tuning"), **settings)
    model = tiny.model(base=backbone)
    model.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    return tiny.trainer(folder / "run", model=model, **settings)


@pytest.mark.parametrize("kind", ["l2p", "plain"])
def test_the_usual_end_of_a_script_leaves_the_run_as_it_was(kind, tmp_path, capsys):
    trainer = make(kind, tmp_path, num_train_epochs=1)
    metrics = trainer.train().metrics
    before = {file.name: file.read_bytes() for file in trainer.folder.root.glob("*") if file.is_file()}
    trainer.log_metrics("train", metrics)
    out = capsys.readouterr().out
    lines = dict(line.split(" = ") for line in out.splitlines() if " = " in line)
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["average_accuracy"] == str(round(metrics["average_accuracy"], 4)) and lines["num_tasks"] == "3"
    assert "accuracy_matrix" not in lines and "***** train metrics *****" in out
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card()
    after = {file.name: file.read_bytes() for file in trainer.folder.root.glob("*") if file.is_file()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"train_results.json", "all_results.json", "trainer_state.json"}
    assert len(load_pretrained(trainer.folder.root).predict(tiny.data()["test"]["image"])) == 24


@pytest.mark.parametrize("kind", ["l2p", "plain"])
def test_another_state_is_not_saved_over_a_finished_task(kind, tmp_path):
    trainer = make(kind, tmp_path, num_train_epochs=1)
    refused = "is the run's own folder, for the state after .*: pass another folder"
    with pytest.raises(ValueError, match=refused):
        trainer.save_model()
    trainer.train_task(0)
    trainer.save_model()
    before = {file.name: file.read_bytes() for file in trainer.folder.root.glob("*") if file.is_file()}

    class Save(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            for folder in (None, str(trainer.folder.root), f"{trainer.folder.root}/task-1/.."):
                with pytest.raises(ValueError, match="for the state after task 1, .* pass another folder"):
                    trainer.save_model(folder)
            trainer.save_model(str(tmp_path / "mine"))
            raise KeyboardInterrupt

    trainer.add_callback(Save())
    with pytest.raises(KeyboardInterrupt):
        trainer.train_task(1)
    with pytest.raises(ValueError, match=refused):
        trainer.save_model()
    assert before == {file.name: file.read_bytes() for file in trainer.folder.root.glob("*") if file.is_file()}
    assert (tmp_path / "mine" / "method.json").is_file()
    load_pretrained(trainer.folder.root)


def test_values_that_were_not_measured_and_empty_metrics_are_left_out(tmp_path, capsys):
    trainer = make("l2p", tmp_path)
    trainer.log_metrics("train", {"forgetting": None, "accuracy_matrix": [[1.0]], "epochs": 2})
    trainer.log_metrics("eval", {})
    assert capsys.readouterr().out.splitlines()[1:] == ["  epochs = 2"]


def test_a_card_may_have_a_license_and_tags_besides_its_own(tmp_path):
    trainer = make("l2p", tmp_path, num_train_epochs=1)
    with pytest.raises(ValueError, match="no card before a task is finished"):
        trainer.create_model_card()
    trainer.train()
    path = trainer.folder.root / "README.md"
    before, task = ModelCard.load(path), (trainer.folder.task(2) / "README.md").read_bytes()
    trainer.create_model_card(language="en", license="mit", tags=["birds"])
    after = ModelCard.load(path)
    assert after.text == before.text and (trainer.folder.task(2) / "README.md").read_bytes() == task
    assert (after.data.language, after.data.license) == ("en", "mit") and after.data.tags == [
        *before.data.tags,
        "birds",
    ]
    trainer.create_model_card(tags="trees")
    assert ModelCard.load(path).data.tags == [*before.data.tags, "trees"]
    with pytest.raises(ValueError, match="the card has model_name and dataset from the run itself"):
        trainer.create_model_card(model_name="mine", dataset="birds")


def share(prediction):
    """Accuracy as a fraction, as in many a script."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


@pytest.mark.parametrize("own", [False, True])
def test_no_name_is_logged_in_two_units(own, tmp_path):
    extra = {"compute_metrics": share} if own else {}
    trainer = make("l2p", tmp_path, num_train_epochs=1, eval_strategy="epoch", logging_steps=1, **extra)
    trainer.train()
    matrix = trainer.results.matrix
    logged = [log for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]
    assert logged
    for log in logged:
        for name, value in log.items():
            if name.endswith("accuracy") and (name.startswith("eval_stream_") or not own):
                # a percentage of a task's 8 test images, or an average over up to 3 tasks
                shares = [value / 100 * 8 * tasks for tasks in (1, 2, 3)]
                assert any(share == pytest.approx(round(share)) for share in shares), (name, value)
            elif name.endswith("accuracy"):
                assert 0 <= value <= 1
    names = {name for log in logged for name in log}
    prefix = "eval_stream_" if own else "eval_"
    assert {f"{prefix}task_1_accuracy", f"{prefix}average_accuracy", f"{prefix}forgetting"} <= names
    assert ("eval_average_accuracy" in names) is not own
    expected = [value / 100 if own else value for value in matrix[-1]]
    metrics = trainer.evaluate()
    assert [metrics[f"eval_task_{j}_accuracy"] for j in (1, 2, 3)] == pytest.approx(expected)
