"""What leaves the machine: the files of the contract alone, without a path of this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModel, PeftConfig

from pgp_hf import embedded, hub
from pgp_hf.runs.atomic import write_tensors
from pgp_hf.runs.digests import Digests


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished task, trained here."""
    folder = tmp_path_factory.mktemp("run")
    run = tiny.trainer(folder, num_train_epochs=1)
    run.train_task(0)
    return folder / "task-1"


@pytest.fixture
def task(finished, tmp_path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "task-1"))


def change(path: Path, **content) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    Digests.of(path.parent).write()  # as if the run had written it


def taken(task: Path, **kwargs) -> dict[str, bytes]:
    target = task.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    files = hub.snapshot(task, target, repo_id="me/run", **kwargs)
    assert sorted(file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()) == files
    return {path: (target / path).read_bytes() for path in files}


def test_every_file_that_a_trainer_writes_is_uploaded(finished):
    written = sorted(file.relative_to(finished).as_posix() for file in finished.rglob("*") if file.is_file())
    assert hub.listed(finished) == written  # a file that is new in the contract belongs into hub.UPLOADED_FILES


@pytest.mark.parametrize(
    "stray",
    [
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "model.safetensors",
        "features/task-1.safetensors",
        "figures/deep/plot.png",
        "figures/plot.svg",
        "task-1/results.json",
        ".env",
        "README.md.bak",
        "results.json/x.png",
    ],
)
def test_nothing_else_is(task, stray):
    before = hub.listed(task)
    if (task / stray).parent.is_file():
        (task / stray).parent.unlink()
        before.remove("results.json")
    (task / stray).parent.mkdir(parents=True, exist_ok=True)
    (task / stray).write_text("{}")
    assert hub.listed(task) == before


def test_files_without_paths_are_copied_byte_for_byte(task):
    files = taken(task)
    own = ("README.md", "digests.json")
    assert all(files[path] == (task / path).read_bytes() for path in files if path not in own)
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["model-index"][0]["name"] == "run" and '"me/run"' in card.text


@pytest.mark.parametrize(
    "base, base_model, expected",
    [
        ("google/vit-base", None, "google/vit-base"),
        ("google/vit-base", "other/vit", "google/vit-base"),  # what the run says wins
        ("/home/jane/models/vit-tiny", None, None),
        ("/home/jane/models/vit-tiny", "google/vit-tiny", "google/vit-tiny"),
        (r"C:\Users\jane\vit-tiny", None, None),
        ("../models/vit-tiny", None, None),
        ("~/vit-tiny", None, None),
        (None, None, None),
        (None, "google/vit-tiny", "google/vit-tiny"),
        ("pgp_hf:embedded-vit", None, "pgp_hf:embedded-vit"),
        (str(embedded.vit_path()), None, "pgp_hf:embedded-vit"),
        (str(embedded.clip_path()), None, "pgp_hf:embedded-clip"),
    ],
)
def test_backbone_by_a_name_that_others_can_use(task, base, base_model, expected):
    change(task / "adapter_config.json", base_model_name_or_path=base)
    files = taken(task, base_model=base_model)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == expected
    data, card = ModelCard(files["README.md"].decode()).data, files["README.md"].decode()
    assert data.base_model == (expected if expected and "/" in expected else None)
    for part in ("/home", "jane", "Users", "../", "~", str(Path(embedded.__file__).parent)):
        assert part not in card
    if expected is None and base:
        assert "path/to/vit-tiny" in card  # its last name, for the reader to recognise
    if expected and ":" in expected:
        assert f'embedded.resolve("{expected}")' in card and "insert its path" not in card


@pytest.mark.parametrize("path", ["/data/jane/birds", "/data/jane/birds/", r"D:\jane\birds", "~/jane/birds"])
def test_paths_in_json_keep_their_last_part(task, path):
    manifest = json.loads((task / "stream.json").read_text())
    change(task / "stream.json", dataset={**(manifest.get("dataset") or {}), "name": path, "files": [path]})
    change(task / "results.json", note={"from": path})
    files = taken(task)
    assert json.loads(files["stream.json"])["dataset"]["name"] == "birds"
    assert json.loads(files["stream.json"])["dataset"]["files"] == ["birds"]
    assert json.loads(files["results.json"])["note"] == {"from": "birds"}
    assert b"jane" not in b"".join(files.values())
    assert json.loads(files["stream.json"])["tasks"] == manifest["tasks"]


