"""Learning on from the Hub: equal to a run in one process, uploaded to where it may go, and linked to where it came from."""

from __future__ import annotations

import json
import re
import textwrap
import time
from pathlib import Path

import pytest
import tiny
from loopback import READER, STRANGER, TOKEN
from loopback.server import metadata_errors

from pgp_hf import hub as package
from pgp_hf import load_pretrained
from pgp_hf.report.sentences import describe_origin, earlier_revisions
from pgp_hf.runs.folder import RunFolder

START = """
import datasets, tiny
from pgp_hf import PGPTrainer, PGPTrainingArguments, TaskStream, load_pretrained

def part(k, test=True):
    found = datasets.DatasetDict()
    for name, split in tiny.data().items():
        if test or name == "train":
            found[name] = split.select([i for i, label in enumerate(split["label"]) if label // 2 == k])
    return found

def arguments(folder, **settings):
    own = {"num_train_epochs": 1, "learning_rate": 0.01, "augmentation": "flip", "seed": 3, "disable_tqdm": True, **settings}
    return PGPTrainingArguments(folder, use_cpu=True, per_device_train_batch_size=4, **own)

def new(folder, **settings):
    return PGPTrainer(tiny.model(), arguments(folder, **settings), TaskStream.empty(), projection, tiny.processor())

def go_on(source, revision, folder, tests=None, cache=None, **settings):
    where = {"backbone": tiny.backbone(), "processing_class": tiny.processor(), "cache_dir": cache}
    return PGPTrainer.from_pretrained(source, revision, arguments(folder, **settings), tests, **where)

projection = tiny.ProjectionConfig(energy=0.9, key_energy=0.9)
"""
PUSH = "from pgp_hf import hub; result = hub.main(['push', *argv])"
CHECK = """
from pgp_hf import hub
origin = {"repo": repo, "revision": f"task-{tasks}", "commit": None, "tasks": tasks}
hub.check_origin(repo_id, origin, finished, token)
"""


def snippet(code: str) -> str:
    body = textwrap.indent(textwrap.dedent(code), "    ")
    return f"{START}\nwith tiny.without_figures():\n{body}"


@pytest.fixture
def learn(python):
    """Run a snippet after `START`, without drawing figures."""

    def run(code, fails=False, **names):
        return python(snippet(code), fails, **names)

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Three tasks learned in one process, pushed by nobody yet."""
    names: dict = {"folder": str(tmp_path_factory.mktemp("straight") / "run")}
    with tiny.without_figures():
        exec(START + "trainer = new(folder)\nfor k in range(3): trainer.learn(part(k))", names)
    return Path(names["folder"])


def truncated(run: Path, tasks: int, folder: Path) -> str:
    """A copy of a run's first tasks, as it was after them."""
    here = RunFolder(folder)
    for t in range(tasks):
        here.publish(t, lambda there, t=t: _copy(run / f"task-{t + 1}", there))
    return str(folder)


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def publish(hub, python, straight, tmp_path):
    """Publish the first tasks of the run."""

    def push(name="me/run", tasks=2, token=TOKEN):
        folder = truncated(straight, tasks, tmp_path / "published" / name)
        code = "from pgp_hf import hub; result = hub.push(folder, name, token=token).uploaded"
        assert len(python(code, folder=folder, name=name, token=token).value) == tasks
        hub.requests.clear()
        return hub.repos[name]

    return push


def same_task(one: Path, other: Path) -> None:
    """Whatever a task has learned is the same to the bit."""
    files = {file.name for file in one.glob("*.safetensors")}
    assert files == {file.name for file in other.glob("*.safetensors")} and "adapter_model.safetensors" in files
    for name in sorted(files | {"adapter_config.json", "projection.json", "method.json"}):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert images(one) == images(other)


def images(folder: Path) -> list:
    """Classes and hashes of each task's images."""
    tasks = json.loads((folder / "stream.json").read_text())["tasks"]
    return [{name: task.get(name) for name in ("classes", "new_classes", "train", "test")} for task in tasks]


