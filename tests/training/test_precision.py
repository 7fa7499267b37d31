"""What learns is in float32; a backbone is, unless somebody asks for another precision; evaluation and prediction agree."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import CLIPModel, ViTForImageClassification

from pgp_hf import StreamTrainer, load_pretrained, methods
from pgp_hf.cli.arguments import ModelArguments

pytestmark = pytest.mark.usefixtures("without_figures")

HALF = [torch.bfloat16, torch.float16]


def stored(folder, adapter: str, dtype: torch.dtype):
    """Return a backbone that a folder holds in half precision, as transformers loads it."""
    kind = CLIPModel if adapter == "clip" else ViTForImageClassification
    tiny.backbone(tiny.ADAPTERS[adapter]).to(dtype).save_pretrained(folder / "backbone")
    return kind.from_pretrained(folder / "backbone")


def run(folder, adapter: str, base, **settings) -> StreamTrainer:
    model = tiny.model(adapter, base=base, **settings)
    model.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    trainer = tiny.trainer(folder / "run", model=model, num_train_epochs=1)
    trainer.train()
    return trainer


def dtypes(model, learning: bool | None = None) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if learning is None or p.requires_grad == learning}


def along(folder, t: int) -> float:
    """Return the largest share of a parameter's movement in task t that lies along protected directions."""
    before, after = (load_file(folder / f"task-{i}" / "adapter_model.safetensors") for i in (t - 1, t))
    shares = [0.0]
    for name, basis in load_file(folder / f"task-{t - 1}" / "projection.safetensors").items():
        moved = (after[name] - before[name]).double()
        rows = moved if basis.ndim > 2 else moved.flatten(0, -2) if moved.shape[-1] == len(basis) else moved.flatten(1)
        if moved.any():
            shares.append(float((rows @ basis.double()).norm() / moved.norm()))
    return max(shares)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_the_command_line_loads_float32_whatever_the_file_has(tmp_path, dtype):
    assert stored(tmp_path, "l2p", dtype).dtype == dtype  # as transformers does
    arguments = ModelArguments(str(tmp_path / "backbone"))
    assert dtypes(arguments.backbone(tiny.stream())) == {torch.float32}
    chosen = ModelArguments(str(tmp_path / "backbone"), dtype="bfloat16")
    assert dtypes(chosen.backbone(tiny.stream())) == {torch.bfloat16}
    stored(tmp_path, "clip", dtype)
    assert dtypes(arguments.clip()) == {torch.float32}
    assert dtypes(chosen.clip()) == {torch.bfloat16}


def test_a_run_in_float32_is_loaded_in_float32_on_a_backbone_that_is_stored_in_less(tmp_path):
    stored(tmp_path, "l2p", torch.float16)
    trainer = run(tmp_path, "l2p", ModelArguments(str(tmp_path / "backbone")).backbone(tiny.stream()))
    loaded, images = load_pretrained(tmp_path / "run"), tiny.images(4)
    assert dtypes(loaded.model) == {torch.float32}
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=images).logits
        assert torch.equal(loaded.model(pixel_values=images).logits, expected)
    assert dtypes(StreamTrainer.from_pretrained(tmp_path / "run", args=trainer.args).model) == {torch.float32}


@pytest.mark.parametrize("adapter", tiny.some_of(tiny.ADAPTERS, "dualprompt"))
def test_a_run_in_half_precision_on_request(tmp_path, adapter):
    """What learns is in float32 all the same, holds its guarantee, and is loaded as it was trained."""
    trainer = run(tmp_path, adapter, stored(tmp_path, adapter, torch.bfloat16))
    assert dtypes(trainer.model, learning=True) == {torch.float32}
    assert dtypes(trainer.model, learning=False) >= {torch.bfloat16}
    assert all(along(tmp_path / "run", t) < 1e-5 for t in (2, 3))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert not [name for name, tensor in saved.items() if tensor.dtype in HALF]

    loaded, images = load_pretrained(tmp_path / "run"), tiny.images(4)
    with torch.no_grad():
        expected = trainer.stream_model.class_logits(trainer.model.eval()(pixel_values=images))
        assert torch.equal(loaded.model(pixel_values=images).logits, expected)
    assert dtypes(load_pretrained(tmp_path / "run", dtype=torch.float32).model) == {torch.float32}
    again = StreamTrainer.from_pretrained(tmp_path / "run", args=trainer.args, dtype=torch.float32)
    assert dtypes(again.model) == {torch.float32}


