"""The trainer: a whole stream, its files, its events, and what it refuses."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pgp_hf import PGPTrainer, PGPTrainingArguments, ProjectionConfig
from pgp_hf.report import figures as plots
from pgp_hf.training.callbacks import StreamCallback

pytestmark = pytest.mark.usefixtures("without_figures")

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "digests.json",
    "method.json",
    "method.safetensors",
    "preprocessor_config.json",
    "projection.json",
    "projection.safetensors",
    "results.json",
    "stream.json",
}
FIGURES = {  # of the last task
    f"figures/{name}.{suffix}"
    for name in (
        *("accuracy_matrix", "task_curves", "forgetting_by_task", "stability"),
        *("prompt_usage", "prompts_and_keys"),
    )
    for suffix in ("png", "svg")
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    """A finished run of three tasks, the only one here with figures: (trainer, folder)."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figures", without_figures)
        trainer.train()
    return trainer, folder


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_every_task_leaves_the_files_of_the_contract(run):
    _, folder = run
    assert [files(folder / f"task-{t}") for t in (1, 2, 3)] == [FILES, FILES, FILES | FIGURES]
    top = {name for name in files(folder) if not name.startswith(("task-", "features/", "queries/"))}
    assert top == FILES | FIGURES  # no checkpoint, no temporary file
    for name in FILES | FIGURES:
        assert (folder / name).read_bytes() == (folder / "task-3" / name).read_bytes()


def test_results_have_the_schema_and_measure_learning(run):
    trainer, folder = run
    results = json.loads((folder / "results.json").read_text())
    matrix = results["accuracy_matrix"]
    assert [[a is not None for a in row] for row in matrix] == [[j <= i for j in range(3)] for i in range(3)]
    assert results["average_accuracy"] == pytest.approx(np.mean(matrix[2]))
    assert results["learning_accuracy"] == pytest.approx(np.mean(np.diag(matrix)))
    assert matrix[0][0] > 60  # of two classes: it learns something
    assert (results["method"], results["projection"], results["scenario"]) == ("l2p", "pgp", "class_incremental")
    assert results["drift"][0] == 0 and results["drift"][2] > 0
    assert results["projection_rank"] == sorted(results["projection_rank"]) and results["projection_rank"][0] > 0
    assert results["images_trained"] == 3 * 16 * 2 and results["train_images_per_second"] > 0
    assert results["eval_mask"] == "seen" and results["batchwise_prompt"] is False
    assert [sum(row) for row in results["prompt_usage"]] == [8 * 2] * 3  # test images x top_k
    assert json.loads((folder / "task-1" / "results.json").read_text())["accuracy_matrix"][1] == [None] * 3


def test_a_task_folder_is_that_tasks_model(run):
    trainer, folder = run
    results = json.loads((folder / "results.json").read_text())
    for t in (1, 3):
        loaded = PeftModel.from_pretrained(tiny.backbone(), folder / f"task-{t}").eval()
        batch = trainer.data_collator([trainer.stream.test(0)[i] for i in range(8)])
        with torch.no_grad():
            logits = loaded(batch["pixel_values"]).logits
        unseen = [c for c in range(6) if c not in trainer.stream.seen_classes(t - 1)]
        logits[:, unseen] = -torch.inf
        accuracy = 100 * (logits.argmax(-1) == batch["labels"]).float().mean().item()
        assert accuracy == pytest.approx(results["accuracy_matrix"][t - 1][0])


def test_accuracy_within_tasks_is_that_of_the_task_incremental_scenario(run, tmp_path):
    """The same training, since the loss is over the task's classes in both; only the evaluation differs."""
    results = run[0].results.to_dict()
    other = tiny.trainer(tmp_path, stream=tiny.stream(scenario="task_incremental"))
    other.train()
    assert "task_incremental" not in other.results.to_dict()
    matrix = other.results.to_dict()["accuracy_matrix"]
    within = results["task_incremental"]["by_task"]
    assert within["now"] == matrix[-1] and within["when_learned"] == [matrix[t][t] for t in range(len(matrix))]
    assert results["task_incremental"]["average_accuracy"] > results["average_accuracy"]
    assert results["trainable_parameters"] == 5 * 2 * 24 + 5 * 24 + 6 * 25  # prompts, keys, head


