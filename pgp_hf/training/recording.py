"""Predict the test images of a stream's tasks, and compute again only what has changed since the last evaluation.

What the head reads of an image depends on the frozen backbone, the prompts that the image selects, and nothing else.
While those stay, it is kept, batch by batch, as evaluation divides the images: a batch of which no image has changed is
neither read nor passed through the backbone again, and every number is what it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.images import CachedQueries
from ..data.stream import TaskImages
from ..methods import ContinualMethod
from ..models import PlainModel, StreamModel
from .evaluation import Recorded, Scorer
from .fitting import BatchSizes

GROUP = 2048
"""Images that are predicted together: enough for the fixed costs of a pass not to count, few enough to be held."""


@runtime_checkable
class ReusesFeatures(Protocol):
    """A model that can tell whether what its head reads of images has changed."""

    def feature_states(self, batches: Sequence[Tensor | None]) -> list[str | None]:
        """Return a digest of all that the head's input of each batch depends on, besides its images and the frozen weights.

        Args:
            batches: the queries `(B, d)` of each batch's images; None where they are not known.

        Returns:
            One for each batch; None where that cannot be told.
        """

    def score_features(self, features: Tensor) -> Tensor:
        """Return the scores `(B, C)` that a forward pass in evaluation makes of what the head reads, `(B, d)`."""


class _HeadAlone:
    """A plain model of which the head alone learns: what that reads never changes."""

    def __init__(self, model: PlainModel) -> None:
        self._model = model

    def feature_states(self, batches: Sequence[Tensor | None]) -> list[str | None]:
        return [""] * len(batches)

    def score_features(self, features: Tensor) -> Tensor:
        scores: Tensor = self._model.head(features)
        return scores


def reusing(learner: StreamModel) -> ReusesFeatures | None:
    """Return the model as one whose features may be used again; None for one whose features always move."""
    if isinstance(learner, PlainModel):
        # buffers may move although the head alone learns
        still = all(not buffer.is_floating_point() for buffer in learner.model.buffers())
        return _HeadAlone(learner) if still and learner.name == "head" and _is_linear(learner.head) else None
    return learner if isinstance(learner, ReusesFeatures) else None


def _is_linear(head: nn.Module) -> bool:
    return isinstance(head, nn.Linear)


class Batches(Dataset[list[Any]]):
    """Whole batches of the test images of one task or several, none of which has images of two.

    Args:
        parts: images of a task, and the positions of a batch among them.
    """

    def __init__(self, parts: Sequence[tuple[TaskImages | CachedQueries, range]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> list[Any]:
        images, positions = self.parts[index]
        return [images[position] for position in positions]

    def tasks(self) -> list[int]:
        """Return the 0-based task of each batch."""
        return [(part.images if isinstance(part, CachedQueries) else part).task for part, _ in self.parts]


class CollateBatch:
    """Collate a batch that a dataset has put together.

    Args:
        collate: makes a batch of items.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, batches: list[list[Any]]) -> dict[str, Tensor]:
        (items,) = batches
        return self.collate(items)


Images = TaskImages | CachedQueries
Found = dict[str, np.ndarray]  # of images, by the names of `Recorded`


@dataclass(frozen=True)
class _Kept:
    """A batch as the head has read it.

    Attributes:
        state: of all that this depends on.
        features: the head's input, in its own precision.
    """

    state: str
    features: Tensor
    found: Found


@dataclass(frozen=True, eq=False)
class _Plan:
    """The batches of a task's test images.

    Attributes:
        states: of each batch; None where that cannot be told.
    """

    task: int
    images: TaskImages | CachedQueries
    batches: list[range]
    states: list[str | None]


