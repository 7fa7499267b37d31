"""BiC: the two numbers, the images that they are fitted on, and a stream learned with both."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from pgp_hf.heads.bias import BiasCorrection, fit_bias
from pgp_hf.methods import BiC, BiCConfig, MethodState, create

pytestmark = pytest.mark.usefixtures("without_figures")


class Recording(BiC):
    """Keeps what each step saw and cost, and what each task held out."""

    name = "bic_for_tests"

    def __init__(self, config=None):
        super().__init__(config)
        self.steps, self.held, self.pairs = [], [], []

    def loss(self, context, batch, output, losses):
        found = super().loss(context, batch, output, losses)
        learner = context.model
        auxiliary = learner.auxiliary_loss(output)
        auxiliary = torch.zeros_like(found) if auxiliary is None else auxiliary
        self.steps.append((context, batch, learner.class_logits(output).detach(), (found - auxiliary).detach()))
        self.uncorrected = self.adjust_logits(found, found) is found
        return found

    def end_task(self, context):
        self.before = {label: rows.clone() for label, rows in self.memory.kept.items()}
        super().end_task(context)
        self.held.append(list(self.validation))
        self.pairs.append(self.bias)


@pytest.fixture(scope="module", params=["l2p", "full"])
def run(request, tmp_path_factory, without_figures):
    """A run of three tasks of two classes with eight images each; of each class one or two are for validation."""
    folder = tmp_path_factory.mktemp("bic")
    model = tiny.plain() if request.param == "full" else tiny.model()
    method = Recording(BiCConfig(memory_size=18, validation_share=0.25))
    own = tiny.trainer(folder, method=method, model=model, learning_rate=0.01 if request.param == "l2p" else 0.001)
    own.train()
    return own


# ---- the two numbers -------------------------------------------------------------------------------------------------

LOGITS, LABELS = torch.tensor([[1.0, 3.0], [2.0, 2.5], [0.5, 2.0], [1.0, 4.0]]), torch.tensor([0, 0, 1, 1])


def test_worked_numbers():
    found = fit_bias(LOGITS, LABELS, new=[1], old=[0])
    assert (found.alpha, found.beta) == pytest.approx((0.4087, -0.0469), abs=1e-4) and found.classes == (1,)
    losses = [F.cross_entropy(logits, LABELS).item() for logits in (LOGITS, found(LOGITS))]
    assert losses == pytest.approx([0.8378, 0.5255], abs=1e-4)
    right = [(logits.argmax(-1) == LABELS).float().mean().item() for logits in (LOGITS, found(LOGITS))]
    assert right == [0.5, 0.75]


def objective(alpha, beta):
    corrected = torch.stack([LOGITS[:, 0], alpha * LOGITS[:, 1] + beta], 1)
    return F.cross_entropy(corrected, LABELS) + 0.05 * beta**2


def test_the_optimum_is_one():
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(objective(*pair), pair)[0]
    assert gradient.tolist() == pytest.approx([0.9110, 0.3184], abs=1e-4)
    found = fit_bias(LOGITS, LABELS, [1], [0])
    pair = torch.tensor(found[:2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(objective(*pair), pair)[0].abs().max() < 1e-7
    for _ in range(5000):  # gradient descent ends there too
        pair = (pair - 0.1 * torch.autograd.grad(objective(*pair), pair)[0]).detach().requires_grad_()
    assert pair.tolist() == pytest.approx(found[:2], abs=1e-5)


def test_classes_come_in_any_order_and_others_do_not_count():
    columns = torch.tensor([3, 1])  # the old class is 3, the new one 1
    logits = torch.full((4, 5), 50.0)
    logits[:, columns] = LOGITS
    found = fit_bias(logits, columns[LABELS], new=[1], old=[3])
    assert found[:2] == pytest.approx(fit_bias(LOGITS, LABELS, [1], [0])[:2]) and found.classes == (1,)
    assert torch.equal(found(logits)[:, [0, 2, 3, 4]], logits[:, [0, 2, 3, 4]])


def test_ranking_within_a_task_stays():
    logits = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0))
    before, new, old = logits.clone(), [4, 1], [0, 2, 3, 5]
    found = BiasCorrection(0.4087, -0.0469, (4, 1))(logits)
    assert torch.equal(logits, before) and torch.equal(found[:, old], logits[:, old])
    assert torch.equal(found[:, new].argmax(-1), logits[:, new].argmax(-1))
    assert (found.argmax(-1) != logits.argmax(-1)).float().mean() > 0.1


def test_images_that_are_told_apart_at_once_give_finite_numbers():
    found = fit_bias(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), torch.tensor([0, 1]), [1], [0])
    assert 1 < found.alpha < 1e3 and abs(found.beta) < 1


# ---- validation ------------------------------------------------------------------------------------------------------


def seen_in(run, task):
    return {
        tuple(place)
        for context, batch, *_ in run.method.steps
        if context.task == task
        for place in zip(batch.tasks.tolist(), batch.indices.tolist(), strict=True)
    }


def test_validation_is_balanced_and_not_trained_on(run):
    held = run.method.held
    assert held[0] == [] and len(seen_in(run, 0)) == 16
    for task, each in ((1, 2), (2, 1)):  # a quarter of 9 exemplars, but of 8 images of a new class; of 4
        labels = [label for _, label in held[task]]
        assert sorted(labels) == sorted(each * run.stream.seen_classes(task))
        places = {tuple(place) for place, _ in held[task]}
        assert len(places) == len(labels) and not places & seen_in(run, task)
        assert all(run.stream.train(t).labels[i] == label for (t, i), label in held[task])


def test_everything_else_is_trained_on(run):
    old = {tuple(place) for label, rows in run.method.before.items() for place in rows[:, :2].tolist()}
    assert len(old) == 4 * 4  # before the last task ended
    everything = old | {(2, i) for i in range(16)}
    assert seen_in(run, 2) == everything - {tuple(place) for place, _ in run.method.held[2]}


@pytest.mark.parametrize(
    ("size", "classes", "expected"), [(2000, 10, 20), (2000, 90, 2), (1000, 90, 1), (2000, 20, 10), (5000, 90, 5)]
)
def test_how_many_are_held_out(size, classes, expected):
    """Of the quota, rounded down: 20 of 200, 2 of 22, 1 of 11."""
    assert BiC(BiCConfig(memory_size=size))._held_out(Classes(classes), 1) == expected


class Classes:
    """A stream of two tasks with 500 images a class, the first of which has so many classes."""

    def __init__(self, old, images=500):
        self.old, self.images, self.num_tasks, self.class_order = old, images, 2, list(range(old + 1))

    def has_train(self, t):
        return True

    def seen_classes(self, t):
        return list(range(self.old + t))

    def train(self, t):
        labels = torch.arange(self.old, self.old + 1) if t else torch.arange(self.old)
        return SimpleNamespace(labels=labels.repeat_interleave(self.images).numpy())


@pytest.mark.parametrize(
    ("settings", "images", "message"),
    [
        ({"memory_size": 890}, 500, r"validation_share=0.1 of 9 exemplars of each of 90 classes \(all that memory_size=890 allows\) is less than one image .* set memory_size to at least 900"),
        ({"memory_per_class": 4, "validation_share": 0.2}, 500, "set memory_per_class to at least 5"),
        ({"memory_size": 2000}, 7, "validation_share=0.1 of 7 images of a class is less than one .* at least 10 training images"),
    ],
)  # fmt: skip
def test_a_memory_that_is_too_small_is_refused(settings, images, message):
    with pytest.raises(ValueError, match=message):
        BiC(BiCConfig(**settings)).training_stream(Classes(90, images))
    fixed = {**settings, "validation_share": 0.25}
    assert BiC(BiCConfig(**fixed)).training_stream(Classes(90, images))


# ---- a stream --------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_stream(run):
    context, batch, logits, found = run.method.steps[-1]
    assert context.task == 2 and run.method.uncorrected and run.method._teachers == run.method.pairs[1]
    taught = run.stream_model.class_logits(context.forward(batch, run.method.teacher))
    pair, second = run.method.pairs[1], list(run.stream.tasks[1].classes)
    assert pair.classes == tuple(second) and pair.alpha != 1
    taught[:, second] = pair.alpha * taught[:, second] + pair.beta
    old, seen = run.stream.seen_classes(1), run.stream.seen_classes(2)
    p = (taught[:, old] / 2).softmax(-1)
    held = -(p * (logits[:, old] / 2).log_softmax(-1)).sum(-1)
    positions = torch.tensor([seen.index(label) for label in batch.labels])
    right = F.cross_entropy(logits[:, seen], positions, reduction="none")
    torch.testing.assert_close(found, 4 / 6 * held + 2 / 6 * right, rtol=1e-4, atol=1e-5)


def test_the_first_task_is_learned_by_cross_entropy(run):
    context, batch, logits, found = run.method.steps[7]
    own = list(context.stream.tasks[0].classes)
    positions = torch.tensor([own.index(label) for label in batch.labels])
    torch.testing.assert_close(found, F.cross_entropy(logits[:, own], positions, reduction="none"))
    assert context.task == 0 and run.method.pairs[0] == BiasCorrection()


def test_the_pair_is_the_optimum_on_what_was_held_out(run):
    context = run.method.steps[-1][0]
    places, labels = zip(*run.method.held[2], strict=True)
    new, old = list(run.stream.tasks[2].classes), run.stream.seen_classes(1)
    expected = fit_bias(context.observe(places).logits, torch.tensor(labels), new, old)
    assert run.method.bias[:2] == pytest.approx(expected[:2], rel=1e-3, abs=1e-4)
    assert run.method.bias.classes == tuple(new)


def test_predictions_are_corrected_by_the_last_pair_alone(run):
    test = run.stream.test(0)
    scores = torch.as_tensor(run.predict(test).predictions)
    batch = run.data_collator([test[i] for i in range(len(test))])
    with torch.no_grad():
        own = run.stream_model.class_logits(run.model.eval()(pixel_values=batch["pixel_values"]))
    new, bias = list(run.stream.tasks[2].classes), run.method.bias
    own[:, new] = bias.alpha * own[:, new] + bias.beta
    torch.testing.assert_close(scores, own, rtol=1e-4, atol=1e-5)


def test_what_is_written(run):
    content = json.loads((run.folder.root / "method.json").read_text())
    alpha, beta, classes = run.method.bias
    assert content["state"] == {
        "images": 18, "bytes": 18 * 1200, "alpha": alpha, "beta": beta, "corrected": list(classes)
    }  # fmt: skip
    assert content["adjusts_logits"] is True
    other = BiC()
    other.load_state(MethodState(run.method.state().tensors, content["state"]))
    assert other.bias == run.method.bias
    card = (run.folder.root / "README.md").read_text()
    assert "Bias correction (BiC)" in card and "kept 18 images (18 at most; 21,600 bytes" in card


class StopAt(TrainerCallback):
    def __init__(self, task):
        self.task = task

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == 6:
            raise KeyboardInterrupt


def test_resumed_in_the_same_trainer(run, tmp_path):
    """Whose teacher and numbers are those of the interrupted task; a new trainer is part of the contract."""
    full = run.stream_model.name == "full"
    stop, method = StopAt(2 if full else 0), BiC(run.method.config)
    settings = {"model": tiny.plain() if full else tiny.model(), "learning_rate": run.args.learning_rate}
    stop.trainer = own = tiny.trainer(tmp_path, method=method, callbacks=[stop], **settings)
    with pytest.raises(KeyboardInterrupt):
        own.train()
    stop.task = None
    own.train(resume_from_checkpoint=True)
    assert method.bias == run.method.bias and method.memory.places() == run.method.memory.places()
    a, b = own.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_order_that_is_turned_round_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("pgp_hf.methods.bic.fit_bias", lambda *_: BiasCorrection(-0.25, 0.0, (1,)))
    own = tiny.trainer(
        tmp_path, method=create("bic", memory_size=60), stream=tiny.stream(dataset=tiny.data(train=10)), max_steps=1
    )
    own.train_task(0)
    with pytest.warns(UserWarning, match=r"corrects task 2 by alpha=-0.25.*: 4 validation images are too few"):
        own.train_task(1)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is out of range"),
        ({"validation_share": 0.0}, r"validation_share=0.0 is outside \(0, 1\)"),
        ({"validation_share": 1.0}, "validation_share=1.0 is outside"),
        ({"memory_size": 0}, "memory_size=0 is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        BiCConfig(**settings)


def test_what_does_not_go_with_it(tmp_path):
    with pytest.raises(ValueError, match="'bic' is not defined for scenario='task_incremental'"):
        tiny.trainer(tmp_path, method=create("bic"), stream=tiny.stream(scenario="task_incremental"))
    with pytest.raises(ValueError, match="of 8 images of a class is less than one image"):
        tiny.trainer(tmp_path, method=create("bic"))
    with pytest.raises(ValueError, match="head='statistics' of this l2p adapter"):
        tiny.trainer(tmp_path, method=create("bic"), model=tiny.model(head="statistics"))


def test_a_state_of_another_method():
    with pytest.raises(ValueError, match="expected alpha, beta and corrected classes"):
        BiC().load_state(MethodState({}, {"alpha": 1.0}))
