"""Spare what libraries do anew for every run, task or batch; nothing that is computed changes."""

from __future__ import annotations

import functools
import gc

import jinja2
import torch
from accelerate.utils import imports, memory


class _Garbage:
    """Automatic collections alone: those that a `Trainer` asks for, one per task, go through all that is imported."""

    collect = staticmethod(lambda *generation: 0)


def spare() -> None:
    """Keep templates and answers about packages, and leave out what a machine without a GPU has no use for."""
    # the templates of model cards, one of them PEFT's, are compiled for every task and checkpoint of every run
    jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)
    # is DeepSpeed installed, is LOMO? the path is searched in every step
    imports._is_package_available = functools.cache(imports._is_package_available)
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None  # which would format and keep a stack trace for each seed
    memory.gc = _Garbage


def freeze() -> None:
    """Leave what has been imported out of collections of garbage."""
    gc.collect()
    gc.freeze()
