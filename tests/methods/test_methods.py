"""The interface of methods: any of them learns with the same trainer, is written, compared, told and resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from foreign import Anchor, AnchorConfig
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback

from pgp_hf import PGPTrainer, PGPTrainingArguments, ProjectionConfig, StreamTrainer, methods
from pgp_hf.methods import (
    METHODS,
    ContinualMethod,
    FineTuning,
    ProjectedPrompts,
    create,
    register,
)
from pgp_hf.runs.revision import Revision
from pgp_hf.training.loss import cross_entropy

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "methods.md"

pytestmark = pytest.mark.usefixtures("without_figures")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def anchored(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("anchored")
    run = tiny.trainer(folder, method=Anchor())
    run.train()
    return run, folder


# ---- fine-tuning, and the first method -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", tiny.some_of(tiny.ADAPTERS, "l2p"))
def test_fine_tuning_is_what_is_left_without_projection(tmp_path, adapter):
    tiny.trainer(tmp_path / "ft", method=None, model=tiny.model(adapter)).train()
    unprojected = ProjectedPrompts(ProjectionConfig(method="none"))
    tiny.trainer(tmp_path / "none", method=unprojected, model=tiny.model(adapter)).train()
    assert same(weights(tmp_path / "ft"), weights(tmp_path / "none"))


def test_what_is_recorded_of_fine_tuning(tmp_path):
    tiny.trainer(tmp_path, method=FineTuning()).train_task(0)
    results, method = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "method.json"))
    assert (results["method"], results["projection"], results["projection_rank"]) == ("fine_tuning", "none", [0])
    assert (method["name"], method["settings"], method["state"]) == ("fine_tuning", {}, {})
    assert load_file(tmp_path / "method.safetensors") == load_file(tmp_path / "projection.safetensors") == {}
    card = (tmp_path / "README.md").read_text()
    assert "Sequential fine-tuning" in card and "was projected" not in card


def test_pgp_trainer_is_the_stream_trainer_with_projected_prompts(tmp_path):
    projection = ProjectionConfig(energy=0.9, key_energy=0.9)
    own = tiny.trainer(tmp_path / "own", projection=projection)
    own.train()
    tiny.trainer(tmp_path / "general", method=ProjectedPrompts(projection)).train()
    assert isinstance(own, PGPTrainer) and isinstance(own, StreamTrainer) and own.projection is own.method.projection
    assert same(weights(tmp_path / "own"), weights(tmp_path / "general"))
    content = json.loads((tmp_path / "own" / "method.json").read_text())
    assert content["name"] == "projected_prompts" and content["settings"] == projection.to_dict()
    assert json.loads((tmp_path / "own" / "results.json").read_text())["method"] == "l2p"


# ---- a method of one's own -------------------------------------------------------------------------------------------


def test_a_method_changes_what_is_learned_and_neutral_it_does_not(anchored, tmp_path):
    _, folder = anchored
    tiny.trainer(tmp_path / "ft", method=None).train()
    tiny.trainer(tmp_path / "neutral", method=Anchor(AnchorConfig(strength=0.0))).train()
    plain = weights(tmp_path / "ft")
    assert same(weights(tmp_path / "neutral"), plain) and not same(weights(folder), plain)
    assert same(weights(folder / "task-1"), weights(tmp_path / "ft" / "task-1"))  # nothing to draw to yet


def test_what_a_method_remembers_is_written_with_every_task(anchored):
    run, folder = anchored
    for t in (1, 2, 3):
        tensors, content = Revision.read(folder / f"task-{t}").method()
        adapter = weights(folder / f"task-{t}")
        assert set(tensors) == set(run.stream_model.trainable()) <= set(adapter)
        assert all(torch.equal(tensor, adapter[name]) for name, tensor in tensors.items())
        assert content["state"] == {"images": t * 32} and content["settings"] == {"strength": 1.0}
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "anchor_for_tests" and "method.safetensors" in results["sha256"]


def test_the_card_tells_of_the_method(anchored):
    card = (anchored[1] / "README.md").read_text()
    for text in ("Anchored weights", "eights are drawn to where they were", "It knows no old image.", "strength=1.0"):
        assert text in card, text


class StopAt(TrainerCallback):
    def __init__(self, task, step):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("again", tiny.some_of(["in a new process", "in the same trainer"], "in a new process"))
def test_resumed_within_a_task_a_method_remembers_what_it_did(anchored, tmp_path, task, again):
    stop = StopAt(task, 6)  # two steps behind the checkpoint: what the method counted there is counted once
    stop.trainer = resumed = tiny.trainer(tmp_path, method=Anchor(), callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    assert resumed.method.images == task * 32 + 24
    if again == "in a new process":
        resumed = tiny.trainer(tmp_path, method=Anchor())
    else:
        stop.task = None
    resumed.train(resume_from_checkpoint=True)
    reference, folder = anchored
    for t in (1, 2, 3):
        assert same(weights(tmp_path / f"task-{t}"), weights(folder / f"task-{t}"))
    assert resumed.method.images == reference.method.images == 96


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Anchor(AnchorConfig(strength=2.0)), "has strength=1.0, this one 2.0"),
        (FineTuning, "method='anchor_for_tests', this one 'fine_tuning'"),
        (lambda: ProjectedPrompts(ProjectionConfig(method="none")), "method='anchor_for_tests', this one 'l2p'"),
    ],
)
def test_a_run_of_another_method_is_not_continued(anchored, tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, method=method()).train(resume_from_checkpoint=str(anchored[1]))
    assert not (tmp_path / "task-1").exists()


def test_a_run_that_does_not_name_its_method_is_one_of_projected_prompts(tmp_path):
    """As it was written before there were others."""
    for name, method in (("old", ProjectedPrompts(ProjectionConfig())), ("other", Anchor())):
        tiny.trainer(tmp_path / name, method=method).train_task(0)
        for folder in (tmp_path / name, tmp_path / name / "task-1"):
            (folder / "method.json").unlink()
            (folder / "method.safetensors").unlink()
            (folder / "digests.json").unlink()
            results = json.loads((folder / "results.json").read_text())
            del results["sha256"]["method.safetensors"]
            (folder / "results.json").write_text(json.dumps(results))
    old = tiny.trainer(tmp_path / "old", method=ProjectedPrompts(ProjectionConfig()))
    old.train(resume_from_checkpoint=True)
    assert len(old.results.matrix) == 3
    with pytest.raises(ValueError, match="does not say by which method"):
        tiny.trainer(tmp_path / "other", method=Anchor()).train(resume_from_checkpoint=True)


def test_a_scenario_that_a_method_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="'anchor_for_tests' is not defined for scenario='online': it has class_incr"):
        tiny.trainer(tmp_path, method=Anchor(), stream=tiny.stream(scenario="online"))


# ---- labels, images of other tasks, a loss of the user's -------------------------------------------------------------


class Replay(ContinualMethod):
    """Trains on the first images of the task before as well."""

    name = "replay_for_tests"

    def train_images(self, context, images):
        self.seen = []
        if context.task == 0:
            return images
        return ConcatDataset([images, Subset(context.stream.train(context.task - 1), range(4))])

    def loss(self, context, batch, output, losses):
        self.seen += zip(batch.tasks.tolist(), batch.indices.tolist(), losses.tolist(), strict=True)
        return losses


def test_an_image_outside_the_classes_of_the_loss_is_an_error(tmp_path):
    run = tiny.trainer(tmp_path, method=Replay())
    run.train_task(0)
    with pytest.raises(ValueError, match=r"labels outside the classes of the loss.*train_mask='seen'"):
        run.train_task(1)


@pytest.mark.parametrize("head", ["linear", "statistics"])
def test_images_of_older_tasks_are_trained_on(tmp_path, head):
    run = tiny.trainer(tmp_path, method=Replay(), model=tiny.model(head=head), train_mask="seen")
    run.train_task(0)
    run.train_task(1)
    old = [(index, loss) for task, index, loss in run.method.seen if task == 0]
    assert sorted(index for index, _ in old) == [0, 0, 1, 1, 2, 2, 3, 3]  # two epochs
    assert all(loss > 0 for _, loss in old)
    assert sorted({index for task, index, _ in run.method.seen if task == 1}) == list(range(16))


def test_cross_entropy_counts_the_given_classes_alone():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, 0.0]], requires_grad=True)
    for classes, loss, old in (([3, 4], 0.3133, [0, 0, 0]), ([0, 1, 2, 3, 4], 1.5237, [0.592, 0.080, 0.029])):
        found = cross_entropy(logits, torch.tensor([3]), classes)
        assert found.tolist() == pytest.approx([loss], abs=1e-4)
        gradient = torch.autograd.grad(found.sum(), logits)[0][0, :3].tolist()
        assert (
            gradient == pytest.approx(old, abs=5e-4) if len(classes) > 2 else gradient == old
        )  # pushed down, or free
    with pytest.raises(ValueError, match=r"1 of 2 images .*: \[3\] are not among \[0, 1, 4\]"):
        cross_entropy(logits.expand(2, -1), torch.tensor([3, 4]), [0, 1, 4])


def test_a_loss_function_of_ones_own_is_used(tmp_path):
    calls = []

    def own(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    tiny.trainer(tmp_path, method=None, compute_loss_func=own, num_train_epochs=1).train_task(0)
    assert calls == [4] * 4


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_methods_by_name():
    assert set(METHODS) >= {"fine_tuning", "projected_prompts"}
    made = create("projected_prompts", method="functional", energy=0.5)
    assert isinstance(made, ProjectedPrompts) and made.projection.config.energy == 0.5
    assert isinstance(create("fine_tuning"), FineTuning)
    with pytest.raises(
        ValueError,
        match="method 'ewk' is unknown: choose one of bic, der_mcg, derpp, ewc, fine_tuning, gpm, icarl, joint, lwf, "
        "null_space_adam, projected_prompts",
    ):
        create("ewk")
    with pytest.raises(ValueError, match="method 'fine_tuning' has no setting 'strength': it has none"):
        create("fine_tuning", strength=1.0)
    with pytest.raises(ValueError, match="energy=2 is outside"):
        create("projected_prompts", energy=2)
    with pytest.raises(TypeError, match="config is a AnchorConfig: FineTuning takes a NoSettings"):
        FineTuning(AnchorConfig())


@pytest.mark.parametrize(("name", "settings"), [("EWC", {"strength": 100.0}), ("ICaRL", {"memory_per_class": 5})])
def test_a_class_takes_its_settings_by_name(name, settings):
    made = getattr(methods, name)(**settings)
    assert made.settings() == create(made.name, **settings).settings()
    assert all(getattr(made.config, key) == value for key, value in settings.items())
    with pytest.raises(ValueError, match=f"method '{made.name}' has no setting 'streng': it has "):
        getattr(methods, name)(streng=1.0)
    with pytest.raises(TypeError, match=f"{name} takes a config or settings, not both: put {min(settings)} into the "):
        getattr(methods, name)(made.config, **settings)


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(methods.registry, "METHODS", dict(METHODS))
    assert register(Anchor) is Anchor is register(Anchor)
    assert create("anchor_for_tests", strength=3.0).config == AnchorConfig(3.0)
    with pytest.raises(ValueError, match="method 'fine_tuning' is registered already"):
        register(type("Other", (ContinualMethod,), {"name": "fine_tuning"}))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_describes_itself(name):
    card = create(name).describe()
    assert card.title and card.sentence and not card.sentence.endswith(".") and all(card.limits)


# ---- nothing to protect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "without", "condition"),
    [
        ("clip", {"image_length": 0}, "functional"),
        ("dualprompt", {"general_length": 0}, "pgp"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("clip", {"image_length": 0}, "pgp"),
                ("clip", {"image_length": 0}, "frozen"),
                ("dualprompt", {"general_length": 0}, "functional"),
                ("dualprompt", {"general_length": 0}, "frozen"),
            )
        ],
    ],
)
def test_an_adapter_without_shared_prompts_says_so_and_trains(tmp_path, adapter, without, condition):
    model = tiny.model(adapter, **without)
    with pytest.warns(UserWarning, match=f"'{condition}' has nothing to protect.*No update will be projected"):
        run = tiny.trainer(tmp_path, method=ProjectedPrompts(ProjectionConfig(method=condition)), model=model)
    run.train()
    assert run.results.rank == [0, 0, 0] and load_file(tmp_path / "projection.safetensors") == {}
    card = (tmp_path / "README.md").read_text()
    assert "No update was projected" in card and "each update of" not in card


def test_the_guides_method_is_learned_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(methods.registry, "METHODS", dict(METHODS))
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = next(block for block in blocks if "class Anchor" in block)
    monkeypatch.chdir(tmp_path)

    def arguments(folder):
        return PGPTrainingArguments(folder, use_cpu=True, num_train_epochs=1, disable_tqdm=True)

    names = {
        "PGPTrainingArguments": arguments,
        "model": tiny.model(),
        "stream": tiny.stream(),
        "processor": tiny.processor(),
    }
    exec(compile(code, GUIDE.name, "exec"), names)
    assert json.loads((tmp_path / "out" / "method.json").read_text())["name"] == "anchor"
    tensors = load_file(tmp_path / "out" / "method.safetensors")
    assert tensors and all(torch.equal(tensor, weights(tmp_path / "out")[name]) for name, tensor in tensors.items())
    shutil.rmtree(tmp_path / "out" / "task-3")
    expected = weights(tmp_path / "out")
    again = StreamTrainer(
        tiny.model(), arguments("out"), tiny.stream(), method=names["Anchor"](), processing_class=tiny.processor()
    )
    again.train(resume_from_checkpoint=True)
    assert same(weights(tmp_path / "out"), expected)
