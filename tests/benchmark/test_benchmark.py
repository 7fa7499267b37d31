"""The benchmark: plans, runs that are skipped and resumed, the processes, the table."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from pgp_hf import PGPTrainingArguments, metrics
from pgp_hf.benchmark import columns, figures, plans, runs, table
from pgp_hf.benchmark.columns import paired_spread
from pgp_hf.cli.arguments import ModelArguments
from pgp_hf.cli.baseline_arguments import BaselineTrainingArguments, names
from pgp_hf.methods import METHODS
from pgp_hf.runs.atomic import write_json
from pgp_hf.runs.reading import read_json
from pgp_hf.training.trainer import StreamTrainer

pytestmark = pytest.mark.usefixtures("without_figures")

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"
CARDS = SCRIPT.parents[1] / "model_cards"


@pytest.fixture(scope="module")
def script():
    with tiny.script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Folders of a tiny backbone and of few images, as arguments."""
    root = tmp_path_factory.mktemp("local")
    tiny.backbone().save_pretrained(root / "tiny-vit")
    tiny.processor().save_pretrained(root / "tiny-vit")
    for split, rows in tiny.data(train=6, test=3).items():
        rows.to_parquet(root / "patterns" / f"{split}.parquet")
    own = f"--model_name_or_path {root / 'tiny-vit'} --dataset_name {root / 'patterns'} --image_size 20 --num_tasks 3"
    return [
        *own.split(),
        *"--num_train_epochs 2 --learning_rate 0.02 --per_device_train_batch_size 4 --use_cpu true".split(),
    ]


@pytest.fixture
def planned(script, local, tmp_path):
    """Factory: the plan of a row, writing below `tmp_path`."""

    def make(name, seed=0, folder="out", more=()):
        _, model, data, training = script.parse([*local, "--output_dir", str(tmp_path / folder), *more])
        return plans.plan(name, seed, script.ROWS, model, data, training, tmp_path / "work" / folder)

    return make


def same_outcome(one: dict, other: dict) -> bool:
    """Whether two runs' files agree in all but time, memory and whether they were interrupted."""
    loose = {"seconds", "train_images_per_second", "images_trained", "peak_memory_mb", "cpu_seconds", "resumed"}
    return {k: v for k, v in one.items() if k not in loose} == {k: v for k, v in other.items() if k not in loose}


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_settings_in_a_name_reach_their_owner(planned):
    plan = planned("l2p-functional@learning_rate=0.5,max_images=none,energy=0.90,pool_size=7,apply_to=gradient")
    assert plan.name == "l2p-functional@apply_to=gradient,energy=0.9,learning_rate=0.5,max_images=None,pool_size=7"
    assert plan.file.name == f"{plan.name}-seed0.json"
    assert (plan.projection.method, plan.projection.energy, plan.projection.apply_to) == (
        "functional",
        0.9,
        "gradient",
    )
    assert (plan.prompt.pool_size, plan.training.learning_rate, plan.prompt.head) == (7, 0.5, "statistics")
    other = planned("l2p-functional@pool_size=7,energy=0.9,apply_to=gradient,max_images=none,learning_rate=0.5")
    assert other.label == plan.label and other.settings() == plan.settings()
    plain = planned("l2p-functional")
    assert (plain.training.learning_rate, plain.prompt.pool_size) == (0.02, 10)
    assert planned("frozen-ridge@width=50", seed=4).classifier == type(planned("frozen-ridge").classifier)(50, seed=4)


def test_every_row_has_its_method(script, planned):
    shown = " ".join(script_help(script).split())
    for name, row in script.ROWS.items():
        plan = planned(name)
        assert plan.data.num_tasks == (1 if name.endswith("-joint") else 3) and f" {name} {row.what}" in shown
        if row.method is not None:
            recipe = BaselineTrainingArguments("out")
            for field in ("learning_rate", "head_learning_rate", "lr_scheduler_type"):
                assert getattr(plan.training, field) == getattr(recipe, field)
            assert (plan.training.num_train_epochs, plan.training.per_device_train_batch_size) == (2, 4)
            assert plan.settings()["method"]["name"] == row.method == name and plan.prompt is plan.projection is None
        if row.prompt is not None:
            kind, _, method = name.removesuffix("-surprises").partition("-")
            assert row.surprises == name.endswith("-surprises") == ("run" in plan.settings())
            assert plan.prompt.peft_type.value.lower().removesuffix("_prompt") == kind
            assert plan.model.kind == ("clip" if kind == "clip" else "vit")
            without = dict.fromkeys(("joint", "control"), "none")
            assert plan.projection.method == {**without, "pgp-gradient": "pgp"}.get(method, method)
            careful = method in ("control", "functional")
            assert plan.training.later_prompt_learning_rate == (0.004 if careful else None)
            assert plan.training.compensate_drift == careful
            applied = {"pgp-gradient": "gradient", "functional": "both"}
            assert plan.projection.apply_to == applied.get(method, "update")


def test_every_method_has_rows(script):
    assert {row.method for row in script.ROWS.values()} - {None} == set(names())
    for argv in ([], ["--dataset_name", "x"], ["--model_name_or_path", "x"]):
        usual = script.parse(argv)[0].rows
        assert {table.base(name) for name in usual} >= set(names())
        assert ("clip-pgp" in usual) is (argv[:1] != ["--model_name_or_path"])
        assert ("icarl@memory_per_class=2" in usual) is (not argv) and ("icarl" in usual) is bool(argv)
    assert script.parse(["--rows", "ewc"])[0].rows == ["ewc"]


