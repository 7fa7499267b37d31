"""The example scripts, as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import tiny

from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig, ProjectionConfig, metrics
from pgp_hf.cli import experiment
from pgp_hf.cli.arguments import RunArguments
from pgp_hf.cli.parsing import parse, prompt_arguments
from pgp_hf.cli.recipes import as_published

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "run_l2p_pgp.py"


def forked(*arguments, cwd, script=SCRIPT):
    """Run a script without a launcher; return its exit code and what it wrote."""

    def work():
        os.chdir(cwd)
        sys.argv = [str(script), *map(str, arguments)]
        runpy.run_path(str(script), run_name="__main__")

    code = forks.wait(forks.start(work, cwd / "log", {"ACCELERATE_USE_CPU": "1"}))[0]
    return code, (cwd / "log").read_text()


def launch(*arguments, cwd, script=SCRIPT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            str(script),
            *map(str, arguments),
        ],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def script():
    with tiny.script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A backbone folder and a folder of parquet files, of unusual sizes and column names."""
    root = tmp_path_factory.mktemp("local")
    tiny.backbone(num_labels=9, patch_size=4, hidden_size=36).save_pretrained(root / "vit")
    tiny.processor().save_pretrained(root / "vit")
    data = tiny.data(classes=7).rename_columns({"image": "img", "label": "fine_label"})
    for split, rows in data.items():
        rows.to_parquet(root / "data" / f"{split}.parquet")
    return root


def test_local_backbone_and_data_side_by_side(local, tmp_path):
    out = tmp_path / "out"
    code, said = forked(
        *("--model_name_or_path", local / "vit", "--dataset_name", local / "data", "--image_column_name", "img"),
        *("--label_column_name", "fine_label", "--num_tasks", 3, "--image_size", 24, "--num_train_epochs", 1),
        *("--pool_size", 4, "--top_k", 2, "--energy", 0.9, "--output_dir", out, "--max_train_samples_per_class", 6),
        cwd=tmp_path,
    )
    assert code == 0, said[-3000:]
    rows = json.loads((out / "comparison.json").read_text())
    frozen = [f"frozen, {name}" for name in ("nearest class mean", "shrinkage LDA", "random-projection ridge")]
    assert list(rows) == [*frozen, "L2P", "L2P-PGP"]
    assert rows["L2P"]["accuracy_matrix"][0] == rows["L2P-PGP"]["accuracy_matrix"][0]  # paired
    for folder, label in ((out, "L2P-PGP"), (out / "baseline", "L2P")):
        written = json.loads((folder / "results.json").read_text())
        digests = written.pop("sha256")
        assert set(digests) == {
            "adapter_model.safetensors",
            "projection.safetensors",
            "method.safetensors",
            "backbone.float32",
        }
        assert written == rows[label]
    assert (out / "figures" / "comparison.png").is_file() and (out / "task-3").is_dir()
    assert json.loads((out / "adapter_config.json").read_text())["interpolate_pos_encoding"] is True
    for name, row in rows.items():
        assert f"{name}" in said and f"{row['average_accuracy']:.2f}" in said
    assert str(out) in said and "\nTask 3 of 3: " in said and "training task 3" not in said
    manifest = (out / "stream.json").read_text()
    assert str(tmp_path.parent) not in manifest and json.loads(manifest)["tasks"][0]["train"]["num_images"] == 18