@pytest.mark.parametrize("later", [2, 3])
def test_movement_between_task_folders_lies_outside_the_bases(run, later):
    """As the files alone show it."""
    _, folder = run
    before = load_file(folder / "task-1" / "adapter_model.safetensors")
    after = load_file(folder / f"task-{later}" / "adapter_model.safetensors")
    bases = load_file(folder / "task-1" / "projection.safetensors")
    description = json.loads((folder / "task-1" / "projection.json").read_text())
    assert {name.rpartition(".")[2] for name in bases} == {"l2p_prompt", "l2p_key"}
    for name, basis in bases.items():
        info = description[name]
        assert tuple(basis.shape) == (*info["shape"][: info["batch_dims"]], info["shape"][-1], info["rank"])
        assert torch.allclose(basis.mT @ basis, torch.eye(info["rank"], dtype=basis.dtype), atol=1e-10)
        moved = (after[name] - before[name]).reshape(info["shape"]).to(basis.dtype)
        assert moved.norm() > 1e-3
        assert (moved @ basis).norm() < 1e-5 * moved.norm()


def test_without_projection_the_movement_is_not_outside(tmp_path, run):
    _, folder = run
    trainer = tiny.trainer(tmp_path, projection=ProjectionConfig(method="none"))
    trainer.train()
    assert load_file(tmp_path / "projection.safetensors") == {}
    assert json.loads((tmp_path / "projection.json").read_text())["method"] == "none"
    assert trainer.results.rank == [0, 0, 0]
    before, after = (load_file(tmp_path / t / "adapter_model.safetensors") for t in ("task-1", "task-2"))
    for name, basis in load_file(folder / "task-1" / "projection.safetensors").items():
        moved = (after[name] - before[name]).flatten(0, -2).to(basis.dtype)
        assert (moved @ basis).norm() > 1e-2 * moved.norm()


def test_gradient_projection_leaks_under_adam(tmp_path):
    trainer = tiny.trainer(tmp_path, projection=ProjectionConfig(energy=0.9, key_energy=0.9, apply_to="gradient"))
    trainer.train()
    before, after = (load_file(tmp_path / t / "adapter_model.safetensors") for t in ("task-1", "task-2"))
    name = next(iter(n for n in before if n.endswith("l2p_prompt")))
    basis = load_file(tmp_path / "task-1" / "projection.safetensors")[name]
    moved = (after[name] - before[name]).flatten(0, -2).to(basis.dtype)
    assert (moved @ basis).norm() > 1e-2 * moved.norm()


def test_a_full_basis_stops_the_prompts_with_a_warning(tmp_path):
    trainer = tiny.trainer(tmp_path, projection=ProjectionConfig(energy=1.0, key_energy=None))
    with pytest.warns(UserWarning, match="full rank 24"):
        trainer.train()
    before, after = (load_file(tmp_path / t / "adapter_model.safetensors") for t in ("task-1", "task-3"))
    prompt, key = (next(n for n in before if n.endswith(s)) for s in ("l2p_prompt", "l2p_key"))
    assert torch.equal(before[prompt], after[prompt])
    assert not torch.equal(before[key], after[key])


def test_projection_narrows_drift(tmp_path, run):
    trainer, _ = run
    plain = tiny.trainer(tmp_path, projection=ProjectionConfig(method="none"))
    plain.train()
    tight = tiny.trainer(tmp_path / "tight", projection=ProjectionConfig(energy=0.999, key_energy=0.999))
    tight.train()
    assert tight.results.drift[-1] < 0.8 * plain.results.drift[-1]


@pytest.mark.parametrize("scenario", ["task_incremental", "online"])
def test_scenarios(tmp_path, scenario, run):
    trainer = tiny.trainer(tmp_path, stream=tiny.stream(scenario=scenario))
    trainer.train()
    if scenario == "online":
        assert trainer.results.images_trained == 3 * 16  # one epoch
    else:  # the same training, but each task is tested among its own classes
        easier, harder = trainer.results.matrix, run[0].results.matrix
        assert easier[0] == harder[0]
        assert all(a >= b for x, y in zip(easier, harder, strict=True) for a, b in zip(x, y, strict=True))
        assert easier != harder


