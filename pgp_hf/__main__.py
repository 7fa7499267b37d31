"""Run the command line: `python -m pgp_hf`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
