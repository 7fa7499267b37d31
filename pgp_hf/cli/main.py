"""Run the command line of the package: `pgp-hf`, or `python -m pgp_hf`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..version import __version__
from . import console, helping

COMMANDS = {
    "train": "learn a stream of tasks: l2p, dualprompt, clip or baseline",
    "learn": "teach a finished run the classes of new images",
    "predict": "classify images with a finished run",
    "demo": "show in the browser what a run predicts after each of its tasks",
    "push": "upload the finished tasks of a run to the Hub",
    "presets": "list published settings, or print those of one as a file for train",
    "convert": "convert one of timm's vision transformers to transformers",
}
_APART = {"convert": "pgp_hf.convert"}  # the others are modules of this folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; without one, print the help.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.

    Raises:
        SystemExit: after `--help` and `--version`, for an unknown command, and for options that a command refuses.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    own = given[1:] if given[:1] == [console.TRACEBACK] else given
    if own and own[0] in COMMANDS:
        name, prog = own[0], f"pgp-hf {own[0]}"
        module = _APART.get(name, f"pgp_hf.cli.{name}")

        def command(rest: list[str]) -> int | None:  # imports take seconds, in which Ctrl-C is no fault either
            if name == "learn" and rest and set(rest) <= {"-h", "--help"}:  # which needs none of them
                print(helping.text(name, prog))
                raise SystemExit(0)
            return importlib.import_module(module).main(rest, prog=prog)

        def reword(message: str) -> str:
            return getattr(sys.modules.get(module), "as_options", console.as_options)(message)

        return console.run(command, own[1:] + ([console.TRACEBACK] if own != given else []), reword)
    return console.run(_overview, given)


def _overview(argv: list[str]) -> None:
    """Print what the commands are, or the version, or that there is no such command."""
    parser = console.Parser(
        prog="pgp-hf",
        description="Continual learning for Hugging Face vision models, without keeping old images.",
        epilog="pgp-hf COMMAND --help shows the options of a command. An error is one line; --traceback shows where it "
        "comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgp-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    parser.parse_args(argv)
    parser.print_help()
