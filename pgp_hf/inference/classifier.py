"""Classify images with a finished task, loaded from a local run or the Hub; no training code is imported."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers.pipelines.base
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..data.markup import shorten_names, table
from ..heads import keep_classes
from ..models import KeepsClassStatistics, SelectsPrompts, StreamModel, stream_model
from ..projection import Projection
from ..runs.folder import METHOD
from ..runs.revision import Revision
from ..runs.settled import settled
from ..runs.sources import locate
from .images import ImageLike, Images, is_indexed, several
from .opening import floating_dtype, open_model
from .reading import read_batches

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..methods import ContinualMethod

_makes_trainers: list[Callable[..., Any]] = []  # handed in, since nothing here imports code for training


def set_trainer(make: Callable[..., Any]) -> None:
    """Hand in the function behind `PromptClassifier.trainer`: called with a method's name, and from_pretrained's arguments."""
    _makes_trainers[:] = [make]


class Prediction(NamedTuple):
    """The predicted classes of an image, and the prompts that it selected.

    Attributes:
        labels: `{"label", "score"}` of the most probable classes, best first; scores are probabilities.
        prompts: pool entries that the image selected, nearest key first; None where nothing is selected (CLIP).
    """

    labels: list[dict[str, Any]]
    prompts: list[int] | None


class PromptClassifier:
    """Predict with the model and the class names of one revision; made by `load_pretrained`.

    Attributes:
        model: in eval mode; a `PeftModel` unless a whole model has learned. Its output has `logits` `(B, C)`, at minus
            infinity for classes that no finished task introduced; it works in
            `transformers.pipeline("image-classification", ...)`, CLIP included.
        processor: the backbone's image processor, for the same pipeline.
        manifest, results: content of `stream.json` and `results.json`; None for an adapter that was saved without a run.
        classes: label ids that may be predicted; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: BaseImageProcessor,
        revision: Revision,
        classes: list[int] | None,
        source: Mapping[str, Any],
    ) -> None:
        self.model, self.processor, self.classes = model, processor, classes
        self.manifest, self.results = revision.manifest, revision.results
        self._revision, self._source = revision, source

    def __repr__(self) -> str:
        known = self.id2label if self.classes is None else self.classes
        inside = self.model.base_model if isinstance(self.model, PeftModel) else self.model
        return f"PromptClassifier({type(inside).__name__}, {len(known)} of {len(self.id2label)} classes)"

    def _repr_html_(self) -> str:
        names, known = self.id2label, sorted(self.id2label if self.classes is None else self.classes)
        results = self.results or {}
        rows: list[list[Any]] = [
            ["classes", shorten_names([names[label] for label in known])],
            ["revision", self._revision.folder.name],
        ]
        for name in ("method", "projection", "average_accuracy"):
            value = results.get(name)
            rows.append([name.replace("_", " "), f"{value:.2f} %" if isinstance(value, float) else value])
        return table(repr(self), ["", ""], [row for row in rows if row[1] is not None])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but a token, which nobody expects there."""
        token = self._source.get("token")
        return {**self.__dict__, "_source": {**self._source, "token": None if isinstance(token, str) else token}}

    @property
    def _learner(self) -> StreamModel:
        return stream_model(self.model)

    @property
    def id2label(self) -> dict[int, str]:
        """Return the name of each class by its label id, those of later tasks included."""
        return dict(self._learner.class_names or {})

    @property
    def pool_size(self) -> int | None:
        """Return the number of pool entries that images select from; None where nothing is selected, as with CLIP."""
        return self._learner.pool_size if isinstance(self._learner, SelectsPrompts) else None

    @cached_property
    def projection(self) -> Projection:
        """Read the projection with its bases, which prediction does not need.

        Raises:
            ValueError: an adapter that was saved without a run.
        """
        return self._revision.projection()

    def trainer(self, args: TrainingArguments, test_dataset: Any = None, **kwargs: Any) -> Any:
        """Return the trainer that goes on from this revision by `learn`, with a model of its own.

        It is what `PGPTrainer.from_pretrained` returns for the revision or, for other methods, `StreamTrainer`'s.

        Args:
            args: `PGPTrainingArguments` of the tasks to come.
            test_dataset, kwargs: as there.

        Raises:
            ValueError: an adapter that was saved without a run; see `StreamTrainer.from_pretrained`.
        """
        if self.results is None:
            raise ValueError(f"{self._revision.folder} is an adapter without a run: there is nothing to continue.")
        method = self._revision.method()
        source = {**self._source, "processing_class": self.processor, **kwargs}
        if isinstance(source["backbone"], nn.Module):  # it has the adapter, which another model must not share
            tuner: Any = self.model.base_model
            source["backbone"] = copy.deepcopy(tuner).unload()
        name = "projected_prompts" if method is None else method[1]["name"]
        (make,) = _makes_trainers
        return make(name, args=args, test_dataset=test_dataset, **source)

    def export(self, path: str | os.PathLike[str], format: str = "onnx") -> Path:
        """Write the model to a file that runs without this package.

        It maps `pixel_values` `(B, 3, H, W)`, float32, as `processor` makes them, for any B, to `scores` `(B, K)` of the
        classes that may be predicted. Their names in this order, and the processor's settings, are in the file:
        `labels` and `preprocessor_config` in ONNX's metadata, `labels.json` and `preprocessor_config.json` in torch's
        extra files. It is loaded again and compared with this classifier before it takes its place.

        Args:
            path: the file; its folder is made.
            format: "onnx", which needs the extra `pgp_hf[export]`, or "torch" for `torch.export.load`, on this device.

        Returns:
            The path.

        Raises:
            ImportError: packages of the extra are missing.
            ValueError: another format, or a model that cannot be exported.
        """
        from .export import export  # imports torch's exporters

        classes = list(self.id2label) if self.classes is None else self.classes
        return export(self.model, self._learner, self.processor, classes, path, format)

    def predict(
        self,
        images: ImageLike | Images,
        top_k: int = 1,
        batch_size: int = 32,
        *,
        num_workers: int = 0,
        progress: bool | None = False,
    ) -> list[list[dict[str, Any]]]:
        """Classify images; no task id is needed. A call of the classifier does the same.

        Args:
            images: what `pgp_hf.inference.to_image` takes, such as paths, PIL images, arrays, bytes or items of a
                dataset, in any mixture; or one of them; a dataset; or a folder, whose image files are classified in the
                order of `pgp_hf.inference.image_files`.
            top_k: number of classes to name for each image; all classes if there are fewer.
            batch_size: number of images in a forward pass; predictions do not depend on it.
            num_workers: number of processes that read images ahead, from a folder, a list or a dataset.
            progress: show a bar on stderr; None for only on a terminal.

        Returns:
            `[{"label": name, "score": probability}, ...]` for each image, best first.

        Raises:
            TypeError: something else.
            ValueError: an image that cannot be read; a `top_k` or `batch_size` below 1, or `num_workers` below 0.
        """
        found = self.classify(images, top_k, batch_size, num_workers=num_workers, progress=progress)
        return [prediction.labels for prediction in found]

    __call__ = predict

    def classify(
        self,
        images: ImageLike | Images,
        top_k: int = 1,
        batch_size: int = 32,
        *,
        num_workers: int = 0,
        progress: bool | None = False,
    ) -> Iterator[Prediction]:
        """Classify as `predict` does, but yield each image as soon as its batch is done, with its selected prompts."""
        results = self.stream(images, top_k, batch_size, num_workers=num_workers, progress=progress)

        def predictions() -> Iterator[Prediction]:
            for result in results:
                if isinstance(result, Exception):
                    raise result
                yield result

        return predictions()

    def stream(
        self,
        images: ImageLike | Images,
        top_k: int = 1,
        batch_size: int = 32,
        *,
        num_workers: int = 0,
        progress: bool | None = False,
    ) -> Iterator[Prediction | Exception]:
        """Classify as `classify` does, but yield the error of an image that cannot be read, and go on with the others."""
        for name, value, least in (
            ("top_k", top_k, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is out of range: it must be a whole number from {least}.")
        return self._results(several(images), top_k, batch_size, num_workers, progress)

    def _results(
        self, images: Images, top_k: int, batch_size: int, num_workers: int, progress: bool | None
    ) -> Iterator[Prediction | Exception]:
        total = len(images) if is_indexed(images) else None
        hidden = None if progress is None else not progress
        with tqdm(total=total, unit="img", file=sys.stderr, disable=hidden) as bar:
            for batch in read_batches(images, self.processor, batch_size, num_workers):
                predictions = iter(() if batch.pixels is None else self._predictions(batch.pixels, top_k))
                for error in batch.errors:
                    yield next(predictions) if error is None else error
                bar.update(len(batch.errors))

    @torch.no_grad()
    def _predictions(self, pixels: Tensor, top_k: int) -> list[Prediction]:
        """Return the predictions of a batch `(B, 3, H, W)`."""
        reference, names = next(self.model.parameters()), self.id2label
        logits = self.model(pixel_values=pixels.to(reference.device, reference.dtype)).logits
        selected = self._learner.selected_prompts if isinstance(self._learner, SelectsPrompts) else None
        best = logits.float().softmax(-1).cpu().sort(descending=True, stable=True)
        top_k = min(top_k, len(names) if self.classes is None else len(self.classes))
        prompts = [None] * len(pixels) if selected is None else selected.tolist()
        rows = zip(best.values[:, :top_k].tolist(), best.indices[:, :top_k].tolist(), prompts, strict=True)
        return [
            Prediction([{"label": names[i], "score": score} for score, i in zip(scores, found, strict=True)], own)
            for scores, found, own in rows
        ]


def load_pretrained(
    repo_or_dir: str | os.PathLike[str],
    revision: str | None = None,
    *,
    backbone: str | os.PathLike[str] | PreTrainedModel | None = None,
    processor: BaseImageProcessor | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    eval_mask: str = "seen",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PromptClassifier:
    """Load a revision as a classifier.

    All files are checked before any is used: a revision is accepted or refused as a whole. Only safetensors and JSON
    are read.

    Args:
        repo_or_dir: id of a repository on the Hub, a run's output folder, or one of its task folders.
        revision: "task-3" for the state after the third task, by default the last; on the Hub also a branch or commit.
        backbone: the frozen model, or its Hub id or folder, if `adapter_config.json` does not say where it is. A model
            that is passed gets the adapter, as by `PeftModel.from_pretrained`, and is cast and moved itself by `dtype`
            and `device`; if the revision is refused, the model stays as it was.
        processor: an image processor to use instead of the saved one. The saved one is loaded with `backend="pil"`.
        device: where to run; by default the backbone's device, which is the CPU for one that is loaded here.
        dtype: precision of the weights, such as torch.bfloat16 or "bfloat16", beneath an adapter of the frozen ones
            alone; by default that of a backbone that is passed, or else the one that the run was trained in, float32
            unless it was asked for another.
        attn_implementation: "eager", "sdpa", ...; transformers' choice by default.
        eval_mask: "seen": a prediction may be any class of the finished tasks; "none": classes without any training
            compete as well.
        token, cache_dir, local_files_only: as in every `from_pretrained`.

    While a run copies the files of a task to the top level of its folder, this waits.

    Raises:
        ValueError: files that are damaged, altered, contradictory, pickled or ask for code to be run; a backbone that is
            missing or is not the one the adapter was made on; a run that has not finished a task yet; a `dtype` that is not
            a floating one.
    """
    dtype, device = floating_dtype(dtype), None if device is None else torch.device(device)  # before anything is read
    if eval_mask not in ("seen", "none"):
        raise ValueError(f"eval_mask={eval_mask!r} is unknown: choose one of seen, none.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    local = Path(repo_or_dir).is_dir()

    def read() -> tuple[Path, Revision, ContinualMethod | None, Any, BaseImageProcessor]:
        folder = locate(repo_or_dir, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        found = Revision.read(folder, revision)
        method = _adjusting_method(found)
        opened = open_model(found, backbone, processor, local, hub, attn_implementation, dtype=dtype)
        return folder, found, method, *opened

    folder, found, method, model, opened_processor = settled(repo_or_dir, revision, read)
    if found.learned:
        stream_model(model).resume_after(found.learned - 1)
    classes = None if eval_mask == "none" else found.seen_classes
    _make_classifier(model, classes, method)
    # by its commit, since a branch moves on
    source = {"run_or_repo": repo_or_dir, "revision": revision if local else folder.name, "backbone": backbone, **hub}
    model = model.to(device=device).eval()
    return PromptClassifier(model, opened_processor, found, classes, source)


def _adjusting_method(revision: Revision) -> ContinualMethod | None:
    """Return the method of a run, if it adjusts the model's logits; most do not.

    Raises:
        ValueError: damaged files, or a method that is not registered here.
    """
    found = revision.method()
    if found is None or not found[1].get("adjusts_logits"):
        return None
    from ..methods import MethodState, create  # only here: other predictions need no code for training

    tensors, content = found
    try:
        method = create(content["name"], **content["settings"])
        method.load_state(MethodState(tensors, content.get("state", {})))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{revision.folder / METHOD} names the method {content['name']!r}, which predictions need and which cannot be "
            f"made ({error}): import the package that registers it."
        ) from error
    return method


class _Scores:
    """Give a model's output calibrated `logits` with unseen classes masked.

    It is a hook that can be pickled and copied with the model.

    Args:
        model: the model.
        classes: label ids that may be predicted; None for all.
        method: adjusts the logits before they are masked; they are not calibrated then.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, classes: list[int] | None, method: ContinualMethod | None
    ) -> None:
        self.model, self.classes, self.method = model, classes, method
        self.features: list[Tensor] = []  # what the head has read in the running pass
        learner = stream_model(model)
        statistics = learner.statistics if isinstance(learner, KeepsClassStatistics) else None
        self.temperature = None if statistics is None or method is not None else statistics.temperature
        if method is not None:
            learner.watch_features(self._watch)

    def _watch(self, features: Tensor) -> None:
        self.features[:] = [features]

    def _kept(self, logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.method is not None:
            inputs = {**dict(zip(("pixel_values",), args, strict=False)), **kwargs}
            given = {name: value for name, value in inputs.items() if name not in ("labels", "return_dict")}
            learner = stream_model(self.model)
            logits = self.method.predict_logits(learner, given, logits.float(), self.features.pop())
        elif self.temperature is not None and self._uses_statistics():
            logits = logits / self.temperature
        return keep_classes(logits, self.classes)

    def _uses_statistics(self) -> bool:
        learner = stream_model(self.model)
        return isinstance(learner, KeepsClassStatistics) and learner.uses_statistics_head

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("input_ids") is not None:  # CLIP with the caller's own texts
            return output
        if isinstance(output, tuple):
            at = 1 if kwargs.get("labels") is not None else 0  # the loss comes first
            return *output[:at], self._kept(output[at], args, kwargs), *output[at + 1 :]
        logits = self._kept(stream_model(self.model).class_logits(output), args, kwargs)
        if "logits" not in output:
            return ImageClassifierOutput(logits=logits)
        output.logits = logits
        return output


def _make_classifier(
    model: PreTrainedModel | PeftModel, classes: list[int] | None, method: ContinualMethod | None
) -> None:
    """Add calibrated `logits` with unseen classes masked to the model's output, and the class names to its configuration.

    Args:
        method: adjusts the logits before they are masked; they are not calibrated then.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = stream_model(model).class_names or {}
    base.config.id2label, base.config.label2id = dict(names), {name: index for index, name in names.items()}
    model.register_forward_hook(_Scores(model, classes, method), with_kwargs=True)
    # otherwise the pipeline logs an error that the model is not supported, although it works
    supported = getattr(transformers.pipelines.base, "SUPPORTED_PEFT_TASKS", {})
    known = supported.setdefault("image-classification", [])
    if type(model).__name__ not in known:
        known.append(type(model).__name__)
