"""The guides: their code runs from top to bottom, on images and a backbone that are small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch

from pgp_hf import embedded
from pgp_hf.projection import Projection

GUIDES = Path(__file__).parents[2] / "examples" / "guides"

pytestmark = pytest.mark.usefixtures("without_figures")


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Ten classes and a tiny backbone in place of what the package has."""
    monkeypatch.chdir(tmp_path)
    tiny.backbone().save_pretrained("backbone")
    tiny.processor().save_pretrained("backbone")
    monkeypatch.setattr(embedded, "vit_path", lambda: tmp_path / "backbone")
    monkeypatch.setattr(embedded, "digits", lambda seed=0: tiny.data(classes=10, train=10, test=2))
    monkeypatch.setattr(
        "transformers.AutoModelForImageClassification.from_pretrained",
        lambda name, num_labels: tiny.backbone(num_labels=num_labels),
    )


def test_a_plain_loop(small, monkeypatch):
    data, loop, save = blocks("plain_pytorch.md")
    assert len([line for line in loop.splitlines() if line]) <= 25
    update, ranks, seen = Projection.update_bases, [], []

    def checked(self, model, batches, **kwargs):
        parameters = model.prompt_parameters()
        self.projector.check(parameters.items())  # that the task has moved them in the null space alone
        seen.append(torch.cat([value.detach().flatten() for value in parameters.values()]).clone())
        update(self, model, batches, **kwargs)
        ranks.append(self.rank)

    monkeypatch.setattr(Projection, "update_bases", checked)
    here: dict = {}
    exec(compile(data, "data", "exec"), here)
    exec(compile(loop, "loop", "exec"), here)
    assert len(ranks) == 5 and ranks == sorted(ranks) and ranks[0] > 0
    assert not torch.equal(seen[0], seen[1])  # they have moved
    assert not here["optimizer"]._optimizer_step_post_hooks  # the last task's are gone as well
    bases = {name: basis.columns for name, basis in here["projection"].bases.items()}
    exec(compile(save, "save", "exec"), here)
    from safetensors.torch import load_file

    saved = load_file("adapter/projection.safetensors")
    assert saved.keys() == bases.keys() and all(torch.allclose(saved[name].double(), bases[name]) for name in bases)


def test_the_best_checkpoint_of_each_task(small):
    (code,) = blocks("best_checkpoint.md")
    here: dict = {}
    exec(compile(code, "best", "exec"), here)
    results, trainer = json.loads(Path("best/results.json").read_text()), here["trainer"]
    assert results["finished_tasks"] == 5 and trainer.args.save_strategy == "epoch"
    seen = [log["eval_current_accuracy"] for log in trainer.state.log_history if "eval_current_accuracy" in log]
    assert len(seen) == 3 and trainer.state.best_metric == max(seen) == results["accuracy_matrix"][4][4]
