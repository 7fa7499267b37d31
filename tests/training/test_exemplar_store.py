"""Images that a run keeps of older tasks: the data set may lose its own, and no number changes."""

from __future__ import annotations

import functools
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pgp_hf import StreamCallback
from pgp_hf.data.stored import StoredImages, from_tensors, keep_images, to_tensors
from pgp_hf.methods import METHODS, ContinualMethod, create
from pgp_hf.methods.memory import MemoryConfig

pytestmark = pytest.mark.usefixtures("without_figures")
FILE = "exemplars.safetensors"
kinds = pytest.mark.parametrize("kind", tiny.some_of(["derpp", "icarl"], "icarl"))  # in one place alike


class Losing(StreamCallback):
    """Loses the training images of older tasks when a task begins."""

    def on_task_begin(self, args, state, control, task, stream, **kwargs):
        lose(stream, task)


def lose(stream, tasks):
    """Leave the rows of the first tasks' training images without an image."""
    parts = stream._parts["train"]  # all of one source
    source = parts[0].source
    gone, encoded = {row for part in parts[:tasks] for row in part.rows.tolist()}, source.encoded
    source.encoded = lambda asked: [
        None if row in gone else found for row, found in zip(asked, encoded(asked), strict=True)
    ]
    return stream


def trainer(folder, kind, stores="images", **settings):
    method = create(kind, memory_size=7 if kind == "derpp" else 13, memory_stores=stores)
    return tiny.trainer(folder, method=method, **settings)


def learned(folder, task):
    """What a task has left: the weights, what the method remembers, and the accuracies."""
    results = json.loads((folder / f"task-{task}" / "results.json").read_text())
    tensors = [
        load_file(folder / f"task-{task}" / name) for name in ("adapter_model.safetensors", "method.safetensors")
    ]
    return tensors, {name: results[name] for name in ("accuracy_matrix", "drift", "memory")}


