"""The class-statistics head inside an adapter, and a stream learned with it."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F
from transformers import pipeline

from pgp_hf import L2PConfig, metrics
from pgp_hf.training.results import changed_share

NAMES = {label: f"LABEL_{label}" for label in range(6)}
PIXELS = tiny.images(6)

pytestmark = pytest.mark.usefixtures("without_figures")

# ---- inside an adapter -----------------------------------------------------------------------------------------------


def logits(model, pixels=PIXELS, **kwargs):
    with torch.no_grad():
        output = model(pixel_values=pixels, **kwargs)
    return model.base_model.class_logits(output)


def taught(method, classes=4, **kwargs):
    """A model whose statistics hold four of six classes."""
    model = tiny.model(method, head="statistics", **kwargs)
    tuner = model.base_model
    tuner.prepare_stream([[0, 1], [2, 3], [4, 5]], NAMES)
    tuner.begin_task(0)
    pixels = tiny.images(24, seed=1)
    statistics = tuner.statistics.fresh().update(tiny.features(model, pixels), torch.arange(24) % classes)
    tuner.end_task(0)
    tuner.learn_statistics(statistics)
    return model


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_who_speaks(method):
    model, linear = tiny.model(method, head="statistics"), tiny.model(method)
    for one in (model, linear):
        one.base_model.prepare_stream([[0, 1], [2, 3], [4, 5]], NAMES)
    tuner = model.base_model
    with pytest.raises(ValueError, match="knows no class yet"):
        logits(model)
    assert torch.equal(logits(model.train()), logits(linear.train()))  # a training forward pass is never theirs
    for one in (model, linear):
        one.eval()
        one.base_model.begin_task(0)
    trained = logits(linear)
    assert torch.equal(logits(model), trained)
    for one in (model, linear):
        one.base_model.end_task(0)
    x = tiny.features(model, PIXELS)
    tuner.learn_statistics(tuner.statistics.fresh().update(x, torch.tensor([0, 0, 1, 1, 2, 2])))
    assert torch.equal(logits(model), tuner.statistics(x))
    assert torch.isneginf(logits(model)[:, 3:]).all()
    assert torch.allclose(tuner.linear_logits(x), logits(linear), atol=1e-5)
    assert torch.equal(tiny.features(model, PIXELS), x)  # one call back a pass, with what the head reads
    for one in (model, linear):
        one.base_model.begin_task(1)
    assert torch.equal(logits(model), logits(linear))  # evaluation within a task
    tuner.resume_after(1)
    assert torch.equal(logits(model), tuner.statistics(tiny.features(model, PIXELS)))


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_without_the_adapter_the_backbone_speaks(method):
    model, base = taught(method), tiny.backbone(tiny.ADAPTERS[method]).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), base(PIXELS).logits)
    assert torch.equal(model.unload()(PIXELS).logits, base(PIXELS).logits)


def test_the_loss_is_that_of_the_logits_and_gradients_reach_the_head():
    model = taught("l2p")
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        output = model(pixel_values=PIXELS, labels=labels)
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, labels))
    assert torch.equal(model(PIXELS, return_dict=False)[0], output.logits)
    model.train()(pixel_values=PIXELS, labels=labels).loss.backward()
    assert model.base_model.model.classifier.modules_to_save["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_a_failed_pass_leaves_nothing_behind(method):
    model = taught(method)
    expected = logits(model)
    with pytest.raises(ValueError):
        logits(model, PIXELS[:, :, :-1])  # stops in the embeddings
    model.base_model.begin_task(1)
    assert torch.isfinite(logits(model)).all()  # the linear head's
    model.base_model.resume_after(1)
    if method == "dualprompt":
        model.base_model.adapter_config.learned_entries = 1
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", tiny.ADAPTERS)
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_saved_and_loaded_alike(tmp_path, method, options):
    model = taught(method)
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), tmp_path, **options)
    assert torch.equal(logits(loaded), expected)
    assert loaded.base_model.adapter_config.head == "statistics"
    file = load_file(tmp_path / "adapter_model.safetensors")
    extra = {name.rpartition(".")[2]: tensor for name, tensor in file.items() if "_statistics." in name}
    assert {name: tensor.dtype for name, tensor in extra.items()} == {
        "counts": torch.int64,
        "means": torch.float64,
        "scatter": torch.float64,
        "calibration": torch.float64,
    }
    linear = tiny.model(method)
    linear.save_pretrained(tmp_path / "linear", save_embedding_layers=False)
    plain = set(load_file(tmp_path / "linear" / "adapter_model.safetensors"))
    assert {name for name in file if "_statistics." not in name} == plain


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_through_the_pipeline(tmp_path, method):
    model = taught(method)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), tmp_path)
    classify = pipeline("image-classification", model=loaded, image_processor=tiny.processor(), top_k=6)
    picture = tiny.stream().test(0)[0]["image"]
    scores = {found["label"]: found["score"] for found in classify(picture)}
    pixels = tiny.processor()(picture, return_tensors="pt")["pixel_values"]
    expected = model.base_model.statistics(tiny.features(model, pixels)).softmax(-1)[0]
    names = model.base_model.adapter_config.id2label
    assert scores == pytest.approx({names[c]: float(p) for c, p in enumerate(expected)}, abs=1e-6)


@pytest.mark.parametrize("first", ["linear", "statistics"])
def test_adapters_with_other_heads_side_by_side(tmp_path, first):
    second = {"linear": "statistics", "statistics": "linear"}[first]
    alone = {"linear": tiny.model(), "statistics": taught("l2p")}
    expected = {head: logits(model) for head, model in alone.items()}
    for head, model in alone.items():
        model.save_pretrained(tmp_path / head, save_embedding_layers=False)
    model = PeftModel.from_pretrained(tiny.backbone(), tmp_path / first)
    model.load_adapter(tmp_path / second, adapter_name="other")
    assert torch.equal(logits(model), expected[first])
    model.set_adapter("other")
    assert torch.equal(logits(model), expected[second])
    model.save_pretrained(tmp_path / "both", selected_adapters=["other"], save_embedding_layers=False)
    again = load_file(tmp_path / "both" / "other" / "adapter_model.safetensors")
    assert again.keys() == load_file(tmp_path / second / "adapter_model.safetensors").keys()
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected[second])
    model.add_adapter("third", tiny.config(head="statistics"))
    model.set_adapter("third")
    with pytest.raises(ValueError, match="knows no class yet"):
        logits(model.eval())
    duplicate = copy.deepcopy(model)
    duplicate.set_adapter("other")
    assert torch.equal(logits(duplicate), expected[second])


def test_a_head_that_is_not_saved_speaks_through_statistics(tmp_path):
    model = taught("l2p", modules_to_save=[])
    expected = logits(model)
    model.add_adapter("other", tiny.config())  # wraps the classifier
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert torch.isfinite(logits(model)).all()


def test_adapters_from_transformers_have_the_head_too(tmp_path):
    model = taught("l2p")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = tiny.backbone()
    base.load_adapter(tmp_path)
    assert torch.equal(base.eval()(PIXELS).logits, logits(model))


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_half_precision(method):
    model = taught(method)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), model.base_model.statistics(tiny.features(model, PIXELS)))
    cast = copy.deepcopy(model).to(torch.bfloat16)
    found = logits(cast, PIXELS.to(torch.bfloat16))
    assert found.dtype == torch.float32 and torch.equal(torch.isneginf(found), torch.isneginf(expected))
    assert torch.equal(cast.base_model.statistics.scatter, model.base_model.statistics.scatter)


def test_configuration_refuses():
    with pytest.raises(ValueError, match="head='quadratic' is unknown: choose one of linear, statistics"):
        L2PConfig(head="quadratic")
    with pytest.raises(ValueError, match=r"shrinkage=0 is outside \(0, 1\]"):
        L2PConfig(shrinkage=0)


@pytest.mark.parametrize(("method", "settings"), [("l2p", {"modules_to_save": []}), ("clip", {})])
def test_a_pass_that_failed_leaves_nothing_on_the_unloaded_model(method, settings):
    model = taught(method, **settings)
    with pytest.raises(ValueError, match="doesn't match model"):
        logits(model, tiny.images(2, size=17))
    base, expected = model.unload(), tiny.backbone(tiny.ADAPTERS[method])
    with torch.no_grad():
        if method == "clip":
            found, expected = (one.get_image_features(PIXELS).pooler_output for one in (base, expected))
        else:
            found, expected = (one(pixel_values=PIXELS).logits for one in (base, expected))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("base", [tiny.backbone("backbone"), tiny.backbone(num_labels=0)])
def test_a_model_without_a_head_waits_for_its_classes(tmp_path, base):
    model = tiny.model(base=base, head="statistics")
    assert model.base_model.class_names is None and len(model.base_model.statistics.counts) == 0
    with pytest.raises(TypeError, match=f"{type(base).__name__} has no classifier: use a model with a head"):
        tiny.trainer(tmp_path, model=model)


# ---- a stream --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=tiny.some_of(tiny.ADAPTERS, "l2p", "clip"))
def run(request, tmp_path_factory):
    """A finished run with a statistics head: (method, trainer, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = tiny.trainer(folder, model=tiny.model(request.param, head="statistics"), num_train_epochs=1)
    trainer.train()
    return request.param, trainer, folder


def read(folder):
    return json.loads((folder / "results.json").read_text())


def task_features(model, images, processor):
    """The head's inputs for all of a task's images, and their labels."""
    items = [images[i] for i in range(len(images))]
    pixels = processor([item["image"] for item in items], return_tensors="pt")["pixel_values"]
    return tiny.features(model, pixels), torch.tensor([item["label"] for item in items])


def test_both_heads_are_measured_on_the_same_run(run, tmp_path):
    method, trainer, folder = run
    results = read(folder)
    assert results["head"] == "statistics" and set(results["heads"]) == {"linear", "statistics"}
    summary = {
        "average_accuracy",
        "forgetting",
        "forgetting_clipped",
        "backward_transfer",
        "learning_accuracy",
        "per_task_average_accuracy",
        "task_incremental",
    }
    assert {name: results[name] for name in summary} == results["heads"]["statistics"]  # whose matrix is the run's
    own = results["heads"]["linear"]
    assert set(own) == {*summary, "per_task_forgetting", "by_task"}
    linear = tiny.trainer(tmp_path, model=tiny.model(method), num_train_epochs=1)
    linear.train()
    plain = read(tmp_path)
    assert plain["head"] == "linear" and "heads" not in plain
    assert {name: plain[name] for name in summary} == {name: own[name] for name in summary}  # the training is the same
    matrix = plain["accuracy_matrix"]
    assert own["by_task"]["now"] == matrix[2] and own["by_task"]["when_learned"] == [matrix[t][t] for t in range(3)]
    assert own["per_task_forgetting"] == [metrics.summarize(matrix, t + 1)["forgetting"] for t in range(3)]
    assert (plain["drift"], plain.get("changed_selections")) == (results["drift"], results.get("changed_selections"))
    assert results["average_accuracy"] > plain["average_accuracy"]
    weights, expected = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_statistics_are_those_of_each_tasks_own_model(run):
    """Class means as the adapter that ended the task gives them, with plain images; never refreshed."""
    method, trainer, folder = run
    last = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), folder).base_model.statistics
    assert last.counts.tolist() == [8] * 6
    for t in range(3):
        model = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), folder / f"task-{t + 1}")
        own = list(trainer.stream.tasks[t].classes)
        x, labels = task_features(model, trainer.stream.train(t), tiny.processor())
        means = torch.stack([x[labels == c].double().mean(0) for c in own])
        assert torch.allclose(model.base_model.statistics.means[own], means, atol=1e-5)
        assert torch.equal(last.means[own], model.base_model.statistics.means[own])
        later = [c for c in range(6) if c not in trainer.stream.seen_classes(t)]
        assert not model.base_model.statistics.counts[later].any()


