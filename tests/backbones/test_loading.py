"""Backbones are loaded with a head for a stream, whatever the checkpoint has; what is supported is told by one list."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from families import BY_NAME
from PIL import Image
from torch.nn import functional as F

import pgp_hf
from pgp_hf import L2PConfig, TaskStream, backbones, embedded, load_backbone
from pgp_hf.backbones import find
from pgp_hf.cli.model_arguments import ModelArguments


@pytest.fixture
def silent(caplog):
    """Nothing is said by transformers."""
    library = hf.utils.logging.get_logger("transformers")
    library.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        yield
    library.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["other classes", "as many classes", "bare"])
@pytest.mark.parametrize("name", tiny.some_of(BY_NAME, "ViT", "DINOv3"))
def test_any_checkpoint_gets_a_head_for_the_stream(tmp_path, silent, name, kind):
    if name == "SigLIP" and kind == "bare":
        pytest.skip("transformers has no head for SigLIP's vision tower by itself")
    stream, saved = tiny.stream(), families.make(name, labels=tiny.CLASSES if kind == "as many classes" else 10)
    place = find(saved)[0]
    (saved.get_submodule(place) if kind == "bare" else saved).half().save_pretrained(tmp_path)
    model = load_backbone(tmp_path, stream)
    assert type(model) is type(saved) and model.dtype == torch.float32
    assert model.config.id2label == stream.id2label and model.num_labels == tiny.CLASSES
    weights, kept = model.get_submodule(place).state_dict(), saved.get_submodule(place).float().state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in weights.items())
    assert model.classifier.weight.shape == (
        tiny.CLASSES,
        BY_NAME[name].parts * BY_NAME[name].width(model.get_submodule(place)),
    )
    if kind == "as many classes":
        assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    assert tiny.model("l2p", base=model)(pixel_values=tiny.images(2)).logits.shape == (2, tiny.CLASSES)


def test_a_distilled_deit_is_loaded_with_one_head(tmp_path, silent):
    with tiny.seeded(1):
        saved = hf.DeiTForImageClassificationWithTeacher(families.config("DeiT", labels=10))
    saved.save_pretrained(tmp_path)
    model = load_backbone(tmp_path, tiny.stream())
    assert type(model) is hf.DeiTForImageClassification and model.classifier.out_features == tiny.CLASSES
    run = tiny.model("l2p", base=model)
    run.base_model.adapter_config.base_model_name_or_path = str(tmp_path)
    run.save_pretrained(tmp_path / "adapter")
    tiny.processor().save_pretrained(tmp_path / "adapter")
    loaded, pixels = pgp_hf.load_pretrained(tmp_path / "adapter").model, tiny.images(2)
    assert torch.equal(tiny.features(loaded, pixels), tiny.features(run, pixels))


def test_the_vision_tower_of_a_whole_siglip(tmp_path):
    tower = families.make("SigLIP")
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
    config = hf.SiglipConfig(
        vision_config=tower.config.vision_config.to_dict(), text_config={**text, "vocab_size": 50}
    )
    whole = hf.SiglipModel(config)
    whole.vision_model.load_state_dict(tower.vision_model.state_dict())
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SiglipModel cannot take visual prompts: it does not read single images"):
        tiny.model("l2p", base=whole)
    for stream in (tiny.stream(), TaskStream.empty()):  # transformers' own fails without a class
        model, pixels = load_backbone(tmp_path, stream), tiny.images(2)
        assert type(model) is hf.SiglipForImageClassification
        torch.testing.assert_close(model.vision_model(pixels).pooler_output, tower.vision_model(pixels).pooler_output)


def test_the_backbone_of_the_package_is_the_default(silent):
    own, named = load_backbone(), load_backbone("pgp_hf:embedded-vit", attn_implementation="eager")
    assert own.config.name_or_path == str(embedded.vit_path()) == named.config.name_or_path
    assert named.config._attn_implementation == "eager" and load_backbone(dtype="bfloat16").dtype == torch.bfloat16
    with tiny.seeded(3):
        mine = load_backbone(None, tiny.stream())
    with tiny.seeded(3):
        theirs = ModelArguments().backbone(tiny.stream())  # of the command line: the same numbers
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


# ---- DINOv3's image processor ----------------------------------------------------------------------------------------


def test_dinov3_has_an_image_processor_without_torchvision(tmp_path):
    """Rescale, resize with antialiasing, normalise: as torchvision does it, up to the rounding of pixels."""
    families.make("DINOv3").save_pretrained(tmp_path)
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 20, "width": 20}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))  # as the checkpoints have it
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (45, 33, 3), dtype=np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (20, 20), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert ((found - (image - mean) / std).abs() * std).max() < 1 / 255
    processor.save_pretrained(tmp_path / "adapter")
    again = hf.AutoImageProcessor.from_pretrained(tmp_path / "adapter", backend="pil")
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()


# ---- one list --------------------------------------------------------------------------------------------------------


def test_the_guide_and_the_refusal_name_what_is_supported():
    guide = (Path(__file__).parents[2] / "examples" / "guides" / "backbones.md").read_text(encoding="utf-8")
    assert f"\n{backbones.table()}\n" in guide
    with pytest.raises(ValueError) as refusal:
        tiny.model("l2p", base=hf.ResNetForImageClassification(hf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])))
    assert all(name in str(refusal.value) for name in BY_NAME)
    assert str(refusal.value).count(". ") == 1  # the reason, and what to do


def test_the_card_tells_what_the_head_reads():
    for name, prompt, token in (
        ("ViT", "the mean of the prompt tokens", "the CLS token"),
        (
            "DINOv2",
            "the mean of the prompt tokens and the mean of the patches",
            "the CLS token and the mean of the patches",
        ),
        ("SigLIP", "the mean of the prompt tokens", "the mean of the patches"),
    ):
        for head_type, expected in (("prompt", prompt), ("token", token)):
            config = tiny.model("l2p", base=families.make(name), head_type=head_type).peft_config["default"]
            assert L2PConfig.card(config.to_dict()).features == expected
