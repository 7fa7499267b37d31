"""The code in the card of a trained run, executed as it stands: in another process, and from a folder that was moved."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import forks
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from pgp_hf import load_pretrained, set_trainable
from pgp_hf.inference import PromptClassifier
from pgp_hf.methods import create
from pgp_hf.report import card
from pgp_hf.runs.reading import read_json

HEADS = {"l2p": "statistics", "clip": "linear"}


def finished_run(folder: Path, what: str) -> Path:
    """Return `folder/run`, a finished run of an adapter or a model of which `what` learns, on `folder/backbone`."""
    if what in HEADS:
        return tiny.finished_run(folder, what, head=HEADS[what])
    tiny.backbone().save_pretrained(folder / "backbone")
    with tiny.seeded(5), tiny.without_figures():
        model = AutoModelForImageClassification.from_pretrained(folder / "backbone")
        settings = {"method": create("fine_tuning"), "num_train_epochs": 1, "save_full_weights": "all"}
        tiny.trainer(folder / "run", model=set_trainable(model, what), **settings).train()
    return folder / "run"


def blocks(folder: Path) -> list[str]:
    """Return the code in a folder's card: with this package, and without."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def elsewhere(root: Path, what: str, labels: int) -> Path:
    """Return a folder in which `path/to/this/folder` is the second task of a run, beside its backbone and a photo.

    The backbone's own head is for `labels` classes. A whole model's backbone is gone.
    """
    run, backbone = finished_run(root / "trained", what), root / "trained" / "backbone"
    place = root / "elsewhere"
    shutil.copytree(run / "task-2", place / "path" / "to" / "this" / "folder")
    if what in (*HEADS, "lora:2"):
        if what != "clip":
            tiny.backbone(num_labels=labels).save_pretrained(backbone)
        backbone.rename(place / "path" / "to" / "backbone")
    else:
        shutil.rmtree(backbone)
    Image.effect_noise((40, 30), 90).convert("RGB").save(place / "photo.jpg")
    return place


def known_scores(place: Path, classifier: PromptClassifier) -> torch.Tensor:
    with torch.no_grad():
        pixels = classifier.processor(Image.open(place / "photo.jpg"), return_tensors="pt")["pixel_values"]
        return classifier.model(pixel_values=pixels).logits


@pytest.fixture(scope="module", params=tiny.some_of([*HEADS, "all", "lora:2"], "l2p", "all"))
def place(request, tmp_path_factory) -> Path:
    return elsewhere(tmp_path_factory.mktemp("card"), request.param, labels=3)


def test_it_predicts_and_scores_like_the_run(place):
    folder, backbone = (place / "path" / "to" / name for name in ("this/folder", "backbone"))
    assert str(place.parent) not in (folder / "README.md").read_text(encoding="utf-8")
    code = "\n".join(blocks(folder))
    adapter = backbone.exists()
    assert code.count("path/to/backbone") == (2 if adapter else 0) and "revision=" not in code

    def work():
        os.chdir(place)
        warnings.simplefilter("ignore")
        sys.stderr = io.StringIO()
        exec(compile(f"{code}\nimport json\nprint(json.dumps(scores.tolist()))", "card", "exec"), {})

    assert forks.run(work, place / "log") == 0, (place / "log").read_text()
    predicted, scores = (place / "log").read_text().splitlines()

    classifier = load_pretrained(folder, **({"backbone": backbone} if adapter else {}))
    expected = classifier.predict(place / "photo.jpg", top_k=3)
    found = ast.literal_eval(predicted)  # of another process, whose threads may round otherwise
    assert [[one["label"] for one in image] for image in found] == [[one["label"] for one in expected[0]]]
    assert [one["score"] for one in found[0]] == pytest.approx([one["score"] for one in expected[0]], abs=1e-4)
    assert len(expected[0]) == 3
    known = known_scores(place, classifier)
    if statistics := getattr(getattr(classifier.model, "base_model", None), "statistics", None):
        known *= statistics.temperature  # by which a classifier calibrates what PEFT's model says
    learned = torch.tensor(classifier.classes)
    assert torch.allclose(torch.tensor(json.loads(scores))[:, learned], known[:, learned], rtol=1e-4, atol=1e-3)
    assert known.shape[1] == 6 and len(learned) == 4


@pytest.mark.parametrize("what", ["lora:2", "last:1", "head"])
def test_scores_of_peft_and_transformers_take_nothing_of_this_package(what, tmp_path, monkeypatch):
    place = elsewhere(tmp_path, what, labels=6)
    folder, backbone = (place / "path" / "to" / name for name in ("this/folder", "backbone"))
    _, alone = blocks(folder)
    assert "pgp_hf" not in alone
    monkeypatch.chdir(place)
    names: dict = {}
    exec(compile(alone, "card", "exec"), names)
    classifier = load_pretrained(folder, **({"backbone": backbone} if backbone.exists() else {}))
    assert not names["model"].training and names["scores"].shape == (1, 6)
    assert torch.equal(names["scores"][:, classifier.classes], known_scores(place, classifier)[:, classifier.classes])


def test_a_whole_model_without_an_image_processor_takes_another(tmp_path, monkeypatch):
    place = elsewhere(tmp_path, "all", labels=6)
    folder = place / "path" / "to" / "this" / "folder"
    for name in ("preprocessor_config.json", "digests.json"):  # as of a run without one
        (folder / name).unlink()
    tiny.processor().save_pretrained(place / "path" / "to" / "backbone")
    content = [read_json(folder / name) for name in ("results.json", "stream.json", "config.json", "projection.json")]
    card.save_card(folder / "README.md", *content)
    monkeypatch.chdir(place)
    names: dict = {}
    exec(compile("\n".join(blocks(folder)), "card", "exec"), names)
    classifier = names["classifier"]
    assert torch.equal(names["scores"][:, classifier.classes], known_scores(place, classifier)[:, classifier.classes])
