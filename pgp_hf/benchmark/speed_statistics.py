"""Time what the end of a task costs: the bases of a projection, and the class statistics of a head."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor

from ..projection import Projection, ProjectionConfig
from ..training.views import head_inputs
from ..tuners.dualprompt import DualPromptConfig
from ..tuners.l2p import L2PConfig
from .contenders import CLASSES, Setting

IMAGES = 500  # of a task
ADAPTERS = ("L2P", "DualPrompt")
Head = Literal["linear", "statistics"]
HEADS: tuple[Head, ...] = ("linear", "statistics")
PGP = "pgp"
PROJECTIONS: dict[str, dict[str, Any]] = {
    PGP: {"method": "pgp"},
    "functional": {"method": "functional"},
    "functional, bf16_probes": {"method": "functional", "bf16_probes": True},
    "functional, bf16_probes, max_images half": {
        "method": "functional",
        "bf16_probes": True,
        "max_images": IMAGES // 2,
    },
}


class Seconds(NamedTuple):
    """What the end of a task takes.

    Attributes:
        image: passes of an image, and the sums over rows.
        task: the bases, and the solution of the head.
    """

    image: float
    task: float

    @property
    def total(self) -> float:
        """Return the seconds of a task of `IMAGES` images."""
        return IMAGES * self.image + self.task


class _Timed(Projection):
    """A projection that times the making of its bases."""

    seconds = 0.0
    clock: Callable[[], float]

    def end_task(self, shapes: Mapping[str, tuple[int, ...]], *args: Any, **kwargs: Any) -> None:
        start = self.clock()
        super().end_task(shapes, *args, **kwargs)
        self.seconds = self.clock() - start


class TaskEnd:
    """End a task of an adapter with a head and a projection as the trainer does, with its images on the device already.

    Queries are computed once. Where the head sees the same in the passes of the projection, it has no pass of its own.

    Args:
        setting: the model.
        clock: returns seconds.
        count: batches of images.
    """

    def __init__(
        self,
        setting: Setting,
        adapter: str,
        head: Head,
        projection: dict[str, Any],
        clock: Callable[[], float],
        count: int,
    ) -> None:
        model = setting.model()
        experts = [i for i in (2, 3, 4) if i < model.config.num_hidden_layers]
        config = L2PConfig(head=head) if adapter == "L2P" else DualPromptConfig(head=head, expert_layers=experts)
        wrapped: Any = get_peft_model(model, config)
        self.tuner: Any = wrapped.to(setting.device).base_model.eval()
        self.tuner.prepare_stream([list(range(CLASSES))], {})
        self.tuner.begin_task(0)  # the head has learned none yet
        self.clock, self.setting, self.config = clock, setting, ProjectionConfig(**{"energy": 0.95, **projection})
        self.batches = [setting.batches(False)[i % 2] for i in range(count)]

    @torch.no_grad()
    def __call__(self) -> Seconds:
        """End the task; return the seconds of each part."""
        start = self.clock()
        given: list[dict[str, Tensor]] = [
            {"pixel_values": batch["pixel_values"], "prompt_query": self.tuner.query(batch["pixel_values"])}
            for batch in self.batches
        ]
        most = round(len(given) * min(self.config.max_images or IMAGES, IMAGES) / IMAGES)
        bases, known = _Timed(self.config), self.tuner.statistics
        bases.clock = self.clock
        with head_inputs(self.tuner) as seen:
            images = (range(i * self.setting.batch, (i + 1) * self.setting.batch) for i in range(most))
            bases.update_bases(self.tuner, zip(given[:most], images, strict=True))
        if known is not None:
            task = known.fresh()
            if len(seen) < len(given) or self.config.bf16_probes:
                with head_inputs(self.tuner) as seen:
                    for batch in given:
                        self.tuner.model(**batch)
            for features, batch in zip(seen, self.batches, strict=True):
                task.update(features, batch["labels"])
        whole = self.clock() - start
        return Seconds((whole - bases.seconds) / len(given) / self.setting.batch, bases.seconds)


def table(setting: Setting, rounds: int, clock: Callable[[], float], batches: int = 2) -> list[str]:
    """Time all of them in turn; return the lines of a table."""
    kind = f"{setting.pixels} px, batches of {setting.batch}, float32 but for bf16_probes"
    lines = [
        "",
        f"## {setting.size}: the end of a task, {kind}",
        "",
        f"| end of a task of {IMAGES} images | linear head | pgp = 1 | statistics head | pgp = 1 |",
        "|---|---|---|---|---|",
    ]
    for adapter in ADAPTERS:
        made = {
            (name, head): TaskEnd(setting, adapter, head, projection, clock, batches)
            for name, projection in PROJECTIONS.items()
            for head in HEADS
        }
        found: dict[tuple[str, str], list[float]] = {key: [] for key in made}
        for number in range(-1, rounds):
            for key in made if number % 2 else reversed(made):
                seconds = made[key]().total
                if number >= 0:
                    found[key].append(seconds)
        median = {key: statistics.median(seconds) for key, seconds in found.items()}
        for name in PROJECTIONS:
            cells = [f"{median[name, head]:,.2f} s | {median[name, head] / median[PGP, head]:.2f}" for head in HEADS]
            lines.append(f"| {adapter}, {name} | {' | '.join(cells)} |")
    return lines
