"""Revisions as classifiers: what they predict, where they work, what they need, and runs that go on from one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification, pipeline

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.inference import PromptClassifier, to_image
from pgp_hf.projection import Projection
from pgp_hf.runs.digests import Digests
from pgp_hf.training.callbacks import StreamCallback

pytestmark = pytest.mark.usefixtures("without_figures")

NAMES = [f"class {c}" for c in range(6)]


class Watch(StreamCallback):
    """The logits of some images when each task ends, as the model that was trained gives them."""

    def __init__(self, pixels):
        self.pixels, self.logits = pixels, []

    def on_task_end(self, args, state, control, model, **kwargs):
        model.eval()
        with torch.no_grad():
            self.logits.append(model.base_model.class_logits(model(pixel_values=self.pixels)).clone())


def images(stream=None):
    stream = stream or tiny.stream()
    return [stream.test(t)[i]["image"] for t in range(3) for i in range(2)]


def train(folder, method, attention="sdpa", head="linear", **kwargs):
    """A finished run on a backbone that is saved beside it: (logits per task, folder, trainer)."""
    model = tiny.model(method, attention=attention, head=head)
    backbone = folder.parent / f"{folder.name}-backbone"
    tiny.backbone(tiny.ADAPTERS[method], attention).save_pretrained(backbone)
    model.base_model.adapter_config.base_model_name_or_path = str(backbone)
    watch = Watch(tiny.processor()(images(), return_tensors="pt")["pixel_values"])
    trainer = tiny.trainer(folder, model=model, callbacks=[watch], num_train_epochs=1, **kwargs)
    trainer.train()
    return watch.logits, folder, trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, without_figures):
    """Finished runs by (method, attention, head), each trained once."""
    found = {}

    def get(*key):
        if key not in found:
            found[key] = train(tmp_path_factory.mktemp("run") / key[0], *key)
        return found[key]

    return get


@pytest.fixture
def run(runs):
    return runs("l2p", "eager", "linear")


@pytest.fixture(scope="module")
def pixels():
    return tiny.processor()(images(), return_tensors="pt")["pixel_values"]


def logits(classifier, pixels):
    with torch.no_grad():
        return classifier.model(pixel_values=pixels).logits


# ---- the same predictions as on the day ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "attention", "head"),
    [
        ("l2p", "eager", "linear"),
        ("dualprompt", "sdpa", "linear"),
        ("clip", "sdpa", "statistics"),
        *[
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in (
                ("l2p", "sdpa", "statistics"),
                ("dualprompt", "eager", "statistics"),
                ("clip", "eager", "linear"),
            )
        ],
    ],
)
def test_each_revision_predicts_as_on_its_day_to_the_bit(runs, pixels, method, attention, head):
    expected, folder, trainer = runs(method, attention, head)
    for t in range(3):
        loaded = load_pretrained(folder, f"task-{t + 1}", attn_implementation=attention)
        seen = trainer.stream.seen_classes(t)
        assert loaded.classes == seen
        unseen = [c for c in range(6) if c not in seen]
        found = logits(loaded, pixels)
        statistics = loaded.model.base_model.statistics  # whose scores are calibrated
        scale = 1.0 if statistics is None else statistics.temperature
        assert torch.equal(found[:, seen], expected[t][:, seen] / scale)
        assert torch.isneginf(found[:, unseen]).all()
        bare = load_pretrained(folder / f"task-{t + 1}", attn_implementation=attention, eval_mask="none")
        assert torch.equal(logits(bare, pixels), expected[t] / scale)
    assert load_pretrained(folder).classes == trainer.stream.class_order  # the last task
    pipe = pipeline("image-classification", model=loaded.model, image_processor=loaded.processor)
    for image, named in zip(images(), loaded.predict(images(), top_k=3), strict=True):
        for mine, theirs in zip(named, pipe(image, top_k=3), strict=True):
            assert mine["label"] == theirs["label"] and mine["score"] == pytest.approx(theirs["score"], abs=1e-6)


def test_loading_leaves_the_callers_random_numbers_alone(run):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_pretrained(run[1])
    assert torch.equal(before, torch.get_rng_state())


# ---- the classifier --------------------------------------------------------------------------------------------------


def test_predict_takes_any_mix_of_images(run, tmp_path):
    classifier = load_pretrained(run[1])
    image = images()[0]
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    mix = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        array,
        array / 255.0,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    found = classifier.predict(mix, top_k=6)
    assert len(found) == 6 and all(one == found[0] for one in found)
    assert [set(entry) for entry in found[0]] == [{"label", "score"}] * 6
    assert {entry["label"] for entry in found[0]} == set(NAMES)
    scores = [entry["score"] for entry in found[0]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-6)
    assert classifier.predict(image) == classifier.predict(tmp_path / "a.png") == [[found[0][0]]]
    assert classifier.predict(iter(mix[:2])) == classifier.predict(np.stack([array, array]))
    assert classifier.predict([]) == []


def test_predictions_do_not_depend_on_the_batch(run):
    classifier = load_pretrained(run[1])
    alone = [entry for image in images() for entry in classifier.classify(image, top_k=6)]
    for size in (1, 2, 4, 50):
        for a, b in zip(alone, classifier.classify(images(), top_k=6, batch_size=size), strict=True):
            assert a.prompts == b.prompts and len(a.prompts) == 2
            assert [x["label"] for x in a.labels] == [x["label"] for x in b.labels]
            assert [x["score"] for x in a.labels] == pytest.approx([x["score"] for x in b.labels], abs=1e-5)


def test_selected_prompts_are_those_of_the_pool(run, pixels):
    classifier = load_pretrained(run[1])
    tuner = classifier.model.base_model
    query = torch.nn.functional.normalize(tuner.query(pixels), dim=-1)
    keys = torch.nn.functional.normalize(tuner.layer.l2p_key["default"], dim=-1)
    nearest = (query @ keys.T).topk(2, dim=-1).indices.tolist()
    assert [one.prompts for one in classifier.classify(images())] == nearest
    assert classifier.pool_size == 5


def test_what_selects_nothing_has_no_pool(runs):
    classifier = load_pretrained(runs("clip", "eager", "linear")[1])
    assert classifier.pool_size is None and {one.prompts for one in classifier.classify(images())} == {None}


def test_only_seen_classes_are_named(run):
    _, folder, trainer = run
    seen = {NAMES[c] for c in trainer.stream.seen_classes(0)}
    first = load_pretrained(folder, "task-1")
    assert all({entry["label"] for entry in found} == seen for found in first.predict(images(), top_k=10))
    pipe = pipeline("image-classification", model=first.model, image_processor=first.processor)
    assert all({entry["label"] for entry in found} == seen for found in pipe(images(), top_k=2))
    everything = load_pretrained(folder, "task-1", eval_mask="none").predict(images(), top_k=10)
    assert {entry["label"] for found in everything for entry in found} == set(NAMES)


def test_the_pipeline_takes_the_model_without_complaint(run, caplog):
    classifier = load_pretrained(run[1])
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        pipeline("image-classification", model=classifier.model, image_processor=classifier.processor)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""


def test_tuple_outputs_are_masked_too(run, pixels):
    first = load_pretrained(run[1], "task-1")
    whole = logits(first, pixels)
    with torch.no_grad():
        assert torch.equal(first.model(pixel_values=pixels, return_dict=False)[0], whole)
        found = first.model(pixel_values=pixels, labels=torch.zeros(6, dtype=torch.long), return_dict=False)
    assert found[0].ndim == 0 and torch.equal(found[1], whole)


def test_what_a_classifier_knows(run):
    _, folder, trainer = run
    classifier = load_pretrained(folder, "task-2")
    assert isinstance(classifier, PromptClassifier) and isinstance(classifier.model, PeftModel)
    assert classifier.id2label == dict(enumerate(NAMES)) == classifier.model.config.id2label
    assert classifier.manifest == trainer.stream.manifest()
    assert classifier.results["accuracy_matrix"][1] == [*trainer.results.matrix[1], None]
    assert "4 of 6 classes" in repr(classifier)
    page = classifier._repr_html_()
    assert "<b>PromptClassifier(L2PModel, 4 of 6 classes)</b>" in page and "<td>projection</td><td>pgp</td>" in page
    assert f"<td>{classifier.results['average_accuracy']:.2f} %</td>" in page
    assert not classifier.model.training and not any(p.requires_grad for p in classifier.model.parameters())


def test_bases_and_settings_come_back(run):
    _, folder, trainer = run
    assert ProjectionConfig.from_pretrained(folder) == trainer.projection.config
    for projection in (Projection.from_pretrained(folder), load_pretrained(folder).projection):
        assert projection.config == trainer.projection.config and projection.info == trainer.projection.info
        assert projection.bases.keys() == trainer.projection.bases.keys()
        for name, basis in trainer.projection.bases.items():
            assert torch.equal(projection.bases[name].columns, basis.columns)
    assert Projection.from_pretrained(folder, "task-1").rank < Projection.from_pretrained(folder, "task-3").rank


def test_precision_and_device(run):
    classifier = load_pretrained(run[1], dtype=torch.bfloat16, device="cpu")
    assert classifier.model.dtype == torch.bfloat16
    full = load_pretrained(run[1]).predict(images(), top_k=6)
    for a, b in zip(classifier.predict(images(), top_k=6), full, strict=True):
        assert {x["label"]: x["score"] for x in a} == pytest.approx({x["label"]: x["score"] for x in b}, abs=0.1)


@pytest.mark.parametrize("name", ["bfloat16", "torch.float64"])
def test_a_precision_by_its_name(run, name):
    assert load_pretrained(run[1], dtype=name).model.dtype == getattr(torch, name.removeprefix("torch."))


@pytest.mark.parametrize(
    "dtype", ["auto", "int8", "nonsense", "float8_e5m2", torch.int64, torch.float8_e4m3fn, 16, float]
)
def test_other_precisions_are_refused_before_anything_is_read(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"^dtype=.* is not a precision of weights: use torch\.float32"):
        load_pretrained(tmp_path / "nowhere", dtype=dtype)


def test_a_backbone_that_is_passed_is_not_cast_for_a_device_that_there_is_not(run):
    backbone = tiny.backbone(tiny.ADAPTERS["l2p"])
    with pytest.raises(RuntimeError, match="device"):
        load_pretrained(run[1], backbone=backbone, dtype=torch.bfloat16, device="nowhere")
    assert backbone.dtype == torch.float32


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("batch_size", -1), ("top_k", 1.5)])
def test_arguments_out_of_range(run, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
        load_pretrained(run[1]).predict(images(), **{name: value})


def test_no_such_revision(run, tmp_path):
    with pytest.raises(ValueError, match="revision='task-9' is not in .*choose one of task-1, task-2, task-3"):
        load_pretrained(run[1], "task-9")
    with pytest.raises(ValueError, match="it holds one revision"):
        load_pretrained(run[1] / "task-1", "task-1")
    with pytest.raises(ValueError, match="eval_mask='all' is unknown"):
        load_pretrained(run[1], eval_mask="all")
    with pytest.raises(
        ValueError, match=r"the folder .*nowhere does not exist: expected a run's folder, one of its task"
    ):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file: expected a run's folder"):
        load_pretrained(tmp_path / "file")
    with pytest.raises(
        OSError, match=r"there is no folder me/run here, and me/run@task-1 is not in the cache, the only"
    ):
        load_pretrained("me/run", "task-1", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="has no adapter_config.json and adapter_model.safetensors"):
        load_pretrained(tmp_path)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_become_rgb_as_in_training(tmp_path):
    stored = tiny.stream().test(0)[0]["image"]
    stored.save(tmp_path / "a.png")
    assert np.array_equal(to_image(tmp_path / "a.png"), stored)
    turned = Image.new("RGB", (3, 2), "red")
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert to_image(tmp_path / "b.jpg").size == (2, 3)
    grey = np.full((2, 5), 7, dtype=np.uint8)
    for array in (grey, grey[..., None], grey[None], np.full((2, 5), 7 / 255)):
        assert np.array_equal(to_image(array), np.full((2, 5, 3), 7))
    assert to_image(np.zeros((2, 3, 4), dtype=np.uint8)).mode == "RGB"
    assert to_image(Image.new("L", (3, 2))).mode == "RGB"
    assert np.array_equal(to_image(np.ones((2, 3), dtype=bool)), np.full((2, 3, 3), 255))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((2, 3, 5)), ValueError, r"shape \(2, 3, 5\)"),
        (np.zeros((0, 3)), ValueError, r"shape \(0, 3\)"),
        (np.full((2, 3), -0.5), ValueError, "floats in"),
        (np.full((2, 3), np.nan), ValueError, "floats in"),
        (np.full((2, 3), 300), ValueError, "integers in"),
        (np.array([["a"]]), ValueError, "array of"),
        (7, TypeError, "an image cannot be of type int"),
        ("nowhere.png", ValueError, "nowhere.png cannot be read"),
    ],
)
def test_what_is_no_image(image, error, message):
    with pytest.raises(error, match=message):
        to_image(image)


# ---- the backbone ----------------------------------------------------------------------------------------------------


def test_a_backbone_may_be_passed(run, pixels):
    expected, folder, _ = run
    saved = folder.parent / "l2p-backbone"
    base = ViTForImageClassification.from_pretrained(saved, attn_implementation="eager")
    for backbone in (str(saved), saved, base):
        loaded = load_pretrained(folder, backbone=backbone, attn_implementation="eager")
        assert torch.equal(logits(loaded, pixels), expected[-1])
    with pytest.raises(ValueError, match="without an adapter"):
        load_pretrained(folder, backbone=base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no backbone: pass the backbone"),
        ("", "names no backbone"),
        ("/nowhere/vit", "'/nowhere/vit', which is not on this machine: pass the backbone"),
        ("../../vit", "'../../vit', which is neither a Hub id nor a plain folder"),
        (["a"], "is not a valid adapter configuration"),
        ("nobody/vit", "(?s)'nobody/vit' cannot be loaded .*backbone="),
    ],
)
def test_a_backbone_that_is_not_here(run, tmp_path, name, message):
    shutil.copytree(run[1] / "task-1", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    (tmp_path / "a" / "digests.json").unlink()
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "a")


def test_the_embedded_backbone_is_found_by_its_name(tmp_path):
    from transformers import AutoModelForImageClassification

    from pgp_hf import embedded

    base = AutoModelForImageClassification.from_pretrained(embedded.vit_path(), num_labels=3)
    tiny.model(base=base).save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pgp_hf:embedded-vit"
    assert load_pretrained(tmp_path).model.config.hidden_size == base.config.hidden_size


def test_an_adapter_without_a_run(run, tmp_path, pixels):
    saved = run[1].parent / "l2p-backbone"
    base = ViTForImageClassification.from_pretrained(saved)
    model = tiny.model(base=base)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="no image processor can be loaded"):
        load_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, processor=tiny.processor())
    with torch.no_grad():
        assert torch.equal(logits(loaded, pixels), model(pixels).logits)
    assert loaded.manifest is None and loaded.results is None and loaded.classes is None
    for read in (lambda: loaded.projection, lambda: ProjectionConfig.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="without a run"):
            read()


def test_prediction_needs_no_training_package(run, tmp_path):
    image = images()[0]
    image.save(tmp_path / "a.png")
    code = """
