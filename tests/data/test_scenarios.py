"""What each scenario means: who competes at test time, and how often images are seen."""

from __future__ import annotations

import pytest
import tiny

from pgp_hf.data.scenarios import SCENARIOS

TASKS = [(4, 1), (0,), (3, 2)]


def test_every_scenario_is_found_by_its_name():
    assert list(SCENARIOS) == ["class_incremental", "task_incremental", "online"]
    assert all(scenario.name == name for name, scenario in SCENARIOS.items())
    assert all(scenario.title and scenario.help and "\n" not in scenario.help for scenario in SCENARIOS.values())


@pytest.mark.parametrize("name", ["class_incremental", "online"])
def test_all_seen_classes_compete(name):
    scenario = SCENARIOS[name]
    assert [scenario.allowed_classes(TASKS, 1, task) for task in (0, 1, 2)] == [[4, 1, 0]] * 3
    assert scenario.allowed_classes(TASKS, 2, 0) == [4, 1, 0, 3, 2]


def test_with_the_task_given_its_own_classes_compete():
    scenario = SCENARIOS["task_incremental"]
    for after in (0, 1, 2):
        assert [scenario.allowed_classes(TASKS, after, task) for task in (0, 1, 2)] == [[4, 1], [0], [3, 2]]


def test_only_online_learns_in_one_epoch():
    assert [name for name, scenario in SCENARIOS.items() if scenario.one_epoch] == ["online"]
    assert [name for name, scenario in SCENARIOS.items() if scenario.task_known] == ["task_incremental"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_stream_allows_what_its_scenario_says(scenario):
    stream = tiny.stream(scenario=scenario)
    for after in range(3):
        for task in range(3):
            own, seen = list(stream.tasks[task].classes), stream.seen_classes(after)
            expected = own if scenario == "task_incremental" else seen
            assert stream.allowed_classes(after, task) == expected


@pytest.mark.parametrize(("after", "task"), [(3, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_task_that_the_stream_lacks(after, task):
    with pytest.raises(ValueError, match=r"task t \(0-based\) must be in 0..2"):
        tiny.stream().allowed_classes(after, task)
