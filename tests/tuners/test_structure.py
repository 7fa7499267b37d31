"""Models that prompts do not fit are refused with a reason, and left as they were."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

from pgp_hf import L2PConfig

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 20,
    "patch_size": 5,
}
DECODER = {f"decoder_{name}": SMALL[name] for name in SMALL if "image" not in name and "patch" not in name}


def make(kind: str, config: str, **settings):
    with tiny.seeded(7):
        return getattr(hf, kind)(getattr(hf, f"{config}Config")(**{**SMALL, **settings})).eval()


ABSOLUTE = {"use_absolute_position_embeddings": True}
OTHERS = {
    "BEiT": (("BeitForImageClassification", "Beit", {}), "adds no position embeddings"),
    "BEiT with both positions": (
        ("BeitModel", "Beit", {**ABSOLUTE, "use_relative_position_bias": True}),
        "bias for each pair of positions",
    ),
    "BEiT with a shared bias": (
        ("BeitModel", "Beit", {**ABSOLUTE, "use_shared_relative_position_bias": True}),
        "bias for each pair of positions",
    ),
    "BEiT without bias": (("BeitForImageClassification", "Beit", ABSOLUTE), "reads the mean of the patches"),
    "Data2Vec": (("Data2VecVisionForImageClassification", "Data2VecVision", {}), "adds no position embeddings"),
    "DINOv2 as a backbone of others": (("Dinov2Backbone", "Dinov2", {}), "its layers are not those of a ViT"),
    "SigLIP without pooling head": (("SiglipVisionModel", "SiglipVision", {"vision_use_head": False}), "pooling head"),
    "SigLIP 2 for images of any shape": (("Siglip2VisionModel", "Siglip2Vision", {}), "no patch embeddings with"),
    "DeiT with two heads": (
        ("DeiTForImageClassificationWithTeacher", "DeiT", {}),
        r"it has two heads, .* pgp_hf.load_backbone\(name, stream\)",
    ),
    "YOLOS": (("YolosForObjectDetection", "Yolos", {"image_size": [20, 20]}), "its tokens are not CLS, patches"),
    "MAE": (("ViTMAEModel", "ViTMAE", {}), "leaves out patches at random"),
    "MAE with its decoder": (("ViTMAEForPreTraining", "ViTMAE", DECODER), "leaves out patches at random"),
    "I-JEPA": (("IJepaForImageClassification", "IJepa", {}), "no patch embeddings with a CLS token"),
    "DPT": (("DPTForSemanticSegmentation", "DPT", {}), "its layers are not those of a ViT"),
    "AST": (("ASTModel", "AST", {}), "does not read single images"),
    "FLAVA": (("FlavaImageModel", "FlavaImage", {}), "its layers are not those of a ViT"),
    "ViViT": (("VivitModel", "Vivit", {}), "does not read single images"),
}


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])
@pytest.mark.parametrize("model", OTHERS)
def test_a_model_that_visual_prompts_do_not_fit_stays_as_it_was(model, adapter):
    (kind, config, settings), reason = OTHERS[model]
    base = make(kind, config, **settings)
    modules, tensors = dict(base.named_modules()), dict(base.state_dict())
    with pytest.raises(ValueError, match=rf"{kind} cannot take visual prompts: .*{reason}.*ViTForImageClassification"):
        tiny.model(adapter, base=base)
    assert dict(base.named_modules()) == modules and base.state_dict().keys() == tensors.keys()
    assert not hasattr(base, "peft_config") and not base._forward_hooks and not base._forward_pre_hooks


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViTForImageClassification", "ViT"),
        ("ViTModel", "ViT"),
        ("ViTMSNForImageClassification", "ViTMSN"),
        ("DeiTForImageClassification", "DeiT"),
        ("DeiTModel", "DeiT"),
    ],
)
def test_every_prompt_of_a_model_that_they_fit_learns(kind, config, adapter):
    model, images = tiny.model(adapter, base=make(kind, config, num_labels=6)), tiny.images(3)
    output = model.train()(pixel_values=images)
    scores = output.logits if "logits" in output else output.last_hidden_state
    (scores.float().square().sum() - output.prompt_similarity.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert scores.shape == model.get_base_model().eval()(pixel_values=images)[0].shape
    model.add_adapter("second", tiny.config(adapter))  # on modules that are wrapped already


@pytest.mark.parametrize(
    "kind", ["AltCLIP", "ChineseCLIP", "Siglip", "XCLIP", "OwlViT", "GroupViT", "Blip", "Align", "Flava"]
)
def test_a_model_that_clip_prompts_do_not_fit_stays_as_it_was(kind):
    with torch.device("meta"):
        base = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")())
    modules = dict(base.named_modules())
    with pytest.raises(
        ValueError, match=rf"{kind}Model cannot take CLIP prompts: it has no \w+.* towers of a CLIPModel"
    ):
        tiny.model("clip", base=base)
    assert dict(base.named_modules()) == modules and not hasattr(base, "peft_config")


def test_the_trainer_names_what_to_do_instead(tmp_path):
    with pytest.raises(ValueError, match=r"train this one without prompts \(pgp_hf.set_trainable and StreamTrainer\)"):
        tiny.model(L2PConfig(), base=make("BeitForImageClassification", "Beit"))
