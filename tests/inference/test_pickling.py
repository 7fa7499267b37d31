"""Loaded models and classifiers can be pickled, copied and sent to other processes, where they predict the same."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from pgp_hf import load_pretrained, methods

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def plain_run(folder: Path, what: str, method: str) -> Path:
    """Return a finished run of a model without prompts."""
    base = tiny.backbone()
    base.save_pretrained(folder / "backbone")
    model = tiny.plain(what, base)
    if what.startswith("lora"):
        model.peft_config["default"].base_model_name_or_path = str(folder / "backbone")
    tiny.trainer(folder / "run", model=model, method=methods.create(method), num_train_epochs=1).train()
    return folder / "run"


# every adapter and head; whole models, LoRA, and methods that change the logits or run the model again
KINDS = {
    **{f"{adapter}-{head}": (adapter, head) for adapter in tiny.ADAPTERS for head in ("linear", "statistics")},
    "whole": ("full", "fine_tuning"),
    "lora": ("lora:2", "fine_tuning"),
    "nearest means": ("full", "icarl"),
    "several models": ("full", "der_mcg"),
}


@pytest.fixture(scope="module")
def finished(runs, without_figures):
    """Return the folder of a run of a kind, which is trained once."""

    @functools.cache
    def train(kind: str) -> Path:
        what, how = KINDS[kind]
        return (
            tiny.finished_run(runs / kind, what, head=how)
            if what in tiny.ADAPTERS
            else plain_run(runs / kind, what, how)
        )

    return train


QUICK = ("l2p-linear", "dualprompt-statistics", "clip-statistics", "lora", "several models")


@pytest.fixture(scope="module", params=tiny.some_of(KINDS, *QUICK))
def classifier(request, finished):
    return load_pretrained(finished(request.param))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=tiny.images(3)).logits


def test_a_pickle_predicts_the_same(classifier):
    expected = logits(classifier.model)
    assert torch.isinf(expected).any() or len(classifier.classes) == tiny.CLASSES
    for copied in (pickle.loads(pickle.dumps(classifier.model)), copy.deepcopy(classifier.model)):
        assert torch.equal(logits(copied), expected)
    photos = [tiny.data()["test"][i]["image"] for i in range(3)]
    loaded = pickle.loads(pickle.dumps(classifier))
    assert loaded.predict(photos, top_k=3) == classifier.predict(photos, top_k=3)
    assert (loaded.id2label, loaded.pool_size, repr(loaded)) == (
        classifier.id2label,
        classifier.pool_size,
        repr(classifier),
    )


def test_a_copy_reads_its_own_weights(classifier):
    expected, copied = logits(classifier.model), copy.deepcopy(classifier.model)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(classifier.model), expected)


def test_another_process_needs_to_import_nothing_first(finished, tmp_path):
    expected = []
    for adapter, kind in zip(tiny.ADAPTERS, QUICK, strict=False):
        classifier = load_pretrained(finished(kind))
        expected.append(logits(classifier.model).tolist())
        (tmp_path / f"{adapter}.pickle").write_bytes(pickle.dumps(classifier.model))
    torch.save(tiny.images(3), tmp_path / "images.pt")
    code = f"""
import pickle, torch
images = torch.load("images.pt")
torch.set_num_threads(1)
for adapter in {list(tiny.ADAPTERS)}:
    with open(f"{{adapter}}.pickle", "rb") as file, torch.no_grad():
        print(pickle.load(file)(pixel_values=images).logits.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(rows) for rows in expected]


@pytest.mark.slow
def test_a_spawned_pool_and_a_mapped_dataset_predict_the_same(finished):
    classifier = load_pretrained(finished("dualprompt-linear"))
    photos = tiny.data()["test"].select(range(6))
    expected = [found[0]["label"] for found in classifier.predict(photos)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        [found] = pool.map(classifier.predict, [[row["image"] for row in photos]])
    assert [labels[0]["label"] for labels in found] == expected
    mapped = photos.map(
        lambda rows: {"found": [labels[0]["label"] for labels in classifier.predict(rows["image"])]},
        batched=True,
        num_proc=2,
    )
    assert mapped["found"] == expected


def test_no_token_is_in_a_pickle(runs, finished):
    folder = finished("l2p-linear")
    classifier = load_pretrained(folder, token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(classifier) and classifier._source["token"] == "hf_secret"
    trainer = pickle.loads(pickle.dumps(classifier)).trainer(tiny.arguments(runs / "more"))
    assert len(trainer.results.matrix) == 3
