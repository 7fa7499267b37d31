"""Train and evaluate the same model in several ways, one step at a time, for `speed` to time them in turn."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import PIL.Image
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from ..data.stream import TaskStream
from ..projection import ProjectionConfig
from ..training.arguments import PGPTrainingArguments
from ..training.pgp_trainer import PGPTrainer
from ..tuners.l2p import L2PConfig

SIZES = {
    "tiny": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 2},
    "ti": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12},
    "b": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
}
CLASSES, TASKS = 100, 10
OWN = CLASSES // TASKS  # of a task


def counting() -> FlopCounterMode:
    """Return a mode that counts the operations of matrix products, those of attention on a CPU as those on a GPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch's own list lacks
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    own: dict[Any, Callable[..., int]] = {
        attention: lambda q, k, v, *args, **kwargs: flop_counter.sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *args, **kwargs: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=own)


class Stopped(Exception):
    """End a run that has been timed."""


@dataclass
class Setting:
    """What all contenders have in common.

    Attributes:
        size: of the model, one of `SIZES`.
        batch: images in a step.
        device: where they run.
        half: autocast to bf16.
    """

    size: str
    batch: int
    device: torch.device
    half: bool = False
    pixels: int = 224

    def model(self) -> ViTForImageClassification:
        """Return the model with random weights, the same each time."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {**SIZES[self.size], "image_size": self.pixels, "num_labels": CLASSES}
        return ViTForImageClassification(ViTConfig(**sizes))

    def batches(self, queries: bool) -> list[dict[str, Tensor]]:
        """Return a few batches on the device, with queries where they are known beforehand."""
        made, width = [], SIZES[self.size]["hidden_size"]
        for i in range(2):
            on: Any = {"generator": torch.Generator(self.device).manual_seed(i), "device": self.device}
            batch = {
                "pixel_values": torch.randn(self.batch, 3, self.pixels, self.pixels, **on),
                "labels": torch.randint(OWN, (self.batch,), **on),
            }
            if queries:
                batch["prompt_query"] = torch.randn(self.batch, width, **on)
            made.append(batch)
        return made

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the precision of what runs without a `Trainer`."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    def arguments(self, folder: str) -> dict[str, Any]:
        """Return what every `Trainer` is given."""
        return {
            "output_dir": folder,
            "use_cpu": self.device.type == "cpu",
            "per_device_train_batch_size": self.batch,
            "max_steps": 10**6,
            "learning_rate": 1e-3,
            "bf16": self.half,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }


class Batches(Dataset[dict[str, Tensor]]):
    """Give the same batches over and over."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 10**5

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.batches[index % len(self.batches)])


