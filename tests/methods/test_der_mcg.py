"""DER with a multi-centroid gate: experts that stay, heads and gate that are trained after them, and the ensemble."""

from __future__ import annotations

import copy
import json
import random
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, ViTForImageClassification

from pgp_hf import load_pretrained
from pgp_hf.methods import DERMCG, DERMCGConfig, MethodState, create
from pgp_hf.methods.der_mcg import auxiliary_targets
from pgp_hf.methods.gate import combine, task_scores
from pgp_hf.models import exchanged

pytestmark = pytest.mark.usefixtures("without_figures")
SMALL = {"memory_size": 12, "tuning_epochs": 4, "gate_epochs": 2, "gate_batch_size": 6}


class Step(NamedTuple):
    task: int
    labels: torch.Tensor
    older: list[torch.Tensor]  # what older experts say of all classes
    own: torch.Tensor
    auxiliary: tuple[torch.Tensor, torch.Tensor] | None  # what the auxiliary head reads, and its weight
    found: torch.Tensor


class Recording(DERMCG):
    """Keeps what each step saw and cost, and what numbers were drawn globally."""

    name = "der_mcg_for_tests"

    def __init__(self, config=None):
        super().__init__(config)
        self.steps, self.drawn, self.features, self.within = [], [], {}, {}

    def begin_task(self, context):
        self._watch_numbers(super().begin_task, context)
        self.context = context

    def loss(self, context, batch, output, losses):
        features, auxiliary = self._features, self.auxiliary
        found = super().loss(context, batch, output, losses)
        assert auxiliary is None or auxiliary.grad is None
        own = context.model.class_logits(output).detach()
        auxiliary = None if auxiliary is None else (features.detach(), auxiliary.detach().clone())
        older = [context.forward(batch, expert).logits for expert in self.experts]
        self.steps.append(Step(context.task, batch.labels, older, own, auxiliary, found.detach()))
        if context.task:  # how would it predict now?
            self.within[context.task] = own, self.predict_logits(context.model, batch.inputs, own, features)
        return found

    def end_task(self, context):
        self.features[context.task] = context.observe([(0, i) for i in range(8)]).features
        self.trained_head = context.model.head.weight.detach().clone()
        self._watch_numbers(super().end_task, context)

    def _watch_numbers(self, part, context):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        part(context)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        self.drawn.append(not (torch.equal(before[0], after[0]) and before[1:] == after[1:]))


