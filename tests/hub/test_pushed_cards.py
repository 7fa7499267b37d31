"""The code in a card on the Hub, executed as it stands: it loads the revision that the card belongs to."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image

from pgp_hf import load_pretrained

UPLOAD = """
from huggingface_hub import HfApi
from pgp_hf import hub
HfApi().create_repo("me/tiny-vit")
HfApi().upload_folder(repo_id="me/tiny-vit", folder_path=backbone)
hub.push(run, "me/run", base_model="me/tiny-vit")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run and its backbone, both in local folders."""
    root = tmp_path_factory.mktemp("card")
    return tiny.finished_run(root), root / "backbone"


def test_each_revision_loads_by_the_code_of_its_own_card(hub, python, trained, tmp_path):
    run, backbone = trained
    python(UPLOAD, run=str(run), backbone=str(backbone))
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "photo.jpg")
    for task in (1, 2, 3):
        card = hub.repos["me/run"].files(f"task-{task}")["README.md"].decode()
        assert ModelCard(card).data.base_model == "me/tiny-vit"
        code = "\n".join(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL))
        assert code.count(f'"me/run", revision="task-{task}"') == 3 and "path/to" not in code
        start, end = "import os; before = os.getcwd(); os.chdir(folder)", "result = scores.tolist(); os.chdir(before)"
        answer = python(f"{start}\n{code}\n{end}", folder=str(tmp_path))
        classifier = load_pretrained(run, f"task-{task}", backbone=backbone)
        assert repr(classifier.predict(tmp_path / "photo.jpg", top_k=3)) in answer.out.splitlines()
        learned = classifier.classes
        with torch.no_grad():
            pixels = classifier.processor(Image.open(tmp_path / "photo.jpg"), return_tensors="pt")["pixel_values"]
            known = classifier.model(pixel_values=pixels).logits[:, learned]
        assert torch.equal(torch.tensor(answer.value)[:, learned], known) and len(learned) == 2 * task