def test_usual_rows_are_planned(script, tmp_path):
    """Their settings fit the embedded digits, which have ten classes."""
    bench, model, data, training = script.parse(["--output_dir", str(tmp_path)])
    planned = {name: plans.plan(name, 0, script.ROWS, model, data, training, tmp_path) for name in bench.rows}
    assert {name for name, plan in planned.items() if plan.name != name} == set()
    sizes = [plan.method for plan in planned.values() if hasattr(plan.method, "memory_size")]
    per_class = [one.memory_size / 10 if one.memory_size else one.memory_per_class for one in sizes]
    assert sizes and sorted(per_class) == sorted([2, 10] * (len(sizes) // 2))


def test_usual_rows_of_a_shifted_stream(script):
    """A row that learns all classes as one task has no rendering for each task."""
    assert set(script.usual_rows([])) - set(script.usual_rows(["--shift=renderings"])) == {"l2p-joint"}


def test_usual_rows_of_a_scenario(script, planned):
    """Methods run where they are defined; prompts learn all classes as one task only where these compete in the others."""
    for scenario, without in (
        ("task_incremental", {"l2p-joint", *(f"bic@{one}" for one in script.EXEMPLARS["bic"])}),
        ("online", {f"der_mcg@{one}" for one in script.EXEMPLARS["der_mcg"]}),
        ("class_incremental", set()),
    ):
        rows = script.usual_rows(["--scenario", scenario])
        assert set(script.usual_rows([])) - set(rows) == without
        assert rows == script.usual_rows([f"--scenario={scenario}"])
    for name, scenario, fix in (
        ("dualprompt-joint", "task_incremental", "only those of an image.s task.*method joint.*is the bound there"),
        ("bic", "task_incremental", "only for class_incremental, online: leave it out"),
        ("der_mcg@memory_per_class=2", "online", "only for class_incremental, task_incremental: leave it out"),
    ):
        with pytest.raises(ValueError, match=f"row '{table.base(name)}' .*scenario='{scenario}'.*{fix}"):
            planned(name, more=["--scenario", scenario])


def test_a_method_in_a_name(planned):
    plan = planned("ewc@trainable=lora:8,strength=1000,learning_rate=0.5")
    assert plan.name == "ewc@learning_rate=0.5,strength=1000,trainable=lora:8" or "strength=1000.0" in plan.name
    assert (plan.method.strength, plan.learner.trainable, plan.training.learning_rate) == (1000, "lora:8", 0.5)
    assert ":" not in plan.file.name and plan.settings()["run"] == {"trainable": "lora:8"}
    assert plan.settings()["method"]["strength"] == 1000
    few = planned("icarl@memory_per_class=2").method  # the default of memory_size does not come with it
    assert (few.memory_size, few.memory_per_class) == (None, 2)


def test_options_of_prompts_do_not_stop_rows_that_have_none(planned, local, tmp_path):
    more = "--last_block read --later_prompt_learning_rate 0.004 --compensate_drift true --compile_trunk true".split()
    keys = ("last_block", "later_prompt_learning_rate", "compensate_drift", "compile_trunk")

    def found(name):
        return tuple(getattr(planned(name, more=more).training, key) for key in keys)

    assert found("l2p-none") == ("read", 0.004, True, True)
    assert found("lwf") == found("joint") == ("full", None, False, False)
    assert planned("lwf", more=more).settings() == planned("lwf").settings()
    assert found("clip-none") == ("full", 0.004, True, True)
    for option in (
        "last_block=read",
        "later_prompt_learning_rate=0.004",
        "compensate_drift=True",
        "compile_trunk=True",
    ):
        plan = planned(f"lwf@{option}")  # by its own name it is asked for, and refused
        with pytest.raises(ValueError, match=option.partition("=")[0]):
            runs.execute([plan], "--some arguments")
        assert not plan.folder.exists()  # so that the option may be left out


def script_help(script) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        script.parse(["--help"])
    return text.getvalue()


def test_help_explains(script):
    text = script_help(script)
    for name in (*script.ROWS, "--rows", "--seeds", "--jobs", "--work_dir", "--table", "--dry_run", "--image_size"):
        assert name in text
    assert "--worker" not in text and "@energy=0.9" in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("l2p-nothing", "row 'l2p-nothing' is unknown: choose from frozen-ncm"),
        ("l2p-pgp@", "'' is not a setting of this row"),
        ("l2p-pgp@energy", "'energy' is not a setting of this row: write field=value"),
        ("l2p-pgp@width=3", "'width=3' is not a setting of this row.*ProjectionConfig, L2PConfig.*energy"),
        ("dualprompt-pgp@top_k=3", "'top_k=3' is not a setting"),
        ("frozen-lda@energy=0.9", "'energy=0.9' is not a setting.*ShrinkageLDA, such as shrinkage"),
        ("l2p-pgp@seed=3", "'seed=3' is not a setting"),
        ("l2p-pgp@method=none", "'method=none' is not a setting"),
        ("l2p-pgp@energy=high", "energy='high' does not fit: expected float"),
        ("l2p-pgp@max_images=2.5", "max_images='2.5' does not fit: expected int or none"),
        ("l2p-none@batchwise_prompt=1", "batchwise_prompt='1' does not fit: expected bool"),
        ("l2p-none@optim=../x", "optim='../x' does not fit"),
        ("dualprompt-none@general_layers=1", "general_layers='1' does not fit"),
        ("l2p-pgp@energy=1.5", r"row 'l2p-pgp@energy=1.5': energy=1.5 is outside \(0, 1\]"),
        ("l2p-pgp@top_k=11", "top_k=11 is above pool_size=10"),
        ("frozen-ridge@width=0", "width=0"),
        ("ewc@energy=0.9", "'energy=0.9' is not a setting.*EWCConfig, Learner.*strength"),
        ("ewc@strength=-1", "row 'ewc@strength=-1': strength=-1.0 is out of range"),
        ("ewc@name=gpm", "'name=gpm' is not a setting"),
        ("lwf@trainable=some", "trainable='some' is unknown"),
        ("icarl@memory_per_class=2,memory_size=20", "mutually exclusive"),
    ],
)
def test_a_bad_name_is_refused(planned, name, message):
    with pytest.raises(ValueError, match=message):
        planned(name)


def test_settings_are_whole_and_tell_no_path(planned, local, script, tmp_path):
    settings = planned("l2p-pgp").settings()
    assert settings["model"]["model_name_or_path"] == "tiny-vit" and settings["data"]["dataset_name"] == "patterns"
    assert settings["projection"]["energy"] == 0.99 and settings["prompt"]["pool_size"] == 10
    training = settings["training"]
    assert (training["learning_rate"], training["num_train_epochs"], training["augmentation"]) == (0.02, 2, "flip")
    assert not {"output_dir", "seed", "push_to_hub"} & training.keys()
    command = script.result_arguments([*local, "--rows", "l2p-pgp", "l2p-none", "--seeds=3", "--output_dir", "x"])
    assert "--model_name_or_path DIR/tiny-vit" in command and "--learning_rate 0.02" in command
    assert not re.search("rows|seeds|output_dir|l2p", command)
    assert str(tmp_path.parent) not in json.dumps(settings) + command


def test_a_file_of_other_settings_is_no_finished_run(planned, monkeypatch):
    plan = planned("l2p-pgp")
    settings = plan.settings()
    assert not plan.finished()
    write_json(plan.file, {"settings": settings})
    assert plan.finished()
    del settings["projection"]["key_energy"]  # written before there was such a setting
    write_json(plan.file, {"settings": settings})
    assert plan.finished()
    changed = planned("l2p-pgp", more=["--learning_rate", "0.1"])
    with pytest.raises(ValueError, match=r"training.learning_rate is 0.02 there, 0.1 here.*another --output_dir"):
        changed.finished()
    half = planned("l2p-pgp", more=["--bf16", "true"])  # what is at its default counts too, on either side
    with pytest.raises(ValueError, match=r"training.bf16 is False there, True here"):
        half.finished()
    write_json(plan.file, {"settings": half.settings()})
    with pytest.raises(ValueError, match=r"training.bf16 is True there, False here"):
        plan.finished()
    assert planned("l2p-pgp", more=["--bf16", "true", "--logging_steps", "3"]).finished()  # which changes no number
    post_init = PGPTrainingArguments.__post_init__

    def elsewhere(self):  # a machine with a GPU
        post_init(self)
        self.dataloader_pin_memory = not self.dataloader_pin_memory

    with monkeypatch.context() as patch:
        patch.setattr(PGPTrainingArguments, "__post_init__", elsewhere)
        assert half.finished()
    write_json(plan.file, {"settings": {**settings, "training": {**settings["training"], "coming": 1}}})
    with pytest.raises(ValueError, match=r"training.coming is 1 there, 'unknown' here"):
        plan.finished()
    plan.file.unlink()
    write_json(plan.folder / "settings.json", settings)
    with pytest.raises(ValueError, match=r"settings.json has other settings.*delete its folder"):
        changed.finished()


def test_a_methods_file_of_other_settings_is_no_finished_run(planned):
    plan = planned("ewc")
    write_json(plan.file, {"settings": plan.settings()})
    assert plan.finished()
    settings = plan.settings()
    del settings["method"]["gamma"], settings["run"]["trainable"]  # written before there were such settings
    write_json(plan.file, {"settings": settings})
    assert plan.finished()
    settings["method"]["strength"] = 7.0
    write_json(plan.file, {"settings": settings})
    with pytest.raises(ValueError, match=r"method.strength is 7.0 there, [\d.]+ here"):
        plan.finished()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(script, local, tmp_path_factory):
    """A run of l2p-pgp that nothing interrupted: its file's content."""
    out = tmp_path_factory.mktemp("whole")
    _, model, data, training = script.parse([*local, "--output_dir", str(out)])
    plan = plans.plan("l2p-pgp", 1, script.ROWS, model, data, training, out / "work")
    assert runs.execute([plan], "--some arguments") and not plan.folder.exists() and not plan.lock.exists()
    return json.loads(plan.file.read_text())


