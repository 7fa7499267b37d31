"""Figures of a finished run, drawn on demand or when tasks end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from pgp_hf.report import figures, movement
from pgp_hf.report.__main__ import main
from pgp_hf.report.movement import changes_of
from pgp_hf.report.on_demand import draw_run
from pgp_hf.runs.atomic import write_json
from pgp_hf.runs.digests import Digests
from pgp_hf.runs.folder import RunFolder
from pgp_hf.runs.listing import Digest
from pgp_hf.runs.reading import read_json, read_tensors


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A finished run of three tasks without figures."""
    folder = tmp_path_factory.mktemp("run") / "out"
    tiny.trainer(folder, figures="none", num_train_epochs=1).train()
    return folder


@pytest.fixture
def run(plain_run, tmp_path, monkeypatch):
    """A copy of the run; a figure is the same few bytes, since others have their own tests."""
    monkeypatch.setattr("pgp_hf.report.drawing.save", lambda fig, path: _write(Path(path)))
    return shutil.copytree(plain_run, tmp_path / "out")


def _write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"png")
    path.with_suffix(".svg").write_bytes(b"svg")


def drawn(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("figures/*.png"))


NAMES = sorted(
    f"{name}.png"
    for name in (
        *("accuracy_matrix", "task_curves", "forgetting_by_task", "stability"),
        *("prompt_usage", "prompts_and_keys"),
    )
)


def test_a_run_without_figures_is_drawn_on_demand_and_goes_on(run):
    assert not list(run.rglob("figures")) and "](figures/" not in (run / "README.md").read_text(encoding="utf-8")
    paths = draw_run(run)
    assert {path.parent.parent for path in paths} == {run, run / "task-3"} and drawn(run) == drawn(
        run / "task-3"
    ) == NAMES
    assert not (run / "task-2" / "figures").exists()
    for folder in (run, run / "task-3"):
        text, digests = (folder / "README.md").read_text(encoding="utf-8"), Digests.read(folder)
        assert all(f"](figures/{name})" in text for name in NAMES)
        assert digests.files["figures/stability.svg"] == Digest.of(folder / "figures" / "stability.svg")
        assert digests.files["README.md"] == Digest.of(folder / "README.md")
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.json")}
    RunFolder(run).complete_copy(2)
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.json")} == before  # it is the task's copy still
    trainer = tiny.trainer(run, figures="each", num_train_epochs=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.results.to_dict()["finished_tasks"] == 3


def test_each_task_may_be_drawn_and_an_edited_card_stays(run, capsys):
    card = run / "task-1" / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nmine\n", encoding="utf-8")
    edited = card.read_bytes()
    assert (
        main([str(run), "--tasks", "each"]) == 0 and str(run / "figures" / "stability.png") in capsys.readouterr().out
    )
    assert card.read_bytes() == edited
    one = ["accuracy_matrix.png", "prompt_usage.png", "stability.png", "task_curves.png"]
    assert drawn(run / "task-1") == one
    assert drawn(run / "task-2") == NAMES


def test_a_copy_of_a_task_and_a_comparison_are_drawn(run, tmp_path, capsys):
    copy = shutil.copytree(run / "task-3", tmp_path / "copy")
    draw_run(copy)
    assert drawn(copy) == [
        name for name in NAMES if name != "prompts_and_keys.png"
    ]  # whose earlier tasks are not there
    write_json(run / "comparison.json", {"L2P": read_json(run / "results.json")})
    assert draw_run(run)[-1] == run / "figures" / "comparison.png"
    assert main([str(run / "comparison.json"), "--panels", "drift", "--to", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.svg").exists() and main([str(tmp_path)]) == 2
    assert "holds no results.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'last' or 'each'"):
        draw_run(run, "all")


@pytest.mark.parametrize(("when", "expected"), [("each", [0, 1, 2]), ("last", [2]), ("none", [])])
def test_figures_are_drawn_when_asked(tmp_path, monkeypatch, when, expected):
    tasks = []

    def save(results, folder, manifest, revisions):
        tasks.append(results["finished_tasks"] - 1)
        assert [path.name for path in revisions[:-1]] == [f"task-{t + 1}" for t in range(tasks[-1])]
        return []

    monkeypatch.setattr(figures, "save_figures", save)
    trainer = tiny.trainer(tmp_path, figures=when, num_train_epochs=1)
    trainer.train()
    assert tasks == expected
    assert "figures" not in trainer.results.to_dict()["training"]  # nothing depends on it


def test_changes_are_those_of_the_tensors(plain_run):
    folders = [plain_run / f"task-{t}" for t in (1, 2, 3)]
    found = changes_of(folders)
    assert list(found) == ["key", "prompt"]
    states = [read_tensors(folder / "adapter_model.safetensors") for folder in folders]
    (name,) = (name for name in states[0] if name.endswith("l2p_prompt"))
    first, second, third = (state[name].double() for state in states)
    change = lambda a, b: 100 * float((b - a).norm() / a.norm())  # noqa: E731
    assert found["prompt"]["during"] == [
        None,
        pytest.approx(change(first, second)),
        pytest.approx(change(second, third)),
    ]
    assert found["prompt"]["since"] == [0, pytest.approx(change(first, second)), pytest.approx(change(first, third))]
    assert changes_of(folders[:1]) == {}
    axes = figures.prompts_and_keys(found).axes
    assert [line.get_label() for line in axes[1].lines] == ["key", "prompt"]


def test_what_is_zero_throughout_is_not_drawn(tmp_path, monkeypatch):
    zero, one = ({"x": torch.full((2, 3), value)} for value in (0.0, 1.0))
    states = [{"prompt": zero, "key": one}, {"prompt": zero, "key": zero}]
    monkeypatch.setattr(movement, "_prompts", lambda folder: states[int(folder.name)])
    folders = [tmp_path / "0", tmp_path / "1"]
    assert changes_of(folders) == {"key": {"during": [None, 100.0], "since": [0.0, 100.0]}}
    states[0].pop("key")
    assert changes_of(folders) == {}


def test_options_of_a_comparison_are_not_ignored(tmp_path, capsys):
    (tmp_path / "comparison.json").write_text("{}")
    for argv in (
        [str(tmp_path / "comparison.json")],
        [str(tmp_path), "--rows", "x"],
        [str(tmp_path), "--panels", "rank"],
    ):
        assert main(argv) == 2 and "--to FILE.png" in capsys.readouterr().err


def test_figures_of_an_earlier_task_leave_the_top_level_with_it(tmp_path):
    """Those that the run has listed, and no others."""
    run = RunFolder(tmp_path)

    def write(folder, names):
        for name in names:
            _write(folder / "figures" / f"{name}.png")
        (folder / "results.json").write_text("{}", encoding="utf-8")
        Digests.of(folder).write()

    run.publish(0, lambda folder: write(folder, ["stability", "accuracy_matrix"]))
    (tmp_path / "figures" / "comparison.png").write_bytes(b"other")
    (tmp_path / "figures" / "prompt_usage.png").write_bytes(b"mine")
    run.publish(1, lambda folder: write(folder, ["stability"]))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"stability.png", "stability.svg", "comparison.png", "prompt_usage.png"}