@pytest.mark.slow
@pytest.mark.parametrize(("method", "label"), [("dualprompt", "DualPrompt"), ("clip", "CLIP")])
def test_the_other_methods_on_the_embedded_default(tmp_path, method, label):
    few = ("--max_train_samples_per_class", 4, "--max_eval_samples_per_class", 3, "--num_train_epochs", 1)
    done = launch(*few, cwd=tmp_path, script=SCRIPT.with_name(f"run_{method}_pgp.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out" / f"{method}_pgp"
    rows = json.loads((out / "comparison.json").read_text())
    assert list(rows)[-3:] == [label, f"{label}-PGP", f"{label}-FUNCTIONAL"]
    assert ("frozen, zero-shot" in rows) is (method == "clip")
    assert rows[label]["accuracy_matrix"][0] == rows[f"{label}-FUNCTIONAL"]["accuracy_matrix"][0]
    assert "scikit-learn digits" in (out / "README.md").read_text() and (out / "task-5").is_dir()


def test_a_comparison_counts_the_classes_as_figures_on_demand_do(tmp_path, monkeypatch):
    row = {"drift": [0.0], "forgetting": None, "average_accuracy": 9.0, "per_task_average_accuracy": [9.0]}
    manifest, drawn = {"tasks": [{"classes": [0, 1]}]}, []
    (tmp_path / "stream.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(experiment.figures, "comparison", lambda rows, path, *, manifest: drawn.append(manifest))
    for draw in (True, False):
        experiment.print_comparison({"L2P": row}, tmp_path, draw=draw)
    assert drawn == [manifest] and (tmp_path / "comparison.json").is_file()


def test_a_table_of_tasks_learned_one_by_one_and_as_one():
    matrices = {"L2P": [[90.0, None], [80.0, 95.0]], "joint": [[None, None], [85.0, 95.0]]}
    rows = {
        name: {"accuracy_matrix": matrix, **metrics.summarize(matrix), "drift": [0.0, 0.125]}
        for name, matrix in matrices.items()
    }
    header, _, own, joint = experiment.table(rows).splitlines()
    assert header.split() == ["drift", "forgetting", "avg", "acc", "task", "1", "task", "2"]
    assert own.split() == ["L2P", "0.125", "10.00", "87.50", "90.00", "87.50"]
    assert joint.split() == ["joint", "0.125", "–", "90.00", "–", "90.00"]


def test_a_table_says_what_was_not_measured():
    matrix = [[90.0, None], [None, 95.0]]
    row = {"finished_tasks": 2, "accuracy_matrix": matrix, **metrics.summarize(matrix), "drift": [0.0, None]}
    own = experiment.table({"L2P": row}).splitlines()[-1]
    assert re.split(" {2,}", own) == ["L2P", *["not measured"] * 3, "90.00", "not measured"]


def arguments(*argv, method="l2p", config=L2PConfig):
    return parse("", prompt_arguments(config), method, argv)


def test_the_embedded_default_is_used_when_nothing_is_named():
    model, data, prompts, run, training = arguments()
    assert (data.num_tasks, training.output_dir, training.overwrite_output_dir) == (5, "out/l2p_pgp", True)
    assert model.source.endswith("vit") and training.augmentation == "none"
    assert training.num_train_epochs == 3 and type(training.num_train_epochs) is float
    training = arguments("--output_dir", "x", "--augmentation=flip").training
    assert (training.output_dir, training.overwrite_output_dir, training.augmentation) == ("x", False, "flip")
    assert arguments("--resume_from_checkpoint", "true").training.overwrite_output_dir is False
    _, data, *_, training = arguments("--model_name_or_path", "m", "--output_dir", "x")
    assert (data.num_tasks, training.augmentation, training.num_train_epochs) == (10, "crop_flip", 5)
    model, *_, training = arguments(method="clip", config=ClipPromptConfig)
    assert model.source.endswith("clip") and training.output_dir == "out/clip_pgp"


OF_THE_RECIPE = ProjectionConfig(method="functional", energy=0.95, apply_to="both", max_images=100)


def test_without_a_recipe_of_ones_own_the_main_job_has_one():
    for argv in (
        (),
        ("--seed", "1"),
        ("--num_tasks=2", "--no_compare", "true"),
        ("--output_dir", "x", "--pool_size", "7"),
    ):
        *_, prompts, run, _ = arguments(*argv)
        assert run.main_job and run.config() == OF_THE_RECIPE
        assert (run.head, prompts.head_type) == ("statistics", "token")
    published = as_published(arguments("--pool_size", "7", "--seed", "1"))
    assert published.run == RunArguments() and not published.run.main_job
    assert vars(published.prompts) == vars(arguments("--pool_size", "7", "--projection", "pgp").prompts)
    for argv in (
        ("--projection", "pgp"), ("--energy=0.9",), ("--head", "linear"), ("--head-type", "prompt"), ("--dataset_name", "d"),
        ("--model_name_or_path", "m", "--output_dir", "x"), ("--preset", "cifar100-10"),
    ):  # fmt: skip
        run = arguments(*argv).run
        assert not run.main_job and run.projection == "pgp" and run.head == "linear"


def test_a_dry_run_shows_what_is_trained_beside_the_main_job(capsys):
    def shown(*argv):
        with pytest.raises(SystemExit):
            arguments("--dry_run", *argv)
        return json.loads(capsys.readouterr().out)

    settings = shown()
    assert settings["projection"]["method"] == "functional" and settings["projection"]["unprojected twin"] is True
    published = settings["beside it, as published"]
    assert published["projection"] == ProjectionConfig().to_dict() and published["head"] == "linear"
    assert settings["prompts"]["head_type"] == "token" != published["prompts"]["head_type"]
    for argv in (("--no_compare", "true"), ("--projection", "functional")):
        assert "beside it, as published" not in shown(*argv)


@pytest.mark.parametrize("config", [L2PConfig, DualPromptConfig, ClipPromptConfig])
def test_prompt_arguments_are_those_that_the_configuration_names(config):
    fields = {one.name: one for one in dataclasses.fields(config)}
    made = dataclasses.fields(prompt_arguments(config))
    assert tuple(one.name for one in made) == config.command_line != ()
    prompts = arguments("--projection", "pgp", config=config).prompts
    for one in made:
        known = fields[one.name]
        assert one.metadata == known.metadata and known.type != one.type  # the configuration keeps its own fields
        default = known.default_factory() if known.default is dataclasses.MISSING else known.default
        assert getattr(prompts, one.name) == default


def test_help_explains_every_argument(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--help_all"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    text = capsys.readouterr().out
    assert not stop.value.code
    options = text[text.index("options:") :]
    for name in ("--projection", "--energy", "--top_k", "--num_tasks", "--image_size", "--train_mask", "--no_compare"):
        assert f"\n  {name} " in options
    words = " ".join(options.split())
    assert "prompts selected for each image (default: 5)" in words
    assert "the classes are divided into (default: 10)" in words  # with a source of one's own


def test_help_of_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        arguments("--preset", "cifar100-20", "--help_all")
    assert "the classes are divided into (default: 20)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_tasks", "11"], "num_tasks.*11"),
        (["--top_k", "30"], "top_k=30 is above pool_size=10"),
        (["--energy", "1.5"], r"energy=1.5 is outside \(0, 1\]"),
        (["--image_size", "30"], "image_size=30 is not a multiple of the backbone's patch size 8"),
        (["--dataset_name", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset_name", "a", "--train_dir", "b"], "not both"),
        (["--label_column_name", "nothing"], "nothing"),
        (["--projection", "functional", "--probe_space", "statistics"], "needs an adapter with head='statistics'"),
    ],
)
def test_bad_arguments_stop_before_training(script, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["run", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", *argv])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.main()
    assert not list((tmp_path / "out").rglob("task-*"))  # nor the twin's


def test_table_lines_up():
    rows = {
        "a": {
            "per_task_average_accuracy": [100.0, 5.0],
            "average_accuracy": 5.0,
            "forgetting": -1.0,
            "drift": [0, 0.25],
        },
        "a longer name": {
            "per_task_average_accuracy": [1.0, 2.0],
            "average_accuracy": 2.0,
            "forgetting": 10.5,
            "drift": [0, 1],
        },
    }
    lines = experiment.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["a", "0.250", "-1.00", "5.00", "100.00", "5.00"]


def test_a_table_of_many_tasks_fits_100_columns():
    accuracies = [100.0 - t for t in range(20)]
    row = {"per_task_average_accuracy": accuracies, "average_accuracy": 81.0, "forgetting": 1.0, "drift": [0.0] * 20}
    header, rule, own = experiment.table({"frozen, random-projection ridge": row}).splitlines()
    assert len(rule) <= 100 and re.findall(r"task (\d+)", header) == ["1", "7", "14", "20"]
    assert own.split()[-4:] == ["100.00", "94.00", "87.00", "81.00"]
