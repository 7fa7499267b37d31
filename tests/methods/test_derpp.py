"""Dark experience replay: the loss, the memory of a stream, and how both go on after an interruption."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_ewc import same, trainer, weights
from transformers import TrainerCallback

from pgp_hf.data.images import AugmentedImages, ImageCollator
from pgp_hf.methods import DERpp, DERppConfig, FineTuning, MethodState, create
from pgp_hf.methods.derpp import dark_experience
from pgp_hf.runs.revision import Revision

pytestmark = pytest.mark.usefixtures("without_figures")


def replay(memory_size=7, **settings):
    return create("derpp", memory_size=memory_size, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("derpp")
    own = trainer(folder, replay())
    own.train()
    return own, folder


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("ft")
    trainer(folder, None).train()
    return folder


def memory_of(folder):
    return load_file(folder / "method.safetensors")


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_worked_numbers():
    z, h, y = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0])
    assert dark_experience(z, h, z, y, 1.0, 0.0).item() == pytest.approx(2 / 3)  # a sum over classes would be 2
    assert dark_experience(z, h, z, y, 0.1, 0.5).item() == pytest.approx(1.27047, abs=1e-5)
    both = dark_experience(z.expand(2, -1), torch.stack([h[0], z[0]]), z.expand(2, -1), torch.tensor([0, 1]), 0.1, 0.0)
    assert both.tolist() == pytest.approx([0.1 * 2 / 3, 0.0])


@pytest.mark.parametrize("settings", [{"memory_size": 0}, {"alpha": 0.0, "beta": 0.0}])
def test_neutral_it_is_fine_tuning(fine_tuned, tmp_path, settings):
    trainer(tmp_path, replay(**settings)).train()
    for t in (1, 2, 3):
        assert same(weights(tmp_path / f"task-{t}"), weights(fine_tuned / f"task-{t}"))


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"beta": 0.0}])
def test_each_term_counts(run, fine_tuned, tmp_path, settings):
    trainer(tmp_path, replay(**settings)).train_task(0)
    found = weights(tmp_path / "task-1")
    assert not same(found, weights(fine_tuned / "task-1")) and not same(found, weights(run[1] / "task-1"))


def test_old_classes_are_kept_alive(tmp_path):
    """With every class in the loss and a large memory, the first task is not forgotten; fine-tuning forgets it."""
    found = []
    for method in (None, replay(96, alpha=1.0, beta=2.0)):
        own = trainer(tmp_path / str(len(found)), method, train_mask="seen", learning_rate=0.03, num_train_epochs=4)
        own.train()
        found.append(own.results.to_dict()["average_accuracy"])
    assert found[1] > found[0] + 10


# ---- the memory ------------------------------------------------------------------------------------------------------


def test_what_is_kept(run):
    own, folder = run
    stream = tiny.stream()
    for t in (1, 2, 3):
        tensors, content = Revision.read(folder / f"task-{t}").method()
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "places": (7, 2), "labels": (7,), "logits": (7, 6)
        }  # fmt: skip
        assert content["state"] == {"presented": 32 * t, "step": 8 * t}
        for (task, index), label in zip(tensors["places"].tolist(), tensors["labels"].tolist(), strict=True):
            assert task < t and stream.train(task).labels[index] == label
    assert {task for task, _ in own.method.memory.examples.places.tolist()} > {0}
    card = (folder / "README.md").read_text()
    assert "kept 7 images (7 at most)" in card and "without keeping old images" not in card
    assert "Dark experience replay (DER++)" in card and "NeurIPS 2020" in card


def test_scores_stay_those_of_their_time(run):
    first, last = memory_of(run[1] / "task-1"), memory_of(run[1] / "task-3")
    then = {tuple(place): logits for place, logits in zip(first["places"].tolist(), first["logits"], strict=True)}
    both = [(place, row) for row, place in enumerate(last["places"].tolist()) if tuple(place) in then]
    assert both and all(torch.equal(last["logits"][row], then[tuple(place)]) for place, row in both)


class StopAt(TrainerCallback):
    def __init__(self, task):
        self.task = task

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("again", "task"),
    [
        ("in a new process", 1),
        ("in the same trainer", 0),
        pytest.param("in a new process", 0, marks=pytest.mark.slow),
        pytest.param("in the same trainer", 1, marks=pytest.mark.slow),
    ],
)
def test_resumed_within_a_task(run, tmp_path, task, again):
    stop = StopAt(task)  # two steps behind the checkpoint
    stop.trainer = resumed = trainer(tmp_path, replay(), callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    assert resumed.method.step == 8 * task + 6
    if again == "in a new process":
        resumed = trainer(tmp_path, replay())
    else:
        stop.task = None
    resumed.train(resume_from_checkpoint=True)
    for t in (1, 2, 3):
        assert same(weights(tmp_path / f"task-{t}"), weights(run[1] / f"task-{t}"))
        assert same(memory_of(tmp_path / f"task-{t}"), memory_of(run[1] / f"task-{t}"))


@pytest.mark.parametrize(
    ("adapter", "head", "scenario"), [("dualprompt", "linear", "task_incremental"), ("clip", "statistics", "online")]
)
def test_other_adapters_and_scenarios(tmp_path, adapter, head, scenario):
    own = trainer(tmp_path, replay(), model=tiny.model(adapter, head=head), stream=tiny.stream(scenario=scenario))
    own.train()
    epochs = 1 if scenario == "online" else 2
    assert own.method.memory.presented == 48 * epochs and len(own.method.memory) == 7


# ---- what the trainer lends a method ---------------------------------------------------------------------------------


class Lent(FineTuning):
    """Keeps what it is lent."""

    def begin_task(self, context):
        self.context = context


def test_old_images_are_augmented_by_counters_and_in_order(tmp_path):
    own = trainer(tmp_path, Lent(), augmentation="crop_flip", num_train_epochs=1)
    own.train_task(0)
    own.train_task(1)
    places, state = [(1, 3), (0, 5), (0, 0), (1, 3)], torch.get_rng_state()
    batch = own.method.context.old_images(places, 9)
    assert list(zip(batch.tasks.tolist(), batch.indices.tolist(), strict=True)) == places
    assert torch.equal(torch.get_rng_state(), state)
    stream = tiny.stream()
    for place, label, pixels in zip(places, batch.labels, batch.inputs["pixel_values"], strict=True):
        images = AugmentedImages(stream.train(place[0]), "crop_flip", own.args.crop_min_scale, own.args.seed, place[0])
        images.set_epoch(9)
        expected = ImageCollator(tiny.processor())([images[place[1]]])
        assert label == expected["labels"][0] and torch.equal(pixels, expected["pixel_values"][0])
    other = own.method.context.old_images(places, 10)
    assert not torch.equal(other.inputs["pixel_values"], batch.inputs["pixel_values"])


def test_old_images_select_their_own_prompts(tmp_path):
    own = trainer(tmp_path, Lent(), model=tiny.model("dualprompt"), num_train_epochs=1)
    own.train_task(0)
    own.train_task(1)
    context, model, tuner = own.method.context, own.model, own.stream_model
    batch = context.old_images([(0, i) for i in range(16)], 0)
    tuner.begin_task(1)  # as within it
    model.eval()
    with torch.no_grad():
        expected = tuner.class_logits(model(**batch.inputs))
    chosen = tuner.selected_prompts.clone()
    model.train()
    frozen = list(model.modules())[-1].eval()
    logits = tuner.class_logits(context.forward(batch))
    assert torch.equal(logits, expected) and torch.equal(tuner.selected_prompts, chosen) and (chosen == 0).any()
    assert logits.requires_grad and model.training and not frozen.training
    tuner.class_logits(model(**batch.inputs))
    assert (tuner.selected_prompts == 1).all()  # which is the task's own, in training


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": -1}, "memory_size=-1 is out of range"),
        ({"alpha": -0.1}, "alpha=-0.1 is out of range"),
        ({"beta": float("inf")}, "beta=inf is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DERppConfig(**settings)


def test_a_collator_that_drops_where_images_are_from(tmp_path):
    own = trainer(tmp_path, replay())
    collate = ImageCollator(tiny.processor())
    own.data_collator = lambda items: {k: v for k, v in collate(items).items() if k not in ("task", "index")}
    with pytest.raises(ValueError, match="the collator drops each image's task and index"):
        own.train_task(0)


def test_a_loss_function_of_ones_own(tmp_path):
    own = trainer(tmp_path, replay())
    own.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    with pytest.raises(ValueError, match="leave compute_loss_func out"):
        own.train_task(0)


def test_a_state_of_another_method():
    with pytest.raises(ValueError, match="expected the integers presented and step"):
        DERpp().load_state(MethodState({}, {"images": 3}))
