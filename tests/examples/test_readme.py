"""The README's Python, from top to bottom: the images and the backbone are small, and the code is as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("without_figures")
def test_its_python_runs(tmp_path, monkeypatch):
    first, more = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in first.splitlines() if line and "import " not in line]) <= 10
    monkeypatch.chdir(tmp_path)
    tiny.backbone(num_labels=3).save_pretrained("backbone")  # with a head for other classes
    tiny.processor().save_pretrained("backbone")
    data = tiny.data(classes=10, train=4, test=2)
    known = data.rename_column("label", "fine_label")
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"uoft-cs/cifar100": known}[name])
    here: dict = {}
    exec(compile(first.replace('"google/vit-base-patch16-224"', '"backbone"'), "first", "exec"), here)
    assert here["trainer"].results.to_dict()["finished_tasks"] == 10
    for row, name in enumerate(("cat", "dog")):
        (tmp_path / "new_photos" / name).mkdir(parents=True)
        for i in range(5):
            data["train"][4 * row + i]["image"].save(tmp_path / "new_photos" / name / f"{i}.png")
    data["test"][0]["image"].save("cat.jpg")
    exec(compile(more, "more", "exec"), here)
    classifier = here["classifier"]
    assert len(classifier.classes) == 12 and {"cat", "dog"} < set(classifier.id2label.values())
