"""Measure how the cost of a task grows with the sizes of a stream: `examples/benchmark.py --growth`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import check_utf8
from ..runs.atomic import write_json
from ..runs.reading import read_json
from .growth_figure import draw
from .growth_points import SECONDS, Point, measure_alone

BASE = Point()
SLACK = 0.15
"""By how much a measured exponent may exceed the expected one: what noise makes of it."""
APART = 4.0
"""The least ratio of sizes between which growth is measured: over smaller ones, noise would look like it."""


@dataclass(frozen=True)
class Sweep:
    """A quantity that is varied.

    Attributes:
        name: of the quantity.
        points: streams that differ in it alone.
        size: what it is called in a `Point`.
        most: the largest exponent by which each measure should grow; 1 for those that are not named.
        why: of exponents above 1, and of those below.
    """

    name: str
    points: Sequence[Point]
    size: str
    most: dict[str, float]
    why: str

    @property
    def sizes(self) -> list[int]:
        """Return the values of the quantity."""
        return [attrgetter(self.size)(point) for point in self.points]


def _vary(base: Point, name: str, values: Sequence[Any]) -> list[Point]:
    return [replace(base, **{name: value}) for value in values]


SAME_FILES = dict.fromkeys(("adapter", "bases", "other files", "checkpoint", "whole run"), 0.0)
SWEEPS = (
    Sweep(
        "tasks",
        _vary(replace(BASE, classes=2, images=4, figures=True), "tasks", (10, 20, 50, 100)),
        "tasks",
        {"training": 0, "statistics": 0, "whole run": 2},
        "A task is evaluated on the images of all tasks so far, and its folder has the head of all classes and the results "
        "of all tasks: over a run, these grow by the square.",
    ),
    Sweep(
        "classes",
        _vary(replace(BASE, tasks=5, images=2), "classes", (20, 50, 100, 200)),
        "all_classes",
        {},
        "Images grow with the classes.",
    ),
    Sweep(
        "training images of a class",
        _vary(BASE, "images", (8, 20, 50, 100)),
        "images",
        {"evaluation": 0, "files": 0, **SAME_FILES, "bases": 1, "whole run": 1},
        "Bases grow until they span what images depend on.",
    ),
    Sweep("entries of the pool", _vary(BASE, "pool", (10, 20, 40, 80)), "pool", {}, "Each entry has a basis."),
    Sweep(
        "prompt length, functional",
        _vary(BASE, "length", (2, 4, 8, 16, 32)),
        "length",
        {},
        "A basis has the length times the width in dimensions. Up to 1,024 of them, eigenvectors of the full moment are "
        "computed, at the cost of their cube; above that, a sketch of rows makes a straight line of it.",
    ),
    Sweep(
        "prompt length, pgp",
        _vary(replace(BASE, projection="pgp"), "length", (2, 4, 8, 16, 32)),
        "length",
        {},
        "A basis has the width in dimensions, whatever the length.",
    ),
    Sweep(
        "patches of an image",
        _vary(BASE, "pixels", (32, 64, 128, 224)),
        "tokens",
        SAME_FILES,
        "Attention grows by the square, and is the smaller part in images of a few hundred patches.",
    ),
    Sweep(
        "width of the model",
        _vary(BASE, "width", (48, 96, 192, 384)),
        "width",
        dict.fromkeys(
            ("training", "statistics", "evaluation", "memory", "adapter", "bases", "checkpoint", "whole run"), 2.0
        ),
        "Weights, and the covariance of the statistics head, have the square of the width in numbers; eigenvectors are as "
        "for the length.",
    ),
)
QUICK = (replace(SWEEPS[0], points=_vary(replace(BASE, classes=2, images=2, pool=4), "tasks", (2, 4))),)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the power by which values grow with sizes where they grow fastest, over a factor of four at least."""
    x, y = (np.log(np.asarray(one, dtype=np.float64)) for one in (sizes, values))
    last = len(sizes) - 1
    pairs = [(i, j) for j in range(last + 1) for i in range(j) if sizes[j] >= APART * sizes[i]] or [(0, last)]
    return max(float((y[j] - y[i]) / (x[j] - x[i])) for i, j in pairs)


