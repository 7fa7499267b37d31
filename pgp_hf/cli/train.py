"""Learn a stream of tasks, and compare: `pgp-hf train l2p|dualprompt|clip|baseline`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from . import helping
from .console import Parser

METHODS = {
    "l2p": "L2P prompts: a pool, of which each image selects its own",
    "dualprompt": "DualPrompt: prefixes for all tasks, and others for each task",
    "clip": "CLIP prompts: context before class names, and tokens in the image",
    "baseline": "methods that train the model itself, such as EWC, LwF or DER++",
}


def main(argv: Sequence[str] | None = None, prog: str = "pgp-hf train") -> None:
    """Run the command; without a method, print what there is.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.

    Raises:
        SystemExit: after `--help` and `--dry_run`, and for arguments that are refused.
        TypeError, ValueError, OSError, FloatingPointError: as the training has it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in METHODS:
        train(argv[0], argv[1:], f"{prog} {argv[0]}")
        return
    parser = Parser(
        prog=prog,
        description="Learn a stream of tasks, and compare with the frozen backbone.",
        epilog=f"{prog} METHOD --help shows the options of a method.",
        allow_abbrev=False,
    )
    methods = parser.add_subparsers(title="methods", metavar="METHOD")
    for name, what in METHODS.items():
        methods.add_parser(name, help=what)
    parser.parse_args(argv)
    parser.print_help()


def train(method: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train by a method: the same as `examples/run_l2p_pgp.py` and its like.

    Args:
        method: one of `METHODS`.
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help, that of the script by default.

    Raises:
        As `main`.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = f"python {sys.argv[0]}" if prog is None else prog
    if argv and set(argv) <= {"-h", "--help"}:  # before anything is imported that takes seconds
        print(helping.text(method, prog))
        raise SystemExit(0)
    importlib.import_module(".trainings", __package__).TRAININGS[method](argv, prog)
