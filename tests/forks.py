"""Run work in forked children of this process, which has imported everything: a run costs its training alone.

A child ends by itself or is killed, and this process goes on. Several children can be the processes of one
data-parallel run, as `torchrun` would start them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate.state import AcceleratorState

Work = Callable[[], object]
LONGEST = 120.0  # seconds that a child may take


def start(work: Work, log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Start work in a child; return its process id."""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(environment or {})
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(to, 1), os.dup2(to, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has replaced both
        AcceleratorState._reset_state(True)  # of earlier tests in this process
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(*pids: int, longest: float = LONGEST) -> list[int]:
    """Return the exit codes of children, minus the signal for those that were killed.

    When one of several fails, the others get a second to end by themselves, since they may wait for it in a collective,
    and are killed then. Children that take too long are killed as well.
    """
    codes: dict[int, int] = {}
    end = time.monotonic() + longest
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    end = end if codes[pid] == 0 else min(end, time.monotonic() + 1)
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run(work: Work, log: Path) -> int:
    """Do work in a child; return its exit code."""
    return wait(start(work, log))[0]


def together(count: int, work: Callable[[int], object], log: Path, longest: float = LONGEST) -> list[int]:
    """Do work in the processes of one data-parallel run, each of which gets its rank; return their exit codes.

    The ranks are in the logs' names.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}

    def child(rank: int) -> int:
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        return start(lambda: work(rank), log.with_name(f"{log.name}.{rank}"), own)

    return wait(*[child(rank) for rank in range(count)], longest=longest)
