"""timm's ViT layout to transformers: equal outputs against a plain forward written here, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTModel

from pgp_hf.convert import convert, main, timm_config, timm_vit_to_vit

WIDTH, HEADS, LAYERS, PATCH, IMAGE, MLP, CLASSES = 24, 3, 2, 5, 20, 56, 7


def weights(qkv_bias=True, head=True, seed=0):
    """Random weights in timm's layout, wide enough that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0):
        return mean + torch.randn(*shape, generator=generator) * 0.3

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + (IMAGE // PATCH) ** 2, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": draw(WIDTH, mean=1.0),
        "norm.bias": draw(WIDTH),
    }
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": draw(WIDTH, mean=1.0), f"{block}.{norm}.bias": draw(WIDTH)}
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", MLP, WIDTH),
            ("mlp.fc2", WIDTH, MLP),
        ):
            state |= {f"{block}.{name}.weight": draw(rows, columns), f"{block}.{name}.bias": draw(rows)}
        if not qkv_bias:
            del state[f"{block}.attn.qkv.bias"]
    if head:
        state |= {"head.weight": draw(CLASSES, WIDTH), "head.bias": draw(CLASSES)}
    return state


def plain_forward(state, images):
    """Tokens after the last norm, by the definition of the ViT, from weights in timm's layout."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    patches = F.unfold(images, PATCH, stride=PATCH).mT  # (B, N, 3 * PATCH * PATCH)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    batch, tokens, _ = x.shape
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(batch, tokens, WIDTH), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_outputs_are_those_of_the_plain_forward(qkv_bias):
    state, images = weights(qkv_bias), tiny.images(size=IMAGE)
    expected = plain_forward(state, images)
    model = timm_vit_to_vit(state, num_heads=HEADS)
    assert isinstance(model, ViTForImageClassification) and not model.training
    torch.testing.assert_close(model.vit(images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    logits = expected[:, 0] @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images).logits, logits, rtol=1e-4, atol=1e-5)

    headless = timm_vit_to_vit(weights(qkv_bias, head=False), num_heads=HEADS)
    assert isinstance(headless, ViTModel) and headless.pooler is None
    torch.testing.assert_close(headless(images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_sizes_are_read_off_the_shapes():
    config = timm_config(weights(), num_heads=HEADS)
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert found == (WIDTH, LAYERS, HEADS, MLP)
    assert (config.image_size, config.patch_size, config.num_channels, config.num_labels) == (IMAGE, PATCH, 3, CLASSES)
    assert config.layer_norm_eps == 1e-6 and config.qkv_bias is True
    assert timm_config(weights(qkv_bias=False), num_heads=HEADS).qkv_bias is False


def test_sixty_four_wide_heads_are_the_default():
    state = weights()
    for name, tensor in state.items():
        shape = [{WIDTH: 192, 3 * WIDTH: 576}.get(n, n) for n in tensor.shape]
        state[name] = torch.zeros(shape)
    assert timm_vit_to_vit(state).config.num_attention_heads == 3


def test_weights_are_copies_and_no_random_numbers_are_drawn():
    state = weights()
    before = torch.get_rng_state()
    model = timm_vit_to_vit({name: tensor.half() for name, tensor in state.items()}, num_heads=HEADS)
    assert torch.equal(before, torch.get_rng_state())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = timm_vit_to_vit(state, num_heads=HEADS)
    torch.nn.init.zeros_(model.vit.embeddings.cls_token)
    assert state["cls_token"].abs().sum() > 0


def test_rectangles_need_a_config():
    state = weights()
    state["pos_embed"] = torch.randn(1, 1 + 2 * 4, WIDTH)
    with pytest.raises(ValueError, match="9 positions, not 1 \\+ a square number"):
        timm_vit_to_vit(state, num_heads=HEADS)
    config = ViTConfig(
        **{**timm_config(weights(), num_heads=HEADS).to_dict(), "image_size": [10, 20], "layer_norm_eps": 1e-6}
    )
    images = tiny.images(size=(10, 20))
    with torch.no_grad():
        tokens = timm_vit_to_vit(state, config).vit(images).last_hidden_state
        torch.testing.assert_close(tokens, plain_forward(state, images), rtol=1e-4, atol=1e-5)


def changed(remove=(), **add):
    state = weights() | {name.replace("__", "."): tensor for name, tensor in add.items()}
    return {name: tensor for name, tensor in state.items() if name not in remove}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(dist_token=torch.zeros(1, 1, WIDTH)), "unknown keys: dist_token.*distilled model"),
        (changed(blocks__0__ls1__gamma=torch.zeros(WIDTH)), r"unknown keys: blocks\.0\.ls1\.gamma.*layer scale"),
        (changed(blocks__2__norm1__bias=torch.zeros(WIDTH)), r"missing keys: blocks\.2\.attn.* and 5 more"),
        (changed(remove=["blocks.1.mlp.fc2.bias"]), r"missing keys: blocks\.1\.mlp\.fc2\.bias"),
        (changed(remove=["blocks.1.attn.qkv.bias"]), r"missing keys: blocks\.1\.attn\.qkv\.bias"),
        (changed(remove=["head.bias"]), r"missing keys: head\.bias"),
        (changed(remove=["pos_embed"]), "no 'pos_embed': it is not a ViT in timm's layout"),
        (changed(remove=["norm.weight", "norm.bias"], fc_norm__bias=torch.zeros(WIDTH)), "mean of the patches"),
        (changed(norm__weight=torch.zeros(WIDTH + 1)), r"norm.weight is \(25,\), expected \(24,\)"),
        (changed(blocks__1__mlp__fc1__weight=torch.zeros(8, WIDTH)), r"fc1.weight is \(8, 24\), expected \(56, 24\)"),
        (changed(cls_token=torch.zeros(1, 2, WIDTH)), r"cls_token is \(1, 2, 24\), expected \(1, 1, 24\)"),
        (changed(pos_embed=torch.zeros(1, 16, WIDTH)), "16 positions"),
        (changed(patch_embed__proj__weight=torch.zeros(WIDTH, 3, 5, 4)), "5 x 4"),
        (changed(patch_embed__proj__weight=torch.zeros(WIDTH, 75)), "expected 4 dimensions"),
        ({}, "not a ViT in timm's layout"),
    ],
)
def test_what_is_not_a_plain_vit_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        timm_vit_to_vit(state, num_heads=HEADS)


@pytest.mark.parametrize("heads", [None, 5, 0, -3])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match="width 24 cannot be divided into heads.*num_heads, a divisor of 24"):
        timm_vit_to_vit(weights(), num_heads=heads)


def test_heads_and_config_are_not_given_together():
    with pytest.raises(ValueError, match="num_heads=3 and a config"):
        timm_vit_to_vit(weights(), timm_config(weights(), HEADS), num_heads=HEADS)


@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_command_line_writes_a_folder_that_loads(tmp_path, capsys, head):
    source, out = tmp_path / "timm.safetensors", tmp_path / "made" / "vit"
    save_file(weights(head=head), source)
    main([*map(str, (source, out)), "--num_heads", "3", "--image_mean", "0.4", "0.5", "0.6", "--image_std", "0.25"])
    assert "width 24, 2 layers of 3 heads, 20 px in patches of 5" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["vit"]
    model = (ViTForImageClassification if head else ViTModel).from_pretrained(out)
    images = tiny.images(size=IMAGE)
    expected = plain_forward(weights(head=head), images)
    tokens = (model.vit if head else model)(images).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert len(load_file(out / "model.safetensors")) == len(weights(head=head)) + 4 * LAYERS  # qkv cut in three
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.4, 0.5, 0.6], [0.25] * 3)
    assert dict(processor.size) == {"height": IMAGE, "width": IMAGE}


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.npz", "model"])
def test_only_safetensors_are_opened(tmp_path, name):
    source = tmp_path / name
    torch.save(weights(), source)
    with pytest.raises(ValueError, match="not a .safetensors file"):
        convert(source, tmp_path / "out", num_heads=HEADS)
    disguised = source.rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        convert(disguised, tmp_path / "out", num_heads=HEADS)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    source, out = tmp_path / "timm.safetensors", tmp_path / "out"
    save_file(weights(), source)
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, out, num_heads=HEADS)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "none.safetensors", tmp_path / "other")
    for arguments, message in (
        ({"image_mean": (0.1, 0.2)}, "image_mean.*has 2 numbers"),
        ({"image_std": (0.0,)}, "image_std.*above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "other", num_heads=HEADS, **arguments)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "other", num_heads=HEADS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "timm.safetensors"]


@pytest.mark.slow
def test_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pgp_hf.convert", str(tmp_path / "weights.pth"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "not a .safetensors file" in done.stderr and "Traceback" not in done.stderr
