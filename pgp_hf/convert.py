"""Convert timm's vision transformers to `transformers.ViTModel`: names, fused attention weights, sizes.

    pgp-hf convert model.safetensors vit-base-sam

The "SAM" backbone of the PGP paper needs this. It is a ViT trained with sharpness-aware
minimisation (not Segment Anything), whose weights exist in timm's layout,
`timm/vit_base_patch16_224.sam_in1k` on the Hub. The paper's "DINO" backbone needs no
conversion: `facebook/dino-vitb16` loads as a `ViTModel` as it is.

Only the plain ViT is converted: CLS token, learned absolute positions including one for
CLS, pre-norm blocks, one final norm, and a linear head on CLS or none. Any other key is
refused, because leaving out a weight would change the outputs. Only safetensors files are
read; pickled checkpoints are never opened.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import console
from .cli.console import Parser, whole

if TYPE_CHECKING:  # imported when needed: the help of the command line needs none of them
    from torch import Tensor
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

LAYER_NORM_EPS = 1e-6  # timm's; ViTConfig's own default is 1e-12

# keys of other architectures in timm's layout: part of a key -> what it belongs to
_OTHER = {
    "dist_token": "a distilled model (DeiT), whose second token and head ViTModel lacks",
    "head_dist": "a distilled model (DeiT), whose second token and head ViTModel lacks",
    "pre_logits": "a layer between CLS and head, which ViTForImageClassification lacks",
    "fc_norm": "a head on the mean of the patches instead of CLS",
    "norm_pre": "a norm before the blocks, as in CLIP's image encoder",
    "reg_token": "register tokens",
    "gamma": "layer scale",
    "q_norm": "normalised queries and keys",
    "k_norm": "normalised queries and keys",
}


def timm_config(state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> ViTConfig:
    """Infer the configuration of a timm ViT from the shapes in its state dict, for square images and patches.

    Args:
        state_dict: in timm's layout.
        num_heads: number of attention heads, which no shape reveals; width // 64 by default.

    Raises:
        ValueError: a required tensor that is missing or has an impossible shape, or heads that do not divide the width.
    """

    from transformers import ViTConfig

    def shape(name: str, rank: int) -> Sequence[int]:
        if name not in state_dict:
            raise ValueError(f"the state dict has no {name!r}: it is not a ViT in timm's layout.{_hint(state_dict)}")
        if state_dict[name].ndim != rank:
            found = tuple(state_dict[name].shape)
            raise ValueError(f"{name!r} has shape {found}: expected {rank} dimensions.")
        return state_dict[name].shape

    width, channels, height, patch = shape("patch_embed.proj.weight", 4)
    positions = shape("pos_embed", 3)[1]
    grid = math.isqrt(max(positions - 1, 0))
    if height != patch:
        raise ValueError(
            f"the patches are {height} x {patch}: only square ones can be inferred from shapes; pass a config."
        )
    if grid == 0 or grid * grid + 1 != positions:
        raise ValueError(
            f"'pos_embed' has {positions} positions, not 1 + a square number (CLS and a square grid of patches): "
            "pass a config for images that are not square; models whose CLS token has no position cannot be converted."
        )
    heads = width // 64 if num_heads is None else num_heads
    if (num_heads is None and width % 64) or heads < 1 or width % heads:
        given = "width // 64 is the default" if num_heads is None else f"num_heads={num_heads} was given"
        raise ValueError(
            f"width {width} cannot be divided into heads ({given}): pass the model's num_heads, a divisor of {width}."
        )
    sizes: dict[str, Any] = {"num_labels": shape("head.weight", 2)[0]} if "head.weight" in state_dict else {}
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
        num_attention_heads=heads,
        intermediate_size=shape("blocks.0.mlp.fc1.weight", 2)[0],
        image_size=grid * patch,
        patch_size=patch,
        num_channels=channels,
        qkv_bias=any(name.endswith("attn.qkv.bias") for name in state_dict),
        layer_norm_eps=LAYER_NORM_EPS,
        **sizes,
    )


def timm_vit_to_vit(
    state_dict: Mapping[str, Tensor], config: ViTConfig | None = None, *, num_heads: int | None = None
) -> ViTForImageClassification | ViTModel:
    """Make a `transformers` model that computes the same function, in float32 and eval mode.

    Args:
        state_dict: in timm's layout.
        config: sizes that the state dict must have; inferred from its shapes by default.
        num_heads: number of attention heads if there is no `config`; width // 64 by default.

    Returns:
        A `ViTForImageClassification` if there is a head (`head.weight`), otherwise a `ViTModel` without a pooler.

    Raises:
        ValueError: unknown or missing keys, shapes that do not fit, or both `config` and `num_heads`.
    """
    import torch
    from transformers import ViTForImageClassification, ViTModel

    if config is not None and num_heads is not None:
        raise ValueError(f"num_heads={num_heads} and a config were both given: the config has the heads already.")
    config = timm_config(state_dict, num_heads) if config is None else config
    classes = config.num_labels if "head.weight" in state_dict else None
    _check(state_dict, _expected(config, classes))
    prefix = "" if classes is None else "vit."
    converted = {name: tensor.detach().float().clone() for name, tensor in _renamed(state_dict, prefix)}
    with torch.device("meta"):  # random weights would be replaced, and would advance the caller's generator
        if classes is None:
            model: ViTForImageClassification | ViTModel = ViTModel(config, add_pooling_layer=False)
        else:
            model = ViTForImageClassification(config)
    model.load_state_dict(converted, strict=True, assign=True)
    return model.eval()


def _expected(config: ViTConfig, classes: int | None) -> dict[str, tuple[int, ...]]:
    """Return timm's names and shapes for a configuration."""

    def linear(name: str, rows: int, *columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, *columns), **({f"{name}.bias": (rows,)} if bias else {})}

    width, mlp = config.hidden_size, config.intermediate_size
    patch, image = _pair(config.patch_size), _pair(config.image_size)
    positions = 1 + math.prod(side // step for side, step in zip(image, patch, strict=True))
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width)}
    shapes |= linear("patch_embed.proj", width, config.num_channels, *patch) | linear("norm", width)
    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        shapes |= linear(f"{block}.norm1", width) | linear(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width, bias=config.qkv_bias)
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", mlp, width) | linear(f"{block}.mlp.fc2", width, mlp)
    return shapes if classes is None else shapes | linear("head", classes, width)


