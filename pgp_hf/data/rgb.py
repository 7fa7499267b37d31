"""Turn any image into RGB, in the same way for training and for prediction."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np
import PIL.Image
import PIL.ImageOps


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a PIL image to 8-bit RGB, turned upright by its EXIF orientation if that can be read; alpha is dropped.

    Raises:
        ValueError: a mode whose values have no known range.
    """
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = _upright(image)
    if deep:
        # PIL would clip 16-bit grey to white: keep the high byte
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"image mode {image.mode!r} has no known value range; convert it to 8 bits first")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when such an image is converted straight to RGB
    return image.convert("RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    image.load()  # errors of the image itself are raised here
    try:
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:  # gone once the image is upright
            return PIL.ImageOps.exif_transpose(image)
    except Exception:  # PIL raises any type on damaged EXIF, even SyntaxError; the image is sound without it
        return image
    return image


def open_rgb(file: str | os.PathLike[str] | IO[bytes]) -> PIL.Image.Image:
    """Open an image file, or one in memory, as RGB, turned upright by its EXIF orientation.

    Raises:
        ValueError: a missing file, or one that does not decode; the message names its path.
    """
    try:
        with PIL.Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # decoders raise any type on damaged bytes
        name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "a file in memory")
        raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {error}).") from error


def array_to_rgb(array: Any) -> PIL.Image.Image:
    """Make an RGB image from an array.

    Args:
        array: `(H, W)`, `(H, W, C)` or `(C, H, W)`, C in 1, 3, 4; integers in 0..255 or floats in [0, 1].

    Raises:
        ValueError: another shape, type or range.
    """
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            f"array of shape {array.shape} is not an image: expected (H, W), (H, W, C) or (C, H, W), C in 1, 3, 4."
        )
    if array.dtype.kind not in "fbiu":
        raise ValueError(f"array of {array.dtype} is not an image: expected integers in 0..255 or floats in [0, 1].")
    top = 1 if array.dtype.kind in "fb" else 255
    if not (array.min() >= 0 and array.max() <= top):
        raise ValueError(
            f"array of {array.dtype} with values from {array.min()} to {array.max()} is not an image: expected integers in "
            "0..255 or floats in [0, 1], before any normalisation."
        )
    pixels = np.rint(array * (255 / top)).astype(np.uint8) if top == 1 else array.astype(np.uint8)
    return to_rgb(PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
