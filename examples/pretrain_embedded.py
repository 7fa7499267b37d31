"""Pre-train the embedded backbones on rendered glyphs: a small `ViTModel`, or with `--clip` a small `CLIPModel`.

    python examples/pretrain_embedded.py
    python examples/pretrain_embedded.py --clip

It needs no network and no data set: the glyphs (letters and symbols of many scripts) are drawn from the fonts inside
matplotlib. The ViT learns to tell them apart and never sees a digit. CLIP starts from that ViT, adds a text tower, and
learns to match glyphs with their Unicode names; typeset digits and their names are among them, handwritten ones are
not. At the end each is measured on scikit-learn's handwritten digits, next to a model with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestCentroid
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

import pgp_hf.embedded
from pgp_hf.embedded.glyphs import DIGITS, FACES, GlyphSampler, glyph_classes, render_glyphs

PROMPT = "{}"  # of zero-shot classification: the bare class name
# Texts of training. The bare name is as frequent as all others together; they put it at many positions, since learned
# context tokens will stand before it.
TEMPLATES = (
    "the character {}",
    "a photo of the {}.",
    "a picture of the character {}",
    "a small grey picture of the printed character {}.",
    "a grey picture of the light shape on dark paper that people call {}",
    "this is a small and noisy grey picture of one printed character , which has the name {}.",
)
TEXT_LENGTH = 48  # tokens: 16 of learned context and the longest names, or the longest template with them
MERGES = 600  # of the tokenizer: the words of the names, nearly whole
DIGIT_WEIGHT = 8  # how much likelier a digit is drawn for a batch than another glyph


def build_backbone(seed: int) -> ViTModel:
    """A `ViTModel` of about 1.2 million random parameters."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        num_channels=3,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        initializer_range=0.06,  # near 1/sqrt(hidden_size); the usual 0.02 starts a model this narrow too slowly
    )
    return ViTModel(config, add_pooling_layer=False)


