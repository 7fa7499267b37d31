"""Run the command line: `python -m pgp_hf.hub`."""

from .command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