def test_a_runs_file_has_everything(whole):
    assert whole["memory"] == {"images": 0, "bytes": 0} and whole["trainable_parameters"] > 0
    for head in ("linear", "statistics"):
        within = whole["heads"][head]["task_incremental"]
        assert within["average_accuracy"] >= whole["heads"][head]["average_accuracy"]
    assert not {"task_incremental", "average_accuracy"} & whole.keys()
    assert (whole["row"], whole["seed"], whole["num_tasks"], whole["num_classes"]) == ("l2p-pgp", 1, 3, 6)
    assert whole["arguments"] == "--some arguments" and whole["resumed"] is False
    used, linear = (whole["heads"][head] for head in ("statistics", "linear"))
    assert used["average_accuracy"] == pytest.approx(metrics.average_accuracy(used["accuracy_matrix"]))
    assert used["forgetting"] == pytest.approx(metrics.forgetting(used["accuracy_matrix"]))
    assert linear["average_accuracy"] == pytest.approx(sum(linear["by_task"]["now"]) / 3)
    assert "accuracy_matrix" not in {*linear, *linear["task_incremental"], *used["task_incremental"]}
    assert [len(whole[key]) for key in ("drift", "changed_selections", "projection_rank")] == [3, 3, 3]
    assert whole["projection_rank"][-1] > 0 and whole["train_images_per_second"] > 0
    assert {"train", "statistics", "evaluation"} <= whole["seconds"].keys()
    assert whole["cpu_seconds"] > 0
    assert 100 < whole["peak_memory_mb"] < 100_000 and whole["threads"] >= 1 and whole["cpu_count"] == os.cpu_count()
    assert whole["machine"]["processor"] and os.uname().nodename not in json.dumps(whole["machine"]).split('"')
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in whole["sha256"].values())
    assert whole["versions"]["torch"] and whole["settings"]["projection"]["method"] == "pgp"


