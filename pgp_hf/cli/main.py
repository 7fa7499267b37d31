"""Run the command line of the package: `pgp-hf`, or `python -m pgp_hf`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..version import __version__

# modules of this folder, imported when their command is run: most take seconds
COMMANDS = {
    "learn": "teach a finished run the classes of new images",
    "predict": "classify images with a finished run",
    "demo": "show in the browser what a run predicts after each of its tasks",
    "push": "upload the finished tasks of a run to the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; without one, print the help.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.

    Raises:
        SystemExit: after `--help` and `--version`, for an unknown command, and for options that a command refuses.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        command = importlib.import_module(f".{argv[0]}", __package__)
        return int(command.main(argv[1:], prog=f"pgp-hf {argv[0]}"))
    parser = argparse.ArgumentParser(
        prog="pgp-hf",
        description="Continual learning for Hugging Face vision models, without keeping old images.",
        epilog="pgp-hf COMMAND --help shows the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgp-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    parser.parse_args(argv)
    parser.print_help()
    return 0
