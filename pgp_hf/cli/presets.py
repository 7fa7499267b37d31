"""List published settings: `pgp-hf presets`; print one as a file of options: `pgp-hf presets l2p cifar100-10`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from .. import presets
from ..report.formatting import WIDTH, one_line
from .console import Parser

# their folders, by the method of `pgp-hf train`
FOLDERS = {"l2p": "l2p", "dualprompt": "dualprompt", "clip": "clip", "baseline": "baselines"}
_NOTES = ("about", "differs", "unsure")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the presets of all methods or of one, or the settings of a preset.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.

    Raises:
        ValueError: an unknown preset.
    """
    parser = Parser(
        prog=prog,
        description="List published settings. With a method and a name, print them as YAML: a file of options that "
        "`pgp-hf train METHOD FILE` takes.",
    )
    parser.add_argument("method", nargs="?", choices=FOLDERS, metavar="METHOD", help=", ".join(FOLDERS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a preset, such as cifar100-10")
    args = parser.parse_args(argv)
    if args.name is not None:
        print(as_file(args.method, args.name), end="")
        return 0
    for method in FOLDERS if args.method is None else [args.method]:
        print(f"pgp-hf train {method} --preset NAME")
        for name in presets.names(FOLDERS[method]):
            about = re.split(r"[:;]|, with the settings", one_line(presets.load(FOLDERS[method], name)["about"]))[0]
            print(f"  {name:<24}{textwrap.shorten(about, WIDTH - 26, placeholder=' ...')}")
    return 0


def as_file(method: str, name: str) -> str:
    """Return a preset as YAML text, with its notes as comments.

    Raises:
        ValueError: an unknown preset.
    """
    preset = presets.load(FOLDERS[method], name)
    lines = [f"# pgp-hf train {method} {name}.yaml"]
    for note in _NOTES:
        for text in _texts(preset.get(note)):
            lines += textwrap.wrap(f"{note}: {text}", WIDTH, initial_indent="# ", subsequent_indent="#   ")
    settings = {**presets.arguments(preset), "exact_images": True}  # as --preset has it, also on a GPU
    return "\n".join([*lines, yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=WIDTH)])


def _texts(note: Any) -> list[str]:
    """Return a note's texts: it is one, a list of them, or texts by what they are about."""
    if isinstance(note, dict):
        return [f"{key}: {one_line(value)}" for key, value in note.items()]
    return [one_line(each) for each in (note if isinstance(note, list) else [note] if note else [])]
