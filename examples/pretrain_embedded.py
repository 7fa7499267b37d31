"""Pre-train the embedded backbone: a small `ViTModel` that learns to tell rendered glyphs apart.

    python examples/pretrain_embedded.py

It needs no network and no data set: the glyphs (letters and symbols of many scripts, never a digit) are drawn from the
fonts inside matplotlib. At the end the frozen features are measured on scikit-learn's handwritten digits, which the
backbone has never seen, next to those of a backbone with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
import transformers
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFilter, ImageFont
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

import pgp_hf.embedded

# Text faces with many scripts. Only renderings are used, no font is copied; the terms stand beside the fonts in
# matplotlib: LICENSE_DEJAVU ("Bitstream Vera Fonts Copyright"; DejaVu changes are in public domain) and LICENSE_STIX.
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
MIN_FACES = 8  # a glyph drawn by fewer faces has too little variety
CANVAS, INK = 64, 52  # pixels: side of a rendering, and the longer side of the glyph inside it
SAME, DIFFERENT = 0.88, 0.82  # correlation of mean renderings: above, one class; between, left out; below, a new class
MAX_CLASSES = {"L": 180, "P": 10, "S": 20}  # letters, punctuation, symbols: the most widely drawn shapes of each
SCAN_SIZES = (8, 8, 8, 12, 16, 32)  # pixels of the imitated scan; the digits are 8x8, enlarged by the image processor
NUMBER_WORDS = frozenset(
    "DIGIT NUMBER NUMERAL FRACTION ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN HUNDRED".split()
)


def is_digit(character: str) -> bool:
    """Whether a character is, contains or is named after a number: digits of any script, circled, roman, tone two..."""
    name = unicodedata.name(character, "")
    return (
        any(unicodedata.numeric(part, None) is not None for part in unicodedata.normalize("NFKD", character))
        or unicodedata.category(character).startswith("N")
        or any(sign.isdigit() for sign in name)
        or not NUMBER_WORDS.isdisjoint(re.split("[ -]", name))
    )


def is_plain_glyph(character: str) -> bool:
    """Letters, punctuation and symbols that stand alone: no digits, no modifiers, no accented or derived forms."""
    category = unicodedata.category(character)
    return (
        category[0] in "LPS"
        and category not in ("Lm", "Sk")
        and unicodedata.normalize("NFKD", character) == character
        and " WITH " not in unicodedata.name(character, "")
        and not is_digit(character)
    )


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """One glyph, light on dark, centred, its longer side `INK` pixels: uint8 (CANVAS, CANVAS), or None if blank."""
    mask = font.getmask(character, mode="L")
    if 0 in mask.size:
        return None
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    image = image.resize(
        [max(1, round(side * INK / max(image.size))) for side in image.size], Image.Resampling.BICUBIC
    )
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(canvas)


def render_glyphs() -> dict[str, list[np.ndarray]]:
    """Every plain glyph in every face that has it; letters first, the most widely drawn first."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [folder / f"{face}.ttf" for face in FACES]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"matplotlib {matplotlib.__version__} lacks the fonts {missing} in {folder}.")
    covers = [{chr(code) for code in FT2Font(str(path)).get_charmap()} for path in paths]
    fonts = [ImageFont.truetype(str(path), CANVAS) for path in paths]
    count = Counter(character for cover in covers for character in cover)
    characters = [c for c, n in count.items() if n >= MIN_FACES and is_plain_glyph(c)]
    characters.sort(key=lambda c: (unicodedata.category(c)[0], -count[c], c))
    rendered = {}
    for character in characters:
        drawn = [draw(font, character) for font, cover in zip(fonts, covers, strict=True) if character in cover]
        drawn = [image for image in drawn if image is not None]
        if len(drawn) >= MIN_FACES:
            rendered[character] = drawn
    return rendered


