"""Time steps and evaluations in turn, and print the table of `examples/benchmark.py --speed`."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import platform
import queue
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from ..cli.console import whole
from . import speed_input, speed_statistics
from .contenders import SIZES, Evaluation, PlainLoop, Setting, Threaded, counting, ours, plain_model, products

PLAIN, CACHED, LIVE, UNPROJECTED = "plain loop", "ours, cached", "ours, live", "ours, cached, not projected"
COMPILED = "ours, cached, compiled"  # with --compile
READ = ", last block read"  # the rows with all exact savings, which the bars are about
NAMES = {"tiny": "a tiny ViT", "ti": "ViT-Ti/16", "b": "ViT-B/16"}
RATE = {"tiny": 0.0, "ti": 0.80, "b": 0.90}  # bar of the share of the matrix-product rate


class Step(Protocol):
    """A contender: a call is a step."""

    def __call__(self) -> None: ...
    def close(self) -> None: ...


TRAINING: dict[str, tuple[str, Callable[[Setting], Step]]] = {
    PLAIN: ("two networks, a query in every step, the host reads the loss: as released code, in our lines", PlainLoop),
    LIVE: ("L2P with pgp at defaults, queries computed in every step", lambda setting: ours(setting, False)),
    LIVE + READ: ('the same with last_block="read"', lambda setting: ours(setting, False, last_block="read")),
    CACHED: ("L2P with pgp at defaults, queries known", lambda setting: ours(setting, True)),
    CACHED + READ: ('the same with last_block="read"', lambda setting: ours(setting, True, last_block="read")),
    COMPILED: ("L2P with pgp, queries known, compile_trunk", lambda setting: ours(setting, True, compile_trunk=True)),
    UNPROJECTED: ("L2P without projection, queries known", lambda setting: ours(setting, True, projected=False)),
    "full fine-tuning": ("transformers' Trainer, all weights", lambda setting: plain_model(setting, False)),
    "LoRA": ("transformers' Trainer, PEFT's LoRA of rank 8 on queries and values", lambda s: plain_model(s, True)),
}


class PlainEvaluation:
    """Evaluate by the plain loop's networks."""

    def __init__(self, setting: Setting) -> None:
        self.loop = PlainLoop(setting)

    def __call__(self) -> None:
        self.loop.evaluate()

    def close(self) -> None:
        """Have nothing to end."""


EVALUATION: dict[str, tuple[str, Callable[[Setting], Step]]] = {
    PLAIN: ("query and prediction of each image", PlainEvaluation),
    CACHED: ("at defaults, queries known", Evaluation),
    CACHED + READ: ('the same with last_block="read"', lambda setting: Evaluation(setting, read=True)),
}


@dataclass
class Timing:
    """What was measured of a contender.

    Attributes:
        seconds: of each round's steps, one step each.
        flops: of a step's matrix products.
        memory: peak, in bytes, of its model, its state and a step.
    """

    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    memory: int | None = None

    @property
    def median(self) -> float:
        """Return the median of a step's seconds."""
        return statistics.median(self.seconds)

    def faster_than(self, other: Timing) -> float:
        """Return how many times as long the other takes: the median over the rounds, in each of which both took their turn."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    @property
    def spread(self) -> float:
        """Return half of the range between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class Bar(NamedTuple):
    """What is demanded, and what was measured.

    Attributes:
        what: in words, with the bar.
        met: True or False; None where it could not be measured.
        shown: the value in words.
    """

    what: str
    met: bool | None
    shown: str


def clock(device: torch.device) -> float:
    """Return seconds: of all threads of this process on a CPU, which others may use as well, and else of the wall."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turn(made: dict[str, Step], setting: Setting, rounds: int, steps: int, timings: dict[str, Timing]) -> None:
    """Time `steps` steps of each contender in each of `rounds` rounds, in turn, after a round of warming up."""
    for number in range(-1, rounds):
        names = list(made)
        for name in names if number % 2 else reversed(names):
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = clock(setting.device)
            for _ in range(steps):
                made[name]()
            seconds = (clock(setting.device) - start) / steps
            if setting.device.type == "cuda":
                held = timings[name].memory or 0
                peak = torch.cuda.max_memory_allocated() - before
                timings[name].memory = held if number >= 0 else held + peak
            if number >= 0:
                timings[name].seconds.append(seconds)


def count_flops(step: Step) -> int:
    """Return the operations of a step's matrix products."""
    with counting() as counter:
        step()
    return int(counter.get_total_flops())


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed.

    What is returned to the system is cleared when it is taken again, and whose step pays for that, up to 6 % of it, is left
    to the order of all contenders' allocations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # one arena, no mapping of its own, no trimming
            mallopt(parameter, value)