def test_a_methods_files_go_along_without_paths_and_the_card_tells_of_it(task):
    limits = ["It keeps nothing of old images."]
    card = {
        "title": "A method of ours",
        "sentence": "Weights that matter move less.",
        "limits": limits,
        "citation": None,
    }
    method = {"name": "ours", "settings": {"exemplars": "/data/jane/exemplars"}, "state": {"seen": 2}, "card": card}
    (task / "method.json").write_text(json.dumps(method))
    write_tensors(task / "method.safetensors", {"importance": torch.ones(3)})
    Digests.of(task).write()
    files = taken(task)
    assert files["method.safetensors"] == (task / "method.safetensors").read_bytes()
    assert json.loads(files["method.json"]) == {**method, "settings": {"exemplars": "exemplars"}}
    text = " ".join(files["README.md"].decode().split())
    assert card["title"] in text and card["sentence"] in text and limits[0] in text and "jane" not in text


def test_a_run_of_before_there_were_files_of_a_method(task):
    for name in ("method.json", "method.safetensors"):
        (task / name).unlink()
    Digests.of(task).write()
    assert not {"method.json", "method.safetensors"} & taken(task).keys()


def test_class_names_are_no_paths(task):
    names = {str(c): f"/m/0{c}" for c in range(6)}  # as in Open Images
    change(task / "adapter_config.json", id2label=names)
    change(task / "stream.json", label_names=list(names.values()))
    files = taken(task)
    assert json.loads(files["adapter_config.json"])["id2label"] == names
    assert json.loads(files["stream.json"])["label_names"] == list(names.values())


def test_the_digests_are_those_of_the_copies_without_what_people_edit(task):
    own = json.loads((task / "digests.json").read_text())["files"]
    change(task / "adapter_config.json", base_model_name_or_path="/home/jane/vit")
    files = taken(task)
    content = json.loads(files["digests.json"])
    assert content.keys() == {"files", "features"} and content["features"] is None
    edited = {path for path in own if path == "README.md" or path.startswith("figures/")}
    assert content["files"].keys() == own.keys() - edited and edited
    for path, digest in content["files"].items():
        assert digest == {"sha256": hashlib.sha256(files[path]).hexdigest(), "bytes": len(files[path])}
        assert (digest == own[path]) is (path != "adapter_config.json")


def test_a_run_of_before_there_were_digests_is_uploaded_as_it_was(task):
    (task / "digests.json").unlink()
    assert "digests.json" not in taken(task)


@pytest.mark.parametrize("name", ["projection.safetensors", "preprocessor_config.json", "stream.json"])
def test_a_file_that_is_damaged_or_missing_does_not_leave(task, name):
    data = bytearray((task / name).read_bytes())
    data[len(data) // 2] ^= 1
    (task / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is (not the file that the run wrote|missing or damaged)"):
        taken(task)
    if name == "projection.safetensors":
        (task / name).unlink()
        with pytest.raises(ValueError, match=f"has no {name}, which digests.json lists"):
            taken(task)


def test_a_folder_that_is_no_finished_task(task):
    (task / "results.json").unlink()
    with pytest.raises(ValueError, match="results.json is missing or damaged"):
        hub.snapshot(task, task.parent / "copy", repo_id="me/run")


def test_embedded_backbones_are_found_by_name_on_any_machine(tmp_path):
    assert embedded.resolve("pgp_hf:embedded-vit") == embedded.vit_path()
    assert embedded.resolve("pgp_hf:embedded-clip") == embedded.clip_path()
    assert embedded.resolve("google/vit-base") is None and embedded.resolve(None) is None
    assert embedded.name_of(embedded.vit_path()) == "pgp_hf:embedded-vit"
    assert embedded.name_of(tmp_path) is None and embedded.name_of(None) is None
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(str(embedded.vit_path()), num_labels=3)
    tiny.model(base=base).save_pretrained(tmp_path, save_embedding_layers=False)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "pgp_hf:embedded-vit"
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == str(embedded.vit_path())
    assert AutoPeftModel.from_pretrained(str(tmp_path)).get_base_model().num_labels == 3


def test_a_local_backbone_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    """A relative one may look like the id of somebody's model on the Hub."""
    monkeypatch.chdir(tmp_path)
    base = tiny.backbone()
    base.save_pretrained("models/vit")
    base = type(base).from_pretrained("models/vit")
    run = tiny.trainer("run", model=tiny.model(base=base), num_train_epochs=1)
    run.train_task(0)
    saved = json.loads(Path("run/task-1/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "models" / "vit")
    assert json.loads(taken(tmp_path / "run" / "task-1")["adapter_config.json"])["base_model_name_or_path"] is None