class Recorder:
    """Predict the test images of tasks, and keep what may be of use in the next evaluation.

    Args:
        learner: the model.
        method: by which it learns.
        scorer: turns its outputs into scores.
        images: returns the test images of a 0-based task, with their queries where those are known.
        predict: passes [`Batches`], or a task's images, through the model; returns what [`Scorer.score`] has made of all of
            them, with their labels.
        autocast: the precision that the model runs in.
        sizes: numbers of images in a batch.
        alone: True where this process computes all batches, in their order.
    """

    def __init__(
        self,
        learner: Callable[[], StreamModel],
        method: ContinualMethod,
        scorer: Scorer,
        images: Callable[[int], Images],
        predict: Callable[[Dataset[Any]], Found],
        autocast: Callable[[], AbstractContextManager[None]],
        sizes: BatchSizes,
        alone: bool,
    ) -> None:
        self.learner, self.method, self.scorer = learner, method, scorer
        self.images, self.predict, self.autocast, self.sizes, self.alone = images, predict, autocast, sizes, alone
        self._kept: dict[tuple[int, range], _Kept] = {}

    def record(self, tasks: Sequence[int], after: int | None) -> Iterator[Recorded]:
        """Yield the model's view of the test images of 0-based tasks.

        Args:
            tasks: their indices.
            after: the last task trained, 0-based; None before the first.
        """
        group: list[int] = []
        held = 0
        for j in tasks:
            count = len(self.images(j))
            if group and held + count > GROUP:
                yield from self._fitting(group, after)
                group, held = [], 0
            group.append(j)
            held += count
        yield from self._fitting(group, after)

    def _fitting(self, tasks: Sequence[int], after: int | None) -> list[Recorded]:
        return self.sizes.fit(lambda: self._recorded(tasks, after))

    def _recorded(self, tasks: Sequence[int], after: int | None) -> list[Recorded]:
        # a method with a pass of its own reads the images themselves
        own = type(self.method).predict_logits is ContinualMethod.predict_logits
        reusable = reusing(self.learner()) if own and self.alone else None
        plans = self._plans(tasks, reusable)
        computed = self._computed(
            [(plan, i) for plan in plans for i in range(len(plan.batches)) if not self._of(plan, i)]
        )
        recorded = []
        for plan in plans:
            parts = []
            for i in range(len(plan.batches)):
                kept = self._of(plan, i)
                again = kept is not None and reusable is not None and (plan.task, i) not in computed
                parts.append(self._again(reusable, kept, plan, after) if again else computed[plan.task, i])
            recorded.append(Recorded(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}))
        return recorded

    def _plans(self, tasks: Sequence[int], reusable: ReusesFeatures | None) -> list[_Plan]:
        """Return the batches of each task, whose states are asked for together: that costs as much as for one task."""
        size, found = self.sizes.evaluation, [(j, self.images(j)) for j in tasks]
        batches = [
            [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
            for _, images in found
        ]
        states: Iterator[str | None] = iter(())
        if reusable is not None:
            known = [images.queries if isinstance(images, CachedQueries) else None for _, images in found]
            parts = zip(known, batches, strict=True)
            own = [None if of is None else of[one.start : one.stop] for of, each in parts for one in each]
            states = iter(reusable.feature_states(own))
        return [
            _Plan(j, images, each, [next(states, None) for _ in each])
            for (j, images), each in zip(found, batches, strict=True)
        ]

    def _of(self, plan: _Plan, i: int) -> _Kept | None:
        """Return what is kept of a batch, if nothing has moved since."""
        kept = self._kept.get((plan.task, plan.batches[i]))
        return kept if kept is not None and kept.state == plan.states[i] else None

    def _computed(self, moved: Sequence[tuple[_Plan, int]]) -> dict[tuple[int, int], Found]:
        """Pass batches through the model, by task and number."""
        if not moved:
            return {}
        if self.alone:
            found = self.predict(Batches([(plan.images, plan.batches[i]) for plan, i in moved]))
        else:
            passes = [self.predict(plan.images) for plan in dict.fromkeys(plan for plan, _ in moved)]
            found = {name: np.concatenate([one[name] for one in passes]) for name in passes[0]}
        ends = np.cumsum([len(plan.batches[i]) for plan, i in moved])[:-1]
        parts = {name: np.split(values, ends) for name, values in found.items()}
        computed: dict[tuple[int, int], Found] = {}
        for k, (plan, i) in enumerate(moved):
            own = computed[plan.task, i] = {name: values[k] for name, values in parts.items()}
            if (state := plan.states[i]) is not None:
                features = torch.from_numpy(own["features"]).to(self.scorer.dtype)
                kept: Found = {name: own[name] for name in own if name in ("labels", "selected")}
                self._kept[plan.task, plan.batches[i]] = _Kept(state, features, kept)
        return computed

    def _again(self, model: ReusesFeatures | None, kept: _Kept | None, plan: _Plan, after: int | None) -> Found:
        """Return the scores of a batch by what the head reads of it, which is kept."""
        assert kept is not None and model is not None
        scores = self.scorer.score_features(
            self.learner(), model.score_features, kept.features, plan.task, after, self.autocast
        )
        return {**kept.found, **{name: values.cpu().numpy() for name, values in scores.items()}}