def test_eval_mask_none_lets_unseen_classes_compete(tmp_path):
    logits = {}
    for mask in ("seen", "none"):
        trainer = tiny.trainer(tmp_path / mask, eval_mask=mask)
        trainer.train_task(0)
        logits[mask] = trainer.predict(trainer.stream.test(0)).predictions
    seen = trainer.stream.seen_classes(0)
    unseen = [c for c in range(6) if c not in seen]
    assert np.isneginf(logits["seen"][:, unseen]).all()
    assert np.isfinite(logits["none"]).all()
    assert np.array_equal(logits["seen"][:, seen], logits["none"][:, seen])


def test_training_mask_leaves_other_classes_of_the_head_alone(tmp_path):
    heads = {}
    for mask in ("task", "seen"):
        trainer = tiny.trainer(tmp_path / mask, train_mask=mask)
        trainer.train_task(0)
        before = trainer.model.classifier.modules_to_save["default"].weight.detach().clone()
        trainer.train_task(1)
        heads[mask] = (trainer.model.classifier.modules_to_save["default"].weight - before).abs().sum(1) > 0
    tasks = [list(task.classes) for task in trainer.stream.tasks]
    assert heads["task"].nonzero().flatten().tolist() == sorted(tasks[1])
    assert heads["seen"].nonzero().flatten().tolist() == sorted(tasks[0] + tasks[1])


def test_fresh_optimizer_for_each_task_unless_told_otherwise(tmp_path):
    steps = {}
    for fresh in (True, False):
        trainer = tiny.trainer(tmp_path / str(fresh), reinit_optimizer=fresh)
        trainer.train_task(0)
        trainer.train_task(1)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        steps[fresh] = int(max(state["step"] for state in optimizer.state.values()))
    assert steps == {True: 8, False: 16}


@pytest.mark.parametrize("later", [None, 0.0, 1e-4])
def test_shared_prompts_have_a_learning_rate_of_their_own_from_the_second_task_on(tmp_path, later):
    trainer = tiny.trainer(tmp_path, projection=ProjectionConfig(method="none"), later_prompt_learning_rate=later)
    moved = []
    for t in range(2):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train_task(t)
        after = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        moved.append({name.split(".")[-2]: float((after[name] - before[name]).abs().max()) for name in before})
    assert min(moved[0].values()) > 1e-3 and moved[1]["default"] > 1e-3  # the head's parent is named by the adapter
    steps, rate = trainer.state.max_steps, trainer.args.learning_rate
    for name in ("l2p_prompt", "l2p_key"):
        most = steps * (rate if later is None else later)
        assert moved[1][name] <= 1.5 * most and (moved[1][name] > 0 or later == 0)
        assert later is None or moved[1][name] < moved[0][name] / 10


def test_kept_optimizer_is_projected_once_and_without_leaving_the_null_space(tmp_path):
    trainer = tiny.trainer(tmp_path, reinit_optimizer=False, weight_decay=0.1)
    trainer.train()
    before, after = (load_file(tmp_path / t / "adapter_model.safetensors") for t in ("task-2", "task-3"))
    for name, basis in load_file(tmp_path / "task-2" / "projection.safetensors").items():
        moved = (after[name] - before[name]).flatten(0, -2).to(basis.dtype)
        assert (moved @ basis).norm() < 1e-5 * moved.norm()


def test_statistics_use_no_random_number(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.train_task(0)
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    trainer.method.begin_task(trainer._passes().context(0))
    trainer.method.end_task(trainer._passes().context(0))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_max_images_limits_the_statistics(tmp_path):
    trainer = tiny.trainer(tmp_path, projection=ProjectionConfig(max_images=5))
    trainer.train_task(0)
    key = next(name for name in trainer.projection.info if name.endswith("l2p_key"))
    assert trainer.projection.info[key]["samples"] == 5


def test_events_come_in_order(tmp_path):
    class Listener(StreamCallback):
        def __init__(self):
            self.events = []

        def on_stream_begin(self, args, state, control, first_task, **kwargs):
            self.events.append(("begin", first_task))

        def on_task_begin(self, args, state, control, task, stream, model, **kwargs):
            self.events.append(("task", task))

        def on_task_end(self, args, state, control, task, results, folder, **kwargs):
            assert (folder / "results.json").is_file() and len(results["drift"]) == task + 1
            self.events.append(("end", task))

        def on_stream_end(self, args, state, control, results, **kwargs):
            self.events.append(("done", results["num_tasks"]))

    listener = Listener()
    tiny.trainer(tmp_path, callbacks=[listener]).train()
    tasks = [event for t in range(3) for event in (("task", t), ("end", t))]
    assert listener.events == [("begin", 0), *tasks, ("done", 3)]


def test_trainers_own_evaluation_keeps_working(tmp_path):
    best = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "task_1_loss"}
    trainer = tiny.trainer(tmp_path, stream=tiny.stream(train_val_split=0.25), **best)
    trainer.train_task(0)
    metrics = trainer.evaluate()
    assert metrics["eval_task_1_accuracy"] == pytest.approx(trainer.results.matrix[0][0])


