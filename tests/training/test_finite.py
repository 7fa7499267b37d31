"""Numbers that are not finite are refused before they are published, by the image that they come from."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import methods
from pgp_hf.data.images import ImageCollator

pytestmark = pytest.mark.usefixtures("without_figures")


class Spoils(ImageCollator):
    """Put a value into the pixels of one image, wherever `spoils` says so."""

    def __init__(self, spoils, value=float("nan")):
        super().__init__(tiny.processor())
        self.spoils, self.value = spoils, value

    def __call__(self, items):
        batch = super().__call__(items)
        for i, item in enumerate(items):
            if self.spoils(item):
                batch["pixel_values"][i, 0, 0, 0] = self.value
        return batch


def make(folder, kind, spoils=None, value=float("nan"), **settings):
    if kind == "icarl":
        settings |= {"model": tiny.plain(), "method": methods.create("icarl", memory_size=6)}
    else:
        settings |= {"model": tiny.model(head=kind)}
    if spoils is not None:
        settings["data_collator"] = Spoils(spoils, value)
    return tiny.trainer(folder, num_train_epochs=1, **settings)


def image_of(stream, split, task, position):
    """Return a function that knows an item by its image."""
    wanted = getattr(stream, split)(task)[position]["image"].tobytes()
    return lambda item: item["image"].tobytes() == wanted


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("linear", float("nan")),
        ("statistics", float("inf")),
        pytest.param("linear", float("inf"), marks=pytest.mark.slow),
        pytest.param("statistics", float("nan"), marks=pytest.mark.slow),
        pytest.param("icarl", float("nan"), marks=pytest.mark.slow),
        pytest.param("icarl", float("inf"), marks=pytest.mark.slow),
    ],
)
def test_a_test_image_is_named_and_its_task_is_not_published(kind, value, tmp_path):
    stream = tiny.stream()
    row = stream.test(1)._rows[3]
    trainer = make(tmp_path / "run", kind, image_of(stream, "test", 1, 3), value)
    message = rf"not finite for 1 of 8 test images of task 2; the first is the image in row {row} of the test split.*task 1 is kept"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert not trainer.folder.task(1).exists() and trainer.folder.finished_tasks() == 1
    resumed = make(tmp_path / "run", kind)
    resumed.train(resume_from_checkpoint=True)
    straight = make(tmp_path / "straight", kind)
    straight.train()
    assert tiny.same_results(resumed.results.to_dict(), straight.results.to_dict())
    for name, value in straight.stream_model.trainable().items():
        assert torch.equal(resumed.stream_model.trainable()[name], value)


def test_the_image_of_an_older_task_is_named_too(tmp_path):
    """It was well as its own task ended: what makes pixels of it, or the model, has changed since."""
    trainer = make(tmp_path, "linear", lambda item: False)
    trainer.train_task(0)
    trainer.data_collator.spoils = image_of(trainer.stream, "test", 0, 2)
    with pytest.raises(
        FloatingPointError, match=r"1 of 8 test images of task 1; .*row \d+ of the test split.*task 1 is kept"
    ):
        trainer.train_task(1)
    assert not trainer.folder.task(1).exists()


@pytest.mark.parametrize("kind", tiny.some_of(["linear", "statistics", "icarl"], "statistics", "icarl"))
def test_a_training_image_is_named_by_the_passes_over_it(kind, tmp_path):
    trainer = make(tmp_path, kind, lambda item: False, augmentation="crop_flip")
    spoils = image_of(trainer.stream, "train", 0, 4)
    trainer.data_collator.spoils = lambda item: trainer.state.global_step and not trainer.is_in_train and spoils(item)
    row = trainer.stream.train(0)._rows[4]
    with pytest.raises(
        FloatingPointError, match=rf"row {row} of the train split has pixel values that are not finite"
    ):
        trainer.train()
    assert not trainer.folder.task(0).exists()


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_classes_that_may_not_win_are_no_reason(scenario, tmp_path):
    trainer = tiny.trainer(tmp_path, stream=tiny.stream(scenario=scenario), num_train_epochs=1)
    trainer.train()
    assert trainer.folder.finished_tasks() == 3


class SpoilLastGradient(TrainerCallback):
    """Make the last step's gradient of the head NaN, which no loss will tell."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == state.max_steps - 1:
            model.base_model.model.classifier.modules_to_save["default"].bias.grad[0] = float("nan")


def test_weights_that_the_last_step_has_spoiled_are_not_published(tmp_path):
    """Without test images, nothing but the weights would show it."""
    trainer = make(tmp_path / "run", "linear", max_grad_norm=0, callbacks=[SpoilLastGradient()])
    with pytest.raises(
        FloatingPointError, match=r"classifier.bias is not finite after the last step of task 1 \(1 of 4"
    ):
        trainer.train()
    assert not trainer.folder.task(0).exists()
