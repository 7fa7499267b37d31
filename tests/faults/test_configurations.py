"""Whatever a configuration says, a run trains as it should or is refused before training, by the name of an argument."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from configurations import ARGUMENTS, DUALPROMPT, L2P, PROJECTION, PROMPTS, Configuration, Run, configurations
from hypothesis import HealthCheck, given, settings
from peft import PeftConfig

from pgp_hf import DualPromptConfig, L2PConfig, PGPTrainingArguments, ProjectionConfig

pytestmark = [pytest.mark.usefixtures("ready"), pytest.mark.timeout(3600)]


def test_every_setting_of_the_package_is_drawn():
    own = set(PGPTrainingArguments.__annotations__) - {"query_cache", "push_to_hub", "remove_unused_columns"}
    assert {name for name in own if not name.startswith("hub_")} <= ARGUMENTS.keys()
    assert PROJECTION.keys() == {field.name for field in fields(ProjectionConfig)}
    for config, table in ((L2PConfig, L2P), (DualPromptConfig, DUALPROMPT)):
        filled_in = {*config.filled_in, "target_modules", "exclude_modules", "hidden_size"}
        settings_ = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)}
        assert settings_ | {"modules_to_save"} == {*table, *PROMPTS} | (filled_in & settings_)


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