# ---- equal to a run in one process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tests", [True, False])
def test_trainers_that_each_load_the_last_revision_learn_what_one_learns(hub, learn, straight, tmp_path, with_tests):
    code = "t = new(folder, push_to_hub=True, hub_model_id='me/run'); t.learn(part(0)); result = t.hub_model_id"
    learn(code, folder=str(tmp_path / "on-1"))
    code = """
tests = tiny.data()["test"] if with_tests else None
trainer = go_on("me/run", revision, folder, tests, push_to_hub=True)
trainer.learn(part(task))
result = trainer.hub_model_id, trainer.results.to_dict()
"""
    for task in (1, 2):
        names = {"folder": str(tmp_path / f"on-{task + 1}"), "with_tests": with_tests}
        revision = None if task == 1 else "task-2"
        answer = learn(code, task=task, revision=revision, **names)
        assert answer.value[0] == "me/run" and "Not on the Hub" not in answer.out, answer.out

    repo, last = hub.repos["me/run"], tmp_path / "on-3"
    assert list(hub.repos) == ["me/run"] and list(repo.tags) == ["task-1", "task-2", "task-3"]
    for t in (1, 2, 3):
        same_task(straight / f"task-{t}", last / f"task-{t}")
        there = repo.files(f"task-{t}")
        assert there["adapter_model.safetensors"] == (last / f"task-{t}" / "adapter_model.safetensors").read_bytes()
        assert len(load_pretrained(last, f"task-{t}", backbone=tiny.backbone()).classes) == 2 * t
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (last, straight))
    origins = [found["continues"], found["continues"].pop("continues")]
    assert [(one["repo"], one["revision"], one["commit"]) for one in origins] == [
        ("me/run", f"task-{t}", repo.tags[f"task-{t}"]) for t in (2, 1)
    ]
    del found["continues"], found["sha256"], expected["sha256"]
    if with_tests:
        assert tiny.same_results(found, expected)
        return
    matrix = expected["accuracy_matrix"]
    assert found["accuracy_matrix"] == [matrix[0], [None, matrix[1][1], None], [None, None, matrix[2][2]]]
    titles = [commit.title for commit in repo.history()][1:]
    assert titles[0].startswith("Task 1 of 1: average accuracy ") and "None" not in "".join(titles)
    assert titles[1:] == [f"Task {k} of {k}: average accuracy not measured" for k in (2, 3)]
    for t in (2, 3):
        card = repo.files(f"task-{t}")["README.md"].decode()
        assert metadata_errors(card) == [] and "not measured" in card and "Continues [" not in card


def test_one_trainer_learns_and_uploads_task_after_task(hub, learn, straight, tmp_path):
    code = """
trainer = new(folder, push_to_hub=True, hub_model_id="me/run", disable_tqdm=False)
for k in range(3):
    trainer.learn(part(k))
"""
    answer = learn(code, folder=str(tmp_path / "run"))
    repo = hub.repos["me/run"]
    assert list(repo.tags) == ["task-1", "task-2", "task-3"] and repo.main == repo.tags["task-3"]
    said = [line for line in answer.out.splitlines() if "on the Hub" in line]
    assert said == [f"All {k} tasks are on the Hub: {hub.url}/me/run" for k in (1, 2, 3)]
    same_task(straight / "task-3", tmp_path / "run" / "task-3")
    # what this process has uploaded is not compared again
    assert not any(re.search("/tree/task-", one.path) for one in hub.requests)

    code = """
trainer = go_on(folder, None, folder, push_to_hub=True, hub_model_id="me/run")
trainer.learn(part(0, test=False))
result = trainer.results.continues
"""
    assert learn(code, folder=str(tmp_path / "run")).value is None  # in its own folder, it is the same run
    assert list(repo.tags) == [f"task-{k}" for k in (1, 2, 3, 4)]


def test_a_finished_task_that_is_taken_over_is_uploaded(hub, learn, straight, tmp_path):
    folder = truncated(straight, 2, tmp_path / "run")
    code = """
trainer = new(folder, push_to_hub=True, hub_model_id="me/run")
trainer.learn(part(0), resume_from_checkpoint=True)
"""
    answer = learn(code, folder=folder)
    assert list(hub.repos["me/run"].tags) == ["task-1", "task-2"] and "Not on the Hub" not in answer.out


# ---- where it may go --------------------------------------------------------------------------------------------------

LEARN = """
trainer = go_on(source, revision, folder, **settings)
trainer.learn(part(2))
result = trainer.hub_model_id
"""


