"""Run a projection over a stream: statistics when a task ends, bases while the next one trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from .basis import Basis, is_large
from .conditions import CONDITIONS, WITHOUT_IMAGES, Context, Observation
from .config import ProjectionConfig, read_config
from .moments import FrequentDirections, SecondMoment, second_moment
from .projector import TRANSPOSED, NullSpaceProjector
from .protocol import HasKeys, Protectable
from .readers import HandedIn, Reader

# each role's energy setting; None protects everything
ROLES = {"prompt": "energy", "key": "key_energy", "value": "value_energy", "all": None}

Collective = Callable[[Tensor], Tensor]


class BasisInfo(TypedDict, total=False):
    """The description of a basis, as `projection.json` holds it.

    Attributes:
        shape: shape that the parameter is read in, `(*batch, rows, n)`.
        batch_dims: number of batch dimensions in it.
        rank: largest rank within the batch.
        energy: share of the energy that each task's directions must hold.
        role: see `Observation`.
        samples: number of rows observed in all tasks.
        rank_per_task: rank after each task.
        shares: with `softness`, the share of the energy that each column holds, summed over the tasks, `(*batch, rank)`.
        complement: of a very large basis, whether the columns of each entry of the flattened batch span, instead of what
            is protected, all that is not.
    """

    shape: list[int]
    batch_dims: int
    rank: int
    energy: float
    role: str
    samples: int
    rank_per_task: list[int]
    shares: list[Any]
    complement: list[bool]


class Observed(NamedTuple):
    """Statistics of what the running task shows to one parameter, with their role and the energy to protect."""

    role: str
    energy: float
    moment: SecondMoment | FrequentDirections


class Projection:
    """The projector of a stream, and the statistics from which its bases grow.

    A basis is kept under its parameter's name, or under `NAME.T` where it protects the parameter with its last two
    dimensions swapped, `(*batch, columns, rows)`: method "attention" protects a prompt along both of its axes.

    Args:
        config: the settings; `ProjectionConfig()` by default.

    Attributes:
        projector: applies the bases of all finished tasks.
        info: description of each basis.
    """

    def __init__(self, config: ProjectionConfig | None = None) -> None:
        self.config = config or ProjectionConfig()
        self.projector = NullSpaceProjector(apply_to=self.config.apply_to)
        self.info: dict[str, BasisInfo] = {}
        self._observed: dict[str, Observed] = {}

    @classmethod
    def from_pretrained(cls, repo_or_dir: str | Path, revision: str | None = None, **hub: object) -> Projection:
        """Read the projection of a run, with its bases, from its folder or its repository on the Hub.

        Args:
            repo_or_dir, revision, hub: as for `pgp_hf.load_pretrained`.

        Raises:
            ValueError: files that are damaged, altered or contradictory, or an adapter without a run.
        """
        return read_projection(repo_or_dir, revision, **hub)

    @property
    def active(self) -> bool:
        """Return whether there is a condition to hold."""
        return self.config.method != "none"

    @property
    def bases(self) -> dict[str, Basis]:
        """Return the bases of all finished tasks, by name."""
        return self.projector.bases

    @property
    def rank(self) -> int:
        """Return the largest rank over the projected parameters; 0 before the first task has ended."""
        return max((basis.rank for basis in self.bases.values()), default=0)

    def fit_entries(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Give bases empty columns for the entries that their parameters have gained; call it at each task's start.

        Args:
            shapes: shape of each protected parameter, by name. Entries are along its first dimension.
        """
        bases, infos = dict(self.bases), dict(self.info)
        for name, basis in self.bases.items():
            shape = shapes.get(name, shapes.get(name.removesuffix(TRANSPOSED)))
            rows, elements = self.info[name]["shape"][-2], torch.Size(shape or ()).numel()
            if shape is None or elements == torch.Size(self.info[name]["shape"]).numel():
                continue
            if basis.batch_shape and shape[0] > basis.batch_shape[0]:
                bases[name] = basis = basis.lengthened(shape[0] - basis.batch_shape[0])
            else:  # entries share the basis
                rows = elements // (basis.dim * torch.Size(basis.batch_shape).numel())
            infos[name] = {**self.info[name], "shape": [*basis.batch_shape, rows, basis.dim]}
            if "shares" in self.info[name]:
                infos[name]["shares"] = _enlarged(self.info[name], basis).tolist()
        if infos != self.info:
            self._replace(bases, infos)

    def penalty(self, model: Protectable) -> Tensor | float:
        """Return `ln_penalty` times the change of the prompt tokens' LayerNorm statistics since the task's start.

        The change is `sum_l |mu(z_l) - mu(start_l)| + |sigma(z_l) - sigma(start_l)|` over all tokens z_l as they enter
        the first LayerNorm, including a position embedding (Lu et al., NeurIPS 2024). It covers the prompts that have
        a basis, hence none in the first task. Add it to each image's loss.
        """
        total: Tensor | float = 0.0
        if not self.config.ln_penalty:
            return total
        parameters = model.prompt_parameters()
        for name, offset in model.token_offsets().items():
            if name not in self.info:
                continue
            offset = offset.float()
            now, start = (z.to(offset) + offset for z in (parameters[name], self.projector.start(name)))
            total = total + (now.mean(-1) - start.mean(-1)).abs().sum() + (_std(now) - _std(start)).abs().sum()
        return self.config.ln_penalty * total

    def update_bases(
        self,
        model: Protectable,
        batches: Iterable[tuple[Mapping[str, Tensor], Sequence[int]]],
        *,
        keys: Iterable[Mapping[str, Tensor]] = (),
        task: int = 0,
        seed: int = 0,
        classes: Sequence[int] | None = None,
        reduce: Collective | None = None,
        gather: Collective | None = None,
        broadcast: Collective | None = None,
    ) -> None:
        """Observe a finished task and extend the bases; on an error they are as they were, and nothing stays observed.

        Args:
            model: in eval mode.
            batches: inputs of the model, and the position of each image within the task; not read when the condition
                does not depend on images, or the model has nothing to protect. In a data-parallel run, each process
                brings its share.
            keys: with `all_keys`, inputs of the model whose queries the keys are protected by; not read otherwise.
            task, seed, classes: see `Context`.
            reduce, gather, broadcast: see `end_task`.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.prompt_parameters().items()}
        try:
            if self.config.method in WITHOUT_IMAGES:
                self.observe(model, {}, task=task, seed=seed, classes=classes)
                reduce = gather = None  # every process has seen the same
            elif self.active and shapes:
                for inputs, images in batches:
                    self.observe(model, inputs, images, task=task, seed=seed, classes=classes)
                if self.config.all_keys and isinstance(model, HasKeys):
                    for inputs in keys:
                        self._add(starmap(Observation, model.key_rows(**inputs)))
            self.end_task(shapes, reduce=reduce, broadcast=broadcast, gather=gather)
        finally:
            self._observed = {}

    @torch.no_grad()
    def observe(
        self,
        model: Protectable,
        inputs: Mapping[str, Tensor],
        images: Sequence[int] | None = None,
        *,
        task: int = 0,
        seed: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Add one batch of the finished task to the statistics; with `all_keys`, not to those of keys.

        Args:
            model: in eval mode.
            inputs: of the model.
            images, task, seed, classes: see `Context`.
        """
        if not self.active:
            return
        context = Context(self.config, images, task, seed, classes)
        found = CONDITIONS[self.config.method](model, inputs, context)
        self._add(seen for seen in found if not (self.config.all_keys and seen.role == "key"))

    @torch.no_grad()
    def _add(self, observations: Iterable[Observation]) -> None:
        for name, role, rows in observations:
            energy = self._energy(role)
            if energy is None:
                continue
            if name not in self._observed:
                # in place only with rows in bfloat16, since results of before would change in their last bit
                fused = self.config.bf16_probes and role != "key"
                moment = second_moment(rows.shape[-1], tuple(rows.shape[:-2]), rows.device, fused)
                self._observed[name] = Observed(role, energy, moment)
            self._observed[name].moment.update(rows)

    def _energy(self, role: str) -> float | None:
        """Return the energy to protect in a role; None if it is left unprotected."""
        setting = ROLES[role]
        return 1.0 if setting is None else getattr(self.config, setting)

    def end_task(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        reduce: Collective | None = None,
        broadcast: Collective | None = None,
        gather: Collective | None = None,
    ) -> None:
        """Extend the bases by what was observed since the last call, and discard the statistics.

        Args:
            shapes: shape of each observed parameter; one without elements gets no basis.
            reduce: sums a tensor over the processes of a data-parallel run.
            broadcast: returns the main process's value of a tensor. One process decides on ranks and eigenvectors,
                because their signs may differ between machines.
            gather: concatenates tensors of equal shape along dimension 0, in the order of the processes; needed for
                sketches.

        Warns:
            UserWarning: a basis has become full, so that its parameter cannot move any more.
        """
        bases, infos = dict(self.bases), dict(self.info)
        for name in sorted(self._observed):
            role, energy, moment = self._observed[name]
            elements = torch.Size(shapes[name if name in shapes else name.removesuffix(TRANSPOSED)]).numel()
            if not elements:
                continue
            if reduce is not None:
                moment.merge(reduce, gather)
            old = bases.get(name, Basis.empty(moment.dim, moment.batch_shape, moment.device))
            before, soft = infos.get(name), self.config.softness > 0 and role in ("prompt", "value")
            # what is soft needs each of its columns
            basis = old.to(moment.device).extend(moment, energy, halve=not soft)
            if broadcast is not None:
                basis = _main_process_basis(basis, broadcast)
            bases[name] = basis
            if basis.full and role != "all" and not soft:
                warnings.warn(
                    f"The basis of {name} has full rank {basis.dim}: the parameter cannot move in later tasks. "
                    f"Lower its energy ({energy}) to keep some plasticity.",
                    stacklevel=2,
                )
            rows = elements // (basis.dim * torch.Size(basis.batch_shape).numel())
            infos[name] = {
                "shape": [*basis.batch_shape, rows, basis.dim],
                "batch_dims": len(basis.batch_shape),
                "rank": basis.rank,
                "energy": energy,
                "role": role,
                "samples": (before["samples"] if before else 0) + moment.rows,
                "rank_per_task": [*(before["rank_per_task"] if before else []), basis.rank],
            }
            if soft:
                held = moment.along(basis.columns.to(moment.device, torch.float64))
                held = held / moment.total.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
                shares = held if before is None else held + _enlarged(before, basis).to(held)
                infos[name]["shares"] = (shares if broadcast is None else broadcast(shares)).tolist()
        self._replace(bases, infos)

    def _replace(self, bases: dict[str, Basis], infos: dict[str, BasisInfo]) -> None:
        self.projector.bases, self.info, self._observed = bases, infos, {}
        keys = {name for name, info in infos.items() if info["role"] == "key"}
        self.projector.hold_norm = keys if self.config.hold_key_norm else set()
        for name, basis in bases.items():
            if self.config.softness and "shares" in infos[name]:
                shares = _enlarged(infos[name], basis)
                self.projector.strength[name] = shares / (shares + self.config.softness)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the bases by name (contiguous, on the CPU), and the settings and descriptions, ready for JSON.

        Large bases are float32: parameters have no more digits, and the files of a stream would otherwise be many
        times as large as the adapter. They hold exactly the values that the projector uses.
        """
        tensors, infos = dict[str, Tensor](), dict(self.info)
        for name, basis in self.bases.items():
            columns, complement = basis.stored
            tensors[name] = as_file(columns) if complement is None else columns.to("cpu").contiguous()
            if complement is not None:
                infos[name] = {**infos[name], "complement": complement}
        return tensors, {**self.config.to_dict(), **infos}

    def load_state(self, tensors: Mapping[str, Tensor], description: Mapping[str, object]) -> None:
        """Restore the bases that `state` returned.

        Raises:
            ValueError: bases that are not described, contradict their description, are not orthonormal, or belong to
                another method.
        """
        if description.get("method") != self.config.method:
            raise ValueError(
                f"the saved projection has method={description.get('method')!r}, this one {self.config.method!r}: "
                "use the same method to continue."
            )
        infos = {name: _checked_info(name, columns, description.get(name)) for name, columns in tensors.items()}
        bases = {name: Basis(columns, infos[name].pop("complement", None)) for name, columns in tensors.items()}
        for name, basis in bases.items():
            if basis.rank != infos[name]["rank"]:
                raise ValueError(
                    f"the basis of {name!r} has rank {basis.rank}, its description says {infos[name]['rank']}: the two files "
                    "belong to different tasks or runs, load a pair that was written together."
                )
        self._replace(bases, infos)


read_projection: HandedIn[Projection] = HandedIn()


def set_readers(config: Reader[ProjectionConfig], projection: Reader[Projection]) -> None:
    """Hand in the functions behind `from_pretrained`; each is called with `(repo_or_dir, revision, **hub)`.

    Args:
        config: returns the settings of a saved projection.
        projection: returns a saved projection with its bases.
    """
    read_config.reader, read_projection.reader = config, projection


def _checked_info(name: str, columns: Tensor, info: object) -> BasisInfo:
    """Return the description of a basis, after checking that it fits the basis."""
    if not isinstance(info, dict):
        raise ValueError(f"the projection's description lacks the parameter {name!r}, which has a basis.")
    shape, batch_dims = info.get("shape"), info.get("batch_dims")
    if not isinstance(shape, list) or not isinstance(batch_dims, int) or len(shape) != batch_dims + 2:
        raise ValueError(
            f"the projection's description of {name!r} has shape={shape!r} and batch_dims={batch_dims!r}: expected the "
            "batch's dimensions, rows and n, and the number of the first."
        )
    halved = "complement" in info  # the rank is then not the number of columns
    count, flags = torch.Size(shape[:batch_dims]).numel(), info.get("complement")
    if halved and not (isinstance(flags, list) and len(flags) == count and all(type(flag) is bool for flag in flags)):
        raise ValueError(
            f"the projection's description of {name!r} has complement={str(flags)[:60]}: expected true or false for each of its "
            f"{count} entries."
        )
    expected = (*shape[:batch_dims], shape[-1], columns.shape[-1] if halved else info.get("rank"))
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
    return cast(BasisInfo, dict(info))


def _enlarged(info: BasisInfo, basis: Basis) -> Tensor:
    """Return the shares of a basis's columns, `(*batch, rank)`; zero for columns and entries that have none yet.

    Raises:
        ValueError: shares that do not fit.
    """
    known = torch.tensor(info["shares"], dtype=torch.float64)
    shares = torch.zeros(*basis.batch_shape, basis.rank, dtype=torch.float64)
    fits = known.ndim == shares.ndim and all(a <= b for a, b in zip(known.shape, shares.shape, strict=True))
    if not fits or not (known >= 0).all():
        raise ValueError(
            f"shares of shape {tuple(known.shape)} do not fit a basis of shape {tuple(basis.columns.shape)}: expected one "
            "for each column, at least 0."
        )
    shares[tuple(slice(length) for length in known.shape)] = known
    return shares


def _std(tokens: Tensor) -> Tensor:
    """Return the standard deviation of each token, with a finite slope at zero too."""
    return (tokens.var(-1, correction=0) + 1e-12).sqrt()


def as_file(columns: Tensor) -> Tensor:
    """Return columns as files hold them: contiguous, on the CPU, those of a large basis in single precision."""
    return columns.to("cpu", torch.float32 if is_large(columns) else torch.float64).contiguous()


def as_saved(columns: Tensor) -> Tensor:
    """Return columns in the precision of their file, so that a resumed run continues with the same values."""
    return columns.to(torch.float32) if is_large(columns) else columns


def _main_process_basis(basis: Basis, broadcast: Collective) -> Basis:
    """Return the main process's basis."""
    columns, complement = basis.stored
    if not basis.may_halve:
        return Basis(from_main_process(columns, broadcast))
    flags = [False] * basis.ranks.numel() if complement is None else complement
    own = broadcast(torch.tensor(flags, dtype=torch.int64, device=columns.device)).bool().tolist()
    return Basis(from_main_process(columns, broadcast), own if any(own) else None)


def from_main_process(columns: Tensor, broadcast: Collective) -> Tensor:
    """Return the main process's columns, of which there may be more or fewer than on this process."""
    rank = int(broadcast(torch.tensor(columns.shape[-1], device=columns.device)))
    buffer = columns.new_zeros(*columns.shape[:-1], rank)
    keep = min(rank, columns.shape[-1])
    buffer[..., :keep] = columns[..., :keep]
    return broadcast(buffer)