def matrix_rate(setting: Setting) -> float:
    """Return the operations a second of the best of the model's own matrix products."""
    best = 0.0
    for a, b in products(setting):
        operations = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        repeat = max(2, int(2e9 if setting.device.type == "cpu" else 2e12) // operations)
        torch.mm(a, b)
        for _ in range(5):
            start = clock(setting.device)
            for _ in range(repeat):
                torch.mm(a, b)
            best = max(best, repeat * operations / (clock(setting.device) - start))
    return best


def _resident() -> int:
    """Return the largest memory that this process has had so far, in kilobytes."""
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak(make: Callable[[Setting], Step], setting: Setting, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        small = make(replace(setting, size="tiny", batch=1, pixels=32))  # what is imported and allocated once
        small()
        small.close()
        before = _resident()
        step = make(setting)
        for _ in range(2):
            step()
        answer.put((_resident() - before) * 1024)
        step.close()
    except BaseException:
        answer.put(None)
        raise


def memory_on_cpu(make: Callable[[Setting], Step], setting: Setting, threads: int) -> int | None:
    """Return by how many bytes a process of its own grows for a model and two steps; None where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("fork")  # nothing has run in threads yet
    answer = context.Queue()
    process = context.Process(target=_peak, args=(make, setting, threads, answer))
    process.start()
    try:
        while process.is_alive() or not answer.empty():
            with suppress(queue.Empty):  # however long it takes on a busy machine, while nothing has killed it
                found: int | None = answer.get(timeout=1)
                return found
        return None
    finally:
        process.join(5)
        process.kill()


def measure(
    contenders: dict[str, tuple[str, Callable[[Setting], Step]]],
    setting: Setting,
    rounds: int,
    steps: int,
    memory: dict[str, int | None],
) -> dict[str, Timing]:
    """Return what was measured of each contender; on a CPU its peak memory is that given."""
    made: dict[str, Step] = {}
    timings = {name: Timing(memory=memory.get(name)) for name in contenders}
    for name, (_, make) in contenders.items():
        cuda = setting.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        made[name] = make(setting)
        if cuda:
            timings[name].memory = torch.cuda.memory_allocated() - before
    try:
        time_in_turn(made, setting, rounds, steps, timings)
        for name, step in made.items():
            timings[name].flops = _flops(name, step, timings)
    finally:
        for step in made.values():
            step.close()
    return timings


def _flops(name: str, step: Step, timings: dict[str, Timing]) -> int:
    """Return the operations of a step; a `Trainer` runs in its thread, where they are counted by its own mode."""
    if name == COMPILED:  # whose kernels no mode sees
        return timings[CACHED].flops
    return step.flops() if isinstance(step, Threaded) else count_flops(step)


def bars(training: dict[str, Timing], evaluation: dict[str, Timing], size: str, rate: float) -> list[Bar]:
    """Return the bars, and whether they are met."""
    plain = training[PLAIN]

    def faster(rows: dict[str, Timing], what: str, name: str, least: float) -> Bar:
        value, usual = (rows[one].faster_than(rows[PLAIN]) for one in (name + READ, name))
        floor = rows[PLAIN].flops / rows[name + READ].flops
        shown = f"{value:.2f} times ({usual:.2f} at defaults; by the number of operations {floor:.2f})"
        return Bar(f"{what}, {name}{READ}: at least {least} times the plain loop", value >= least, shown)

    found = [
        faster(training, "training", CACHED, 1.55),
        faster(training, "training", LIVE, 1.06),
        faster(evaluation, "evaluation", CACHED, 2.2),
    ]
    for name in (LIVE, LIVE + READ, CACHED, CACHED + READ):
        own, what = training[name].memory, f"peak memory, {name}: below the plain loop"
        if own is None or not plain.memory:
            found.append(Bar(what, None, "not measured"))
        else:
            found.append(Bar(what, own < plain.memory, f"{own / plain.memory:.2f} of it"))
    cost = training[UNPROJECTED].faster_than(training[CACHED]) - 1
    found.append(Bar(f"projection, {CACHED}: at most 2 % of a step", cost <= 0.02, f"{100 * cost:.1f} %"))
    if RATE[size]:
        share = training[LIVE].flops / training[LIVE].median / rate
        what = f"matrix-product rate, {LIVE}: at least {RATE[size]:.0%}"
        found.append(Bar(what, share >= RATE[size], f"{share:.1%}"))
    return found


def table(
    rows: dict[str, Timing], contenders: dict[str, tuple[str, Any]], setting: Setting, rate: float, what: str
) -> list[str]:
    """Return the lines of a table of contenders."""
    lines = [
        f"| {what} | images/s | spread | plain loop = 1 | matrix rate | peak memory | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, timing in rows.items():
        memory = "–" if timing.memory is None else f"{timing.memory / 2**20:,.0f} MiB"
        share, images = timing.flops / timing.median / rate, setting.batch / timing.median
        lines.append(
            f"| {name} | {images:,.{1 if images >= 5 else 2}f} | ± {timing.spread:.1%} | {timing.faster_than(rows[PLAIN]):.2f} | "
            f"{share:.0%} | {memory} | {contenders[name][0]} |"
        )
    return lines


def report(
    setting: Setting, training: dict[str, Timing], evaluation: dict[str, Timing], rate: float, args: argparse.Namespace
) -> list[str]:
    """Return the lines of the tables and bars of one model."""
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    on = torch.cuda.get_device_name() if setting.device.type == "cuda" else f"CPU, {threads}"
    kind = "bf16 autocast" if setting.half else "float32"
    lines = [
        "",
        f"## {NAMES[setting.size]}, {setting.pixels} px, {setting.batch} images a step, {kind}, {on}",
        "",
        *table(training, TRAINING, setting, rate, "training"),
        "",
        *table(evaluation, EVALUATION, setting, rate, "evaluation"),
        "",
    ]
    for bar in bars(training, evaluation, setting.size, rate):
        met = {True: "met    ", False: "NOT MET", None: "unknown"}[bar.met]
        lines.append(f"    {met}  {bar.what}: {bar.shown}")
    lines += [
        "",
        f"Matrix rate: operations of the matrix products that a step executes, those of attention included as PyTorch counts "
        f"them on a GPU, a second, as a share of {rate / 1e9:,.0f} GFLOP/s, the best of the model's own shapes alone.",
    ]
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options that go with `--speed`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py --speed",
        description="Time training steps and evaluations of L2P beside a plain loop, full fine-tuning and LoRA, on random "
        "weights. All take turns in one process; images are on the device already. On a CPU, seconds are those of all "
        "threads of the process, so that other programs on the machine hardly matter.",
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if cuda else "cpu",
        help="where to run (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(SIZES), default=["ti", "b"], help="sizes of the ViT (default: ti b)"
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        nargs="+",
        help="images in a step, for each model or for all (default: tiny 8, ti 8, b 4; on a GPU 8, 512, 256)",
    )
    parser.add_argument("--pixels", type=whole(16), default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--rounds", type=whole(1), help="rounds in which all take their turn (default: 5; on a GPU 7)")
    parser.add_argument("--steps", type=whole(1), help="steps of each in a round (default: 1; on a GPU 4)")
    parser.add_argument(
        "--threads", type=whole(1), default=torch.get_num_threads(), help="threads on a CPU (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help=f"add a row '{COMPILED}', with compile_trunk")
    parser.add_argument("--float32", action="store_true", help="no bf16 autocast on a GPU")
    args = parser.parse_args(list(argv))
    on_gpu = args.device == "cuda"
    usual = {"tiny": 8, "ti": 512, "b": 256} if on_gpu else {"tiny": 8, "ti": 8, "b": 4}
    given = args.batch or [usual[size] for size in args.models]
    args.batch = given if len(given) > 1 else given * len(args.models)
    if len(args.batch) != len(args.models):
        parser.error(f"--batch has {len(args.batch)} numbers for {len(args.models)} models: give one for each, or one")
    args.rounds = args.rounds or (7 if on_gpu else 5)
    args.steps = args.steps or (4 if on_gpu else 1)
    return args


def main(argv: Sequence[str]) -> int:
    """Print the tables; return the exit code."""
    args = parse(argv)
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", category=UserWarning)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}"
    )
    settings = [
        Setting(size, batch, device, device.type == "cuda" and not args.float32, args.pixels)
        for size, batch in zip(args.models, args.batch, strict=True)
    ]
    training = {name: each for name, each in TRAINING.items() if name != COMPILED or args.compile}
    on_cpu = device.type == "cpu"
    peaks = [
        {name: memory_on_cpu(make, setting, args.threads) if on_cpu else None for name, (_, make) in each.items()}
        for setting in settings
        for each in (training, EVALUATION)
    ]
    torch.set_num_threads(args.threads)
    if on_cpu:
        keep_freed_memory()
    print("\n".join(speed_input.report(args.pixels, args.rounds)), flush=True)
    for i, setting in enumerate(settings):
        rate = matrix_rate(setting)
        found = [
            measure(each, setting, args.rounds, args.steps, peaks[2 * i + j])
            for j, each in enumerate((training, EVALUATION))
        ]
        print("\n".join(report(setting, found[0], found[1], rate, args)), flush=True)
    print("\n".join(speed_statistics.table(settings[0], args.rounds, partial(clock, device))), flush=True)
    return 0
