"""The options of a push, for the two command lines that have them; their help must not take seconds."""

from __future__ import annotations

import argparse
import math

PUSH = (
    "Upload the finished tasks of a run that are missing on the Hub, each as a commit on main and a tag task-1, task-2, "
    "... Running it again changes nothing."
)
REPO_ID = "owner/name, or name alone for a repository of your own"
WAIT = 300.0
"""Seconds to wait for an upload by default, before it is reported as missing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a push, but for the run and the repository."""
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private; by default as its owner's settings say",
    )
    parser.add_argument("--token", help="by default that of HF_TOKEN, or the one that `hf auth login` stored")
    parser.add_argument(
        "--base_model", "--base-model", help="Hub id of the backbone, if the run loaded it from a local folder"
    )
    parser.add_argument(
        "--exemplars",
        action="store_true",
        help="also upload training images that the run stores (memory_stores 'images')",
    )
    parser.add_argument("--license", help="id of the license that the cards name, such as apache-2.0; none by default")
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=WAIT,
        help="seconds without progress after which to give up (default: %(default)g)",
    )


def _seconds(text: str) -> float:
    """Parse a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 <= value < math.inf:  # NaN is refused as well
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0")
    return value