def trainer(folder, method=None, **settings):
    settings = {"model": None, "stream": None, "save_full_weights": "all", **settings}
    model = settings.pop("model") or tiny.plain()
    return tiny.trainer(folder, method=method or create("der_mcg", **SMALL), model=model, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    own = trainer(tmp_path_factory.mktemp("mcg"), Recording(DERMCGConfig(**SMALL)))
    own.train()
    return own


def files(run, task):
    folder = run.folder.root / f"task-{task}"
    return load_file(folder / "method.safetensors"), ViTForImageClassification.from_pretrained(folder).state_dict()


# ---- an expert -------------------------------------------------------------------------------------------------------


def test_auxiliary_targets():
    assert auxiliary_targets(torch.tensor([3, 12, 10, 0]), 10).tolist() == [0, 3, 1, 0]


def test_the_loss_of_a_stream(run):
    tasks = [list(task.classes) for task in run.stream.tasks]
    for step in (run.method.steps[7], run.method.steps[-1]):
        seen = sum(tasks[: step.task + 1], [])
        logits = [*step.older, step.own]
        z = torch.cat([own[:, classes] for own, classes in zip(logits, tasks, strict=False)], 1)
        expected = F.cross_entropy(z, torch.tensor([seen.index(y) for y in step.labels]), reduction="none")
        if step.task:
            features, weight = step.auxiliary
            new = [tasks[step.task].index(y) + 1 if y in tasks[step.task] else 0 for y in step.labels.tolist()]
            expected += F.cross_entropy(features @ weight.T, torch.tensor(new), reduction="none")
            assert weight.shape == (3, 24) and 0 in new
        else:
            assert step.auxiliary is None
        torch.testing.assert_close(step.found, expected)
    assert (run.method.steps[7].task, run.method.steps[-1].task) == (0, 2)


def test_the_auxiliary_head_learns(run):
    kept = [step.auxiliary[1] for step in run.method.steps if step.task == 1]
    assert all(not torch.equal(a, b) for a, b in zip(kept, kept[1:], strict=False))
    assert run.method.auxiliary is None  # it is dropped afterwards


class OneStep(DERMCG):
    name = "one_step_for_tests"

    def loss(self, context, batch, output, losses):
        features = self._features
        found = super().loss(context, batch, output, losses)
        if self.auxiliary is not None:
            new = self.tasks[-1]
            targets = torch.tensor([new.index(y) + 1 if y in new else 0 for y in batch.labels.tolist()])
            weight = self.auxiliary.detach().clone().requires_grad_()
            own = F.cross_entropy(features.detach() @ weight.T, targets, reduction="none")
            self.last = weight, torch.autograd.grad(own.mean(), weight)[0], own.detach(), found.detach(), features
            (self.with_grad,) = torch.autograd.grad(found.sum(), features, retain_graph=True)
        return found

    def attach(self, context, optimizer):
        handles = [*super().attach(context, optimizer), optimizer.register_step_post_hook(self.look)]
        self.groups = [dict(group) for group in optimizer.param_groups]
        return handles

    def look(self, optimizer, *_):
        if self.auxiliary is not None:
            weight, gradient, *_ = self.last
            group = optimizer.param_groups[-1]
            assert group["params"][0] is self.auxiliary
            torch.testing.assert_close(self.auxiliary, weight - group["lr"] * gradient)


@pytest.mark.parametrize("reinit", [True, False])
def test_steps_of_the_auxiliary_head(tmp_path, reinit):
    method = OneStep(DERMCGConfig(**{**SMALL, "gate_epochs": 0, "tuning_epochs": 0}))
    settings = {"optim": "sgd", "head_learning_rate": 0.03, "max_grad_norm": 0.0, "num_train_epochs": 1}
    own = trainer(tmp_path, method, reinit_optimizer=reinit, **settings)
    own.train_task(0)
    assert not any(group.get("auxiliary") for group in method.groups)
    own.train_task(1)
    assert [group["lr"] for group in method.groups if group.get("auxiliary")] == [0.03]
    *_, own_loss, found, _ = method.last
    assert (found > own_loss).all() and method.with_grad.abs().max() > 0
    if not reinit:
        own.train_task(2)
        assert len([group for group in method.groups if group.get("auxiliary")]) == 1


def test_older_experts_stay_to_the_bit(run):
    (second, weights), (third, _) = files(run, 2), files(run, 3)
    head = ("expert.0.classifier.weight", "expert.0.classifier.bias")
    names = [name for name in second if name.startswith("expert.0.")]
    assert len(names) == len(weights) and set(head) < set(names)
    assert all(torch.equal(second[name], third[name]) for name in names if name not in head)
    for name, value in weights.items():  # the second was the model
        if "classifier" not in name:
            assert torch.equal(third[f"expert.1.{name}"], value)
    context, own = run.method.context, run.stream_model.trainable()
    for expert, values in enumerate(run.method.experts):
        with exchanged(own, values):
            features = context.observe([(0, i) for i in range(8)]).features
        assert torch.equal(features, run.method.features[expert])


# ---- heads and gate --------------------------------------------------------------------------------------------------


def test_heads_are_tuned_from_the_second_task_on(run):
    first = run.stream.tasks[0].classes
    tensors = [files(run, task) for task in (1, 2, 3)]
    heads = [tensors[0][1]["classifier.weight"], *(own[0]["expert.0.classifier.weight"] for own in tensors[1:])]
    rows = [head[list(first)] for head in heads]
    others = [label for label in range(tiny.CLASSES) if label not in first]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    assert torch.equal(heads[0][others], heads[2][others])  # which nobody reads
    last = list(run.stream.tasks[2].classes)
    assert not torch.equal(run.method.trained_head[last], tensors[2][1]["classifier.weight"][last])


def test_the_gate_goes_on_from_where_it_was(run):
    tensors = [files(run, task)[0] for task in (1, 2, 3)]
    start = tiny.plain().state_dict()
    backbones = [{k: v for k, v in own.items() if k.startswith("gate.backbone.")} for own in tensors]
    assert not any("classifier" in name for name in backbones[0]) and len(backbones[0]) == len(start) - 2
    name = "gate.backbone.vit.layers.1.mlp.fc1.weight"
    steps = [start[name.removeprefix("gate.backbone.")], *(own[name] for own in backbones)]
    assert all(not torch.equal(a, b) and (a - b).abs().max() < 0.1 for a, b in zip(steps, steps[1:], strict=False))
    assert [sum(name.startswith("gate.centroids.") for name in own) for own in tensors] == [1, 2, 3]
    assert tensors[2]["gate.weight"].shape == (6, 6) and run.method.gate.sizes == [2, 2, 2]
    model = files(run, 3)[1]
    assert not torch.equal(model[name.removeprefix("gate.backbone.")], backbones[2][name])


def test_a_gate_learns_which_task_an_image_is_of(tmp_path):
    settings = {**SMALL, "gate_epochs": 10, "gate_batch_size": 16, "gate_learning_rate": 0.03, "tuning_epochs": 0}
    own = trainer(tmp_path, create("der_mcg", **settings), num_train_epochs=1)
    own.train_task(0)
    own.train_task(1)
    gate, context, right = own.method.gate, own._context, []
    with exchanged(own.stream_model.trainable(), gate.backbone):
        for task in (0, 1):
            features = context.observe([(task, i) for i in range(16)]).features
            right += (task_scores(gate.scores(features), gate.sizes).argmax(-1) == task).tolist()
    assert sum(right) > 0.9 * len(right)


def test_no_number_is_drawn_globally(run):
    assert run.method.drawn == [False] * 6


# ---- predictions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(run, pixels, combine_by="multiply"):
    """What separate models with the values of the experts and of the gate say."""

    def model(values):
        made = copy.deepcopy(run.model).eval()
        made.load_state_dict({**made.state_dict(), **values})
        return made

    method, tasks = run.method, [list(task.classes) for task in run.stream.tasks]
    scores = torch.empty(len(pixels), 6)
    for values, classes in zip([*method.experts, {}], tasks, strict=True):
        scores[:, classes] = model(values)(pixel_values=pixels).logits[:, classes]
    features = tiny_features(model(method.gate.backbone), pixels)
    best = torch.stack([(features @ own.T).amax(-1) for own in method.gate.centroids], 1)
    weights = (best / 12).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(pixels)))
    task_of = torch.tensor([next(t for t, classes in enumerate(tasks) if label in classes) for label in range(6)])
    return combine(scores, weights[:, task_of].log(), combine_by)


