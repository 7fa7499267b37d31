"""`pgp-hf learn`: a finished run is taught the classes of a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import tiny

from pgp_hf import load_pretrained
from pgp_hf.cli import learn
from pgp_hf.cli.main import main
from pgp_hf.runs.folder import MANIFEST, RESULTS

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    """A finished run of three tasks, six classes, that names its backbone."""
    return tiny.finished_run(tmp_path_factory.mktemp("run"), head="statistics")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of images of the classes cat and dog, and of more images of class 0."""
    root, new = tmp_path_factory.mktemp("photos"), tiny.data(classes=2, train=6, test=3, seed=5)
    for split, images in new.items():
        for i, row in enumerate(images):
            folder = root / split / ("cat", "dog")[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    shutil.copytree(root / "train" / "cat", root / "one" / "owl")
    shutil.copytree(root / "train" / "dog", root / "again" / "class 0")
    return root


@pytest.fixture
def teach(run, tmp_path, capsys):
    def call(*options, source=run, out=tmp_path / "out"):
        capsys.readouterr()
        fixed = ("--output_dir", out, "--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", 1)
        code = main(["learn", *map(str, (source, *fixed, *options))])
        return code, *capsys.readouterr()

    return call


def read(folder, name=RESULTS):
    return json.loads((Path(folder) / name).read_text())


def test_a_folder_of_new_classes(run, photos, teach, tmp_path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code, out, err = teach("--train_dir", photos / "train", "--test_dir", photos / "test")
    assert (code, err) == (0, "")
    assert f"{run}, task-3, knows 6 classes (" in out
    rows = {line.partition("  task")[2].strip()[:1]: line.split() for line in out.splitlines() if "  task " in line}
    results = read(tmp_path / "out")
    assert rows["4"][:6] == ["new", "task", "4:", "cat,", "dog", "12"]
    assert rows["4"][6:] == [f"{results['accuracy_matrix'][3][3]:.2f}"]
    assert rows["1"][-3:] == [f"{results['accuracy_matrix'][2][0]:.2f}", "not", "measured"]
    assert results["accuracy_matrix"][3][:3] == [None] * 3 and "--known_test_dir" in out
    assert f"pgp-hf predict {tmp_path / 'out'} photo.jpg" in out
    manifest = read(tmp_path / "out", MANIFEST)
    assert manifest["tasks"][3]["test"]["num_images"] == 6 and manifest["label_names"][6:] == ["cat", "dog"]
    images = sorted((photos / "test" / "cat").iterdir())
    named = {
        label["label"] for labels in load_pretrained(tmp_path / "out").predict(images, top_k=99) for label in labels
    }
    assert named == {*(f"class {c}" for c in range(6)), "cat", "dog"}
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_known_test_images_are_measured(run, photos, teach, tmp_path):
    data = tmp_path / "data"
    for split, rows in tiny.data().items():
        rows.to_parquet(data / f"{split}.parquet")
    code, out, err = teach("--train_dir", photos / "train", "--known_test_dataset", data)
    assert code == 0 and "not measured" not in out and "Not measured" not in out, err
    assert None not in read(tmp_path / "out")["accuracy_matrix"][3]
    # the images of the task that has just been learned are known too, and were held out of their folder
    known = ("--known_test_dir", photos / "train")
    code, out, err = teach("--train_dir", photos / "one", *known, source=tmp_path / "out", out=tmp_path / "next")
    assert code == 0, err
    last = read(tmp_path / "next")["accuracy_matrix"][4]
    assert [value is None for value in last] == [True, True, True, False, False]
    assert "new    task 5: owl" in out


def test_known_classes_may_come_again_and_nothing_may_be_new(photos, teach):
    code, out, err = teach("--train_dir", photos / "again")
    assert code == 0 and "new    task 4: more of class 0" in out and "all 6 classes" in out, err


def test_a_revision_and_a_finished_run_that_is_resumed(photos, teach, tmp_path):
    given = ("--train_dir", photos / "train", "--revision", "task-2", "--figures", "none")
    code, out, err = teach(*given)
    assert "README.md (model card);" in out
    assert code == 0 and "task-2, knows 4 classes" in out and "new    task 3: cat, dog" in out, err
    assert not (tmp_path / "out" / "task-4").exists()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    code, again, _ = teach(*given, "--resume_from_checkpoint", "true")
    assert code == 0 and again.splitlines()[-6:] == out.splitlines()[-6:]
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}


def test_integer_labels_are_named(teach, tmp_path):
    numbers = tiny.data(classes=2, train=6, test=2, seed=5).cast_column("label", datasets.Value("int64"))
    for split, rows in numbers.items():
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    code, _, err = teach("--dataset_name", tmp_path / "data")
    assert code == 2 and "by --class_names" in err and not list((tmp_path / "out").glob("*"))
    code, out, err = teach("--dataset_name", tmp_path / "data", "--class_names", "1=dog", "0=cat")
    assert code == 0 and "new    task 4: cat, dog" in out, err
    assert "README.md (model card), figures/;" in out


@pytest.mark.parametrize("given", [["3=cat", "dog"], ["dog", "3=cat"], ["3=cat", "3=dog"]])
def test_names_for_some_labels_or_several_for_one_are_refused(given):
    with pytest.raises(
        ValueError, match="expected a name for each label .*, or all of them as LABEL=NAME, each label once"
    ):
        learn._named_labels(given)
    assert learn._named_labels(["3=cat", "-1=a=b"]) == {3: "cat", -1: "a=b"}
    assert learn._named_labels(["cat", "do=g"]) == ["cat", "do=g"] and learn._named_labels(None) is None


def test_names_that_differ_only_in_case(photos, teach, tmp_path):
    shutil.copytree(photos / "one" / "owl", tmp_path / "photos" / "Class 1")
    with pytest.warns(UserWarning, match=r"'Class 1' differs from 'class 1' only in case or blanks"):
        assert teach("--train_dir", tmp_path / "photos")[0] == 0


# ---- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_run(run, photos, tmp_path, capsys):
    argv = [str(run), "--train_dir", str(photos / "train"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    args = learn.parse(argv, None).training
    assert (args.learning_rate, args.augmentation, args.seed, args.num_train_epochs) == (0.01, "flip", 3, 1)
    assert args.per_device_train_batch_size == 4
    halved = learn.parse([*argv, "--gradient_accumulation_steps", "2", "--learning_rate", "0.5"], None).training
    assert (halved.per_device_train_batch_size, halved.learning_rate) == (2, 0.5)


def test_what_differs_from_the_run_is_told(photos, teach):
    out = teach("--train_dir", photos / "train", "--learning_rate", 0.02)[1]
    assert "learning_rate: 0.02, was 0.01" in out and "augmentation" not in out


def test_a_revision_decides_nothing_that_is_not_a_setting_of_training():
    recorded = {"learning_rate": 0.5, "push_to_hub": True, "output_dir": "/", "report_to": "all", "optim_args": None}
    results = {"seed": 7, "eval_mask": "none", "training": {**recorded, "images_per_step": 12}}
    expected = {"learning_rate": 0.5, "seed": 7, "eval_mask": "none", "per_device_train_batch_size": 4}
    assert learn.recorded(results, micro_batches=3) == expected
    assert learn.recorded({"training": "broken"}) == learn.recorded({}) == {}


def test_help_needs_no_run(capsys):
    with pytest.raises(SystemExit) as error:
        main(["learn", "--help"])
    told = capsys.readouterr().out
    assert error.value.code == 0
    for option in (
        "RUN_OR_REPO",
        "--train_dir",
        "--known_test_dir",
        "--learning_rate RATE",
        "--push_to_hub",
        "--class_names",
    ):
        assert option in told


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give the new images by --train_dir"),
        (("--train_dir", "PHOTOS/train", "--dataset_name", "me/data"), "give the new images by --train_dir"),
        (("--dataset_name", "me/data", "--test_dir", "PHOTOS/test"), "--test_dir goes with --train_dir"),
        (("--train_dir", "PHOTOS/train/cat"), "is not in the subfolder of a class"),
        (("--train_dir", "PHOTOS/train", "--test_dir", "PHOTOS/one"), "labels are in the test split but not in train"),
        (("--train_dir", "PHOTOS/train", "--revision", "task-9"), "choose one of task-1, task-2, task-3"),
        (("--train_dir", "PHOTOS/train", "--known_test_dir", "PHOTOS/test"), "--known_test_dir has no image of the classes"),
        (("--train_dir", "PHOTOS/train", "--known_test_dir", "PHOTOS/again"), "--known_test_dir does not have the test images"),
        (("--train_dir", "PHOTOS/train", "--known_test_dir", "a", "--known_test_dataset", "b"), "not both"),
        (("--train_dir", "PHOTOS/train", "--test_fraction", "2"), "test_fraction must lie strictly between 0 and 1"),
        (("--train_dir", "PHOTOS/train", "--resume_from_checkpoint", "out"), "say true"),
        (("--train_dir", "PHOTOS/train", "--lerning_rate", "1"), "lerning_rate"),
        (("--train_dir", "PHOTOS/train", "--reinit_optimizer", "false"), "reinit_optimizer"),
    ],
)  # fmt: skip
def test_refused_in_one_line_before_training(options, message, photos, teach, tmp_path):
    code, out, err = teach(*(option.replace("PHOTOS", str(photos)) for option in options))
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert "Task 4" not in out and not list((tmp_path / "out").glob("*"))


def test_other_refusals(run, photos, teach, tmp_path, capsys):
    assert main(["learn", str(run), "--train_dir", str(photos / "train")]) == 2
    assert "error: --output_dir is missing" in capsys.readouterr().err
    code, _, err = teach("--train_dir", photos / "train", source=tmp_path / "nowhere")
    assert code == 2 and "nowhere does not exist: expected a run's folder" in err
    shutil.copytree(run, tmp_path / "out")
    code, _, err = teach("--train_dir", photos / "train")
    assert code == 2 and "--overwrite_output_dir true" in err and "--resume_from_checkpoint true" in err
    with pytest.raises(SystemExit) as error:
        main(["learn", "--output_dir", str(tmp_path)])
    assert error.value.code == 2


def test_another_backbone_and_broken_images(photos, teach, tmp_path):
    for name, settings, message in (
        ("weights", {"seed": 8}, "weights are not those"),
        ("size", {"hidden_size": 36}, ""),
    ):
        tiny.backbone(**settings).save_pretrained(tmp_path / name)
        code, out, err = teach("--train_dir", photos / "train", "--backbone", tmp_path / name)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    shutil.copytree(photos / "train", tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"\x89PNG broken")
    code, out, err = teach("--train_dir", tmp_path / "photos")
    assert code == 2 and "broken.png" in err and "Task 4" not in out
    assert not list((tmp_path / "out").glob("*"))


def test_an_adapter_without_a_run(photos, teach, tmp_path):
    tiny.model().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    code, _, err = teach("--train_dir", photos / "train", source=tmp_path / "adapter")
    assert code == 2 and "is an adapter without a run" in err
