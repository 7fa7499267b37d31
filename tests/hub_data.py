"""Data sets in miniature, with the files, splits, columns and label types of those on the Hub that presets name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image


class Structure(NamedTuple):
    """The structure of a data set.

    Attributes:
        classes: number of classes.
        images: number of images of each class, by split.
        file: of a split.
        image, label: names of the columns.
        name: makes the name of a class; a column of strings holds it, a `ClassLabel` has it among its names.
        strings: whether labels are strings.
        more: further columns, each a feature and a function of the label.
        readme: content of README.md.
    """

    classes: int
    images: dict[str, int]
    file: str = "data/{}-00000-of-00001.parquet"
    image: str = "image"
    label: str = "label"
    name: Callable[[int], str] = "class {}".format
    strings: bool = False
    more: dict[str, tuple[Any, Callable[[int], Any]]] = {}
    readme: str = ""


def wnid(label: int) -> str:
    """Name a class as WordNet numbers it."""
    return f"n{1443537 + 97 * label:08}"


HUB = {
    "uoft-cs/cifar100": Structure(
        classes=100,
        images={"train": 2, "test": 1},
        file="cifar100/{}-00000-of-00001.parquet",
        image="img",
        label="fine_label",
        more={"coarse_label": (datasets.ClassLabel(num_classes=20), lambda label: label % 20)},
        readme="""---
configs:
- config_name: cifar100
  default: true
  data_files:
  - {split: train, path: cifar100/train-*}
  - {split: test, path: cifar100/test-*}
---
""",
    ),
    "zh-plus/tiny-imagenet": Structure(classes=200, images={"train": 2, "valid": 1}, name=wnid),
    "axiong/imagenet-r": Structure(
        classes=200,
        images={"test": 3},
        file="test/{}-00000-of-00005.parquet",
        label="wnid",
        name=wnid,
        strings=True,
        more={"class_name": (datasets.Value("string"), "class {}".format)},
        readme="""---
configs:
- config_name: test
  default: true
  data_files:
  - {split: test, path: test/test-*}
---
""",
    ),
    "bentrevett/caltech-ucsd-birds-200-2011": Structure(
        classes=200,
        images={"train": 2, "test": 1},
        name=lambda label: f"{label + 1:03}.Bird_{label}",
        more={"bbox": (datasets.List(datasets.Value("float64")), lambda label: [0.0, 1.0, 5.0, 7.5])},
    ),
}


def picture(rng: np.random.Generator) -> Image.Image:
    """Draw an image of 6 to 9 pixels a side, one in eight of them in shades of grey, as a few on the Hub are."""
    height, width = rng.integers(6, 10, 2)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image.convert("L") if rng.random() < 1 / 8 else image


def labels(structure: Structure, split: str, rng: np.random.Generator) -> list[int]:
    """Return the labels of a split, shuffled."""
    return rng.permutation(np.repeat(np.arange(structure.classes), structure.images[split])).tolist()


def write(folder: Path, source: str, seed: int = 0, **changes: Any) -> Structure:
    """Write a data set of the Hub as it is stored there.

    Args:
        folder: to write to.
        source: the Hub id.
        seed: of the images and their order.
        changes: other values of the `Structure`, such as fewer classes.
    """
    structure, rng = HUB[source]._replace(**changes), np.random.default_rng(seed)
    names = [structure.name(label) for label in range(structure.classes)]
    kind = datasets.Value("string") if structure.strings else datasets.ClassLabel(names=names)
    features = {structure.image: datasets.Image(), structure.label: kind}
    features.update({name: feature for name, (feature, _) in structure.more.items()})
    for split in structure.images:
        chosen = labels(structure, split, rng)
        rows = {
            structure.image: [picture(rng) for _ in chosen],
            structure.label: [names[label] for label in chosen] if structure.strings else chosen,
            **{name: [value(label) for label in chosen] for name, (_, value) in structure.more.items()},
        }
        file = folder / structure.file.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    if structure.readme:
        (folder / "README.md").write_text(structure.readme)
    return structure


def write_images(folder: Path, source: str, seed: int = 0, **changes: Any) -> Structure:
    """Write the same as image files, in a folder for each class in a folder for each split; arguments as in `write`."""
    structure, rng = HUB[source]._replace(**changes), np.random.default_rng(seed)
    for split in structure.images:
        for number, label in enumerate(labels(structure, split, rng)):
            file = folder / split / structure.name(label) / f"{number}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(rng).save(file)
    return structure
