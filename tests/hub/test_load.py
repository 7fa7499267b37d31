"""Revisions from the Hub: loaded by tag in every way, without a network, refused when they are bad, and continued."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import tiny
from loopback import STRANGER, TOKEN

from pgp_hf import hub as package
from pgp_hf import load_pretrained

LOAD = """
import torch, tiny
import pgp_hf
classifier = pgp_hf.load_pretrained("me/run", backbone=tiny.backbone(), **options)
images = [tiny.stream().test(t)[0]["image"] for t in range(3)]
pixels = classifier.processor(images, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    result = classifier.model.base_model(pixel_values=pixels).logits.tolist()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run, pushed by nobody yet."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with tiny.without_figures():
        tiny.trainer(folder, num_train_epochs=1).train()
    return folder


@pytest.fixture(scope="module")
def pushed() -> dict:
    """What the Hub has of the run, once it has been pushed."""
    return {}


@pytest.fixture
def repo(hub, python, run, pushed):
    """The run on the Hub, as "me/run"."""
    if not pushed:
        python("from pgp_hf import hub; result = hub.push(folder, 'me/run').uploaded", folder=str(run))
        hub.requests.clear()
        pushed.update(repo=copy.deepcopy(hub.repos["me/run"]), objects=dict(hub.objects))
    hub.repos["me/run"] = copy.deepcopy(pushed["repo"])
    hub.objects.update(pushed["objects"])
    return hub.repos["me/run"]


def raw(run: Path, task: int) -> list:
    """The logits of the local folder's model."""
    names = {"options": {"revision": f"task-{task}"}}
    exec(LOAD.replace('"me/run"', repr(str(run))), names)
    return names["result"]


def test_every_tag_loads_to_the_bit_and_again_without_a_network(hub, repo, run, python, tmp_path):
    cache = str(tmp_path / "cache")
    for task in (1, 2, 3):
        assert python(LOAD, options={"revision": f"task-{task}", "cache_dir": cache}).value == raw(run, task)
    assert python(LOAD, options={"cache_dir": cache}).value == raw(run, 3)
    assert python(LOAD, options={"revision": repo.tags["task-2"], "cache_dir": cache}).value == raw(run, 2)
    asked = {one.path.rsplit("/", 1)[-1] for one in hub.requests if "/resolve/" in one.path}
    assert {"method.json", "method.safetensors"} <= asked and "README.md" not in asked
    assert asked <= {name.rpartition("/")[2] for name in package.UPLOADED_FILES}
    hub.requests.clear()
    offline = {"revision": "task-2", "cache_dir": cache, "local_files_only": True}
    assert python(LOAD, options=offline).value == raw(run, 2) and not hub.requests
    hub.fail(r".*", cut="before", times=None)  # the cable is out, and nobody said so
    assert python(LOAD, options={"revision": "task-2", "cache_dir": cache}).value == raw(run, 2)
    error = python(LOAD, options={"revision": "task-2", "cache_dir": str(tmp_path / "other")}, fails=True).error
    assert "ConnectionError: there is no folder me/run here, and me/run@task-2 is not in the cache; the Hub" in error


def test_bases_and_settings_by_tag(repo, run, python):
    code = """
    import pgp_hf
    from pgp_hf.projection import Projection
    projection = Projection.from_pretrained("me/run", revision="task-1")
    config = pgp_hf.ProjectionConfig.from_pretrained("me/run", revision="task-2")
    result = [config.to_dict(), {name: basis.columns.tolist() for name, basis in projection.bases.items()}]
    """
    local = load_pretrained(run, "task-1", backbone=tiny.backbone()).projection
    bases = {name: basis.columns.tolist() for name, basis in local.bases.items()}
    assert python(code).value == [local.config.to_dict(), bases]


def test_peft_and_the_pipeline_load_the_same(repo, run, python):
    code = (
        LOAD
        + """
from peft import PeftModel
from transformers import pipeline
other = PeftModel.from_pretrained(tiny.backbone(), "me/run", revision="task-2").eval()
with torch.no_grad():
    assert other(pixel_values=pixels).logits.tolist() == result
pipe = pipeline("image-classification", model=classifier.model, image_processor=classifier.processor)
assert [one[0]["label"] for one in pipe(images)] == [one[0]["label"] for one in classifier.predict(images)]
"""
    )
    assert python(code, options={"revision": "task-2"}).value == raw(run, 2)


def test_what_the_hub_has_not(repo, python):
    error = python(LOAD, options={"revision": "task-9"}, fails=True).error
    assert "ValueError: me/run has no revision 'task-9': it has task-1, task-2, task-3, main." in error
    error = python(LOAD.replace("me/run", "me/nothing"), options={}, fails=True).error
    assert "RepositoryNotFoundError" in error and "There is no folder me/nothing here either." in error


def test_a_private_run_needs_its_token(hub, repo, python):
    repo.private = True
    assert python(LOAD, options={"token": TOKEN}).value
    assert (
        "RepositoryNotFoundError" in python(LOAD, options={"token": STRANGER, "revision": "task-1"}, fails=True).error
    )


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_model.bin": None, "adapter_model.safetensors": False}, "adapter_model.bin.*can run code"),
        ({"sub/optimizer.pt": None}, "sub/optimizer.pt.*can run code"),
        ({"adapter_model.safetensors": b"\xff" * 64}, "adapter_model.safetensors is missing or damaged"),
        ({"results.json": False}, "no results.json"),
        ({"method.safetensors": False}, "has method.json, but no method.safetensors"),
        ({"results.json": b" " * (16 * 2**20 + 1)}, "results.json has 16777217 bytes, at most 16777216 are allowed"),
        ({"config.json": b'{"auto_map": {"AutoModel": "evil.Model"}}'}, "config.json asks for code"),
        ({"../../../evil.json": b"{}", "preprocessor_config.json": b"{}"}, "no image processor can be loaded"),
        ({"adapter_config.json": False}, "has no adapter_config.json"),
        ({"stream.json": b"{}", "digests.json": None}, "digests.json is missing or damaged"),
    ],
)
def test_bad_repositories(hub, repo, python, tmp_path, files, message):
    """False removes a file, None is a pickle that leaves a trace when it is read. Whoever wrote them left out digests."""
    files = {"digests.json": False, **files}
    pickled = pickle.dumps(Payload(tmp_path / "executed"))
    repo.edit(**{name: None if data is False else pickled if data is None else data for name, data in files.items()})
    error = python(LOAD, options={"cache_dir": str(tmp_path / "cache")}, fails=True).error
    assert re.search(f"(?s)ValueError: .*{message}", error), error
    assert not (tmp_path / "executed").exists() and not list(tmp_path.rglob("evil.json"))
    assert not any(one.path.endswith((".bin", ".pt")) for one in hub.requests if "/resolve/" in one.path)


