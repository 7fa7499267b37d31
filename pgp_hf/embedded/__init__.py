"""Provide small pre-trained backbones and real handwritten digits that need no network.

The backbones' weights were made by this project (`examples/pretrain_embedded.py`); the digits come with scikit-learn.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["clip_path", "digits", "name_of", "resolve", "vit_path"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def vit_path() -> Path:
    """Return the folder of the embedded `ViTModel` and its image processor, for `from_pretrained`.

    Raises:
        FileNotFoundError: the weights are not in the package.
    """
    return _folder("vit", "", "config.json", "model.safetensors", "preprocessor_config.json")


def clip_path() -> Path:
    """Return the folder of the embedded `CLIPModel`, `CLIPTokenizer` and image processor, for `from_pretrained`.

    Typeset digits and their names were among its training pairs, handwritten digits were not. In zero-shot
    classification the text is the class name alone. Its zero-shot accuracy on `digits` is in `pretraining.json`.

    Raises:
        FileNotFoundError: the weights are not in the package.
    """
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    return _folder("clip", " --clip", "config.json", "model.safetensors", "preprocessor_config.json", *tokenizer)


# `base_model_name_or_path` in the folder of a run on an embedded backbone. The folder inside the installed package
# differs from machine to machine; these names do not, and with a colon no repository on the Hub can have one of them.
_NAMES = {"pgp_hf:embedded-vit": vit_path, "pgp_hf:embedded-clip": clip_path}


def resolve(name: str | None) -> Path | None:
    """Find the embedded backbone that a run names `pgp_hf:embedded-vit` or `pgp_hf:embedded-clip`.

    Returns:
        Its folder on this machine; None if `name` is anything else, a Hub id for example.

    Raises:
        FileNotFoundError: the weights are not in the package.
    """
    return _NAMES[name]() if name in _NAMES else None


def name_of(folder: str | Path | None) -> str | None:
    """Invert [`resolve`]: return the name of the embedded backbone in `folder`, None for any other folder or name."""
    if folder is None:
        return None
    here, path = Path(__file__).resolve().parent, Path(folder).resolve()
    return next((name for name in _NAMES if path == here / name.rpartition("-")[2]), None)


def _folder(name: str, option: str, *files: str) -> Path:
    """Return the folder `name` next to this file, which must hold `files`; `option` of the script makes them again."""
    folder = Path(__file__).resolve().parent / name
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"the embedded backbone lacks {folder / file}. Reinstall pgp_hf, or make the weights again with "
                f"`python examples/pretrain_embedded.py{option}`."
            )
    return folder


def digits(seed: int = 0, test_fraction: float = 0.2) -> DatasetDict:
    """Return scikit-learn's 1,797 handwritten digits as images, in a fixed, stratified train/test split.

    Args:
        seed: chooses the split; the same seed always gives the same rows in the same order.
        test_fraction: share of the scans in the test split, strictly between 0 and 1.

    Returns:
        Splits `train` and `test` with the columns `image` (grey 8x8 PNG, ink light on dark, 0..16 scaled to 0..255)
        and `label` (`ClassLabel`, "zero" to "nine"). Rows keep scikit-learn's order.

    Raises:
        TypeError: `seed` is not an integer, or `test_fraction` is not a number.
        ValueError: `seed` or `test_fraction` is out of range, or a split would lack a class.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r} ({type(seed).__name__}).")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0..2**32-1, got {seed}.")
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, (int, float)):
        raise TypeError(f"test_fraction must be a float, got {test_fraction!r} ({type(test_fraction).__name__}).")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie strictly between 0 and 1, got {test_fraction}; 0.2 is the default.")

    # imported here, so that resolving a backbone's name does not wait for them
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    test_rows = round(len(labels) * test_fraction)
    if not len(DIGIT_NAMES) <= test_rows <= len(labels) - len(DIGIT_NAMES):
        raise ValueError(
            f"test_fraction={test_fraction} leaves {test_rows} of {len(labels)} scans for the test split; each split "
            f"needs at least {len(DIGIT_NAMES)}, one of each class. Choose a fraction nearer to 0.2."
        )
    rows = train_test_split(np.arange(len(labels)), test_size=test_rows, random_state=seed, stratify=labels)
    pixels = np.rint(scans * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)

    def encode(row: int) -> dict[str, bytes | None]:
        buffer = BytesIO()
        PILImage.fromarray(pixels[row]).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGIT_NAMES))})
    splits = DatasetDict()
    for name, chosen in zip(("train", "test"), map(np.sort, rows), strict=True):
        columns = {"image": [encode(i) for i in chosen], "label": labels[chosen].tolist()}
        splits[name] = Dataset.from_dict(columns, features=features)
        splits[name].info.dataset_name = "scikit-learn digits"
    return splits
