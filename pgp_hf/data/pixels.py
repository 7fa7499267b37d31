"""Crop, flip, resize and normalise a batch of uint8 images at once, on any device, as an image processor would each of them."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers.image_processing_backends import PilBackend

BILINEAR = 2  # of PIL; with other filters its result depends on which axis comes first, which its version decides
LARGE = 256  # pixels along a side; above, PIL's sparse arithmetic takes less than the dense one here
STORED = 2**30  # bytes of a task's decoded images that are kept between epochs
View = tuple[int, int, int, int, bool]  # left, upper, right and lower edge of a crop, and whether it is mirrored


class Recipe(NamedTuple):
    """What an image processor does to an RGB image.

    Attributes:
        size: height and width afterwards.
        scale, shift: of each channel's grey levels, `(3,)`.
    """

    size: tuple[int, int]
    scale: tuple[float, float, float]
    shift: tuple[float, float, float]


def recipe(processor: object) -> Recipe | None:
    """Return what a processor does, where it is no more than to resize bilinearly by PIL and to normalise; else None."""
    if not isinstance(processor, PilBackend):
        return None
    made: Any = processor
    size, others = made.size, ("do_center_crop", "do_pad", "do_flip_channel_order")
    fixed = size is not None and bool(size["height"] and size["width"]) if made.do_resize else False
    plain = type(made)._preprocess is PilBackend._preprocess and type(made).resize is PilBackend.resize
    resample = getattr(made, "resample", None)
    if not fixed or not plain or any(getattr(made, name, None) for name in others) or resample != BILINEAR:
        return None
    factor = float(made.rescale_factor) if made.do_rescale else 1.0
    mean, std = (np.broadcast_to(value if made.do_normalize else d, 3).tolist() for value, d in _normal(made))
    scale = [factor / each for each in std]
    shift = [-own / each for own, each in zip(mean, std, strict=True)]
    return Recipe((int(size["height"]), int(size["width"])), tuple(scale), tuple(shift))


def _normal(processor: Any) -> list[tuple[Any, float]]:
    return [(processor.image_mean, 0.0), (processor.image_std, 1.0)]


def render(pixels: Tensor, views: Tensor, made: Recipe) -> Tensor:
    """Return what a processor makes of crops of images, to within a grey level: `(B, 3, height, width)`, float32.

    Reductions are antialiased as PIL's are, and both axes rounded. Nothing waits for a device.

    Args:
        pixels: uint8, `(B, 3, H, W)`.
        views: int64, `(B, 5)`: edges and mirroring of each crop, as a [`View`] has them.
        made: what the processor does.
    """
    with torch.autocast(pixels.device.type, enabled=False):  # half precision has too few digits for grey levels
        return _render(pixels, views, made)


def _render(pixels: Tensor, views: Tensor, made: Recipe) -> Tensor:
    left, top, right, bottom, flip = views.unbind(1)
    height, width = made.size
    across = _weights(left, right, pixels.shape[3], width)
    across = torch.where(flip.bool()[:, None, None], across.flip(1), across)
    down = _weights(top, bottom, pixels.shape[2], height)
    narrow = torch.matmul(pixels.float(), across[:, None].mT).add_(0.5).floor_()
    scale, shift = _channels(made, pixels.device)
    found = _BUFFERS.take((len(pixels), 3, height, width), pixels.device)
    part = 2 if pixels.device.type == "cpu" else len(pixels)  # images that stay in a processor's cache meanwhile
    for i in range(0, len(pixels), part):
        own = torch.matmul(down[i : i + part, None], narrow[i : i + part], out=found[i : i + part])
        own.add_(0.5).floor_().mul_(scale).add_(shift)
    return found


class Buffers:
    """Give memory for batches, on a CPU that of an earlier batch that nobody refers to any more.

    Fresh memory costs as much time there as the arithmetic: the system clears it page by page.
    """

    MOST = 4  # batches that are in use at a time: others are not kept

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, torch.UntypedStorage, int]] = []  # and the users that it has when it is free
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return a tensor of this shape, with any values."""
        # a worker's batches are shared with the process that they are for, whatever is known of them in the worker
        if device.type != "cpu" or _users is None or get_worker_info() is not None:
            return torch.empty(shape, device=device)
        with self._lock:
            self._kept = [each for each in self._kept if tuple(each[0].shape) == shape]
            for tensor, storage, own in self._kept:
                if _users(storage._cdata) <= own and not storage.is_shared():
                    return tensor.view(shape)
            tensor = torch.empty(shape)
            if len(self._kept) < self.MOST:
                storage = tensor.untyped_storage()
                self._kept.append((tensor, storage, _users(storage._cdata)))
            return tensor.view(shape)


_users: Callable[[int], int] | None = getattr(
    torch._C, "_storage_Use_Count", None
)  # without it, memory is always fresh
_BUFFERS = Buffers()


@lru_cache(maxsize=4)
def _channels(made: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    scale, shift = (torch.tensor(each)[:, None, None].to(device) for each in (made.scale, made.shift))
    return scale, shift


def _weights(start: Tensor, end: Tensor, count: int, size: int) -> Tensor:
    """Return the weights `(B, size, count)` by which pixels from `start` to `end` become `size` pixels."""
    device, length = start.device, (end - start).double()[:, None, None]
    step = length / size
    reach = step.clamp_min(1)
    centre = (torch.arange(size, device=device).double()[:, None] + 0.5) * step
    pixel = torch.arange(count, device=device) - start[:, None, None]
    weights = (1 - ((pixel + 0.5 - centre) / reach).abs()).clamp_min_(0).float()
    weights = weights.masked_fill_((pixel < 0) | (pixel >= length), 0)
    return weights / weights.sum(-1, keepdim=True)


class PixelStore:
    """Keep a task's decoded images of one size from epoch to epoch, in a file that is mapped into memory.

    Processes that are forked share it, and no name of it remains.

    Args:
        count: number of images.
        shape: of each, `(height, width, 3)`.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.shape, size = shape, int(np.prod(shape))
        with tempfile.NamedTemporaryFile(prefix="pgp_hf-") as file:
            held = torch.from_file(file.name, shared=True, size=count * (size + 1), dtype=torch.uint8)
        self._known, self._pixels = held[:count], held[count:].view(count, *shape)

    @classmethod
    def for_images(cls, count: int, shape: tuple[int, ...]) -> PixelStore | None:
        """Return a store, or None where so many images would not fit, or the disk has no room for them."""
        size = count * (int(np.prod(shape)) + 1)
        # a write to a mapped file on a full disk ends the process
        fits = 0 < size <= STORED and size < shutil.disk_usage(tempfile.gettempdir()).free / 2
        return cls(count, shape) if fits else None

    def get(self, index: int) -> Tensor | None:
        """Return an image, uint8, `(height, width, 3)`; None if it has not been kept."""
        return self._pixels[index] if self._known[index] else None

    def keep(self, index: int, pixels: Tensor) -> None:
        """Keep an image, unless it has another size."""
        if pixels.shape == self._pixels.shape[1:]:
            self._pixels[index] = pixels
            self._known[index] = 1


def stack(images: Sequence[Tensor]) -> Tensor:
    """Return images `(height, width, 3)` of one size as a batch `(B, 3, height, width)`."""
    return torch.stack(list(images)).permute(0, 3, 1, 2).contiguous()