def build_processor() -> ViTImageProcessorPil:
    """The image processor that fits `augment`: 32x32, bilinear, values in -1..1, grey images made RGB."""
    return ViTImageProcessorPil(
        size={"height": 32, "width": 32},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


def optimize(
    parameters: list[nn.Parameter], steps: int, learning_rate: float, forward: Callable[[], tuple[Tensor, Tensor]]
) -> float:
    """AdamW on a one-cycle schedule; `forward` draws a batch and gives its loss and which examples were right.

    Returns:
        Training accuracy in percent over the last tenth of the steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    accuracies: list[float] = []
    bar = tqdm(range(steps), desc="pre-training", unit="step")
    for step in bar:
        loss, hits = forward()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        accuracies.append(100 * hits.float().mean().item())
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{np.mean(accuracies[-25:]):.1f}%")
    return float(np.mean(accuracies[-max(1, steps // 10) :]))


def pretrain(backbone: ViTModel, sampler: GlyphSampler, steps: int, batch_size: int, learning_rate: float) -> float:
    """Supervised glyph classification, in place; the linear head is thrown away.

    Returns:
        Training accuracy in percent over the last tenth of the steps.
    """
    head = nn.Linear(backbone.config.hidden_size, len(sampler.count), device=backbone.device)

    def forward() -> tuple[Tensor, Tensor]:
        images, labels = sampler(batch_size)
        logits = head(backbone(pixel_values=images).last_hidden_state[:, 0])
        return F.cross_entropy(logits, labels, label_smoothing=0.1), logits.argmax(1) == labels

    backbone.train()
    accuracy = optimize([*backbone.parameters(), *head.parameters()], steps, learning_rate, forward)
    backbone.eval()
    return accuracy


def build_tokenizer(names: Iterable[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer for the names and templates, its vocabulary in the order of OpenAI's.

    256 bytes, 256 bytes at the end of a word, the merges, start, end: no text is unknown, and the end token, which also
    pads, has the highest id.
    """
    texts = [*names, *(t.format(name) for t in TEMPLATES for name in pgp_hf.embedded.DIGIT_NAMES)]
    alphabet = sorted(ByteLevel.alphabet())
    endings = [f"{byte}</w>" for byte in alphabet]
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + len(endings) + MERGES,
        special_tokens=endings,  # listed, for otherwise their ids, and with them ties, vary from run to run
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model = CLIPTokenizer().backend_tokenizer
    model.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    tokens = [*alphabet, *endings, *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_clip(tokenizer: CLIPTokenizer, vit: ViTConfig, seed: int) -> CLIPModel:
    """A `CLIPModel` of about 1.4 million random parameters: a ViT's size and a text tower for `tokenizer`."""
    torch.manual_seed(seed)
    common = {"hidden_act": vit.hidden_act, "projection_dim": 64}
    vision = {
        name: getattr(vit, name)
        for name in "image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads "
        "intermediate_size layer_norm_eps".split()
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # where CLIPModel pools
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        vision_config={**vision, **common},
        text_config={**text, **common},
        projection_dim=common["projection_dim"],
        logit_scale_init_value=math.log(1 / 0.07),
    )
    return CLIPModel(config)


@torch.no_grad()
def start_from_vit(clip: CLIPModel, vit: ViTModel) -> None:
    """Copy a ViT into CLIP's vision tower, in place.

    All but two things have their place: the bias of the patch embedding goes into the patches' positions, and the norm
    before the first block, which a ViT lacks, gets the mean scale of the ViT's tokens.
    """
    tower, source = clip.vision_model, vit.embeddings
    positions = source.position_embeddings[0].clone()
    positions[1:] += source.patch_embeddings.projection.bias
    tower.embeddings.class_embedding.copy_(source.cls_token[0, 0])
    tower.embeddings.patch_embedding.weight.copy_(source.patch_embeddings.projection.weight)
    tower.embeddings.position_embedding.weight.copy_(positions)
    tower.pre_layrnorm.weight.fill_(positions.std(dim=1).mean())
    tower.post_layernorm.load_state_dict(vit.layernorm.state_dict())
    for target, block in zip(tower.encoder.layers, vit.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(target.self_attn, name).load_state_dict(getattr(block.attention, name).state_dict())
        target.self_attn.out_proj.load_state_dict(block.attention.o_proj.state_dict())
        target.mlp.load_state_dict(block.mlp.state_dict())
        target.layer_norm1.load_state_dict(block.layernorm_before.state_dict())
        target.layer_norm2.load_state_dict(block.layernorm_after.state_dict())


def glyph_names(character: str) -> list[str]:
    """What a glyph is called: its Unicode name in lower case, and for a digit also the number word alone."""
    name = unicodedata.name(character).lower()
    return [name, name.removeprefix("digit ")] if character in DIGITS else [name]


def pretrain_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    sampler: GlyphSampler,
    classes: list[str],
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> float:
    """Contrastive training on pairs of glyph and text, in place; a batch has no glyph class twice.

    Returns:
        Share of images matched with their own text in percent, over the last tenth of the steps.
    """
    chance = random.Random(seed)
    weights = torch.tensor([float(DIGIT_WEIGHT if group in DIGITS else 1) for group in classes], device=clip.device)
    names = [[name for character in group for name in glyph_names(character)] for group in classes]

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        # shuffled, for the heavy classes come first and the place in the batch decides the scan's resolution
        labels = torch.multinomial(weights, batch_size)[torch.randperm(batch_size, device=clip.device)]
        templates = [PROMPT if chance.random() < 0.5 else chance.choice(TEMPLATES) for _ in labels]
        texts = [t.format(chance.choice(names[label])) for t, label in zip(templates, labels.tolist(), strict=True)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
        output = clip(**tokens, pixel_values=sampler.augmented(labels), return_loss=True)
        right = output.logits_per_image.argmax(1) == torch.arange(batch_size, device=clip.device)
        return output.loss, right

    clip.train()
    accuracy = optimize(list(clip.parameters()), steps, learning_rate, forward)
    clip.eval()
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))
    return accuracy


def cross_validate(features: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Accuracy in percent of two classifiers on frozen features, five-fold cross-validated."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    classifiers = {
        "nearest_class_mean": NearestCentroid(),
        "shrinkage_lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
    }
    return {
        name: 100 * float(cross_val_score(classifier, features.cpu().numpy(), labels, cv=folds).mean())
        for name, classifier in classifiers.items()
    }


def load_scans(processor: ViTImageProcessorPil) -> tuple[Tensor, np.ndarray, int]:
    """Pixels and labels of all digits, train split first, and the number of rows in that split."""
    train, test = pgp_hf.embedded.digits().values()
    pixels = processor([*train["image"], *test["image"]], return_tensors="pt")["pixel_values"]
    return pixels, np.concatenate([train["label"], test["label"]]), len(train)


@torch.no_grad()
def measure(backbone: ViTModel, processor: ViTImageProcessorPil) -> dict[str, float]:
    """Accuracy in percent of two classifiers on frozen CLS features of all digits, five-fold cross-validated."""
    backbone.eval()
    pixels, labels, _ = load_scans(processor)
    pixels = pixels.to(backbone.device)
    features = torch.cat([backbone(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(256)])
    return cross_validate(features, labels)


@torch.no_grad()
def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, processor: ViTImageProcessorPil) -> dict[str, float]:
    """Accuracy in percent on digits: zero-shot with `PROMPT`, and two classifiers on image features as in `measure`."""
    clip.eval()
    pixels, labels, train_rows = load_scans(processor)
    texts = [PROMPT.format(name) for name in pgp_hf.embedded.DIGIT_NAMES]
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
    names = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
    parts = pixels.to(clip.device).split(256)
    features = torch.cat([F.normalize(clip.get_image_features(part).pooler_output, dim=-1) for part in parts])
    right = 100.0 * ((features @ names.T).argmax(1).cpu().numpy() == labels)
    zero_shot = {"zero_shot": float(right.mean()), "zero_shot_test_split": float(right[train_rows:].mean())}
    return {**zero_shot, **cross_validate(features, labels)}


def save(output_dir: Path, parts: Iterable, report: dict) -> None:
    """Write model, processors and report; each file appears whole or not at all.

    Args:
        output_dir: The folder, made if need be.
        parts: What has `save_pretrained`.
        report: Content of `pretraining.json`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".tmp-") as scratch:
        for part in parts:
            part.save_pretrained(scratch)
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (Path(scratch) / "pretraining.json").write_text(text + "\n", encoding="utf-8")
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, output_dir / path.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", action="store_true", help="train the CLIPModel, not the ViTModel")
    parser.add_argument("--output_dir", type=Path, help="folder for the weights (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and augmentation (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 2250, with --clip 1500)")
    parser.add_argument("--batch_size", type=int, default=96, help="glyphs a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak of the one-cycle schedule (1e-3)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = 1500 if arguments.clip else 2250
    for name in ("steps", "batch_size", "learning_rate"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    if arguments.output_dir is None:
        arguments.output_dir = Path(pgp_hf.embedded.__file__).parent / ("clip" if arguments.clip else "vit")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    rendered = render_glyphs(with_digits=arguments.clip)
    classes = glyph_classes(rendered)
    sampler = GlyphSampler(rendered, classes, arguments.device)
    print(f"{len(classes)} glyph classes, {len(sampler.images)} renderings, {len(FACES)} faces")

    processor = build_processor()
    schedule = {name: getattr(arguments, name) for name in ("steps", "batch_size", "learning_rate")}
    if arguments.clip:
        if arguments.batch_size > len(classes):
            raise SystemExit(f"--batch_size {arguments.batch_size} is more than the {len(classes)} glyph classes.")
        trained = (
            "CLIPModel, contrastively on rendered glyphs and their Unicode names, typeset digits included; the vision "
            "tower started from the embedded ViTModel"
        )
        names = [name for group in classes for character in group for name in glyph_names(character)]
        tokenizer = build_tokenizer(names)
        vit = ViTModel.from_pretrained(pgp_hf.embedded.vit_path(), add_pooling_layer=False)
        model = build_clip(tokenizer, vit.config, arguments.seed).to(arguments.device)
        random_accuracy = measure_clip(model, tokenizer, processor)
        start_from_vit(model, vit)
        glyph_accuracy = pretrain_clip(model, tokenizer, sampler, classes, arguments.seed, **schedule)
        accuracy = measure_clip(model, tokenizer, processor)
        parts = (model, tokenizer, processor)
        extra = {"prompt": PROMPT, "vocabulary": len(tokenizer), "logit_scale": model.logit_scale.exp().item()}
    else:
        trained = "ViTModel, supervised classification of rendered glyphs (no digits); CLS feature, head thrown away"
        model = build_backbone(arguments.seed).to(arguments.device)
        random_accuracy = measure(model, processor)
        glyph_accuracy = pretrain(model, sampler, **schedule)
        accuracy = measure(model, processor)
        parts, extra = (model, processor), {}

    report = {
        "trained": trained,
        "seed": arguments.seed,
        **schedule,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_classes": len(classes),
        "num_renderings": len(sampler.images),
        "num_faces": len(FACES),
        "glyph_accuracy": glyph_accuracy,
        **extra,
        "digits_accuracy": {"pretrained": accuracy, "random": random_accuracy},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
            "matplotlib": matplotlib.__version__,
        },
        "classes": classes,
    }
    save(arguments.output_dir, parts, report)

    print(
        f"Accuracy in percent on scikit-learn's digits (classifiers on frozen features), {report['seconds']} s in all"
    )
    print(f"{'weights':12}" + "".join(f"{name.replace('_', ' '):>22}" for name in accuracy))
    for name, row in report["digits_accuracy"].items():
        print(f"{name:12}" + "".join(f"{value:22.1f}" for value in row.values()))
    print(f"Saved in {arguments.output_dir}")


if __name__ == "__main__":
    main()
