"""Pass over images outside training, without augmentation and without consuming random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers.utils.generic import ModelOutput

from ..data.images import AugmentedImages, CachedQueries, Exemplars, ImageCollator, ImageView
from ..data.stored import Stored, StoredImages
from ..data.stream import TaskImages, TaskStream
from ..heads.statistics import ClassStatistics, gather_task
from ..methods import Batch, Collectives, Observed, TaskContext
from ..models import KeepsClassStatistics, SelectsPrompts, StreamModel, exchanged
from ..projection import Projection
from ..runs.folder import QUERIES
from .arguments import PGPTrainingArguments
from .finite import check_pixels
from .fitting import BatchSizes
from .queries import Key, QueryCache, query_key

Views = Iterator[tuple[Batch, list[int]]]


@dataclass(frozen=True)
class Passes:
    """Go over images with a trainer's model; the trainer hands over what that takes.

    Attributes:
        stream: the tasks that are trained on.
        stored: images of older tasks that are read from here, and not from the stream.
        model, learner: the whole model, and the `StreamModel` inside it.
        images: those of the task in training, which may know their queries.
        collate: makes a batch of items.
        prepare: moves a batch to the device.
        test_loader: makes the loader that evaluation uses.
        sizes: numbers of images in a batch.
        digest: returns the digest of the frozen backbone.
    """

    args: PGPTrainingArguments
    accelerator: Accelerator
    stream: TaskStream
    stored: Stored
    model: nn.Module
    learner: StreamModel
    images: AugmentedImages | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    test_loader: Callable[[Dataset], DataLoader]
    sizes: BatchSizes
    digest: Callable[[], Mapping[str, str]]

    @property
    def hidden(self) -> bool | None:
        """Return True if progress bars are off on this process, else None: they are shown on a terminal."""
        return bool(self.args.disable_tqdm) or not self.accelerator.is_main_process or None

    @torch.no_grad()
    def queries(self, images: ImageView, on_disk: bool = True) -> Tensor | None:
        """Return the queries `(N, d)` of images, on every process: from the disk, or from the batches that evaluation uses.

        None for a model that selects nothing, and where `cache_queries` is off.

        Args:
            on_disk: whether they are looked for there, and written, if the arguments allow it.
        """
        if not self.args.cache_queries or not isinstance(self.learner, SelectsPrompts):
            return None
        cache, key = self._cache(), self._query_key(self.learner, images) if on_disk else None
        found = None if key is None else cache.read(key, len(images))
        if self._all_have(found):
            return found
        queries = []
        for batch in tqdm(
            self.test_loader(cast(Dataset[Any], images)), desc="queries", leave=False, disable=self.hidden
        ):
            with self.accelerator.autocast():
                query = self.learner.query(self.prepare(batch)["pixel_values"])
            queries.append(self.accelerator.gather_for_metrics(query).cpu())
        found = torch.cat(queries)
        if key is not None and self.accelerator.is_main_process:
            cache.write(key, found)
        return found

    def _all_have(self, found: Tensor | None) -> TypeGuard[Tensor]:
        """Return whether all processes have found something: they compute it together, or not at all."""
        reduce = self.collectives.reduce
        if reduce is None:
            return found is not None
        missing = torch.tensor([found is None], dtype=torch.int64, device=self.args.device)
        return not int(reduce(missing))

    def _cache(self) -> QueryCache:
        folder = self.args.query_cache or Path(str(self.args.output_dir)) / QUERIES
        return QueryCache(Path(folder), round(self.args.query_cache_gb * 1e9))

    def _query_key(self, learner: SelectsPrompts, images: ImageView) -> Key | None:
        """Return what the queries of images depend on, as far as they are kept on the disk."""
        if not self.args.query_cache_gb:
            return None
        how = {
            "precision": [str(self.accelerator.mixed_precision), torch.get_float32_matmul_precision()],
            "device": [self.args.device.type, torch.get_num_threads(), self.args.world_size],
            "batch": self.sizes.evaluation,
            "compiled": self.args.compile_trunk,
            "last_block": self.args.last_block,
            "images": [self.args.exact_images, self.args.process_on_device],
        }
        return query_key(learner, self.digest(), images, self.collate, how)

    def keep_training_queries(self, images: AugmentedImages, projection: Projection | None) -> None:
        """Compute the queries of a task's training images once, where they would otherwise be computed repeatedly.

        Training goes over the images, and so do the statistics of a projection, a head or a selection.
        """
        views, learner = images.views(), self.learner
        statistics = isinstance(learner, KeepsClassStatistics) and learner.statistics is not None
        plain = images.augmentation != "crop_flip" and (statistics or (projection is not None and projection.active))
        passes = self.args.num_train_epochs + plain
        known = isinstance(self.collate, ImageCollator)  # another one might augment
        if 0 < len(views) < passes and self.args.max_steps <= 0 and known:
            found = [queries for view in views if (queries := self.queries(view)) is not None]
            images.queries = torch.stack(found) if found else None
        if images.plain_queries is None and known and self._plain_passes(projection) > 1:
            images.unaugmented = self.queries(images.images, on_disk=False)

    def _plain_passes(self, projection: Projection | None) -> int:
        """Return the number of passes over a task's unaugmented images that need their queries."""
        learner, passes = self.learner, 0
        if isinstance(learner, KeepsClassStatistics) and learner.statistics is not None:
            passes += 2 if self.args.compensate_drift else 1
        if projection is not None and projection.config.method not in ("none", "frozen"):
            passes += 2 if projection.config.all_keys else 1
        return passes + (getattr(learner, "query_statistics", None) is not None)

    # ---- training images -----------------------------------------------------------------------------------------

    def training_views(self, t: int, batch_size: int, limit: int | None = None) -> Views:
        """Yield batches of a task's training images, unaugmented, and each image's position within the task.

        Each process gets its share; the model is in eval mode.

        Args:
            limit: largest number of images, over all processes; the choice is a function of (seed, task).

        Raises:
            ValueError: fewer images than processes.
            FloatingPointError: pixel values that are not finite.
        """
        images = self.stream.train(t)
        indices = np.arange(len(images))
        queries = None if self.images is None else self.images.plain_queries
        if limit is not None and limit < len(indices):
            indices = np.sort(np.random.default_rng([self.args.seed, t]).permutation(indices)[:limit])
        share = indices[self.args.process_index :: self.args.world_size]
        if len(indices) < self.args.world_size:
            fix = ", or raise max_images" if len(indices) < len(images) else ""
            raise ValueError(
                f"{len(indices)} images for the statistics of task {t + 1} are too few for {self.args.world_size} "
                f"processes: use fewer processes{fix}."
            )
        loader = DataLoader(
            Subset[Any](images if queries is None else CachedQueries(images, queries), share.tolist()),
            batch_size=batch_size,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # the loader draws a seed, which must not come from the training's numbers
        )
        self.model.eval()
        for i, batch in enumerate(tqdm(loader, desc="statistics", leave=False, disable=self.hidden)):
            positions = share[i * batch_size : (i + 1) * batch_size].tolist()
            prepared = self.prepare(batch)
            check_pixels(prepared["pixel_values"], [(images, position) for position in positions])
            yield Batch.split(prepared), positions

    @torch.no_grad()
    def views_for_method(self, t: int, limit: int | None) -> Views:
        """Yield the training images for a method, with queries where the model selects prompts by them."""
        for batch, positions in self.training_views(t, self.sizes.training, limit):
            if "prompt_query" not in batch.inputs and isinstance(self.learner, SelectsPrompts):
                with self.accelerator.autocast():  # as training and evaluation see them; the rest is in full precision
                    batch.inputs["prompt_query"] = self.learner.query(batch.inputs["pixel_values"])
            yield batch, positions

    # ---- what a method asks for ----------------------------------------------------------------------------------

    def context(self, t: int) -> TaskContext:
        """Return the context of a task in which the parts of a method are called."""
        return TaskContext(
            task=t,
            stream=self.stream,
            model=self.learner,
            seed=self.args.seed,
            train_mask=self.args.train_mask,
            views=partial(self.views_for_method, t),
            old_images=self.old_images,
            exemplars=self.exemplars,
            observe=self.observe,
            forward=self.forward,
            collectives=self.collectives,
        )

    def old_images(self, places: Sequence[Sequence[int]], view: int) -> Batch:
        """Return training images as a batch.

        Args:
            places: 0-based task of each, and its position within the task.
            view: what the augmentation is a function of, besides the run's seed and the image.
        """
        tasks = {task: self.augmented(task) for task, _ in places}
        for images in tasks.values():
            images.set_epoch(view)
        return Batch.split(self.prepare(self.collate([dict(tasks[task][index]) for task, index in places])))

    def exemplars(self, places: Sequence[Sequence[int]]) -> Exemplars:
        """Return training images of any tasks as a dataset that is augmented anew in each epoch."""
        return Exemplars({task: self.augmented(task) for task in {int(task) for task, _ in places}}, places)

    def observe(self, places: Sequence[Sequence[int]]) -> Observed:
        """Return the model's view of training images, unaugmented, on every process.

        Args:
            places: 0-based task of each, and its position within the task.
        """
        return self.sizes.fit(lambda: self._observed(places))

    @torch.no_grad()
    def _observed(self, places: Sequence[Sequence[int]]) -> Observed:
        world, size = self.args.world_size, self.sizes.evaluation
        rounds = -(-len(places) // world)
        # all processes take as many, so that their results can be gathered: the last images stand in for missing ones
        own = [min(i * world + self.args.process_index, len(places) - 1) for i in range(rounds)]
        images = {task: self.images_of(task) for task in {int(task) for task, _ in places}}
        features, logits = [], []
        for start in range(0, rounds, size):
            chosen = [(images[int(places[i][0])], int(places[i][1])) for i in own[start : start + size]]
            collated = self.prepare(self.collate([dict(of_task[i]) for of_task, i in chosen]))
            check_pixels(collated["pixel_values"], chosen)
            batch = Batch.split(collated)
            with head_inputs(self.learner) as seen:
                output = self.forward(batch)
            features.append(seen[0].float())
            logits.append(self.learner.class_logits(output).float())
        if not features:
            raise ValueError("there are no images to observe: give at least one place.")
        found = [torch.cat(parts) for parts in (features, logits)]
        if world > 1:  # in the order of the processes, while images were dealt out in turn
            found = [
                self.accelerator.gather(part).unflatten(0, (world, rounds)).transpose(0, 1).flatten(0, 1)
                for part in found
            ]
        return Observed(*(part[: len(places)].cpu() for part in found))

    def images_of(self, t: int) -> TaskImages:
        """Return a task's training images: the stored ones if there are any, else the stream's."""
        if t not in self.stored:
            return self.stream.train(t)
        labels = self.stream.train(t).labels if self.stream.has_train(t) else None
        return StoredImages(t, self.stored[t], labels, self.stream.num_images("train", t))

    def augmented(self, t: int) -> AugmentedImages:
        """Return a task's training images as the arguments augment them."""
        args = self.args
        batched = isinstance(self.collate, ImageCollator) and self.collate.recipe is not None
        return AugmentedImages(
            self.images_of(t),
            args.augmentation,
            args.crop_min_scale,
            args.seed,
            t,
            args.crop_views,
            exact=not batched,
        )

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> ModelOutput:
        """Return the model's output for a batch as in prediction, whatever mode the model is in.

        Args:
            batch: the images.
            parameters: values of the trainable parameters to use instead, by name; no gradient is then recorded.
        """
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with self.accelerator.autocast():
                if parameters is None:
                    return self.model(**batch.inputs)
                with torch.no_grad(), exchanged(self.learner.trainable(), parameters):
                    return self.model(**batch.inputs)
        finally:
            for module in training:  # one by one: those in eval mode before stay in it
                module.training = True

    # ---- what the head reads -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _head_views(self, t: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, _ in self.training_views(t, self.sizes.evaluation):
            with head_inputs(self.learner) as features, self.accelerator.autocast():
                self.model(**batch.inputs)
            yield features[0].float().cpu(), batch.labels

    def head_features(self, t: int) -> Tensor:
        """Return the head's inputs for this process's share of a task's training images, `(N, d)`, on the CPU."""
        return self.sizes.fit(lambda: torch.cat([features for features, _ in self._head_views(t)]))

    @torch.no_grad()
    def learn_class_statistics(
        self, t: int, before: Tensor | None, found: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Add a trained task's images to the statistics head, if there is one, and calibrate its scores by them.

        Args:
            before: what the head read of them before the task was trained; None without drift compensation.
            found: what it has read of them since, and their labels, in batches; empty to pass them.
        """
        learner = self.learner
        if not isinstance(learner, KeepsClassStatistics) or (known := learner.statistics) is None:
            return
        restricted = None if before is None else learner.as_before_task(t)

        def as_before() -> Tensor:
            assert restricted is not None
            with restricted:
                return self.head_features(t)

        seen: list[tuple[Tensor, Tensor]] = []

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            seen.clear()
            for batch in found or self._head_views(t):
                seen.append(batch)
                yield batch

        def gathered() -> ClassStatistics:
            return gather_task(
                known,
                views(),
                self.collectives.reduce,
                before=before,
                as_before=None if restricted is None else as_before,
            )

        learner.learn_statistics(self.sizes.fit(gathered))
        features, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        known.calibrate(features, labels, self.collectives.reduce)

    @torch.no_grad()
    def learn_queries(self, t: int) -> None:
        """Add the queries of a task's training images, which no training changes, to a model that selects by them."""
        known = getattr(self.learner, "query_statistics", None)
        if known is None:
            return
        queries: list[tuple[Tensor, Tensor]] = []

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            queries.clear()
            for batch, _ in self.views_for_method(t, None):
                queries.append((batch.inputs["prompt_query"].float().cpu(), batch.labels))
                yield queries[-1]

        known.add_task(t, self.sizes.fit(lambda: gather_task(known, views(), self.collectives.reduce)))
        features, labels = (torch.cat(parts) for parts in zip(*queries, strict=True))
        known.calibrate(features, labels, self.collectives.reduce)

    @property
    def collectives(self) -> Collectives:
        """Operations that the processes do together; none where there is one process."""
        if self.args.world_size == 1:
            return Collectives()
        return Collectives(
            reduce=lambda tensor: self.accelerator.reduce(tensor, "sum"),
            gather=self.accelerator.gather,
            broadcast=broadcast,
        )


@contextmanager
def head_inputs(model: StreamModel) -> Iterator[list[Tensor]]:
    """Yield a list that receives what the head reads, `(B, d)`, at each forward pass inside the block."""
    features: list[Tensor] = []
    watch = model.watch_features(lambda tensor: features.append(tensor.detach()))
    try:
        yield features
    finally:
        watch.remove()