@pytest.mark.parametrize(
    ("adapter", "head"),
    [
        ("l2p", "statistics"),
        ("clip", "linear"),
        pytest.param("l2p", "linear", marks=pytest.mark.slow),
        pytest.param("clip", "statistics", marks=pytest.mark.slow),
        pytest.param("dualprompt", "linear", marks=pytest.mark.slow),
        pytest.param("dualprompt", "statistics", marks=pytest.mark.slow),
    ],
)
def test_prediction_in_half_precision_leaves_adapter_and_statistics_as_they_are(tmp_path, adapter, head):
    folder = tiny.finished_run(tmp_path, adapter, head=head)
    exact, half = load_pretrained(folder), load_pretrained(folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    kept = {name: tensor for name, tensor in exact.model.state_dict().items() if "prompt" in name or "statis" in name}
    assert kept
    for name, tensor in kept.items():
        assert torch.equal(half.model.state_dict()[name], tensor), name
    photos = [tiny.data()["test"][i]["image"] for i in range(12)]
    same = [a == b for a, b in zip(names(exact, photos), names(half, photos), strict=True)]
    assert sum(same) >= 10


def names(classifier, photos) -> list[str]:
    return [found[0]["label"] for found in classifier.predict(photos)]


def test_a_head_that_begins_empty_learns_in_float32(tmp_path):
    from pgp_hf import TaskStream

    base = tiny.backbone("backbone").to(torch.bfloat16)
    trainer = tiny.trainer(tmp_path, model=tiny.model("l2p", base=base), stream=TaskStream.empty(), num_train_epochs=1)
    trainer.learn(tiny.data()["train"], tiny.data()["test"])
    assert dtypes(trainer.model, learning=True) == {torch.float32}


def test_an_adapter_disabled_on_a_half_precise_backbone_leaves_it_as_it_was():
    base, images = tiny.backbone().to(torch.bfloat16), tiny.images(2).to(torch.bfloat16)
    with torch.no_grad():
        before = base(pixel_values=images).logits
        model = tiny.model("dualprompt", base=base)
        with model.disable_adapter():
            assert torch.equal(model(pixel_values=images).logits, before)
        restored = model.base_model.unload()
        assert torch.equal(restored(pixel_values=images).logits, before)
    assert dtypes(restored) == {torch.bfloat16}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_what_learns_in_half_precision_is_refused(tmp_path, dtype):
    uncast = get_peft_model(tiny.backbone().to(dtype), tiny.config(), autocast_adapter_dtype=False)
    name = str(dtype).removeprefix("torch.")
    for model in (uncast, tiny.model().to(dtype), tiny.model("dualprompt").to(dtype)):
        with pytest.raises(ValueError, match=rf"learn are in {name}.*dtype=torch.float32.*bf16=True"):
            tiny.trainer(tmp_path, model=model)
    for model in (tiny.plain(base=tiny.backbone().to(dtype)), tiny.plain("lora:2", tiny.backbone().to(dtype))):
        with pytest.raises(ValueError, match=rf"learn are in {name}"):
            tiny.trainer(tmp_path, model=model, method=methods.create("fine_tuning"))


def test_a_backbone_in_float16_is_refused_without_scaled_losses(tmp_path):
    with pytest.raises(ValueError, match=r"float16, in which gradients vanish .*dtype=torch.float32"):
        tiny.trainer(tmp_path, model=tiny.model(base=tiny.backbone().to(torch.float16)))
