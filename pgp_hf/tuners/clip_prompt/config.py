"""Configure the CLIP prompt adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base.card import AdapterCard, setting
from ..base.config import PoolConfig


@dataclass
class ClipPromptConfig(PoolConfig):
    """Configure a text context for each task, and image prompts that all share; the defaults are those of PGP's code.

    Use `for_classes`, which tokenises the class names: a `CLIPModel` has no head to read them from.

    Args:
        pool_size: number of text contexts, one per task.
        text_length: context tokens before each class name, learned per task; 0 for none.
        image_length: image prompt tokens after CLS, shared by all tasks; 0 for none.
        grow_pool: add contexts when a stream that is known in advance has more tasks than contexts. A task that nobody
            foresaw gets its context in any case.
        class_tokens: token ids of each class name, start and end tokens included.
        template: text around each class name, such as "a photo of a {}."; filled in by `for_classes`.
        id2label: class names.
        learned_entries: number of contexts that tasks have used so far; filled in by training.
        added_entries: number of contexts that came with tasks that nobody foresaw; filled in.
        interpolate_pos_encoding: interpolate the position embeddings to the input's size, for a backbone trained at
            another.
        head: what classifies: "linear", the similarity with the class names; "statistics", the class means and the
            covariance of finished tasks.
        shrinkage: how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1].
        pull_constraint_coeff: not used, since there are no keys.
        modules_to_save: names of modules that are trained and saved whole; none by default.
        hidden_size, image_size, head_input, target_modules, exclude_modules: filled in; leave them out.

    Raises:
        ValueError: sizes that are negative; class names and tokens that do not agree; a template without a place for
            the name.
    """

    method_name = "CLIP_PROMPT"
    base_class = "CLIPModel"
    filled_in = (*PoolConfig.filled_in, "class_tokens", "template")
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
    template: str | None = field(
        default=None, metadata={"help": "text around each class name; filled in by for_classes"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(text_length=0, image_length=0)
        if self.template is not None and (self.template.count("{}"), self.template.count("{")) != (1, 1):
            # nothing else that `str.format` knows: the template may come from anybody's file
            raise ValueError(f"template={self.template!r:.80}: expected a text with one {{}} for the class name.")
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

        Raises:
            TypeError: a single text instead of a sequence of names.
        """
        if isinstance(names, str):
            raise TypeError(
                f"names={names!r:.80}: expected a sequence of names, one for each class, such as [{names!r:.80}]."
            )
        tokens = tokenize(tokenizer, list(map(str, names)), template)
        return cls(class_tokens=tokens, template=template, id2label=dict(enumerate(map(str, names))), **kwargs)

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


def tokenize(tokenizer: Any, names: Sequence[str], template: str | None) -> list[list[int]]:
    """Return the token ids of class names, start and end tokens included; underscores are read as blanks."""
    texts = [(template or "{}").replace("{}", name.replace("_", " ")) for name in names]
    return [list(tokens) for tokens in tokenizer(texts)["input_ids"]] if texts else []
