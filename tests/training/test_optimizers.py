"""Optimizers whose weights move outside `step` are refused before training; whatever else moves weights is noticed."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import StreamTrainer, TaskStream, methods

pytestmark = pytest.mark.usefixtures("without_figures")


class ExchangesWeights(torch.optim.SGD):
    """As schedule-free optimizers do: `eval()` shows the average of the weights, `train()` the weights themselves."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.averages, self.steps, self.shown = {}, 0, False

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        for parameter in self._all():
            average = self.averages.setdefault(parameter, parameter.detach().clone())
            average.lerp_(parameter.detach(), 1 / self.steps)

    def _all(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _exchange(self):
        for parameter in self.averages:
            parameter.data, self.averages[parameter] = self.averages[parameter], parameter.data

    def eval(self):
        if not self.shown:
            self._exchange()
        self.shown = True

    def train(self):
        if self.shown:
            self._exchange()
        self.shown = False


class StepsInBackward(torch.optim.SGD):
    """As LOMO and layerwise optimizers do: each parameter moves as soon as its gradient is there."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._move, group))

    @staticmethod
    def _move(group, parameter):
        parameter.data.sub_(group["lr"] * parameter.grad)

    def step(self, closure=None):
        pass


class StepsWithoutHooks(torch.optim.SGD):
    """Its weights move where no hook of a step sees it."""

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad)
        super().zero_grad(set_to_none)


class HasModes(torch.optim.SGD):
    """It has `train()` and `eval()`, and moves nothing in them."""

    def eval(self):
        pass

    def train(self):
        pass


@pytest.mark.parametrize(
    ("optimizer", "where"),
    [(ExchangesWeights, r"eval\(\)"), (StepsInBackward, "backward pass"), (StepsWithoutHooks, r"zero_grad\(\)")],
)
def test_weights_that_move_outside_a_step_are_refused_before_anything_is_written(tmp_path, optimizer, where):
    with pytest.raises(ValueError, match=rf"{optimizer.__name__}.*{where}.*adamw_torch"):
        tiny.trainer(tmp_path / "run", optimizer_cls_and_kwargs=(optimizer, {"lr": 0.1}))
    assert not list((tmp_path / "run").iterdir())


def test_every_model_and_method_refuses_them(tmp_path):
    for model, method in ((tiny.plain("head"), "fine_tuning"), (tiny.model("dualprompt"), "projected_prompts")):
        with pytest.raises(ValueError, match="moves weights in the backward pass"):
            tiny.trainer(
                tmp_path, model=model, method=methods.create(method), optimizer_cls_and_kwargs=(StepsInBackward, {})
            )


def test_layerwise_optimizers_are_refused_without_their_package(tmp_path):
    with pytest.raises(ValueError, match=r"'galore_adamw_layerwise' moves weights in the backward pass"):
        tiny.trainer(tmp_path, optim="galore_adamw_layerwise", optim_target_modules=["q_proj"])


def test_a_missing_package_is_named_before_training(tmp_path):
    with pytest.raises(ImportError, match="schedulefree"):
        tiny.trainer(tmp_path, optim="schedule_free_adamw")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizers_that_move_weights_in_their_step_are_taken(tmp_path, optim):
    trainer = tiny.trainer(tmp_path, optim=optim, seed=3)
    assert trainer.optimizer is None  # each task makes its own
    drawn = torch.rand(2)
    torch.manual_seed(3)  # as a `Trainer` does
    assert torch.equal(drawn, torch.rand(2))


def test_modes_that_move_nothing_are_taken(tmp_path):
    given = {"lr": 0.1}
    tiny.trainer(tmp_path, optimizer_cls_and_kwargs=(HasModes, given))
    assert given == {"lr": 0.1}


@pytest.mark.parametrize("lazily", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_task_has_the_parameters_that_were_given(tmp_path, lazily):
    """And their learning rates, which the schedule of the task before has lowered."""

    class Note(TrainerCallback):
        def on_step_begin(self, *args, optimizer, **kwargs):
            seen.append([(len(group["params"]), round(group["lr"], 9)) for group in optimizer.param_groups])

    model, seen = tiny.model(), []
    prompts, head = (
        [p for n, p in model.named_parameters() if p.requires_grad and part in n] for part in ("l2p", "cl")
    )
    groups = [{"params": prompts, "lr": 0.4}, {"params": iter(head) if lazily else head}]
    given = {"params": iter(groups) if lazily else groups, "lr": 0.1}
    trainer = tiny.trainer(
        tmp_path,
        model=model,
        optimizer_cls_and_kwargs=(torch.optim.SGD, given),
        max_steps=2,
        lr_scheduler_type="linear",
        callbacks=[Note()],
    )
    for t in range(2):
        trainer.train_task(t)
    assert seen == [[(2, 0.4), (2, 0.1)], [(2, 0.2), (2, 0.05)]] * 2
    assert groups[0] == {"params": prompts, "lr": 0.4}


def test_parameters_of_a_head_that_has_been_replaced_are_refused(tmp_path):
    model, stream = tiny.model(), TaskStream.empty()
    given = {"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.1}
    trainer = tiny.trainer(
        tmp_path, model=model, stream=stream, optimizer_cls_and_kwargs=(torch.optim.SGD, given), max_steps=1
    )
    with pytest.raises(ValueError, match="2 of the 4 parameters in 'params' are not the model's.*leave 'params' out"):
        trainer.learn(tiny.data()["train"])


def test_an_optimizer_that_a_small_model_cannot_try_is_taken(tmp_path):
    class NeedsFour(torch.optim.SGD):
        def __init__(self, parameters, **settings):
            if not any(parameter.ndim == 3 for group in parameters for parameter in group["params"]):
                raise ValueError("needs a parameter with three dimensions")
            super().__init__(parameters, **settings)

    tiny.trainer(tmp_path, optimizer_cls_and_kwargs=(NeedsFour, {"lr": 0.1}))


# ---- whatever else moves weights -------------------------------------------------------------------------------------


class Moves(TrainerCallback):
    """Move parameters when a task's training ends, as a callback that averages weights would."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_train_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.part in name and parameter.requires_grad:
                    parameter += 0.01


def run(folder, part: str, **settings) -> StreamTrainer:
    trainer = tiny.trainer(folder, num_train_epochs=1, callbacks=[Moves(part)], **settings)
    trainer.train()
    return trainer


def test_prompts_that_something_moves_along_protected_directions_end_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"l2p_prompt has moved along directions that older tasks protect"):
        run(tmp_path, "l2p_prompt")
    assert (tmp_path / "task-1").is_dir()
    assert not (tmp_path / "task-2").exists()


@pytest.mark.parametrize(("adapter", "part"), [("dualprompt", "expert_key"), ("clip", "clip_prompt_context")])
def test_entries_of_other_tasks_that_something_moves_end_the_run(tmp_path, adapter, part):
    with pytest.raises(RuntimeError, match="entries of other tasks than task 1 have moved"):
        run(tmp_path, part, model=tiny.model(adapter))


def test_layers_that_something_moves_along_protected_directions_end_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="protect"):
        run(tmp_path, "q_proj", model=tiny.plain(), method=methods.create("gpm", energy=0.9))
    with pytest.raises(RuntimeError, match="outside the linear layers"):
        run(tmp_path / "norms", "layernorm", model=tiny.plain(), method=methods.create("gpm", energy=0.9))


def test_what_is_not_protected_may_be_moved(tmp_path):
    assert len(run(tmp_path, "classifier").results.matrix) == 3
