"""Load presets: settings as data files, one for each method and benchmark.

`presets/<method>/<name>.json` holds the arguments of the example scripts in the groups `model`, `data`, `prompts` and
`training`, and says where they come from (`about`), how images are prepared (`preprocessing`), where this package
departs from the released code (`differs`) and what could not be verified (`unsure`). Those in `presets/baselines` are
for all methods of `run_baselines.py`; one without `data` is a recipe for any data set.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
GROUPS = ("model", "data", "prompts", "training")

# A source named on the command line replaces the preset's, together with the settings that make sense for it alone.
_BELONGS = {
    "--model_name_or_path": {"model_revision"},
    "--dataset_name": {"dataset_config_name", "dataset_revision", "dataset_split"},
    "--train_dir": {
        *("dataset_name", "dataset_config_name", "dataset_revision", "dataset_split"),
        *("image_column_name", "label_column_name"),
    },
}


def names(method: str) -> list[str]:
    """Return the names of a method's presets, sorted."""
    return sorted(path.stem for path in (FOLDER / method).glob("*.json"))


def load(method: str, name: str) -> dict[str, Any]:
    """Read a preset.

    Raises:
        ValueError: an unknown preset; the message lists the known ones.
    """
    known = names(method)
    if name not in known:
        choice = f"choose one of {', '.join(known)}" if known else f"method {method!r} has none"
        raise ValueError(f"preset {name!r} is unknown: {choice}.")
    return json.loads((FOLDER / method / f"{name}.json").read_text(encoding="utf-8"))


def arguments(preset: dict[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Return a preset's arguments by name, as defaults for the command line.

    Args:
        preset: from `load`.
        given: the options on the user's command line. One that names another backbone or data set drops the preset's
            revision and split, which belong to the preset's own.
    """
    dropped = {name for option in given for name in _BELONGS.get(option, ())}
    return {name: value for group in GROUPS for name, value in preset.get(group, {}).items() if name not in dropped}
