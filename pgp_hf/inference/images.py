"""Read what a caller has for an image: a path, a PIL image, an array, bytes, an open file, an item of a dataset."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, TypeAlias, TypeGuard, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.files import image_files
from ..data.rgb import array_to_rgb, open_rgb, to_rgb

ImageLike: TypeAlias = (
    "str | os.PathLike[str] | PIL.Image.Image | np.ndarray[Any, Any] | Tensor | bytes | IO[bytes] | Mapping[str, Any]"
)
Images: TypeAlias = "Iterable[ImageLike] | Dataset[Any]"
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)  # NumPy lacks bfloat16 and the 8-bit ones
_BYTES = bytes | bytearray | memoryview
_KINDS = "a path, a PIL image, an array or tensor, the bytes of a file, an open file, or an item of a dataset"


def is_indexed(images: object) -> TypeGuard[Sequence[ImageLike]]:
    """Return True for what has a length and gives each of its images by index: a list, a dataset, an array of images."""
    return hasattr(images, "__len__") and hasattr(images, "__getitem__")


def several(images: ImageLike | Images) -> Images:
    """Return images one after another, where one alone, or the folder that they are in, may be given.

    Raises:
        TypeError: neither.
        ValueError: a folder without images.
    """
    if isinstance(images, str | os.PathLike) and os.path.isdir(images):
        if not (files := image_files(images)):
            raise ValueError(f"{os.fspath(images)} holds no images.")
        return files
    one = isinstance(images, str | os.PathLike | PIL.Image.Image | _BYTES | Mapping) or hasattr(images, "read")
    if one or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        return [cast(ImageLike, images)]
    if not isinstance(images, Iterable) and not is_indexed(images):
        raise TypeError(f"images is a {type(images).__name__}: pass {_KINDS}, several of them, or a folder.")
    return cast(Images, images)


def to_image(image: ImageLike) -> PIL.Image.Image:
    """Convert anything that is an image to an RGB image, upright by its EXIF orientation.

    Args:
        image: a path, a PIL image, the bytes of a file, or an open file; an item of a dataset, decoded (`"image"`) or not
            (`"bytes"` and `"path"`); or an array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with C in 1, 3, 4,
            integers in 0..255 or floats in [0, 1].

    Raises:
        ValueError: a file that does not decode, an array that is not an image.
        TypeError: anything else.
    """
    given: Any = _of_item(image) if isinstance(image, Mapping) else image
    if isinstance(given, PIL.Image.Image):
        return to_rgb(given)
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() and given.dtype not in _NUMPY_FLOATS else given
    if isinstance(given, np.ndarray | Tensor):
        return array_to_rgb(given)
    if isinstance(given, _BYTES):
        return open_rgb(io.BytesIO(given))
    if isinstance(given, str | os.PathLike) or hasattr(given, "read"):
        return open_rgb(given)
    raise TypeError(f"an image cannot be of type {type(given).__name__}: pass {_KINDS}.")


def _of_item(item: Mapping[str, Any]) -> Any:
    """Return the image in an item of a dataset; raise TypeError for other mappings."""
    images = [value for value in item.values() if isinstance(value, PIL.Image.Image)]
    found = item["image"] if "image" in item else images[0] if len(images) == 1 else item
    if isinstance(found, Mapping):
        found = found.get("path") if found.get("bytes") is None else found["bytes"]
    if found is None or isinstance(found, Mapping):
        raise TypeError(
            f"a mapping with the keys {', '.join(map(repr, item))} is not an image: pass an item of a dataset with an image "
            "in 'image', or with 'bytes' or 'path'; or the image itself, such as item['photo']."
        )
    return found
