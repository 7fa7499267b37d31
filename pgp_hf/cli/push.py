"""Upload the finished tasks of a run to the Hub: `pgp-hf push`."""

from __future__ import annotations

from collections.abc import Sequence

from ..hub import command_line
from .console import Parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return 0 if everything is on the Hub, 1 if not.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.
    """
    parser = Parser(prog=prog, description=command_line.PUSH)
    parser.add_argument("output_dir", help="the run's folder, which holds task-1, task-2, ...")
    parser.add_argument("repo_id", help=command_line.REPO_ID)
    command_line.add_options(parser)
    return command_line.run(parser.parse_args(argv))