def test_predictions_are_scikit_learns(run):
    """Features collected task by task, each by its own model, and LDA on all of them."""
    method, trainer, folder = run
    x, y = [], []
    for t in range(3):
        model = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), folder / f"task-{t + 1}")
        collected, labels = task_features(model, trainer.stream.train(t), tiny.processor())
        x, y = [*x, collected.double()], [*y, labels]
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(
        torch.cat(x).numpy(), torch.cat(y).numpy()
    )
    for j in range(3):
        collected, labels = task_features(model, trainer.stream.test(j), tiny.processor())
        right = reference.predict(collected.double().numpy()) == labels.numpy()
        assert read(folder)["accuracy_matrix"][2][j] == pytest.approx(100 * right.mean())


def test_changed_selections_are_measured(run):
    method, trainer, folder = run
    results = read(folder)
    if method == "clip":
        assert "changed_selections" not in results
        return
    shares = []
    for j in range(2):
        kept = load_file(folder / "features" / f"task-{j + 1}.safetensors")["selected"]
        model = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[method]), folder)
        task_features(model, trainer.stream.test(j), tiny.processor())
        now = model.base_model.selected_prompts
        changed = [set(a.tolist()) != set(b.tolist()) for a, b in zip(kept, now, strict=True)]
        shares.append(np.mean(changed))
    assert results["changed_selections"][0] == 0 and len(results["changed_selections"]) == 3
    assert results["changed_selections"][2] == pytest.approx(np.mean(shares))


