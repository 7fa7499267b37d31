"""A classifier as one file without this package: what an ONNX model and a program of torch answer."""

from __future__ import annotations

import importlib.util
import json

import pytest
import tiny
import torch

from pgp_hf import load_pretrained
from pgp_hf.inference import export

pytestmark = pytest.mark.usefixtures("without_figures")

ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.NEEDED), reason="needs the extra `export`"
)
KINDS = [(adapter, head) for adapter in tiny.ADAPTERS for head in ("linear", "statistics")]
FIRST = ("l2p", "statistics")  # the others take long


@pytest.fixture(scope="module")
def runs(tmp_path_factory, without_figures):
    found = {}

    def get(adapter, head):
        if (adapter, head) not in found:
            found[adapter, head] = tiny.finished_run(tmp_path_factory.mktemp("run"), adapter, head=head)
        return found[adapter, head]

    return get


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    return (
        lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0]),
        json.loads(notes["labels"]),
        json.loads(notes["preprocessor_config"]),
    )


def run_torch(path):
    extra = {"labels.json": "", "preprocessor_config.json": ""}
    program = torch.export.load(str(path), extra_files=extra).module()
    return program, *(json.loads(text) for text in extra.values())


def check(clf, path, run):
    scores, labels, processor = run(path)
    assert labels == [clf.id2label[label] for label in clf.classes]
    assert processor["size"] == dict(clf.processor.size)
    for count in (1, 2, 7):
        pixels = tiny.images(count, seed=count)
        with torch.no_grad():
            expected = clf.model(pixel_values=pixels).logits.softmax(-1)[:, clf.classes]
            found = scores(pixels)
        assert found.shape == (count, len(labels)) and (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("adapter", "head"), [pytest.param(*kind, marks=[] if kind == FIRST else pytest.mark.slow) for kind in KINDS]
)
def test_a_program_of_torch(runs, tmp_path, adapter, head):
    clf = load_pretrained(runs(adapter, head), "task-2")  # four of six classes
    path = tmp_path / "new" / "model.pt2"
    assert clf.export(path, "torch") == path
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    check(clf, path, run_torch)


@ONNX
@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "head"), KINDS)
def test_an_onnx_model(runs, tmp_path, adapter, head, capfd):
    clf = load_pretrained(runs(adapter, head), "task-2")
    capfd.readouterr()  # of the run's training, where this test is the first to need it
    clf.export(tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    check(clf, tmp_path / "model.onnx", run_onnx)
    same = clf.predict([tiny.stream().test(0)[0]["image"]])  # nothing of the export stays behind
    assert same == load_pretrained(runs(adapter, head), "task-2").predict([tiny.stream().test(0)[0]["image"]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora:2"])
def test_models_without_prompts(tmp_path, name):
    base = tiny.backbone()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    tiny.trainer(tmp_path / "run", model=tiny.plain(name, base), method=None, num_train_epochs=1).train()
    clf = load_pretrained(tmp_path / "run", backbone=None if name == "full" else tmp_path / "base")
    clf.export(tmp_path / "out.pt2", "torch")
    check(clf, tmp_path / "out.pt2", run_torch)


def test_what_differs_is_not_written(runs, tmp_path, monkeypatch):
    clf = load_pretrained(runs(*FIRST))
    (tmp_path / "model.pt2").write_text("earlier")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differ from the classifier's .* in a batch of 1"):
        clf.export(tmp_path / "model.pt2", "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "earlier"
    assert "solve" not in vars(clf.model.base_model.statistics)


def test_what_is_refused(runs, tmp_path, monkeypatch):
    clf = load_pretrained(runs(*FIRST))
    with pytest.raises(ValueError, match="format='tflite' is unknown: choose one of onnx, torch"):
        clf.export(tmp_path / "model", "tflite")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'pgp_hf\[export\]'"):
        clf.export(tmp_path / "model")
    clf.model.base_model.adapter_config.batchwise_prompt = True
    with pytest.raises(ValueError, match="depend on the other images of a batch"):
        clf.export(tmp_path / "model", "torch")
