"""No gradient is computed of prompts that their projection keeps from moving at all."""

from __future__ import annotations

import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig
from pgp_hf.training import trainer as training


class Seen(TrainerCallback):
    """Note at each step how many parameters have a gradient."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(sum(parameter.grad is not None for parameter in model.parameters()))


def run(folder, **settings):
    """Train two tasks of 4 steps; return weights after the last task, and the number of gradients in each step."""
    seen = Seen()
    with tiny.without_figures():
        trainer = tiny.trainer(
            folder,
            stream=tiny.stream(dataset=tiny.data(classes=4, train=4, test=2), num_tasks=2),
            model=tiny.model(base=tiny.backbone(num_labels=4)),
            num_train_epochs=2,
            projection=ProjectionConfig(method="frozen"),
            callbacks=[seen],
            **settings,
        )
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.tuner.prompt_parameters().values())
    return {name: value.detach() for name, value in trainer.tuner.trainable().items()}, seen.steps


def test_it_is_exact_without_clipping(tmp_path, monkeypatch):
    skipped, gradients = run(tmp_path / "skipped", max_grad_norm=0)
    assert gradients == [4] * 4 + [2] * 4  # prompts, keys, and the head's weight and bias
    monkeypatch.setattr(training, "without_fixed", lambda args, method, learner: torch.enable_grad())
    computed, gradients = run(tmp_path / "computed", max_grad_norm=0)
    assert gradients == [4] * 8
    assert all(torch.equal(skipped[name], value) for name, value in computed.items()) and len(computed) == 4


def test_where_gradients_are_clipped_it_is_asked_for(tmp_path):
    assert run(tmp_path / "default")[1] == [4] * 8
    assert run(tmp_path / "asked", skip_fixed=True)[1] == [4] * 4 + [2] * 4
