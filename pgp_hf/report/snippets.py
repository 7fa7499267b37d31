"""Write the code in a model card, which runs unchanged in a folder with a `photo.jpg`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import embedded
from .names import is_hub_id, public_name

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard


class Source(NamedTuple):
    """The places from which a card's code loads the backbone and the adapter.

    Attributes:
        backbone: its name, or a path to fill in.
        inside: whether the package holds it.
        found: whether its name is enough to find it, inside the package or on the Hub.
        pinned: the backbone's revision on the Hub, None for the newest.
        adapter: its repository, or a path to fill in.
        tag: the adapter's revision in its repository, None for a folder.
    """

    backbone: str
    inside: bool
    found: bool
    pinned: str | None
    adapter: str
    tag: str | None

    @classmethod
    def of(cls, config: Mapping[str, Any], repo_id: str | None, trained: int) -> Source:
        """Return the places for the revision after `trained` tasks.

        Args:
            config: content of `adapter_config.json`.
            repo_id: the repository, None for a folder.
            trained: number of finished tasks.
        """
        base = config.get("base_model_name_or_path") or ""
        inside = embedded.resolve(base) is not None
        found = inside or is_hub_id(base)
        backbone = base if found else f"path/to/{public_name(base) if base else 'the-backbone'}"
        pinned = config.get("revision") or None
        if is_hub_id(repo_id):
            return cls(backbone, inside, found, pinned, repo_id, f"task-{trained}")
        return cls(backbone, inside, found, pinned, "path/to/this/folder", None)

    @property
    def checkpoint(self) -> str:
        """The argument `resume_from_checkpoint`, as Python."""
        return _quoted(f"{self.adapter}@{self.tag}" if self.tag else self.adapter)


def predict_code(source: Source) -> str:
    """Return the code that predicts a photo's class with this package."""
    backbone = "" if source.found else f", backbone={_quoted(source.backbone)}"
    arguments = f"{_quoted(source.adapter)}{_revision(source.tag)}{backbone}"
    arguments = f"\n    {arguments}\n" if len(arguments) > 60 else arguments
    return f"""from pgp_hf import load_pretrained

classifier = load_pretrained({arguments})
print(classifier.predict("photo.jpg", top_k=3))"""


def peft_code(source: Source, adapter: AdapterCard, num_classes: int, own_processor: bool) -> str:
    """Return the code that scores a photo with PEFT alone; the size of the head comes with the adapter.

    Args:
        source: where the backbone and the adapter are.
        adapter: how the backbone is loaded, and where the scores are.
        num_classes: number of scores.
        own_processor: whether the run saved its image processor; otherwise the backbone's is used.
    """
    name = f"embedded.resolve({_quoted(source.backbone)})" if source.inside else _quoted(source.backbone)
    base = f"{name}{_revision(source.pinned)}"
    saved = f"{_quoted(source.adapter)}{_revision(source.tag)}"
    package = "\nfrom pgp_hf import embedded" if source.inside else ""
    return f"""import pgp_hf  # registers the adapter with PEFT
import torch
from peft import PeftModel{package}
from PIL import Image
from transformers import AutoImageProcessor, {adapter.base_class}

base = {adapter.base_class}.from_pretrained({base})
model = PeftModel.from_pretrained(base, {saved}).eval()
processor = AutoImageProcessor.from_pretrained({saved if own_processor else base}, backend="pil")
pixels = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    scores = model(pixel_values=pixels).{adapter.scores}  # (1, {num_classes}): one column per class"""


def _revision(name: str | None) -> str:
    return f", revision={_quoted(name)}" if name else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
