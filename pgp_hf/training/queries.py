"""Keep the queries of images on disk: computed once, and shared by tasks, runs and processes.

A query depends on the frozen backbone and the image alone, so that a file of them holds for any run. Its name is a digest
of all that enters the computation, down to the size of the batches, by which the last bits of a matrix product may
differ: on a CPU, a query from the disk is that of a live pass to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.images import ImageCollator, ImageView
from ..models import SelectsPrompts
from ..runs.atomic import replacing
from ..runs.digest import tensor_sha256

LOCK = ".lock"
SECONDS = 30.0
"""Time to wait for another process that writes."""
_OWN = re.compile(r"queries-[0-9a-f]{32}\.safetensors|(?P<temporary>\.queries-[0-9a-f]{32}\.safetensors\.\d+\.tmp)")
# of a backbone's configuration, what does not enter its forward pass, or differs between copies of one backbone
_NO_PART = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "problem_type"),
    *("id2label", "label2id", "num_labels", "return_dict", "output_attentions", "output_hidden_states"),
}

Key = dict[str, Any]


@dataclass(frozen=True)
class QueryCache:
    """A folder of queries, one file for each set of images.

    Files are memory-mapped, and appear whole or not at all. One that is damaged is reported and counts as missing: a cache
    never stops a run.

    Args:
        folder: to keep them in; made when the first are written.
        limit: most bytes that the files may take; those that have not been used for the longest time make room.
    """

    folder: Path
    limit: int

    def path(self, key: Key) -> Path:
        """Return the file for a key, whether or not it is there."""
        return self.folder / f"queries-{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.safetensors"

    def read(self, key: Key, count: int) -> Tensor | None:
        """Return the queries `(count, d)` of a set of images; None if they are not here."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            found = _read(path, key, count)
        except (
            OSError,
            RuntimeError,
            ValueError,
            SafetensorError,
        ) as error:  # torch opens a mapped file again, by its name
            if not path.is_file():
                return None  # another process has just made room
            warnings.warn(f"{path} is damaged ({error}): its queries are computed again.", stacklevel=2)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it is in use
        return found

    def write(self, key: Key, queries: Tensor) -> None:
        """Keep the queries `(N, d)` of a set of images, if there is room for them."""
        path, queries = self.path(key), queries.detach().contiguous()
        size = queries.numel() * queries.element_size()
        if size > self.limit or not bool(queries.isfinite().all()):
            return  # what made them is at fault, and the run is about to say so
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK, timeout=SECONDS):
                self._make_room(size, path)
                with replacing(path) as temporary:
                    save_file({"queries": queries}, temporary, {"key": _text(key), "sha256": tensor_sha256(queries)})
        except (OSError, SafetensorError, Timeout) as error:  # on a full disk, safetensors raises its own
            warnings.warn(f"queries are not kept in {self.folder} ({error}): set query_cache.", stacklevel=2)

    def _make_room(self, size: int, path: Path) -> None:
        """Delete files until `size` more bytes fit; only for whoever holds the lock."""
        files = []
        with os.scandir(self.folder) as entries:  # far quicker than `glob` in the folder of a long stream
            there = list(entries)
        for entry in there:
            own = _OWN.fullmatch(entry.name)  # the folder may hold files of others
            if own is None:
                continue
            if own["temporary"]:  # of a process that died
                Path(entry.path).unlink(missing_ok=True)
            elif entry.name != path.name:
                stat = entry.stat()
                files.append((stat.st_mtime, Path(entry.path), stat.st_size))
        taken = sum(taken for *_, taken in files)
        if taken + size <= self.limit:
            return
        for _, file, freed in sorted(files):
            with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
                file.unlink(missing_ok=True)
                taken -= freed
            if taken + size <= self.limit:
                return


def query_key(
    learner: SelectsPrompts, digest: Mapping[str, str], images: ImageView, collate: Any, how: Mapping[str, Any]
) -> Key | None:
    """Return all that the queries of a set of images depend on; None where that cannot be told.

    Args:
        digest: of the backbone, see `StreamModel.digest`.
        images: the set.
        collate: makes a batch of images.
        how: settings of the run that the computation depends on.
    """
    config = getattr(getattr(learner, "model", None), "config", None)
    # another collator may augment, one of the user's own among them, and an image processor without a description be any
    known = type(collate) is ImageCollator and hasattr(collate.processor, "to_dict")
    if not known or not digest or config is None or (content := images.sha256) is None:
        return None
    sample = collate([images[0], images[len(images) - 1]])
    collate.finish(sample)
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_PART}
    return {
        "images": content,
        "view": images.view,
        "count": len(images),
        # how the processor and its backend turn images into pixels, and in what size
        "pixels": tensor_sha256(sample["pixel_values"]),
        "processor": collate.processor.to_dict(),
        "backbone": dict(digest),
        "config": settings,
        "query": f"{type(learner).query.__module__}.{type(learner).query.__qualname__}",
        "interpolate_pos_encoding": learner.settings().get("interpolate_pos_encoding"),
        "attention": config._attn_implementation,
        "versions": [torch.__version__, transformers.__version__],
        **how,
    }


def _read(path: Path, key: Key, count: int) -> Tensor:
    with safe_open(path, framework="pt") as file:
        noted, found = file.metadata() or {}, file.get_tensor("queries")
    if noted.get("key") != _text(key):
        raise ValueError("it holds queries of something else")
    if found.ndim != 2 or len(found) != count:
        raise ValueError(f"it has the shape {tuple(found.shape)}, expected {count} rows")
    if noted.get("sha256") != tensor_sha256(found):
        raise ValueError("its content is not what was written")
    return found


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True, default=str)
