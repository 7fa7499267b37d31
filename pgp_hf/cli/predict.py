"""Classify images with a finished run: a folder that a training left, or a repository on the Hub.

    pgp-hf predict out/l2p_pgp photo.jpg folder/of/images --top_k 3
    pgp-hf predict me/l2p-pgp-cifar100 photos --revision task-3 --json_lines > found.jsonl

Folders are searched for images, including subfolders. Neither a task id nor the training
packages are needed. Files that cannot be read are named at the end, and the exit code is
then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..report.formatting import printable
from .console import Parser, whole

if TYPE_CHECKING:
    from ..inference import Prediction, PromptClassifier

PROGRESS_FROM = 20  # with fewer images, a progress bar would be gone before it is read


def main(argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = __doc__) -> int:
    """Print the predictions; return 1 if a file was refused.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.
        description: shown by `--help`.

    Raises:
        ValueError, OSError: as `load_pretrained`.
    """
    args = _parse(argv, prog, description)
    import torch  # after the help, since these take seconds

    from ..inference import load_pretrained

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    files, errors = _find(args.images)
    classifier = load_pretrained(args.model, args.revision, backbone=args.backbone, device=device, token=args.token)
    width = max((len(printable(file)) for file in files), default=0)
    for file, prediction in _classify(classifier, files, errors, args):
        if args.json_lines:
            found = {"image": str(file), "predictions": prediction.labels}
            lines = [json.dumps(found if prediction.prompts is None else {**found, "prompts": prediction.prompts})]
        else:
            named = [f"{label['score']:7.2%}  {printable(label['label'])}" for label in prediction.labels]
            lines = [f"{printable(file) if i == 0 else '':{width}}  {line}" for i, line in enumerate(named)]
        tqdm.write("\n".join(lines), file=sys.stdout)  # above the bar, where there is one
    sys.stdout.flush()
    for message in errors:
        print(f"error: {printable(message)}", file=sys.stderr)
    return 1 if errors else 0


def _parse(argv: Sequence[str] | None, prog: str | None, description: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run's folder, one of its task folders, or a repository on the Hub")
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders of images")
    parser.add_argument("--revision", help="task-1, task-2, ...: the state after that task (default: the last)")
    parser.add_argument("--backbone", help="Hub id or folder of the frozen model, if the run does not name it")
    parser.add_argument("--top_k", type=whole(1), default=1, help="number of classes to name per image (default: 1)")
    parser.add_argument(
        "--batch_size", type=whole(1), default=32, help="number of images in a forward pass (default: 32)"
    )
    parser.add_argument(
        "--num_workers", type=whole(0), default=0, help="number of processes that read images ahead (default: 0)"
    )
    parser.add_argument("--json_lines", action="store_true", help="print one JSON object per line instead of a table")
    parser.add_argument("--device", type=_device, help="cpu, cuda, mps, ... (default: a GPU if there is one)")
    parser.add_argument("--token", help="for a private repository; by default that of HF_TOKEN or `hf auth login`")
    return parser.parse_args(argv)


def _device(text: str) -> str:
    """Parse the name of a device that tensors can be on here."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {error}") from None
    return text


def _find(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the image files among `paths`, with folders searched by file ending, and errors about the other paths."""
    from ..data.files import image_files

    files, errors = [], []
    for path in paths:
        if path.is_dir():
            inside = image_files(path)
            files += inside
            if not inside:
                errors.append(f"{path} holds no images.")
        elif path.is_file():
            files.append(path)
        else:
            errors.append(f"{path} does not exist.")
    return list(dict.fromkeys(files)), errors


def _classify(
    classifier: PromptClassifier, files: Sequence[Path], errors: list[str], args: argparse.Namespace
) -> Iterator[tuple[Path, Prediction]]:
    """Yield each file that can be read with its prediction, batch by batch; add an error for each that cannot."""
    progress = None if len(files) >= PROGRESS_FROM else False
    results = classifier.stream(files, args.top_k, args.batch_size, num_workers=args.num_workers, progress=progress)
    for file, result in zip(files, results, strict=True):
        if isinstance(result, Exception):
            errors.append(str(result))
        else:
            yield file, result
