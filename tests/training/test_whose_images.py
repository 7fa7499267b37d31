"""Evaluation when the collator or the images are the user's own: the rules hold, or it is said why they cannot."""

from __future__ import annotations

import pytest
import tiny
import torch

from pgp_hf.data.images import ImageCollator

pytestmark = pytest.mark.usefixtures("without_figures")


def test_tasks_are_known_with_a_collator_of_ones_own(tmp_path):
    """It leaves out whose images they are; each task is tested among its own classes all the same."""

    def run(folder, collator=None):
        given = {} if collator is None else {"data_collator": collator}
        trained = tiny.trainer(folder, stream=tiny.stream(scenario="task_incremental"), **given)
        trained.train_task(0)
        trained.train_task(1)
        return trained

    own = ImageCollator(tiny.processor())
    plain, without = run(tmp_path / "plain"), run(tmp_path / "own", lambda items: dict(list(own(items).items())[:2]))
    assert plain.results.matrix == without.results.matrix
    metrics = without.evaluate()
    assert [metrics[f"eval_task_{j}_accuracy"] for j in (1, 2)] == pytest.approx(without.results.matrix[1])


class Own(torch.utils.data.Dataset):
    """Images from elsewhere, whose items have columns of the same names."""

    def __init__(self, images, **columns):
        self.images, self.columns = images, columns

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        return {"image": item["image"], "label": item["label"], **self.columns}


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_images_from_elsewhere_compete_among_all_classes_seen(tmp_path, scenario):
    trained = tiny.trainer(tmp_path, stream=tiny.stream(scenario=scenario))
    trained.train_task(0)
    trained.train_task(1)
    logits = trained.predict(Own(trained.stream.test(0), index="photo-7", task="dogs")).predictions
    finite = {int(label) for label in torch.from_numpy(logits).isfinite().all(0).nonzero().flatten()}
    assert finite == set(trained.stream.seen_classes(1))


def test_a_task_that_the_stream_does_not_have(tmp_path):
    trained = tiny.trainer(tmp_path, stream=tiny.stream(scenario="task_incremental"))
    trained.train_task(0)
    with pytest.raises(ValueError, match=r"images of tasks \[7\]: expected 0..2"):
        trained.predict(Own(trained.stream.test(0), task=7))


def test_the_best_checkpoint_brings_the_methods_memory(tmp_path):
    from pgp_hf.methods import ContinualMethod, MethodState

    class Steps(ContinualMethod):
        name = "steps_for_tests"
        steps = 0

        def loss(self, context, batch, output, losses):
            self.steps += 1
            return losses

        def state(self):
            return MethodState({}, {"steps": self.steps})

        def load_state(self, state):
            self.steps = state.values["steps"]

    trained = tiny.trainer(
        tmp_path,
        method=Steps(),
        stream=tiny.stream(train_val_split=0.25),
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="task_1_loss",
        greater_is_better=True,  # so that the first of two epochs is the best
    )
    trained.train_task(0)
    assert trained.state.best_global_step == 3 and trained.method.steps == 3