def test_changed_share_compares_sets():
    before = np.array([[0, 1], [2, 3], [4, 0], [1, 2]])
    assert changed_share(before, np.array([[1, 0], [3, 2], [4, 1], [1, 2]])) == 0.25
    assert changed_share(before, before[:, ::-1]) == 0


def test_resumed_is_straight(run, tmp_path):
    method, trainer, folder = run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "task-3")
    shutil.rmtree(tmp_path / "task-2")
    torch.manual_seed(99)
    resumed = tiny.trainer(tmp_path, model=tiny.model(method, head="statistics"), num_train_epochs=1)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_results(read(folder), read(tmp_path))
    weights, expected = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    kept, again = (load_file(f / "features" / "task-2.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(kept[name], again[name]) for name in again) and "features" in again


def test_a_run_with_another_head_is_not_continued(run):
    method, _, folder = run
    with pytest.raises(ValueError, match="head='statistics', this one 'linear'"):
        tiny.trainer(folder, model=tiny.model(method), num_train_epochs=1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"shrinkage=0.1, this one 0.5"):
        tiny.trainer(folder, model=tiny.model(method, head="statistics", shrinkage=0.5), num_train_epochs=1).train(
            resume_from_checkpoint=True
        )


def test_the_trainers_own_evaluation_takes_the_same_head(run):
    method, trainer, folder = run
    metrics = trainer.evaluate()
    assert [metrics[f"eval_task_{j}_accuracy"] for j in (1, 2, 3)] == pytest.approx(trainer.results.matrix[2])


def test_the_card_shows_both_heads(run):
    method, _, folder = run
    card, results = (folder / "README.md").read_text(), read(folder)
    for head, shown in (("linear", "linear"), ("statistics", "statistics (used to predict)")):
        assert f"| {shown} | {results['heads'][head]['average_accuracy']:.2f} |" in card
    assert "shrinkage 0.1" in card
    assert (" Changed |" in card) == (method != "clip")
    if method != "clip":
        assert f" {100 * results['changed_selections'][2]:.1f} | " in card


@pytest.mark.parametrize("run", ["l2p"], indirect=True)
@pytest.mark.parametrize("scenario", ["task_incremental", "online"])
def test_scenarios(tmp_path, scenario, run):
    method, reference, _ = run
    trainer = tiny.trainer(
        tmp_path,
        model=tiny.model(method, head="statistics"),
        stream=tiny.stream(scenario=scenario),
        num_train_epochs=1,
        eval_mask="none",
    )
    trainer.train()
    if scenario == "online":  # unseen classes have no statistics: they cannot be predicted in any case
        assert trainer.results.matrix == reference.results.matrix
    else:
        pairs = zip(trainer.results.matrix, reference.results.matrix, strict=True)
        assert all(a >= b for x, y in pairs for a, b in zip(x, y, strict=True))


def test_the_statistics_take_no_random_number_and_every_image(tmp_path):
    trainer = tiny.trainer(tmp_path, model=tiny.model(head="statistics"), bf16=True, num_train_epochs=1)
    trainer.projection.config.max_images = 5
    trainer.train_task(0)
    assert trainer.results.matrix[0][0] > 60
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = int(trainer.tuner.statistics.counts.sum())
    trainer._passes().learn_class_statistics(0, None)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    assert before == 16 and int(trainer.tuner.statistics.counts.sum()) == 32


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_the_command_line_chooses_the_head(tmp_path, monkeypatch, capsys, method):
    script = Path(__file__).parents[2] / "examples" / f"run_{method}_pgp.py"
    for arguments, head in ((["--head", "linear"], "linear"), (["--head", "statistics"], "statistics")):
        monkeypatch.setattr(sys, "argv", [str(script), "--dry_run", "--use_cpu", "true", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert not end.value.code
        assert json.loads(capsys.readouterr().out)["head"] == head