@pytest.mark.slow
def test_a_revision_of_somebody_else_needs_a_repository_of_its_own(hub, learn, python, publish, tmp_path):
    theirs = publish("stranger/run", token=STRANGER)
    before = (theirs.main, dict(theirs.tags))
    names = {"source": "stranger/run", "revision": None, "folder": str(tmp_path / "on")}
    code = """
trainer = go_on(source, revision, folder, push_to_hub=True)
try: trainer.learn(part(2))
except ValueError as error: result = [str(error), trainer.stream.num_tasks, trainer.hub_model_id]
"""
    message, tasks, there = learn(code, **names).value
    for said in ("stranger/run at task-2", "may not write to it (403)", "hub_model_id='owner/name'"):
        assert said in message
    assert tasks == 2 and there == "stranger/run" and RunFolder(tmp_path / "on").is_empty()
    assert {one.method for one in hub.requests} <= {"GET", "HEAD"}

    own = {"push_to_hub": True, "hub_model_id": "run"}  # of the same name, but the token's user is another
    answer = learn(LEARN, settings=own, **names)
    assert answer.value == "run" and "Not on the Hub" not in answer.out
    mine = hub.repos["me/run"]
    assert list(mine.tags) == ["task-3"] and (theirs.main, theirs.tags) == before
    files = mine.files("task-3")
    card, results = files["README.md"].decode(), json.loads(files["results.json"])
    commit = theirs.tags["task-2"]
    assert results["continues"] == {"repo": "stranger/run", "revision": "task-2", "commit": commit, "tasks": 2}
    page = "https://huggingface.co/stranger/run"
    for said in (f"Continues [`stranger/run`]({page})", f"{page}/tree/task-2", f"{page}/commit/{commit}"):
        assert said in card
    assert f"{page}/tree/task-1" in card and '"me/run", revision="task-3"' in card and metadata_errors(card) == []
    assert all(str(tmp_path).encode() not in data for data in files.values())

    # the folder is whole, and whoever goes on in it, pushes to the same repository
    for t in (1, 2, 3):
        assert len(load_pretrained(tmp_path / "on", f"task-{t}", backbone=tiny.backbone()).classes) == 2 * t
    again = {"source": str(tmp_path / "on"), "folder": str(tmp_path / "on"), "revision": None}
    code = (
        LEARN.replace("part(2)", "part(0)")
        + "pushed = trainer.push_to_hub()\nresult = pushed.present, pushed.elsewhere"
    )
    answer = learn(code, settings=own, **again)
    assert answer.value == [["task-3", "task-4"], ["task-1", "task-2"]]
    assert list(mine.tags) == ["task-3", "task-4"] and "Not on the Hub" not in answer.out
    answer = python(PUSH, argv=[str(tmp_path / "on"), "--repo_id", "me/other"])
    left_out = "left out, since it is in the repository that the run goes on from"
    uploaded = [f"task-{k} uploaded: {hub.url}/me/other/tree/task-{k}" for k in (3, 4)]
    assert answer.out.splitlines() == [f"task-1 {left_out}", f"task-2 {left_out}", *uploaded]

    # whoever goes on from there gets the earlier tasks from where they are
    code = "trainer = go_on('me/run', None, folder); trainer.learn(part(1, test=False)); result = trainer.results.continues"
    found = learn(code, folder=str(tmp_path / "third")).value
    assert (found["repo"], found["tasks"], found["continues"]["repo"]) == ("me/run", 4, "stranger/run")
    for t in (1, 2, 3, 4):
        same_task(tmp_path / "on" / f"task-{t}", tmp_path / "third" / f"task-{t}")


@pytest.mark.slow
def test_an_older_revision_needs_a_repository_of_its_own(hub, learn, publish, tmp_path):
    publish(tasks=3)
    names = {"source": "me/run", "revision": "task-2", "folder": str(tmp_path / "on")}
    error = learn(LEARN, fails=True, settings={"push_to_hub": True}, **names).error
    assert "ValueError: me/run at task-2 cannot be continued there: its newest task is task-3" in error
    assert RunFolder(tmp_path / "on").is_empty()
    answer = learn(LEARN, settings={"push_to_hub": True, "hub_model_id": "me/branch"}, **names)
    assert list(hub.repos["me/branch"].tags) == ["task-3"] and "Not on the Hub" not in answer.out


