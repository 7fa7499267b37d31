"""The code in the card of a trained run, executed as it stands: in another process, and from a folder that was moved."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from pgp_hf import load_pretrained

CASES = {"l2p": "statistics", "clip": "linear"}


@pytest.fixture(scope="module", params=CASES)
def place(request, tmp_path_factory) -> Path:
    """A folder in which `path/to/this/folder` is the second task of a run, beside its backbone and a photo."""
    method, root = request.param, tmp_path_factory.mktemp(request.param)
    run, backbone = tiny.finished_run(root / "trained", method, head=CASES[method]), root / "trained" / "backbone"
    if method == "l2p":  # a head in the way
        tiny.backbone(num_labels=3).save_pretrained(backbone)
    place = root / "elsewhere"
    shutil.copytree(run / "task-2", place / "path" / "to" / "this" / "folder")
    backbone.rename(place / "path" / "to" / "backbone")
    Image.effect_noise((40, 30), 90).convert("RGB").save(place / "photo.jpg")
    return place


def test_it_predicts_and_scores_like_the_run(place):
    folder, backbone = (place / "path" / "to" / name for name in ("this/folder", "backbone"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert str(place.parent) not in text
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert code.count("path/to/backbone") == 2 and "revision=" not in code
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nimport json\nprint(json.dumps(scores.tolist()))"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted, scores = done.stdout.splitlines()

    classifier = load_pretrained(folder, backbone=backbone)
    expected = classifier.predict(place / "photo.jpg", top_k=3)
    found = ast.literal_eval(predicted)  # of another process, whose threads may round otherwise
    assert [[one["label"] for one in image] for image in found] == [[one["label"] for one in expected[0]]]
    assert [one["score"] for one in found[0]] == pytest.approx([one["score"] for one in expected[0]], abs=1e-4)
    assert len(expected[0]) == 3
    with torch.no_grad():
        pixels = classifier.processor(Image.open(place / "photo.jpg"), return_tensors="pt")["pixel_values"]
        known = classifier.model(pixel_values=pixels).logits
    learned = torch.tensor(classifier.classes)
    assert torch.allclose(torch.tensor(json.loads(scores))[:, learned], known[:, learned], rtol=1e-4, atol=1e-3)
    assert known.shape[1] == 6 and len(learned) == 4
