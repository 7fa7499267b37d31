"""Run the blocks of a frozen backbone as `torch.compile` makes them: one compilation serves all blocks of the same form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import nn

from .layer import PromptLayer

BACKEND: str | Callable[..., Any] = "inductor"
"""Backend of `torch.compile`."""
LIMIT = 64
"""Number of graphs beyond which something is compiled over and over. A run has two to five for each form of block: of its
queries and predictions, in batches of training and evaluation, and of training."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled for each shape that it meets, with graphs of its own.

    Graphs belong to a function's code, which all of its instances share: this one gets a copy.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__)
    made: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)
    return made


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


class Trunk:
    """The blocks of a frozen backbone, which are compiled while `running`, and as they were before and after.

    Args:
        blocks: returns them.
        sizes: returns the numbers of images in a batch that are compiled for. Others, such as that of a last batch, would be
            compiled anew in each task, and run uncompiled.
    """

    def __init__(self, blocks: Callable[[], Iterable[nn.Module]], sizes: Callable[[], Collection[int]]) -> None:
        self._blocks, self.sizes = blocks, sizes
        self.run = compiled(_run)
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the blocks run compiled inside the block.

        Raises:
            RuntimeError: one that cannot be compiled.
        """
        if self._depth:
            yield
            return
        blocks, self._depth = list(self._blocks()), 1
        try:
            for block in blocks:  # their names in a state dict stay, as they would not in a module around each
                block.__dict__["forward"] = _Forward(block, self)
            # a projection's probes go through one graph backward several times, which its buffers must survive
            with torch._dynamo.config.patch(recompile_limit=LIMIT), functorch.patch(donated_buffer=False):
                yield
        finally:
            self._depth = 0
            for block in blocks:
                block.__dict__.pop("forward", None)


class _Forward:
    """The forward pass of a block in a trunk that is running; a copy of the block has its own again."""

    def __init__(self, block: nn.Module, trunk: Trunk) -> None:
        self.block, self.trunk = block, trunk
        self.layers = [module for module in block.modules() if isinstance(module, PromptLayer)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        size = hidden.shape[0]
        if size not in self.trunk.sizes():
            return _run(self.block, *args, **kwargs)
        for layer in self.layers:  # what depends on a pool, which may grow, is made outside of the graph
            layer.prepare(size)
        try:
            return self.trunk.run(self.block, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise RuntimeError(
                f"compile_trunk=True: a {type(self.block).__name__} cannot be compiled ({first_line(error)}): remove what was "
                "added to it, such as hooks, or leave compile_trunk out."
            ) from error
        finally:
            for layer in self.layers:
                layer.prepared = None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.block, "forward")  # of a block that has no attributes yet, and so that of its class


def first_line(error: BaseException) -> str:
    """Return what an error says first, with the error of a backend that it only announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
