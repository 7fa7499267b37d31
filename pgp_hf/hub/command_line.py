"""Run uploads from a command line: what a push does and prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..push_options import PUSH, REPO_ID, add_options
from ..report.formatting import printable
from .push import PushError, push


def upload(args: argparse.Namespace) -> None:
    """Upload `args.output_dir` to `args.repo_id`.

    Raises:
        PushError: tasks are missing on the Hub.
        ValueError: as `push`.
    """
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


def run(args: argparse.Namespace) -> int:
    """Upload, and print what is wrong; return 0 if everything is on the Hub, 1 if not."""
    try:
        upload(args)
    except (PushError, ValueError) as error:
        print("\n".join(map(printable, f"error: {error}".splitlines())), flush=True)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m pgp_hf.hub`; return 0 if everything is on the Hub, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m pgp_hf.hub", description="Share finished tasks on the Hugging Face Hub."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    help = "upload the finished tasks of a run that are missing on the Hub"
    one = commands.add_parser("push", help=help, description=PUSH)
    one.add_argument("output_dir", help="the run's folder, which holds task-1, task-2, ...")
    one.add_argument("--repo_id", "--repo-id", required=True, help=REPO_ID)
    add_options(one)
    return run(parser.parse_args(argv))
