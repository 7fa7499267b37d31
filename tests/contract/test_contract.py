"""Whatever can be registered keeps one contract: it is trained, resumed to the bit, loaded, told apart and shared.

Each pair of a model and a method that go together trains two tasks. A tuner or a method that is registered later is
part of these tests as soon as it is registered (a tuner needs its tiny settings in `tiny.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from foreign import Anchor, registered_method, registered_tuner
from huggingface_hub import ModelCard
from pairs import METHODS, PLAIN, TUNERS, kind_of, make_method, make_model, refusal
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf import load_pretrained
from pgp_hf.models import stream_model

pytestmark = [
    pytest.mark.usefixtures("without_figures"),
    pytest.mark.filterwarnings("ignore:EWC has nothing to hold"),  # in a head alone
]

# by default each model with projected prompts, and each other method with one model (a new method with all)
QUICK = {
    "bic": "clip_prompt",
    "der_mcg": "last:1",
    "derpp": "full",
    "ewc": "dualprompt",
    "fine_tuning": "lora:2",
    "gpm": "full",
    "icarl": "last:1",
    "joint": "head",
    "lwf": "l2p",
    "null_space_adam": "full",
}
BRIEF = [
    pytest.param("linear", model, method, marks=() if QUICK.get(method, model) == model else pytest.mark.slow)
    for model in (*TUNERS, *PLAIN)
    for method in METHODS
]
BRIEF += [
    pytest.param("statistics", tuner, "projected_prompts", marks=() if tuner == "l2p" else pytest.mark.slow)
    for tuner in TUNERS
]
FULL = [("statistics", tuner, method) for tuner in TUNERS for method in METHODS if method != "projected_prompts"]


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    """Breaks off in the middle of the last task, one step after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and Path(args.output_dir, "checkpoints", "task-2").exists():
            raise Interrupted


class Run:
    """Trainers of one pair, which all start from the same."""

    def __init__(self, folder: Path, head: str, model: str, method: str) -> None:
        self.folder, self.head, self.model, self.method = folder, head, model, method

    def trainer(self, name: str, **settings: Any):
        data = tiny.data(train=4, test=2)
        return tiny.trainer(
            self.folder / name,
            model=make_model(self.model, self.folder, self.head),
            method=make_method(self.method),
            stream=tiny.stream(num_tasks=2, dataset=data),
            save_strategy="steps",
            save_steps=2,
            eval_mask="none",
            **settings,
        )


def equal_files(a: Path, b: Path) -> None:
    """Assert that two finished tasks remember the same, to the bit."""
    names = sorted(file.name for file in a.glob("*.safetensors"))
    assert names == sorted(file.name for file in b.glob("*.safetensors")) and len(names) == 3
    for name in names:
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), (name, key)
    for name in ("method.json", "projection.json", "stream.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert tiny.same_results(*(json.loads((folder / "results.json").read_text()) for folder in (a, b)))


@torch.no_grad()
def scores(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return stream_model(model).class_logits(model.eval()(pixel_values=pixels))


def keeps_the_contract(run: Run, python: Any) -> None:
    straight = run.trainer("straight")
    learner = straight.stream_model
    straight.train()
    done = run.folder / "straight" / "task-2"

    # resumed
    broken = run.trainer("resumed", callbacks=[Interrupt()])
    with pytest.raises(Interrupted):
        broken.train()
    resumed = run.trainer("resumed")
    resumed.train(resume_from_checkpoint=True)
    equal_files(done, run.folder / "resumed" / "task-2")

    # told apart
    results = json.loads((done / "results.json").read_text())
    prompts = run.method == "projected_prompts"
    assert results["model"] == run.model and results["method"] == (run.model if prompts else run.method)
    assert results["method_settings"] == make_method(run.method).settings()
    assert results["head"] == run.head

    # loaded
    test = straight.stream.test(1)
    images = [test[i]["image"] for i in range(len(test))]
    pixels = tiny.processor()(images, return_tensors="pt")["pixel_values"]
    trained = scores(straight.model, pixels)
    if run.model not in ("full", "last:1", "head"):
        loaded = PeftModel.from_pretrained(tiny.backbone(kind_of(run.model)), done)
        if run.model != "lora:2":
            rows = [row for row in results["accuracy_matrix"] if row[0] is not None]
            loaded.base_model.resume_after(len(rows) - 1)  # tasks that are learned as one are the first
        torch.testing.assert_close(scores(loaded, pixels), trained, rtol=0, atol=0)
    classifier = load_pretrained(run.folder / "straight", eval_mask="none")
    assert classifier.results == results and len(classifier.id2label) == tiny.CLASSES
    found = straight.predict(test).predictions
    with torch.no_grad():
        statistics = getattr(learner, "statistics", None)  # whose scores the classifier calibrates
        scale = 1.0 if statistics is None or straight.method.adjusts_logits else statistics.temperature
        torch.testing.assert_close(classifier.model(pixel_values=pixels).logits, torch.as_tensor(found) / scale)
    right = [
        answer[0]["label"] == straight.stream.label_names[label]
        for answer, label in zip(classifier.predict(images), test.labels, strict=True)
    ]
    assert 100 * sum(right) / len(right) == pytest.approx(results["accuracy_matrix"][1][1])

    # described
    card = ModelCard.load(run.folder / "straight" / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(results["average_accuracy"], abs=0.01)
    title = straight.method.describe().title
    assert prompts or title in card.text
    assert not re.search(r"`None`|\{\{|/tmp/", card.text)

    # shared
    uploaded = python(
        "from pgp_hf import hub; pushed = hub.push(folder, 'me/run', base_model='me/base'); "
        "result = [pushed.uploaded, pushed.left_out]",
        folder=str(run.folder / "straight"),
    ).value
    assert "task-2" in uploaded[0]
    assert learner.name == run.model


@pytest.mark.parametrize(("head", "model", "method"), BRIEF)
def test_every_pair(tmp_path, python, hub, head, model, method):
    if (said := refusal(model, method, tmp_path, head)) is not None:
        assert len(said.split()) > 8  # a sentence: which model, why, and what to use instead
        return
    keeps_the_contract(Run(tmp_path, head, model, method), python)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("shared_token", "projected_prompts"),
        ("full", Anchor.name),
        pytest.param("l2p", Anchor.name, marks=pytest.mark.slow),
    ],
)
def test_a_tuner_and_a_method_from_outside_the_package(tmp_path, python, hub, model, method):
    with registered_tuner(), registered_method():
        keeps_the_contract(Run(tmp_path, "linear", model, method), python)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "model", "method"), FULL)
def test_the_full_product(tmp_path, python, hub, head, model, method):
    test_every_pair(tmp_path, python, hub, head, model, method)
