"""What a trainer hands to a method: exemplars, the model's view of images, a teacher's output."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils.data import ConcatDataset

from pgp_hf.methods import ContinualMethod

pytestmark = pytest.mark.usefixtures("without_figures")


class Rehearsal(ContinualMethod):
    """Trains on the first three images of each older task as well, and looks at what it is handed."""

    name = "rehearsal_for_tests"

    def __init__(self, config=None):
        super().__init__(config)
        self.seen, self.context = [], None

    def train_images(self, context, images):
        self.context = context
        places = [(task, index) for task in range(context.task) for index in range(3)]
        self.sizes = (len(images), len(places))
        return ConcatDataset([images, context.exemplars(places)]) if places else images

    def loss(self, context, batch, output, losses):
        self.seen += [
            (context.task, *place) for place in zip(batch.tasks.tolist(), batch.indices.tolist(), strict=True)
        ]
        return losses


@pytest.fixture(scope="module", params=["l2p", "full"])
def run(request, tmp_path_factory, without_figures):
    model = tiny.plain() if request.param == "full" else tiny.model(request.param)
    made = tiny.trainer(tmp_path_factory.mktemp("run"), model=model, method=Rehearsal(), train_mask="seen")
    made.train_task(0)
    made.train_task(1)
    return made


def test_exemplars_are_trained_on_once_an_epoch(run):
    second = [place[1:] for place in run.method.seen if place[0] == 1]
    assert run.method.sizes == (16, 3)
    assert sorted(second) == sorted(2 * [*((1, i) for i in range(16)), *((0, i) for i in range(3))])


def test_exemplars_look_different_in_each_epoch(run):
    exemplars = run.method.context.exemplars([(0, index) for index in range(8)])
    looks = []
    for epoch in (0, 1, 0):
        exemplars.set_epoch(epoch)
        looks.append([exemplars[i]["image"].tobytes() for i in range(8)])
    assert looks[0] == looks[2] != looks[1]
    assert [(exemplars[i]["task"], exemplars[i]["index"]) for i in (0, 7)] == [(0, 0), (0, 7)]


@pytest.mark.parametrize("count", [1, 7, 70])
def test_observe_is_prediction(run, count):
    places = [(i % 2, (5 * i) % 16) for i in range(count)]
    state = torch.get_rng_state()
    run.model.train()
    found = run.method.context.observe(places)
    assert run.model.training and torch.equal(torch.get_rng_state(), state)
    assert found.features.shape == (count, 24) and found.logits.shape == (count, 6)
    images = [run.stream.train(task)[index]["image"] for task, index in places]
    pixels = tiny.processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = run.stream_model.class_logits(run.model.eval()(pixel_values=pixels)).float()
    torch.testing.assert_close(found.logits, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_is_the_model_with_other_values(run, autocast):
    context, learner = run.method.context, run.stream_model
    batch = context.old_images([(0, 0), (1, 3)], 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = learner.class_logits(context.forward(batch))
        teacher = {name: value.detach() + 0.1 for name, value in learner.trainable().items()}
        before = {name: value.detach().clone() for name, value in learner.trainable().items()}
        taught = learner.class_logits(context.forward(batch, teacher))
        again = learner.class_logits(context.forward(batch))
        assert own.requires_grad and not taught.requires_grad
        assert torch.equal(own, again) and not torch.allclose(own, taught, atol=1e-2)
        assert all(torch.equal(value, before[name]) for name, value in learner.trainable().items())
        with torch.no_grad():
            for name, value in learner.trainable().items():
                value.copy_(teacher[name])
            torch.clear_autocast_cache()
            assert torch.equal(learner.class_logits(context.forward(batch)), taught)
            for name, value in learner.trainable().items():
                value.copy_(before[name])


def test_nothing_to_observe_is_an_error(run):
    with pytest.raises(ValueError, match="no images to observe"):
        run.method.context.observe([])