@pytest.mark.parametrize("steps", [4, 11])  # of six in each of three tasks: within the first and the second
def test_an_interrupted_run_goes_on_exactly(planned, whole, monkeypatch, steps):
    plan, step, left = planned("l2p-pgp", seed=1), StreamTrainer.training_step, [steps]

    def until(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", until)
    with pytest.raises(KeyboardInterrupt):
        runs.execute([plan], "--some arguments")
    assert not plan.file.exists() and not plan.lock.exists() and "continues after" in runs.describe(plan)
    left[0] = 18 - steps + 3  # no more than an epoch again
    runs.execute([plan], "--some arguments")
    found = json.loads(plan.file.read_text())
    assert found["resumed"] is True and same_outcome(found, whole)
    assert not plan.folder.exists()


def test_a_finished_run_is_left_alone(planned):
    plan = planned("l2p-none")
    write_json(plan.file, {"settings": plan.settings(), "mark": 1})
    assert runs.execute([plan], "")
    assert json.loads(plan.file.read_text())["mark"] == 1 and not plan.folder.exists()


def test_rows_of_a_seed_are_paired_and_frozen_prompts_stay(planned, whole):
    found = {}
    for name in ("l2p-none", "l2p-frozen"):
        plan = planned(name, seed=1)
        runs.execute([plan], "", keep=True)
        assert json.loads((plan.folder / "run" / "task-3" / "results.json").read_text())["seed"] == 1
        found[name] = json.loads(plan.file.read_text())
    first = {run["heads"]["linear"]["by_task"]["when_learned"][0] for run in (whole, *found.values())}
    assert len(first) == 1
    assert len({json.dumps(run["sha256"]) for run in (whole, *found.values())}) == 1  # of the same stream and backbone
    assert found["l2p-frozen"]["drift"] == [0, 0, 0] and found["l2p-none"]["drift"][-1] > 0
    assert found["l2p-none"]["projection_rank"] == [0, 0, 0]


def test_frozen_rows_share_their_features(planned, monkeypatch):
    calls = []
    extract = runs.stream_features
    monkeypatch.setattr(runs, "stream_features", lambda *a, **k: calls.append(1) or extract(*a, **k))
    group = [planned(f"frozen-{name}", seed=2) for name in ("ncm", "lda", "ridge@width=100")]
    runs.execute(group, "")
    assert len(calls) == 2  # of training and of test images
    found = [json.loads(plan.file.read_text()) for plan in group]
    for run in found:
        assert run["memory"]["images"] == run["trainable_parameters"] == 0
        assert list(run["heads"]) == ["closed form"] and run["drift"] == [0, 0, 0]
        head = run["heads"]["closed form"]
        assert head["task_incremental"]["average_accuracy"] >= head["average_accuracy"]
        assert run["heads"]["closed form"]["accuracy_matrix"][0][1] is None
    assert found[2]["settings"]["classifier"] == {"name": "RandomProjectionRidge", "width": 100, "seed": 2}
    alone = planned("frozen-lda", seed=2, folder="alone")
    runs.execute([alone], "")
    assert json.loads(alone.file.read_text())["heads"] == found[1]["heads"]


def test_the_joint_row_is_one_task(planned):
    plan = planned("l2p-joint")
    runs.execute([plan], "")
    run = json.loads(plan.file.read_text())
    assert run["num_tasks"] == 1 and run["num_classes"] == 6
    assert len(run["heads"]["statistics"]["accuracy_matrix"]) == len(run["heads"]["linear"]["by_task"]["now"]) == 1


@pytest.mark.parametrize("name", ["derpp@memory_size=4", "icarl@memory_per_class=1,trainable=lora:2", "joint"])
def test_a_method_is_run(planned, name):
    plan = planned(name, seed=1)
    runs.execute([plan], "")
    run = json.loads(plan.file.read_text())
    assert list(run["heads"]) == ["linear"] and (run["num_tasks"], run["num_classes"]) == (3, 6)
    head, within = run["heads"]["linear"], run["heads"]["linear"]["task_incremental"]
    assert (head["forgetting"] is None) is (name == "joint") and within["average_accuracy"] >= head["average_accuracy"]
    kept = {"derpp": 4, "icarl": 6, "joint": 0}[table.base(name)]
    assert run["memory"] == {"images": kept, "bytes": kept * 3 * tiny.SIDE**2} and run["trainable_parameters"] > 0
    assert run["settings"]["method"]["name"] == table.base(name) and not {"average_accuracy", "method"} & run.keys()


def test_an_interrupted_method_goes_on_exactly(planned, monkeypatch):
    whole = planned("derpp@memory_size=4", folder="whole")
    runs.execute([whole], "")
    plan, step, left = planned("derpp@memory_size=4"), StreamTrainer.training_step, [11]

    def until(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", until)
    with pytest.raises(KeyboardInterrupt):
        runs.execute([plan], "")
    left[0] = 99
    runs.execute([plan], "")
    found = json.loads(plan.file.read_text())
    assert found["resumed"] and same_outcome(found, json.loads(whole.file.read_text()))


def test_clip_rows_have_a_clip_model(planned, tmp_path, monkeypatch):
    tiny.backbone("clip").save_pretrained(tmp_path / "clip")
    tiny.processor().save_pretrained(tmp_path / "clip")
    words = lambda texts: {"input_ids": [[38, c, 39] for c in range(len(texts))]}  # noqa: E731
    monkeypatch.setattr(ModelArguments, "tokenizer", lambda self: words)
    plan = planned("clip-pgp@image_length=2,text_length=2", more=["--model_name_or_path", str(tmp_path / "clip")])
    runs.execute([plan], "")
    run = json.loads(plan.file.read_text())
    assert plan.prompt.pool_size == 3 and run["model"] == "clip_prompt"
    assert run["heads"]["linear"]["task_incremental"] and run["heads"]["statistics"]["task_incremental"]
    assert run["settings"]["model"]["kind"] == "clip" and planned("l2p-pgp").model.kind == "vit"


def test_a_run_has_one_process(planned, tmp_path):
    plan = planned("l2p-none")
    plan.lock.parent.mkdir(parents=True)
    for left in (plan.lock, plan.lock.with_suffix(".pid")):  # by a process that was killed
        left.write_text("999999999\n")
    assert runs.holder(plan.lock) is None and not list(plan.lock.parent.iterdir())
    with runs.claimed(plan.lock) as mine:
        assert mine and runs.holder(plan.lock) == str(os.getpid())
        assert not runs.execute([plan], "") and not plan.folder.exists()
        assert runs.describe(plan) == f"process {os.getpid()} is running it"
    assert not list(plan.lock.parent.iterdir()) and runs.describe(plan) == "new"


def hold(path, connection):
    with runs.claimed(path) as mine:
        connection.send(mine)
        time.sleep(60)


def test_a_lock_ends_with_its_process(tmp_path):
    lock = tmp_path / ".run.lock"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(lock, theirs))
    process.start()
    assert ours.recv() is True and runs.holder(lock) == str(process.pid)
    with runs.claimed(lock) as mine:
        assert mine is False
    process.kill()
    process.join()
    assert lock.exists() and runs.holder(lock) is None and not list(tmp_path.iterdir())


# ---- the script ------------------------------------------------------------------------------------------------------

EXEMPLARS = {
    name
    for name in names()
    if {"memory_size", "memory_per_class"} & METHODS[name].config_class.__dataclass_fields__.keys()
}

STAND_IN = """
import json, pathlib, shutil, sys, time
argv = sys.argv
rows = " ".join(argv).split("--rows ")[-1].split()
out = pathlib.Path(argv[argv.index("--output_dir") + 1])
seed = " ".join(argv).split("--seeds ")[-1].split()[0]
with open(out / "starts", "a") as file:
    file.write(f"{' '.join(rows)} {seed}\\n")
for row in rows:
    if "crash" in (out / "mood").read_text() and row == "l2p-pgp":
        sys.exit("the loss became nan")
    if row == "dualprompt-none":
        time.sleep(60)
    if "late" in (out / "mood").read_text() and row == "frozen-lda":
        sys.exit("no memory left")
    made = json.loads((out / "made" / f"{row}.json").read_text())
    made.update(row=row, seed=int(seed))
    (out / f"{row}-seed{seed}.json").write_text(json.dumps(made))
    for folder in out.parent.rglob(f"{row}-seed{seed}"):  # as the work folder of a finished run
        shutil.rmtree(folder)
"""


def stand_in(script, planned, tmp_path, monkeypatch) -> Path:
    """Workers that write a made-up run instead of training one; returns the output folder."""
    out = tmp_path / "out"
    worker = tmp_path / "worker.py"
    worker.write_text(STAND_IN)
    (out / "made").mkdir(parents=True)
    (out / "mood").write_text("well")
    for name in script.ROWS:
        write_json(out / "made" / f"{name}.json", made_up(planned(name), 0))
    monkeypatch.setattr(script, "__file__", str(worker))
    return out


def made_up(plan: plans.Plan, seed: int, measured: bool = True, **more) -> dict:
    """A run with numbers that depend on its name and seed alone.

    Args:
        measured: with what runs of older versions did not measure.
    """
    tasks, level = plan.data.num_tasks, 20 + len(plan.name) + 3 * seed
    heads = {}
    bonuses = {"closed form": 7} if plan.classifier is not None else {"linear": 0, "statistics": 5}
    for head, bonus in {"linear": 0}.items() if plan.method is not None else bonuses.items():
        matrix = [[level + bonus - 4.0 * i + 2 * j if j <= i else None for j in range(tasks)] for i in range(tasks)]
        matrix[0][0] = 80.0 + seed
        if table.base(plan.name) == "joint":
            matrix[:-1] = [[None] * tasks] * (tasks - 1)
        heads[head] = {"accuracy_matrix": matrix, **metrics.summarize(matrix)}
        if measured:
            heads[head]["task_incremental"] = {"average_accuracy": 90.0 + seed}
    prompted = (
        {} if plan.classifier is not None else {"changed_selections": [0, 0.5], "projection_rank": [0, 40 + seed]}
    )
    if measured:
        kept = 60 if hasattr(plan.method, "memory_size") else 0
        prompted |= {"memory": {"images": kept, "bytes": 1200 * kept}}
        prompted |= {"trainable_parameters": 0 if plan.classifier is not None else 54321}
    return {
        "row": plan.name, "seed": seed, "arguments": "--lr 1", "settings": plan.settings(), "num_tasks": tasks,
        "num_classes": 6, "heads": heads, "drift": [0, 0.1 * (seed + 1)], "seconds": {"train": 60, "evaluation": 30},
        "cpu_seconds": 120.0, "peak_memory_mb": 500.0, "threads": 1, "cpu_count": 2, "sha256": {"backbone": "b0", "stream": f"s{seed}"}, "machine": {"processor": "p", "device": "cpu"},
        "versions": {"torch": "2"}, **prompted, **more,
    }  # fmt: skip


def three(plan: plans.Plan) -> list[dict]:
    """Made-up runs of three seeds."""
    return [made_up(plan, seed) for seed in range(3)]


@pytest.mark.slow
def test_a_crash_stops_nothing_else_and_finished_runs_are_skipped(
    script, planned, local, tmp_path, monkeypatch, capsys
):
    out = stand_in(script, planned, tmp_path, monkeypatch)
    (out / "mood").write_text("crash")
    command = [
        *local,
        "--output_dir",
        str(out),
        "--seeds",
        "0",
        "1",
        "--jobs",
        "2",
        "--rows",
        "frozen-ncm",
        "frozen-lda",
    ]
    command += ["l2p-pgp", "l2p-none"]
    assert script.main(command) == 1
    printed = capsys.readouterr().out
    assert len(re.findall("FAILED with exit code 1.*the loss became nan", printed)) == 2
    assert "2 processes failed" in printed and len(re.findall(": finished in", printed)) == 6
    assert sorted(path.name for path in out.glob("*.json")) == [
        f"{row}-seed{seed}.json" for row in ("frozen-lda", "frozen-ncm", "l2p-none") for seed in (0, 1)
    ]
    starts = (out / "starts").read_text().splitlines()
    assert sorted(starts) == sorted(
        f"{rows} {s}" for rows in ("frozen-ncm frozen-lda", "l2p-pgp", "l2p-none") for s in "01"
    )
    assert (tmp_path / "work" / ".gitignore").exists() or (
        tmp_path / "work" / "out" / ".gitignore"
    ).read_text() == "*\n"
    log = next(re.finditer(r"see (\S+):", printed))[1]
    assert "nan" in Path(log).read_text()

    (out / "mood").write_text("well")
    assert script.main([*command, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert (
        len(re.findall("^finished  ", printed, re.M)) == 6
        and len(re.findall("^to run    l2p-pgp", printed, re.M)) == 2
    )
    assert script.main(command) == 0
    assert sorted((out / "starts").read_text().splitlines()[6:]) == ["l2p-pgp 0", "l2p-pgp 1"]
    assert "l2p-pgp" in (out / "table.md").read_text() and (out / "accuracy.png").is_file()
    assert script.main(command) == 0 and len((out / "starts").read_text().splitlines()) == 8


@pytest.mark.slow
def test_a_group_that_fails_late_is_told_with_its_log(script, planned, local, tmp_path, monkeypatch, capsys):
    """The first of two frozen rows is finished, and its work folder gone, when the second one fails."""
    out = stand_in(script, planned, tmp_path, monkeypatch)
    (out / "mood").write_text("late")
    rows = ["frozen-ncm", "frozen-lda", "l2p-none"]
    assert script.main([*local, "--output_dir", str(out), "--seeds", "0", "--rows", *rows]) == 1
    printed = capsys.readouterr().out
    assert re.search("frozen-ncm seed 0: finished", printed) and re.search("l2p-none seed 0: finished", printed)
    assert "no memory left" in re.search("frozen-lda seed 0: FAILED.*", printed)[0]


def test_a_termination_ends_the_workers(script, planned, local, tmp_path, monkeypatch):
    out = stand_in(script, planned, tmp_path, monkeypatch)
    started = []
    begin = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(begin(*args, **kwargs))
        return started[-1]

    def sleep(seconds):
        if (out / "starts").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(script.subprocess, "Popen", popen)
    monkeypatch.setattr(script.time, "sleep", sleep)
    with pytest.raises(SystemExit) as stopped:
        script.main([*local, "--output_dir", str(out), "--rows", "dualprompt-none", "--seeds", "0"])
    assert {signum: signal.getsignal(signum) for signum in before} == before
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [process.returncode for process in started] == [-signal.SIGTERM]
    assert not list(out.glob("*-seed*.json"))


def test_jobs_share_the_cores_out(script, planned, local, tmp_path, monkeypatch):
    out = stand_in(script, planned, tmp_path, monkeypatch)
    seen = []
    begin = subprocess.Popen
    monkeypatch.setattr(script.subprocess, "Popen", lambda *a, **k: seen.append(k["env"]) or begin(*a, **k))
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script.main([*local, "--output_dir", str(out), "--rows", "l2p-none", "--seeds", "0", "--jobs", "3"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    script.main([*local, "--output_dir", str(out), "--rows", "l2p-none", "--seeds", "1", "--jobs", "3"])
    assert [environment["OMP_NUM_THREADS"] for environment in seen] == ["2", "5"]


def test_arguments_that_runs_set_themselves_are_refused(script):
    with pytest.raises(ValueError, match="--seed: runs are named by --seeds"):
        script.main(["--seed", "3"])
    with pytest.raises(ValueError, match="--resume_from_checkpoint: runs"):
        script.main(["--resume-from-checkpoint=true"])


def test_nothing_named_means_the_embedded_digits(script):
    _, model, data, training = script.parse([])
    assert model.image_size is None and data.num_tasks == 5 and data.max_train_samples_per_class == 40
    assert (
        script.result_arguments(["--output-dir", "x", "--jobs=2", "--learning-rate", "0.1"]) == "--learning-rate 0.1"
    )
    assert script.parse(["--dataset-name", "x"])[1].image_size == 112
    bench, model, data, training = script.parse(["--dataset_name", "x", "--num_tasks", "20"])
    assert (model.image_size, data.num_tasks, data.max_train_samples_per_class) == (112, 20, 50)
    assert (training.learning_rate, training.num_train_epochs, training.augmentation) == (0.0075, 3, "flip")
    assert bench.rows == [name for name in script.ROWS if name not in script.WHEN_NAMED] and bench.seeds == [0, 1, 2]


@pytest.mark.slow
def test_real_processes_terminated_and_resumed(script, local, tmp_path):
    """The script as a user runs it: SIGTERM in the second task, then the same command again."""
    command = [sys.executable, str(SCRIPT), *local, "--rows", "frozen-ncm", "frozen-ridge@width=60", "l2p-pgp"]
    command += ["--seeds", "1", "--num_train_epochs", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    once = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "a")], env=environment, capture_output=True, text=True
    )
    assert once.returncode == 0, once.stdout + once.stderr
    again = [*command, "--output_dir", str(tmp_path / "b")]
    process = subprocess.Popen(again, env=environment, stdout=subprocess.DEVNULL)
    run = tmp_path / "work" / "b" / "l2p-pgp-seed1" / "run"
    while not (run / "checkpoints" / "task-2").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "b" / "l2p-pgp-seed1.json").exists() and not list((tmp_path / "b").glob(".*.lock"))
    done = subprocess.run(again, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in (tmp_path / "a").glob("*.json"))
    assert len(files) == 3
    for name in files:
        one, other = (json.loads((tmp_path / folder / name).read_text()) for folder in "ab")
        assert same_outcome(one, other), name
    assert other["resumed"] and not run.exists()
    assert "1 runs" not in done.stdout and "3 runs, 2 of them finished earlier" in done.stdout
    assert "l2p-pgp seed 1" in (tmp_path / "b" / "table.md").read_text()  # its time is marked


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    """Name the figures of the table without drawing them, which takes seconds."""
    monkeypatch.setattr(figures.several, "accuracy_bands", lambda panels, path, known: None)
    monkeypatch.setattr(figures.several, "sensitivity", lambda points, path, usual: None)
    monkeypatch.setattr(figures.several, "accuracy_and_forgetting", lambda heads, path, known: None)


@pytest.fixture(scope="module")
def made(script, local, tmp_path_factory):
    """Made-up runs of all rows and three seeds; of one row the last seed is not there yet."""
    out = tmp_path_factory.mktemp("made")
    _, model, data, training = script.parse([*local, "--output_dir", str(out)])
    varied = ("l2p-functional@energy=0.9", "l2p-functional@probes=4", "l2p-none@learning_rate=0.5")
    for name in (*script.ROWS, *varied, "ewc@trainable=head", "fine_tuning@trainable=head", "derpp@memory_size=9"):
        plan = plans.plan(name, 0, script.ROWS, model, data, training, out / "work")
        for seed in range(3):
            if (name, seed) != ("l2p-attention", 2):
                write_json(out / f"{name}-seed{seed}.json", made_up(plan, seed))
    return out


@pytest.fixture
def folder(made, tmp_path, undrawn):
    """A copy of the runs, of which tables are made."""
    return Path(shutil.copytree(made, tmp_path / "benchmarks"))


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """The table that follows `heading`, by first cell."""
    lines = text[text.index(heading) :].splitlines()
    lines = [line for line in lines if line.startswith("|")]
    width = lines[0].count("|")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == width]
    return {line[0]: line[1:] for line in found[2:]}


def test_the_table_is_what_the_files_say(script, folder):
    table.write(folder, folder / "table.md", script.ROWS)
    text = (folder / "table.md").read_text()
    found = cells(text, "# Benchmark")
    read = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    names = [name for name in found if name in {run["row"] for run in read}]
    assert [name for name in names if "@" not in name] == list(script.ROWS)  # in this order

    def expect(values, digits):
        if not values:
            return "–"
        mean = f"{statistics.mean(values):.{digits}f}"
        return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

    for name in names:
        own = sorted((run for run in read if run["row"] == name), key=lambda run: run["seed"])
        single = own[0]["num_tasks"] == 1 or name == "joint"
        expected = [str(len(own))]
        for heads in (["linear"], ["statistics", "closed form"]):
            got = [run["heads"][head] for run in own for head in heads if head in run["heads"]]
            expected.append(expect([one["average_accuracy"] for one in got], 2))
            expected.append("–" if single else expect([one["forgetting"] for one in got], 2))
            within = [] if own[0]["num_tasks"] == 1 else got
            expected.append(expect([one["task_incremental"]["average_accuracy"] for one in within], 2))
        ends = [] if single else own
        expected.append(expect([run["drift"][-1] for run in ends], 3))
        expected.append(
            expect([100 * run["changed_selections"][-1] for run in ends if "changed_selections" in run], 1)
        )
        expected.append(expect([run["projection_rank"][-1] for run in ends if "projection_rank" in run], 0))
        kept = own[0]["settings"]["data"]["max_train_samples_per_class"] * own[0]["num_classes"]
        exemplars = ["10", f"{6000 / kept:.3g}", "60", "72,000"] if table.base(name) in EXEMPLARS else ["0"] * 4
        expected += [*exemplars, "0" if "frozen-" in name else "54,321"]
        expected += [expect([1.0] * len(own), 1), expect([2.0] * len(own), 1), expect([500.0] * len(own), 0)]
        assert found[name] == expected, name
    assert found["l2p-attention"][0] == "2"


def test_a_table_of_older_runs_has_no_new_column(script, planned, tmp_path):
    """Their files lack what is optional; and a table without exemplars has no column for them."""
    heads = [f"{head} head: task-incremental (%)" for head in ("linear", "statistics")]
    for measured, optional in ((False, []), (True, [*heads, "trainable parameters"])):
        out = tmp_path / str(measured)
        write_json(out / "l2p-pgp-seed0.json", made_up(planned("l2p-pgp"), 0, measured))
        table.write(out, out / "table.md", script.ROWS)
        text = (out / "table.md").read_text()
        found = [cell.strip() for cell in next(line for line in text.splitlines() if "| row" in line).split("|")]
        assert [one for one in found if re.search("task-incremental|exemplars|trainable", one)] == optional
        assert ("Task-incremental:" in text) is measured and "Exemplars:" not in text and "Methods train" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", sorted(file.parent.name for file in CARDS.glob("*/table.md")))
def test_published_tables_stay_as_they_are(script, tmp_path, monkeypatch, name):
    """Runs of the first are those of an older version."""
    published = Path("model_cards") / name
    (tmp_path / published).mkdir(parents=True)
    for file in (SCRIPT.parents[1] / published).glob("*.json"):
        (tmp_path / published / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    table.write(published, published / "table.md", script.ROWS, script.usual_rows([]))
    assert (published / "table.md").read_text() == (SCRIPT.parents[1] / published / "table.md").read_text()


def test_published_methods_are_in_the_orders_that_can_be_expected():
    """Joint training above all, more exemplars above fewer, and accuracy that is no lower where tasks are given."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in table.read(CARDS / "digits-methods"):
        if "method" in run["settings"]:
            head = run["heads"]["linear"]
            pair = head["average_accuracy"], head["task_incremental"]["average_accuracy"]
            found.setdefault(run["row"], []).append(pair)
    assert len(found) == 14 and all(len(runs) == 3 for runs in found.values())
    assert all(within >= among for runs in found.values() for among, within in runs)
    mean = {row: np.mean(runs, 0)[0] for row, runs in found.items()}
    assert max(mean, key=mean.__getitem__) == "joint"
    for few, many in (
        ("bic@memory_per_class=2,validation_share=0.5", "bic@memory_per_class=10"),
        ("der_mcg@memory_per_class=2", "der_mcg@memory_per_class=10"),
        ("derpp@memory_size=20", "derpp@memory_size=100"),
        ("icarl@memory_per_class=2", "icarl@memory_per_class=10"),
    ):
        assert mean[many] > mean[few]
    for kept in ("bic@memory_per_class=10", "derpp@memory_size=100"):
        assert mean[kept] > 2 + max(mean[row] for row in ("fine_tuning", "ewc", "lwf"))


@pytest.mark.parametrize("name", ["cifar100-vit-tiny", "cifar100-shifted", "cifar100-rivals"])
def test_published_runs_are_finished(script, tmp_path, monkeypatch, name):
    """Whoever repeats their command repeats no run."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    published = SCRIPT.parents[1] / "model_cards" / name
    (tmp_path / "vit-tiny-patch16-224").mkdir()
    (tmp_path / "cifar100").mkdir()
    on_gpu = "" if name == "cifar100-vit-tiny" else " --use_cpu --bf16 --exact_images false --process_on_device"
    parsed, others = {}, [run for run in table.read(published) if run["seed"] == 1]
    for file in published.glob("*-seed0.json"):
        run = json.loads(file.read_text())
        arguments = run["arguments"].replace("DIR", str(tmp_path)) + on_gpu
        if arguments not in parsed:
            parsed[arguments] = script.parse([*arguments.split(), "--output_dir", str(published)])
        _, model, data, training = parsed[arguments]
        training.use_cpu = not on_gpu  # the others are what a GPU changes in the defaults
        plan = plans.plan(run["row"], 0, script.ROWS, model, data, training, tmp_path)
        assert plan.finished(), file
        plan.check_seeds(others)  # one more seed may come
    assert parsed


@pytest.mark.parametrize(
    "card", sorted(SCRIPT.parents[1].glob("model_cards/*/table.md")), ids=lambda card: card.parent.name
)
def test_the_command_of_a_card_trains_no_other_rows(script, card):
    """Not those either that have become usual since."""
    text = card.with_name("README.md").read_text().replace("\\\n", " ")
    published = {run["row"] for run in table.read(card.parent)}
    for line in re.findall(r"^python examples/benchmark.py (.*)$", text, re.MULTILINE):
        rows = script.parse(shlex.split(line))[0].rows
        assert rows and set(rows) <= published


def test_differences_are_paired(script, folder):
    table.write(folder, folder / "table.md", script.ROWS)
    found = cells((folder / "table.md").read_text(), "## Paired differences")
    read = {(run["row"], run["seed"]): run["heads"] for run in map(read_json, folder.glob("*.json"))}

    def expect(name, head, other, theirs):
        values = [
            read[name, seed][head]["average_accuracy"] - read[other, seed][theirs]["average_accuracy"]
            for seed in range(3)
            if (name, seed) in read and (other, seed) in read
        ]
        each = ", ".join(f"{value:+.2f}" for value in values)
        mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        if len(values) < 3:
            return f"{mean:+.2f} ({each})"
        apart = abs(sum(value > 0 for value in values) - 1.5) == 1.5 and abs(mean) > 2 * error
        said = "no difference seen" if not apart else "better" if mean > 0 else "worse"
        return f"{mean:+.2f} ({each}; s.e. {error:.2f}): {said}"

    ends = {(run["row"], run["seed"]): run["drift"][-1] for run in map(read_json, folder.glob("*.json"))}

    def drifts(name, other):
        values = [ends[name, seed] / ends[other, seed] for seed in range(3) if (name, seed) in ends]
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    assert "frozen-lda" not in found and found["l2p-none"][-1] == found["l2p-joint"][-1] == "–"
    controlled = found["l2p-functional"]
    assert controlled[-4] == "l2p-control" and controlled[-1] == drifts("l2p-functional", "l2p-control")
    assert controlled[-2] == expect("l2p-functional", "statistics", "l2p-control", "statistics")
    assert controlled[0] == "l2p-none" and found["dualprompt-functional"][-4] == "dualprompt-control"
    for name, reference in (
        ("l2p-attention", "l2p-none"),
        ("dualprompt-pgp", "dualprompt-none"),
        ("l2p-pgp-gradient", "l2p-none"),
    ):
        row = found[name]
        assert row[0] == reference
        assert row[1] == expect(name, "linear", reference, "linear")
        assert row[2] == expect(name, "statistics", reference, "statistics")
        assert row[3] == expect(name, "statistics", reference, "linear")
        assert row[5] == expect(name, "statistics", "frozen-lda", "closed form")
        assert row[7] == expect(name, "statistics", "l2p-frozen", "statistics")
        assert row[-5] == drifts(name, reference)
        assert row[-4:] == ["", "–", "–", "–"]  # trained as its reference
    assert found["l2p-attention"][1].count(",") == 1  # two seeds
    assert found["l2p-none"][:4] == ["", "–", "–", "–"]
    assert found["l2p-none@learning_rate=0.5"][0] == "l2p-none"
    for name, reference in (("lwf", "fine_tuning"), ("ewc@trainable=head", "fine_tuning@trainable=head")):
        assert found[name][:2] == [reference, expect(name, "linear", reference, "linear")]
        assert found[name][2] == found[name][3] == "–" and found[name][-4:] == ["", "–", "–", "–"]
    assert found["joint"][0] == "fine_tuning" and found["joint"][-5] == "–" and found["fine_tuning"][0] == ""


@pytest.mark.parametrize("setting", ["compile_trunk=True", "bf16=True", "last_block=read", "exact_images=False"])
def test_rows_that_are_computed_differently_are_not_compared(planned, setting):
    names = ("l2p-none", "l2p-frozen", "l2p-pgp", f"l2p-pgp@{setting}", f"l2p-functional@{setting}")
    found = cells(table.differences({name: [made_up(planned(name), 0)] for name in names}), "## Paired differences")
    assert found["l2p-pgp"][0] == "l2p-none" and found["l2p-pgp"][1] != "–"
    for name in ("l2p-pgp", "l2p-functional"):
        assert found[f"{name}@{setting}"] == ["", *["–"] * 5, "", *["–"] * 3]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--num_tasks 2", "tasks: 3 / 2"),
        ("--train_val_split 0.2", ", tested on images held out of the training images (l2p-attention alone); classes"),
        ("--scenario task_incremental", "class_incremental / task_incremental; classes"),
        ("--image_size 32", "image size: 20 / 32"),
        ("--dtype bfloat16", "precision: float32 / frozen weights in bfloat16."),
    ],
)
def test_rows_of_other_streams_and_backbones_are_not_compared(planned, more, text):
    rows = {name: three(planned(name)) for name in ("frozen-lda", "l2p-none", "l2p-pgp")}
    rows["l2p-attention"] = three(planned("l2p-attention", more=more.split()))
    found = cells(table.differences(rows), "## Paired differences")
    assert found["l2p-pgp"][0] == "l2p-none" and all("worse" in found["l2p-pgp"][each] for each in (1, 4))
    assert found["l2p-attention"] == ["", *["–"] * 5, "", *["–"] * 3]
    assert text in table.protocol([run for runs in rows.values() for run in runs])