def test_bfloat16_autocast_trains(tmp_path):
    trainer = tiny.trainer(tmp_path, bf16=True)
    trainer.train_task(0)
    assert trainer.results.matrix[0][0] > 60
    assert all(p.dtype == torch.float32 for p in trainer.tuner.prompt_parameters().values())


def test_batchwise_prompt_is_recorded(tmp_path):
    with pytest.warns(UserWarning, match="batchwise_prompt=True"):
        model = tiny.model(batchwise_prompt=True)
    trainer = tiny.trainer(tmp_path, model=model)
    trainer.train_task(0)
    assert json.loads((tmp_path / "results.json").read_text())["batchwise_prompt"] is True
    assert "batch" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("size", [30, 20])
def test_another_image_size_by_interpolated_positions(tmp_path, size):
    processor = tiny.processor()
    processor.size = {"height": size, "width": size}
    model = tiny.model(interpolate_pos_encoding=size != tiny.SIDE)
    trainer = tiny.trainer(tmp_path, model=model, processing_class=processor, num_train_epochs=1)
    trainer.train_task(0)
    tokens = 1 + 2 * 2 + (size // 5) ** 2
    name = next(name for name in trainer.projection.info if name.endswith("l2p_prompt"))
    assert trainer.projection.info[name]["samples"] == 16 * tokens


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_task(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.train_task(0)
    kept = {name: (tmp_path / "task-1" / name).read_bytes() for name in files(tmp_path / "task-1")}
    with torch.no_grad():
        trainer.model.classifier.modules_to_save["default"].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"nan in task 2 at step 1 of 8 .*task 1 is kept in .*task-1"):
        trainer.train_task(1)
    found = {name: (tmp_path / "task-1" / name).read_bytes() for name in files(tmp_path / "task-1")}
    assert found == kept and "adapter_model.safetensors" in kept
    assert not (tmp_path / "task-2").exists()


def test_an_output_folder_with_another_run_is_left_alone(run, tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.train_task(0)
    kept = (tmp_path / "task-1" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds an earlier run .1 finished tasks.*overwrite_output_dir=True"):
        tiny.trainer(tmp_path).train()
    assert (tmp_path / "task-1" / "adapter_model.safetensors").read_bytes() == kept
    again = tiny.trainer(tmp_path, overwrite_output_dir=True, num_train_epochs=1)
    again.train()
    assert (tmp_path / "task-3").is_dir()


def test_a_trained_trainer_does_not_start_over(tmp_path):
    trainer = tiny.trainer(tmp_path, overwrite_output_dir=True)
    trainer.train_task(0)
    with pytest.raises(ValueError, match="has trained 1 tasks already"):
        trainer.train()
    assert (tmp_path / "task-1").is_dir()


def test_a_resumed_trainer_masks_as_the_one_before(run):
    trainer, folder = run
    resumed = tiny.trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert list(resumed.eval_dataset) == ["task_1", "task_2", "task_3"]
    resumed.task = 0  # as after the first task
    logits = resumed.predict(resumed.stream.test(0)).predictions
    assert np.isneginf(logits).sum(1).tolist() == [4] * 8


def test_ready_made_optimizers_are_refused(tmp_path):
    model = tiny.model()
    with pytest.raises(ValueError, match="without projection"):
        tiny.trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters()), None))


@pytest.mark.parametrize("sharding", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_is_refused(tmp_path, monkeypatch, sharding):
    prepare = PGPTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        PGPTrainer, "create_accelerator_and_postprocess", lambda self: (prepare(self), setattr(self, sharding, True))
    )
    with pytest.raises(ValueError, match="DeepSpeed and FSDP shard parameters.*plain data parallelism"):
        tiny.trainer(tmp_path)


