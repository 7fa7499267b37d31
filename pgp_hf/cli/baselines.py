"""Run the methods of `run_baselines.py` on one stream, and put them in one table with the frozen backbone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.stream import TaskStream
from ..methods import ContinualMethod
from ..models import stream_model
from ..report.formatting import fill
from ..runs.atomic import write_json
from ..runs.folder import MANIFEST, METHOD, RESULTS, RunFolder
from ..runs.lock import held
from ..runs.reading import read_json
from ..training.resume import check_method
from ..training.setup import check_scenario
from ..training.signals import leaving
from ..training.trainer import StreamTrainer
from ..training.views import head_inputs
from .baseline_arguments import ALL, BaselineArguments, names
from .experiment import Results, print_comparison, resume_argument
from .frozen import Extract, frozen_rows, random_weights
from .settings import differences, digests, record

Model = PreTrainedModel | PeftModel
SETTINGS, FROZEN = "settings.json", "frozen.json"


def run(arguments: BaselineArguments, make_model: Callable[[TaskStream], Model]) -> Results:
    """Train the chosen method, or all of them; print and write the comparison with the frozen backbone.

    Every run starts from the same seed, the same class order and the same weights. With `--method all`, runs that are
    finished in the output folder are read from there, and an interrupted one is resumed.

    Args:
        arguments: of the command line, from `parse`.
        make_model: makes the model for a stream's classes; called once per run, after seeding.

    Returns:
        Results by row name.

    Raises:
        ValueError: an output folder with another run, or with runs that have other settings; no method works on the
            model.
    """
    args, main = arguments.training, arguments.training.process_index == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving(main))
        if main:
            stack.enter_context(held(Path(str(args.output_dir))))  # until all runs are finished
        return _run(arguments, make_model)


def _run(arguments: BaselineArguments, make_model: Callable[[TaskStream], Model]) -> Results:
    """Train and compare, in a folder that is held."""
    args, every = arguments.training, arguments.run.method == ALL
    output_dir, resume = Path(str(args.output_dir)), resume_argument(args.resume_from_checkpoint)
    _check_folder(output_dir, every, args.overwrite_output_dir or (bool(resume) and not every))
    stream, processor = arguments.data.load(args.seed), arguments.model.processor()
    runs, refused = Runs(arguments, make_model, stream, processor), dict[str, str]()
    if every:
        rows, refused = runs.train_all(output_dir)
    else:
        rows = {name: runs.train(method, output_dir, resume) for name, method in arguments.methods().items()}
    if PartialState().is_main_process:
        if not arguments.run.no_compare:
            rows = {**runs.frozen(output_dir / FROZEN if every else None), **rows}
        drawn = args.figures != "none"
        print_comparison(rows, output_dir, refused, draw=drawn)
        if text := exemplars(rows, sum(stream.num_images("train", t) for t in range(stream.num_tasks))):
            print("\n" + fill(text))
        curves = f" and {output_dir}/figures/comparison.png: this table, its curves." if drawn else ": this table."
        print(
            f"\nWritten to {output_dir}{'/METHOD' if every else ''}: the model after the last task, results.json,"
            "\n  README.md (model card); task-1, task-2, ...: the same files after each task, without a whole model's"
            f"\n  weights; {output_dir}/comparison.json{curves}"
        )
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    return rows


def _check_folder(output_dir: Path, every: bool, may_hold_run: bool) -> None:
    """Raise ValueError if the folder holds an earlier run, or those of `--method all` and this is a single one."""
    if not every and (output_dir / SETTINGS).exists():
        raise ValueError(f"output_dir={output_dir} holds the runs of --method all: choose another --output_dir.")
    if not may_hold_run:
        RunFolder(output_dir).check_unused()


def _clear(output_dir: Path) -> None:
    """Delete earlier runs, all of them before any begins: an interruption must not leave some of other settings."""
    if PartialState().is_main_process:
        if (file := output_dir / SETTINGS).exists() and not read_json(file).keys() >= {"run", "sha256"}:
            raise ValueError(f"{file} is not of earlier runs, which would replace it: choose another --output_dir.")
        for folder in (output_dir, *(output_dir / name for name in names())):
            if not RunFolder(folder).is_empty():
                RunFolder(folder).clear()
        if file.exists():
            for name in (SETTINGS, FROZEN):
                (output_dir / name).unlink(missing_ok=True)
    PartialState().wait_for_everyone()


@dataclass(frozen=True)
class Runs:
    """Runs on one stream.

    Attributes:
        arguments: of the command line.
        make_model: makes the model for the stream's classes.
        stream: the tasks.
        processor: prepares their images.
    """

    arguments: BaselineArguments
    make_model: Callable[[TaskStream], Model]
    stream: TaskStream
    processor: BaseImageProcessor

    def new_model(self) -> Model:
        """Make the model that every run starts from."""
        set_seed(self.arguments.training.seed)
        return self.make_model(self.stream)

    def train(self, method: ContinualMethod, folder: Path, resume: str | bool | None) -> dict[str, Any]:
        """Train the stream by a method, and return the content of `results.json`.

        Args:
            method: a new one.
            folder: of the run.
            resume: as `StreamTrainer.train` has it.
        """
        args = copy.copy(self.arguments.training)
        args.output_dir = str(folder)
        trainer = StreamTrainer(self.new_model(), args, self.stream, method=method, processing_class=self.processor)
        say(f"\n{method.name} -> {folder}")
        trainer.train(resume_from_checkpoint=resume)
        return trainer.results.to_dict()

    def train_all(self, output_dir: Path) -> tuple[Results, dict[str, str]]:
        """Train every method that works on the model, each in a folder with its name, where it is not finished.

        Returns:
            The content of each `results.json` by method, and why the other methods were refused.

        Raises:
            ValueError: runs with other settings, or none that works on the model.
        """
        model, rows, refused = self.new_model(), Results(), dict[str, str]()
        if self.arguments.training.overwrite_output_dir:
            _clear(output_dir)
        self._check_settings(output_dir / SETTINGS, model)
        for name, method in self.arguments.methods().items():
            folder = RunFolder(output_dir / name)
            if reason := self._refusal(method, model):
                refused[name] = reason
            elif folder.finished_tasks() == self.stream.num_tasks:
                rows[name] = self._read(method, folder.task(self.stream.num_tasks - 1))
            else:
                rows[name] = self.train(method, folder.root, resume=not folder.is_empty())
        if not rows:
            raise ValueError(f"no method works on this model and stream: {'; '.join(refused.values())}")
        return rows, refused

    def _check_settings(self, file: Path, model: Model) -> None:
        """Write the settings that all runs share; raise ValueError if the earlier runs have others."""
        arguments, ways = self.arguments, "choose another --output_dir, or start anew with --overwrite_output_dir true"
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        own: dict[str, dict[str, Any]] = {
            **record(arguments.model, arguments.data, arguments.training),
            "run": {"trainable": arguments.run.trainable, "seed": arguments.training.seed},
            "sha256": digests(self.stream, base),
        }
        if file.exists():
            if differ := differences(own, read_json(file)):
                raise ValueError(f"{file} has other settings ({'; '.join(differ[:4])}): {ways}.")
            return
        for name in names():
            if not RunFolder(file.parent / name).is_empty():
                raise ValueError(f"{file.parent / name} holds a run of unknown settings, without {file}: {ways}.")
        if PartialState().is_main_process:
            write_json(file, own)
        PartialState().wait_for_everyone()

    def _refusal(self, method: ContinualMethod, model: Model) -> str | None:
        """Return why the method does not work on the model or the stream; None if it does."""
        learner = stream_model(model)
        try:
            check_scenario(method, self.stream)
            method.check(learner)
            method.training_stream(self.stream)  # it may be too small for a method, or too large
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def _read(self, method: ContinualMethod, folder: Path) -> dict[str, Any]:
        """Read the results of a finished run, which must be of this method and stream."""
        check_method(method, read_json(folder / METHOD), folder)
        self.stream.check_manifest(read_json(folder / MANIFEST))
        say(f"\n{method.name}: finished earlier, in {folder.parent}")
        results = read_json(folder / RESULTS)
        results.pop("sha256", None)  # of the files, which only the file has
        return results

    def frozen(self, file: Path | None) -> Results:
        """Return the rows of the frozen backbone; the embedded one has rows with random weights, as a lower bound.

        Args:
            file: where they are kept; None to keep them nowhere.
        """
        args = self.arguments.training
        if file is not None and file.exists():
            return read_json(file)
        model: Any = self.new_model()
        model.to(args.device).eval()
        extractors: dict[str, Extract] = {"frozen": head_features(model)}
        if self.arguments.model.model_name_or_path is None:
            extractors = {"random": random_weights(model.config, args), **extractors}
        rows = frozen_rows(self.stream, self.processor, args, extractors)
        if file is not None:
            write_json(file, rows, rows=True)
        return rows


def exemplars(rows: Results, images: int) -> str:
    """Return a sentence on how many training images the methods of a table keep; nothing where none keeps any.

    Args:
        rows: results by the name of the row.
        images: number of all training images.
    """
    kept = {name: row["memory"]["images"] for name, row in rows.items() if row.get("memory", {}).get("images")}
    if not kept:
        return ""
    shares = ", ".join(f"{name} {count:,} ({100 * count / images:.3g} %)" for name, count in kept.items())
    every = [name for name, count in kept.items() if count >= images]
    more = (
        f" A memory of all images repeats the whole stream: --method {every[0]} --memory_size N keeps fewer."
        if every
        else ""
    )
    return f"Kept at the end, of {images:,} training images: {shares}.{more}"


def head_features(model: Model) -> Extract:
    """Return the input of a model's head, as an extractor."""
    learner = stream_model(model)

    def extract(pixels: Tensor) -> Tensor:
        with torch.no_grad(), head_inputs(learner) as features:
            model(pixel_values=pixels)
        return features[0]

    return extract


def say(text: str) -> None:
    """Print a line on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)
