"""Whole models and LoRA: their files, the weights that stay and go, what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from pgp_hf import load_pretrained
from pgp_hf.methods import create
from pgp_hf.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")

TASKS = [f"task-{t}" for t in (1, 2, 3)]


def trainer(folder, name="full", **settings):
    return tiny.trainer(
        folder, model=settings.pop("model", None) or tiny.plain(name), method=create("fine_tuning"), **settings
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("full")
    made = trainer(folder)
    made.train()
    return made, folder


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(run[1], tmp_path / "run")


def test_only_the_newest_task_keeps_weights_and_the_top_level_is_a_link(run):
    _, folder = run
    assert [(folder / task / "model.safetensors").exists() for task in TASKS] == [False, False, True]
    assert (folder / "model.safetensors").samefile(folder / "task-3" / "model.safetensors")
    assert not (folder / "adapter_config.json").exists() and not list(folder.rglob("*.tmp"))
    assert all(
        (folder / task / name).is_file() for task in TASKS for name in ("config.json", "results.json", "README.md")
    )


def test_the_weights_of_a_task_stay_until_the_next_is_published(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    publish, seen = made.folder.publish, []

    def watched(t, write):
        seen.append([(tmp_path / task / "model.safetensors").exists() for task in TASKS])
        return publish(t, write)

    monkeypatch.setattr(made.folder, "publish", watched)
    made.train()
    assert seen == [[False, False, False], [True, False, False], [False, True, False]]


def test_all_weights_are_kept_on_demand(tmp_path):
    made = trainer(tmp_path, save_full_weights="all", num_train_epochs=1)
    made.train()
    found = [load_file(tmp_path / task / "model.safetensors") for task in TASKS]
    assert not torch.equal(found[0]["classifier.weight"], found[2]["classifier.weight"])
    assert load_pretrained(tmp_path, "task-2").classes == made.stream.seen_classes(1)


def test_save_full_weights_has_two_values(tmp_path):
    with pytest.raises(ValueError, match="save_full_weights='none' is unknown: choose one of last, all"):
        trainer(tmp_path, save_full_weights="none")


@pytest.mark.parametrize("where", ["task-1", "copy"])
def test_a_folder_without_weights_says_so_and_names_the_flag(run, tmp_path, where):
    folder = run[1] / "task-1" if where == "task-1" else shutil.copytree(run[1] / "task-1", tmp_path / "copy")
    with pytest.raises(ValueError, match="no model.safetensors: .*newest task alone.*--save_full_weights all"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="--save_full_weights all"):
        load_pretrained(run[1], revision="task-1")
    with pytest.raises(ValueError, match="--save_full_weights all"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=str(folder))


def test_it_predicts_without_a_backbone_and_refuses_one(run):
    made, folder = run
    classifier = load_pretrained(folder)
    pixels = tiny.images(4)
    with torch.no_grad():
        assert torch.equal(classifier.model(pixel_values=pixels).logits, made.model.eval()(pixel_values=pixels).logits)
    assert classifier.id2label == dict(enumerate(made.stream.label_names)) and classifier.pool_size is None
    assert repr(classifier) == "PromptClassifier(ViTForImageClassification, 6 of 6 classes)"
    assert not classifier.projection.bases
    with pytest.raises(ValueError, match="holds a whole model, which needs no backbone"):
        load_pretrained(folder, backbone=tiny.backbone())


def test_a_loaded_model_may_be_frozen(run):
    classifier = load_pretrained(run[1])
    photos = [run[0].stream.test(0)[i]["image"] for i in range(3)]
    before = classifier.predict(photos)
    classifier.model.requires_grad_(False)
    assert classifier.predict(photos) == before


def test_attention_and_precision_are_the_callers(run):
    classifier = load_pretrained(run[1], attn_implementation="eager", dtype=torch.bfloat16)
    assert classifier.model.config._attn_implementation == "eager" and classifier.model.dtype == torch.bfloat16
    assert len(classifier.predict([run[0].stream.test(0)[0]["image"]])) == 1


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_run_goes_on_from_every_task_that_has_its_weights(run, tmp_path, task):
    straight, folder = run
    part = trainer(tmp_path / "part", save_full_weights="all")
    for t in range(task + 1):
        part.train_task(t)
    resumed = trainer(tmp_path / "elsewhere")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"task-{task + 1}"))
    a, b = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "elsewhere"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert tiny.same_results(straight.results.to_dict(), resumed.results.to_dict())


def test_the_best_checkpoint_is_loaded(tmp_path):
    """A `Trainer` would load nothing: it looks for other names than the file has."""
    best = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_task_1_loss"}
    held_out = tiny.stream(train_val_split=0.25)
    made = trainer(tmp_path, stream=held_out, save_strategy="epoch", learning_rate=1.0, **best)
    kept = {}

    class Keep(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            kept[int(state.epoch)] = {name: value.clone() for name, value in model.state_dict().items()}

    made.add_callback(Keep())
    made.train_task(0)
    epoch = int(made.state.best_model_checkpoint.rpartition("-")[2]) // (made.state.max_steps // 2)
    assert all(torch.equal(value, kept[epoch][name]) for name, value in made.model.state_dict().items())
    assert any(not torch.equal(value, kept[3 - epoch][name]) for name, value in kept[epoch].items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head", "has model='full', this one 'head'"),
        ("lora:2", "holds a whole model, and this model is an adapter"),
    ],
)
def test_another_kind_of_model_is_not_continued(run, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, name).train(resume_from_checkpoint=str(run[1]))


def test_another_rank_or_backbone_beneath_lora_is_not_continued(tmp_path):
    trainer(tmp_path / "run", "lora:2").train_task(0)
    with pytest.raises(ValueError, match="has r=2, this one 3"):
        trainer(tmp_path / "a", "lora:3").train(resume_from_checkpoint=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="the backbone's weights are not those"):
        trainer(tmp_path / "b", model=tiny.plain("lora:2", tiny.backbone(seed=8))).train(
            resume_from_checkpoint=str(tmp_path / "run")
        )
    with pytest.raises(ValueError, match="the backbone's weights are not those"):
        load_pretrained(tmp_path / "run", backbone=tiny.backbone(seed=8))
    assert isinstance(load_pretrained(tmp_path / "run", backbone=tiny.backbone()).model, PeftModel)


@pytest.mark.parametrize(("kind", "size"), [("full", {"hidden_size": 36}), ("full", {"num_hidden_layers": 1})])
def test_another_backbone_is_not_continued(run, tmp_path, kind, size):
    with pytest.raises(ValueError, match="is another kind than this one: '.*' has shape .* there, .* here"):
        trainer(tmp_path, model=tiny.plain(kind, tiny.backbone(**size))).train(resume_from_checkpoint=str(run[1]))


# ---- running statistics ----------------------------------------------------------------------------------------------


def resnet(what):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    with tiny.seeded(7):
        model = ResNetForImageClassification(ResNetConfig(num_labels=tiny.CLASSES, **sizes)).eval()
    lora = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    return get_peft_model(model, lora) if what == "lora" else tiny.plain(what, model)


@pytest.mark.parametrize(
    ("what", "moves"),
    [
        ("lora", ()),
        ("last:1", ("stages.1.",)),
        pytest.param("head", (), marks=pytest.mark.slow),
        pytest.param("full", ("embedder", "stages"), marks=pytest.mark.slow),
    ],
)
def test_running_statistics_of_frozen_layers_do_not_follow_the_images(tmp_path, what, moves):
    """A backbone that does not learn does not drift, and what is loaded predicts as what was trained."""
    model = resnet(what)
    means = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}
    made = trainer(tmp_path / "run", model=model, num_train_epochs=1)
    made.train_task(0)
    moved = {name for name, value in model.named_buffers() if name in means and not torch.equal(value, means[name])}
    assert moved == {name for name in means if any(part in name for part in moves)}
    if what == "lora":
        loaded = load_pretrained(tmp_path / "run", backbone=resnet("full"), processor=tiny.processor()).model
        with torch.no_grad():
            found, expected = (one.eval()(pixel_values=tiny.images()).logits for one in (loaded, model))
        seen = torch.isfinite(found)
        assert torch.equal(found[seen], expected[seen])
    model.train()(pixel_values=tiny.images())  # in a loop of one's own, they do what they do
    assert not any(torch.equal(value, means[name]) for name, value in model.named_buffers() if name in means)


# ---- files from elsewhere --------------------------------------------------------------------------------------------


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def drop_digests(folder):
    change(folder / "results.json", sha256={})
    (folder / "digests.json").unlink(missing_ok=True)


def renamed(folder):
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    save_file(
        {name.replace("classifier", "head"): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    drop_digests(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "asks for code to be run"),
        (lambda folder: change(folder / "config.json", _attn_implementation="a/kernel"), "asks for code .*_attn_impl"),
        (lambda folder: change(folder / "config.json", num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (lambda folder: change(folder / "config.json", num_hidden_layers=1), "does not fit config.json"),
        (lambda folder: change(folder / "config.json", hidden_size=36), "cannot be loaded|does not fit"),
        (lambda folder: change(folder / "config.json", model_type="unheard-of"), "cannot be loaded"),
        (lambda folder: change(folder / "config.json", id2label={"0": "a"}), "id2label in config.json"),
        (renamed, "does not fit config.json"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "can run code"),
        (lambda folder: os.truncate(folder / "model.safetensors", 900), "missing or damaged"),
        (lambda folder: os.remove(folder / "results.json"), "no results.json"),
    ],
)
def test_bad_files_are_refused(folder, spoil, message):
    shutil.copyfile(folder / "model.safetensors", folder / "own")
    os.replace(folder / "own", folder / "model.safetensors")  # the link would pass a change on
    (folder / "digests.json").unlink()  # whoever alters a file can alter its digest
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_altered_weights_are_noticed(folder):
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is not the file that the run wrote"):
        load_pretrained(folder)


def test_settings_of_lora_that_change_more_than_a_prediction_are_refused(tmp_path):
    trainer(tmp_path, "lora:2").train_task(0)
    (tmp_path / "digests.json").unlink()
    for name, value in (("megatron_config", {"a": 1}), ("megatron_core", "os"), ("init_lora_weights", "pissa")):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        change(tmp_path / "adapter_config.json", **{name: value})
        with pytest.raises(ValueError, match=f"{name}=.* is not a setting that predictions are made with"):
            load_pretrained(tmp_path, backbone=tiny.backbone())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))


def test_a_model_that_learned_no_stream_is_for_transformers(tmp_path):
    tiny.backbone().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model without a run: load it with transformers"):
        load_pretrained(tmp_path)


def test_clear_and_promote_leave_no_half(folder):
    files = RunFolder(folder)
    files.promote(2)  # onto the link that is there
    assert (folder / "model.safetensors").samefile(folder / "task-3" / "model.safetensors")
    files.clear()
    assert not list(folder.rglob("*.safetensors"))