def _check(state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the state dict has exactly the expected keys and shapes."""
    unknown, missing = sorted(set(state_dict) - set(expected)), sorted(set(expected) - set(state_dict))
    wrong = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    problems = [
        f"{what}: {', '.join(found[:6])}" + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        for what, found in (("unknown keys", unknown), ("missing keys", missing), ("shapes that do not fit", wrong))
        if found
    ]
    if problems:
        raise ValueError(f"not a plain ViT in timm's layout: {'; '.join(problems)}.{_hint(unknown)}")


def _hint(names: Iterable[str]) -> str:
    """Name the kind of model that has these keys, if it is known."""
    found = dict.fromkeys(what for part, what in _OTHER.items() for name in names if part in name)
    return f" This is {' and '.join(found)}: it cannot be converted." if found else ""


def _renamed(state_dict: Mapping[str, Tensor], prefix: str) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors under transformers' names, with fused qkv split into queries, keys and values."""
    whole = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for name, tensor in state_dict.items():
        module, _, ending = name.rpartition(".")
        if name in ("cls_token", "pos_embed"):
            yield f"{prefix}embeddings.{'cls_token' if name == 'cls_token' else 'position_embeddings'}", tensor
        elif module == "head":
            yield f"classifier.{ending}", tensor
        elif not module.startswith("blocks."):
            yield f"{prefix}{whole[module]}.{ending}", tensor
        else:
            _, layer, part = module.split(".", 2)
            if part == "attn.qkv":
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{prefix}layers.{layer}.attention.{letter}_proj.{ending}", rows
            else:
                yield f"{prefix}layers.{layer}.{whole[part]}.{ending}", tensor


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def convert(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    image_mean: Sequence[float] = (0.5,),
    image_std: Sequence[float] = (0.5,),
) -> ViTForImageClassification | ViTModel:
    """Convert a file into a folder for `from_pretrained`: configuration, weights, image processor.

    Args:
        source: timm's weights, a safetensors file.
        output_dir: new or empty; it is written completely or not at all.
        num_heads: see `timm_config`.
        image_mean: mean of the pixel values in [0, 1], one number or one for each channel. 0.5 is what timm's Google
            ViTs use, the SAM one among them; others, such as DINO, use ImageNet's: see the model's card.
        image_std: standard deviation of the pixel values, given in the same way.

    Raises:
        ValueError: `source` is not a safetensors file or not a plain ViT, or `output_dir` is not empty.
        FileNotFoundError: there is no such `source`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import ViTImageProcessorPil

    source, output_dir = Path(source), Path(output_dir)
    if source.suffix != ".safetensors":
        raise ValueError(
            f"{source} is not a .safetensors file: pickled checkpoints (.bin, .pth) can run code when they are opened "
            "and .npz has another layout, so neither is read. Use the model's model.safetensors."
        )
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: give the path of a downloaded model.safetensors.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not an empty folder: choose another, or remove it first.")
    try:
        state_dict = load_file(source)
    except SafetensorError as error:
        raise ValueError(f"{source} is not a complete safetensors file ({error}): download it again.") from error
    model = timm_vit_to_vit(state_dict, num_heads=num_heads)
    height, width = _pair(model.config.image_size)
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=_per_channel("image_mean", image_mean, model.config.num_channels),
        image_std=_per_channel("image_std", image_std, model.config.num_channels),
        resample=3,  # bicubic, as timm has it
    )
    scratch = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        os.replace(scratch, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return model


def _per_channel(name: str, values: Sequence[float], channels: int) -> list[float]:
    """Return one value for each channel."""
    if len(values) not in (1, channels):
        raise ValueError(f"{name}={list(values)} has {len(values)} numbers: give one, or one for each of {channels}.")
    if name == "image_std" and min(values) <= 0:
        raise ValueError(f"image_std={list(values)} must be above 0: pixel values are divided by it.")
    return list(values) * (channels // len(values))


def main(argv: Sequence[str] | None = None, prog: str = "python -m pgp_hf.convert") -> None:
    """Run the command line `pgp-hf convert`, or `python -m pgp_hf.convert`.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.

    Raises:
        ValueError, OSError: as `convert`.
    """
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="timm's weights, a .safetensors file")
    parser.add_argument("output_dir", help="new folder for from_pretrained")
    parser.add_argument("--num_heads", type=whole(1), help="number of attention heads; width // 64 by default")
    for name, what in (("--image_mean", "mean"), ("--image_std", "standard deviation")):
        parser.add_argument(
            name,
            type=float,
            nargs="+",
            default=[0.5],
            help=f"{what} of the pixel values in [0, 1], one number or one for each channel",
        )
    arguments = vars(parser.parse_args(argv))
    model = convert(**arguments)
    config = model.config
    print(
        f"{arguments['output_dir']}: {type(model).__name__}, width {config.hidden_size}, {config.num_hidden_layers} "
        f"layers of {config.num_attention_heads} heads, {config.image_size} px in patches of {config.patch_size}; "
        f"mean {arguments['image_mean']}, std {arguments['image_std']}"
    )


if __name__ == "__main__":
    raise SystemExit(console.run(main))