def test_a_seed_whose_images_have_changed_is_no_pair(planned):
    rows = {name: three(planned(name)) for name in ("l2p-none", "l2p-pgp")}
    rows["l2p-none"][1]["sha256"]["stream"] = "other"
    found = cells(table.differences(rows), "## Paired differences")["l2p-pgp"]
    assert found[:2] == ["l2p-none", "-1.00 (-1.00, -1.00)"]  # its name is shorter by one


def test_prompts_that_learn_unequal_tasks_as_one_are_not_compared(planned):
    """The one average is over images, the others are over tasks; with equal tasks that is the same."""
    for more, compared in ((["--num_tasks", "3"], True), (["--num_tasks", "4"], False)):
        rows = {name: [made_up(planned(name, more=more), 0)] for name in ("l2p-none", "l2p-joint")}
        found = cells(table.differences(rows), "## Paired differences")["l2p-joint"]
        assert (found[0] == "l2p-none") is (found[1] != "–") is compared
        said = table.notes([run for runs in rows.values() for run in runs])
        assert ("over tasks, which differ in their number of classes" in said) is not compared
    sizes = {"num_classes": 11, "num_tasks": 3}
    for first, increment, equal in ((5, 3, False), (None, 3, False), (None, 11, True), (11, 11, True)):
        data = {"init_classes": first, "increment": increment}
        assert columns.equal_tasks({**sizes, "settings": {"data": data}}) is equal


