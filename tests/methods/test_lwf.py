"""Learning without forgetting: the distillation, its teacher, and a stream learned with both."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_ewc import same, trainer, weights

from pgp_hf.methods import FineTuning, LwF, LwFConfig, create
from pgp_hf.methods.distillation import distillation

pytestmark = pytest.mark.usefixtures("without_figures")


class Recording(LwF):
    """Keeps each step's inputs and losses."""

    name = "lwf_for_tests"

    def __init__(self, config=None):
        super().__init__(config)
        self.steps = []

    def loss(self, context, batch, output, losses):
        found = super().loss(context, batch, output, losses)
        logits = context.model.class_logits(output)
        self.steps.append((context, batch, logits, (found - losses).detach()))
        return found


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("ft")
    trainer(folder, None).train()
    return folder


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_worked_numbers():
    z, taught = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True), torch.tensor([[2.0, 0.0, -1.0]])
    p = (taught / 2).softmax(-1)
    assert p[0].tolist() == pytest.approx([0.6285, 0.2312, 0.1402], abs=1e-4)
    found = distillation(z, taught, 2.0)
    assert found.item() == pytest.approx(1.02814, abs=1e-5)
    entropy = -(p * p.log()).sum()
    assert (found - entropy).item() == pytest.approx(0.12218, abs=1e-5)
    found.backward()
    assert z.grad[0].tolist() == pytest.approx([-0.1224, 0.0762, 0.0462], abs=1e-4)  # without T^2


def test_each_image_has_its_own_softmax():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    taught = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    found = distillation(z, taught, 2.0)
    assert found.shape == (4,)
    for row in range(4):
        assert found[row] == pytest.approx(distillation(z[row : row + 1], taught[row : row + 1], 2.0).item())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
def test_what_agrees_has_no_gradient_to_the_bit(temperature):
    logits = 20 * torch.randn(64, 17, generator=torch.Generator().manual_seed(0))
    z = logits.clone().requires_grad_()
    distillation(z, logits, temperature).sum().backward()
    assert (z.grad == 0).all()


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_neutral_it_is_fine_tuning(fine_tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("pgp_hf.methods.lwf.teacher_logits", None)  # a teacher would cost a pass
    trainer(tmp_path, create("lwf", strength=0.0)).train()
    for t in (1, 2, 3):
        assert same(weights(tmp_path / f"task-{t}"), weights(fine_tuned / f"task-{t}"))


@pytest.mark.parametrize("model", ["l2p", "full"])
def test_the_first_step_of_a_task_is_that_of_fine_tuning(tmp_path, model):
    """The model agrees with its teacher, so that the distillation has no gradient."""
    runs = []
    for method in (FineTuning(), Recording()):
        own = tiny.trainer(
            tmp_path / method.name, method=method, model=tiny.plain() if model == "full" else tiny.model(), max_steps=1
        )
        own.train_task(0)
        own.train_task(1)
        runs.append(own)
    assert runs[1].method.steps[-1][0].task == 1 and (runs[1].method.steps[-1][3] > 0.1).all()
    assert same(*({name: value.detach() for name, value in run.stream_model.trainable().items()} for run in runs))


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_what_is_added_and_who_teaches(fine_tuned, tmp_path, scenario):
    method = Recording(LwFConfig(strength=0.5, temperature=3.0))
    own = tiny.trainer(tmp_path, method=method, stream=tiny.stream(scenario=scenario), learning_rate=0.05)
    own.train_task(0)
    assert all((extra == 0).all() for *_, extra in method.steps)
    own.train_task(1)
    before = {name: value.detach().clone() for name, value in own.stream_model.trainable().items()}
    method.steps.clear()
    own.train_task(2)
    assert method._teacher.keys() == before.keys()
    assert all(torch.equal(value, before[name]) and not value.requires_grad for name, value in method._teacher.items())
    context, batch, logits, extra = method.steps[-1]
    taught = own.stream_model.class_logits(context.forward(batch, before))
    first, second = (list(task.classes) for task in own.stream.tasks[:2])
    groups = [first, second] if scenario == "task_incremental" else [first + second]
    expected = 0
    for classes in groups:
        p = (taught[:, classes] / 3).softmax(-1)
        expected = expected - 0.5 * (p * (logits[:, classes] / 3).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(extra, expected.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        now = own.stream_model.class_logits(context.forward(batch))
    assert not torch.allclose(now, taught, atol=1e-2)


def test_old_scores_are_held_on_new_images(tmp_path):
    moved = []
    for method in (FineTuning(), create("lwf", strength=5.0)):
        own = tiny.trainer(
            tmp_path / method.name,
            method=method,
            model=tiny.plain(),
            learning_rate=0.01,
            optim="sgd",
            eval_mask="none",
        )
        old = list(own.stream.tasks[0].classes)
        own.train_task(0)
        scores = [torch.as_tensor(own.predict(own.stream.train(1)).predictions)[:, old].log_softmax(-1)]
        own.train_task(1)
        scores.append(torch.as_tensor(own.predict(own.stream.train(1)).predictions)[:, old].log_softmax(-1))
        moved.append((scores[1] - scores[0]).abs().mean())
    assert moved[1] < moved[0] / 2


def test_accumulation_changes_nothing(tmp_path):
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 2}
        own = trainer(tmp_path / str(batch), create("lwf", strength=3.0), optim="sgd", **settings)
        own.train_task(0)
        own.train_task(1)
        found.append(weights(tmp_path / str(batch) / "task-2"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -0.1}, "strength=-0.1 is out of range"),
        ({"strength": float("nan")}, "strength=nan is not a number"),
        ({"temperature": 0.0}, "temperature=0.0 is out of range: use a finite number > 0"),
        ({"temperature": float("inf")}, "temperature=inf is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LwFConfig(**settings)