def test_online_and_max_steps_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="max_steps=5 and scenario='online'"):
        tiny.trainer(tmp_path, stream=tiny.stream(scenario="online"), max_steps=5)


def test_task_incremental_evaluation_by_the_trainers_own_method(tmp_path):
    trainer = tiny.trainer(tmp_path, stream=tiny.stream(scenario="task_incremental"))
    trainer.train_task(0)
    trainer.train_task(1)
    metrics = trainer.evaluate()
    assert [metrics[f"eval_task_{j}_accuracy"] for j in (1, 2)] == pytest.approx(trainer.results.matrix[1])


def test_predictions_that_a_user_prepares_for_metrics(tmp_path):
    """As scripts do that measure labels: the stream's own measures come from the logits all the same."""
    trainer = tiny.trainer(
        tmp_path,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda found: {"right": float((found.predictions == found.label_ids).mean())},
        num_train_epochs=1,
    )
    trainer.train_task(0)
    assert 100 * trainer.evaluate()["eval_task_1_right"] == trainer.results.matrix[0][0]


def test_tasks_come_in_turn(tmp_path):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="t=1 is not the next task: 0 of 3 tasks are trained, so t=0 comes next"):
        trainer.train_task(1)
    with pytest.raises(ValueError, match="no task has been trained yet"):
        trainer.evaluate_stream()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tiny.backbone(), TypeError, "no prompts that a projection could protect.*fine_tuning"),
        (
            lambda: tiny.model(base=tiny.backbone(num_labels=5)),
            ValueError,
            "5 outputs, the stream 6 classes.*load_backbone",
        ),
        (lambda: tiny.model(kind="backbone"), TypeError, "no classifier"),
    ],
)
def test_models_that_do_not_fit(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, model=make())


def test_probes_in_the_metric_of_a_head_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="needs an adapter with head='statistics', not 'linear'"):
        tiny.trainer(tmp_path, projection=ProjectionConfig(method="functional", probe_space="statistics"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' would upload checkpoints"),
        ({"push_to_hub": True, "hub_revision": "dev"}, "hub_revision='dev'"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "repo_id='a/b/c' is not"),
        ({"push_to_hub": True, "hub_base_model": "/models/vit"}, "base_model='/models/vit' is not"),
        ({"push_to_hub": True, "hub_wait": -1.0}, "hub_wait=-1.0 is out of range: expected 0 to inf"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True would leave test images out"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True would cast the prompts"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches"),
        ({"crop_min_scale": 0.0}, "crop_min_scale=0.0 is out of range: expected a number above 0, at most 1"),
        ({"train_mask": "all"}, "train_mask='all' is unknown: choose one of task, seen"),
        ({"eval_mask": "all"}, "eval_mask='all'"),
        ({"augmentation": "mixup"}, "augmentation='mixup'"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        PGPTrainingArguments(str(tmp_path), use_cpu=True, **arguments)


def test_broken_images_are_found_before_training(tmp_path):
    data = tiny.data()
    rows = data["train"].cast_column("image", datasets.Image(decode=False)).to_list()
    rows[5]["image"]["bytes"] = b"no image"
    data["train"] = type(data["train"]).from_list(rows).cast(data["train"].features)
    trainer = tiny.trainer(tmp_path, stream=tiny.stream(dataset=data))
    with pytest.raises(ValueError, match="row 5 of the train split.*1 of 72 images"):
        trainer.train()
    assert not list(tmp_path.glob("task-*"))


def test_missing_image_processor(tmp_path):
    with pytest.raises(ValueError, match="processing_class is missing"):
        tiny.trainer(tmp_path, processing_class=None)


def test_a_processor_that_loading_would_refuse_is_refused_before_training(tmp_path):
    processor = tiny.processor()
    processor.size = {"height": 4097, "width": 20}
    with pytest.raises(ValueError, match=r"could not be loaded again: size has height=4097: .* from 1 to 4096\.$"):
        tiny.trainer(tmp_path, processing_class=processor)
    processor.do_resize = False
    tiny.trainer(tmp_path, processing_class=processor)


def test_a_backbone_of_another_width_is_refused(run):
    _, folder = run
    with pytest.raises(ValueError, match="hidden size 24, this one has 36"):
        PeftModel.from_pretrained(tiny.backbone(hidden_size=36), folder)