def tiny_features(model, pixels):
    return model.vit(pixels).last_hidden_state[:, 0]


def pixels_of(run, task):
    test = run.stream.test(task)
    images = [test[i]["image"] for i in range(len(test))]
    return images, tiny.processor()(images, return_tensors="pt")["pixel_values"]


def test_predictions_are_those_of_all_experts(run):
    images, pixels = pixels_of(run, 1)
    expected = by_hand(run, pixels)
    torch.testing.assert_close(torch.as_tensor(run.predict(run.stream.test(1)).predictions), expected)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    classifier = load_pretrained(run.folder.root)
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(pixels).logits, expected)  # by position
        torch.testing.assert_close(classifier.model(pixel_values=pixels, return_dict=False)[0], expected)
    found = classifier.predict(images)
    assert [answer[0]["label"] for answer in found] == [f"class {label}" for label in expected.argmax(-1)]
    pipe = transformers.pipeline(
        "image-classification", model=classifier.model, image_processor=classifier.processor, device="cpu"
    )
    assert [answer[0]["label"] for answer in pipe(images)] == [answer[0]["label"] for answer in found]
    classifier.model.requires_grad_(False)
    torch.testing.assert_close(classifier.model(pixel_values=pixels).logits, expected)
    state = classifier.model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


@pytest.fixture(autouse=True, scope="module")
def _registered(run):
    """Recorded runs are loaded by the name of their method."""
    with pytest.MonkeyPatch.context() as patch:
        from pgp_hf.methods import METHODS

        patch.setitem(METHODS, Recording.name, Recording)
        yield


def test_in_half_precision(run):
    _, pixels = pixels_of(run, 2)
    expected = by_hand(run, pixels)
    classifier = load_pretrained(run.folder.root, dtype=torch.bfloat16)
    with torch.no_grad():
        found = classifier.model(pixel_values=pixels.bfloat16()).logits.float()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max() and not torch.equal(found, expected)


def test_weights_may_be_added_as_logarithms(run, monkeypatch):
    _, pixels = pixels_of(run, 0)
    monkeypatch.setattr(run.method.config, "combine", "log")
    found = torch.as_tensor(run.predict(run.stream.test(0)).predictions)
    torch.testing.assert_close(found, by_hand(run, pixels, "log"))


def test_a_single_expert_predicts_alone(run):
    _, pixels = pixels_of(run, 0)
    folder = run.folder.root / "task-1"
    with torch.no_grad():
        alone = ViTForImageClassification.from_pretrained(folder).eval()(pixel_values=pixels).logits
        together = load_pretrained(folder, eval_mask="none").model(pixel_values=pixels).logits
    assert torch.equal(alone, together)


