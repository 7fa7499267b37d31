"""A training step asks the device for no number: on a GPU, the host would wait for it. A bad loss stops the run all the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, methods
from pgp_hf.training.finite import LossWatch
from pgp_hf.training.loss import cross_entropy

pytestmark = pytest.mark.usefixtures("without_figures")

# operations that need a number, or a size, on the host, or bring one from there
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "_unique2",
    "bincount",
}


class Waits(TorchDispatchMode):
    """Count them."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_truth = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_truth:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """Count in each step, from its beginning to its end, but for the first two, in which much is made once."""

    def __init__(self):
        self.found, self.steps, self.mode = Counter(), 0, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            self.mode = Waits()
            self.mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.found += self.mode.found
            self.steps, self.mode = self.steps + 1, None


@pytest.mark.parametrize("kind", ["l2p", "dualprompt", "ewc"])
def test_no_step_asks_for_a_number(tmp_path, kind):
    """Forward and backward pass, clipping, the optimizer and the projection, on a task that has something to protect."""
    counted = Steps()
    if kind == "ewc":
        settings = {"model": tiny.plain(), "method": methods.create("ewc", strength=1.0)}
    else:
        projection = ProjectionConfig(method="functional", energy=0.9, key_energy=0.9, apply_to="both")
        settings = {"model": tiny.model(kind, head="statistics"), "projection": projection}
    # not Adam, which counts its steps in tensors on the host, wherever the parameters are
    trainer = tiny.trainer(tmp_path, callbacks=[counted], optim="sgd", **settings)
    trainer.train_task(0)
    trainer.train_task(1)
    assert counted.steps == 12 and not counted.found


def test_a_loss_that_travels_late_stops_the_run_before_anything_is_written(tmp_path, monkeypatch):
    """As on a GPU, the host learns of it only when it waits; the step that it happened in is named."""
    check, settle = LossWatch.check, LossWatch.settle

    def waits(self, *where):
        with monkeypatch.context() as patch:
            patch.setattr(LossWatch, "check", check)
            settle(self, *where)

    monkeypatch.setattr(LossWatch, "check", lambda self, *where: None)
    monkeypatch.setattr(LossWatch, "settle", waits)
    settings = {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 7}
    trainer = tiny.trainer(tmp_path, **settings)
    with pytest.raises(FloatingPointError, match=r"loss became (nan|-?inf) in task 1 at step [23] of 8 .*rate 1e\+30"):
        trainer.train()
    assert trainer.state.global_step == 7  # as the first checkpoint was due
    assert not trainer.folder.finished_tasks() and not list(tmp_path.rglob("checkpoint-*"))


def test_the_first_bad_step_is_kept():
    watch = LossWatch(torch.device("cpu"))
    for step, loss in enumerate((1.0, float("inf"), float("nan"), 1.0), 1):
        watch.note(torch.tensor(loss), step, 0.1 * step)
    with pytest.raises(
        FloatingPointError, match=r"loss became inf in task 3 at step 2 of 9 \(learning rate 0.2\); task 2 is"
    ):
        watch.settle(2, 9, "task 2 is kept")


def test_labels_outside_the_loss_are_nan_on_a_device():
    """There, nothing is asked; a loss that is NaN stops the training."""
    logits, labels = torch.randn(4, 6), torch.tensor([0, 2, 5, 1])
    with pytest.raises(ValueError, match=r"1 of 4 images .*\[5\] are not among \[0, 1, 2\]"):
        cross_entropy(logits, labels, [2, 0, 1])
    inside = cross_entropy(logits[[0, 1, 3]], labels[[0, 1, 3]], [2, 0, 1])
    expected = torch.nn.functional.cross_entropy(
        logits[[0, 1, 3]][:, [2, 0, 1]], torch.tensor([1, 0, 2]), reduction="none"
    )
    assert np.array_equal(inside.numpy(), expected.numpy())
