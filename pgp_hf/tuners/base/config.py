"""Configure prompt adapters: the settings that all of them have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from ... import embedded
from ...fields import check_fields
from .card import AdapterCard
from .peft_type import extend_peft_type


@dataclass
class PromptConfig(PeftConfig):
    """Base of the adapters' configurations; takes the arguments of `PeftConfig` as well.

    Args:
        pull_constraint_coeff: weight of the pull term, which draws the selected keys towards the query.
        interpolate_pos_encoding: interpolate the position embeddings to the input's size, for a backbone trained at
            another.
        head: what classifies: "linear", the trained head; "statistics", the class means and the covariance of finished
            tasks.
        shrinkage: how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1].
        hidden_size: width of the backbone; filled in when the adapter is added.
        id2label: class names; filled in from the model, so that every loader can rebuild the head.
        target_modules: names of the wrapped modules; filled in when the adapter is added.
        exclude_modules: not used, but read by PEFT.
        modules_to_save: names of modules that are trained and saved whole; the classifier by default, [] for none.
        image_size: height and width of the images in training, the only ones that are then accepted; None to accept any,
            [] after images of several sizes. Filled in by training.
        head_input: what the backbone's own head reads, if not the CLS token alone; filled in when the adapter is added.

    Attributes:
        method_name: the PEFT type, in upper case; each adapter has its own.
        base_class: name of the class of transformers that loads the backbone.
        command_line: names of the fields that are options of the adapter's example.
        filled_in: names of the fields that are not settings, since the stream or its training fills them in.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range.
    """

    method_name: ClassVar[str]
    base_class: ClassVar[str] = "AutoModelForImageClassification"
    command_line: ClassVar[tuple[str, ...]] = ()
    filled_in: ClassVar[tuple[str, ...]] = ("id2label", "image_size", "head_input")

    pull_constraint_coeff: float = field(
        default=0.1, metadata={"help": "weight of the pull term, which draws the selected keys towards the query"}
    )
    interpolate_pos_encoding: bool = field(
        default=False,
        metadata={
            "help": "interpolate the position embeddings to the input's size, for a backbone trained at another"
        },
    )
    head: Literal["linear", "statistics"] = field(
        default="linear",
        metadata={
            "help": "what classifies: the trained linear head, or the class means and covariance of finished tasks"
        },
    )
    shrinkage: float = field(
        default=0.1,
        metadata={"help": "how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1]"},
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the backbone; filled in when the adapter is added"}
    )
    id2label: dict[int, str] | None = field(
        default=None,
        metadata={"help": "class names; filled in from the model, so that every loader can rebuild the head"},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names of the wrapped modules; filled in when the adapter is added"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "not used, but read by PEFT"})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "modules that are trained and saved whole; the classifier by default, [] for none"},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "height and width of the images in training; filled in by training"},
    )
    head_input: str | None = field(
        default=None,
        metadata={"help": "what the backbone's own head reads, if not the CLS token alone; filled in"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, skip=PeftConfig.__mro__)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save={self.modules_to_save!r:.80}: expected a list of names, such as ['classifier']."
            )
        self.peft_type = extend_peft_type(self.method_name)
        self._at_least(pull_constraint_coeff=0)
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} is outside (0, 1]: it is a share, such as 0.1.")
        if self.id2label is not None:
            self.id2label = {int(index): name for index, name in self.id2label.items()}  # JSON has string keys
        if (folder := embedded.resolve(self.base_model_name_or_path)) is not None:
            self.base_model_name_or_path = str(folder)  # so that AutoPeftModel finds it on any machine

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; an embedded backbone by its name, not by its local folder."""
        content = super().to_dict()
        content["base_model_name_or_path"] = (
            embedded.name_of(self.base_model_name_or_path) or self.base_model_name_or_path
        )
        return content

    def _at_least(self, **least: int) -> None:
        """Raise ValueError for the first of these fields that is below its least value."""
        for name, value in least.items():
            if not value <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: it must be finite, and at least {value}."
                )

    def settings(self) -> dict[str, Any]:
        """Return the adapter's own settings, ready for JSON, which must agree for a run to be continued."""
        others = {one.name for one in fields(PeftConfig)} | set(self.filled_in)
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in others}

    @classmethod
    def card(cls, settings: Mapping[str, Any]) -> AdapterCard:
        """Describe such an adapter for its model card.

        Args:
            settings: the content of `adapter_config.json`, which may lack entries.
        """
        parts = f"those of the adapter `{cls.method_name}`, with the settings in `adapter_config.json`"
        return AdapterCard(parts, base_class=cls.base_class)


@dataclass
class PoolConfig(PromptConfig):
    """Base of the configurations of adapters with a pool of entries, which may grow.

    Args:
        pool_size: number of entries to begin with.
        learned_entries: number of entries that prediction chooses among, None for all; filled in by training.
        added_entries: number of entries that came later, None for none; filled in when the pool grows.

    Raises:
        ValueError: numbers below 1, or below 0 for `added_entries`.
    """

    filled_in = (*PromptConfig.filled_in, "learned_entries", "added_entries")

    pool_size: int = field(default=10, metadata={"help": "number of entries to begin with"})
    learned_entries: int | None = field(
        default=None,
        metadata={"help": "number of entries that prediction chooses among, None for all; filled in by training"},
    )
    added_entries: int | None = field(
        default=None, metadata={"help": "number of entries that came later; filled in when the pool grows"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(pool_size=1)
        if self.added_entries is not None:
            self._at_least(added_entries=0)

    @property
    def entries(self) -> int:
        """Return the number of entries there are."""
        return self.pool_size + (self.added_entries or 0)