def test_repositories_that_a_run_may_go_on_in(hub, python, publish):
    publish()
    default = {"repo": "me/run", "repo_id": None, "tasks": 2, "finished": 2, "token": TOKEN}
    for names, message in [
        ({}, None),
        ({"repo_id": "me/run"}, None),
        ({"repo_id": "run"}, None),
        ({"repo_id": "me/other", "tasks": 1, "finished": 1}, None),
        ({"repo_id": "team/run", "tasks": 1, "finished": 1}, None),
        ({"tasks": 1, "finished": 2}, None),  # task-2 is this run's own
        ({"tasks": 1, "finished": 1}, "me/run at task-1 cannot be continued there: its newest task is task-2"),
        ({"tasks": 1, "finished": 1, "repo_id": "run"}, "its newest task is task-2"),
        ({"tasks": 3, "finished": 3}, "it has no tag task-3"),
        ({"token": READER}, "the token may not write to it (403)"),
        ({"token": STRANGER, "repo_id": "me/run"}, "the token may not write to it (403)"),
        ({"token": STRANGER, "repo_id": "run"}, None),  # stranger/run
        ({"token": "hf_unknown"}, "the token may not write to it (401)"),
        ({"repo": "me/gone"}, "the token may not write to it (404)"),
    ]:
        answer = python(CHECK, message is not None, **{**default, **names})
        assert "Warning" not in answer.out and (message is None or message in answer.error), names
    assert {one.method for one in hub.requests} <= {"GET"}


@pytest.mark.slow
def test_a_repository_that_holds_another_run_is_refused_when_training_begins(hub, learn, publish, tmp_path):
    publish("stranger/run", token=STRANGER)
    other = publish("me/other", tasks=3)
    names = {"source": "stranger/run", "revision": None, "folder": str(tmp_path / "on")}
    answer = learn(LEARN, settings={"push_to_hub": True, "hub_model_id": "me/other"}, **names)
    assert "me/other already holds a run (tag task-3), and this goes on after task-2" in answer.out
    assert "Not on the Hub: task-3." in answer.out and len(other.tags) == 3


def test_a_run_that_goes_on_from_a_folder_is_uploaded_whole(hub, learn, straight, tmp_path):
    source = truncated(straight, 2, tmp_path / "before")
    settings = {"push_to_hub": True, "hub_model_id": "me/whole"}
    answer = learn(LEARN, source=source, revision=None, folder=str(tmp_path / "on"), settings=settings)
    repo = hub.repos["me/whole"]
    assert list(repo.tags) == ["task-1", "task-2", "task-3"] and "Not on the Hub" not in answer.out
    assert json.loads(repo.files()["results.json"])["continues"]["repo"] is None
    assert all(str(tmp_path).encode() not in data for data in repo.files().values())


# ---- whatever the network does ----------------------------------------------------------------------------------------


def test_a_hub_out_of_reach_does_not_stop_the_training(hub, learn, python, publish, tmp_path):
    repo = publish()
    code = """
import os, time
from pgp_hf import load_pretrained
load_pretrained("me/run", revision="task-1", backbone=tiny.backbone())  # is in the cache, as the newest is
trainer = go_on("me/run", None, folder, push_to_hub=True, hub_wait=0.1)
os.remove(mark)
while not os.path.exists(mark + ".down"): time.sleep(0.02)
trainer.learn(part(2))
"""
    (tmp_path / "up").touch()
    python.start(snippet(code), folder=str(tmp_path / "on"), mark=str(tmp_path / "up"))
    while (tmp_path / "up").exists():
        time.sleep(0.02)
    hub.fail(r".*", cut="before", times=None)
    (tmp_path / "up.down").touch()
    answer = python.answer()
    assert "The Hub cannot be asked whether task-3 may go to me/run" in answer.out
    assert "Not on the Hub: task-3." in answer.out
    command = answer.out.rstrip().rpartition("\n")[2].split()
    assert command == f"python -m pgp_hf.hub push {tmp_path / 'on'} --repo_id me/run".split()
    hub.faults.clear()
    assert python(PUSH, argv=command[4:]).value == 0
    assert list(repo.tags) == ["task-1", "task-2", "task-3"]


def test_an_answer_that_says_nothing_or_comes_late_is_a_warning(hub, python):
    names = {"repo": "me/run", "repo_id": None, "tasks": 2, "finished": 2, "token": TOKEN}
    for status in (429, 500, 503):
        hub.fail(r"GET .*/auth-check", status=status)
        assert "The Hub cannot be asked" in python(CHECK, **names).out
    hub.fail(r"GET .*/auth-check", delay=1)
    code = "from pgp_hf.hub import origin as module; module.LONGEST, before = 0.1, module.LONGEST\ntry:\n"
    code += "".join(f"    {line}\n" for line in CHECK.strip().splitlines()) + "finally: module.LONGEST = before"
    assert "did not finish within 0.1 s" in python(code, **names).out