def test_surprises_have_a_control_of_their_own(planned):
    """That a stream is not known in advance is no effect of the projection, nor is the head that it begins with."""
    rows = {}
    for name in ("l2p-control", "l2p-functional", "l2p-control-surprises", "l2p-functional-surprises"):
        rows[name] = three(planned(name))
        if name.endswith("surprises"):  # whose head is drawn by itself
            for run in rows[name]:
                run["heads"]["linear"]["accuracy_matrix"][0][0] += 1
    found = cells(table.differences(rows), "## Paired differences")
    assert {name: row[-4] for name, row in found.items()} == {
        "l2p-control": "",
        "l2p-functional": "l2p-control",
        "l2p-control-surprises": "l2p-control",
        "l2p-functional-surprises": "l2p-control-surprises",
    }
    assert found["l2p-functional-surprises"][-2].startswith("+3.00 (")  # by the length of its name, as others
    assert "(checked)" in table.paired([run for runs in rows.values() for run in runs])
    del rows["l2p-control-surprises"]  # rather none than one that differs in two ways
    assert cells(table.differences(rows), "## Paired differences")["l2p-functional-surprises"][-4] == ""


def test_a_row_with_settings_is_compared_with_the_one_without(script):
    """Where no row without projection ran."""
    folder = SCRIPT.parents[1] / "model_cards" / "cifar100-rivals"
    found = cells((folder / "table.md").read_text(), "## Paired differences")
    assert found["dualprompt-control@selection=statistics"][0] == "dualprompt-control"
    assert found["dualprompt-functional@selection=statistics"][0] == "dualprompt-functional"
    assert found["dualprompt-control"][0] == found["l2p-functional"][0] == ""