def test_a_path_of_another_machine_is_no_backbone(hub, repo, python, tmp_path):
    """Not even when there is such a folder here."""
    tiny.backbone().save_pretrained(tmp_path / "vit")
    config = json.loads(repo.files()["adapter_config.json"])
    repo.edit(**{"digests.json": None})
    for name in (str(tmp_path / "vit"), "../vit"):
        repo.edit(**{"adapter_config.json": json.dumps({**config, "base_model_name_or_path": name}).encode()})
        error = python(LOAD.replace("backbone=tiny.backbone(), ", ""), options={}, fails=True).error
        assert "ValueError" in error and "pass the backbone" in error


GO_ON = """
import tiny
trainer = tiny.trainer(folder, num_train_epochs=1, **settings)
trainer.train(resume_from_checkpoint=source)
result = trainer.results.to_dict()
"""


def test_a_run_continued_from_the_hub_is_the_straight_run(repo, run, python, tmp_path):
    straight = json.loads((run / "results.json").read_text())
    found = python(GO_ON, folder=str(tmp_path / "on"), source="me/run@task-2", settings={}).value
    straight.pop("sha256")
    assert tiny.same_results(found, straight)  # drift too: the earlier tags have the features
    for t in (1, 2, 3):
        for name in ("adapter_model.safetensors", "projection.safetensors"):
            assert (tmp_path / "on" / f"task-{t}" / name).read_bytes() == (run / f"task-{t}" / name).read_bytes()


def test_a_continued_run_is_pushed_to_where_it_came_from(hub, repo, run, python, tmp_path):
    """Its earlier tasks are there already, and are the same."""
    repo.tags.pop("task-3")
    repo.main = repo.tags["task-2"]
    settings = {"push_to_hub": True, "hub_model_id": "me/run"}
    answer = python(GO_ON, folder=str(tmp_path / "on"), source="me/run@task-2", settings=settings)
    assert "Not on the Hub" not in answer.out
    assert list(repo.tags) == ["task-1", "task-2", "task-3"] and repo.main == repo.tags["task-3"]
    new = repo.files("task-3")["adapter_model.safetensors"]
    assert new == (run / "task-3" / "adapter_model.safetensors").read_bytes()


def test_a_snapshot_is_continued_like_any_folder(repo, run, python, tmp_path):
    code = "from huggingface_hub import snapshot_download; source = snapshot_download('me/run', revision='task-1')\n"
    found = python(code + GO_ON, folder=str(tmp_path / "on"), settings={}).value
    straight = json.loads((run / "results.json").read_text())
    straight.pop("sha256")
    assert tiny.same_results(found, straight)


def test_a_tag_that_is_missing_leaves_drift_without_its_task(repo, run, python, tmp_path):
    repo.tags.pop("task-1")
    answer = python(GO_ON, folder=str(tmp_path / "on"), source="me/run@task-2", settings={})
    assert answer.value["drift_lacks"] == [0] and "of tasks 1 neither features/ nor the revision" in answer.out
    assert not (tmp_path / "on" / "task-1").exists()