ORIGIN = """
from pgp_hf.runs.open import open_finished
from pgp_hf.training.learning import origin
where = {"cache_dir": cache, "local_files_only": offline}
result = origin(open_finished("me/run", revision, **where), "me/run", revision)
"""


def test_the_commit_that_a_run_goes_on_from(hub, python, publish, tmp_path):
    repo = publish()
    tagged = repo.tags["task-2"]
    repo.edit(NOTES=b"main has moved on")
    cache, commits = str(tmp_path / "cache"), {None: repo.main, "main": repo.main, "task-2": tagged}
    commits |= {tagged: tagged, repo.main: repo.main}
    for offline in (False, True):
        hub.requests.clear()
        for revision, commit in commits.items():
            found = python(ORIGIN, revision=revision, cache=cache, offline=offline).value
            assert found == {"repo": "me/run", "revision": "task-2", "commit": commit, "tasks": 2}
        assert bool(hub.requests) != offline
    found = python(ORIGIN, revision="task-1", cache=cache, offline=False).value
    assert (found["revision"], found["commit"], found["tasks"]) == ("task-1", repo.tags["task-1"], 1)


def test_repositories_that_cannot_be_read(hub, learn, publish, tmp_path):
    repo = publish()
    code = "go_on('me/run', None, folder, hub_token=token)"
    names = {"folder": str(tmp_path / "on")}
    repo.private = True
    error = learn(code, fails=True, token=STRANGER, **names).error
    assert "RepositoryNotFoundError" in error and "me/run" in error
    repo.private = False
    hub.fail(r"(GET|HEAD) .*/resolve/", status=403, code="GatedRepo", message="Access is restricted", times=None)
    names["cache"] = str(tmp_path / "cache")
    error = learn(code.replace("folder,", "folder, cache=cache,"), fails=True, token=TOKEN, **names).error
    assert "GatedRepoError" in error and "me/run" in error
    assert not (tmp_path / "on").exists() or RunFolder(tmp_path / "on").is_empty()


# ---- what the card says -----------------------------------------------------------------------------------------------


def hub_origin(repo, tasks, continues=None):
    own = {"repo": repo, "revision": f"task-{tasks}", "commit": None, "tasks": tasks}
    return {**own, "continues": continues} if continues else own


@pytest.mark.parametrize(
    ("origin", "repo_id", "named"),
    [
        (hub_origin("a/run", 3), None, "a/run"),
        (hub_origin("a/run", 3), "b/run", "a/run"),
        (hub_origin("a/run", 3), "a/run", None),
        (hub_origin("b/run", 5, hub_origin("a/run", 3)), "b/run", "a/run"),
        (hub_origin(None, 5, hub_origin("a/run", 3)), "b/run", "a/run"),
        (hub_origin(None, 5, hub_origin("a/run", 3)), "a/run", None),
        (hub_origin(None, 5), "b/run", "a local folder"),
    ],
)
def test_a_card_names_the_origin_in_another_repository(origin, repo_id, named):
    said = describe_origin({"continues": origin}, repo_id)
    assert said is None if named is None else named in said


def test_earlier_tasks_are_linked_to_where_they_are():
    def links(*args):
        found = earlier_revisions({"continues": hub_origin(*args)})
        return {
            t + 1: re.fullmatch(r"https://huggingface.co/(.*)/tree/task-(\d+)", url).groups()
            for t, url in found.items()
        }

    assert links("a/run", 2) == {1: ("a/run", "1"), 2: ("a/run", "2")}
    assert links("b/run", 3, hub_origin("a/run", 2)) == {**links("a/run", 2), 3: ("b/run", "3")}
    assert links(None, 3, hub_origin("a/run", 2)) == links("a/run", 2)
    # what goes on from a folder is uploaded whole
    assert links("a/run", 2, hub_origin(None, 1)) == links("a/run", 2)


def test_the_first_own_task_of_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    assert package.origin_of(folder) is None
    for t, origin in enumerate([None, hub_origin("a/run", 1), hub_origin(None, 2, hub_origin("a/run", 1))]):
        content = json.dumps({"continues": origin} if origin else {})
        folder.publish(t, lambda there, content=content: (there / "results.json").write_text(content))
        assert (package.origin_of(folder) or {}).get("repo") == ("a/run" if t else None)