def test_a_difference_is_called_one_only_where_it_is():
    assert paired_spread([], 2) == "–" and paired_spread([-1.5], 2) == "-1.50"
    assert paired_spread([1.0, 2.0], 2) == "+1.50 (+1.00, +2.00)"
    assert paired_spread([1.0, 2.0, 3.0], 2) == "+2.00 (+1.00, +2.00, +3.00; s.e. 0.58): better"
    assert paired_spread([-1.0, -2.0, -3.0], 1).endswith("(-1.0, -2.0, -3.0; s.e. 0.6): worse")
    assert paired_spread([0.1, 0.1, 3.0], 2).endswith("no difference seen")  # of one sign, but apart
    assert paired_spread([-0.1, 2.0, 2.1], 2).endswith("no difference seen")


def test_devices_are_not_mixed(script, folder, planned):
    run = made_up(planned("l2p-none@learning_rate=0.25"), 0)
    run["machine"] = {**run.get("machine", {}), "device": "NVIDIA H100"}
    write_json(folder / "l2p-none@learning_rate=0.25-seed0.json", run)
    with pytest.raises(ValueError, match="runs of several devices .*NVIDIA H100.*not comparable"):
        table.write(folder, folder / "table.md", script.ROWS)


def test_runs_of_another_device_are_refused_before_any_is_trained(script, folder, local, planned, monkeypatch, capsys):
    for file in folder.glob("*.json"):
        if not file.name.startswith("l2p-none-"):
            file.unlink()
    monkeypatch.setattr(script, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(script.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a run was begun"))
    command = [*local, "--output_dir", str(folder), "--work_dir", str(folder / "work"), "--rows", "l2p-none"]
    with pytest.raises(
        ValueError, match=r"runs of another device \(cpu\) than this one \(NVIDIA H100\).*--output_dir"
    ):
        script.main([*command, "l2p-pgp"])
    assert script.main(command) == 0 and "table in" in capsys.readouterr().out  # nothing is left to run


def test_a_runs_device_is_its_own(monkeypatch):
    """A run with `--use_cpu` on a machine with a GPU is one of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    assert runs.machine(torch.device("cpu"))["machine"]["device"] == "cpu"
    assert runs.machine(torch.device("cuda", 0))["machine"]["device"] == "NVIDIA H100"


def test_seeds_of_a_row_have_one_setting(script, folder, local, planned, monkeypatch):
    """A mean over seeds of different settings is that of no row."""
    monkeypatch.setattr(script.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a run was begun"))
    command = [*local, "--output_dir", str(folder), "--work_dir", str(folder / "work"), "--seeds", "3"]
    message = r"row 'l2p-pgp' has other settings with seed 0 in .*training.num_train_epochs is 2.0 there, 5.0 here"
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=message):
            script.main([*command, "--num_train_epochs", "5", "--rows", "l2p-pgp", *more])
    assert script.main([*command, "--rows", "l2p-pgp", "frozen-ridge", "--dry_run"]) == 0  # whose settings have a seed
    assert "NOT of one setting" not in table.protocol(table.read(folder))
    write_json(folder / "l2p-pgp-seed3.json", made_up(planned("l2p-pgp", 3, more=["--num_train_epochs", "5"]), 3))
    said = "NOT of one setting each, since seeds of a row differ: l2p-pgp in training.num_train_epochs."
    assert said in table.protocol(table.read(folder))


def test_a_seed_that_is_computed_differently_is_no_pair(planned):
    rows = {name: three(planned(name)) for name in ("l2p-none", "l2p-pgp")}
    rows["l2p-none"][1]["settings"]["training"]["bf16"] = True
    found = cells(table.differences(rows), "## Paired differences")["l2p-pgp"]
    assert found[:2] == ["l2p-none", "-1.00 (-1.00, -1.00)"] and found[4] == "1.00 ± 0.00"


def test_a_copy_is_not_another_seed(script, folder):
    """It would halve the standard deviation, and three of them would make any difference a verdict."""
    shutil.copy(folder / "l2p-pgp-seed0.json", folder / "l2p-pgp-seed0.bak.json")
    with pytest.raises(
        ValueError, match=r"l2p-pgp-seed0.bak.json and l2p-pgp-seed0.json in .* row 'l2p-pgp' with seed 0"
    ):
        table.write(folder, folder / "table.md", script.ROWS)
    write_json(folder / "l2p-pgp-seed0.bak.json", {"row": "l2p-pgp", "seed": 7})
    with pytest.raises(ValueError, match=r"l2p-pgp-seed0.bak.json is not a run of the benchmark: move it out"):
        table.write(folder, folder / "table.md", script.ROWS)


def test_no_table_is_said_to_be_where_none_was_written(script, tmp_path):
    with pytest.raises(ValueError, match=r"empty holds no finished run \(.*run the benchmark first"):
        script.main(["--table", "--output_dir", str(tmp_path / "empty")])
    assert not (tmp_path / "empty").exists()


def test_a_run_without_a_measured_memory_has_a_dash(script, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")  # which has no module `resource`
    assert "peak_memory_mb" not in runs.machine(torch.device("cpu"))
    monkeypatch.undo()
    run = made_up(planned("l2p-none"), 0)
    del run["peak_memory_mb"]
    write_json(tmp_path / "l2p-none-seed0.json", run)
    table.write(tmp_path, tmp_path / "table.md", script.ROWS)
    found = cells((tmp_path / "table.md").read_text(), "# Benchmark")["l2p-none"]
    assert found[-2:] == ["2.0", "–"]


def test_a_reference_with_the_same_settings_is_preferred(folder, script, planned):
    for seed in range(3):
        name = "l2p-pgp@learning_rate=0.5"
        write_json(folder / f"{name}-seed{seed}.json", made_up(planned(name), seed))
    table.write(folder, folder / "table.md", script.ROWS)
    found = cells((folder / "table.md").read_text(), "## Paired differences")
    assert found["l2p-pgp@learning_rate=0.5"][0] == "l2p-none@learning_rate=0.5"


def test_the_text_is_computed(script, folder, planned):
    table.write(folder, folder / "table.md", script.ROWS)
    text = (folder / "table.md").read_text()
    assert "patterns, class_incremental; classes: 6, tasks: 3" in text and "Backbone: tiny-vit, image size: 20" in text
    assert "precision: float32." in text
    assert "learning rate 0.02 / 0.5" in text and "Seeds: 0 / 1 / 2" in text and "(checked)" in text
    assert "python examples/benchmark.py --lr 1 --output_dir benchmarks" in text and "resumed" not in text
    line = next(line for line in text.splitlines() if line.startswith("python") and "l2p-attention" in line)
    assert shlex.split(line)[-5:] == ["--rows", "l2p-attention", "--seeds", "0", "1"]
    assert "--output_dir 'my runs' --rows" in table.commands(
        {"l2p-pgp": rows_of(folder)["l2p-pgp"]}, Path("my runs"), ()
    )
    settings = cells(text, "## Settings")
    assert "energy=0.9" in settings["l2p-functional@energy=0.9"][0] and "method=pgp" in settings["dualprompt-pgp"][0]
    assert "learning_rate=0.5" in settings["l2p-none@learning_rate=0.5"][0]
    assert "num_tasks=1" in settings["l2p-joint"][0]
    assert "value_energy=0.95" in text[text.index("All rows with prompts") :].splitlines()[0]
    assert "method=none" in settings["l2p-none"][0] and not re.search("energy|probes", settings["l2p-none"][0])
    assert "- `l2p-pgp`: L2P, PGP on updates" in text and "one standard deviation" in text
    assert "SHA-256 of the backbone's weights: b0; of class order and images: seed 0 s0, seed 1 s1, seed 2 s2." in text

    odd = made_up(planned("l2p-pgp"), 2, resumed=True)
    odd["heads"]["linear"]["accuracy_matrix"][0][0] += 1
    half = made_up(planned("l2p-pgp"), 1)
    half["settings"]["training"]["bf16"] = True
    write_json(folder / "l2p-pgp-seed1.json", half)
    write_json(folder / "l2p-pgp-seed2.json", odd)
    table.write(folder, folder / "elsewhere" / "table.md", script.ROWS)
    text = (folder / "elsewhere" / "table.md").read_text()
    assert "precision: float32 / bfloat16 autocast over float32 weights." in text
    assert "NOT paired" in text and "(checked)" not in text and "l2p-pgp seed 2" in text[text.index("NOT paired") :]
    assert "lower bounds: l2p-pgp seed 2." in text and "(../accuracy.png)" in text


def test_one_run_is_a_table_without_deviations(script, planned, tmp_path):
    out = tmp_path / "one"
    write_json(out / "l2p-pgp-seed0.json", made_up(planned("l2p-pgp"), 0))
    assert script.main(["--table", "--output_dir", str(out), "--table_file", str(out / "t.md")]) == 0
    text = (out / "t.md").read_text()
    assert cells(text, "# Benchmark")["l2p-pgp"][0] == "1"
    assert "±" not in text.replace("Mean ± standard", "") and "Paired differences" in text
    with pytest.raises(ValueError, match="no finished run"):
        table.write(tmp_path / "empty", tmp_path / "t.md")


# ---- figures ---------------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in table.read(folder):
        found.setdefault(run["row"], []).append(run)
    return found


def test_the_accuracy_figure_shows_plain_rows_and_the_best_without_prompts(folder):
    panels = figures.accuracy_panels(rows_of(folder))
    prompts = {f"{m}, {h} head" for m in ("l2p", "dualprompt", "clip") for h in ("linear", "statistics")}
    assert set(panels) == {*prompts, "methods without exemplars", "methods with exemplars"}
    kept = {name for name in rows_of(folder) if table.base(name) in EXEMPLARS}
    assert set(panels["methods with exemplars"]) == {*kept, "frozen-ridge"} and "derpp@memory_size=9" in kept
    others = panels["methods without exemplars"]
    assert {"ewc", "ewc@trainable=head", "lwf", "frozen-ridge"} < set(others) and not kept & set(others)
    assert {len(curve) for curve in others["joint"]} == {1} and {len(curve) for curve in others["ewc"]} == {3}
    assert set(panels["dualprompt, linear head"]) == {
        "frozen-ridge",
        "joint",
        "none",
        "pgp",
        "control",
        "functional",
        "control-surprises",
        "functional-surprises",
    }  # its name is longest
    assert not any("@" in label for name in prompts for label in panels[name])
    runs_of = rows_of(folder)["l2p-pgp"]
    expected = [metrics.per_task_average_accuracy(run["heads"]["statistics"]["accuracy_matrix"]) for run in runs_of]
    assert panels["l2p, statistics head"]["pgp"] == expected


def test_the_sensitivity_figure_takes_rows_of_one_setting(folder, planned):
    name = "l2p-functional@energy=0.5,probes=9"
    write_json(folder / f"{name}-seed0.json", made_up(planned(name), 0))
    rows = rows_of(folder)
    points, usual = figures.sensitivity_points(rows, "l2p-functional")
    assert usual == {"energy": 0.95, "probes": 2}
    assert {field: set(values) for field, values in points.items()} == {"energy": {0.95, 0.9}, "probes": {2, 4}}
    assert points["energy"][0.95]["drift"] == [run["drift"][-1] for run in rows["l2p-functional"]]
    got = [run["heads"]["statistics"]["average_accuracy"] for run in rows["l2p-functional@probes=4"]]
    assert points["probes"][4]["statistics head"] == got and not math.isnan(got[0])
    drawn = figures.figures(rows, folder)
    assert [path.name for path in drawn] == ["accuracy.png", "protection.png", "sensitivity.png"]
    assert figures.known_classes(rows) == [2, 4, 6]
    pairs = figures.protection_panels(rows)
    assert list(pairs) == ["linear head", "statistics head"]
    labels = [title + end for title in ("L2P", "DualPrompt", "CLIP") for end in ("", "-PGP")]
    assert all(list(found) == labels for found in pairs.values())
    accuracies, forgetting = pairs["linear head"]["L2P-PGP"]
    assert len(accuracies) == len(forgetting) == 3 and {*map(len, accuracies), *map(len, forgetting)} == {3}
    assert "seeds: energy 3, probes 3;" in drawn[folder / "sensitivity.png"]
    rows["l2p-functional@probes=4"] = [run for run in rows["l2p-functional@probes=4"] if run["seed"] == 1]
    points, _ = figures.sensitivity_points(rows, "l2p-functional")  # paired: the plain row's seed 1 alone
    assert points["probes"][2]["drift"] == [run["drift"][-1] for run in rows["l2p-functional"] if run["seed"] == 1]
    assert len(points["energy"][0.95]["drift"]) == 3
    rows["l2p-functional@energy=0.9"] = [{**run, "seed": 7} for run in rows["l2p-functional@energy=0.9"]]
    assert set(figures.sensitivity_points(rows, "l2p-functional")[0]) == {"probes"}  # nothing to pair
