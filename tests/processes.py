"""Several processes of a data-parallel run, played by threads that meet at each collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def run(count: int, work: Callable[..., Any]) -> list[Any]:
    """Results of `work(rank, reduce, gather, broadcast)` on each process.

    A collective of differing shapes fails, as it would hang or crash between processes.
    """
    barrier, sent = threading.Barrier(count, timeout=30), [torch.empty(0)] * count

    def process(rank: int) -> Any:
        def exchange(tensor: Tensor) -> list[Tensor]:
            sent[rank] = tensor.clone()
            barrier.wait()
            received = list(sent)
            barrier.wait()
            assert len({(tensor.shape, tensor.dtype) for tensor in received}) == 1
            return received

        try:
            return work(
                rank,
                lambda tensor: torch.stack(exchange(tensor)).sum(0),
                lambda tensor: torch.cat(exchange(tensor)),
                lambda tensor: exchange(tensor)[0],
            )
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(process, rank) for rank in range(count)]]
