"""Write the code in a model card, which runs unchanged in a folder with a `photo.jpg`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import embedded
from .names import is_hub_id, is_owned, public_name

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard


class Source(NamedTuple):
    """The places from which a card's code loads what a run has made, and the backbone.

    Attributes:
        backbone: name of the model that the run started from, or a path to fill in.
        inside: whether the package holds it.
        found: whether its name is enough to find it, inside the package or on the Hub.
        pinned: the backbone's revision on the Hub, None for the newest.
        made: repository of the adapter or the whole model, or a path to fill in.
        tag: the revision in that repository, None for a folder.
    """

    backbone: str
    inside: bool
    found: bool
    pinned: str | None
    made: str
    tag: str | None

    @classmethod
    def of(cls, config: Mapping[str, Any], repo_id: str | None, trained: int) -> Source:
        """Return the places for the revision after `trained` tasks.

        Args:
            config: content of `adapter_config.json`, or of a whole model's `config.json`.
            repo_id: the repository, None for a folder.
            trained: number of finished tasks.
        """
        base = config.get("base_model_name_or_path") or ""
        inside = embedded.resolve(base) is not None
        found = inside or is_owned(base)
        backbone = base if found else f"path/to/{public_name(base) if base else 'the-backbone'}"
        pinned = config.get("revision") or None
        if is_hub_id(repo_id):
            return cls(backbone, inside, found, pinned, repo_id, f"task-{trained}")
        return cls(backbone, inside, found, pinned, "path/to/this/folder", None)

    @property
    def checkpoint(self) -> str:
        """The argument `resume_from_checkpoint`, as Python."""
        return _quoted(f"{self.made}@{self.tag}" if self.tag else self.made)

    @property
    def base(self) -> str:
        """The arguments that load the backbone, as Python."""
        name = f"embedded.resolve({_quoted(self.backbone)})" if self.inside else _quoted(self.backbone)
        return f"{name}{_revision(self.pinned)}"

    @property
    def saved(self) -> str:
        """The arguments that load what the run has made, as Python."""
        return f"{_quoted(self.made)}{_revision(self.tag)}"


def predict_code(source: Source) -> str:
    """Return the code that predicts a photo's class with this package and an adapter."""
    return _predict(source, "" if source.found else f", backbone={_quoted(source.backbone)}")


def peft_code(
    source: Source, adapter: AdapterCard, num_classes: int, own_processor: bool, precision: str = "float32"
) -> str:
    """Return the code that scores a photo with PEFT alone.

    The size of the head comes with an adapter of this package.

    Args:
        source: where the backbone and the adapter are.
        adapter: how the backbone is loaded, and where the scores are.
        num_classes: number of scores.
        own_processor: whether the run saved its image processor; otherwise the backbone's is used.
        precision: of the backbone in training; transformers would take that of its file.
    """
    package = "\nfrom pgp_hf import embedded" if source.inside else ""
    registers = "" if adapter.from_peft else "import pgp_hf  # registers the adapter with PEFT\n"
    base = f"{source.base}, dtype=torch.{precision}"
    if adapter.from_peft:
        base = f"\n    {base}, num_labels={num_classes}, ignore_mismatched_sizes=True\n"
    return f"""{registers}import torch
from peft import PeftModel{package}
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {adapter.base_class}

base = {adapter.base_class}.from_pretrained({base})
model = PeftModel.from_pretrained(base, {source.saved}).eval()
{_scores(source, adapter.scores, num_classes, own_processor)}"""


def predict_whole_code(source: Source, own_processor: bool) -> str:
    """Return the code that predicts a photo's class with this package and a whole model."""
    if own_processor:
        return _predict(source)
    before = f"from transformers import AutoImageProcessor\n\n{_processor(source, own_processor)}"
    return _predict(source, ", processor=processor", before, "embedded, " if source.inside else "")


def transformers_code(source: Source, num_classes: int, own_processor: bool) -> str:
    """Return the code that scores a photo with a whole model and transformers alone.

    Args:
        source: where the model is, and the one that training started from.
        num_classes: number of scores.
        own_processor: whether the run saved its image processor; otherwise that of the earlier model is used.
    """
    package = "from pgp_hf import embedded\n" if source.inside and not own_processor else ""
    return f"""import torch
{package}from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained({source.saved}).eval()
{_scores(source, "logits", num_classes, own_processor)}"""


def _predict(source: Source, options: str = "", before: str = "", imported: str = "") -> str:
    arguments = f"{source.saved}{options}"
    arguments = f"\n    {arguments}\n" if len(arguments) > 60 else arguments
    return f"""from pgp_hf import {imported}load_pretrained
{before}
classifier = load_pretrained({arguments})
print(classifier.predict("photo.jpg", top_k=3))"""


def _processor(source: Source, own: bool) -> str:
    return f'processor = AutoImageProcessor.from_pretrained({source.saved if own else source.base}, backend="pil")'


def _scores(source: Source, attribute: str, num_classes: int, own_processor: bool) -> str:
    return f"""{_processor(source, own_processor)}
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright, as in training
pixels = processor(photo, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    scores = model(pixel_values=pixels).{attribute}  # (1, {num_classes}): one column per class"""


def _revision(name: str | None) -> str:
    return f", revision={_quoted(name)}" if name else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