def curves(found: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the values of each measure, over the points of a sweep."""
    flat = [{**one["seconds"], "memory": one["memory"], **one["bytes"]} for one in found]
    return {name: [one[name] for one in flat] for name in flat[0] if all(one[name] for one in flat)}


def judge(sweep: Sweep, found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values, the exponent, the largest one expected and the verdict of each measure."""
    judged = {}
    for name, values in curves(found).items():
        power, most = exponent(sweep.sizes, values), float(sweep.most.get(name, 1))
        judged[name] = {"values": values, "exponent": power, "at most": most, "met": power <= most + SLACK}
    return judged


def table(sweep: Sweep, judged: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a sweep's table."""
    lines = [
        "",
        f"## {sweep.name}",
        "",
        f"| a task | {' | '.join(map(str, sweep.sizes))} | exponent | at most | |",
        f"|---|{'---|' * (len(sweep.sizes) + 3)}",
    ]
    for name, one in judged.items():
        in_seconds = name in (*SECONDS, "drawing")
        scale, unit = (1e3, "ms") if in_seconds else (1e-6, "MB") if name in ("memory", "whole run") else (1e-3, "kB")
        values = " | ".join(f"{scale * value:,.{1 if unit == 'MB' else 0}f}" for value in one["values"])
        met = "" if one["met"] else "FASTER"
        lines.append(f"| {name}, {unit} | {values} | {one['exponent']:.2f} | {one['at most']:g} | {met} |")
    return [*lines, "", sweep.why]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options that go with `--growth`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py --growth",
        description="Measure how the time, the memory and the files of a task grow: with the number of tasks and classes, "
        "training images, entries of the pool, the length of prompts, the size of images and the width of the model. "
        "Streams of random images are learned by a small ViT of random weights, each in a process of its own, one "
        "quantity at a time. Seconds are those of the process, on one thread, so that other programs hardly matter; the "
        "least of the last tasks counts. Files are those of the last task's folder, and of the whole run. An exponent is "
        f"the power by which a measure grows where it grows fastest, over a factor of {APART:g} at least: 0 does not grow, "
        "1 is a straight line, 2 a square. A table is printed; OUTPUT_DIR has growth.json, growth.png and growth.svg. "
        "The same command continues what was interrupted.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/growth"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="run two small streams only, to see that it works")
    parser.add_argument(
        "--sweeps", nargs="+", help="quantities to vary, by the beginnings of their names (default: all)"
    )
    args = parser.parse_args(list(argv))
    args.chosen = QUICK if args.quick else SWEEPS
    if args.sweeps:
        names = [one.name for one in args.chosen]
        for start in args.sweeps:
            if not any(name.startswith(start) for name in names):
                parser.error(f"--sweeps {start!r}: expected the beginning of one of {', '.join(map(repr, names))}")
        args.chosen = [one for one in args.chosen if one.name.startswith(tuple(args.sweeps))]
    return args


def find(point: Point, folder: Path) -> dict[str, Any]:
    """Return what a point costs: as it was measured here earlier, or else measured now and kept."""
    path, here = folder / "points" / f"{point.label}.json", _here()
    try:
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete it, to have this measured again.") from error
    if found is None or found.get("measured by") != here:  # growth between versions or machines would mean nothing
        found = {**measure_alone(point), "measured by": here}
        write_json(path, found, rows=True)
    return found


def _here() -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write results and figure; return the exit code."""
    args = parse(argv)
    check_utf8(args.output_dir)
    (args.output_dir / "points").mkdir(parents=True, exist_ok=True)  # before what takes minutes
    print(_here())
    content: dict[str, Any] = {}
    for sweep in args.chosen:
        judged = judge(sweep, [find(point, args.output_dir) for point in sweep.points])
        print("\n".join(table(sweep, judged)), flush=True)
        content[sweep.name] = {
            "sizes": sweep.sizes,
            "measures": judged,
            "why": sweep.why,
            "points": [asdict(point) for point in sweep.points],
        }
    write_json(args.output_dir / "growth.json", content, rows=True)
    figure = args.output_dir / "growth.png"
    draw(content, figure)
    faster = [
        f"{name}: {measure}"
        for name, sweep in content.items()
        for measure, one in sweep["measures"].items()
        if not one["met"]
    ]
    print(f"\nFaster than expected: {', '.join(faster) or 'nothing'}. Figure in {figure}")
    return 0
