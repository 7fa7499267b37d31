"""Classify images with a finished run: a folder that a training left, or a repository on the Hub.

    python examples/predict.py out/l2p_pgp photo.jpg folder/of/images --top_k 3
    python examples/predict.py me/my-run photos --revision task-3 --json_lines > found.jsonl

Folders are searched for images, including subfolders. Neither a task id nor the training packages
are needed. Files that cannot be read are named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pgp_hf.cli import console, predict


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions; return 1 if a file was refused."""
    return predict.main(argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(console.run(main))
