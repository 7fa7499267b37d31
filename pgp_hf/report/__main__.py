"""Draw the figures of a finished run: `python -m pgp_hf.report RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runs.folder import MANIFEST
from ..runs.reading import read_json
from .figures import PANELS, comparison
from .on_demand import draw_run


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print what was written; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pgp_hf.report", description="Draw the figures of a finished run.")
    parser.add_argument("run", help="a run's output folder, one of its task folders, or a comparison.json")
    parser.add_argument(
        "--tasks", choices=("last", "each"), default="last", help="of a run, the revisions to draw (default: last)"
    )
    parser.add_argument(
        "--panels", nargs="+", choices=tuple(PANELS), help="of a comparison, what to draw (default: all)"
    )
    parser.add_argument(
        "--to", metavar="FILE.png", help="of a comparison, the file to write; an SVG is written beside it"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="of a comparison, the rows to draw (default: all)")
    args = parser.parse_args(argv)
    try:
        if args.to:
            manifest = Path(args.run).with_name(MANIFEST)
            rows = read_json(args.run)
            if unknown := [name for name in args.rows or () if name not in rows]:
                raise ValueError(f"{args.run} has no row {unknown[0]!r}, only {', '.join(rows)}.")
            comparison(
                {name: rows[name] for name in args.rows or rows},
                args.to,
                args.panels or tuple(PANELS),
                manifest=read_json(manifest) if manifest.is_file() else None,
            )
            print(args.to)
        elif Path(args.run).is_file() or args.rows or args.panels:
            raise ValueError("--rows and --panels choose from a comparison.json, which --to FILE.png draws: add --to.")
        else:
            print(*draw_run(args.run, args.tasks), sep="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
