"""Whatever a configuration says, a run trains as it should or is refused before training, by the name of an argument."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from configurations import Configuration, Run, configurations
from hypothesis import HealthCheck, given, settings

pytestmark = [pytest.mark.usefixtures("ready"), pytest.mark.timeout(3600)]


def explore(count: int) -> Counter[str]:
    """Run so many configurations, the same each time; return how often each end was seen."""
    ends: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(configurations())
    def run(configuration: Configuration) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ends[Run(configuration, Path(folder) / "run").end()] += 1

    run()
    return ends


def test_a_few_dozen_configurations():
    ends = explore(24)
    assert min(ends["trained"], ends["refused"]) >= 6  # both are tested


@pytest.mark.slow
def test_two_hundred_configurations():
    ends = explore(200)
    print(f"\n{ends['trained']} of {sum(ends.values())} configurations have trained, {ends['refused']} were refused.")
    assert min(ends["trained"], ends["refused"]) >= 60
