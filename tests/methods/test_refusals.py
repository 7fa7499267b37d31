"""Methods that are used wrongly, or resumed as another, and methods without which nothing can be predicted."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, load_pretrained, methods
from pgp_hf.methods import METHODS, ContinualMethod, FineTuning, MethodState, ProjectedPrompts, register

pytestmark = pytest.mark.usefixtures("without_figures")


@dataclass
class TapsConfig:
    taps: tuple[int, ...] = (1, 2)


class Counter(ContinualMethod):
    """Counts steps in a tensor that it changes in place."""

    name = "counter_for_tests"
    config_class = TapsConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.steps = torch.zeros((), dtype=torch.int64)

    def loss(self, context, batch, output, losses):
        self.steps += 1
        return losses

    def state(self):
        return MethodState({"steps": self.steps}, {})

    def load_state(self, state):
        if set(state.tensors) != {"steps"}:
            raise ValueError(f"expected steps, got {sorted(state.tensors)}")
        self.steps = state.tensors["steps"]


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(folder, method, step=6):
    """A trainer that was interrupted in its first task."""
    run = tiny.trainer(folder, method=method, callbacks=[Stop(step)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Stop)
    return run


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FineTuning, "method.name: 'fine_tuning', was 'counter_for_tests'"),
        (lambda: Counter(TapsConfig((3,))), r"method.taps: \[3\], was \[1, 2\]"),
    ],
)
def test_a_checkpoint_within_the_first_task_is_held_against_the_method(tmp_path, other, message):
    stopped(tmp_path, Counter())
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, method=other()).train(resume_from_checkpoint=True)
    tiny.trainer(tmp_path, method=Counter()).train(resume_from_checkpoint=True)


def test_settings_are_compared_as_json_has_them(tmp_path):
    run = tiny.trainer(tmp_path, method=Counter())
    run.train_task(0)
    tiny.trainer(tmp_path, method=Counter()).train(resume_from_checkpoint=True)


def test_a_method_starts_anew_when_its_first_task_does(tmp_path):
    run = stopped(tmp_path, Counter())
    assert int(run.method.steps) == 6 and int(run._blank.tensors["steps"]) == 0
    run.train(resume_from_checkpoint=True)  # from the checkpoint after step 4
    assert int(run.method.steps) == 3 * 8


def test_a_refused_run_leaves_the_trainer_as_it_was(tmp_path):
    first = tiny.trainer(tmp_path / "run", projection=ProjectionConfig(energy=0.9))
    first.train_task(0)
    for folder in (tmp_path / "run", tmp_path / "run" / "task-1"):
        content = json.loads((folder / "method.json").read_text())
        (folder / "method.json").write_text(json.dumps({**content, "state": {"foreign": 1}}))
        (folder / "digests.json").unlink()
    second = tiny.trainer(tmp_path / "run", projection=ProjectionConfig(energy=0.9))
    with pytest.raises(ValueError, match="remembers nothing, but its files hold foreign"):
        second.train(resume_from_checkpoint=True)
    assert second.projection.rank == 0 and second.task is None and not second.results.matrix


def test_a_method_is_for_one_trainer(tmp_path):
    method = ProjectedPrompts(ProjectionConfig(energy=0.9))
    tiny.trainer(tmp_path / "one", method=method).train_task(0)
    with pytest.raises(ValueError, match="this ProjectedPrompts has learned tasks in another trainer: make a new one"):
        tiny.trainer(tmp_path / "two", method=method)


class Mean(ContinualMethod):
    name = "mean_for_tests"

    def loss(self, context, batch, output, losses):
        return losses.mean()


def test_a_reduced_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'mean_for_tests' returned a loss of shape \(\): expected \(4,\)"):
        tiny.trainer(tmp_path, method=Mean()).train_task(0)


def test_a_bare_tuner_is_refused_before_it_trains(tmp_path):
    with pytest.raises(TypeError, match="model is a L2PModel: pass the PeftModel around it"):
        tiny.trainer(tmp_path, method=None, model=tiny.model().base_model)


def test_a_scenario_is_refused_before_the_model_changes(tmp_path):
    model = tiny.model("dualprompt", pool_size=2, grow_pool=True)
    with pytest.raises(ValueError, match="max_steps=3 and scenario='online'"):
        tiny.trainer(tmp_path, model=model, stream=tiny.stream(scenario="online"), max_steps=3)
    assert model.base_model.adapter_config.pool_size == 2


def test_a_subclass_is_recorded_by_its_own_name(tmp_path):
    own = type("Own", (ProjectedPrompts,), {"name": "own_for_tests"})
    run = tiny.trainer(tmp_path, method=own(ProjectionConfig(energy=0.9)))
    assert run.results.method == "own_for_tests"


# ---- methods that adjust the logits ------------------------------------------------------------------------------------


class Offset(ContinualMethod):
    """Prefers the class with the lowest id, which is seen in the features' mean as well."""

    name = "offset_for_tests"

    def adjust_logits(self, logits, features):
        assert features.shape == (len(logits), 24)
        adjusted = logits.clone()
        adjusted[:, 0] += 1000 + features.mean(-1)
        return adjusted


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(methods.registry, "METHODS", dict(METHODS))
    return register(Offset)


def test_predictions_of_a_loaded_run_are_those_that_were_measured(tmp_path, registered):
    model = tiny.model()
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    model.base_model.adapter_config.base_model_name_or_path = str(tmp_path / "backbone")
    run = tiny.trainer(tmp_path / "run", method=Offset(), model=model)
    run.train()
    test = run.stream.test(2)
    measured = run.predict(test).predictions
    classifier = load_pretrained(tmp_path / "run")
    batch = run.data_collator([test[i] for i in range(len(test))])
    with torch.no_grad():
        logits = classifier.model(pixel_values=batch["pixel_values"]).logits
        as_tuple = classifier.model(pixel_values=batch["pixel_values"], return_dict=False)[0]
    assert torch.allclose(logits, torch.from_numpy(measured), atol=1e-4) and torch.equal(logits, as_tuple)
    assert (logits.argmax(-1) == 0).all() and (logits[:, 0] > 900).all()


def test_a_method_that_adjusts_logits_has_to_be_known(tmp_path, monkeypatch):
    model = tiny.model()
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    model.base_model.adapter_config.base_model_name_or_path = str(tmp_path / "backbone")
    tiny.trainer(tmp_path / "run", method=Offset(), model=model).train_task(0)
    with pytest.raises(
        ValueError, match="names the method 'offset_for_tests', which predictions need.*import the package"
    ):
        load_pretrained(tmp_path / "run")
