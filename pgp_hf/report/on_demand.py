"""Draw the figures of a finished run on demand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..runs.atomic import replacing
from ..runs.checks import finished_tasks
from ..runs.digests import CARD, FIGURES, Digests
from ..runs.folder import MANIFEST, RESULTS, RunFolder
from ..runs.listing import Digest
from ..runs.reading import read_json
from . import card, figures

COMPARISON = "comparison.json"


def draw_run(run: str | os.PathLike[str], tasks: Literal["last", "each"] = "last") -> list[Path]:
    """Draw the figures of a finished run, as a run with `figures="last"` or `"each"` does.

    A model card that was not edited since is written anew, to show them; so are the digests, which list them. A
    comparison in the run's folder is drawn as well.

    Args:
        run: a run's output folder, one of its task folders, or a copy of one.
        tasks: draw for the last task alone, whose files are also those at the top level, or for each.

    Returns:
        The paths of the PNG files; an SVG of the same name is beside each.

    Raises:
        ValueError: an unknown choice of tasks, a folder that holds no finished task, or a damaged file.
    """
    if tasks not in ("last", "each"):
        raise ValueError(f"tasks={tasks!r}: choose 'last' or 'each'.")
    root, layout = Path(run), RunFolder(run)
    if not (root / RESULTS).is_file():
        raise ValueError(f"{root} holds no {RESULTS}: name the folder of a run, or of one of its tasks.")
    here = layout.tasks()
    drawn = [layout.task(t) for t in (here if tasks == "each" else here[-1:])]
    paths = [path for folder in (*drawn, root) for path in _draw(folder, layout if here else RunFolder(root.parent))]
    if (root / COMPARISON).is_file():
        manifest = read_json(root / MANIFEST)
        path = root / FIGURES / "comparison.png"
        figures.comparison(read_json(root / COMPARISON), path, manifest=manifest)
        paths.append(path)
    return paths


def _draw(folder: Path, run: RunFolder) -> list[Path]:
    """Draw the figures of a task into its folder, or of a copy of one."""
    results, manifest = read_json(folder / RESULTS), read_json(folder / MANIFEST)
    revisions = [run.task(t) for t in range(finished_tasks(results))]
    generated = (folder / CARD).is_file() and (folder / CARD).read_text(encoding="utf-8") == str(card.card_of(folder))
    present = all((revision / RESULTS).is_file() for revision in revisions)
    paths = figures.save_figures(results, folder / FIGURES, manifest, revisions if present else ())
    files = [file for path in paths for file in (path, path.with_suffix(".svg"))]
    if generated:
        with replacing(folder / CARD) as part:
            part.write_text(str(card.card_of(folder)), encoding="utf-8", newline="\n")
        files.append(folder / CARD)
    if (digests := Digests.read(folder)) is not None:
        new = {file.relative_to(folder).as_posix(): Digest.of(file) for file in files}
        replace(digests, files=dict(sorted({**digests.files, **new}.items()))).write()
    return paths
