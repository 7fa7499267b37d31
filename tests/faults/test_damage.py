"""Damage: every file of a finished run, cut or with one bit turned, gives the same result or an error that names it.

Left out are cards and figures, which people edit, and checkpoints, which have tests of their own.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from pgp_hf import StreamTrainer, load_pretrained
from pgp_hf.methods import METHODS, create
from pgp_hf.models import weights
from pgp_hf.runs.folder import QUERIES

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from pairs import PLAIN, SETTINGS, TUNERS, make_model, model_for, refusal

pytestmark = [
    pytest.mark.usefixtures("without_figures"),
    pytest.mark.filterwarnings("ignore:EWC has nothing to hold"),
]

IMAGES = [row["image"] for row in tiny.data()["test"].select(range(5))]
DAMAGES = [("cut", 0.0), ("cut", 0.5), ("cut", 1.0), ("turn", 0.02), ("turn", 0.5), ("turn", 0.97)]
TIMED = {"seconds", "train_images_per_second", "images_trained", "versions"}


class Run:
    """A finished run of two tasks, and what it gives when nothing is damaged."""

    def __init__(self, folder: Path, head: str, model: str, method: str) -> None:
        self.folder, self.root, self._pair = folder, folder / "run", (head, model, method)
        self.trainer(self.root).train()
        self.files = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file() and path.suffix in (".json", ".safetensors")
        )
        self.clean = {name: self.act(name, self.root) for name in ("load", "load task-1", "load task-2", "resume")}

    def trainer(self, root: Path) -> StreamTrainer:
        head, model, method = self._pair
        settings = dict(SETTINGS.get(method, {}))
        if "memory_stores" in METHODS[method].config_class.__dataclass_fields__:
            settings["memory_stores"] = "images"
        made = make_model(model, self.folder, head)
        return tiny.trainer(
            root,
            model=made,
            method=create(method, **settings),
            stream=tiny.stream(dataset=tiny.data(train=4, test=2), num_tasks=2),
            num_train_epochs=1,
            save_full_weights="all",
        )

    def act(self, action: str, root: Path) -> Any:
        """Return what loading a revision or resuming the run gives; None for a revision that there is not."""
        if action == "resume":
            trainer = self.trainer(root)
            trainer.train(resume_from_checkpoint=True)
            return state(trainer)
        revision = action.partition(" ")[2] or None
        if revision and not (root / revision).exists():  # tasks that are learned as one have one folder
            return None
        found = load_pretrained(root, revision)
        scores = [list(map(tuple, map(dict.values, each))) for each in found.predict(IMAGES, top_k=3)]
        return scores, {name: value for name, value in found.results.items() if name not in TIMED}, found.manifest

    def check(self, action: str, name: str, damage: tuple[str, float], copy: Path) -> str:
        """Return what an action gives on a damaged copy: "same" or "named"."""
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.root, copy)
        spoil(copy / name, damage)
        try:
            found = self.act(action, copy)
        except (ValueError, OSError) as error:
            assert Path(name).name in str(error), f"{action}, {name} {damage}: {error!r} names another file"
            return "named"
        assert equal(found, self.clean[action]), f"{action}, {name} {damage}: another result, without an error"
        return "same"


def state(trainer: StreamTrainer) -> dict[str, Any]:
    """Everything that a resumed trainer goes on with."""
    method, projection, progress = trainer.method.state(), trainer.method.projection, trainer.progress
    return {
        "weights": weights(trainer.model),
        "method": [method.tensors, method.values],
        "bases": None if projection is None else list(projection.state()),
        "results": {name: value for name, value in progress.results.to_dict().items() if name not in TIMED},
        "references": [progress.references.tensors(t) for t in progress.references.features],
        "stored": {t: {i: image.pixels for i, image in kept.items()} for t, kept in progress.stored.items()},
        "first": trainer.folder.first,
    }


def equal(a: Any, b: Any) -> bool:
    """Compare to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def spoil(path: Path, damage: tuple[str, float]) -> None:
    """Cut a file to a share of its length, the last byte alone at 1.0, or turn a bit at a share of it."""
    kind, share = damage
    data = bytearray(path.read_bytes())
    at = min(int(len(data) * share), len(data) - 1)
    if kind == "cut":
        path.write_bytes(data[:at])
    else:
        data[at] ^= 1 << random.Random(f"{path.name} {share}").randrange(8)
        path.write_bytes(data)


def actions(name: str) -> list[str]:
    """The revision that a file belongs to, and the whole run."""
    top = name.partition("/")[0]
    return (
        ["resume"]
        if top in ("features", QUERIES) or name == "continued.json"
        else [f"load {top}" if "/" in name else "load", "resume"]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Make runs, each once."""
    runs: dict[tuple[str, ...], Run] = {}

    def make(*pair: str) -> Run:
        if pair not in runs:
            runs[pair] = Run(tmp_path_factory.mktemp("damage"), *pair)
        return runs[pair]

    return make


BRIEF = [("statistics", "l2p", "projected_prompts"), ("linear", "full", "derpp")]
OFTEN = [("linear", tuner, "projected_prompts") for tuner in TUNERS]
OFTEN += [("statistics", tuner, "projected_prompts") for tuner in TUNERS]
OFTEN += [("linear", model, "fine_tuning") for model in PLAIN]
OFTEN += [("linear", "", method) for method in METHODS if method != "projected_prompts"]  # above, by tuner


@pytest.mark.parametrize("pair", BRIEF, ids=" ".join)
def test_a_sample_of_damage_is_named_or_changes_nothing(pair, made, tmp_path):
    run, chance, outcomes = made(*pair), random.Random(0), []
    for name in run.files:
        damage = chance.choice(DAMAGES)
        action = chance.choice(actions(name))
        outcomes.append((action, name, run.check(action, name, damage, tmp_path / "copy")))
    named = {name for _, name, outcome in outcomes if outcome == "named"}
    assert len(outcomes) > 20 and len(named) > len(outcomes) / 2, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("pair", OFTEN, ids=" ".join)
def test_all_damage_is_named_or_changes_nothing(pair, made, tmp_path):
    head, model, method = pair
    if method == "projected_prompts" and (reason := refusal(model, method, tmp_path, head)):
        pytest.skip(reason)
    run = made(head, model or model_for(method, tmp_path), method)
    outcomes = [
        (action, name, run.check(action, name, damage, tmp_path / "copy"))
        for name in run.files
        for damage in DAMAGES
        for action in actions(name)
    ]
    kinds = [outcome for _, _, outcome in outcomes]
    print(
        f"\n{' '.join(pair)}: {len(kinds)} damages, {kinds.count('named')} named, {kinds.count('same')} changed nothing"
    )
    # not read, or in part alone: the last newline and the digests of figures say nothing
    free = ("exemplars", "digests")
    loads = [
        outcome for action, name, outcome in outcomes if action.startswith("load") and Path(name).stem not in free
    ]
    assert loads and set(loads) == {"named"}  # whatever is loaded is covered