def test_within_a_task_scores_stand_side_by_side(run):
    (one, first), (two, second) = run.method.within[1], run.method.within[2]
    tasks = [list(task.classes) for task in run.stream.tasks]
    for own, found, older in ((one, first, tasks[:1]), (two, second, tasks[:2])):
        old = sum(older, [])
        rest = [label for label in range(6) if label not in old]
        assert torch.equal(found[:, rest], own[:, rest])
        assert all(not torch.allclose(found[:, label], own[:, label]) for label in old)


def test_where_tasks_are_known_there_is_no_gate(tmp_path):
    own = trainer(tmp_path, model=tiny.plain("last:1"), stream=tiny.stream(scenario="task_incremental"))
    own.train_task(0)
    own.train_task(1)
    tensors, content = (
        load_file(tmp_path / "task-2" / "method.safetensors"),
        json.loads((tmp_path / "task-2" / "method.json").read_text()),
    )
    assert not any(name.startswith("gate.") for name in tensors) and content["adjusts_logits"]
    assert not any("layers.0" in name for name in tensors) and any("layers.1" in name for name in tensors)
    assert "side by side" in content["card"]["sentence"]
    _, pixels = pixels_of(own, 0)
    expert = copy.deepcopy(own.model).eval()
    expert.load_state_dict({**expert.state_dict(), **own.method.experts[0]})
    classes = list(own.stream.tasks[0].classes)
    with torch.no_grad():
        expected = expert(pixel_values=pixels).logits[:, classes]
    found = torch.as_tensor(own.predict(own.stream.test(0)).predictions)
    torch.testing.assert_close(found[:, classes], expected)


# ---- what lasts ------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, task):
        self.task = task

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("task", "again"), [pytest.param(0, "in the same trainer", marks=pytest.mark.slow), (1, "in a new process")]
)
def test_resumed_within_a_task(run, tmp_path, task, again):
    stop = StopAt(task)
    stop.trainer = resumed = trainer(tmp_path, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    stop.task = None
    if again == "in a new process":
        resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    for t in (1, 2, 3):
        for one, two in zip(files(resumed, t), files(run, t), strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one), t


def test_what_the_card_says(run):
    card = (run.folder.root / "task-3" / "README.md").read_text()
    assert "DER with a multi-centroid gate (without pruning, after the released code)" in card
    assert (
        "all experts (3 so far) and the gate" in card and "kept 12 images" in card and "raises negative ones" in card
    )
    assert "pruning masks" in card and "CVPR 2021" in card and "scores of the model alone" in card


def test_a_state_of_another_method():
    for tensors, values, message in (
        ({}, {}, "tasks=None: expected each task's classes"),
        ({"expert.0.a": torch.zeros(1)}, {"tasks": [[0]]}, r"has expert.0.a, besides 1 tasks"),
        ({}, {"tasks": [[0], [1]]}, "has experts of different kinds, besides 2 tasks"),
        (
            {"gate.centroids.0": torch.zeros(1, 2), "expert.0.a": torch.zeros(1)},
            {"tasks": [[0], [1], [2]]},
            "different",
        ),
        ({"gate.centroids.0": torch.zeros(1, 2)}, {"tasks": [[0]]}, "a gate of 1 tasks"),
        ({"memory.x": torch.zeros(1)}, {"tasks": []}, "it is another's"),
    ):
        with pytest.raises(ValueError, match=message):
            DERMCG().load_state(MethodState(tensors, values))


# ---- what is refused -------------------------------------------------------------------------------------------------


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 6}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def two_layers():
    model = tiny.plain()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 6))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.model(), "the backbone of this l2p model does not learn"),
        (lambda: tiny.plain("lora:2"), "the backbone of this lora:2 model does not learn"),
        (lambda: tiny.plain("head"), "the backbone of this head model does not learn: use a model with"),
        (resnet, "this ResNetForImageClassification keeps running statistics"),
        (two_layers, "needs a head with one linear layer, and that of this ViTForImageClassification is a Sequential"),
    ],
)
def test_models_that_it_does_not_go_with(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combine": "add"}, "combine='add' is unknown: choose one of multiply, log"),
        ({"gate_temperature": 0.0}, "gate_temperature=0.0 is out of range"),
        ({"gate_learning_rate": float("inf")}, "gate_learning_rate=inf is out of range"),
        ({"centroids_per_class": 0.5}, "centroids_per_class=0.5 is out of range: use a finite number from 1"),
        ({"tuning_epochs": -1}, "tuning_epochs=-1 is out of range"),
        ({"gate_batch_size": 0}, "gate_batch_size=0 is out of range"),
        ({"memory_size": 0}, "memory_size=0 is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        create("der_mcg", **settings)
