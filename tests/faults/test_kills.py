"""A run that is killed goes on, and ends with the files that a run has which nobody killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import forks
import kills
import pytest
from stories import STORIES

pytestmark = [pytest.mark.usefixtures("ready"), pytest.mark.timeout(3600)]


class Straight:
    """A run that nobody kills.

    Attributes:
        content: what it leaves.
        operations: event and path of each file operation that it takes.
        states: folder with a copy of the run before each operation, by its number counted from 1.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.states = name, folder / "states"

        def work() -> None:
            kills.keep_states(folder / "run", self.states)
            STORIES[name](folder / "run")

        assert forks.run(work, folder / "log") == 0, (folder / "log").read_text()[-3000:]
        self.content = kills.content(folder / "run")
        self.operations = (self.states / "operations.txt").read_text().splitlines()

    def differs(self, folder: Path, why: str) -> list[str]:
        """Go on with a killed run; return how it differs then from this one, each difference with `why`."""
        log = folder.with_name("log")
        if code := forks.run(lambda: STORIES[self.name](folder), log):
            return [f"{why}: exit code {code}, {log.read_text()[-700:]}"]
        found = kills.content(folder)
        names = [name for name in sorted({*found, *self.content}) if found.get(name) != self.content.get(name)]
        return [
            f"{why}: {name} {'differs' if name in found and name in self.content else 'is not in both'}"
            for name in names
        ]

    def after_kills(self, places: list[int], folder: Path) -> list[str]:
        """Go on from the states before and within some operations; return the differences."""
        differences, tried = [], 0
        for number in places:
            for within in (False, True):
                run = folder / "run"
                shutil.rmtree(run, ignore_errors=True)
                why = self.operations[number - 1]
                if (self.states / str(number)).exists():
                    shutil.copytree(self.states / str(number), run)
                if within and not kills.leave_half(run, why):
                    continue
                tried += 1
                differences += self.differs(run, f"{number} {'within' if within else 'before'} {why}")
        print(f"{self.name}: {len(self.operations)} file operations, {tried} states, {len(differences)} differences")
        return differences


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Straight] = {}

    def get(name: str) -> Straight:
        if name not in known:
            known[name] = Straight(name, tmp_path_factory.mktemp(name))
        return known[name]

    return get


def test_a_sample_of_states(straight, tmp_path):
    run = straight("l2p")
    last = len(run.operations)
    assert not run.after_kills(list(range(last // 8, last, last // 4)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, step", [("l2p", 1), *((name, 9) for name in STORIES if name != "l2p")])
def test_states(straight, tmp_path, name, step):
    run = straight(name)
    assert not run.after_kills(list(range(1, len(run.operations) + 1, step)), tmp_path)


def killed(run: Straight, folder: Path, number: int, kill: kills.Kill) -> int:
    """Kill a run at an operation, in truth; return its exit code."""

    def work() -> None:
        kills.kill_at(number, folder, kill)
        STORIES[run.name](folder)

    return forks.run(work, folder.with_name("killed"))


def test_killed_twice(straight, tmp_path):
    run, folder = straight("l2p"), tmp_path / "run"
    last = len(run.operations)
    assert killed(run, folder, last // 3, "within") == -9
    assert killed(run, folder, last // 3, "before") == -9
    assert not run.differs(folder, "twice")


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_killed_in_truth(straight, tmp_path, name):
    run, differences = straight(name), []
    last = len(run.operations)
    for i, number in enumerate(range(5, last, last // 6)):
        for kill in ("before", "within", "full"):
            folder = tmp_path / f"{number}-{kill}" / "run"
            folder.parent.mkdir()
            code = killed(run, folder, number, kill)
            assert code == (-9 if kill != "full" else 1), (number, kill, code)
            if i % 2:  # once more while it goes on
                assert killed(run, folder, 7 * i, kill) == code
            differences += run.differs(folder, f"{number} {kill}")
    assert not differences


def test_full_disk(straight, tmp_path):
    run, folder = straight("l2p"), tmp_path / "run"
    assert killed(run, folder, len(run.operations) // 2, "full") == 1
    assert "No space left on device" in (tmp_path / "killed").read_text()
    assert not run.differs(folder, "full")