def glyph_classes(rendered: dict[str, list[np.ndarray]]) -> list[str]:
    """Group look-alikes (A, Alpha, small capital A...) by the correlation of their blurred mean renderings.

    Returns:
        One string per class: the characters that share it, its model first.
    """
    models: list[np.ndarray] = []
    classes: list[str] = []
    room = dict(MAX_CLASSES)
    for character, images in rendered.items():
        mean = Image.fromarray(np.mean(images, axis=0).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
        shape = np.asarray(mean, dtype=np.float32).ravel()
        shape -= shape.mean()
        shape /= np.linalg.norm(shape)
        overlap = np.stack(models) @ shape if models else np.zeros(1)
        nearest = int(overlap.argmax())
        if overlap[nearest] > SAME:
            classes[nearest] += character
        elif overlap[nearest] < DIFFERENT and room[unicodedata.category(character)[0]]:
            room[unicodedata.category(character)[0]] -= 1
            models.append(shape)
            classes.append(character)
    return classes


class GlyphSampler:
    """Balanced random batches of augmented glyphs; everything after the rendering happens on whole batches of tensors.

    Args:
        rendered: Output of `render_glyphs`.
        classes: Output of `glyph_classes`.
        device: Where batches are made.
    """

    def __init__(self, rendered: dict[str, list[np.ndarray]], classes: list[str], device: str) -> None:
        images = [[image for character in group for image in rendered[character]] for group in classes]
        self.images = torch.from_numpy(np.concatenate([np.stack(group) for group in images]))[:, None].to(device)
        self.count = torch.tensor([len(group) for group in images], device=device)
        self.start = self.count.cumsum(0) - self.count

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, 32, 32) in -1..1 and labels (batch,)."""
        device = self.images.device
        labels = torch.randint(len(self.count), (batch_size,), device=device)
        rows = self.start[labels] + (torch.rand(batch_size, device=device) * self.count[labels]).long()
        return augment(self.images[rows].float() / 255), labels


def augment(glyphs: Tensor) -> Tensor:
    """Stroke weight, affine and elastic deformation, a coarse noisy scan: (batch, 1, CANVAS, CANVAS) -> (batch, 3, 32, 32)."""
    n, device = len(glyphs), glyphs.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(low, high)

    # Pen: blend towards a dilated (weight > 0) or eroded (weight < 0) glyph.
    weight = uniform(-0.5, 1).view(n, 1, 1, 1)
    thick, thin = F.max_pool2d(glyphs, 5, 1, 2), -F.max_pool2d(-glyphs, 3, 1, 1)
    glyphs = glyphs + torch.where(weight > 0, weight * (thick - glyphs), -weight * (thin - glyphs))
    # Hand: rotation, shear, stretch and shift, then a smooth random displacement.
    angle, shear = uniform(-0.26, 0.26), uniform(-0.3, 0.3)
    width, height = uniform(0.75, 1.25), uniform(0.85, 1.25)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [cos / width, (shear - sin) / width, uniform(-0.12, 0.12), sin / height, cos / height, uniform(-0.12, 0.12)], 1
    )
    grid = F.affine_grid(theta.view(n, 2, 3), list(glyphs.shape), align_corners=False)
    elastic = F.interpolate(0.07 * torch.randn(n, 2, 5, 5, device=device), CANVAS, mode="bicubic", align_corners=True)
    glyphs = F.grid_sample(glyphs, grid + elastic.permute(0, 2, 3, 1), align_corners=False)
    # Scanner: contrast, resolution, noise; enlarged bilinearly as the image processor does.
    glyphs = glyphs * uniform(0.75, 1.25).view(n, 1, 1, 1)
    scans = []
    for size, part in zip(SCAN_SIZES, glyphs.tensor_split(len(SCAN_SIZES)), strict=True):
        scan = F.adaptive_avg_pool2d(part, size)
        scan = (scan + 0.04 * torch.randn_like(scan)).clamp(0, 1)
        scans.append(F.interpolate(scan, 32, mode="bilinear", align_corners=False))
    return (torch.cat(scans) * 2 - 1).expand(-1, 3, -1, -1)


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


def pretrain(backbone: ViTModel, sampler: GlyphSampler, steps: int, batch_size: int, learning_rate: float) -> float:
    """Supervised glyph classification, in place; the linear head is thrown away.

    Returns:
        Training accuracy in percent over the last tenth of the steps.
    """
    device = backbone.device
    head = nn.Linear(backbone.config.hidden_size, len(sampler.count), device=device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    hits: list[float] = []
    backbone.train()
    bar = tqdm(range(steps), desc="pre-training", unit="step")
    for step in bar:
        images, labels = sampler(batch_size)
        logits = head(backbone(pixel_values=images).last_hidden_state[:, 0])
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        hits.append(100 * (logits.argmax(1) == labels).float().mean().item())
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{np.mean(hits[-25:]):.1f}%")
    backbone.eval()
    return float(np.mean(hits[-max(1, steps // 10) :]))


@torch.no_grad()
def measure(backbone: ViTModel, processor: ViTImageProcessorPil) -> dict[str, float]:
    """Accuracy in percent of two classifiers on frozen CLS features of all digits, five-fold cross-validated."""
    backbone.eval()
    splits = pgp_hf.embedded.digits().values()
    images = [image for split in splits for image in split["image"]]
    labels = np.concatenate([split["label"] for split in splits])
    pixels = processor(images, return_tensors="pt")["pixel_values"].to(backbone.device)
    features = torch.cat([backbone(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(256)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    classifiers = {
        "nearest_class_mean": NearestCentroid(),
        "shrinkage_lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
    }
    return {
        name: 100 * float(cross_val_score(classifier, features.cpu().numpy(), labels, cv=folds).mean())
        for name, classifier in classifiers.items()
    }


def save(output_dir: Path, backbone: ViTModel, processor: ViTImageProcessorPil, report: dict) -> None:
    """Write weights, configuration, image processor and report; each file appears whole or not at all."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".tmp-") as scratch:
        backbone.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (Path(scratch) / "pretraining.json").write_text(text + "\n", encoding="utf-8")
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, output_dir / path.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_dir = Path(pgp_hf.embedded.__file__).parent / "vit"
    parser.add_argument(
        "--output_dir", type=Path, default=default_dir, help="folder for the weights (default: the package's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="initial weights and augmentation (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2250, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=96, help="glyphs a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak of the one-cycle schedule (1e-3)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("steps", "batch_size", "learning_rate"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    rendered = render_glyphs()
    classes = glyph_classes(rendered)
    sampler = GlyphSampler(rendered, classes, arguments.device)
    print(f"{len(classes)} glyph classes, {len(sampler.images)} renderings, {len(FACES)} faces")

    processor = build_processor()
    backbone = build_backbone(arguments.seed).to(arguments.device)
    random_accuracy = measure(backbone, processor)
    glyph_accuracy = pretrain(backbone, sampler, arguments.steps, arguments.batch_size, arguments.learning_rate)
    accuracy = measure(backbone, processor)

    report = {
        "trained": "ViTModel, supervised classification of rendered glyphs (no digits); CLS feature, head thrown away",
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "num_classes": len(classes),
        "num_renderings": len(sampler.images),
        "num_faces": len(FACES),
        "glyph_accuracy": glyph_accuracy,
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
    save(arguments.output_dir, backbone, processor, report)

    print(
        f"Frozen CLS features on scikit-learn's digits (accuracy in percent, five folds), {report['seconds']} s in all"
    )
    print(f"{'backbone':12}{'nearest class mean':>20}{'shrinkage LDA':>16}")
    for name, row in report["digits_accuracy"].items():
        print(f"{name:12}{row['nearest_class_mean']:20.1f}{row['shrinkage_lda']:16.1f}")
    print(f"Saved in {arguments.output_dir}")


if __name__ == "__main__":
    main()
