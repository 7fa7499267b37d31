"""Draw glyphs to pre-train on from matplotlib's fonts, group them into classes, and make them look handwritten.

`examples/pretrain_embedded.py` uses them; importing `pgp_hf` or loading the embedded weights does not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFilter, ImageFont
from torch import Tensor

# Text faces with many scripts. Only renderings are used, no font is copied; the terms come with the fonts in
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
DIGITS = "0123456789"  # rendered on request only: for CLIP, whose texts name them
SCAN_SIZES = (8, 8, 8, 12, 16, 32)  # pixels of the imitated scan; the digits are 8x8, enlarged by the image processor
NUMBER_WORDS = frozenset(
    "DIGIT NUMBER NUMERAL FRACTION ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN HUNDRED".split()
)


def is_digit(character: str) -> bool:
    """Return True if a character is, contains or is named after a number: any script, circled, roman, tone two..."""
    name = unicodedata.name(character, "")
    return (
        any(unicodedata.numeric(part, None) is not None for part in unicodedata.normalize("NFKD", character))
        or unicodedata.category(character).startswith("N")
        or any(sign.isdigit() for sign in name)
        or not NUMBER_WORDS.isdisjoint(re.split("[ -]", name))
    )


def is_plain_glyph(character: str) -> bool:
    """Return True for letters, punctuation and symbols alone: no digits, modifiers, accents or derived forms."""
    category = unicodedata.category(character)
    return (
        category[0] in "LPS"
        and category not in ("Lm", "Sk")
        and unicodedata.normalize("NFKD", character) == character
        and " WITH " not in unicodedata.name(character, "")
        and not is_digit(character)
    )


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Draw a glyph light on dark, centred, its longer side `INK` pixels: uint8 `(CANVAS, CANVAS)`; None if blank."""
    mask = font.getmask(character, mode="L")
    if 0 in mask.size:
        return None
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    width, height = (max(1, round(side * INK / max(image.size))) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(canvas)


def render_glyphs(with_digits: bool = False) -> dict[str, list[np.ndarray]]:
    """Render every plain glyph in every face that has it.

    Args:
        with_digits: include 0 to 9.

    Returns:
        uint8 `(CANVAS, CANVAS)` renderings by character: digits, letters, then the rest, the most widely drawn first.

    Raises:
        FileNotFoundError: matplotlib lacks one of the fonts.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [folder / f"{face}.ttf" for face in FACES]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"matplotlib {matplotlib.__version__} lacks the fonts {missing} in {folder}.")
    covers = [{chr(code) for code in FT2Font(str(path)).get_charmap()} for path in paths]
    fonts = [ImageFont.truetype(str(path), CANVAS) for path in paths]
    count = Counter(character for cover in covers for character in cover)
    wanted = DIGITS if with_digits else ""
    characters = [c for c, n in count.items() if n >= MIN_FACES and (c in wanted or is_plain_glyph(c))]
    characters.sort(key=lambda c: (c not in wanted, unicodedata.category(c)[0], -count[c], c))
    rendered = {}
    for character in characters:
        attempts = (draw(font, character) for font, cover in zip(fonts, covers, strict=True) if character in cover)
        drawn = [image for image in attempts if image is not None]
        if len(drawn) >= MIN_FACES:
            rendered[character] = drawn
    return rendered


def glyph_classes(rendered: dict[str, list[np.ndarray]]) -> list[str]:
    """Group look-alikes (A, Alpha, small capital A...) by the correlation of their blurred mean renderings.

    A digit is a class of its own, and nothing that looks like one is in any class.

    Args:
        rendered: output of `render_glyphs`.

    Returns:
        One string for each class: its characters, the one that started it first.
    """
    models: list[np.ndarray] = []
    classes: list[str] = []
    left = dict(MAX_CLASSES)
    for character, images in rendered.items():
        mean = Image.fromarray(np.mean(images, axis=0).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
        shape = np.asarray(mean, dtype=np.float32).ravel()
        shape -= shape.mean()
        shape /= np.linalg.norm(shape)
        overlap = np.stack(models) @ shape if models else np.zeros(1)
        nearest = int(overlap.argmax())
        if character in DIGITS:
            models.append(shape)
            classes.append(character)
        elif overlap[nearest] > SAME:
            if classes[nearest] not in DIGITS:
                classes[nearest] += character
        elif overlap[nearest] < DIFFERENT and left[unicodedata.category(character)[0]]:
            left[unicodedata.category(character)[0]] -= 1
            models.append(shape)
            classes.append(character)
    return classes


class GlyphSampler:
    """Draw balanced random batches of augmented glyphs; augmentation works on whole batches of tensors.

    Args:
        rendered: output of `render_glyphs`.
        classes: output of `glyph_classes`.
        device: where batches are made.
    """

    def __init__(self, rendered: dict[str, list[np.ndarray]], classes: list[str], device: str) -> None:
        images = [[image for character in group for image in rendered[character]] for group in classes]
        self.images = torch.from_numpy(np.concatenate([np.stack(group) for group in images]))[:, None].to(device)
        self.count = torch.tensor([len(group) for group in images], device=device)
        self.start = self.count.cumsum(0) - self.count

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return images `(batch, 3, 32, 32)` in -1..1 and labels `(batch,)`."""
        labels = torch.randint(len(self.count), (batch_size,), device=self.images.device)
        return self.augmented(labels), labels

    def augmented(self, labels: Tensor) -> Tensor:
        """Return augmented images `(batch, 3, 32, 32)` in -1..1 of the given classes `(batch,)`."""
        chance = torch.rand(len(labels), device=labels.device)
        rows = self.start[labels] + (chance * self.count[labels]).long()
        return augment(self.images[rows].float() / 255)


def augment(glyphs: Tensor) -> Tensor:
    """Vary stroke weight and shape, and scan coarsely with noise.

    Args:
        glyphs: `(batch, 1, CANVAS, CANVAS)` in 0..1.

    Returns:
        `(batch, 3, 32, 32)` in -1..1.
    """
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
