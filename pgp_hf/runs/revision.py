"""Read revisions: the files of one finished task, in a local folder or on the Hub, checked before anything uses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..projection import Basis, Projection, ProjectionConfig
from ..projection.projector import TRANSPOSED
from . import reading
from .checks import (
    check_basis,
    check_method_file,
    check_results_file,
    check_stream_file,
    finished_tasks,
    first_task,
)
from .digest import BACKBONE_KEYS, backbone_key, backbone_sha256
from .digests import Digests
from .folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASES,
    DESCRIPTION,
    DIGESTS,
    EXEMPLARS,
    MANIFEST,
    METHOD,
    METHOD_STATE,
    MODEL,
    MODEL_CONFIG,
    RESULTS,
    config_name,
)
from .sources import MODEL_FILES, OTHERS, REVISION_FILES, RUN_FILES, TASK, without_weights

READ = tuple(dict.fromkeys(name for name in (*REVISION_FILES, *MODEL_FILES, *OTHERS, EXEMPLARS) if name != DIGESTS))
"""The files of a revision that are checked against their digests."""


@dataclass(frozen=True)
class Revision:
    """A revision's small files, read and checked; its tensors are read on demand.

    Args:
        folder: where the files are.
        config: content of `adapter_config.json`, or of `config.json` where a whole model has learned.
        manifest, results: content of `stream.json` and `results.json`; both None for an adapter without a run.
        digests: of all files; None for an adapter without a run, or a run of an earlier version.
    """

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any] | None
    results: dict[str, Any] | None
    digests: Digests | None = None

    @classmethod
    def read(cls, folder: Path, revision: str | None = None) -> Revision:
        """Read and check a folder that `locate` returned.

        Args:
            folder: of the revision.
            revision: the name that it was requested by; "task-3" must hold three finished tasks.

        Raises:
            ValueError: a file that is damaged or was altered, asks for code to be run, or contradicts another.
        """
        digests = Digests.read(folder)
        if digests is not None:
            # beside an adapter, the files of a whole model are somebody else's, and not read
            foreign = (MODEL, MODEL_CONFIG) if config_name(folder) == ADAPTER_CONFIG else ()
            digests.check_read(name for name in READ if name not in foreign)
        for name in (*REVISION_FILES, *OTHERS):
            if name.endswith(".json") and (folder / name).exists():
                reading.refuse_code(reading.read_json(folder / name), folder / name)
        name = config_name(folder)
        config = reading.read_json(folder / name)
        if name == ADAPTER_CONFIG and not isinstance(config.get("peft_type"), str):
            raise ValueError(
                f"{folder / name} has peft_type={config.get('peft_type')!r}: expected the name of a kind of adapter."
            )
        there = [name for name in RUN_FILES if (folder / name).exists()]
        if not there and name == MODEL_CONFIG:
            raise ValueError(f"{folder} is a model without a run: load it with transformers.")
        if not there:
            return cls(folder, config, None, None, digests)
        if len(there) < len(RUN_FILES):
            lacking = next(name for name in RUN_FILES if name not in there)
            raise ValueError(f"{folder} has {there[0]}, but no {lacking}: the download or copy is incomplete.")
        manifest, results = (reading.read_json(folder / name) for name in (MANIFEST, RESULTS))
        check_stream_file(manifest, config, folder / MANIFEST)
        tasks = check_results_file(results, manifest, folder / RESULTS)
        named = TASK.fullmatch(revision or "")
        if named and int(named[1]) != tasks:
            raise ValueError(
                f"{folder / RESULTS} shows {tasks} finished tasks, but the revision is called {revision!r}."
            )
        return cls(folder, config, manifest, results, digests)

    @property
    def tasks(self) -> int:
        """Return the number of finished tasks; 0 for an adapter without a run."""
        return 0 if self.results is None else finished_tasks(self.results)

    @property
    def learned(self) -> int:
        """Return the number of tasks that the model was trained on: fewer than finished ones if several were one."""
        return 0 if self.results is None else self.tasks - first_task(self.results)

    @property
    def seen_classes(self) -> list[int] | None:
        """Return the label ids of the finished tasks, in stream order, each once; None for an adapter without a run."""
        if self.manifest is None:
            return None
        classes = (task["classes"] for task in self.manifest["tasks"][: self.tasks])
        return list(dict.fromkeys(label for own in classes for label in own))

    @property
    def precision(self) -> torch.dtype:
        """Return the precision that the frozen weights had in training; float32 where nothing says so."""
        noted = [name for name in (self.results or {}).get("sha256", {}) if name in BACKBONE_KEYS]
        return BACKBONE_KEYS[noted[0]] if noted else torch.float32

    @property
    def whole(self) -> bool:
        """Return whether a whole model has learned, and not an adapter."""
        return "peft_type" not in self.config

    def check_whole(self) -> None:
        """Raise ValueError unless a whole model's weights are here, undamaged, and may be read by transformers."""
        path = self.folder / MODEL
        if not path.exists():
            raise ValueError(without_weights(self.folder))
        layers, count = self.config.get("num_hidden_layers", 1), len(reading.tensor_shapes(path))
        if type(layers) is not int or not 0 < layers <= count:  # it would be built before it is compared with the file
            raise ValueError(
                f"{self.folder / MODEL_CONFIG} has num_hidden_layers={layers!r}, and {MODEL} holds {count} tensors: they "
                "do not belong together."
            )
        reading.read_tensors(path)
        self._check_digest(path)

    def weights(self, expected: Mapping[str, Tensor], later: Collection[str] = ()) -> dict[str, Tensor]:
        """Read the adapter's tensors.

        Args:
            expected: tensors with exactly the names and shapes that the file must have; their values are not read, and
                they may be on the meta device.
            later: names among them that files of earlier versions lack.

        Raises:
            ValueError: a file that is damaged, was altered, or has other names or shapes.
        """
        path = self.folder / ADAPTER
        shapes = reading.tensor_shapes(path)
        missing = sorted(expected.keys() - shapes.keys() - set(later))
        extra = sorted(shapes.keys() - expected.keys())
        if missing or extra:
            what = [f"it lacks {name!r}" for name in missing[:1]] + [f"it holds {name!r}" for name in extra[:1]]
            raise ValueError(
                f"{path} does not fit the backbone or its {ADAPTER_CONFIG}: {', and '.join(what)} ({len(missing)} names "
                f"missing, {len(extra)} unknown). Load it on the kind of model it was made on."
            )
        for name, shape in shapes.items():
            if shape != tuple(expected[name].shape):
                raise ValueError(
                    f"{path}: {name!r} has shape {shape}, expected {tuple(expected[name].shape)} by the backbone and "
                    f"{ADAPTER_CONFIG}."
                )
        tensors = reading.read_tensors(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() != expected[name].is_floating_point():
                raise ValueError(f"{path}: {name!r} has dtype {tensor.dtype}, expected {expected[name].dtype}.")
        self._check_digest(path)
        return tensors

    def bases(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the projection's bases by parameter name, and the content of `projection.json`.

        Raises:
            ValueError: no run; a file that is damaged or was altered; bases that are not orthonormal, or do not belong
                to the adapter's parameters.
        """
        self._check_run()
        path = self.folder / BASES
        description = reading.read_json(self.folder / DESCRIPTION)
        parameters = reading.tensor_shapes(self.folder / (MODEL if self.whole else ADAPTER))
        shapes = reading.tensor_shapes(path)
        for name, shape in shapes.items():
            parameter = parameters.get(name, parameters.get(name.removesuffix(TRANSPOSED)))
            check_basis(name, shape, parameter, description.get(name), path)
        tensors = reading.read_tensors(path)
        for name, columns in tensors.items():
            try:
                Basis(columns, description[name].get("complement"))
            except ValueError as error:
                raise ValueError(f"{path}: {name!r}: {error}") from error
        self._check_digest(path)
        return tensors, description

    def method(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the method's tensors and the content of `method.json`; None for a run that wrote neither.

        Raises:
            ValueError: a file is missing, damaged or was altered, or lacks the method's name or settings.
        """
        found = read_method(self.folder)
        if found is None and self._noted_digest(METHOD_STATE) is not None:
            raise ValueError(
                f"{self.folder} has a digest of {METHOD_STATE}, but no {METHOD_STATE}: the download or copy is incomplete."
            )
        if found is not None:
            self._check_digest(self.folder / METHOD_STATE)
        return found

    def exemplars(self) -> dict[str, Tensor]:
        """Read the images that the run has stored, by names that `pgp_hf.data.stored` explains.

        Raises:
            ValueError: a file that is missing, damaged or was altered.
        """
        path = self.folder / EXEMPLARS
        if not path.exists():
            raise ValueError(
                f"{self.folder} has no {EXEMPLARS}, with which a run of memory_stores='images' goes on. A run keeps it for "
                "its newest task alone, unless save_full_weights='all', and uploads it only if asked: continue from the "
                "run's own folder, or upload it from there (python -m pgp_hf.hub push --exemplars, hub_exemplars=True)."
            )
        tensors = reading.read_tensors(path)
        self._check_digest(path)
        return tensors

    def projection_config(self) -> ProjectionConfig:
        """Read the settings in `projection.json`.

        Raises:
            ValueError: no run, or settings that this version does not know or allow.
        """
        self._check_run()
        path = self.folder / DESCRIPTION
        settings = {name: value for name, value in reading.read_json(path).items() if not isinstance(value, dict)}
        try:
            return ProjectionConfig(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a projection ({error}).") from error

    def projection(self) -> Projection:
        """Read the projection with its bases; raise what `bases` and `projection_config` do."""
        projection = Projection(self.projection_config())
        projection.load_state(*self.bases())
        return projection

    def check_backbone(self, model: nn.Module) -> None:
        """Raise ValueError if the backbone's weights are not those that the run was trained on."""
        noted = self._noted_digest(backbone_key(model))
        if noted is None:
            return
        found = backbone_sha256(model, self.config.get("modules_to_save"))
        if found not in (None, noted):
            raise ValueError(
                f"the backbone's weights are not those that {self.folder} was trained on (their digest differs from the "
                f"one in {RESULTS}), although its shapes are: an adapter means nothing on another backbone. Pass the "
                f"right one; {ADAPTER_CONFIG} names {self.config.get('base_model_name_or_path')!r}."
            )

    def _check_run(self) -> None:
        if self.results is None:
            raise ValueError(f"{self.folder} is an adapter without a run: it has no {DESCRIPTION} and {BASES}.")

    def _noted_digest(self, name: str) -> str | None:
        return (self.results or {}).get("sha256", {}).get(name)

    def _check_digest(self, path: Path) -> None:
        if self.digests is not None:
            self.digests.check(path.name)
            return
        noted = self._noted_digest(path.name)
        if noted is not None and noted != reading.sha256(path):
            raise ValueError(
                f"{path} is not the file that the run wrote (its digest differs from the one in {RESULTS}): it is "
                "damaged or was altered. Fetch it again."
            )


def read_method(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a method's tensors and the content of `method.json` in a revision or a checkpoint; None where neither is.

    Raises:
        ValueError: one without the other, a damaged file, or one that lacks the method's name or settings.
    """
    state, description = folder / METHOD_STATE, folder / METHOD
    there = [path.name for path in (state, description) if path.exists()]
    if not there:
        return None
    for path in (state, description):
        if not path.exists():
            raise ValueError(f"{folder} has {there[0]}, but no {path.name}: the download or copy is incomplete.")
    content = reading.read_json(description)
    check_method_file(content, description)
    return reading.read_tensors(state), content
