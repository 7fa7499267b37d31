"""Run uploads from a command line: what a push does and prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..push_options import PUSH, REPO_ID, add_options
from ..report.formatting import printable
from .push import PushError, push


def run(args: argparse.Namespace) -> int:
    """Upload `args.output_dir` to `args.repo_id`; return 0 if everything is on the Hub, 1 if tasks are missing there.

    Raises:
        ValueError: as `push`.
    """
    try:
        push(
            args.output_dir,
            args.repo_id,
            token=args.token,
            private=args.private,
            base_model=args.base_model,
            exemplars=args.exemplars,
            license=args.license,
            wait=args.wait,
            say=lambda line: print(line, flush=True),
        )
    except PushError as error:  # a line for each task
        _print(error)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m pgp_hf.hub`; return 0 if everything is on the Hub, 1 if tasks are missing there, 2 if refused."""
    parser = argparse.ArgumentParser(
        prog="python -m pgp_hf.hub", description="Share finished tasks on the Hugging Face Hub."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    help = "upload the finished tasks of a run that are missing on the Hub"
    one = commands.add_parser("push", help=help, description=PUSH)
    one.add_argument("output_dir", help="the run's folder, which holds task-1, task-2, ...")
    one.add_argument("--repo_id", "--repo-id", required=True, help=REPO_ID)
    add_options(one)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        _print(error)
        return 2


def _print(error: Exception) -> None:
    print("\n".join(map(printable, f"error: {error}".splitlines())), file=sys.stderr, flush=True)
