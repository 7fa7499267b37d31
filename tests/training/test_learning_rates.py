"""Learning rates of their own: a plain model's head."""

from __future__ import annotations

import pytest
import tiny
from transformers import TrainerCallback

from pgp_hf import set_trainable
from pgp_hf.methods import create
from pgp_hf.models import PlainModel

pytestmark = pytest.mark.usefixtures("without_figures")


def trainer(folder, what="all", **settings):
    settings = {"learning_rate": 1e-4, "head_learning_rate": 0.01, "weight_decay": 0.1, **settings}
    model = set_trainable(tiny.backbone(), what)
    return tiny.trainer(folder, model=model, method=create("fine_tuning"), **settings)


def rates(made):
    """The learning rate of each parameter in a trainer's optimizer, by name."""
    groups = getattr(made.optimizer, "optimizer", made.optimizer).param_groups
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: found[id(parameter)] for name, parameter in PlainModel(made.model).trainable().items()}


@pytest.mark.parametrize("what", ["all", "last:1", "head", "lora:2"])
def test_the_head_has_a_learning_rate_of_its_own(tmp_path, what):
    made = trainer(tmp_path, what)
    for t in range(2):  # in every task
        made.train_task(t)
        found = rates(made)
        assert {name: rate for name, rate in found.items() if "classifier" in name} != {}
        assert all(rate == (0.01 if "classifier" in name else 1e-4) for name, rate in found.items())


def test_the_schedule_scales_both(tmp_path):
    made = trainer(tmp_path, lr_scheduler_type="linear", max_steps=4)
    seen = []

    class Note(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append({round(rate, 9) for rate in rates(made).values()})

    made.add_callback(Note())
    made.train_task(0)
    assert seen == [{round(rate * part, 9) for rate in (0.01, 1e-4)} for part in (1, 0.75, 0.5, 0.25)]


def test_a_rate_of_prompts_where_there_are_none(tmp_path):
    with pytest.raises(
        ValueError, match=r"later_prompt_learning_rate=0.01 is for prompts, and this model, 'head', has none"
    ):
        trainer(tmp_path, "head", later_prompt_learning_rate=0.01)


def test_without_one_all_learn_at_the_same_rate(tmp_path):
    made = trainer(tmp_path, head_learning_rate=None)
    made.train_task(0)
    assert set(rates(made).values()) == {1e-4}


def test_an_interrupted_task_goes_on_with_both(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    whole, part, rest = (trainer(tmp_path / name, **settings) for name in ("whole", "part", "part"))
    whole.train_task(0)
    part.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        part.train()
    rest.add_callback(stop_after_first := StopAfterFirst())
    with pytest.raises(KeyboardInterrupt):
        rest.train(resume_from_checkpoint=True)
    assert stop_after_first.resumed
    for name, parameter in PlainModel(whole.model).trainable().items():
        assert (parameter == PlainModel(rest.model).trainable()[name]).all(), name


class StopAfterFirst(TrainerCallback):
    """Stops before the second task's first step."""

    resumed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.resumed:
            raise KeyboardInterrupt
        self.resumed = state.global_step > 0


@pytest.mark.parametrize("rate", [-1.0, float("inf"), float("nan")])
def test_other_values_are_refused(tmp_path, rate):
    with pytest.raises(ValueError, match="head_learning_rate=.*a (finite number from 0|number)"):
        trainer(tmp_path, head_learning_rate=rate)


def test_models_with_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="head_learning_rate=0.01 is for models without prompts .*adapter 'l2p'"):
        tiny.trainer(tmp_path, head_learning_rate=0.01)
