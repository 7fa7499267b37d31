"""A stream on every family of backbones: trained, projected, saved, resumed, loaded; also from checkpoints with a head."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import tiny
import torch
from families import ADAPTED, BY_NAME
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, TaskStream, load_backbone, load_pretrained
from pgp_hf.backbones import find

pytestmark = pytest.mark.usefixtures("without_figures")

FUNCTIONAL = ("SigLIP", "DINOv2")
PAIRS = [f"{name}, {adapter}" for name, adapter in ADAPTED]


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    """Breaks off in the middle of the last task, one step after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and Path(args.output_dir, "checkpoints", "task-2").exists():
            raise Stopped


@pytest.mark.parametrize("pair", tiny.some_of(PAIRS, "DINOv3, l2p"))
def test_a_stream_is_learned_resumed_and_loaded(tmp_path, pair):
    name, adapter = pair.split(", ")
    families.make(name).save_pretrained(tmp_path / "backbone")
    attention = "eager" if adapter == "dualprompt" else "sdpa"
    settings: dict = {}
    head = "statistics" if adapter == "l2p" else "linear"

    def trainer(folder, **more):
        stream = tiny.stream(num_tasks=2, dataset=tiny.data(train=4, test=2))
        with tiny.seeded(5):  # of the head
            base = load_backbone(tmp_path / "backbone", stream, attn_implementation=attention)
        model = tiny.model(adapter, base=base, head=head)
        return tiny.trainer(
            tmp_path / folder, model=model, stream=stream, save_strategy="steps", save_steps=2, **settings, **more
        )

    settings["projection"] = ProjectionConfig(
        "functional" if name in FUNCTIONAL else "pgp", energy=0.9, key_energy=0.9
    )
    straight = trainer("straight")
    straight.train()
    done = [tmp_path / "straight" / f"task-{task}" for task in (1, 2)]
    stopped = trainer("resumed", callbacks=[Stop()])
    with pytest.raises(Stopped):
        stopped.train()
    trainer("resumed").train(resume_from_checkpoint=True)
    own, again = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("straight", "resumed"))
    assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own)

    # nothing has leaked into what the first task's images see
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in done)
    bases = load_file(done[0] / "projection.safetensors")
    moved = [key for key in bases if not torch.equal(first[key], last[key])]
    assert moved and bases.keys() == straight.tuner.prompt_parameters().keys()
    for key in moved:
        *batch, n, _ = bases[key].shape
        change = (last[key] - first[key]).double().reshape(*batch, -1, n)
        assert (change @ bases[key].double()).norm() < 1e-4 * change.norm(), key

    images = [straight.stream.test(1)[i]["image"] for i in range(2)]
    classifier = load_pretrained(tmp_path / "straight", attn_implementation=attention)
    pixels, trained = tiny.processor()(images, return_tensors="pt")["pixel_values"], straight.model.eval()
    assert torch.equal(tiny.features(classifier.model, pixels), tiny.features(trained, pixels))
    with torch.no_grad():  # the classifier has a temperature
        best = trained(pixel_values=pixels).logits.argmax(-1).tolist()
    assert [one[0]["label"] for one in classifier.predict(images)] == [
        straight.stream.id2label[label] for label in best
    ]


@pytest.mark.parametrize("kind", tiny.some_of(("bare DINOv3", "bare DINOv2", "SigLIP"), "bare DINOv3"))
def test_classes_that_nobody_foresaw(tmp_path, kind):
    """A head of zero classes is opened, of the width that the family's head reads, and grows."""
    name = kind.removeprefix("bare ")
    families.make(name).save_pretrained(tmp_path / "backbone")
    base = load_backbone(tmp_path / "backbone", TaskStream.empty())
    model = tiny.model("l2p", base=base.get_submodule(find(base)[0]) if "bare" in kind else base, head="statistics")
    trainer = tiny.trainer(tmp_path / "run", model=model, stream=TaskStream.empty(), num_train_epochs=1)
    data = tiny.data(classes=4)
    for task in (0, 1):
        rows = {split: [i for i, label in enumerate(data[split]["label"]) if label // 2 == task] for split in data}
        trainer.learn(*(data[split].select(rows[split]) for split in ("train", "test")))
    width = BY_NAME[name].parts * BY_NAME[name].width(trainer.tuner.backbone)
    assert trainer.model.get_base_model().classifier.weight.shape == (4, width)
    classifier = load_pretrained(tmp_path / "run", backbone=tmp_path / "backbone")
    assert classifier.classes == [0, 1, 2, 3] and type(classifier.model.get_base_model()) is families.classifier_of(
        BY_NAME[name]
    )
