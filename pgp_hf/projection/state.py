"""A projection over a stream: statistics while a task ends, bases while the next one trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .conditions import CONDITIONS, WITHOUT_IMAGES, Context
from .config import ProjectionConfig
from .moments import FrequentDirections, SecondMoment, second_moment
from .projector import TRANSPOSED, NullSpaceProjector

ROLES = {"prompt": "energy", "key": "key_energy", "value": "value_energy", "all": None}  # and whose energy counts
SINGLE = 2**20  # values of a basis, 8 MB, above which it is kept and saved in single precision

Collective = Callable[[Tensor], Tensor]


class Projection:
    """The projector of a stream and the statistics that grow its bases.

    A basis is kept under its parameter's name, or under `NAME.T` where it protects the parameter with its last two
    dimensions swapped, `(*batch, columns, rows)`: method "attention" holds a prompt by both of its axes.

    Args:
        config: what is protected and how.

    Attributes:
        projector: applies the bases of all finished tasks.
        info: per basis `{"shape", "batch_dims", "rank", "energy", "role", "samples", "rank_per_task"}`.
    """

    def __init__(self, config: ProjectionConfig | None = None) -> None:
        self.config = config or ProjectionConfig()
        self.projector = NullSpaceProjector(apply_to=self.config.apply_to)
        self.info: dict[str, dict[str, Any]] = {}
        self._moments: dict[str, tuple[str, SecondMoment | FrequentDirections]] = {}  # with the role

    @classmethod
    def from_pretrained(cls, repo_or_dir: str, revision: str | None = None, **hub: Any) -> Projection:
        """The projection of a run with its bases, by its folder or repository; arguments as `pgp_hf.load_pretrained`.

        Raises:
            ValueError: files that are damaged, altered or contradictory, or an adapter without a run.
        """
        from ..runs.open import load_projection  # reads files and the Hub; the rest here needs torch alone

        return load_projection(repo_or_dir, revision, **hub)

    @property
    def active(self) -> bool:
        return self.config.method != "none"

    @property
    def bases(self) -> dict[str, Basis]:
        return self.projector.bases

    @property
    def rank(self) -> int:
        """Largest rank over the projected parameters; 0 before the first task has ended."""
        return max((basis.rank for basis in self.bases.values()), default=0)

    def penalty(self, model: Any) -> Tensor | float:
        """`ln_penalty` times the change of the prompt tokens' LayerNorm statistics since the task's start.

        `sum_l |mu(z_l) - mu(start_l)| + |sigma(z_l) - sigma(start_l)|` over all tokens z_l as they enter the first
        LayerNorm, a position embedding included (Lu et al., NeurIPS 2024), of the prompts that have a basis: nothing
        in the first task. To be added to each image's loss.

        Args:
            model: the tuner.
        """
        total: Tensor | float = 0.0
        if not self.config.ln_penalty:
            return total
        parameters = model.prompt_parameters()
        for name, offset in model.token_offsets().items():
            if name not in self.info:
                continue
            offset = offset.float()
            (mean, deviation), (mean_then, deviation_then) = (
                (z.mean(-1), (z.var(-1, correction=0) + 1e-12).sqrt())  # a slope at zero deviation too
                for z in (p.to(offset) + offset for p in (parameters[name], self.projector.start(name)))
            )
            total = total + (mean - mean_then).abs().sum() + (deviation - deviation_then).abs().sum()
        return self.config.ln_penalty * total

    def update_bases(
        self,
        model: Any,
        batches: Iterable[tuple[dict[str, Tensor], Sequence[int]]],
        *,
        task: int = 0,
        seed: int = 0,
        classes: Sequence[int] | None = None,
        reduce: Collective | None = None,
        gather: Collective | None = None,
        broadcast: Collective | None = None,
    ) -> None:
        """Observe a finished task, in eval mode, and grow the bases.

        Args:
            model: the tuner.
            batches: inputs of the model and the position of each image within the task; not touched by a method that
                asks nothing of the images. In a data-parallel run, each process brings its share.
            task, seed, classes: see `Context`.
            reduce, gather, broadcast: see `end_task`.
        """
        context = {"task": task, "seed": seed, "classes": classes}
        if self.config.method in WITHOUT_IMAGES:
            self.observe(model, {}, **context)
            reduce = gather = None  # every process has seen the same
        elif self.active:
            for inputs, images in batches:
                self.observe(model, inputs, images, **context)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.prompt_parameters().items()}
        self.end_task(shapes, reduce=reduce, broadcast=broadcast, gather=gather)

    @torch.no_grad()
    def observe(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        images: Sequence[int] | None = None,
        *,
        task: int = 0,
        seed: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Add one batch of the finished task to the statistics; the model is in eval mode. Arguments as `Context`'s."""
        if not self.active:
            return
        context = Context(self.config, images, task, seed, classes)
        for name, role, rows in CONDITIONS[self.config.method](model, inputs, context):
            if self._energy(role) is None:
                continue
            if name not in self._moments:
                self._moments[name] = role, second_moment(rows.shape[-1], tuple(rows.shape[:-2]), rows.device)
            self._moments[name][1].update(rows)

    def _energy(self, role: str) -> float | None:
        field = ROLES[role]
        return 1.0 if field is None else getattr(self.config, field)

    def end_task(
        self,
        shapes: dict[str, tuple[int, ...]],
        reduce: Collective | None = None,
        broadcast: Collective | None = None,
        gather: Collective | None = None,
    ) -> None:
        """Grow the bases by what was observed since the last call, and forget the statistics.

        Args:
            shapes: shape of each observed parameter.
            reduce: sums a tensor over the processes of a data-parallel run.
            broadcast: the main process's value of a tensor; one process alone decides ranks and eigenvectors, whose
                signs may differ between machines.
            gather: concatenates tensors of one shape along dimension 0, in the order of the processes; sketches need it.

        Warns:
            UserWarning: a basis that has become full, which means that its parameter cannot move any more.
        """
        bases, infos = dict(self.bases), dict(self.info)
        for name in sorted(self._moments):
            role, moment = self._moments[name]
            energy = self._energy(role)
            if reduce is not None:
                moment.merge(reduce, gather)
            old = bases.get(name, Basis.empty(moment.dim, moment.batch_shape, moment.device))
            columns = _rounded(old.to(moment.device).extend(moment, energy).columns)
            if broadcast is not None:
                rank = int(broadcast(torch.tensor(columns.shape[-1], device=moment.device)))
                buffer = columns.new_zeros(*columns.shape[:-1], rank)
                keep = min(rank, columns.shape[-1])
                buffer[..., :keep] = columns[..., :keep]
                columns = broadcast(buffer)
            bases[name] = basis = Basis(columns)
            if basis.full and role != "all":
                warnings.warn(
                    f"The basis of {name} has full rank {basis.dim}: the parameter cannot move in later tasks. "
                    f"Lower its energy ({energy}) to keep some plasticity.",
                    stacklevel=2,
                )
            before = infos.get(name, {"samples": 0, "rank_per_task": []})
            shape = shapes[name if name in shapes else name.removesuffix(TRANSPOSED)]
            infos[name] = {
                "shape": [*basis.batch_shape, torch.Size(shape).numel() // _block(basis), basis.dim],
                "batch_dims": len(basis.batch_shape),
                "rank": basis.rank,
                "energy": energy,
                "role": role,
                "samples": before["samples"] + moment.rows,
                "rank_per_task": [*before["rank_per_task"], basis.rank],
            }
        self._take(bases, infos)

    def _take(self, bases: dict[str, Basis], infos: dict[str, dict[str, Any]]) -> None:
        self.projector.bases, self.info, self._moments = bases, infos, {}
        keys = {name for name, info in infos.items() if info["role"] == "key"}
        self.projector.hold_norm = keys if self.config.hold_key_norm else set()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases by name (contiguous, on the CPU), and a JSON-serialisable description.

        Large bases are float32: parameters have no more digits, and the files of a stream are many times as large as
        the adapter otherwise. They hold the very values that the projector uses.
        """
        tensors = {
            name: basis.columns.to("cpu", torch.float32 if _large(basis.columns) else torch.float64).contiguous()
            for name, basis in self.bases.items()
        }
        return tensors, {**self.config.to_dict(), **self.info}

    def load_state(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Take over the bases that `state` returned.

        Raises:
            ValueError: bases without a description or that contradict it, not orthonormal, or of another method.
        """
        if description.get("method") != self.config.method:
            raise ValueError(
                f"the saved projection has method={description.get('method')!r}, this one {self.config.method!r}: "
                "use the same method to continue."
            )
        for name, columns in tensors.items():
            _check_description(name, columns, description.get(name))
        bases = {name: Basis(columns) for name, columns in tensors.items()}
        self._take(bases, {name: dict(description[name]) for name in tensors})


def _check_description(name: str, columns: Tensor, info: Any) -> None:
    if info is None:
        raise ValueError(f"the projection's description lacks the parameter {name!r}, which has a basis.")
    shape, batch_dims = info.get("shape"), info.get("batch_dims")
    if not isinstance(shape, list) or not isinstance(batch_dims, int) or len(shape) != batch_dims + 2:
        raise ValueError(
            f"the projection's description of {name!r} has shape={shape!r} and batch_dims={batch_dims!r}: expected the "
            "batch's dimensions, rows and n, and the number of the first."
        )
    expected = (*shape[:batch_dims], shape[-1], info.get("rank"))
    if tuple(columns.shape) != expected:
        raise ValueError(
            f"the basis of {name!r} has shape {tuple(columns.shape)}, its description says {expected} (batch, n, rank): "
            "the two files belong to different tasks or runs, load a pair that was written together."
        )
    if info.get("role") not in ROLES:
        raise ValueError(
            f"the projection's description of {name!r} has role={info.get('role')!r}: expected one of "
            f"{', '.join(ROLES)}."
        )


def _large(columns: Tensor) -> bool:
    return columns.numel() > SINGLE


def _rounded(columns: Tensor) -> Tensor:
    """Columns as a file will have them, so that a resumed run goes on with the same."""
    return columns.to(torch.float32).to(torch.float64) if _large(columns) else columns


def _block(basis: Basis) -> int:
    return basis.dim * torch.Size(basis.batch_shape).numel()
