"""The sentence that a comparison ends with: true whatever the numbers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgp_hf.report.verdict import frozen_wins, verdict

ROOT = Path(__file__).parents[2]


def row(drift, accuracy, **more):
    return {"drift": [0.0, drift], "average_accuracy": accuracy, **more}


@pytest.mark.parametrize(
    ("projected", "twin", "sentence"),
    [
        (
            row(0.0472, 96.09),
            row(0.3396, 94.98),
            "With projection, old images' features moved 0.047 instead of 0.340 (7.2 times less), and average accuracy is "
            "96.1 instead of 95.0 %.",
        ),
        (
            row(0.105, 53.40),
            row(0.304, 55.92),
            "With projection, old images' features moved 0.105 instead of 0.304 (2.9 times less), but that costs accuracy "
            "here: the average is 53.4 instead of 55.9 %.",
        ),
        (
            row(0.1, 90.01),
            row(0.3, 90.04),
            "With projection, old images' features moved 0.100 instead of 0.300 (3.0 times less), but that costs accuracy "
            "here: the average is 90.01 instead of 90.04 %.",
        ),
        (
            row(0.0, 90.0),
            row(0.3, 90.0),
            "With projection, old images' features moved 0.000 instead of 0.300, and average accuracy is the same, 90.0 %.",
        ),
        (
            row(0.3, 91.0),
            row(0.2, 90.0),
            "Projection does not pay here: with it, old images' features moved 0.300 instead of 0.200, and average accuracy "
            "is 91.0 instead of 90.0 %.",
        ),
        (row(None, 91.0), row(0.2, 90.0), None),
        (row(0.1, None), row(0.2, 90.0), None),
        (row(0.0, 91.0), row(0.0, 91.0), None),  # a single task
    ],
)
def test_the_verdict_is_computed_from_the_numbers(projected, twin, sentence):
    assert verdict(projected, twin) == sentence


def test_frozen_classifiers_that_win_are_named_with_the_reason():
    rows = {
        "frozen, nearest class mean": row(0.0, 95.0),
        "frozen, ridge": row(0.0, 99.72),
        "L2P": row(0.3, 94.98, method="l2p"),
        "L2P-PGP": row(0.0, None, method="l2p"),
    }
    text = frozen_wins(rows, embedded=True)
    assert text.startswith(
        "frozen, ridge wins here (99.72 %): digits are easy for a backbone that was pre-trained on glyphs."
    )
    assert (ROOT / text.rpartition("see ")[2].rstrip(".") / "table.md").exists()
    assert "model_cards" not in frozen_wins(rows, embedded=False)
    linear = {"frozen, ridge": row(0.0, 99.0), "L2P": row(0.3, 15.0, method="l2p", head="linear")}
    assert "--head statistics" in frozen_wins(linear, embedded=False)
    linear["L2P"]["head"] = "statistics"
    assert "--head statistics" not in frozen_wins(linear, embedded=False)
    assert frozen_wins({**rows, "L2P": row(0.3, 99.9, method="l2p")}, embedded=True) is None
    assert frozen_wins({"L2P": row(0.3, 94.98, method="l2p")}, embedded=True) is None  # none beside it
    assert frozen_wins({"frozen, ridge": row(0.0, 99.0)}, embedded=True) is None
    rows = {"random, ridge": row(0.0, 50.0), "frozen, ridge": row(0.0, 9.0), "L2P": row(0.3, 15.0, method="l2p")}
    assert frozen_wins(rows, embedded=False) is None  # what no training has seen is no reason to train nothing
