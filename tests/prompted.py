"""One tiny model of each prompt method, all with several prompts that old images share."""

from __future__ import annotations

import tiny
import torch
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel

from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig

METHODS = ("l2p", "dualprompt", "clip")


def images(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def make(method: str, attention: str = "sdpa", **settings):
    """A `PeftModel` in eval mode; `settings` are the adapter's."""
    if method == "clip":
        return _clip(attention, **settings)
    base = tiny.backbone(attn_implementation=attention)
    torch.manual_seed(11)
    if method == "dualprompt":
        sizes = {"general_layers": [0, 1], "expert_layers": [1], "pool_size": 3, "general_length": 3}
        return get_peft_model(base, DualPromptConfig(**{**sizes, **settings})).eval()
    return get_peft_model(base, L2PConfig(**{"pool_size": 5, "prompt_length": 3, "top_k": 2, **settings})).eval()


def _clip(attention: str, **settings):
    tower = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    text = {"hidden_size": 24, "vocab_size": 20, "max_position_embeddings": 9}
    ends = {"bos_token_id": 18, "eos_token_id": 19, "pad_token_id": 19}
    vision = {"hidden_size": 36, "image_size": tiny.SIDE, "patch_size": 5}
    torch.manual_seed(7)
    base = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text, **ends},
            vision_config={**tower, **vision},
            projection_dim=16,
            initializer_factor=4.0,
        )
    )
    base.set_attn_implementation(attention)
    names = {label: f"class {label}" for label in range(6)}
    tokens = [[18, label, 19] for label in range(6)]
    sizes = {"pool_size": 3, "text_length": 2, "image_length": 3, **settings}
    torch.manual_seed(11)
    return get_peft_model(base, ClipPromptConfig(class_tokens=tokens, id2label=names, **sizes)).eval()


def features(model, pixels: torch.Tensor) -> torch.Tensor:
    """What the head reads, `(B, d)`."""
    found = []
    watch = model.base_model.watch_features(found.append)
    with torch.no_grad():
        model(pixel_values=pixels)
    watch.remove()
    return found[0]
