"""Settings of a projection."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

from .conditions import CONDITIONS

APPLY_TO = ("update", "gradient", "both")
PROBE_SPACES = ("features", "logits", "statistics")


@dataclass
class ProjectionConfig:
    """What is protected, how much of it, and where the projection is applied.

    Raises:
        ValueError: unknown `method`, `apply_to` or `probe_space`, an energy outside (0, 1], `max_images` or `probes`
            below 1 or not whole, a negative `ln_penalty`, one without a projection of tokens, "frozen" on gradients.
    """

    method: str = field(
        default="pgp",
        metadata={
            "help": "'pgp': the condition of PGP (ICLR 2024, Eqs. 10 to 12), each prompt moves orthogonally to the "
            "tokens and prompts of older tasks; 'attention': the conditions of visual prompt tuning in null space "
            "(NeurIPS 2024) for the first attention; 'functional': what the head reads of old images stays to first "
            "order, through the whole network; 'frozen': the prompts and keys that tasks share learn with the first task "
            "only; 'none': no projection"
        },
    )
    energy: float = field(
        default=0.99,
        metadata={
            "help": "share of the second moment of what old images show to the prompts (tokens, queries or gradients) "
            "that the prompts' basis must hold, in (0, 1]; 'functional' needs less, such as 0.95, or nothing may move"
        },
    )
    key_energy: float | None = field(
        default=0.95,
        metadata={
            "help": "the same for the keys of a pool and old queries, in (0, 1]; None leaves the keys unprojected. DualPrompt's "
            "keys belong to one task each: finished ones never move, but a new one may win old images"
        },
    )
    value_energy: float | None = field(
        default=0.95,
        metadata={
            "help": "the same for the attention that old queries pay to prefix values (pgp, attention) or to the tokens "
            "of a prompt (attention), in (0, 1]; None leaves these unprojected"
        },
    )
    apply_to: str = field(
        default="update",
        metadata={
            "help": "'update': after each optimizer step the displacement from the task's start is projected, so that "
            "no optimizer can leave the null space; 'gradient': the gradient is projected before the step (the "
            "poster's algorithm; Adam leaves the null space); 'both': as 'update', and the optimizer sees gradients "
            "inside the null space alone"
        },
    )
    max_images: int | None = field(
        default=None,
        metadata={"help": "training images per task that the statistics are taken from; None takes all"},
    )
    probes: int = field(
        default=2,
        metadata={
            "help": "random output directions per old image, of method 'functional'; each costs a backward pass"
        },
    )
    probe_space: str = field(
        default="features",
        metadata={
            "help": "where those directions lie: 'features', what the head reads; 'logits', the linear head's scores of "
            "the classes seen so far (for CLIP the cosines with the class names); 'statistics', what the head reads in "
            "the metric of a statistics head, the inverse of the classes' shared covariance"
        },
    )
    hold_key_norm: bool = field(
        default=True,
        metadata={
            "help": "keep each projected key's norm as it was at the task's start, so that cosines with protected queries "
            "stay exactly (not with apply_to 'gradient'); the published rule does not"
        },
    )
    ln_penalty: float = field(
        default=0.0,
        metadata={
            "help": "weight of the LayerNorm penalty of visual prompt tuning in null space: the change of each prompt "
            "token's mean and deviation since the task's start, from the second task on; for prompts that are tokens, "
            "not for prefixes"
        },
    )

    def __post_init__(self) -> None:
        if self.method not in ("none", *CONDITIONS):
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(('none', *CONDITIONS))}.")
        if self.apply_to not in APPLY_TO:
            raise ValueError(f"apply_to={self.apply_to!r} is unknown: choose one of {', '.join(APPLY_TO)}.")
        if self.probe_space not in PROBE_SPACES:
            raise ValueError(f"probe_space={self.probe_space!r} is unknown: choose one of {', '.join(PROBE_SPACES)}.")
        check_energy("energy", self.energy)
        for name in ("key_energy", "value_energy"):
            if getattr(self, name) is not None:
                check_energy(name, getattr(self, name))
        if not _whole(self.probes) or self.probes < 1:
            raise ValueError(f"probes={self.probes} is no number of directions: use a whole number of at least 1.")
        if not 0 <= self.ln_penalty < float("inf"):
            raise ValueError(
                f"ln_penalty={self.ln_penalty} is not a weight: use 0 for none, or a finite number above."
            )
        if self.ln_penalty and self.method in ("none", "frozen"):
            raise ValueError(
                f"ln_penalty={self.ln_penalty} does nothing with method={self.method!r}: use 0, or a method that lets "
                "prompts move inside a null space."
            )
        if (self.method, self.apply_to) == ("frozen", "gradient"):
            raise ValueError(
                "method='frozen' with apply_to='gradient' would let momentum and weight decay move the prompts: use "
                "apply_to='update'."
            )
        images = self.max_images
        if images is not None and (not _whole(images) or images < 1):
            raise ValueError(
                f"max_images={images} is no number of images to take statistics from: use None, or a whole number of at "
                "least 1."
            )

    @property
    def reads_statistics(self) -> bool:
        """Whether the projection asks for a statistics head."""
        return (self.method, self.probe_space) == ("functional", "statistics")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_pretrained(cls, repo_or_dir: str, revision: str | None = None, **hub: Any) -> ProjectionConfig:
        """The settings of a run, by its folder or its repository on the Hub; arguments as `pgp_hf.load_pretrained`.

        Raises:
            ValueError: files that are damaged or contradictory, or an adapter without a run.
        """
        from ..runs.open import load_projection_config  # reads files and the Hub; the rest here needs torch alone

        return load_projection_config(repo_or_dir, revision, **hub)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_energy(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is outside (0, 1]: it is a share of the energy, such as 0.99.")
