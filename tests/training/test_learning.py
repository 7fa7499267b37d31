"""Learning on: classes that nobody foresaw, in one process, in several, interrupted, and with bad input."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import tokens
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import CLIPModel, TrainerCallback, ViTForImageClassification, ViTModel

from pgp_hf import PGPTrainer, ProjectionConfig, StreamTrainer, TaskStream, load_pretrained
from pgp_hf.training.learning import with_origin

pytestmark = pytest.mark.usefixtures("without_figures")

PARTS = ((0, 1), (2, 3), (4, 5))
DATA = tiny.data()
TENSORS = ("adapter_model.safetensors", "projection.safetensors")
CASES = {
    "l2p": ("l2p", "functional", "statistics"),
    "l2p, linear": ("l2p", "pgp", "linear"),
    "dualprompt": ("dualprompt", "functional", "statistics"),
    "dualprompt, linear": ("dualprompt", "attention", "linear"),
}


def part(*classes: int, data: datasets.DatasetDict = DATA) -> datasets.DatasetDict:
    """Return the images of some classes."""
    return datasets.DatasetDict(
        {split: rows.filter(lambda label: label in classes, input_columns="label") for split, rows in data.items()}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone without any head, in a folder."""
    folder = tmp_path_factory.mktemp("base") / "backbone"
    tiny.backbone("backbone").save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def fresh(base: Path, folder: Path, case: str = "l2p", **settings: Any) -> PGPTrainer:
    """Return a trainer that knows no class."""
    adapter, projection, head = CASES[case]
    with tiny.seeded(5):
        model = get_peft_model(ViTModel.from_pretrained(base), tiny.config(adapter, head=head, pool_size=2))
    return PGPTrainer(
        model,
        tiny.arguments(folder, **settings),
        TaskStream.empty(seed=0),
        projection=ProjectionConfig(method=projection, energy=0.9),
        processing_class=tiny.processor(),
    )


def again(run: Path, folder: Path, **settings: Any) -> PGPTrainer:
    """Return the trainer of a run, which knows its old test images."""
    return PGPTrainer.from_pretrained(run, args=tiny.arguments(folder), test_dataset=DATA["test"], **settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}:{name}": value for file in TENSORS for name, value in load_file(folder / file).items()}


def assert_same(a: Path, b: Path, tasks: int = 3, results: bool = True) -> None:
    """Assert that all revisions of two runs hold the same, to the bit."""
    for t in range(1, tasks + 1):
        ours, theirs = tensors(a / f"task-{t}"), tensors(b / f"task-{t}")
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert (a / f"task-{t}/stream.json").read_text() == (b / f"task-{t}/stream.json").read_text()
        if results:
            one, two = (json.loads((run / f"task-{t}/results.json").read_text()) for run in (a, b))
            two.pop("continues", None)
            assert tiny.same_results(one, two)