class Gate(TrainerCallback):
    """Hold a `Trainer` before each step until it may go on."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stop = self.count = False
        self.flops = 0
        self._counter: FlopCounterMode | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = int(self._counter.get_total_flops()), None
        self.done.release()  # the step before, or the preparation, is over
        self.go.acquire()
        if self.stop:
            raise Stopped
        if self.count:  # a mode counts what its own thread does
            self._counter, self.count = counting(), False
            self._counter.__enter__()


class Threaded:
    """Run a `Trainer` in a thread of its own, one step at a time.

    Args:
        train: runs it, with this callback.
    """

    def __init__(self, train: Callable[[Gate], None]) -> None:
        self.gate = Gate()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, train: Callable[[Gate], None]) -> None:
        try:
            train(self.gate)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.gate.done.release()

    def _wait(self) -> None:
        self.gate.done.acquire()
        if self.error is not None:
            raise RuntimeError("a contender has failed") from self.error

    def __call__(self) -> None:
        self.gate.go.release()
        self._wait()

    def flops(self) -> int:
        """Take a step, and return the operations of its matrix products."""
        self.gate.count = True
        self()
        return self.gate.flops

    def close(self) -> None:
        """Let the run end."""
        self.gate.stop = True
        self.gate.go.release()
        self._thread.join()


class LoadedPGPTrainer(PGPTrainer):
    """Train on batches that are on the device already: this times steps, and not the reading of images."""

    batches: list[dict[str, Tensor]]

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self.batches), batch_size=None)


class LoadedTrainer(Trainer):
    """A `Trainer` of transformers on such batches."""

    batches: list[dict[str, Tensor]]

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self.batches), batch_size=None)


def _stream() -> TaskStream:
    """Return ten tasks of ten classes, with an image each, which no step reads."""
    image = PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(CLASSES)])}
    )
    rows = datasets.Dataset.from_dict({"image": [image] * CLASSES, "label": list(range(CLASSES))}, features=features)
    splits = datasets.DatasetDict(train=rows, test=rows)
    return TaskStream.from_dataset(splits, num_tasks=TASKS, seed=None)


def ours(setting: Setting, cached: bool, projected: bool = True, **options: Any) -> Threaded:
    """Return L2P by `PGPTrainer`; projected by bases of half the width, as a second task has them.

    Args:
        setting: what all contenders have in common.
        cached: queries are known.
        projected: by `pgp`.
        options: further training arguments.
    """

    def train(gate: Gate) -> None:
        model = get_peft_model(setting.model(), L2PConfig())
        with tempfile.TemporaryDirectory() as folder:
            arguments = {**setting.arguments(folder), "verify_images": False, "augmentation": "none", **options}
            args = PGPTrainingArguments(**arguments, cache_queries=cached)
            processor = ViTImageProcessorPil(size={"height": setting.pixels, "width": setting.pixels})
            projection = ProjectionConfig(method="pgp" if projected else "none")
            trainer = LoadedPGPTrainer(
                model, args, _stream(), projection, processing_class=processor, callbacks=[gate]
            )
            trainer.batches = setting.batches(cached)
            if projected:
                trainer.projection.load_state(*_bases(trainer))
            trainer.train_task(0)

    return Threaded(train)


def _bases(trainer: PGPTrainer) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return bases of half the width, and their description."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, object] = trainer.projection.config.to_dict()
    for name, parameter in cast(Any, trainer.stream_model).prompt_parameters().items():
        width = parameter.shape[-1]
        drawn = torch.randn(width, width // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tensors[name] = torch.linalg.qr(drawn).Q
        described[name] = {
            "shape": [parameter.numel() // width, width],
            "batch_dims": 0,
            "rank": width // 2,
            "energy": 0.95,
            "role": "key" if parameter.ndim == 2 else "prompt",
            "samples": 1,
            "rank_per_task": [width // 2],
        }
    return tensors, described


def plain_model(setting: Setting, lora: bool) -> Threaded:
    """Return transformers' own `Trainer` on the whole model, or on PEFT's LoRA of rank 8."""

    def train(gate: Gate) -> None:
        model: Any = setting.model()
        if lora:
            config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
            model = get_peft_model(model, config)
        with tempfile.TemporaryDirectory() as folder:
            trainer = LoadedTrainer(model, TrainingArguments(**setting.arguments(folder)), callbacks=[gate])
            trainer.batches = setting.batches(False)
            trainer.train_dataset = Batches(trainer.batches)
            trainer.train()

    return Threaded(train)


class PlainLoop:
    """Do per step what released code of L2P does, in a few lines of our own.

    Two networks: one computes the query of each image in every step, the other has the prompts. The host reads the loss
    and the accuracy after each step.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.batches, self.count = setting, setting.batches(False), 0
        model, frozen = (nn.Module.to(setting.model(), setting.device) for _ in range(2))
        self.queries: ViTModel = frozen.vit.eval().requires_grad_(False)
        self.vit: ViTModel = model.vit.requires_grad_(False)
        self.head = model.classifier
        width = model.config.hidden_size
        self.prompt, self.key = (
            nn.Parameter(torch.empty(*shape, width, device=setting.device).uniform_(-1, 1))
            for shape in ((10, 5), (10,))
        )
        self.learning = [self.prompt, self.key, *self.head.parameters()]
        self.optimizer = torch.optim.Adam(self.learning, lr=1e-3)
        self.allowed = list(range(OWN))

    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, and the similarity of each query with its keys."""
        with torch.no_grad():
            query = self.queries(pixels).last_hidden_state[:, 0]
        similarity = F.normalize(query, dim=-1) @ F.normalize(self.key, dim=-1).T
        values, chosen = similarity.topk(5, dim=-1)
        prompts = self.prompt[chosen].flatten(1, 2)
        hidden = self.vit.embeddings(pixels)
        hidden = torch.cat([prompts.to(hidden.dtype), hidden], dim=1)
        for layer in self.vit.layers:
            hidden = layer(hidden)
        read = self.vit.layernorm(hidden)[:, : prompts.shape[1]].mean(1)
        return self.head(read), values.sum(-1)

    def __call__(self) -> None:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        self.vit.train()
        with self.setting.autocast():
            logits, similarity = self.logits(batch["pixel_values"])
            mask = torch.full_like(logits, float("-inf"))
            mask[:, self.allowed] = 0
            loss = F.cross_entropy((logits + mask).float(), batch["labels"]) - 0.1 * similarity.mean()
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the plain loop's loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        right.item()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Evaluate a batch."""
        self.vit.eval()
        batch = self.batches[0]
        with self.setting.autocast():
            logits, _ = self.logits(batch["pixel_values"])
        (logits.argmax(-1) == batch["labels"]).float().mean().item()

    def close(self) -> None:
        """Have nothing to end."""


class Evaluation:
    """Evaluate a batch of test images by L2P, whose queries are known from an earlier task's evaluation.

    Args:
        setting: what all contenders have in common.
        read: whether the last block computes only the tokens that are read.
    """

    def __init__(self, setting: Setting, read: bool = False) -> None:
        self.setting, self.batch = setting, setting.batches(True)[0]
        self.model = get_peft_model(setting.model(), L2PConfig()).to(setting.device).eval()
        cast(Any, self.model.base_model).read_last_block(read)

    @torch.no_grad()
    def __call__(self) -> None:
        inputs = {name: self.batch[name] for name in ("pixel_values", "prompt_query")}
        with self.setting.autocast():
            logits = self.model(**inputs).logits
        logits.argmax(-1).cpu()

    def close(self) -> None:
        """Have nothing to end."""


def products(setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of matrices of which a block of the model consists, with a batch's tokens."""
    width, inner = SIZES[setting.size]["hidden_size"], SIZES[setting.size]["intermediate_size"]
    tokens = setting.batch * (1 + (setting.pixels // 16) ** 2)
    dtype = torch.bfloat16 if setting.half else torch.float32
    for rows, columns in ((width, width), (width, inner), (inner, width)):
        yield (
            torch.randn(tokens, rows, device=setting.device, dtype=dtype),
            torch.randn(rows, columns, device=setting.device, dtype=dtype),
        )
