"""A run that is killed goes on, and ends with the files that a run has which nobody killed."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

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
        states: folder with a copy of the run before every `step`-th operation, by its number counted from 1.
    """

    def __init__(self, name: str, folder: Path, step: int) -> None:
        self.name, self.states, self.step = name, folder / "states", step

        def work() -> None:
            kills.keep_states(folder / "run", self.states, step)
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
        both = found.keys() & self.content.keys()
        return [
            f"{why}: {name} {'differs' if name in both else 'is not in both'}"
            for name in sorted(found.keys() | self.content.keys())
            if name not in both or found[name] != self.content[name]
        ]

    def has_learned_all(self, run: Path) -> bool:
        """Return whether there is no call that would go on, since a task is learned by a call of its own."""
        return self.name == "surprises" and (run / "task-3").exists()

    def after_kills(self, folder: Path) -> list[str]:
        """Go on from the states before and within every `step`-th operation; return the differences."""
        differences, tried = [], 0
        for number in range(self.step, len(self.operations) + 1, self.step):
            for within in (False, True):
                run = folder / "run"
                shutil.rmtree(run, ignore_errors=True)
                operation = self.operations[number - 1]
                if (self.states / str(number)).exists():
                    shutil.copytree(self.states / str(number), run)
                if within and not kills.leave_half(run, operation):
                    continue
                if self.has_learned_all(run):
                    continue
                tried += 1
                differences += self.differs(run, f"{number} {'within' if within else 'before'} {operation}")
        print(f"{self.name}: {len(self.operations)} file operations, {tried} states, {len(differences)} differences")
        return differences


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Straight]:
    """Return the run of a story, which is trained once."""
    return functools.cache(lambda name: Straight(name, tmp_path_factory.mktemp(name), SAMPLED))


SAMPLED = 121


def test_a_sample_of_states(straight, tmp_path):
    run = straight("l2p")
    assert len(run.operations) > 3 * SAMPLED and not run.after_kills(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, step", [("l2p", 3), *((name, 23) for name in STORIES if name != "l2p")])
def test_states(tmp_path, name, step):
    (tmp_path / "straight").mkdir()
    assert not Straight(name, tmp_path / "straight", step).after_kills(tmp_path)


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
                assert killed(run, folder, 7 * i, kill) in (code, 0)  # it may end before
            if not run.has_learned_all(folder):
                differences += run.differs(folder, f"{number} {kill}")
    assert not differences


def test_full_disk(straight, tmp_path):
    run, folder = straight("l2p"), tmp_path / "run"
    assert killed(run, folder, len(run.operations) // 2, "full") == 1
    assert "No space left on device" in (tmp_path / "killed").read_text()
    assert not run.differs(folder, "full")


def kill_in_the_last_task(run: Straight, folder: Path) -> None:
    """Kill a run as it writes its last checkpoint."""
    at = next(i for i, line in enumerate(run.operations) if "checkpoints/task-3/.checkpoint-4" in line)
    assert killed(run, folder, at + 3, "before") == -9
    assert {path.name for path in folder.glob("*task-*")} == {"task-1", "task-2"}


def test_what_is_safe_to_delete(straight, tmp_path):
    """What the guide to failures lists: a run that goes on without it ends the same."""
    run, folder = straight("l2p"), tmp_path / "run"
    kill_in_the_last_task(run, folder)
    copies = [path for path in folder.iterdir() if (folder / "task-2" / path.name).exists()]
    assert len(copies) > 8
    for path in [*copies, folder / "checkpoints", *folder.glob(".run.lock*"), *folder.glob("task-*/README.md")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    differences = run.differs(folder, "deleted")
    assert all(line.endswith("README.md is not in both") for line in differences) and len(differences) == 2


def test_deleted_features(straight, tmp_path):
    run, folder = straight("l2p"), tmp_path / "run"
    kill_in_the_last_task(run, folder)
    shutil.rmtree(folder / "features")
    differences = {line.partition(": ")[2] for line in run.differs(folder, "deleted")}
    assert differences == {f"features/task-{t}.safetensors is not in both" for t in (1, 2)}
