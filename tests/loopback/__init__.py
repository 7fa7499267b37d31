"""Users of the loopback Hub, and a Python process that talks to it through the real `huggingface_hub`.

The libraries read `HF_ENDPOINT` when they are imported, and the tests' own process imported them with
`HF_HUB_OFFLINE=1`; hence a second process, which is started once and keeps its imports (not its variables).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import Hub, User

TOKEN, READER, STRANGER = "hf_secretOfMe", "hf_secretOfReader", "hf_secretOfStranger"
USERS = {
    TOKEN: User("me", organizations=("team",)),
    READER: User("me", organizations=("team",), write=False),
    STRANGER: User("stranger"),
}


def environment(hub: Hub, home: Path, token: str | None = TOKEN, **variables: str) -> dict[str, str]:
    """Of a process whose Hub is `hub`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    tests = Path(__file__).parents[1]
    return {
        **clean,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        **({"HF_TOKEN": token} if token else {}),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        **variables,
    }


@dataclass(frozen=True)
class Answer:
    """What a snippet left: its variable `result` (through JSON), and all that it printed or warned."""

    value: Any
    out: str
    error: str | None


class Python:
    """The second process; it starts with the first snippet, and anew after one that did not answer."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.env, self.log = env, log
        self.process: subprocess.Popen | None = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def start(self, code: str, **names: Any) -> None:
        """Run `code` with the variables `names`, without waiting."""
        if self.process is None:
            with self.log.open("a") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("worker.py"))],
                    env=self.env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
        self.process.stdin.write(json.dumps({"code": textwrap.dedent(code), "names": names}) + "\n")
        self.process.stdin.flush()

    def answer(self, fails: bool = False, timeout: float = 250) -> Answer:
        """What the snippet started last left; AssertionError when it fails, or when it does not although it should."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            raise AssertionError(
                f"{'the process died' if ready else f'no answer within {timeout:g} s'}:\n{self.log.read_text()[-2000:]}"
            )
        answer = Answer(**json.loads(line))
        assert bool(answer.error) == fails, f"{answer.error}\n{answer.out}"
        return answer

    def __call__(self, code: str, fails: bool = False, **names: Any) -> Answer:
        self.start(code, **names)
        return self.answer(fails)
