"""A model that has names for its classes keeps them, as long as none of them is another class of the stream."""

from __future__ import annotations

import pytest
import tiny

from pgp_hf import load_pretrained, methods

pytestmark = pytest.mark.usefixtures("without_figures")

NAMES = [f"class {label}" for label in range(tiny.CLASSES)]


def clip(names: list[str]):
    tokens = tiny.config("clip").class_tokens
    return tiny.model(
        "clip", class_tokens=[tokens[NAMES.index(name)] for name in names], id2label=dict(enumerate(names))
    )


def l2p(names: list[str]):
    return tiny.model(base=tiny.backbone(id2label=dict(enumerate(names))))


def plain(names: list[str]):
    return tiny.plain(base=tiny.backbone(id2label=dict(enumerate(names))))


@pytest.mark.parametrize("make", [clip, l2p, plain])
def test_names_in_another_order_are_refused(make, tmp_path):
    swapped = [NAMES[1], NAMES[0], *NAMES[2:]]
    with pytest.raises(ValueError, match=r"'class 0' as class 1, the stream has it as class 0.*id2label.*for_classes"):
        tiny.trainer(tmp_path, model=make(swapped))


@pytest.mark.parametrize("make", [l2p, plain])
def test_one_name_of_another_class_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"'class 5' as class 2, the stream has it as class 5"):
        tiny.trainer(tmp_path, model=make([*NAMES[:2], NAMES[5], *NAMES[3:5], "another"]))


@pytest.mark.parametrize("make", [l2p, plain])
def test_names_of_its_own_are_kept(make, tmp_path):
    names = ["ant", "bee", *NAMES[2:]]
    method = {"method": methods.create("fine_tuning")} if make is plain else {}
    trainer = tiny.trainer(tmp_path, model=make(names), **method)
    assert list(trainer.stream_model.class_names.values()) == names


def test_a_prediction_has_the_name_of_its_training_images(tmp_path):
    run = tiny.finished_run(tmp_path)
    data = tiny.data()["test"]
    found = load_pretrained(run).predict(data["image"], top_k=tiny.CLASSES)
    assert {label["label"] for label in found[0]} == set(data.features["label"].names)
