"""Configure a projection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path

from .conditions import CONDITIONS
from .readers import HandedIn

APPLY_TO = ("update", "gradient", "both")
PROBE_SPACES = ("features", "logits", "statistics")
ADDED = {"softness": 0.0, "equal_images": False, "all_keys": False, "bf16_probes": False}
"""Settings that files of earlier versions lack, with the values that these versions had."""


@dataclass
class ProjectionConfig:
    """Choose what is protected, how much of it, and where the projection is applied.

    Args:
        method: the condition to hold: "pgp", "attention", "functional" or "frozen"; "none" for no projection.
        energy: share of the second moment that the basis of a prompt must hold, in (0, 1].
        apply_to: "update" projects the movement after each optimizer step, "gradient" the gradient before it, and
            "both" does both.
        key_energy: `energy` for the keys of a pool; None leaves keys unprojected.
        value_energy: the same for prefix values and for the token axis of a prompt; None leaves these unprojected.
        max_images: number of training images per task that the statistics are taken from; None takes all.
        probes: number of random output directions per old image ("functional" only).
        probe_space: space of these directions: "features", "logits" or "statistics" ("functional" only).
        hold_key_norm: whether each projected key keeps the norm that it had at the task's start.
        ln_penalty: weight of a penalty on changes of the prompt tokens' mean and standard deviation.
        softness: share of the energy at which a direction of a prompt's basis is half free; 0 cuts all of them.
        equal_images: whether all old images count the same, however strongly they depend on the prompts ("functional"
            only).
        all_keys: whether keys see the queries of all training images, and `max_images` holds for prompts alone.
        bf16_probes: whether the passes of "functional" run in bfloat16; queries, rows and bases stay in float32 or better.

    Raises:
        ValueError: an unknown `method`, `apply_to` or `probe_space`; an energy outside (0, 1]; `max_images` or
            `probes` that is not a whole number of at least 1; an `ln_penalty` that is negative, not finite, or given
            with a method that does not use it; "frozen" applied to gradients; a `softness` that is negative or not
            finite; `equal_images`, `all_keys` or `bf16_probes` with a method that does not use it.
    """

    method: str = field(
        default="pgp",
        metadata={
            "help": "'pgp': the condition of PGP (ICLR 2024, Eqs. 10 to 12), each prompt moves orthogonally to the "
            "tokens and prompts of older tasks; 'attention': the conditions of visual prompt tuning in null space "
            "(NeurIPS 2024) for the first attention; 'functional': what the head reads of old images stays the same to "
            "first order, through the whole network; 'frozen': prompts and keys that tasks share learn during the first "
            "task only; 'none': no projection"
        },
    )
    energy: float = field(
        default=0.99,
        metadata={
            "help": "share of the second moment of what old images show to the prompts (tokens, queries or gradients) "
            "that the prompts' basis must hold, in (0, 1]; 'functional' works with less, such as 0.95: with more, it may "
            "leave no direction to move in"
        },
    )
    apply_to: str = field(
        default="update",
        metadata={
            "help": "'update': the displacement from the task's start is projected after each optimizer step, so that "
            "no optimizer can leave the null space; 'gradient': the gradient is projected before the step (the "
            "paper's algorithm; Adam leaves the null space); 'both': as 'update', and the optimizer sees only gradients "
            "inside the null space"
        },
    )
    key_energy: float | None = field(
        default=0.95,
        metadata={
            "help": "the same for the keys of a pool and old queries, in (0, 1]; None leaves the keys unprojected. Each "
            "key of DualPrompt belongs to one task: finished ones never move, but a new one may win old images"
        },
    )
    value_energy: float | None = field(
        default=0.95,
        metadata={
            "help": "the same for the attention that old queries pay to prefix values (pgp, attention) or to the tokens "
            "of a prompt (attention), in (0, 1]; None leaves these unprojected"
        },
    )
    max_images: int | None = field(
        default=None,
        metadata={"help": "number of training images per task that the statistics are taken from; None takes all"},
    )
    probes: int = field(
        default=2,
        metadata={
            "help": "number of random output directions per old image, for method 'functional'; each costs a backward pass"
        },
    )
    probe_space: str = field(
        default="features",
        metadata={
            "help": "where those directions lie: 'features', the input of the head; 'logits', the linear head's scores "
            "of the classes seen so far (for CLIP the cosines with the class names); 'statistics', the input of the head "
            "in the metric of a statistics head, the inverse of the classes' shared covariance"
        },
    )
    hold_key_norm: bool = field(
        default=True,
        metadata={
            "help": "keep the norm of each projected key as it was at the task's start, so that cosines with protected "
            "queries stay exactly the same (not with apply_to 'gradient'); the published rule does not"
        },
    )
    ln_penalty: float = field(
        default=0.0,
        metadata={
            "help": "weight of the LayerNorm penalty of visual prompt tuning in null space: the change of each prompt "
            "token's mean and standard deviation since the task's start, from the second task on; only for prompts that "
            "are tokens, not for prefixes"
        },
    )

    softness: float = field(
        default=0.0,
        metadata={
            "help": "shrink movements instead of cutting them: along a direction of a prompt's basis that holds the share s "
            "of the energy, summed over the tasks, what is left of each step is softness / (softness + s); 0 leaves "
            "nothing. Keys are cut in any case"
        },
    )
    equal_images: bool = field(
        default=False,
        metadata={
            "help": "let all old images count the same in method 'functional', by scaling the gradients of each to norm 1; "
            "else those that depend on the prompts most decide on the basis"
        },
    )
    all_keys: bool = field(
        default=False,
        metadata={
            "help": "protect keys by the queries of all training images, which cost no backward pass; max_images then limits "
            "what prompts are protected by"
        },
    )
    bf16_probes: bool = field(
        default=False,
        metadata={
            "help": "run the forward and backward passes of method 'functional' in bfloat16, a third of the time where the "
            "processor multiplies in it; queries, and sums over images, stay as precise as they are"
        },
    )

    def __post_init__(self) -> None:
        _check_choice("method", self.method, ("none", *CONDITIONS))
        _check_choice("apply_to", self.apply_to, APPLY_TO)
        _check_choice("probe_space", self.probe_space, PROBE_SPACES)
        self._check_numbers()
        for name in ("hold_key_norm", "equal_images", "all_keys", "bf16_probes"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False.")
        for name in ("equal_images", "bf16_probes"):
            if getattr(self, name) and self.method != "functional":
                raise ValueError(
                    f"{name}=True does nothing with method={self.method!r}: use False, or method='functional'."
                )
        if self.all_keys and (self.method in ("none", "frozen") or self.key_energy is None):
            raise ValueError(
                f"all_keys=True does nothing with method={self.method!r} and key_energy={self.key_energy}: use False, or a "
                "method that protects keys by queries."
            )
        if not _is_number(self.ln_penalty) or not 0 <= self.ln_penalty < float("inf"):
            raise ValueError(
                f"ln_penalty={self.ln_penalty} is not a weight: use 0 for no penalty, or a finite number above 0."
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
        for name in ("energy", "key_energy", "value_energy", "max_images", "probes", "ln_penalty", "softness"):
            number = getattr(self, name)
            if number is not None and type(number) not in (int, float):  # NumPy's own cannot be written as JSON
                setattr(self, name, int(number) if _is_whole(number) else float(number))

    def _check_numbers(self) -> None:
        check_energy("energy", self.energy)
        for name, energy in (("key_energy", self.key_energy), ("value_energy", self.value_energy)):
            if energy is not None:
                check_energy(name, energy)
        if not _is_whole(self.probes) or self.probes < 1:
            raise ValueError(f"probes={self.probes} is not a number of directions: use a whole number of at least 1.")
        if self.max_images is not None and (not _is_whole(self.max_images) or self.max_images < 1):
            raise ValueError(
                f"max_images={self.max_images} is not a number of images to take statistics from: use None, or a whole "
                "number of at least 1."
            )
        if not _is_number(self.softness) or not 0 <= self.softness < float("inf"):
            raise ValueError(
                f"softness={self.softness} is not a share of energy: use 0 to cut, or a number above, such as 0.01."
            )

    @property
    def reads_statistics(self) -> bool:
        """Return whether the projection needs a statistics head."""
        return (self.method, self.probe_space) == ("functional", "statistics")

    def to_dict(self) -> dict[str, object]:
        """Return the settings, ready for JSON."""
        # in the order that files have
        return {**dict.fromkeys(("method", "energy", "key_energy", "value_energy")), **asdict(self)}

    @classmethod
    def from_pretrained(cls, repo_or_dir: str | Path, revision: str | None = None, **hub: object) -> ProjectionConfig:
        """Read the settings of a run from its folder or its repository on the Hub.

        Args:
            repo_or_dir, revision, hub: as for `pgp_hf.load_pretrained`.

        Raises:
            ValueError: files that are damaged or contradictory, or an adapter without a run.
        """
        return read_config(repo_or_dir, revision, **hub)


read_config: HandedIn[ProjectionConfig] = HandedIn()


def check_energy(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in (0, 1]."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name}={value} is outside (0, 1]: it is a share of the energy, such as 0.99.")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
