"""Images that a run stores stay with it; they are uploaded for those who ask."""

from __future__ import annotations

import json

import tiny

from pgp_hf.methods import create

FILE = "exemplars.safetensors"
PUSH = "from pgp_hf import hub; pushed = hub.push(folder, repo, **options); result = [pushed.uploaded, pushed.present]"
LOAD = "import tiny; from pgp_hf import load_pretrained as load; result = load('me/run', backbone=tiny.backbone()).classes"
RESUME = """
import tiny
from pgp_hf.methods import create
with tiny.without_figures():
    method = create("derpp", memory_size=7, memory_stores="images")
    trainer = tiny.trainer(folder, method=method, num_train_epochs=1, **settings)
    try:
        trainer.train(resume_from_checkpoint=where)
        result = trainer.results.to_dict()
    except ValueError as error:
        result = str(error)
"""


def test_images_are_uploaded_only_if_asked_for(hub, python, tmp_path):
    with tiny.without_figures():
        method = create("derpp", memory_size=7, memory_stores="images")
        run = tiny.trainer(tmp_path / "run", method=method, num_train_epochs=1)
        run.train_task(0)
        run.train_task(1)
        push = {"folder": str(tmp_path / "run")}
        stored = (tmp_path / "run" / FILE).read_bytes()
        assert python(PUSH, repo="me/run", options={}, **push).value == [["task-1", "task-2"], []]
        assert python(PUSH, repo="me/open", options={"exemplars": True}, **push).value == [["task-1", "task-2"], []]
        plain, opened = hub.repos["me/run"], hub.repos["me/open"]
        assert FILE not in plain.files("task-2") and FILE not in opened.files("task-1")  # nor kept here
        assert opened.files("task-2")[FILE] == stored
        assert python(PUSH, repo="me/open", options={}, **push).value == [[], ["task-1", "task-2"]]
        # what is published stays
        answer = python(
            "from pgp_hf.hub import main; result = main(argv)",
            argv=["push", str(tmp_path / "run"), "--repo_id", "me/run", "--exemplars"],
        )
        assert answer.value == 1 and "me/run has task-2 without exemplars.safetensors" in answer.out
        assert FILE not in plain.files("task-2")
        run.train_task(2)
    assert python(PUSH, repo="me/open", options={}, **push).value == [["task-3"], ["task-1", "task-2"]]
    assert FILE not in opened.files("task-3") and opened.files("task-2")[FILE] == stored
    expected = json.loads((tmp_path / "run" / "results.json").read_text())
    expected.pop("sha256")
    # the model is there without them, and goes on with them
    assert len(python(LOAD).value) == 4
    settings = {"folder": str(tmp_path / "a"), "settings": {}}
    refused = python(RESUME, where="me/run@task-2", **settings).value
    assert f"has no {FILE}" in refused and "push --exemplars" in refused
    again = python(RESUME, where="me/open@task-2", **settings).value
    assert tiny.same_results(again, expected)


def test_a_run_pushes_them_if_told(hub, python, tmp_path):
    pushing = {"push_to_hub": True, "hub_model_id": "me/run", "hub_exemplars": True}
    python(RESUME, folder=str(tmp_path / "run"), where=None, settings=pushing)
    assert all(FILE in hub.repos["me/run"].files(f"task-{t}") for t in (1, 2, 3))
    assert [(tmp_path / "run" / f"task-{t}" / FILE).exists() for t in (1, 2, 3)] == [False, False, True]
    assert not tiny.trainer(tmp_path / "other").args.hub_repo().exemplars