import sys

for name in ("datasets", "evaluate", "sklearn", "matplotlib", "pyarrow", "pandas", "transformers.trainer"):
    sys.modules[name] = None  # an import raises ImportError
import pgp_hf
classifier = pgp_hf.load_pretrained(sys.argv[1], "task-2")
print(classifier.predict([sys.argv[2]])[0][0]["label"], classifier.projection.rank)
for name in ("training", "methods", "data.stream", "cli", "report", "hub", "benchmark"):
    assert f"pgp_hf.{name}" not in sys.modules, name
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(run[1]), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(load_pretrained(run[1], "task-2").predict([image])[0][0]["label"])
    assert done.stderr == ""  # no bar, no report, no warning


# ---- going on from a revision ----------------------------------------------------------------------------------------


def equal(a, b):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def go_on(folder, source, method="l2p", attention="eager", head="linear", **kwargs):
    trainer = tiny.trainer(
        folder, model=tiny.model(method, attention=attention, head=head), num_train_epochs=1, **kwargs
    )
    trainer.train(resume_from_checkpoint=str(source))
    return trainer


@pytest.mark.parametrize(
    "key",
    tiny.some_of(
        [("l2p", "sdpa", "statistics"), ("dualprompt", "sdpa", "linear"), ("clip", "eager", "linear")],
        ("dualprompt", "sdpa", "linear"),
    ),
)
def test_a_run_continued_from_a_copied_revision_is_the_straight_run(runs, tmp_path, key):
    _, folder, straight = runs(*key)
    shutil.copytree(folder / "task-1", tmp_path / "lone")
    continued = go_on(tmp_path / "continued", tmp_path / "lone", *key)
    for t in (1, 2, 3):
        assert equal(folder / f"task-{t}", tmp_path / "continued" / f"task-{t}")
    assert tiny.same_results(continued.results.to_dict(), straight.results.to_dict())  # drift included
    for name in ("results.json", "README.md", "preprocessor_config.json"):
        assert (tmp_path / "continued" / "task-1" / name).is_file()
    for name, basis in straight.projection.bases.items():
        assert torch.equal(continued.projection.bases[name].columns, basis.columns)


