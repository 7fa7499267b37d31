"""The number of entries that prediction chooses among is in the state dict, so that nothing that predicts is outside it."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from pgp_hf import StreamTrainer, load_pretrained

pytestmark = pytest.mark.usefixtures("without_figures")

KINDS = {"dualprompt": {"pool_size": 3}, "l2p": {"grow_pool": 2}}
NAMES = {kind: f"base_model.model.vit.embeddings.{kind}_learned_entries" for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A run of which two tasks of three are learned: its adapter, the folder, and the model."""
    folder, adapter = tmp_path_factory.mktemp("run"), request.param
    base = tiny.backbone()
    base.save_pretrained(folder / "backbone")
    model = tiny.model(adapter, base=base, **KINDS[adapter])
    model.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    with tiny.without_figures():
        trainer = tiny.trainer(folder / "run", model=model, num_train_epochs=1)
        trainer.train_task(0)
        trainer.train_task(1)
    return adapter, folder / "run" / "task-2", trainer.model.eval()


def fresh(adapter: str, model, **settings):
    """A model with an untrained adapter of the same sizes, which has learned nothing."""
    made = tiny.model(adapter, seed=5, **KINDS[adapter], **settings)
    if adapter == "l2p":
        made.base_model.add_task(2, [], 0)
    made.base_model.adapter_config.learned_entries = None
    return made


def different(a, b, pixels) -> bool:
    with torch.no_grad():
        return not torch.equal(a(pixel_values=pixels).logits, b(pixel_values=pixels).logits)


def test_a_state_dict_makes_a_fresh_model_predict_the_same(run):
    adapter, _, model = run
    pixels, state = tiny.images(64), get_peft_model_state_dict(model)
    learned = model.base_model.adapter_config.learned_entries
    assert int(state[NAMES[adapter]]) == learned < model.base_model.adapter_config.entries
    other = fresh(adapter, model)
    set_peft_model_state_dict(other, {name: value for name, value in state.items() if name != NAMES[adapter]})
    assert different(other, model, pixels)  # it matters
    set_peft_model_state_dict(other, state)
    assert other.base_model.adapter_config.learned_entries == learned
    assert not different(other, model, pixels)

    whole = fresh(adapter, model)
    whole.load_state_dict(model.state_dict())
    assert not different(whole, model, pixels)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_every_loader_reads_it(run, options):
    adapter, folder, model = run
    pixels = tiny.images(64)
    loaded = PeftModel.from_pretrained(tiny.backbone(), folder, **options).eval()
    integrated = AutoModelForImageClassification.from_pretrained(folder).eval()
    for other in (loaded, integrated, copy.deepcopy(loaded)):
        assert not different(other, model, pixels)
    assert loaded.base_model.adapter_config.learned_entries == model.base_model.adapter_config.learned_entries


def test_an_adapter_of_an_earlier_version_is_loaded_and_continued(run, tmp_path):
    adapter, folder, model = run
    old = tmp_path / "old"
    old.mkdir()
    for name in (
        "adapter_config.json",
        "stream.json",
        "projection.json",
        "projection.safetensors",
        "preprocessor_config.json",
    ):
        (old / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[NAMES[adapter]]
    save_file(tensors, old / "adapter_model.safetensors")
    config = json.loads((old / "adapter_config.json").read_text())
    del config["image_size"]
    (old / "adapter_config.json").write_text(json.dumps(config))
    results = json.loads((folder / "results.json").read_text())
    del results["sha256"]
    (old / "results.json").write_text(json.dumps(results))
    classifier = load_pretrained(old)
    learned = classifier.classes
    pixels = tiny.images(64)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        assert torch.equal(classifier.model(pixel_values=pixels).logits[:, learned], expected[:, learned])
    again = StreamTrainer.from_pretrained(old, args=tiny.arguments(tmp_path / "more", num_train_epochs=1))
    again.learn(tiny.data(seed=4)["train"], tiny.data(seed=4)["test"])
    assert NAMES[adapter] in load_file(tmp_path / "more" / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [torch.tensor(1), torch.tensor(99), torch.tensor(-1)])
def test_a_number_that_contradicts_the_configuration_is_refused(run, tmp_path, value):
    adapter, folder, _ = run
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, NAMES[adapter]: value}, tmp_path / "adapter_model.safetensors")
    results = json.loads((folder / "results.json").read_text())
    del results["sha256"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "digests.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=rf"learned_entries' is {int(value)}, and adapter_config.json has"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("value", [torch.tensor(99), torch.tensor(-1), torch.tensor(1.0)])
def test_a_number_that_cannot_be_is_refused_by_any_loader(run, value):
    adapter, _, model = run
    other = fresh(adapter, model)
    state = {**get_peft_model_state_dict(model), NAMES[adapter]: value}
    with pytest.raises(RuntimeError, match=r"expected a number from 0 to the \d+ entries"):
        set_peft_model_state_dict(other, state)


def test_each_adapter_has_its_own_number():
    model = tiny.model("dualprompt")
    model.add_adapter("second", tiny.config("dualprompt"))
    model.peft_config["default"].learned_entries, model.peft_config["second"].learned_entries = 1, 2
    states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "second")}
    assert [int(state[NAMES["dualprompt"]]) for state in states.values()] == [1, 2]
    set_peft_model_state_dict(model, states["default"], adapter_name="second")
    assert [config.learned_entries for config in model.peft_config.values()] == [1, 1]
    model.delete_adapter("second")
    assert int(get_peft_model_state_dict(model)[NAMES["dualprompt"]]) == 1