def same(a, b):
    return a[1] == b[1] and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a[0], b[0], strict=True)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, without_figures):
    """Train, once for each kind, a run that reads its exemplars from the stream, and one that cannot."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(kind):
        trainer(folder / kind / "places", kind, "places").train()
        trainer(folder / kind / "images", kind, callbacks=[Losing()]).train()
        return folder

    return train


@pytest.fixture
def runs(trained, kind):
    return trained(kind)


@kinds
def test_no_number_changes_and_older_images_are_not_read(runs, kind):
    for task in (1, 2, 3):
        assert same(learned(runs / kind / "images", task), learned(runs / kind / "places", task))
    assert not list((runs / kind / "places").rglob(FILE))


@kinds
def test_what_is_kept(runs, kind):
    folder = runs / kind / "images"
    assert [(folder / f"task-{t}" / FILE).exists() for t in (1, 2, 3)] == [False, False, True]
    stored, stream = load_file(folder / FILE), tiny.stream()
    places = load_file(folder / "method.safetensors")["places"].tolist()
    labels = {(task, position): label for task, position, label in stored.pop("labels").tolist()}
    assert stored.keys() == {f"{task + 1}/{position}" for task, position in places} and len({t for t, _ in places}) > 1
    assert labels == {(task, position): stream.train(task).labels[position] for task, position in places}
    for name, pixels in stored.items():
        task, position = map(int, name.split("/"))
        image = stream.train(task - 1)[position]["image"]
        assert pixels.dtype == torch.uint8 and pixels.shape == (20, 20, 3)
        assert pixels.numpy().tobytes() == image.tobytes()
    assert FILE in json.loads((folder / "results.json").read_text())["sha256"]
    assert (
        "8-bit RGB (exemplars.safetensors), which is uploaded only if asked for" in (folder / "README.md").read_text()
    )


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == 1 and state.global_step == 6:  # two steps behind the checkpoint
            raise KeyboardInterrupt


@kinds
def test_resumed_within_a_task(runs, tmp_path, kind):
    stop = StopAt()
    stop.trainer = trainer(tmp_path, kind, callbacks=[stop], save_full_weights="all")
    with pytest.raises(KeyboardInterrupt):
        stop.trainer.train()
    again = trainer(tmp_path, kind, stream=lose(tiny.stream(), 1), callbacks=[Losing()], save_full_weights="all")
    again.train(resume_from_checkpoint=True)
    assert all(same(learned(tmp_path, task), learned(runs / kind / "places", task)) for task in (1, 2, 3))
    assert all((tmp_path / f"task-{task}" / FILE).exists() for task in (1, 2, 3))


@kinds
def test_resumed_from_a_finished_task_elsewhere(runs, tmp_path, kind):
    first = trainer(tmp_path / "first", kind)
    first.train_task(0)
    first.train_task(1)
    again = trainer(tmp_path / "on", kind, stream=lose(tiny.stream(), 2))
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "task-2"))
    assert same(learned(tmp_path / "on", 3), learned(runs / kind / "places", 3))
    stream_file = (runs / kind / "places" / "stream.json").read_text()
    assert json.loads((tmp_path / "on" / "stream.json").read_text())["tasks"] == json.loads(stream_file)["tasks"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def gone(folder):
    (folder / FILE).unlink()


def altered(folder):
    pixels = load_file(folder / FILE)
    save_file({name: 255 - image for name, image in pixels.items()}, folder / FILE)


def without_digest(folder):
    """Another run's images, and no digest that says so."""
    save_file({"1/0": torch.zeros(20, 20, 3, dtype=torch.uint8)}, folder / FILE)
    results = json.loads((folder / "results.json").read_text())
    del results["sha256"][FILE]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "digests.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, r"task-1 has no exemplars.safetensors, .* push --exemplars, hub_exemplars=True"),
        (altered, "exemplars.safetensors is not the file that the run wrote"),
        (without_digest, "does not fit the method's memory: it holds 1 images, and the method keeps 7"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    trainer(tmp_path, "derpp", num_train_epochs=1).train_task(0)
    change(tmp_path / "task-1")
    again = trainer(tmp_path, "derpp", num_train_epochs=1)
    with pytest.raises(ValueError, match=message):
        again.train(resume_from_checkpoint=True)
    assert not again.method.exemplars()  # nothing was taken over


def test_the_stream_is_still_compared(tmp_path):
    trainer(tmp_path, "derpp", num_train_epochs=1).train_task(0)
    other = lose(tiny.stream(dataset=tiny.data(seed=1)), 1)
    again = trainer(tmp_path, "derpp", num_train_epochs=1, stream=other)
    with pytest.raises(ValueError, match=r"test images of task 0 \(0-based\), sha256"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="the row has no image"):
        other.manifest()  # the hashes that were taken over are forgotten
    with pytest.raises(ValueError, match="memory_stores='images', this one 'places'"):
        trainer(tmp_path, "derpp", "places", num_train_epochs=1).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("tensors", "places", "message"),
    [
        ({}, [(0, 1)], "holds 0 images, and the method keeps 1: '1/1' is in one alone"),
        ({"1/1": (2, 2, 3), "../x": (2, 2, 3)}, [(0, 1)], r"'\.\./x' is in one alone"),
        ({"1/1": (2, 2)}, [(0, 1)], r"'1/1' is torch.uint8 \(2, 2\): expected uint8 \(height, width, 3\)"),
        ({"1/1": (0, 2, 3)}, [(0, 1)], "expected uint8"),
        ({"1/1": (2, 2, 4)}, [(0, 1)], "expected uint8"),
        ({"3/0": (2, 2, 3)}, [(2, 0)], "image 0 of task 3 does not exist in the 2 finished tasks"),
        ({"1/9": (2, 2, 3)}, [(0, 9)], "image 9 of task 1 does not exist"),
        ({"1/-1": (2, 2, 3)}, [(0, -1)], "image -1 of task 1 does not exist"),
    ],
)
def test_tensors_that_are_not_these_images(tensors, places, message):
    with pytest.raises(ValueError, match=message):
        from_tensors({name: torch.zeros(size, dtype=torch.uint8) for name, size in tensors.items()}, places, [4, 4])
    with pytest.raises(ValueError, match="float32"):
        from_tensors({"1/1": torch.zeros(2, 2, 3)}, [(0, 1)], [4])


def test_there_and_back():
    stream, places = tiny.stream(), [[1, 3], [0, 5], [1, 3]]
    stored = keep_images(places, stream.train)
    again = from_tensors(to_tensors(stored), places, [16, 16])
    images = StoredImages(1, again[1], lose(stream, 2).train(1).labels)
    assert len(images) == 16 and images.labels.tolist() == stream.train(1).labels.tolist()
    item, expected = images[3], tiny.stream().train(1)[3]
    assert item.pop("image").tobytes() == expected.pop("image").tobytes() and item == expected
    with pytest.raises(ValueError, match="image 4 of task 2 is not among the 1 that the run has kept"):
        images[4]
    alone = StoredImages(1, again[1], count=16)
    assert alone.labels.tolist() == [expected["label"] if i == 3 else -1 for i in range(16)] and alone[3] == {
        **item,
        "image": alone[3]["image"],
    }


def test_only_methods_with_exemplars_have_the_setting():
    with pytest.raises(ValueError, match="memory_stores='pixels' is unknown: choose one of places, images"):
        create("icarl", memory_stores="pixels")
    with pytest.raises((TypeError, ValueError), match="memory_stores"):
        create("lwf", memory_stores="images")
    for method in METHODS.values():
        keeps = method.exemplars is not ContinualMethod.exemplars
        assert issubclass(method.config_class, MemoryConfig) == keeps, method.name
        if keeps:
            own = method(method.config_class(memory_stores="images"))
            assert own.stores_images and not method().stores_images
            assert "is not rehearsal-free" in " ".join(own.describe().limits)
