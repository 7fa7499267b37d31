"""The main job: a recipe that holds its promise, its unprojected twin and PGP as published, in one table."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from pgp_hf import PGPTrainer, load_pretrained
from pgp_hf.cli import experiment
from pgp_hf.runs.folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "examples" / "run_l2p_pgp.py"
FOLDERS = {"L2P": "baseline", "L2P-PGP": "published", "L2P-FUNCTIONAL": "."}
FEW = ("--max_train_samples_per_class", "3", "--max_eval_samples_per_class", "2", "--num_train_epochs", "1")


@pytest.fixture(scope="module")
def main():
    """Run the example on two tasks of a few digits; the frozen rows are left out, which have tests of their own."""

    def run(folder, *argv):
        given = ["run", "--output_dir", str(folder), "--num_tasks", "2", *FEW, "--use_cpu", "true", *argv]
        with tiny.script(SCRIPT) as script, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*given, "--disable_tqdm", "true"])
            patch.setattr(experiment, "without_prompts", lambda *_: {"frozen, ridge": frozen})
            patch.setattr(experiment.figures, "comparison", lambda rows, path, **_: drawn.append(list(rows)))
            script.main()

    frozen = {
        "per_task_average_accuracy": [100.0, 99.0],
        "average_accuracy": 99.0,
        "forgetting": 0.0,
        "drift": [0.0, 0.0],
        "accuracy_matrix": [[100.0, None], [99.0, 99.0]],
    }
    drawn: list[list[str]] = []
    run.drawn = drawn
    return run


@pytest.fixture(scope="module")
def finished(main, tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("main") / "out"
    main(folder)
    return folder


def weights(folder):
    return [(folder / own / "adapter_model.safetensors").read_bytes() for own in FOLDERS.values()]


def test_three_runs_in_their_folders_and_in_one_table(finished, main):
    rows = json.loads((finished / "comparison.json").read_text())
    assert list(rows) == ["frozen, ridge", *FOLDERS] == main.drawn[0]
    for label, own in FOLDERS.items():
        written = json.loads((finished / own / "results.json").read_text())
        written.pop("sha256")
        assert written == rows[label] and written["finished_tasks"] == 2
        assert (
            load_pretrained(finished / own).manifest == load_pretrained(finished).manifest
        )  # whose digests are right
        assert (finished / own / "task-2" / "adapter_model.safetensors").is_file()
    assert [rows[label]["projection"] for label in FOLDERS] == ["none", "pgp", "functional"]
    assert [rows[label]["head"] for label in FOLDERS] == ["statistics", "linear", "statistics"]
    configs = [json.loads((finished / own / "adapter_config.json").read_text()) for own in FOLDERS.values()]
    assert [config["head_type"] for config in configs] == ["token", "prompt", "token"]
    twin, _, own = (rows[label]["accuracy_matrix"][0] for label in FOLDERS)
    assert twin == own  # paired


def test_the_end_is_a_verdict_from_the_numbers(finished, main, capsys):
    main(finished, "--resume_from_checkpoint", "true")  # which trains nothing
    text = capsys.readouterr().out
    rows = json.loads((finished / "comparison.json").read_text())
    twin, own = rows["L2P"], rows["L2P-FUNCTIONAL"]
    *_, table, written, wins, verdict = text.strip().split("\n\n")
    assert table.split()[:3] == ["drift", "forgetting", "avg"] and "L2P-FUNCTIONAL" in table.splitlines()[-1]
    assert "published/: L2P-PGP, PGP as published" in written and "baseline/: L2P, the same" in written
    assert wins.startswith("frozen, ridge wins here (99.00 %)")
    assert f"moved {own['drift'][-1]:.3f} instead of {twin['drift'][-1]:.3f}" in " ".join(verdict.split())
    assert all(
        len(line) <= 100
        for line in "\n".join((table, written, wins, verdict)).splitlines()
        if str(finished) not in line
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_run_keeps_its_promise(tmp_path, without_figures):
    """On seed 42, as the command comes: at least as accurate as its twin, with at most a third of the drift."""
    with tiny.script(SCRIPT) as script, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["run", "--output_dir", str(tmp_path), "--use_cpu", "true", "--disable_tqdm", "true"]
        )
        script.main()
    rows = json.loads((tmp_path / "comparison.json").read_text())
    twin, own = rows["L2P"], rows["L2P-FUNCTIONAL"]
    assert own["seed"] == 42 and own["num_tasks"] == 5
    assert own["average_accuracy"] >= twin["average_accuracy"] and 0 < own["drift"][-1] <= twin["drift"][-1] / 3


@pytest.fixture
def killed(monkeypatch):
    """Have a run die when it begins in a folder of this name; the value names it."""
    train, where = PGPTrainer.train, dict[str, str]()

    def dies(self, **settings):
        if Path(self.args.output_dir).name == where.get("name"):
            raise KeyboardInterrupt
        return train(self, **settings)

    monkeypatch.setattr(PGPTrainer, "train", dies)
    return where


@pytest.mark.parametrize("name", tiny.some_of(["published", "out"], "published"))
def test_killed_between_the_rows_and_resumed(finished, main, killed, tmp_path, without_figures, name):
    out = tmp_path / "out"
    shutil.copytree(finished, out)  # an earlier run
    killed["name"] = name
    with pytest.raises(KeyboardInterrupt):
        main(out, "--overwrite_output_dir", "true")
    left = {own: not RunFolder(out / own).is_empty() for own in FOLDERS.values()}
    assert left == {"baseline": True, "published": name == "out", ".": False}  # nothing of the earlier run
    killed.clear()
    main(out, "--resume_from_checkpoint", "true")
    assert weights(out) == weights(finished)
    assert list(json.loads((out / "comparison.json").read_text())) == ["frozen, ridge", *FOLDERS]


def test_a_recipe_of_ones_own_leaves_no_published_run_of_an_earlier_job(finished, main, killed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "published" / "mine.txt").write_text("kept")
    killed["name"] = "baseline"  # before anything is trained
    with pytest.raises(KeyboardInterrupt):
        main(out, "--projection", "pgp", "--overwrite_output_dir", "true")
    assert all(RunFolder(out / own).is_empty() for own in FOLDERS.values())
    assert [path.name for path in (out / "published").iterdir()] == ["mine.txt"]


def test_no_run_beside_it_is_deleted_without_a_comparison(finished, main, killed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    killed["name"] = "out"
    with pytest.raises(KeyboardInterrupt):
        main(out, "--no_compare", "true", "--overwrite_output_dir", "true")
    assert {own: RunFolder(out / own).is_empty() for own in FOLDERS.values()} == {
        "baseline": False,
        "published": False,
        ".": True,
    }


def test_an_earlier_main_job_is_kept_unless_asked(finished, main):
    before = weights(finished)
    with pytest.raises(ValueError, match="holds an earlier run"):
        main(finished)
    assert weights(finished) == before


@pytest.mark.parametrize("argv", [("--projection", "functional", "--head", "statistics"), ("--no_compare", "true")])
def test_no_published_row_for_a_recipe_of_ones_own_nor_without_comparison(main, tmp_path, without_figures, argv):
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_run", lambda name, planned, _: runs.extend(planned))
        main(tmp_path / "out", *argv)
    beside = [] if "--no_compare" in argv else ["baseline"]
    assert [one.folder.name for one in runs] == [*beside, "out"] and runs[-1].projection.method == "functional"