def test_a_task_folder_inside_its_run_has_the_earlier_ones_beside_it(run, tmp_path):
    _, folder, straight = run
    assert (folder / "features").is_dir()
    continued = go_on(tmp_path / "a", folder / "task-2")
    assert tiny.same_results(continued.results.to_dict(), straight.results.to_dict())
    shutil.copytree(folder, tmp_path / "b", ignore=shutil.ignore_patterns("features", "task-3"))
    again = go_on(tmp_path / "c", tmp_path / "b" / "task-2")  # computed from the revisions
    assert tiny.same_results(again.results.to_dict(), straight.results.to_dict())
    for name in ("task-1.safetensors", "task-2.safetensors"):
        kept, anew = (load_file(at / "features" / name) for at in (folder, tmp_path / "c"))
        assert kept.keys() == anew.keys() and all(torch.equal(kept[k], anew[k]) for k in kept)
    assert sorted(path.name for path in (tmp_path / "c").glob("task-*")) == ["task-1", "task-2", "task-3"]


def test_a_late_revision_alone_says_what_drift_leaves_out(run, tmp_path):
    _, folder, straight = run
    shutil.copytree(folder / "task-2", tmp_path / "lone")
    shutil.copytree(folder / "task-1", tmp_path / "task-1")  # not its neighbour: the copy is called otherwise
    with pytest.warns(UserWarning, match="of tasks 1 neither features/ nor the revision"):
        continued = go_on(tmp_path / "a", tmp_path / "lone")
    assert equal(folder, tmp_path / "a")
    results, expected = continued.results.to_dict(), straight.results.to_dict()
    assert results.pop("drift_lacks") == [0]
    assert results["drift"][:2] == expected["drift"][:2] and results["drift"][2] > 0
    for name in ("drift", "changed_selections"):
        results.pop(name), expected.pop(name)
    assert tiny.same_results(results, expected)
    finished = tiny.trainer(tmp_path / "a", model=tiny.model(attention="eager"), num_train_epochs=1)
    assert finished.train(resume_from_checkpoint=True).global_step == 0  # task-2 is the first one there
    assert tiny.same_results(finished.results.to_dict(), continued.results.to_dict())
    assert json.loads((tmp_path / "a" / "results.json").read_text())["drift_lacks"] == [0]
    assert load_pretrained(tmp_path / "a", "task-2", backbone=folder.parent / "l2p-backbone").results


