"""Run a command as a terminal expects: an error of the user is one line on stderr, with exit code 2."""

from __future__ import annotations

import argparse
import dis
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from ..report.formatting import fill, one_line, printable

TRACEBACK = "--traceback"
# what refuses arguments, files and settings; anything else is a fault of the program, with its traceback
REFUSALS = (TypeError, ValueError, OSError, FloatingPointError, ImportError)
_RAISE = dis.opmap["RAISE_VARARGS"]
# how error messages name arguments in Python, and what that is on a command line
OPTIONS = {
    r"(label|image)_column\b": r"--\1_column_name",
    r"backbone=": "--backbone ",
    r"(resume_from_checkpoint|overwrite_output_dir|compile_trunk|torch_compile)=True\b": r"--\1 true",
}


class Parser(argparse.ArgumentParser):
    """Refuse a command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"error: {printable(one_line(message))}\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a function that parses a whole number for argparse.

    Args:
        least, most: which are allowed themselves.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is above {most}")
        return value

    return parse


def as_options(message: str, options: Mapping[str, str] = OPTIONS) -> str:
    """Return an error message with the names of arguments in Python replaced by those of options."""
    for name, option in options.items():
        message = re.sub(rf"(?<![\w/\\-]){name}", option, message)  # but not within a path
    return message


def run(
    command: Callable[[list[str]], int | None],
    argv: Sequence[str] | None = None,
    reword: Callable[[str], str] = as_options,
) -> int:
    """Run a command and return its exit code: 2, after one line that says why, if it is refused, 130 after Ctrl-C.

    With `--traceback` among the arguments, which no command sees, the error is raised.

    Args:
        command: takes the command line and returns its exit code, or None for 0.
        argv: the command line without the program, `sys.argv[1:]` by default.
        reword: changes the message of an error.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [token for token in given if token != TRACEBACK]
    try:
        with _for_people(traceback=arguments != given):
            try:
                return int(command(arguments) or 0)
            finally:
                sys.stdout.flush()  # here, where it may find that nobody reads
    except KeyboardInterrupt as stop:
        if isinstance(stop, SystemExit) or arguments != given:  # a training says itself how to go on
            raise
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except REFUSALS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as a shell has it for SIGPIPE
        if arguments != given or _is_a_fault(error):
            raise
        print(f"error: {printable(reword(one_line(error) or type(error).__name__))}", file=sys.stderr)
        return 2


def _is_a_fault(error: BaseException) -> bool:
    """Return whether an operation found a type that it cannot take, such as a call; a refusal comes from a `raise`."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if not isinstance(error, TypeError) or frame is None:
        return False
    code = frame.tb_frame.f_code.co_code
    return code[frame.tb_lasti : frame.tb_lasti + 1] != bytes([_RAISE])


def _nobody_reads() -> bool:
    """Return whether the reader of stdout is gone, as after `| head`; nothing is written to it then any more."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
    return True


@contextmanager
def _for_people(traceback: bool) -> Iterator[None]:
    """Hide the bars of other libraries where nobody sees them, and show warnings as lines that fit a terminal."""
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # read when they are imported
    hidden = [] if sys.stderr.isatty() else [name for name in names if name not in os.environ]
    before: Callable[..., str] = warnings.formatwarning
    os.environ.update(dict.fromkeys(hidden, "1"))
    if not traceback:
        warnings.formatwarning = _warning
    try:
        yield
    finally:
        warnings.formatwarning = before
        for name in hidden:
            os.environ.pop(name, None)


def _warning(message: Warning | str, *where: object, **line: object) -> str:
    return fill(f"warning: {printable(one_line(message))}") + "\n"
