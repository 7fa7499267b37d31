"""Configure the CLIP prompt adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base.card import AdapterCard, setting
from ..base.config import PromptConfig


@dataclass
class ClipPromptConfig(PromptConfig):
    """Configure a text context for each task, and image prompts that all share; the defaults are those of PGP's code.

    Use `for_classes`, which tokenises the class names: a `CLIPModel` has no head to read them from.

    Args:
        pool_size: number of text contexts, one per task.
        text_length: context tokens before each class name, learned per task; 0 for none.
        image_length: image prompt tokens after CLS, shared by all tasks; 0 for none.
        grow_pool: add contexts when the stream has more tasks than contexts.
        class_tokens: token ids of each class name, start and end tokens included.
        id2label: class names.
        learned_entries: number of contexts that tasks have used so far; filled in by training.
        interpolate_pos_encoding: interpolate the position embeddings to the input's size, for a backbone trained at
            another.
        head: what classifies: "linear", the similarity with the class names; "statistics", the class means and the
            covariance of finished tasks.
        shrinkage: how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1].
        pull_constraint_coeff: not used, since there are no keys.
        modules_to_save: names of modules that are trained and saved whole; none by default.
        hidden_size, target_modules, exclude_modules: filled in when the adapter is added; leave them out.

    Raises:
        ValueError: sizes that are negative; class names and tokens that do not agree.
    """

    method_name = "CLIP_PROMPT"
    base_class = "CLIPModel"
    filled_in = (*PromptConfig.filled_in, "class_tokens", "learned_entries")
    command_line = ("text_length", "image_length")

    pool_size: int = field(default=10, metadata={"help": "number of text contexts, one per task"})
    text_length: int = field(
        default=16, metadata={"help": "context tokens before each class name, learned per task; 0 for none"}
    )
    image_length: int = field(
        default=10, metadata={"help": "image prompt tokens after CLS, shared by all tasks; 0 for none"}
    )
    grow_pool: bool = field(
        default=False, metadata={"help": "add contexts when the stream has more tasks than contexts"}
    )
    class_tokens: list[list[int]] | None = field(
        default=None, metadata={"help": "token ids of each class name, start and end tokens included"}
    )
    learned_entries: int | None = field(
        default=None, metadata={"help": "contexts that tasks have used so far; filled in by training"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(pool_size=1, text_length=0, image_length=0)
        names, tokens = self.id2label or {}, self.class_tokens or []
        if len(names) != len(tokens):
            raise ValueError(
                f"{len(names)} class names, but class_tokens for {len(tokens)}: use ClipPromptConfig.for_classes(tokenizer, names)."
            )

    @classmethod
    def for_classes(
        cls, tokenizer: Any, names: Sequence[str], template: str = "{}", **kwargs: Any
    ) -> ClipPromptConfig:
        """Make the configuration for class names.

        Args:
            tokenizer: the checkpoint's `CLIPTokenizer`.
            names: of the classes, in the order of their labels.
            template: text around the name, such as "a photo of a {}.".
            kwargs: any other field.
        """
        texts = [template.format(str(name).replace("_", " ")) for name in names]
        return cls(class_tokens=tokenizer(texts)["input_ids"], id2label=dict(enumerate(map(str, names))), **kwargs)

    @classmethod
    def card(cls, settings: Mapping[str, Any]) -> AdapterCard:
        parts = [f"{setting(settings, 'text_length')} context tokens per task before each class name"]
        if settings.get("image_length") != 0:
            parts += [f"{setting(settings, 'image_length')} image prompt tokens shared by all tasks"]
        return AdapterCard(
            parts=" and ".join(parts),
            selects=False,
            features="the image features",
            head="similarity with the class names, each behind its task's context",
            trained_head="the contexts",
            finished="The text context of a finished task never moves.",
            base_class=cls.base_class,
            scores="logits_per_image",
        )
