"""Fixtures of all tests: no network, one thread, and tiny random backbones made to order."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hugging Face libraries are imported

from contextlib import contextmanager

import pytest
import torch

torch.set_num_threads(1)


@contextmanager
def seeded(seed: int):
    """Random numbers of `seed` inside, the caller's afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def without_figures():
    """Draws no figure, which takes longer than training a tiny model; yields the function that does."""
    from pgp_hf.report import figures as plots

    with pytest.MonkeyPatch.context() as patch:
        draws = plots.save_figures
        patch.setattr(plots, "save_figures", lambda results, folder: [])
        yield draws


@pytest.fixture(scope="session")
def make_vit():
    """Factory: an untrained ViT of width 24 in eval mode; the same seed gives the same weights.

    The weights are drawn wide (`initializer_range`), so that different images get visibly different features.
    """

    def make(kind="classification", attention="sdpa", seed=0, **config):
        from transformers import ViTConfig, ViTForImageClassification, ViTModel

        sizes = {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "image_size": 20,
            "patch_size": 5,
            "initializer_range": 0.3,
        }
        if kind == "classification":
            sizes["num_labels"] = 4
        cls = {"classification": ViTForImageClassification, "backbone": ViTModel}[kind]
        with seeded(seed):
            return cls(ViTConfig(attn_implementation=attention, **{**sizes, **config})).eval()

    return make


@pytest.fixture(scope="session")
def make_l2p(make_vit):
    """Factory: a ViT with an L2P adapter, in eval mode. `l2p` are the adapter's settings, the rest is `make_vit`'s."""

    def make(kind="classification", attention="sdpa", seed=0, l2p=None, base=None, **config):
        from peft import get_peft_model

        from pgp_hf import L2PConfig

        base = make_vit(kind, attention, seed, **config) if base is None else base
        with seeded(100 + seed):
            return get_peft_model(base, L2PConfig(**{**SMALL_POOL, **(l2p or {})})).eval()

    return make


SMALL_POOL = {"pool_size": 6, "prompt_length": 3, "top_k": 2}


@pytest.fixture(scope="session")
def make_images():
    """Factory: random images `(count, channels, size, size)`."""

    def make(count=5, size=20, channels=3, seed=0):
        size = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, channels, *size, generator=generator)

    return make
