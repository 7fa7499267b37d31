"""Methods on streams without an end: three tasks in one process or in three, classes that come again, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pgp_hf import PGPTrainingArguments, StreamTrainer, TaskStream, load_pretrained
from pgp_hf.methods import create
from pgp_hf.methods.derpp import dark_experience
from pgp_hf.methods.ewc import Quadratic
from pgp_hf.methods.memory import herd

pytestmark = pytest.mark.usefixtures("without_figures")
SETTINGS = {
    "ewc": {"strength": 10.0},
    "derpp": {"memory_size": 7},
    "icarl": {"memory_size": 13},
    "bic": {"memory_size": 24, "validation_share": 0.25},
    "der_mcg": {"memory_size": 12, "tuning_epochs": 4, "gate_epochs": 2, "gate_batch_size": 6},
    "gpm": {"energy": 0.8},
    "null_space_adam": {"energy": 0.8},
}
STORES = ("derpp", "icarl", "bic", "der_mcg")
TASKS = ([0, 1, 2], [3], [4, 5])
DATA = tiny.data()


def task(classes, data=DATA):
    """Return the images of some classes."""
    return data.filter(lambda label: label in classes, input_columns="label")


@pytest.fixture(scope="module")
def tasks():
    return [task(classes) for classes in TASKS]


def method(name, stores="images", **settings):
    own = {"memory_stores": stores} if name in STORES else {}
    return create(name, **{**SETTINGS.get(name, {}), **own, **settings})


ARGUMENTS = {
    "use_cpu": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "augmentation": "flip",
    "disable_tqdm": True,
    "seed": 3,
    "save_full_weights": "all",
}


def beginning(folder, name, model="full", scenario="class_incremental", **settings):
    """Return a trainer that knows nothing yet; its adapter, if it is one, names a backbone in a folder."""
    (folder.parent / "backbone").mkdir(exist_ok=True)
    kind = tiny.ADAPTERS.get(model, "classification")
    base = tiny.backbone(kind)
    base.save_pretrained(folder.parent / "backbone" / kind)
    base = type(base).from_pretrained(folder.parent / "backbone" / kind)
    made = tiny.model(model, base) if model in tiny.ADAPTERS else tiny.plain(model, base)
    own = method(name) if isinstance(name, str) else name
    settings = {**ARGUMENTS, **settings}
    return tiny.trainer(folder, method=own, model=made, stream=TaskStream.empty(scenario), **settings)


def going_on(run, folder, callbacks=(), **settings):
    args = PGPTrainingArguments(str(folder), **{**ARGUMENTS, **settings})
    return StreamTrainer.from_pretrained(run, args=args, callbacks=list(callbacks))


def state(folder):
    """Return what a task has left, but for its evaluation."""
    weights = next(path for name in ("model", "adapter_model") if (path := folder / f"{name}.safetensors").exists())
    return {**load_file(weights), **{f"method {n}": t for n, t in load_file(folder / "method.safetensors").items()}}


def same(a, b):
    found = [state(folder) for folder in (a, b)]
    values = [json.loads((folder / "method.json").read_text())["state"] for folder in (a, b)]
    return (
        values[0] == values[1]
        and found[0].keys() == found[1].keys()
        and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    )


PAIRS = [
    *[("bic", "full"), ("der_mcg", "last:1"), ("gpm", "last:1"), ("lwf", "lora:2")],
    *[("icarl", "l2p"), ("ewc", "clip"), ("derpp", "dualprompt")],
]
MORE_PAIRS = [
    *[(name, "full") for name in ("fine_tuning", "ewc", "lwf", "derpp", "icarl")],
    *[(name, "l2p") for name in ("fine_tuning", "ewc", "lwf", "derpp", "bic")],
    ("null_space_adam", "last:1"),
    *[("icarl", "lora:2"), ("ewc", "lora:2"), ("ewc", "dualprompt"), ("lwf", "clip"), ("derpp", "head")],
]
PAIRS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_PAIRS]


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_one_process_or_three(tmp_path, tasks, name, model):
    together = beginning(tmp_path / "together", name, model)
    for images in tasks:
        together.learn(images)
    run = tmp_path / "run-1"
    beginning(run, name, model).learn(tasks[0])
    for number, images in enumerate(tasks[1:], 2):
        following = tmp_path / f"run-{number}"
        going_on(run, following).learn(images)
        run = following
    for number in (1, 2, 3):
        assert same(tmp_path / "together" / f"task-{number}", run / f"task-{number}"), number


# ---- killed in the third task, and resumed ---------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:  # a step behind the checkpoint
            raise KeyboardInterrupt


KILLED = [("derpp", "full"), ("der_mcg", "last:1")]
KILLED += [pytest.param(pair, marks=pytest.mark.slow) for pair in (("ewc", "full"), ("icarl", "l2p"))]


@pytest.fixture(scope="module", params=KILLED)
def run(request, tmp_path_factory, without_figures):
    """The method, the model, and the folder of a run of two tasks and of one of three."""
    name, model = request.param
    folder = tmp_path_factory.mktemp(name)
    tasks = [task(classes) for classes in TASKS]
    for count in (2, 3):
        own = beginning(folder / str(count), name, model)
        for images in tasks[:count]:
            own.learn(images)
    return folder


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_killed_in_the_third_task(run, tmp_path, tasks, place):
    folder = tmp_path / "on" if place == "elsewhere" else Path(shutil.copytree(run / "2", tmp_path / "2"))
    source = run / "2" if place == "elsewhere" else folder
    settings = {"save_strategy": "steps", "save_steps": 2}
    killed = going_on(source, folder, callbacks=[StopAt()], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.learn(tasks[2])
    assert not (folder / "task-3").exists()
    again = going_on(source, folder, **settings)
    again.learn(tasks[2], resume_from_checkpoint=True)
    assert again.state.global_step > 3 and same(folder / "task-3", run / "3" / "task-3")
    if place == "elsewhere":  # killed after the end: it is taken over
        finished = going_on(source, folder, **settings)
        assert finished.learn(tasks[2], resume_from_checkpoint=True).index == 2 and len(finished.results.matrix) == 3


# ---- classes that come again -----------------------------------------------------------------------------------------

MORE = tiny.data(seed=5)
AGAIN = (
    ([0, 1, 2], DATA),
    ([1, 3], MORE),
    ([0, 1, 3], DATA),
)  # the second and third bring known ones, the third no other


@pytest.mark.parametrize("name", tiny.some_of(["fine_tuning", "ewc", "lwf", "derpp", "icarl", "bic", "gpm"], "icarl"))
def test_new_images_of_known_classes(tmp_path, name):
    together = beginning(tmp_path / "together", name)
    for classes, data in AGAIN:
        together.learn(task(classes, data))
    assert together.stream.tasks[2].new_classes == () and together.stream.num_classes == 4
    run = tmp_path / "run-1"
    beginning(run, name).learn(task(*AGAIN[0]))
    for number, (classes, data) in enumerate(AGAIN[1:], 2):
        going_on(run, tmp_path / f"run-{number}").learn(task(classes, data))
        run = tmp_path / f"run-{number}"
    assert same(tmp_path / "together" / "task-3", run / "task-3")
    if name in ("icarl", "bic"):
        kept = together.method.memory.kept
        assert list(kept) == [0, 1, 2, 3]
        quota = together.method.config.quota(4)
        assert {label: len(rows) for label, rows in kept.items()} == dict.fromkeys(kept, quota)
        assert {task for task, _, _ in kept[2].tolist()} == {0}  # nothing new came of it
        for label, rows in kept.items():
            assert all(together.stream.train(t).labels[i] == label for t, i, _ in rows.tolist())
            assert rows[:, 2].tolist() == [1200] * len(rows)


@pytest.mark.parametrize("name", ["icarl", "bic"])
def test_which_classes_are_new_ones(tmp_path, name):
    """Classes with new images learn the labels, and only the others what the teacher says."""
    own = beginning(tmp_path, name)
    own.learn(task(*AGAIN[0]))
    found, loss = [], type(own.method).loss

    def watch(context, batch, output, losses):
        found.append(own.method.older_classes(context))
        return loss(own.method, context, batch, output, losses)

    own.method.loss = watch
    own.learn(task(*AGAIN[1]))
    assert found and all(classes == [label for label in own.stream.seen_classes(0) if label != 1] for classes in found)
    if name == "bic":
        assert sorted(own.method.bias.classes) == [1, 3]
        labels = torch.tensor([label for _, label in own.method.validation]).bincount()
        assert len(labels) == 4 and len(set(labels.tolist())) == 1


def test_new_images_join_an_expert_with_new_classes(tmp_path):
    own = beginning(tmp_path, "der_mcg", "last:1")
    own.learn(task(*AGAIN[0]))
    own.learn(task(*AGAIN[1]))
    assert own.method.tasks == [[0, 1, 2], [3]] and len(own.method.gate.centroids) == 2
    assert {t for t, _, _ in own.method.memory.kept[1].tolist()} <= {0, 1}
    with pytest.raises(ValueError, match="task 3 has new images of known classes alone: bring new classes along"):
        own.learn(task(*AGAIN[2]))
    assert own.stream.num_tasks == 2 and not own.progress.interrupted
    own.learn(task([4]))


def test_exemplars_of_two_tasks(tmp_path):
    """Those that a class had and its new images are chosen among together."""
    own = beginning(tmp_path, method("icarl", "places", memory_size=None, memory_per_class=8))
    own.learn(task([0, 1]))
    before = own.method.memory.kept[1].clone()
    own.learn(task([1], MORE))
    after = own.method.memory.kept[1]
    assert len(before) == len(after) == 8 and {t for t, _, _ in after.tolist()} == {0, 1}
    features = own._passes().observe([*before[:, :2].tolist(), *([1, i] for i in range(8))]).features
    places = torch.cat([before[:, :2], torch.tensor([[1, i] for i in range(8)])])
    assert after[:, :2].tolist() == places[herd(features, 8)].tolist()


# ---- tasks of one class, scenarios -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", tiny.some_of(["ewc", "lwf", "derpp", "icarl", "bic", "der_mcg", "gpm"], "lwf", "icarl", "bic", "der_mcg")
)
@pytest.mark.parametrize("scenario", tiny.some_of(["class_incremental", "task_incremental"], "class_incremental"))
def test_one_class_after_another(tmp_path, name, scenario):
    made = method(name)
    if scenario not in made.scenarios:
        pytest.skip("not defined")
    own = beginning(tmp_path, made, "last:1", scenario)
    for label in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = copy.deepcopy(own.stream_model.trainable())
            own.learn(task([label]))
        said = [str(one.message) for one in caught]
        assert any("has a single class" in one for one in said) == (label == 0)
        assert any("LwF holds nothing" in one for one in said) == (
            name == "lwf" and label > 0 and (label == 1 or scenario == "task_incremental")
        )
        after = own.stream_model.trainable()
        moved = any(not torch.equal(before[name], after[name][: len(before[name])]) for name in before)
        assert moved or label == 0
    assert own.results.matrix[-1] == [100.0] * 3 or scenario == "class_incremental"


# ---- what has grown --------------------------------------------------------------------------------------------------


def test_scores_are_compared_over_the_classes_that_they_had(tmp_path, tasks):
    own = beginning(tmp_path, method("derpp", memory_size=40, alpha=1.0, beta=0.0))
    own.learn(tasks[0])
    then = own.method.memory.examples.logits
    own.learn(tasks[1])
    memory = own.method.memory.examples
    first = memory.places[:, 0] == 0
    assert memory.logits.shape == (32, 4) and first.sum() == 24
    assert torch.equal(memory.logits[first, :3], then) and memory.logits[first, 3].isnan().all()
    assert not memory.logits[~first].isnan().any()
    stored = load_file(tmp_path / "method.safetensors")
    assert stored["classes"].tolist() == [3] * 24 + [4] * 8 and not stored["logits"].isnan().any()
    again = going_on(tmp_path, tmp_path.parent / "on").method.memory.examples
    assert torch.equal(again.logits.nan_to_num(-7), memory.logits.nan_to_num(-7))


def test_a_class_without_a_score_then_costs_nothing():
    z, h = torch.tensor([[1.0, 3.0, 9.0]], requires_grad=True), torch.tensor([[0.0, 1.0, float("nan")]])
    loss = dark_experience(z, h, z, torch.tensor([0]), 1.0, 0.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx((1 + 4) / 2) and z.grad.tolist() == [[1.0, 2.0, 0.0]]


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_a_penalty_leaves_new_numbers_free(tmp_path, tasks, mode):
    own = beginning(tmp_path, method("ewc", mode=mode), "dualprompt")
    for images in tasks:
        own.learn(images)
    terms = own.method.terms
    assert len(terms) == (1 if mode == "online" else 3)
    name, entries = next((name, tensor) for name, tensor in terms[-1].fisher.items() if "expert" in name)
    assert len(entries) == len(own.stream_model.trainable()[name]) >= 3
    fresh = Quadratic({"w": torch.ones(2, 1)}, {"w": torch.zeros(2, 1)}).to({"w": torch.zeros(3, 2)})
    assert fresh.fisher["w"].tolist() == [[1, 0], [1, 0], [0, 0]] and fresh({"w": torch.ones(3, 2)}).item() == 1.0


# ---- streams known in advance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.some_of(["derpp", "icarl", "bic", "ewc"], "bic"))
def test_after_a_stream_that_was_known(tmp_path, tasks, name):
    known = TaskStream.from_dataset(task([0, 1, 2, 3]), tasks=[["class 0", "class 1"], ["class 2", "class 3"]])
    whole = {"model": tiny.plain("full", tiny.backbone(num_labels=4)), **ARGUMENTS}
    own = tiny.trainer(tmp_path / "run", method=method(name), stream=known, **whole)
    own.train()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    own.learn(tasks[2])
    going_on(tmp_path / "copy", tmp_path / "on").learn(tasks[2])
    assert same(tmp_path / "run" / "task-3", tmp_path / "on" / "task-3")


@pytest.mark.parametrize("name", tiny.some_of([*STORES, "ewc", "lwf", "null_space_adam"], "icarl", "der_mcg"))
def test_from_the_middle_of_a_stream_that_was_known(tmp_path, name):
    """Classes whose tasks were still to come keep their places in the head; the second task is then the same."""
    known = TaskStream.from_dataset(DATA, tasks=[[0, 1], [2, 3], [4, 5]])
    tiny.trainer(tmp_path / "run", method=method(name), stream=known, model=tiny.plain("last:1"), **ARGUMENTS).train()
    following = going_on(tmp_path / "run" / "task-1", tmp_path / "on")
    assert len(following.stream_model.class_names) == 6
    assert following.learn(task([2, 3])).new_classes == tuple(known.tasks[1].classes)
    assert same(tmp_path / "on" / "task-2", tmp_path / "run" / "task-2")


@pytest.mark.parametrize("name", tiny.some_of(["icarl", "bic", "der_mcg"], "bic", "der_mcg"))
def test_predictions_of_a_grown_run(tmp_path, tasks, name):
    own = beginning(tmp_path, name, "last:1")
    for images in tasks[:2]:
        own.learn(images)
    pixels = [item["image"] for item in DATA["test"]]
    now = load_pretrained(tmp_path).predict(pixels, top_k=4)
    own.learn(tasks[2])
    assert load_pretrained(tmp_path / "task-2").predict(pixels, top_k=4) == now
    assert len(now[0]) == 4 and len(load_pretrained(tmp_path).predict(pixels, top_k=6)[0]) == 6
    found = [named[0]["label"] for named in load_pretrained(tmp_path).predict(tasks[2]["test"]["image"])]
    names = [DATA["test"].features["label"].int2str(label) for label in tasks[2]["test"]["label"]]
    right = sum(a == b for a, b in zip(found, names, strict=True))
    assert own.results.matrix[-1][-1] == pytest.approx(100 * right / len(names))


@pytest.mark.parametrize("model", ["lora:2", "last:1"])
def test_drift_is_measured_without_the_features_of_that_time(tmp_path, tasks, model):
    own = beginning(tmp_path / "run", "fine_tuning", model)
    for images in tasks[:2]:
        own.learn(images)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "features")
    own.learn(tasks[2])
    args = PGPTrainingArguments(str(tmp_path / "on"), **ARGUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        following = StreamTrainer.from_pretrained(tmp_path / "copy", args=args, test_dataset=DATA["test"])
    following.learn(tasks[2])
    assert following.results.drift == pytest.approx(own.results.drift, rel=1e-4) and own.results.drift[-1] > 0
    assert following.results.matrix == own.results.matrix


# ---- images that are not here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.some_of(STORES, "derpp", "icarl"))
def test_the_labels_of_stored_images(tmp_path, tasks, name):
    own = beginning(tmp_path / "run", name, "last:1")
    own.learn(tasks[0])
    stored = load_file(tmp_path / "run" / "exemplars.safetensors")
    labels = {f"{t + 1}/{i}": label for t, i, label in stored.pop("labels").tolist()}
    assert labels == {key: own.stream.train(0).labels[int(key[2:])] for key in stored}
    following = going_on(tmp_path / "run", tmp_path / "on")
    images = following._passes().images_of(0)
    assert len(images) == 24 and {images[int(key[2:])]["label"] for key in labels} == set(labels.values())


@pytest.mark.parametrize("name", tiny.some_of(STORES, "derpp", "icarl"))
def test_places_alone_are_refused_before_training(tmp_path, tasks, name):
    own = beginning(tmp_path / "run", method(name, "places"), "last:1")
    own.learn(tasks[0])
    own.learn(tasks[1])  # in one process the images are there
    following = going_on(tmp_path / "run", tmp_path / "on")
    with pytest.raises(
        ValueError, match="trains on images of task 1 again, which are not here.*memory_stores='images'"
    ):
        following.learn(tasks[2])
    assert following.stream.num_tasks == 2 and not any((tmp_path / "on").iterdir())


def test_images_of_an_earlier_version_have_no_labels(tmp_path, tasks):
    """They go on where the data set is."""
    own = beginning(tmp_path / "run", "derpp")
    own.learn(tasks[0])
    folder = tmp_path / "run" / "task-1"
    stored = load_file(folder / "exemplars.safetensors")
    del stored["labels"]
    save_file(stored, folder / "exemplars.safetensors")
    results = json.loads((folder / "results.json").read_text())
    del results["sha256"]["exemplars.safetensors"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "digests.json").unlink()
    following = going_on(folder, tmp_path / "on")
    with pytest.raises(ValueError, match="stored images of task 1 are of a version that did not keep their labels"):
        following.learn(tasks[1])
    again = beginning(tmp_path / "again", "derpp")
    again.stream.append(tasks[0])
    again.train(resume_from_checkpoint=str(folder))
    again.learn(tasks[1])
    own.learn(tasks[1])
    assert same(tmp_path / "again" / "task-2", tmp_path / "run" / "task-2")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3), r"'labels' is torch.float32 \(2, 3\): expected int64 \(images, 3\)"),
        (torch.zeros(24, 3, dtype=torch.int64), "'labels' has 24 rows, which are not those of the 7 images"),
        (5, "it has images of class 5 in task 1, which lacks it"),
        (-1, "'labels' holds -1: label ids count from 0"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, tasks, labels, message):
    own = beginning(tmp_path / "run", "derpp")
    own.learn(tasks[0])
    folder = tmp_path / "run" / "task-1"
    stored = load_file(folder / "exemplars.safetensors")
    if isinstance(labels, int):
        stored["labels"][:, 2] = labels
    else:
        stored["labels"] = labels
    save_file(stored, folder / "exemplars.safetensors")
    results = json.loads((folder / "results.json").read_text())
    del results["sha256"]["exemplars.safetensors"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "digests.json").unlink()
    with pytest.raises(ValueError, match=message):
        going_on(folder, tmp_path / "on")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            method("icarl", memory_size=3),
            "memory_size=3 leaves no exemplar for some of the 4 classes: set it to at least 4",
        ),
        (
            method("bic", memory_size=9),
            "is less than one image to correct the bias with: set memory_size to at least 12",
        ),
    ],
)
@pytest.mark.parametrize("process", ["the same", "a new one"])
def test_no_room_for_more_classes(tmp_path, tasks, made, message, process):
    own = beginning(tmp_path / "run", type(made)(made.config))
    own.learn(tasks[0])
    if process == "a new one":
        own = going_on(tmp_path / "run", tmp_path / "on")
    weights = copy.deepcopy(own.stream_model.trainable())
    with pytest.raises(ValueError, match=message):
        own.learn(tasks[1])
    assert own.stream.num_tasks == 1 and not own.progress.interrupted
    assert process == "the same" or not any((tmp_path / "on").iterdir())
    now = own.stream_model.trainable()
    assert all(torch.equal(weights[name], now[name]) for name in weights)


def test_all_tasks_as_one(tmp_path, tasks):
    with pytest.raises(ValueError, match="a stream without an end cannot be learned as one task"):
        beginning(tmp_path / "empty", "joint")
    own = tiny.trainer(tmp_path / "run", method=method("joint"), model=tiny.plain("head"), num_train_epochs=1)
    own.train()
    with pytest.raises(ValueError, match="a method that learns all tasks as one cannot learn on"):
        own.learn(tasks[2])


def test_a_stream_without_a_task(tmp_path, tasks):
    own = beginning(tmp_path, "ewc")
    with pytest.raises(ValueError, match="the stream has no task yet: learn"):
        own.train()
    assert own.learn(tasks[0]).index == 0
