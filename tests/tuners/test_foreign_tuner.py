"""A tuner that the package does not have, defined here: registered, it is trained, saved, loaded, resumed and described."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from foreign import HEAD, PROMPT, SharedTokenConfig, SharedTokenModel, registered_tuner
from peft import PeftModel
from peft import mapping as registry
from safetensors.torch import load_file

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.models import KeepsClassStatistics, Protectable, SelectsPrompts, StreamModel, stream_model
from pgp_hf.tuners import L2PConfig, L2PModel, register
from pgp_hf.tuners.base import PromptConfig


@pytest.fixture(scope="module", autouse=True)
def registered():
    with registered_tuner():
        yield


def model(**settings) -> PeftModel:
    return tiny.model(SharedTokenConfig(**{"head": "statistics", **settings}))


def trainer(folder, **kwargs):
    return tiny.trainer(folder, model=model(), stream=tiny.stream(num_tasks=2), **kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    """A finished run of two tasks: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("foreign")
    made = trainer(folder)
    made.train()
    return made, folder


def test_registering_is_idempotent_and_guards_names():
    register(SharedTokenConfig, SharedTokenModel)
    assert registry.PEFT_TYPE_TO_TUNER_MAPPING["SHARED_TOKEN"] is SharedTokenModel
    assert registry.PEFT_TYPE_TO_PREFIX_MAPPING["SHARED_TOKEN"] == "shared_"
    namesake = dataclass(type("Namesake", (L2PConfig,), {}))
    with pytest.raises(RuntimeError, match="already has a method 'l2p' .*L2PConfig.*Namesake.* choose another"):
        register(namesake, L2PModel)
    lower = dataclass(type("LowerCase", (PromptConfig,), {"method_name": "Lower"}))
    with pytest.raises(ValueError, match="LowerCase has method_name='Lower': .* as 'LOWER' is"):
        register(lower, SharedTokenModel)


def test_it_is_met_by_the_protocols():
    tuner = stream_model(model())
    assert isinstance(tuner, SharedTokenModel) and tuner.name == "shared_token"
    assert all(isinstance(tuner, kind) for kind in (StreamModel, Protectable, KeepsClassStatistics, SelectsPrompts))
    assert set(tuner.trainable()) == {PROMPT, f"{HEAD}.weight", f"{HEAD}.bias"}
    assert tuner.settings()["scale"] == 0.5 and "id2label" not in tuner.settings()


def test_a_run_learns_and_projects(run):
    made, folder = run
    results = made.results.to_dict()
    assert results["method"] == "shared_token" and len(results["accuracy_matrix"][1]) == 2
    assert results["heads"].keys() == {"linear", "statistics"}
    start = model().base_model.trainable()[PROMPT].detach()
    first, last = (load_file(folder / task / "adapter_model.safetensors")[PROMPT] for task in ("task-1", "task-2"))
    basis = load_file(folder / "task-1" / "projection.safetensors")[PROMPT].double()
    assert not torch.equal(start, first)
    moved = (last - first).double()
    assert moved.norm() > 1e-4 and (moved @ basis).norm() < 1e-5 * moved.norm()
    assert ((first - start).double() @ basis).norm() > 1e-2 * (first - start).norm()  # nothing held the first task


def test_its_card_says_what_it_is(run):
    card = (run[1] / "README.md").read_text()
    assert "one token, drawn with a standard deviation of 0.5" in card and "SHARED_TOKEN" in card.upper()


def test_its_folder_is_a_classifier(run):
    made, folder = run
    loaded = load_pretrained(folder, backbone=tiny.backbone())
    assert loaded.classes == made.stream.class_order
    photos = [made.stream.test(t)[i]["image"] for t in range(2) for i in range(3)]
    pixels = tiny.processor()(photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = made.model.eval()(pixel_values=pixels).logits
        sure = made.tuner.statistics.temperature  # a classifier's scores are calibrated
        assert torch.equal(loaded.model(pixel_values=pixels).logits, expected / sure)
        bare = PeftModel.from_pretrained(tiny.backbone(), folder).eval()
        assert torch.equal(bare(pixel_values=pixels).logits, expected)
        with loaded.model.disable_adapter():  # the token has its part in it
            assert not torch.allclose(loaded.model(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("method", ["attention", "functional"])
def test_other_projections_take_it(tmp_path, method):
    made = trainer(tmp_path, projection=ProjectionConfig(method=method, energy=0.7), num_train_epochs=1)
    made.train()
    assert made.results.to_dict()["projection_rank"][0] > 0


def test_resumed_is_straight(run, tmp_path):
    made, folder = run
    trainer(tmp_path).train_task(0)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_results(made.results.to_dict(), resumed.results.to_dict())
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        straight, again = load_file(folder / file), load_file(tmp_path / file)
        assert straight.keys() == again.keys() and all(torch.equal(straight[name], again[name]) for name in straight)


def test_another_setting_is_not_continued(run, tmp_path):
    other = tiny.trainer(tmp_path, model=model(scale=0.25), stream=tiny.stream(num_tasks=2))
    with pytest.raises(ValueError, match="has scale=0.5, this one 0.25"):
        other.train(resume_from_checkpoint=str(run[1]))