@pytest.fixture(scope="module", params=tiny.some_of(CASES, "dualprompt"))
def straight(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Three surprises, learned by one trainer."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with tiny.without_figures():
        trainer = fresh(base, folder, request.param)
        for classes in PARTS:
            trainer.learn(part(*classes))
    return request.param, folder


def test_one_trainer_or_three(straight: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    case, run = straight
    fresh(base, tmp_path / "1", case).learn(part(0, 1))
    again(tmp_path / "1", tmp_path / "2").learn(part(2, 3))
    third = again(tmp_path / "2", tmp_path / "3")
    task = third.learn(part(4, 5))
    assert (task.index, task.classes, task.new_classes) == (2, (4, 5), (4, 5))
    assert_same(run, tmp_path / "3")
    # every earlier revision loads from the last folder, and knows its own classes alone
    for t, known in enumerate((2, 4, 6), 1):
        loaded = load_pretrained(tmp_path / "3", f"task-{t}")
        assert len(loaded.predict(DATA["test"][0]["image"], top_k=9)[0]) == known


def test_in_the_folder_of_the_run(straight: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    case, run = straight
    for classes in PARTS:
        first = classes == PARTS[0]
        trainer = fresh(base, tmp_path / "run", case) if first else again(tmp_path / "run", tmp_path / "run")
        trainer.learn(part(*classes))
    assert_same(run, tmp_path / "run")
    assert "continues" not in json.loads((tmp_path / "run/results.json").read_text())


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 6])  # before the first checkpoint, and after it
def test_killed_in_the_third_and_resumed(straight: tuple[str, Path], base: Path, tmp_path: Path, step: int) -> None:
    case, run = straight
    source = tmp_path / "source"
    shutil.copytree(run, source)
    for name in ("task-3", "features/task-3.safetensors"):
        path = source / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = tmp_path / "run"
    trainer = again(source, folder)
    trainer.add_callback(Stop(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.learn(part(4, 5))
    with pytest.raises(ValueError, match="holds an earlier run"):
        again(source, folder).learn(part(4, 5))
    if step == 6:
        with pytest.raises(ValueError, match="this stream is not the one"):
            again(source, folder).learn(part(2, 5), resume_from_checkpoint=True)
    again(source, folder).learn(part(4, 5), resume_from_checkpoint=True)
    assert_same(run, folder)
    # once more: the task is there, and nothing is trained
    before = (folder / "task-3/adapter_model.safetensors").stat().st_mtime_ns
    trainer = again(source, folder)
    assert trainer.learn(part(4, 5), resume_from_checkpoint=True).index == 2
    assert len(trainer.results.matrix) == 3 and not trainer.stream.num_tasks > 3
    assert (folder / "task-3/adapter_model.safetensors").stat().st_mtime_ns == before
    # and from nothing, by the same lines
    trainer = fresh(base, folder, case)
    for classes in PARTS:
        trainer.learn(part(*classes), resume_from_checkpoint=True)
    ours, theirs = (
        {**found, "continues": None, "sha256": None} for found in (trainer.results.to_dict(), _results(run))
    )
    assert {name for name in ours if not tiny.same_results({name: ours[name]}, {name: theirs[name]})} == set()


def _results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_a_stream_that_was_appended_is_trained_and_resumed_as_a_whole(
    straight: tuple[str, Path], base: Path, tmp_path: Path
) -> None:
    case, run = straight

    def trainer() -> PGPTrainer:
        made = fresh(base, tmp_path / "run", case)
        for classes in PARTS:
            made.stream.append(part(*classes))
        return made

    stopped = trainer()
    stopped.add_callback(StopInTask(2, 5))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    trainer().train(resume_from_checkpoint=True)
    assert_same(run, tmp_path / "run")


def test_a_model_that_has_grown_does_not_begin_its_task_again(tmp_path: Path) -> None:
    """Its new classes have learned already, and no checkpoint says how they were: the run goes on with a new one."""

    trainer = tiny.trainer(tmp_path, stream=TaskStream.empty(seed=0), save_strategy="no", max_steps=2)
    for classes in PARTS[:2]:
        trainer.stream.append(part(*classes))
    trainer.add_callback(StopInTask(1, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(
        ValueError, match="model has grown for task 2.*no checkpoint of it: make a new model and a new t"
    ):
        trainer.train(resume_from_checkpoint=True)


class StopInTask(Stop):
    def __init__(self, task: int, step: int) -> None:
        super().__init__(step)
        self.task, self.now = task, 0

    def on_task_begin(self, *args: Any, task: int, **kwargs: Any) -> None:
        self.now = task

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.now == self.task:
            super().on_step_end(*args, **kwargs)


def test_without_old_test_images(straight: tuple[str, Path], tmp_path: Path) -> None:
    case, run = straight
    trainer = PGPTrainer.from_pretrained(run, "task-2", tiny.arguments(tmp_path / "run"))
    trainer.learn(part(4, 5))
    assert_same(run, tmp_path / "run", results=False)
    results = json.loads((tmp_path / "run/results.json").read_text())
    row = results["accuracy_matrix"][2]
    assert row[:2] == [None, None] and row[2] is not None
    assert results["average_accuracy"] is None and results["drift"][2] is None
    assert results["continues"] == {"repo": None, "revision": "task-2", "commit": None, "tasks": 2}
    card = (tmp_path / "run/README.md").read_text()
    assert "not measured" in card and "task-2" in card
    # old features are kept for whoever brings the images later
    assert (tmp_path / "run/features/task-1.safetensors").is_file()
    assert again(tmp_path / "run", tmp_path / "more").evaluate_stream()["accuracy_matrix"][2][0] is not None


def test_a_backbone_that_is_passed_stays_as_it_was_if_a_check_fails(
    straight: tuple[str, Path], base: Path, tmp_path: Path
) -> None:
    _, run = straight
    backbone = ViTModel.from_pretrained(base)
    given = {"args": tiny.arguments(tmp_path / "run"), "backbone": backbone}
    modules = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError):
        PGPTrainer.from_pretrained(run, test_dataset=part(7), dtype="bfloat16", **given)
    with pytest.raises(ValueError, match=r"^dtype='int8' is not a precision of weights: use torch\.float32"):
        PGPTrainer.from_pretrained(run, dtype="int8", **given)
    assert backbone.dtype == torch.float32 and modules == [name for name, _ in backbone.named_modules()]


def test_at_the_moment_of_growth_nothing_known_changes(straight: tuple[str, Path], tmp_path: Path) -> None:
    _, run = straight
    trainer = PGPTrainer.from_pretrained(run, "task-2", tiny.arguments(tmp_path / "run"))
    model, learner = trainer.model.eval(), trainer.stream_model
    pixels = tiny.images(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits.clone()
    learner.add_classes(["class 4", "class 5", "another"], seed=3)
    learner.add_task(2, [4, 5], seed=3)
    with torch.no_grad():
        grown = model(pixel_values=pixels).logits
    known = torch.isfinite(logits)
    assert (grown[:, :4][known] - logits[known]).abs().max() <= 1e-6 * logits[known].abs().max()
    assert torch.equal(grown[:, :4].argmax(-1), logits.argmax(-1))
    for name, value in model.state_dict().items():
        if name in before and value.ndim:
            old = value[tuple(slice(length) for length in before[name].shape)]
            assert torch.equal(old, before[name]), name


@pytest.mark.parametrize("labels", tiny.some_of([0, 2, 9], 2))
def test_any_head_is_replaced_by_one_that_grows(labels: int, base: Path, tmp_path: Path) -> None:
    runs = []
    for name, backbone in (
        ("none", ViTModel.from_pretrained(base)),
        ("some", ViTForImageClassification.from_pretrained(base, num_labels=labels)),
    ):
        with tiny.seeded(5):
            model = get_peft_model(backbone, tiny.config("l2p"))
        with tiny.seeded(5):  # whatever the head has drawn
            for prompt in model.base_model.prompt_parameters().values():
                torch.nn.init.uniform_(prompt)
        stream = TaskStream.empty(seed=0)
        trainer = PGPTrainer(model, tiny.arguments(tmp_path / name), stream, processing_class=tiny.processor())
        trainer.learn(part(0, 1))
        trainer.learn(part(2))
        assert trainer.model.get_base_model().classifier.weight.shape == (3, 24)
        runs.append(tmp_path / name)
    assert_same(*runs, tasks=2)


@pytest.mark.parametrize("what", tiny.some_of(["full", "head", "lora:2"], "lora:2"))
def test_a_model_without_prompts(what: str, base: Path, tmp_path: Path) -> None:
    model = tiny.plain(what, ViTForImageClassification.from_pretrained(base, num_labels=0))
    trainer = StreamTrainer(
        model, tiny.arguments(tmp_path / "run"), TaskStream.empty(), processing_class=tiny.processor()
    )
    trainer.learn(part(0, 1))
    again = StreamTrainer.from_pretrained(tmp_path / "run", args=tiny.arguments(tmp_path / "more"))
    assert again.stream_model.name == what
    again.learn(part(2, 3))
    trainer.learn(part(2, 3))
    ours, theirs = trainer.stream_model.trainable(), again.stream_model.trainable()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_pretrained(tmp_path / "more").classes == [0, 1, 2, 3]


@pytest.mark.parametrize("head", tiny.some_of(["linear", "statistics"], "statistics"))
def test_clip(head: str, tmp_path: Path) -> None:
    tiny.backbone("clip").save_pretrained(tmp_path / "clip")

    def named(trainer: PGPTrainer) -> PGPTrainer:
        trainer.tuner.tokenizer = tokens.tokenizer
        return trainer

    with tiny.seeded(5):
        config = tiny.config("clip", head=head, pool_size=2, class_tokens=None, id2label=None)
        model = get_peft_model(CLIPModel.from_pretrained(tmp_path / "clip"), config)
    trainer = named(
        PGPTrainer(model, tiny.arguments(tmp_path / "1"), TaskStream.empty(seed=0), processing_class=tiny.processor())
    )
    for classes in PARTS:
        trainer.learn(part(*classes))
    loaded = PGPTrainer.from_pretrained(tmp_path / "1", "task-1", tiny.arguments(tmp_path / "2"), DATA["test"])
    named(loaded).learn(part(2, 3))
    named(again(tmp_path / "2", tmp_path / "3")).learn(part(4, 5))
    assert_same(tmp_path / "1", tmp_path / "3")
    assert load_pretrained(tmp_path / "3").classes == [0, 1, 2, 3, 4, 5]


# ---- streams and datasets of all kinds -------------------------------------------------------------------------------


def test_known_classes_come_again(base: Path, tmp_path: Path) -> None:
    trainer = fresh(base, tmp_path / "run")
    trainer.learn(part(0, 1, 2))
    counts = trainer.tuner.statistics.counts.clone()
    task = trainer.learn(part(1, 3, data=tiny.data(seed=1)))
    assert (task.classes, task.new_classes) == ((1, 3), (3,))
    assert trainer.tuner.statistics.counts.tolist() == [*(counts + torch.tensor([0, 8, 0])).tolist(), 8]
    task = trainer.learn(part(0, data=tiny.data(seed=2)))  # a single known class
    assert (task.classes, task.new_classes) == ((0,), ())
    assert load_pretrained(tmp_path / "run").classes == [0, 1, 2, 3]


@pytest.mark.parametrize("case", ["l2p, linear", "dualprompt, linear"])
def test_a_single_class_learns_something(base: Path, tmp_path: Path, case: str) -> None:
    trainer = fresh(base, tmp_path / "run", case)
    trainer.learn(part(0, 1))
    untrained = PGPTrainer.from_pretrained(tmp_path / "run", args=tiny.arguments(tmp_path / "other"))
    untrained.stream_model.add_classes(["class 2"], seed=3)
    trainer.learn(part(2))
    now, then = (each.model.get_base_model().classifier.weight for each in (trainer, untrained))
    assert now.shape == then.shape == (3, 24)
    assert (now - then).abs().amax(-1).min() > 1e-3  # of every class, since all of them compete


def test_a_first_task_of_one_class_says_what_it_lacks(base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="single class.*statistics"):
        fresh(base, tmp_path / "linear", "l2p, linear").learn(part(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single class")
        fresh(base, tmp_path / "statistics").learn(part(0))


def test_a_folder_of_photos(base: Path, tmp_path: Path) -> None:
    for row in range(8):
        for label, name in enumerate(("tabby cat", "dog")):
            path = tmp_path / "photos/train" / name / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(2 * row + label).integers(0, 99 + 150 * label, (20, 20, 3), dtype=np.uint8)
            tiny.Image.fromarray(noise).save(path)
    trainer = fresh(base, tmp_path / "run")
    trainer.learn(part(0, 1))
    task = trainer.learn(str(tmp_path / "photos"))
    assert [trainer.stream.label_names[label] for label in task.new_classes] == ["dog", "tabby cat"]
    assert trainer.results.matrix[1][1] is not None  # on images that were held out


@pytest.mark.parametrize("where", tiny.some_of(["task folder", "copy", "older task"], "copy", "older task"))
def test_any_revision(where: str, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "known"
    known = tiny.model(
        tiny.config("l2p", head="statistics"), ViTForImageClassification.from_pretrained(base, num_labels=6)
    )
    tiny.trainer(run, model=known, num_train_epochs=1).train()  # three tasks that were known in advance
    source: tuple[Any, ...] = (run / "task-3",)
    if where == "copy":
        shutil.copytree(run / "task-3", tmp_path / "copy")
        source = (tmp_path / "copy",)
    elif where == "older task":
        source = (run, "task-1")
    trainer = PGPTrainer.from_pretrained(*source, args=tiny.arguments(tmp_path / "run"), backbone=str(base))
    learned = len(trainer.results.matrix)
    assert learned == (1 if where == "older task" else 3)
    new = datasets.DatasetDict(
        {
            split: rows.cast_column("label", datasets.ClassLabel(names=[*tiny_names(2), "a new one"]))
            for split, rows in tiny.data(classes=3, seed=4).items()
        }
    )
    unknown = [
        name for name in tiny_names(2) if trainer.stream.label_names.index(name) not in trainer.stream.class_order
    ]
    task = trainer.learn(new)
    names = [trainer.stream.label_names[label] for label in task.new_classes]
    assert names == [*unknown, "a new one"] and task.new_classes[-1] == 6
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["num_tasks"] == results["finished_tasks"] == learned + 1
    loaded = load_pretrained(tmp_path / "run", backbone=str(base))
    assert sorted(loaded.classes) == sorted(trainer.stream.class_order)
    assert (tmp_path / "run" / f"task-{learned + 1}").is_dir()
    assert (tmp_path / "run/task-1").is_dir() == (where != "copy")


def tiny_names(count: int) -> list[str]:
    return [f"class {c}" for c in range(count)]


def test_the_trainer_of_a_classifier(straight: tuple[str, Path], tmp_path: Path) -> None:
    case, run = straight
    classifier = load_pretrained(run, "task-2")
    image = DATA["test"][0]["image"]
    before = classifier.predict(image, top_k=9)
    trainer = classifier.trainer(tiny.arguments(tmp_path / "run"), test_dataset=DATA["test"])
    assert isinstance(trainer, PGPTrainer)
    trainer.learn(part(4, 5))
    assert_same(run, tmp_path / "run")
    assert classifier.predict(image, top_k=9) == before


def test_the_settings_that_differ_are_printed(
    straight: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = straight
    PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run"))
    assert "differ" not in capsys.readouterr().out
    PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run", learning_rate=0.5, num_train_epochs=7))
    out = capsys.readouterr().out
    assert "learning_rate: 0.5, was 0.01" in out and "num_train_epochs: 7, was 2" in out and "seed" not in out


def test_online(base: Path, tmp_path: Path) -> None:
    adapter = tiny.config("l2p", head="statistics")
    model = get_peft_model(ViTModel.from_pretrained(base), adapter)
    stream = TaskStream.empty(scenario="online")
    trainer = PGPTrainer(model, tiny.arguments(tmp_path / "run"), stream, processing_class=tiny.processor())
    trainer.learn(part(0, 1))
    assert (
        PGPTrainer.from_pretrained(tmp_path / "run", args=tiny.arguments(tmp_path / "more")).args.num_train_epochs == 1
    )


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_before_the_first_task(base: Path, tmp_path: Path) -> None:
    trainer = fresh(base, tmp_path / "run")
    images = TaskStream.from_dataset(DATA, num_tasks=1).test(0)
    for call in (lambda: trainer.predict(images), trainer.evaluate_stream, trainer.train):
        with pytest.raises(ValueError, match="no class yet|no task has been|no task yet"):
            call()


def state(trainer: StreamTrainer) -> Any:
    return trainer.stream.manifest(), {name: value.clone() for name, value in trainer.model.state_dict().items()}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_dataset_changes_nothing(straight: tuple[str, Path], tmp_path: Path) -> None:
    _, run = straight
    files = listing(run)
    trainer = PGPTrainer.from_pretrained(run, "task-2", tiny.arguments(tmp_path / "run"))
    manifest, weights = state(trainer)
    broken = part(4, 5)
    broken["train"] = (
        broken["train"]
        .cast_column("image", datasets.Image(decode=False))
        .map(lambda row: {"image": {"bytes": b"no image", "path": None}})
        .cast_column("image", datasets.Image())
    )
    empty = datasets.DatasetDict(train=DATA["train"].select([]), test=DATA["test"])
    numbers = part(4, 5).cast_column("label", datasets.Value("int64"))
    for dataset, message in (
        (empty, "no rows"),
        (broken, "are broken"),
        (numbers, "label_names"),
        (str(tmp_path / "nowhere"), "neither an existing folder"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.learn(dataset)
        now = state(trainer)
        assert now[0] == manifest and now[1].keys() == weights.keys()
        assert all(torch.equal(now[1][name], weights[name]) for name in weights)
        assert not (tmp_path / "run").exists() or not listing(tmp_path / "run")
    assert listing(run) == files
    trainer.learn(part(4, 5))  # nothing stands in the way
    assert_same(run, tmp_path / "run", results=False)


def test_a_full_disk_while_the_run_is_copied(
    straight: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = straight
    files = listing(run)
    trainer = PGPTrainer.from_pretrained(run, "task-2", tiny.arguments(tmp_path / "run"))
    copied: list[Any] = []
    copy = shutil.copyfile

    def full(source: Any, target: Any, **kwargs: Any) -> Any:
        copied.append(source)
        if len(copied) > 12:
            raise OSError(28, "No space left on device")
        return copy(source, target, **kwargs)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.learn(part(4, 5))
    monkeypatch.undo()
    assert listing(run) == files and not listing(tmp_path / "run")
    trainer.learn(part(4, 5))
    assert_same(run, tmp_path / "run", results=False)


def test_what_does_not_belong_together(straight: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    _, run = straight
    other = tiny.backbone("backbone", seed=8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="digest"):
        PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run"), backbone=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="size.*was trained with"):
        larger = tiny.ViTImageProcessorPil(size={"height": 30, "width": 30})
        PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run"), processing_class=larger)
    with pytest.raises(ValueError, match="test images"):
        PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run"), test_dataset=tiny.data(seed=5)["test"])
    with pytest.raises(TypeError, match="args are missing"):
        PGPTrainer.from_pretrained(run)
    with pytest.raises(ValueError, match="no finished task"):
        (tmp_path / "empty").mkdir()
        PGPTrainer.from_pretrained(tmp_path / "empty", args=tiny.arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match="later|holds 3 tasks"):  # task 3 would be trained over
        shutil.copytree(run, tmp_path / "whole")
        PGPTrainer.from_pretrained(tmp_path / "whole", "task-2", tiny.arguments(tmp_path / "whole")).learn(part(4, 5))
    assert_same(run, tmp_path / "whole")
    with pytest.raises(ValueError, match="reinit_optimizer"):
        PGPTrainer.from_pretrained(run, args=tiny.arguments(tmp_path / "run", reinit_optimizer=False)).learn(part(0))
    with pytest.raises(ValueError, match="holds an earlier run"):
        again(run, tmp_path / "whole").learn(part(0))


def test_tasks_of_the_stream_come_first(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", num_train_epochs=1)
    trainer.train_task(0)
    with pytest.raises(ValueError, match="2 tasks of the stream are not learned yet"):
        trainer.learn(part(0))
    trainer.train_task(1)
    trainer.train_task(2)
    assert trainer.learn(part(0, data=tiny.data(seed=3))).index == 3
    assert trainer.results.num_tasks == 4


def test_folders_that_a_run_went_through_are_not_nested_without_end() -> None:
    """A run may learn each task in a new folder; revisions on the Hub, where its tasks are, are all kept."""
    found = None
    for tasks in range(1, 1001):
        repo = {3: "me/one", 500: "me/two"}.get(tasks)
        origin = {"repo": repo, "revision": f"task-{tasks}", "commit": repo and "a" * 40, "tasks": tasks}
        found = with_origin(origin, found)
    chain = []
    while found:
        chain.append((found["repo"], found["tasks"]))
        found = found.get("continues")
    assert chain == [(None, 1000), ("me/two", 500), (None, 499), ("me/one", 3), (None, 2)]
