"""Protect what linear layers read of older tasks' images: gradient projection memory (GPM) and null-space Adam."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..fields import check_fields
from ..models import PlainModel, StreamModel
from ..projection import Basis, SecondMoment
from ..projection.state import as_file, as_saved, from_main_process
from .base import ContinualMethod, MethodCard, MethodState, TaskContext
from .linear_layers import Guard, add, linear_layers, packed, same_input, unpacked, watched
from .registry import register


@dataclass
class GPMConfig:
    """Configure [`GPM`].

    Args:
        energy: share of the energy (squared length) of each task's inputs that each layer's basis must hold, in [0, 1].
            1 protects every direction that was seen, and 0 protects nothing, which is fine-tuning.
        max_images: largest number of a task's images that layers are observed on; all by default.

    Raises:
        ValueError: a setting out of its range.
    """

    energy: float = field(
        default=0.9, metadata={"help": "share of the inputs' energy that is protected; 0 is fine-tuning"}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "images of a task on which layers are observed; all when not given"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.energy <= 1:
            raise ValueError(
                f"energy={self.energy} is outside [0, 1]: it is a share of the inputs' energy, such as 0.9; 0 is fine-tuning."
            )
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images={self.max_images} is out of range: use at least 1, or None for all.")


@dataclass
class NullSpaceAdamConfig(GPMConfig):
    """Configure [`NullSpaceAdam`].

    Args:
        energy: share of the energy (squared length) of all tasks' inputs that each layer's basis must hold, in [0, 1].
            1 protects every direction that was seen, and 0 protects nothing, which is fine-tuning.
        max_images: largest number of a task's images that layers are observed on; all by default.
        a: the paper's rule, instead of `energy`, which is then not read: directions are free if their eigenvalue is at
            most `a` times the smallest one. At least 1; the paper has 10 and 30. It is fragile: what a LayerNorm puts
            out lies in a hyperplane, so that the smallest eigenvalue is rounding error, and that single direction stays
            free.

    Raises:
        ValueError: a setting out of its range.
    """

    energy: float = field(
        default=0.9, metadata={"help": "share of the inputs' energy that is protected; 0 is fine-tuning"}
    )
    a: float | None = field(
        default=None,
        metadata={"help": "instead of energy: free directions have at most this multiple of the smallest eigenvalue"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a is not None and not 1 <= self.a < float("inf"):
            raise ValueError(
                f"a={self.a} is out of range: it is a multiple of the smallest eigenvalue, a finite number >= 1 such as 30."
            )


@dataclass(frozen=True)
class Inputs:
    """The inputs of linear layers that all read the same tensor.

    Attributes:
        layers: names of the layers.
        basis: protected directions, on the CPU.
        rows: number of inputs observed, over all tasks.
        ranks: rank of the basis after each task.
        moment: upper triangle of the second moment over all tasks, row by row, for a method that pools them.
    """

    layers: Sequence[str]
    basis: Basis
    rows: int
    ranks: Sequence[int]
    moment: Tensor | None = None


class LayerInputs(ContinualMethod, ABC):
    """Keep the outputs of linear layers on older tasks' images, the base of [`GPM`] and [`NullSpaceAdam`].

    Let x be a row that a layer reads, such as a token. `W x + b` stays what it is if the movement of `[W b]` is
    orthogonal to `[x; 1]`. If that holds for all x of an image, in every linear layer, and nothing else in the backbone
    moves, then layer by layer the features of the image stay what they are, attention included. After each task, the
    second moment of the rows `[x; 1]` over its training images, as predictions see them, gives each layer the basis of
    the directions to protect. Layers that read the same tensor, such as queries, keys and values, share one.

    From the second task on,

    - the movement of `[W b]` since the task's start is projected after each step. Projecting gradients instead would
      not do: Adam scales each of their elements by itself, and its steps leave the null space.
    - parameters without a basis are held at their values: LayerNorms, class token, position embeddings and convolutions,
      among them that of the patches. Running statistics are held too.
    - the head learns freely. With cross-entropy over the task's own classes (`train_mask="task"`) and no weight decay,
      its rows for older classes do not move; but nothing makes the scores of different tasks' classes comparable, as a
      prediction without the task needs.

    What is kept is exact, up to rounding, where the basis spans all rows. Otherwise it is approximate.

    Memory and time, for ViT-B/16: second moments of 1 GiB while a task ends, with their eigenvectors of up to 3073
    dimensions; and at half rank 0.5 GiB of bases, 0.3 GiB as a file with each task, and 261 GFLOP a step in float64.

    Args:
        config, settings: as `ContinualMethod` takes them.

    Attributes:
        inputs: what is known of the layers' inputs, by the name of the first layer that reads them.
    """

    config_class = GPMConfig
    config: GPMConfig
    pools: ClassVar[bool] = False  # whether second moments are summed over tasks
    inputs: dict[str, Inputs]

    def __init__(self, config: GPMConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.inputs = {}
        self._guard: Guard | None = None

    @property
    def active(self) -> bool:
        """Return whether anything is to be protected."""
        return self.config.energy > 0

    @property
    def approximate(self) -> bool:
        """Return whether directions that inputs have are left free."""
        return self.config.energy < 1

    @property
    def rank(self) -> int:
        """Return the largest rank of the bases."""
        return max((own.basis.rank for own in self.inputs.values()), default=0)

    @abstractmethod
    def extended(self, basis: Basis, moment: SecondMoment) -> Basis:
        """Return the basis after a task.

        Args:
            basis: the one before.
            moment: of the task; of all tasks for a method that pools them.
        """

    def check(self, model: StreamModel) -> None:
        plain = _plain(model, self.name)
        if plain.lora is not None or plain.name == "head":
            learns = "its head alone" if plain.lora is None else "the factors of LoRA"
            raise TypeError(
                f"method {self.name!r} protects the linear layers of a backbone that learns, and of this model "
                f'learns {learns} ({plain.name!r}): choose pgp_hf.set_trainable(model, "all") or "last:N", or another method.'
            )
        if not linear_layers(plain):
            raise TypeError(
                f"method {self.name!r} protects linear layers, and the trained backbone of this "
                f"{type(plain.base).__name__} has none: use a transformer, or another method."
            )

    def begin_task(self, context: TaskContext) -> None:
        groups = {name: own.layers for name, own in self.inputs.items()}
        bases = {name: own.basis for name, own in self.inputs.items()}
        self._guard = Guard(_plain(context.model, self.name), groups, bases) if groups else None

    def attach(self, context: TaskContext, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        if (guard := self._guard) is None:
            return ()
        return (optimizer.register_step_post_hook(lambda *_: guard.restore()),)

    def end_task(self, context: TaskContext) -> None:
        """Extend the bases by what the task's training images show to the layers."""
        if not self.active:
            return
        if self._guard is not None:
            self._guard.check()
        self._guard = None
        layers, moments = self._observe(context)
        reduce, _, broadcast = context.collectives
        for name in sorted(moments):
            moment, before = moments[name], self.inputs.get(name)
            if reduce is not None:
                moment.merge(reduce)
            rows = moment.rows + (before.rows if before else 0)
            if self.pools and before is not None and before.moment is not None:
                moment.sum += unpacked(before.moment, moment.dim).to(moment.device)
                moment.rows = rows
            old = before.basis if before else Basis.empty(moment.dim)
            columns = as_saved(self.extended(old, moment).columns.to(moment.device))
            if broadcast is not None:
                columns = from_main_process(columns, broadcast)
            self.inputs[name] = Inputs(
                layers=layers[name],
                basis=Basis(columns.cpu()),
                rows=rows,
                ranks=[*(before.ranks if before else []), columns.shape[-1]],
                moment=packed(moment.sum) if self.pools else None,
            )
        self._warn_of_full()

    @torch.no_grad()
    def _observe(self, context: TaskContext) -> tuple[dict[str, Sequence[str]], dict[str, SecondMoment]]:
        """Return the layers that read each input, and its second moment over this process's share of the task."""
        found = linear_layers(_plain(context.model, self.name))
        layers = {name: own.layers for name, own in self.inputs.items()}
        moments: dict[str, SecondMoment] = {}
        for batch, _ in context.views(self.config.max_images):
            if not layers:
                layers = {group[0]: group for group in same_input(found, partial(context.forward, batch))}
            with watched({name: found[name] for name in layers}, partial(add, moments)):
                context.forward(batch)
        return layers, moments

    def _warn_of_full(self) -> None:
        """Warn when bases have become full."""
        full = [own for own in self.inputs.values() if own.basis.full]
        if any(len(own.ranks) < 2 or own.ranks[-2] < own.basis.dim for own in full):
            warnings.warn(
                f"{len(full)} of {len(self.inputs)} bases have full rank, such as that of {full[0].layers[0]}: these layers "
                f"cannot move in later tasks. Lower energy ({self.config.energy}) to keep some plasticity.",
                stacklevel=3,
            )

    def _card(self, title: str, sentence: str, citation: str) -> MethodCard:
        """Return the card, with the limits that both methods have."""
        if not self.active:
            return MethodCard(title, "nothing was protected (energy 0): this is fine-tuning", (), citation)
        limits = [
            "The head is not protected: its scores for old classes may change, even where the features do not.",
            "LayerNorms, embeddings and convolutions of the backbone learned from the first task alone.",
            "Each input of a linear layer has a basis in the files, and each step is projected by all of them.",
        ]
        if self.approximate:
            limits.insert(
                0, "The protection is approximate: old features move along the directions that were left free."
            )
        if full := sum(own.basis.full for own in self.inputs.values()):
            limits.append(
                f"In {full} of {len(self.inputs)} bases every direction is protected: their layers no longer learn."
            )
        return MethodCard(title, sentence, tuple(limits), citation)

    # ---- what lasts ----------------------------------------------------------------------------------------------

    def state(self) -> MethodState:
        if not self.inputs:
            return MethodState({}, {})
        tensors = {f"{name}.basis": as_file(own.basis.columns) for name, own in self.inputs.items()}
        tensors |= {f"{name}.moment": own.moment for name, own in self.inputs.items() if own.moment is not None}
        values = {
            name: {
                "layers": list(own.layers),
                "dim": own.basis.dim,
                "rank": own.basis.rank,
                "rank_per_task": list(own.ranks),
                "rows": own.rows,
            }
            for name, own in self.inputs.items()
        }
        return MethodState(tensors, {"inputs": values})

    def load_state(self, state: MethodState) -> None:
        described = state.values.get("inputs", {})
        if not isinstance(described, dict):
            raise ValueError(
                f"the state of {self.name} has inputs={described!r}: expected a description of each basis."
            )
        kinds = ("basis", "moment") if self.pools else ("basis",)
        expected = {f"{name}.{kind}" for name in described for kind in kinds}
        if expected != state.tensors.keys():
            (odd, *_) = sorted(expected ^ state.tensors.keys())
            raise ValueError(
                f"the state of {self.name} {'lacks' if odd in expected else 'does not describe'} the tensor {odd!r}: its "
                "files do not belong together."
            )
        self.inputs = {name: self._loaded(name, entry, state.tensors) for name, entry in described.items()}

    def _loaded(self, name: str, entry: Any, tensors: Mapping[str, Tensor]) -> Inputs:
        """Return one input as the files have it, after checking that they agree."""
        basis, moment = Basis(tensors[f"{name}.basis"]), tensors.get(f"{name}.moment")
        entry = entry if isinstance(entry, dict) else {}
        layers, rows, ranks = (entry.get(key) for key in ("layers", "rows", "rank_per_task"))
        fits = (
            isinstance(layers, list)
            and layers[:1] == [name]
            and type(rows) is int
            and isinstance(ranks, list)
            and ranks[-1:] == [basis.rank]
            and (moment is None or tuple(moment.shape) == (basis.dim * (basis.dim + 1) // 2,))
        )
        if not fits:
            raise ValueError(
                f"the state of {self.name} describes {name!r} by layers={layers!r}, rows={rows!r} and "
                f"rank_per_task={ranks!r}, which does not fit its basis of shape {tuple(basis.columns.shape)}: its files do "
                "not belong together."
            )
        return Inputs(layers, basis, rows, ranks, moment)


@register
class GPM(LayerInputs):
    """Gradient projection memory (Saha et al., ICLR 2021) on the linear layers of a backbone that learns.

    See [`LayerInputs`]. Each task extends the bases by the fewest directions that bring its energy inside them to
    `energy` (`Basis.extend`), so that ranks never fall. As published it projects gradients under SGD, whose updates are
    then projected as well; here updates are projected, under any optimizer.

    Args:
        config, settings: see [`GPMConfig`].
    """

    name = "gpm"

    def extended(self, basis: Basis, moment: SecondMoment) -> Basis:
        return basis.extend(moment, self.config.energy)

    def describe(self) -> MethodCard:
        return self._card(
            "Gradient projection memory (GPM)",
            "from the second task on, the updates of the backbone's linear layers were projected orthogonally to the main "
            "directions of what these layers read of earlier tasks' images",
            "Saha et al., Gradient Projection Memory for Continual Learning, ICLR 2021",
        )


@register
class NullSpaceAdam(LayerInputs):
    """Training in the null space of feature covariance (Wang et al., CVPR 2021), known as Adam-NSCL.

    See [`LayerInputs`]. The second moment of the inputs is pooled over tasks, each image counting the same, and each
    basis is made anew from it: the fewest directions that hold `energy` of all that was seen, or the paper's rule `a`.
    Ranks may fall. With another optimizer than Adam, its updates are projected likewise.

    The moments are part of the state: for ViT-B/16, 0.5 GiB more in each task's files.

    Args:
        config, settings: see [`NullSpaceAdamConfig`].
    """

    name = "null_space_adam"
    config_class = NullSpaceAdamConfig
    config: NullSpaceAdamConfig
    pools = True

    @property
    def active(self) -> bool:
        return self.config.a is not None or super().active

    @property
    def approximate(self) -> bool:
        return self.config.a is not None or super().approximate

    def check(self, model: StreamModel) -> None:
        super().check(model)
        if self.config.a is not None:
            warnings.warn(
                f"a={self.config.a} compares eigenvalues with the smallest one, which behind a LayerNorm is rounding error: "
                "no more than one direction may stay free there, in which no input ever moves. Leave a out to choose "
                "directions by energy.",
                stacklevel=4,  # the line that makes a StreamTrainer
            )

    def extended(self, basis: Basis, moment: SecondMoment) -> Basis:
        if self.config.a is not None:
            return above(moment, self.config.a)
        return Basis.empty(moment.dim).extend(moment, self.config.energy)

    def describe(self) -> MethodCard:
        return self._card(
            "Null-space Adam (Adam-NSCL)",
            "from the second task on, the updates of the backbone's linear layers were projected onto the approximate null "
            "space of what these layers read of all earlier tasks' images",
            "Wang et al., Training Networks in Null Space of Feature Covariance for Continual Learning, CVPR 2021",
        )


def above(moment: SecondMoment, a: float) -> Basis:
    """Return the basis of the directions with an eigenvalue above `a` times the smallest one, beyond rounding."""
    values, vectors = moment.residual(0, Basis.empty(moment.dim, device=moment.device).columns)
    noise = moment.dim * torch.finfo(torch.float64).eps * values.sum()
    return Basis(vectors[:, values > a * values[-1] + noise].cpu())


def _plain(model: StreamModel, method: str) -> PlainModel:
    if not isinstance(model, PlainModel):
        raise TypeError(
            f"method {method!r} protects the linear layers of a backbone that learns, and a {model.name} prompt adapter "
            "leaves its backbone frozen: use PGPTrainer, which projects prompts, or a model without prompts "
            '(pgp_hf.set_trainable(model, "all")).'
        )
    return model