def test_a_neighbour_of_another_run_is_no_earlier_task(run, tmp_path):
    _, folder, _ = run
    shutil.copytree(folder / "task-2", tmp_path / "task-2")
    shutil.copytree(folder / "task-1", tmp_path / "task-1")
    results = json.loads((tmp_path / "task-1" / "results.json").read_text())
    results["accuracy_matrix"][0][0] = 0.5
    (tmp_path / "task-1" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="task-1.results.json is not the file that the run wrote"):
        go_on(tmp_path / "a", tmp_path / "task-2")
    Digests.of(tmp_path / "task-1").write()  # it is not damaged, but another's
    with pytest.warns(UserWarning, match="of tasks 1 neither"):
        go_on(tmp_path / "a", tmp_path / "task-2")
    assert not (tmp_path / "a" / "task-1").exists()


def test_a_revision_in_the_output_folder_itself(run, tmp_path):
    _, folder, straight = run
    shutil.copytree(folder / "task-1", tmp_path / "run")
    trainer = tiny.trainer(tmp_path / "run", model=tiny.model(attention="eager"), num_train_epochs=1)
    trainer.train(resume_from_checkpoint=True)
    assert tiny.same_results(trainer.results.to_dict(), straight.results.to_dict())


def test_an_output_folder_that_holds_its_source_is_not_cleared(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    with pytest.raises(ValueError, match="continue it in another output_dir"):
        go_on(tmp_path / "run", tmp_path / "run" / "task-1", overwrite_output_dir=True)
    assert (tmp_path / "run" / "task-3" / "results.json").is_file()


def test_a_source_that_is_refused_leaves_the_output_folder_and_the_model_alone(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    shutil.copytree(run[1] / "task-1", tmp_path / "lone")
    weights = tmp_path / "lone" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    trainer = tiny.trainer(tmp_path / "run", model=tiny.model(), overwrite_output_dir=True)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="adapter_model.safetensors is not the file that the run wrote"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "lone"))
    assert (tmp_path / "run" / "task-3" / "results.json").is_file() and not trainer.results.matrix
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_link_out_of_a_revision_is_not_followed_into_the_run(run, tmp_path):
    shutil.copytree(run[1] / "task-1", tmp_path / "lone")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "lone" / "README.md").unlink()
    (tmp_path / "lone" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="README.md is a link to .*secret"):
        go_on(tmp_path / "a", tmp_path / "lone")
    assert not list((tmp_path / "a").glob("**/README.md"))


def test_the_streams_names_reach_a_model_without_any(run):
    config = json.loads((run[1] / "adapter_config.json").read_text())
    assert config["id2label"] == {str(c): name for c, name in enumerate(NAMES)}
