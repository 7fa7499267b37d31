"""Upload the finished tasks of a run to the Hub: `pgp-hf push`."""

from __future__ import annotations

from collections.abc import Sequence

from ..push_options import PUSH, REPO_ID, add_options
from .console import Parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return 0 if everything is on the Hub, 1 if tasks are missing there.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.

    Raises:
        ValueError: what is refused.
    """
    parser = Parser(prog=prog, description=PUSH)
    parser.add_argument("output_dir", help="the run's folder, which holds task-1, task-2, ...")
    parser.add_argument("repo_id", help=REPO_ID)
    add_options(parser)
    args = parser.parse_args(argv)
    from ..hub import command_line  # after the help, since this takes seconds

    return command_line.run(args)
