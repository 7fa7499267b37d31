"""Settings of a projection."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .methods import METHODS

APPLY_TO = ("update", "gradient")


@dataclass
class ProjectionConfig:
    """What is protected, how much of it, and where the projection is applied.

    Raises:
        ValueError: unknown `method` or `apply_to`, an energy outside (0, 1], `max_images` below 1.
    """

    method: str = field(
        default="pgp",
        metadata={
            "help": "'pgp': the condition of PGP (ICLR 2024, Eqs. 10 to 12), each prompt moves orthogonally to the "
            "tokens and prompts of older tasks; 'none': no projection"
        },
    )
    energy: float = field(
        default=0.99,
        metadata={
            "help": "share of the second moment of old tokens and prompts that the prompts' basis must hold, in (0, 1]"
        },
    )
    key_energy: float | None = field(
        default=0.95,
        metadata={"help": "the same for the keys and old queries, in (0, 1]; None leaves the keys unprojected"},
    )
    value_energy: float | None = field(
        default=0.95,
        metadata={
            "help": "the same for prefix values and the attention that old queries pay to them, in (0, 1]; None leaves "
            "the values unprojected"
        },
    )
    apply_to: str = field(
        default="update",
        metadata={
            "help": "'update': after each optimizer step the displacement from the task's start is projected, so that "
            "no optimizer can leave the null space; 'gradient': the gradient is projected before the step (the "
            "poster's algorithm; Adam leaves the null space)"
        },
    )
    max_images: int | None = field(
        default=None,
        metadata={"help": "training images per task that the statistics are taken from; None takes all"},
    )

    def __post_init__(self) -> None:
        if self.method not in ("none", *METHODS):
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(('none', *METHODS))}.")
        if self.apply_to not in APPLY_TO:
            raise ValueError(f"apply_to={self.apply_to!r} is unknown: choose one of {', '.join(APPLY_TO)}.")
        check_energy("energy", self.energy)
        for name in ("key_energy", "value_energy"):
            if getattr(self, name) is not None:
                check_energy(name, getattr(self, name))
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(
                f"max_images={self.max_images} leaves no image to take statistics from: use None or >= 1."
            )

    def to_dict(self) -> dict:
        return asdict(self)


def check_energy(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is outside (0, 1]: it is a share of the energy, such as 0.99.")
