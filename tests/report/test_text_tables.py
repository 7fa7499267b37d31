"""Tables: Markdown with and without alignment, and for a terminal."""

from __future__ import annotations

import pytest

from pgp_hf.report.table import markdown, plain

ROWS = [["name", "accuracy"], ["a", "9.5"], ["longer", "10.25"]]


def test_markdown():
    assert markdown(ROWS) == "| name | accuracy |\n|---|---|\n| a | 9.5 |\n| longer | 10.25 |"
    assert markdown(ROWS, left=("name",)).splitlines()[1] == "| --- | ---: |"
    assert markdown(ROWS[:1], left=()) == "| name | accuracy |\n| ---: | ---: |"


def test_plain():
    assert plain(ROWS) == "name    accuracy\n----------------\na            9.5\nlonger     10.25"


@pytest.mark.parametrize("rows", [[["a", "b"], ["1"]], [["a"], ["1", "2"]]])
def test_a_ragged_table_is_refused(rows):
    with pytest.raises(ValueError):
        plain(rows)
