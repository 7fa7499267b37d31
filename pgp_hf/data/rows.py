"""Read a split's images by row number: encoded, decoded, hashed and verified.

A stream opens images here and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
from tqdm.auto import tqdm

from .rgb import to_rgb
from .shifts import RENDERINGS

BATCH_ROWS = 64  # rows of encoded images in memory at a time
THREADS = 4  # decoders release the GIL
PROGRESS_FROM = 500  # with fewer images, a progress bar would be gone before it could be read


class ImageRows:
    """Give access to the image column of one split by row number.

    Rows are read in Arrow form, which decodes nothing. Holds neither a lock nor an open file, so it can be pickled.

    Args:
        split: name of the split, for error messages.
        data: the split's rows.
        image_column: a `datasets.Image` column.
        labels: the mapped label of every row.

    Attributes:
        renderings: by label id, the name in `RENDERINGS` by which images of the class are shown; others are as they are.
    """

    def __init__(self, split: str, data: datasets.Dataset, image_column: str, labels: np.ndarray) -> None:
        self.split = split
        self.labels = labels
        self.renderings: Mapping[int, str] = {}
        self._feature = datasets.Image(mode=data.features[image_column].mode)
        self._arrow = data.select_columns([image_column]).with_format("arrow")

    def encoded(self, rows: Sequence[int]) -> list[dict[str, Any] | None]:
        """Return the stored `{"bytes", "path"}` of these rows."""
        return self._arrow[list(rows)].column(0).to_pylist()

    def dataset(self, rows: Sequence[int], label_names: Sequence[str]) -> datasets.Dataset:
        """Return rows as a dataset with the columns `image` and `label`; no image is decoded, or rendered."""
        name, label = self._arrow.column_names[0], datasets.ClassLabel(names=list(label_names))
        images = self._arrow.select(rows).with_format(None)
        images = images if name == "image" else images.rename_column(name, "image")
        return images.add_column("label", self.labels[list(rows)].tolist()).cast_column("label", label)

    def decode(self, row: int, stored: dict[str, Any] | None = None) -> PIL.Image.Image:
        """Return the RGB image of one row; `stored` is its encoded form, if it has been read already.

        Raises:
            ValueError: a row without an image, or with one that does not decode; the message names split and row.
        """
        stored = stored or self.encoded([row])[0]
        try:
            if stored is None:
                raise ValueError("the row has no image (None)")
            image = to_rgb(self._feature.decode_example(stored))
        except Exception as error:  # decoders raise any type on damaged bytes
            raise ValueError(self._broken(row, error)) from error
        name = self.renderings.get(int(self.labels[row]))
        return image if name is None else RENDERINGS[name](image)

    def content(self, row: int, stored: dict[str, Any] | None) -> bytes:
        """Return the encoded bytes of one row's image, from its file if the row holds only a path; decode nothing.

        Raises:
            ValueError: a row without an image, or with a file that cannot be read.
        """
        try:
            if stored is None or (stored["bytes"] is None and stored["path"] is None):
                raise ValueError("the row has no image (None)")
            if stored["bytes"] is not None:
                return stored["bytes"]
            if os.path.isfile(stored["path"]):  # datasets would take some names for chains of archives
                return Path(stored["path"]).read_bytes()
            return self._feature.embed_storage(pa.array([stored], self._feature.pa_type))[0]["bytes"].as_py()
        except (OSError, ValueError) as error:
            raise ValueError(self._broken(row, error)) from error

    def _broken(self, row: int, error: Exception) -> str:
        return f"image in row {row} of the {self.split} split is broken: {type(error).__name__}: {error}"

    def digests(self, groups: Sequence[np.ndarray]) -> list[str]:
        """Return the SHA-256 of each group of rows, over each row's label, length and encoded bytes, in row order.

        Label and length are little-endian int64. Nothing is decoded, and the digests do not depend on the machine, on
        paths or on the layout in Arrow.
        """
        hashes = [hashlib.sha256() for _ in groups]
        group_of = {int(row): group for group, rows in enumerate(groups) for row in rows}
        for rows in _batches(sorted(group_of)):
            for row, stored in zip(rows, self.encoded(rows), strict=True):
                content = self.content(row, stored)
                digest = hashes[group_of[row]]
                digest.update(struct.pack("<qq", self.labels[row], len(content)))
                digest.update(content)
        return [digest.hexdigest() for digest in hashes]


def _batches(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS))


def verify_images(selected: Sequence[tuple[ImageRows, Sequence[int]]], progress: bool) -> None:
    """Decode these rows of each split once, on several threads.

    Raises:
        ValueError: images that do not decode; the message names the first one and says how many there are.
    """
    jobs = [(split, rows) for split, chosen in selected for rows in _batches(chosen)]
    total = sum(len(rows) for _, rows in jobs)

    def errors(job: tuple[ImageRows, Sequence[int]]) -> list[str]:
        split, rows = job
        found = []
        for row, stored in zip(rows, split.encoded(rows), strict=True):
            try:
                split.decode(row, stored)
            except ValueError as error:
                found.append(str(error))
        return found

    broken: list[str] = []
    hidden = not progress or total < PROGRESS_FROM
    bar = tqdm(total=total, desc="Checking images", unit="img", disable=hidden or None)  # None: on a terminal alone
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for (_, rows), found in zip(jobs, pool.map(errors, jobs), strict=True):
            broken += found
            bar.update(len(rows))
    if broken:
        raise ValueError(
            f"{broken[0]} ({len(broken)} of {total} images are broken). Remove these rows or re-encode the images"
        )
